"""3×3 convolutions of stride 1 by Winograd's algorithm: fewer than half of the multiplications.

float32 on the CPU, channels in multiples of 32; :func:`covers` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_rlrp.kernels import extension
from captum_rlrp.kernels.extension import ops
from captum_rlrp.kernels.onednn import Operand

_MULTIPLE = 32  # of which numbers of channels must be
# Patches of 2×2 outputs, up to which transforming the filters takes longer than is gained.
_FEW_PATCHES = 24

# Without wide vectors nobody measured it.
_IS_FAST = extension.available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class Filters(NamedTuple):
    """Filters, and what follows them.

    Attributes:
        weight: ``(K, C, 3, 3)``.
        scale: What each filter's result is multiplied by; None means 1.
        shift: What is added to it then; None means 0.
        padding: Implicit zeros around the image, one number for each axis.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    padding: Sequence[int]


def covers(
    x: Operand,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether it convolves the two, or their gradient, and faster than oneDNN does."""
    return (
        _IS_FAST
        and weight.shape[2:] == (3, 3)
        and groups == 1
        and max(*stride, *dilation) == 1
        and max(padding) <= 2
        and weight.shape[0] % _MULTIPLE == weight.shape[1] % _MULTIPLE == 0
        and weight.numel() > 0
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(x.shape) == 4
        and x.shape[0] * (x.shape[2] // 2) * (x.shape[3] // 2) > _FEW_PATCHES
    )


def convolution(
    x: Tensor, filters: Filters, other: Tensor | None = None, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """``scale · (weight ∗ x) + shift + other``, and each filter's ``scale · Σ |weight|``.

    Args:
        x: Input, ``(N, C, H, W)``.
        filters: What it is convolved with.
        other: A summand.
        relu: Whether negative results become 0.
    """
    weight, scale, shift, padding = filters
    y, mass = ops.conv_3x3.default(x, weight, scale, shift, other, padding, relu)
    return y, mass


def transpose(g: Tensor, filters: Filters) -> Tensor:
    """The transpose of ``x ↦ scale · (weight ∗ x)``: the input gradient."""
    weight, scale, _, padding = filters
    result: Tensor = ops.conv_3x3_transpose.default(g, weight, scale, padding)
    return result


def product(x: Tensor, g: Tensor, filters: Filters, factor: Tensor | None) -> Tensor:
    """Writes ``q = factor · x ⊙ transpose(g)`` over x, in channels_last; returns q's mass."""
    weight, scale, _, padding = filters
    mass: Tensor = ops.conv_3x3_product_.default(x, g, weight, scale, factor, padding)
    return mass
