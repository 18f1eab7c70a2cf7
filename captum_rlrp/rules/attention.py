"""Matrix products of two activations, attention (method.md §6).

Attention weights are a gate and receive nothing. The value path is a linear section of its own:
its input is V, its matrix the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .base import Call, LinearRule, Relevance, Rule
from .section import relative

if TYPE_CHECKING:
    from ..run.program import Run

aten = torch.ops.aten

_SOFTMAX = {aten.softmax, aten._softmax, aten._safe_softmax}
# What may lie between a softmax and the product that uses its weights.
_KEEPS_WEIGHTS = {
    aten.dropout, aten.view, aten.reshape, aten.permute, aten.transpose, aten.contiguous,
    aten.clone, aten.unsqueeze, aten.squeeze, aten.expand, aten.to, aten._to_copy, aten.masked_fill,
    aten.mul, aten.div, aten.slice, aten.select, aten.flatten, aten.unflatten, aten.pad,
    aten.constant_pad_nd,
}  # fmt: skip


def is_weights(node: Any) -> bool:
    """Whether the value is the output of a softmax, reshaped or masked maybe."""
    while isinstance(node, Node):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _SOFTMAX:
            return True
        if packet not in _KEEPS_WEIGHTS:
            return False
        node = node.args[0]
    return False


class _Operand(LinearRule):
    """A bilinear call seen as linear in one of its operands, the other held fixed."""

    def __init__(self, operand: Node) -> None:
        self._operand = operand

    def operand(self, call: Call) -> Node:
        return self._operand


class MatrixProduct(Rule):
    """y = A·V of two activations. Where neither is attention weights, each takes half of r."""

    def carriers(self, call: Call) -> tuple[Node, ...]:
        values = tuple(node for node in call.active if not is_weights(node))
        return values if len(values) == 1 else call.active

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(call.nodes())

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        carriers = self.carriers(call)
        merged = run.merge(call.node, terms)
        if len(carriers) == 2:
            mass = None if merged.mass is None else merged.mass * 0.5
            merged = Relevance(merged.values * 0.5, merged.factor, mass)
        return [[relative(run, node, [(_Operand(node), call)], merged)] for node in carriers]


class ScaledDotProductAttention(MatrixProduct):
    """``scaled_dot_product_attention``: softmax(QKᵀ·scale + mask) is the gate, V carries."""

    def select(self, call: Call) -> Rule | None:
        dropped = call.args.get("dropout_p")
        return self if call.is_active("value") and not dropped else None

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return (call.args["value"],)


PRODUCT = MatrixProduct()
