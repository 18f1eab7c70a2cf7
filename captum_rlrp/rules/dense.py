"""Dense maps (method.md §2): ``Linear`` and products with a constant matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Node

from .attention import PRODUCT
from .base import Call, LinearRule, Rule, adjoint

if TYPE_CHECKING:
    from ..run.program import Run


class Matmul(LinearRule):
    """A product of matrices, one of them constant. Of two activations: see ``attention.py``.

    Args:
        bias: Name of the argument that is added to the product, if the op has one.
    """

    def __init__(self, bias: str | None = None) -> None:
        self.bias = bias

    def select(self, call: Call) -> Rule | None:
        if self.bias is not None and call.is_active(self.bias):
            return None
        return self if len(call.active) == 1 else PRODUCT

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        y = super().linear_part(run, call, x)
        if self.bias is None:
            return y
        return y - super().linear_part(run, call, x.new_zeros(()).expand_as(x))


class Dense(Matmul):
    """``aten.linear``: y = x Wᵀ + b, Jᵀ g = g W."""

    def __init__(self) -> None:
        super().__init__("bias")

    def _constant_weight(self, call: Call) -> bool:
        return call.is_active("input")

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        if not self._constant_weight(call):
            return adjoint(run, call, self.operand(call), g, {"bias": None})
        weight: Tensor = run.value(call.args["weight"])
        if weight.dtype != g.dtype:
            weight = weight.to(g.dtype)
        column = run.start_column(call.node)
        if column is not None:
            return run.kernels.linear_rows(weight, column)
        return run.kernels.linear(g, weight)

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        return run.evaluate(call, {self.operand(call): x}, overrides={"bias": None})

    def one_to_one(self, call: Call) -> bool:
        return self._constant_weight(call) and call.shape("weight")[1] == 1

    def route(self, run: Run, call: Call, r: Tensor) -> Tensor:
        return r.sum(-1, keepdim=True)

    def needs(self, call: Call) -> tuple[Node, ...]:
        weight = call.args["weight"] if self._constant_weight(call) else call.args["input"]
        return (weight,)
