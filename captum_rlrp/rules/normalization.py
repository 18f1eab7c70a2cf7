"""Batch norm in eval mode: a linear map with one scale per channel (method.md §2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .base import Call, Rule, Slot
from .linear import LinearRule

if TYPE_CHECKING:
    from .pass_ import Pass


class BatchNorm(LinearRule):
    """y = (x − μ) · γ/√(σ² + ε) + β with running μ, σ²: one-to-one, so r passes unchanged."""

    shift: ClassVar[Mapping[str, Any]] = {"bias": None, "running_mean": None}

    def select(self, call: Call) -> Rule | None:
        uses_batch = call.args.get("training") or call.args["running_var"] is None
        return self if not uses_batch and call.active == (call.args["input"],) else None

    def slot(self, call: Call) -> Slot:
        return ("input", None)

    def one_to_one(self, call: Call) -> bool:
        return True

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        variance, weight = run.value(call.args["running_var"]), run.value(call.args["weight"])
        scale = batch_norm_scale(variance, call.args["eps"], weight).to(x.dtype)
        return x * per_channel(scale.abs() if absolute else scale, x.dim())

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        return self.apply(run, call, g, absolute=absolute)

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        return r


def batch_norm_scale(variance: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    """γ/√(σ² + ε)."""
    scale = (variance + eps).rsqrt()
    return scale if weight is None else scale * weight


def per_channel(value: Tensor, dims: int) -> Tensor:
    """Shaped to multiply the channels of a value with so many axes."""
    return value.view([1, -1] + [1] * (dims - 2))
