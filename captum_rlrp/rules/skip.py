"""Sums of activations, skip connections (method.md §4), and adding a constant (§3)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Node

from .base import Call, LinearRule, Relevance, Rule, sum_to

if TYPE_CHECKING:
    from ..run.program import Run


class Sum(Rule):
    """s = a ± b: r_a = r·|a|/(|a|+|b|), r_b = r·|b|/(|a|+|b|), halves where both are 0."""

    def select(self, call: Call) -> Rule | None:
        return self if len(call.active) == 2 else Shift()

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        a, b = (run.value(node) for node in call.active)
        alpha = call.args.get("alpha", 1)
        if alpha != 1:
            # add and sub scale the second operand, rsub the first.
            a, b = (
                (a * alpha, b) if call.target.overloadpacket.__name__ == "rsub" else (a, b * alpha)
            )
        shape = run.like(call.node).shape
        r_a, r_b = run.split(call.node, call.active[0], a.expand(shape), b.expand(shape), terms)
        return [
            [r if node_shape == shape else Relevance(sum_to(r.values, node_shape), r.factor)]
            for r, node_shape in zip((r_a, r_b), (a.shape, b.shape), strict=True)
        ]


class Shift(LinearRule):
    """A constant added to, or subtracted from, a value; the constant receives nothing."""

    def needs(self, call: Call) -> tuple[Node, ...]:
        return ()

    def _sign(self, call: Call) -> Any:
        name = call.target.overloadpacket.__name__
        alpha = call.args.get("alpha", 1)
        first = call.args["self"] is self.operand(call)
        if name == "rsub":  # other − alpha · self
            return -alpha if first else 1
        if first:
            return 1
        return alpha if name == "add" else -alpha

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        sign = self._sign(call)
        g = sum_to(g, run.like(self.operand(call)).shape)
        return g if sign == 1 else g * sign

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        return (x * self._sign(call)).expand(run.like(call.node).shape)

    def one_to_one(self, call: Call) -> bool:
        return True

    def route(self, run: Run, call: Call, r: Tensor) -> Tensor:
        return sum_to(r, run.like(self.operand(call)).shape)
