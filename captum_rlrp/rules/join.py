"""``cat``, ``stack`` and writes into a part (method.md §6): relevance follows the elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from .base import Call, Relevance, Rule, adjoint, sum_to

if TYPE_CHECKING:
    from ..run.program import Run


class Join(Rule):
    """Each operand takes its part of the relevance; a constant's part is not passed on."""

    def __init__(self, stacks: bool) -> None:
        self.stacks = stacks

    def operands(self, call: Call) -> tuple[Node, ...]:
        """What is joined, in order."""
        return tuple(call.args["tensors"])

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        dim = call.args["dim"] % len(run.like(call.node).shape)
        carriers = self.carriers(call)
        parts: list[list[Relevance]] = []
        start = 0
        for operand in self.operands(call):
            active = operand in carriers
            if self.stacks:
                size = 1
            else:  # a constant's is known from the capture
                size = (run.like(operand).shape if active else call.shape(operand))[dim]
            if active:
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


class Extension(Join):
    """``cat(a, b, c)`` where ``cat(a, b)`` is at hand, seen as ``cat(cat(a, b), c)``.

    In dense blocks every layer joins all outputs before it. So each output's relevance is summed
    once, and not once for every layer behind it.

    Args:
        joined: The value that its first operands make.
        count: How many they are.
    """

    def __init__(self, joined: Node, count: int) -> None:
        super().__init__(stacks=False)
        self.joined, self.count = joined, count

    def operands(self, call: Call) -> tuple[Node, ...]:
        return (self.joined, *call.args["tensors"][self.count :])

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return self.operands(call)

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        return super().propagate(run, call, [run.merge(call.node, terms)])


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
