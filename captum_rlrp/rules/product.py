"""Products of activations, gates (method.md §6), and multiplying by a constant (§3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.layout import expression
from .base import Call, Rule, once, sum_to
from .linear import LinearRule
from .passthrough import PassThrough

if TYPE_CHECKING:
    from .pass_ import Pass

_EXPANSIONS = {torch.ops.aten.expand, torch.ops.aten.expand_as, torch.ops.aten.broadcast_to}


class Product(Rule):
    """y = a·b, and a/b as a·(1/b): a broadcast operand is a gate, equal ones take r/2 each."""

    def select(self, call: Call) -> Rule | None:
        if call.args.get("rounding_mode") is not None and len(call.active) == 1:
            return PassThrough(call.slots[0][0])  # no line any more, but steps
        if len(call.active) == 2:
            return self
        if call.is_active("self"):
            return Scale()
        return PassThrough("other") if call.name in ("div", "true_divide", "divide") else Scale()

    @once
    def carriers(self, call: Call) -> tuple[Node, ...]:
        whole = [expression(size) for size in call.shape(call.node)]
        full = [_own_shape(node) == whole for node in call.active]
        if full[0] == full[1]:
            return call.active
        return (call.active[0 if full[0] else 1],)

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        carriers = self.carriers(call)
        if len(carriers) == 1:
            return (r,)
        half = r * 0.5
        return [sum_to(half, run.like(node).shape) for node in carriers]


class Angle(Product):
    """``atan2``: the angle of a quotient, and so shared as the quotient is."""

    def select(self, call: Call) -> Rule | None:
        return self if len(call.active) == 2 else PassThrough(call.slots[0][0])


def _own_shape(node: Node) -> list[Any]:
    """The operand's shape before it was expanded to fit, as formulas of the batch size."""
    while getattr(node.target, "overloadpacket", None) in _EXPANSIONS:
        node = node.args[0]  # type: ignore[assignment]
    return [expression(size) for size in node.meta["val"].shape]


class Scale(LinearRule):
    """A value multiplied or divided by a constant, or negated."""

    constants = ("self", "other")

    def one_to_one(self, call: Call) -> bool:
        return True

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        return sum_to(r, run.like(self.operand(call)).shape)


class GatedLinearUnit(Rule):
    """``glu``: the product of one half and the sigmoid of the other, so r/2 to each."""

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        return (torch.cat([r * 0.5] * 2, call.args["dim"]),)
