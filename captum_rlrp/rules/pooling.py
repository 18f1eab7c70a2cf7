"""Average pooling, a spatial map (method.md §2), and max pooling, a choice (§5)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from .base import Call, Rule
from .linear import LinearRule

if TYPE_CHECKING:
    from .pass_ import Pass


def per_axis(value: Any, axes: int) -> list[int]:
    """One number per pooled axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


class Pooling:
    """What the pools share: the number of pooled axes, and inputs without a batch dimension."""

    def __init__(self, axes: int) -> None:
        self.axes = axes

    def batched(self, shape: Any) -> bool:
        return len(shape) == self.axes + 2

    def window(self, call: Call) -> tuple[list[int], list[int], list[int]]:
        """Kernel, stride and padding per axis."""
        kernel = per_axis(call.args["kernel_size"], self.axes)
        stride = per_axis(call.args["stride"], self.axes) if call.args["stride"] else kernel
        return kernel, stride, per_axis(call.args["padding"], self.axes)


class AvgPool(Pooling, LinearRule):
    """Average pooling; |A| = A."""

    pools = True

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        shape = list(run.like(self.operand(call)).shape)
        whole = self.batched(shape)
        result: Tensor = run.kernels.avg_pool(
            g if whole else g.unsqueeze(0),
            shape if whole else [1, *shape],
            *self.window(call),
            call.args["ceil_mode"],
            call.args["count_include_pad"],
            call.args.get("divisor_override"),
        )
        return result if whole else result.squeeze(0)

    def one_to_one(self, call: Call) -> bool:
        return all(k == 1 for k in self.window(call)[0])

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        divisor = call.args.get("divisor_override") or 1
        return self.transpose(run, call, r) * divisor


class AdaptiveAvgPool(Pooling, LinearRule):
    """Adaptive average pooling, global pooling among it; |A| = A."""

    pools = True

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        shape = list(run.like(self.operand(call)).shape)
        whole = self.batched(shape)
        pooled = shape[-self.axes :]
        if pooled == list(g.shape[-self.axes :]):
            return g
        if all(size == 1 for size in g.shape[-self.axes :]):  # global: every element an equal part
            return (g / prod(pooled)).expand(shape)
        result: Tensor = run.kernels.adaptive_avg_pool(
            g if whole else g.unsqueeze(0), shape if whole else [1, *shape]
        )
        return result if whole else result.squeeze(0)

    def one_to_one(self, call: Call) -> bool:
        shape = call.shape(self.operand(call))
        return list(shape[-self.axes :]) == list(call.shape(call.node)[-self.axes :])


class Reduction(LinearRule):
    """``mean`` and ``sum`` over axes; |A| = A."""

    pools = True

    def one_to_one(self, call: Call) -> bool:
        return all(call.shape(self.operand(call))[d] == 1 for d in _reduced(self, call))

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        shape = run.like(self.operand(call)).shape
        reduced = {d % len(shape) for d in _reduced(self, call)}
        g = g.reshape([1 if d in reduced else size for d, size in enumerate(shape)])
        return (g / prod(shape[d] for d in reduced) if call.name == "mean" else g).expand(shape)

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        return r.reshape(run.like(self.operand(call)).shape)


def _reduced(rule: LinearRule, call: Call) -> list[int]:
    """The axes that are summed over."""
    dims = call.args.get("dim")
    if isinstance(dims, int):
        return [dims]
    return list(dims or range(len(call.shape(rule.operand(call)))))


class Trapezoid(LinearRule):
    """``trapezoid``: a weighted sum over an axis, of whichever sign the steps are."""

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        y = super().apply(run, call, x)
        if not absolute:
            return y
        # Each input has a part in one output only, so the column sums are the coefficients.
        coefficients = super().transpose(run, call, torch.ones_like(y).detach()).abs()
        return (x * coefficients).sum(call.args["dim"])


class MaxPool(Pooling, Rule):
    """The whole relevance of an output goes to the element that was its maximum.

    Args:
        axes: Number of pooled axes.
        adaptive: The op is given the output's size in place of a window.
    """

    def __init__(self, axes: int, adaptive: bool = False) -> None:
        super().__init__(axes)
        self.adaptive = adaptive

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def pool(self, run: Pass, call: Call) -> tuple[Tensor, Tensor]:
        """The maxima, and which elements they were."""
        x = run.value(call.active[0])
        whole = self.batched(x.shape)
        y, winners = self._kernel(run, call, "pool", x if whole else x.unsqueeze(0))
        return y if whole else y.squeeze(0), winners

    def winners(self, run: Pass, call: Call) -> Tensor:
        """Which elements were the maxima."""
        return self.pool(run, call)[1]

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        shape = list(run.like(call.active[0]).shape)
        whole = self.batched(shape)
        result = self._kernel(
            run,
            call,
            "unpool",
            r if whole else r.unsqueeze(0),
            self.winners(run, call),
            shape if whole else [1, *shape],
        )
        return (result if whole else result.squeeze(0),)

    def _kernel(self, run: Pass, call: Call, name: str, *args: Any) -> Any:
        """Runs max_pool or max_unpool, or what they are called where pooling is adaptive."""
        if self.adaptive:
            size = [per_axis(call.args["output_size"], self.axes)] if name == "pool" else []
            return getattr(run.kernels, f"adaptive_max_{name}")(*args, *size)
        dilation = per_axis(call.args["dilation"], self.axes)
        window = (*self.window(call), dilation, call.args["ceil_mode"])
        return getattr(run.kernels, f"max_{name}")(*args, *window)
