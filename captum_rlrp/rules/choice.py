"""Choices (method.md §5): relevance goes whole to the element that was chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from .base import Call, LinearRule, Relevance, Rule, sum_to
from .passthrough import PassThrough

if TYPE_CHECKING:
    from ..run.program import Run


class Maximum(Rule):
    """Elementwise maximum or minimum of two values: to the winner, halves in a tie."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def select(self, call: Call) -> Rule | None:
        if len(call.active) == 2:
            return self
        return PassThrough("self" if call.is_active("self") else "other")

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        a, b = (run.value(node) for node in call.active)
        share = 0.5 * (1 + self.sign * torch.sign(a - b))
        r = run.merge(call.node, terms)
        shares = (share.to(r.values.dtype), (1 - share).to(r.values.dtype))
        return [
            [Relevance(sum_to(r.values * part, value.shape), r.factor)]
            for part, value in zip(shares, (a, b), strict=True)
        ]


class Extremum(Rule):
    """``amax``, ``max(dim)`` and their minimum twins: to the first extreme element."""

    def __init__(self, largest: bool) -> None:
        self.largest = largest

    def select(self, call: Call) -> Rule | None:
        if "other" in call.args:
            return Maximum(1 if self.largest else -1).select(call)
        return self if "dim" in call.args else None

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        x: Tensor = run.value(call.active[0])
        dims = call.args["dim"]
        dims = [dims] if isinstance(dims, int) else list(dims) or list(range(x.dim()))
        dims = [d % x.dim() for d in dims]
        kept = [d for d in range(x.dim()) if d not in dims]
        moved = x.permute(kept + dims)
        flat = moved.flatten(len(kept))
        winner = (flat.argmax(-1) if self.largest else flat.argmin(-1)).unsqueeze(-1)
        r = run.merge(call.node, terms)
        values = r.values.reshape(winner.shape)
        routed = values.new_zeros(flat.shape).scatter_(-1, winner, values).view(moved.shape)
        back = [(kept + dims).index(d) for d in range(x.dim())]
        return [[Relevance(routed.permute(back), r.factor, r.mass)]]


class Chosen(Rule):
    """``topk``, ``sort``, ``median`` …: relevance of each value goes to where it was taken from."""

    def select(self, call: Call) -> Rule | None:
        return self if "dim" in call.args and call.item == 0 else None

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        dim, shape = call.args["dim"], run.like(call.active[0]).shape
        places = run.evaluate(replace(call, item=1), {})
        r = run.merge(call.node, terms)
        values = r.values
        if call.args.get("keepdim") is False:
            places, values = places.unsqueeze(dim), values.unsqueeze(dim)
        return [[Relevance(values.new_zeros(shape).scatter_add_(dim, places, values), r.factor)]]


class Masked(LinearRule):
    """One branch behind a fixed mask: it multiplies by 0 or 1 and may add a constant.

    An output that the mask covers depends on no input, so alone it is a section.
    """

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(
            call.args[name]
            for name in ("condition", "mask")
            if isinstance(call.args.get(name), Node)
        )

    def _keep(self, run: Run, call: Call) -> Tensor:
        if "mask" in call.args:
            mask: Tensor = run.value(call.args["mask"])
            return mask if call.is_active("value") else ~mask
        condition: Tensor = run.value(call.args["condition"])
        return ~condition if call.is_active("other") else condition

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        return sum_to(g * self._keep(run, call), run.like(self.operand(call)).shape)

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        return (x * self._keep(run, call)).expand(run.like(call.node).shape)


class Where(Rule):
    """``where`` and ``masked_fill``: relevance follows the elements; the condition is a gate."""

    def select(self, call: Call) -> Rule | None:
        branches = [call.args.get(name) for name in ("self", "other", "input", "value")]
        condition = call.args.get("condition", call.args.get("mask"))
        if any(a not in branches for a in call.active):
            return None
        fixed = isinstance(condition, Node) and not condition.meta.get("depends", True)
        return Masked() if len(call.active) == 1 and fixed else self

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(
            call.args[name]
            for name in ("condition", "mask")
            if isinstance(call.args.get(name), Node)
        )

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        r = run.merge(call.node, terms)
        if "condition" in call.args:
            chosen = {"self": run.value(call.args["condition"])}
            chosen["other"] = ~chosen["self"]
        else:
            chosen = {"value": run.value(call.args["mask"])}
            chosen["self"] = ~chosen["value"]
        names = [next(n for n in chosen if call.args.get(n) is node) for node in call.active]
        if len(names) == 2 and call.active[0] is call.active[1]:
            names = list(chosen)
        return [
            [Relevance(sum_to(r.values * chosen[name], run.like(node).shape), r.factor)]
            for name, node in zip(names, call.active, strict=True)
        ]
