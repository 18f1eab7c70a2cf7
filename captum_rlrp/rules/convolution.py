"""Convolutions and transposed convolutions in 1 to 3 dimensions (method.md §2)."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.reference import every, ints
from .attention import PRODUCT
from .base import Call, LinearRule, Part, Rule, adjoint

if TYPE_CHECKING:
    from ..run.program import Run


class Convolution(LinearRule):
    """y = w ∗ x + b; Jᵀ g is the convolution's input gradient, for which x itself is not needed."""

    def select(self, call: Call) -> Rule | None:
        if call.is_active("bias"):
            return None
        return self if len(call.active) == 1 else PRODUCT

    def needs(self, call: Call) -> tuple[Node, ...]:
        return (call.args["weight" if call.is_active("input") else "input"],)

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        return self._transpose(run, call, g, run.value(call.args["weight"]))

    def _transpose(self, run: Run, call: Call, g: Tensor, weight: Tensor) -> Tensor:
        padding = _padding(call)
        shape = run.like(call.args["input"]).shape
        if not call.is_active("input") or padding is None or len(shape) != weight.dim():
            overrides: dict[str, Any] = {"bias": None}
            if call.is_active("input"):
                overrides["weight"] = weight.to(g.dtype)
            return adjoint(run, call, self.operand(call), g, overrides)
        transposed, output_padding = _transposed(call)
        return run.kernels.conv(
            g,
            weight.to(g.dtype),
            shape,
            _per_axis(call.args["stride"], call),
            padding,
            _per_axis(call.args["dilation"], call),
            transposed,
            output_padding,
            call.args["groups"],
        )

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        return run.evaluate(call, {self.operand(call): x}, overrides={"bias": None})

    def one_to_one(self, call: Call) -> bool:
        if not call.is_active("input"):
            return False
        weight, (transposed, output_padding) = call.shape("weight"), _transposed(call)
        if not transposed:
            pads = _padding(call)
            return weight[1] * prod(weight[2:]) == 1 and pads is not None and not any(pads)
        # Windows that tile the output (padding cuts it), one input channel a group.
        return (
            weight[0] == call.args["groups"]
            and list(weight[2:]) == _per_axis(call.args["stride"], call)
            and all(d == 1 for d in _per_axis(call.args["dilation"], call))
            and all(o <= p for o, p in zip(output_padding, _padding(call) or [], strict=True))
        )

    def route(self, run: Run, call: Call, r: Tensor) -> Tensor:
        weight = run.value(call.args["weight"])
        return self._transpose(run, call, r, torch.ones_like(weight, dtype=r.dtype))


def part_read(call: Call) -> Part | None:
    """The pixels that a 1×1 convolution with a stride reads; None where others are read too."""
    transposed, _ = _transposed(call)
    if transposed or prod(call.shape("weight")[2:]) != 1 or not call.is_active("input"):
        return None
    strides, padding = _per_axis(call.args["stride"], call), _padding(call)
    batched = len(call.shape("input")) == len(strides) + 2
    skips = any(s > 1 for s in strides) and padding is not None and not any(padding)
    return every(strides) if skips and batched else None


def _per_axis(value: Any, call: Call) -> list[int]:
    """``[1]`` stands for as many axes as the kernel has."""
    return ints(value, len(call.shape("weight")) - 2)


def _transposed(call: Call) -> tuple[bool, list[int]]:
    transposed = call.args.get("transposed")
    if transposed is None:
        transposed = "output_padding" in call.args
    return transposed, _per_axis(call.args.get("output_padding", 0), call)


def _padding(call: Call) -> list[int] | None:
    """Padding per axis; None where "same" needs more on one side than on the other."""
    padding = call.args["padding"]
    if not isinstance(padding, str):
        return _per_axis(padding, call)
    kernel = list(call.shape("weight")[2:])
    if padding == "valid":
        return [0] * len(kernel)
    dilation = _per_axis(call.args["dilation"], call)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [t // 2 for t in total] if all(t % 2 == 0 for t in total) else None
