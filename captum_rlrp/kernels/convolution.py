"""Our own convolutions, with what follows applied.

The model's forward goes by Winograd's algorithms where filters have several taps, in fewer
multiplications. They mix neighbouring pixels, and lose what is small beside them, by which the law
divides: so its convolutions of 3×3 find such pixels, and leave them to a direct convolution, by
which all others go. float32 on the CPU. :func:`suits`, :func:`pays` and :func:`has_law` tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_rlrp.kernels import extension, reference
from captum_rlrp.kernels.extension import ops
from captum_rlrp.kernels.onednn import Operand

_LEAST = 16  # channels, or filters, of several taps; fewer leave vectors empty
_LEAST_OF_ROWS = 32  # inputs and outputs of a dense layer
_OF_FEW = 32  # of which filters of few channels must be a multiple
_OF_GROUP, _MOST_GROUPS = 24, 8  # channels of a group at least, and groups at most
_FEW_CHANNELS = 4  # of the input, as of an RGB image
_FEW_PIXELS = 4  # of 1×1, up to which laying out its filters takes longer than is gained
_TAPS = range(3, 33)  # along one axis alone
_TAPS_OF_BOTH = range(3, 8)
_TAPS_OF_FEW = range(2, 33)
_MOST_TAPS = 64
_MOST_STRIDE = 2  # beyond which its input gradient falls apart into too many convolutions

# Without wide vectors nobody measured it.
_IS_FAST = extension.available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class Filters(NamedTuple):
    """Filters of an image or a signal, and what follows them.

    Attributes:
        weight: ``(K, C, h, w)`` or ``(K, C, k)``.
        scale: What each filter's result is multiplied by; None means 1.
        shift: What is added to it then; None means 0.
        stride: One number for each axis.
        padding: Implicit zeros around the image, likewise.
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]

    def as_image(self) -> Filters:
        """The same for images of one row, if it is of signals."""
        if self.weight.dim() == 4:
            return self
        weight, stride, padding = self.weight.unsqueeze(2), [1, *self.stride], [0, *self.padding]
        return self._replace(weight=weight, stride=stride, padding=padding)


