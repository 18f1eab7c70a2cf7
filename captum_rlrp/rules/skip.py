"""Sums of activations, skip connections (method.md §4), and adding a constant (§3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Node

from .base import Call, Rule, sum_to
from .linear import LinearRule

if TYPE_CHECKING:
    from .pass_ import Pass


class Sum(Rule):
    """s = a ± b: r_a = r·|a|/(|a|+|b|), r_b = r·|b|/(|a|+|b|), halves where both are 0."""

    def select(self, call: Call) -> Rule | None:
        return self if len(call.active) == 2 else Shift()

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        values = [run.value(node) for node in call.active]
        alpha = call.args.get("alpha", 1)
        a, b = (v.to(r.dtype).expand(r.shape) for v in values)
        if alpha != 1:  # add and sub scale the second operand, rsub the first
            a, b = (a * alpha, b) if call.name == "rsub" else (a, b * alpha)
        shares = run.kernels.split(a, b, r)
        return [sum_to(part, v.shape) for part, v in zip(shares, values, strict=True)]


class Shift(LinearRule):
    """A constant added to, or subtracted from, a value; the constant receives nothing."""

    def fixed(self, call: Call) -> tuple[Node, ...]:
        return ()

    def _sign(self, call: Call) -> Any:
        alpha = call.args.get("alpha", 1)
        first = self.slot(call)[0] == "self"
        if call.name == "rsub":  # other − alpha · self
            return -alpha if first else 1
        if first:
            return 1
        return alpha if call.name == "add" else -alpha

    def one_to_one(self, call: Call) -> bool:
        return True

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        sign = self._sign(call)
        y = x.expand(run.like(call.node).shape)
        sign = abs(sign) if absolute else sign
        return y if sign == 1 else y * sign

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        return sum_to(r, run.like(self.operand(call)).shape)
