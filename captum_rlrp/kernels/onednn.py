"""oneDNN's own ops, which PyTorch has for its compiler: convolutions with what follows fused in.

float32 on the CPU; :func:`covers` tells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_rlrp.kernels import reference

aten = torch.ops.aten
ops = torch.ops.mkldnn

# Activations oneDNN applies on the way out: its name, its scalars' arguments.
ACTIVATIONS: dict[Any, tuple[str, tuple[float | str, ...]]] = {
    aten.relu: ("relu", ()),
    aten.relu6: ("hardtanh", (0.0, 6.0)),
    aten.hardtanh: ("hardtanh", ("min_val", "max_val")),
    aten.silu: ("swish", ()),
    aten.hardswish: ("hardswish", ()),
    aten.sigmoid: ("sigmoid", ()),
    aten.tanh: ("tanh", ()),
    aten.leaky_relu: ("leaky_relu", ("negative_slope",)),
}

_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and hasattr(ops, "_convolution_pointwise")
    and hasattr(ops, "_linear_pointwise")
)
_FEW_PRODUCTS = 2**20  # below which a call of oneDNN takes longer than ATen's whole product
_FEW_ROWS = 4096  # up to which, forward, a matrix product is faster than a convolution of 1×1

Activation = tuple[str, list[float]]
NONE: Activation = ("none", [])


class Operand(Protocol):
    """A tensor, or what is remembered of one."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def covers(x: Operand, weight: Tensor) -> bool:
    """Whether oneDNN convolves the two."""
    return len(x.shape) in (3, 4, 5) and 0 not in x.shape and _runs_on(x, weight)


def _runs_on(x: Operand, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and _AVAILABLE
        and bool(torch.backends.mkldnn.enabled)
    )


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: Activation = NONE,
    other: Tensor | None = None,
) -> Tensor | None:
    """``activation(conv(x) + other)``, for signals and images; None where oneDNN has no such.

    Args:
        x: Input, ``(N, C, *spatial)``.
        weight: Filters.
        bias: Bias.
        stride: One number for each axis.
        padding: Likewise.
        dilation: Likewise.
        groups: Groups of channels.
        activation: Name and scalars, see :data:`ACTIVATIONS`.
        other: A summand.
    """
    if x.dim() == 3:
        few = x.shape[1] <= 4  # which oneDNN reads faster contiguous
        y = convolution(
            x.unsqueeze(2) if few else reference.as_image(x),
            weight.unsqueeze(2),
            bias,
            [1, *stride],
            [0, *padding],
            [1, *dilation],
            groups,
            activation,
            None if other is None else other.unsqueeze(2),
        )
        return None if y is None else y.contiguous(memory_format=torch.channels_last).squeeze(2)
    if not any(padding) and max(stride) > 1 and math.prod(weight.shape[2:]) == 1:
        # Of 1×1, over the pixels that it reads only.
        x = x[reference.every(stride)].contiguous(memory_format=reference.memory_format(x))
        stride = [1] * len(stride)
    has_few_rows = x.numel() <= _FEW_ROWS * x.shape[1]
    if other is None and has_few_rows and is_product(x, weight, stride, padding, groups):
        return product(x, weight, bias, activation)
    if other is None:
        geometry, small = (padding, stride, dilation, groups), dwarfs(weight, x)
        y = ops._convolution_pointwise.default(
            contiguous(x) if small else x, weight, bias, *geometry, *activation, ""
        )
        if small:
            y = y.contiguous(memory_format=reference.memory_format(x))
    else:
        name, _ = activation
        if name not in ("none", "relu") or other.stride() != _strides_like(x, other):
            return None
        y = ops._convolution_pointwise.binary(
            x, other, weight, bias, padding, stride, dilation, groups,
            "add", 1.0, None if name == "none" else name, [], "",
        )  # fmt: skip
    return y


def dwarfs(weight: Tensor, image: Tensor) -> bool:
    """Whether it is cheaper to lay out an image as the weight is than the other way round."""
    return (
        weight.dim() == 4
        and weight.numel() > 20 * image.numel()
        and not weight.is_contiguous(memory_format=torch.channels_last)
        and covers(image, weight)
    )


def contiguous(image: Tensor) -> Tensor:
    """The image contiguous by its strides too, which at a single pixel say nothing by themselves.

    oneDNN's ops go by them, and lay out a large weight for a channels_last image of one pixel.
    """
    return image.flatten().view(image.shape) if image.is_contiguous() else image.contiguous()


def is_product(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int
) -> bool:
    """Whether a convolution, and its input gradient, is a matrix product of what lies in rows."""
    return (
        weight.dim() == 4
        and weight.shape[2] == weight.shape[3] == 1
        and groups == 1
        and not any(padding)
        and all(s == 1 for s in stride)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to multiply rows by the transpose of a matrix ``(out, in)``."""
    return (
        x.dim() > 1
        and weight.dim() == 2
        and x.numel() * weight.shape[0] >= _FEW_PRODUCTS
        and _runs_on(x, weight)
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = NONE
) -> Tensor:
    """``activation(x Wᵀ + b)`` for rows x, of a matrix that lies in any way."""
    y: Tensor = ops._linear_pointwise.default(x, weight, bias, *activation, "")
    return y


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = NONE
) -> Tensor:
    """A convolution of 1×1 as a matrix product; of channels_last nothing is copied."""
    rows = x.permute(0, 2, 3, 1)
    return linear(rows, weight.flatten(1), bias, activation).permute(0, 3, 1, 2)


def _strides_like(x: Tensor, other: Tensor) -> tuple[int, ...]:
    """The strides oneDNN gives its result, which the summand must share."""
    model = torch.empty(other.shape, device="meta")
    return model.to(memory_format=reference.memory_format(x)).stride()