def suits(
    x: Operand,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether it convolves the two, or their gradient, whatever the sizes of batch and image."""
    return (
        _IS_FAST
        and not _is_depthwise(weight, groups)  # oneDNN's is faster
        and max(dilation) == 1
        and _has_channels(weight, groups, stride)
        and weight.numel() > 0
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(x.shape) == weight.dim() in (3, 4)
        and all(p < k for p, k in zip(padding, weight.shape[2:], strict=True))
        and _has_scheme(weight, stride)
    )


def pays(x: Operand, weight: Tensor) -> bool:
    """Whether what suits is faster than oneDNN's at so many pixels of x."""
    if x.dtype != weight.dtype:
        return False
    return max(weight.shape[2:]) > 1 or x.shape[0] * math.prod(x.shape[2:]) > _FEW_PIXELS


def has_law(x: Operand, weight: Tensor, window: reference.Window) -> bool:
    """Whether :func:`divide` covers the two; and :func:`product` where :func:`has_product`."""
    stride, padding, dilation = window[:3]
    return (
        _IS_FAST
        and not window.transposed
        and max(dilation) == 1
        and weight.numel() > 0
        and _has_channels(weight, window.groups, stride)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(x.shape) == weight.dim() in (3, 4)
        and all(p < k for p, k in zip(padding, weight.shape[2:], strict=True))
        and max(weight.shape[2:]) < _MOST_TAPS
        and (
            _is_point(weight) or all(s <= k for s, k in zip(stride, weight.shape[2:], strict=True))
        )
    )


def has_rows(x: Operand, weight: Tensor) -> bool:
    """Whether a dense layer goes as filters of 1×1 over its rows."""
    return _IS_FAST and x.dtype == torch.float32 and min(weight.shape) >= _LEAST_OF_ROWS


def has_matrices(a: Tensor, b: Tensor) -> bool:
    """Whether ``a @ b`` are small products, one for each index in front."""
    return (
        _IS_FAST
        and a.dim() == b.dim() > 2
        and a.shape[:-2] == b.shape[:-2]
        and a.device.type == b.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and 0 not in a.shape
        and b.shape[-1] > 0
    )


def has_product(weight: Tensor, window: reference.Window) -> bool:
    """Whether the input has more channels than an RGB image."""
    return window.groups > 1 or not _is_of_few(weight)


def _is_of_few(weight: Tensor) -> bool:
    return weight.shape[1] <= _FEW_CHANNELS


def _has_channels(weight: Tensor, groups: int, stride: Sequence[int]) -> bool:
    """Whether so many channels, in so many groups, leave few vectors unfilled."""
    filters, channels, *taps = weight.shape
    if groups > 1:
        least = min(filters // groups, channels)
        is_light = max(stride) == 1 and (max(taps) == 1 or (len(taps) == 2 and set(taps) == {3}))
        is_large = groups <= _MOST_GROUPS and least >= _OF_GROUP
        return _is_depthwise(weight, groups) or (is_large and is_light)
    if _is_of_few(weight):
        return filters % _OF_FEW == 0
    return _is_point(weight) or min(filters, channels) >= _LEAST


def _is_depthwise(weight: Tensor, groups: int) -> bool:
    return groups > 1 and weight.shape[0] == groups and weight.shape[1] == 1


def _has_scheme(weight: Tensor, stride: Sequence[int]) -> bool:
    if _is_of_few(weight):
        return _is_few(weight, stride)
    return _is_area(weight, stride) or _is_line(weight, stride) or _is_point(weight)


def _is_few(weight: Tensor, stride: Sequence[int]) -> bool:
    taps = weight.shape[2:]
    overlap = all(k in _TAPS_OF_FEW and s <= k for k, s in zip(taps, stride, strict=True))
    return len(taps) == 2 and overlap


def _is_area(weight: Tensor, stride: Sequence[int]) -> bool:
    taps = weight.shape[2:]
    return len(taps) == 2 and all(k in _TAPS_OF_BOTH for k in taps) and max(stride) <= _MOST_STRIDE


def _is_line(weight: Tensor, stride: Sequence[int]) -> bool:
    """Of some taps along one axis, and none of them in vain."""
    *others, taps = sorted(weight.shape[2:])
    return (
        len(others) <= 1
        and all(size == 1 for size in others)
        and taps in _TAPS
        and all(s <= min(k, _MOST_STRIDE) for s, k in zip(stride, weight.shape[2:], strict=True))
    )


def _is_point(weight: Tensor) -> bool:
    return math.prod(weight.shape[2:]) == 1 and not _is_of_few(weight)


def forward(
    x: Tensor, filters: Filters, other: Tensor | None = None, *, relu: bool = False
) -> tuple[Tensor, Tensor]:
    """``scale · (weight ∗ x) + shift + other``, and each sample's sum of that.

    Args:
        x: Input, ``(N, C, H, W)`` or ``(N, C, L)``.
        filters: What it is convolved with.
        other: A summand.
        relu: Whether negative results become 0 then.
    """
    weight, scale, shift, stride, padding = filters.as_image()
    image = _as_image(x)
    other = None if other is None else _as_image(other)
    y, total = ops.convolution.default(image, weight, scale, shift, other, stride, padding, relu)
    return y if x.dim() == 4 else y.squeeze(2), total


def divide(
    r: Tensor, x: Tensor, filters: Filters, *, nonnegative: bool = False
) -> tuple[Tensor, Tensor]:
    """``s = r / (|weight| ∗ |x|)`` with 0/0 = 0; and what tells whether all was finite.

    That is of each sample at least ``Σ |s|``, and at most twice that.

    Args:
        r: Relevance at the output.
        x: Input.
        filters: Their scale and shift play no part.
        nonnegative: Whether x is known to be |x|.
    """
    weight, _, _, stride, padding = filters.as_image()
    s, total = ops.convolution_divide.default(
        _as_image(r), _as_image(x), weight, stride, padding, nonnegative
    )
    return s if x.dim() == 4 else s.squeeze(2), total


def product(x: Tensor, s: Tensor, filters: Filters, other: Tensor | None = None) -> Tensor:
    """``|x| ⊙ (|weight|ᵀ s) + other``."""
    weight, _, _, stride, padding = filters.as_image()
    other = None if other is None else _as_image(other)
    q = ops.convolution_product.default(_as_image(x), _as_image(s), weight, other, stride, padding)
    return q if x.dim() == 4 else q.squeeze(2)


def _as_image(signal: Tensor) -> Tensor:
    """A signal as an image of one row, in the same memory."""
    return signal.unsqueeze(2) if signal.dim() == 3 else signal
