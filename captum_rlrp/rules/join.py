"""``cat``, ``stack`` and writes into a part (method.md §6): relevance follows the elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from .base import Call, Relevance, Rule, adjoint, sum_to

if TYPE_CHECKING:
    from ..program import Run


class Join(Rule):
    """Each operand takes its part of the relevance; a constant's part is not passed on."""

    def __init__(self, stacks: bool) -> None:
        self.stacks = stacks

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        dim = call.args["dim"] % len(run.like(call.node).shape)
        parts: list[list[Relevance]] = []
        start = 0
        for operand in call.args["tensors"]:
            size = 1 if self.stacks else _length(run, call, operand, dim)
            if operand in call.active:
                part = [t.values.narrow(dim, start, size) for t in terms]
                parts.append(
                    [
                        Relevance(p.squeeze(dim) if self.stacks else p, t.factor)
                        for p, t in zip(part, terms, strict=True)
                    ]
                )
            start += size
        return parts

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return tuple(operand for operand in call.args["tensors"] if operand in call.active)


def _length(run: Run, call: Call, operand: Node, dim: int) -> int:
    if operand in call.active:
        return run.like(operand).shape[dim]
    length: int = call.shape(operand)[dim]  # of a constant
    return length


class Scatter(Rule):
    """A value with a part replaced: what is replaced receives nothing, what replaces it does."""

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(node for node in call.nodes() if node not in call.active)

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        return [
            [Relevance(adjoint(run, call, node, t.values), t.factor) for t in terms]
            for node in call.active
        ]


class Overwrite(Rule):
    """``copy``: the whole value is replaced by another, which may be broadcast."""

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return (call.args["src"],) if call.is_active("src") else ()

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        return [
            [Relevance(sum_to(t.values, run.like(node).shape), t.factor) for t in terms]
            for node in self.carriers(call)
        ]
