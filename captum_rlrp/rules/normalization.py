"""Batch norm in eval mode: a linear map with one scale per channel (method.md §2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Node

from .base import Call, LinearRule, Rule

if TYPE_CHECKING:
    from ..run.program import Run


class BatchNorm(LinearRule):
    """y = (x − μ) · γ/√(σ² + ε) + β with running μ, σ²; neither μ nor β receives relevance."""

    def select(self, call: Call) -> Rule | None:
        uses_batch = call.args.get("training") or call.args["running_var"] is None
        return self if not uses_batch and call.active == (call.args["input"],) else None

    def operand(self, call: Call) -> Node:
        node: Node = call.args["input"]
        return node

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(n for n in (call.args["weight"], call.args["running_var"]) if n is not None)

    def scale(self, run: Run, call: Call, dims: int) -> Tensor:
        """γ/√(σ² + ε), shaped to multiply the channels."""
        args = call.args
        variance, weight = run.value(args["running_var"]), run.value(args["weight"])
        return per_channel(batch_norm_scale(variance, args["eps"], weight), dims)

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        return g * self.scale(run, call, g.dim()).to(g.dtype)

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        return x * self.scale(run, call, x.dim()).to(x.dtype)

    def one_to_one(self, call: Call) -> bool:
        return True

    def route(self, run: Run, call: Call, r: Tensor) -> Tensor:
        return r


def batch_norm_scale(variance: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    """γ/√(σ² + ε)."""
    scale = (variance + eps).rsqrt()
    return scale if weight is None else scale * weight


def per_channel(value: Tensor, dims: int) -> Tensor:
    """Shaped to multiply the channels of a value with so many axes."""
    return value.view([1, -1] + [1] * (dims - 2))
