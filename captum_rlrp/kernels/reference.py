"""The kernels in plain PyTorch: the definition that every compiled kernel is tested against.

The first axis of every tensor is the batch; nothing crosses it. Relevance has the dtype of the
explanation (float32 or float64), and the other operands are cast to it before they come here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Ints = int | Sequence[int]

aten = torch.ops.aten


class Window(NamedTuple):
    """How a convolution goes over its input, for each axis; see :func:`torch.ops.aten.convolution`.

    Attributes:
        stride: Step of the filter.
        padding: Implicit zeros on both sides.
        dilation: Spacing of the filter's elements.
        transposed: Whether it is a transposed convolution.
        output_padding: Extra size of a transposed convolution's output.
        groups: Number of independent groups of channels.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums and intermediate values for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the law (method.md §2, §4) ----------------------------------------------------------------


def divide(r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """``s = r / d`` with 0/0 = 0, for divisors that are not negative; and a check.

    Returns:
        s, and a number that is finite and moderate if all of s is, and d finite: the largest |s|.
    """
    s = torch.where(d == 0, 0.0, r / d)
    return s, largest(s + (d - d))


def multiply(x: Tensor, g: Tensor, *, absolute: bool = False) -> Tensor:
    """``x ⊙ g``, or ``|x| ⊙ g``, laid out as x; g may be broadcast."""
    return (x.abs() if absolute else x) * g


def linear_relevance(
    x: Tensor, weight: Tensor, r: Tensor, magnitude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The law of a dense layer: ``x ⊙ (s W)`` with ``s = r / (|x| |W|ᵀ)``; and the check.

    Args:
        x: Input, features last.
        weight: ``(out, in)``.
        r: Relevance at the output.
        magnitude: ``|W|``, where it is at hand.
    """
    s, seen = divide(r, F.linear(x.abs(), weight.abs() if magnitude is None else magnitude))
    return x * linear(s, weight), seen


def conv_relevance(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    window: Window,
    *,
    nonnegative: bool = False,
    magnitude: Tensor | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The law of a convolution: ``|x| ⊙ (|W|ᵀ s) + other``, ``s = r / (|W| ∗ |x|)``; and the check.

    Args:
        x: Input, ``(N, C, *spatial)`` with 1 to 3 spatial axes.
        weight: Filters, as in :func:`torch.ops.aten.convolution`.
        r: Relevance at the output.
        window: How the filters go over the input.
        nonnegative: Whether x is known to be |x|.
        magnitude: ``|W|``, where it is at hand.
        other: Relevance that arrived at the input by other ways.
    """
    x = x if nonnegative else x.abs()
    weight = weight.abs() if magnitude is None else magnitude
    s, seen = divide(r, aten.convolution(x, weight, None, *window))
    result = x * conv(s, weight, x.shape, window)
    return result if other is None else result + other, seen


def split(a: Tensor, b: Tensor, r: Tensor, *, from_sum: bool = False) -> tuple[Tensor, Tensor]:
    """Shares of a sum: ``r_a = r·|a|/(|a|+|b|)``, ``r_b = r·|b|/(|a|+|b|)``; r/2 where both are 0.

    The quotient is formed from min/max, so that it neither overflows nor depends on the scale.

    Args:
        a: First summand, or with ``from_sum`` the value ``relu(a + b)``.
        b: Second summand.
        r: Relevance at the sum.
        from_sum: ``a`` is the sum after its ReLU; the summand is recovered as ``a - b``, right
            wherever the ReLU let something through. (Elsewhere r is 0, and so are both shares.)
    """
    size_a, size_b = (a - b if from_sum else a).abs(), b.abs()
    small, large = torch.minimum(size_a, size_b), torch.maximum(size_a, size_b)
    ratio = torch.where(large == 0, 1.0, small / large)
    major = 1 / (1 + ratio)
    minor = ratio * major
    first = size_a >= size_b
    return r * torch.where(first, major, minor), r * torch.where(first, minor, major)


def magnitude(x: Tensor) -> Tensor:
    """``|x|``"""
    return x.abs()


def add(terms: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """The sum of relevances that arrive at one value; never one of the terms itself.

    Args:
        terms: All of one shape.
        out: Where it may go, if there are several.
    """
    total = torch.add(terms[0], terms[1], out=out) if len(terms) > 1 else terms[0].clone()
    for term in terms[2:]:
        total += term
    return total


# ---- the forward -------------------------------------------------------------------------------


def finish_(
    y: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    other: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """Overwrites y with ``scale · y + shift + other``, or the ReLU of that.

    Args:
        y: What a convolution made, ``(N, C, *spatial)``; without scale and shift, any value.
        scale: One number for each channel; None means 1.
        shift: Likewise; None means 0.
        other: A summand of y's shape and dtype.
        relu: Whether negative results become 0.

    Returns:
        The largest magnitude in front of the ReLU, which a NaN or an infinity makes one too.
    """
    wide = accumulation_dtype(y.dtype)
    scale, shift = (
        None if v is None else v.to(wide).view([-1] + [1] * (y.dim() - 2)) for v in (scale, shift)
    )
    total = y.to(wide)
    if scale is not None:
        total.mul_(scale)
    for summand in (shift, other):
        if summand is not None:
            total.add_(summand)
    if total is not y:
        y.copy_(total)
    seen = largest(y)
    if relu:
        y.relu_()
    return seen


def largest(value: Tensor) -> Tensor:
    """The largest magnitude, shape ``(1,)``; NaN if there is one, 0 for an empty tensor."""
    wide = value.abs().to(accumulation_dtype(value.dtype))
    return wide.amax().reshape(1) if wide.numel() else wide.new_zeros(1)


def sums(values: Sequence[Tensor]) -> Tensor:
    """The sum of each tensor, in float64: of 32 or 16 bits, finite if all elements are."""
    found = [value.sum(dtype=torch.float64) for value in values]
    return torch.stack(found) if len(found) > 1 else found[0].reshape(1)


def working_memory() -> AbstractContextManager[Any]:
    """Within it, results on the CPU may use again the memory of earlier ones, of earlier times too.

    It belongs to what is returned here, and goes with it.
    """
    return nullcontext()


# ---- pooling -----------------------------------------------------------------------------------


def max_pool(
    x: Tensor,
    kernel: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Max pooling, and which element of each window was the maximum: the first in a tie.

    Args:
        x: Pooling input ``(N, C, *spatial)`` with 1 to 3 spatial axes.
        kernel: Window, as in :func:`torch.nn.functional.max_pool2d`; so are the following.
        stride: Step of the window; None is the window itself.
        padding: Implicit minus infinity on both sides.
        dilation: Spacing of the window's elements.
        ceil_mode: Keep the last, incomplete window.

    Returns:
        The maxima, and the winners for :func:`max_unpool` of the same backend, integers that mean
        nothing elsewhere; both of the same shape.
    """
    pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    y, winners = pool(x, kernel, stride or kernel, padding, dilation, ceil_mode, True)
    return y, winners


def max_unpool(
    r: Tensor,
    winners: Tensor,
    input_shape: Sequence[int],
    kernel: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Give the whole relevance of each output to the element that was its maximum.

    Args:
        r: Relevance at the pooling output.
        winners: From :func:`max_pool`.
        input_shape: Shape of its input.
        kernel: As there; so are the following.
        stride: Step of the window.
        padding: Implicit minus infinity.
        dilation: Spacing of the window's elements.
        ceil_mode: Keep the last, incomplete window.

    Returns:
        Relevance at the input, in the memory format and dtype of r; it adds up where windows
        overlap.
    """
    return _to_winners(r, winners, input_shape)


def adaptive_max_pool(x: Tensor, output_size: Ints) -> tuple[Tensor, Tensor]:
    """As :func:`max_pool`, for adaptive max pooling to ``output_size``."""
    pool: Any = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[x.dim() - 3]
    y, winners = pool(x, output_size, return_indices=True)
    return y, winners


def adaptive_max_unpool(r: Tensor, winners: Tensor, input_shape: Sequence[int]) -> Tensor:
    """As :func:`max_unpool`, for :func:`adaptive_max_pool`."""
    return _to_winners(r, winners, input_shape)


def avg_pool(
    r: Tensor,
    input_shape: Sequence[int],
    kernel: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The transpose of average pooling: every window spreads its value evenly.

    Args:
        r: Tensor at the pooling output.
        input_shape: Shape ``(N, C, *spatial)`` of the pooling input.
        kernel: Window, as in :func:`torch.nn.functional.avg_pool2d`; so are the following.
        stride: Step of the window; None is the window itself.
        padding: Implicit zeros on both sides.
        ceil_mode: Keep the last, incomplete window.
        count_include_pad: Padding counts in the divisor.
        divisor_override: Divisor to use instead of the number of elements.
    """
    rank = len(input_shape) - 2
    window = ints(kernel, rank)
    step = ints(stride or kernel, rank)
    options = (ceil_mode, count_include_pad, divisor_override)
    if rank == 3:
        backward, args = aten.avg_pool3d_backward, (window, step, ints(padding, 3), *options)
    else:  # 1d is 2d with a leading axis of 1
        one, none = [1] * (2 - rank), [0] * (2 - rank)
        args = (one + window, one + step, none + ints(padding, rank), *options)
        backward = aten.avg_pool2d_backward
    return _spread(lambda wide, x: backward(wide, x, *args), r, input_shape)


def adaptive_avg_pool(r: Tensor, input_shape: Sequence[int]) -> Tensor:
    """The transpose of adaptive average pooling from ``input_shape`` to the shape of r."""
    backward = (
        aten._adaptive_avg_pool3d_backward
        if len(input_shape) == 5
        else aten._adaptive_avg_pool2d_backward
    )
    return _spread(backward, r, input_shape)


# ---- dense and convolution ---------------------------------------------------------------------


def linear(g: Tensor, weight: Tensor) -> Tensor:
    """The transpose of ``x ↦ x Wᵀ``: ``g W``."""
    return g @ weight


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``."""
    return a @ b


def linear_rows(weight: Tensor, index: Tensor) -> Tensor:
    """``W[index]``: :func:`linear` of a one-hot g, one row per sample, without the product."""
    return weight.index_select(0, index)


def conv(g: Tensor, weight: Tensor, input_shape: Sequence[int], window: Window) -> Tensor:
    """The transpose of a convolution (its input gradient), 1 to 3 spatial axes.

    Args:
        g: Tensor at the convolution's output.
        weight: Its weight.
        input_shape: Shape of its input.
        window: How the filters go over the input.
    """
    layout = memory_format(g)
    x = torch.empty(tuple(input_shape), dtype=g.dtype, device=g.device, memory_format=layout)
    mask = [True, False, False]
    result: Tensor = aten.convolution_backward.default(g, x, weight, None, *window, mask)[0]
    return result


# ---- helpers -----------------------------------------------------------------------------------


def ints(value: Ints, rank: int) -> list[int]:
    """One int per spatial axis; a single one, bare or in a list, stands for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def every(strides: Sequence[int]) -> tuple[slice, ...]:
    """The index of the pixels that a window of 1×1 meets with these strides."""
    return (slice(None), slice(None), *(slice(None, None, s) for s in strides))


def same_layout(x: Tensor, g: Tensor) -> bool:
    """Whether g has the shape, strides and dtype of x, with no element shared (stride 0)."""
    same = g.shape == x.shape and g.stride() == x.stride() and g.dtype == x.dtype
    return same and 0 not in g.stride()


def memory_format(t: Tensor) -> torch.memory_format:
    """channels_last if t is laid out so and not also contiguous, else contiguous."""
    if not t.is_contiguous():
        if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def as_image(signal: Tensor) -> Tensor:
    """A signal ``(N, C, L)`` as an image of one row, channels_last."""
    return signal.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def _to_winners(r: Tensor, winners: Tensor, shape: Sequence[int]) -> Tensor:
    """Add each value of r to the element whose index within its channel is in ``winners``."""
    flat = r.new_zeros((*shape[:2], prod(shape[2:])), dtype=accumulation_dtype(r.dtype))
    flat.scatter_add_(2, winners.flatten(2), r.flatten(2).to(flat.dtype))
    result = torch.empty(
        tuple(shape), dtype=r.dtype, device=r.device, memory_format=memory_format(r)
    )
    return result.copy_(flat.view(result.shape))


def _spread(
    backward: Callable[[Tensor, Tensor], Tensor], r: Tensor, input_shape: Sequence[int]
) -> Tensor:
    """Run a pooling gradient, whose second argument matters by its shape and layout only."""
    wide = r.to(accumulation_dtype(r.dtype))
    shape = list(input_shape)
    if len(shape) == 3:
        wide, shape = wide.unsqueeze(2), [*shape[:2], 1, shape[2]]
    layout = memory_format(wide)
    x = torch.empty(shape, dtype=wide.dtype, device=r.device, memory_format=layout)
    result = backward(wide.contiguous(memory_format=layout), x)
    return result.reshape(tuple(input_shape)).to(r.dtype)
