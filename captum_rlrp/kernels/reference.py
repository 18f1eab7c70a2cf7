"""The kernels in plain PyTorch: the definition that every compiled kernel is tested against.

Conventions shared by all kernels:

* The first axis of every tensor is the batch; nothing crosses it.
* A relevance tensor r is held as a pair *(t, factor)* with ``r[n] = factor[n] * t[n]``, where
  ``factor`` has shape ``(N,)`` and ``None`` stands for 1. Carrying a mass over is then a division
  of two vectors of length N, and the next kernel that reads t applies it.
* ``s[n]`` is the absolute mass of a tensor, ``Σ |t[n]|``. Masses and factors are float64 for
  float64 tensors and float32 for all others, and all arithmetic is done in that precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Term = tuple[Tensor, Tensor | None]
Ints = int | Sequence[int]

aten = torch.ops.aten


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of masses, factors and intermediate values for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mass(t: Tensor) -> Tensor:
    """``Σ |t[n]|`` over all elements of each sample n."""
    inner = tuple(range(1, t.dim()))
    absolute = t.abs()
    dtype = accumulation_dtype(t.dtype)
    return absolute.sum(inner, dtype=dtype) if inner else absolute.to(dtype)


# ---- element by element ------------------------------------------------------------------------


def product(
    x: Tensor, g: Tensor, factor: Tensor | None = None, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """``q = factor · x ⊙ g`` and its mass.

    Args:
        x: Section input; q gets its shape, dtype and memory format.
        g: Gradient-like tensor, broadcastable to x (a pooled gradient is expanded, not copied).
        factor: One number per sample, in :func:`accumulation_dtype`; None means 1.
        inplace: q may overwrite g.
    """
    wide = g.to(accumulation_dtype(x.dtype))
    if factor is not None:
        wide = wide * factor.view([-1] + [1] * (x.dim() - 1))
    q = g.copy_(wide * x) if inplace and same_layout(x, g) else _like(x, x * wide)
    return q, mass(q)


def accumulate(terms: Sequence[Term], *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``r = Σ_i factor_i · t_i`` and its mass; r has dtype and memory format of the first t.

    Args:
        terms: The pairs (t, factor).
        out: Where r is written instead, in its own layout.
    """
    r = _like(terms[0][0], _total(terms))
    if out is not None:
        r = out.copy_(r)
    return r, mass(r)


def split(
    a: Tensor, b: Tensor, terms: Sequence[Term], *, from_sum: bool = False, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shares of a sum: ``r_a = r·|a|/(|a|+|b|)``, ``r_b = r·|b|/(|a|+|b|)``, with their masses.

    r is ``accumulate(terms)``, and r/2 goes each way where ``|a|+|b|`` is 0. The quotient is formed
    from min/max, so that it neither overflows nor depends on the scale of a and b.

    Args:
        a: First summand, or with ``from_sum`` the value ``relu(a + b)``.
        b: Second summand.
        terms: What arrived at the sum.
        from_sum: ``a`` is the sum after its ReLU; the summand is recovered as ``a - b``, right
            wherever the ReLU let something through. (Elsewhere r is 0, and so are both shares.)
        inplace: r_a may overwrite a, and r_b the first term.

    Returns:
        ``r_a, s_a, r_b, s_b``.
    """
    first = terms[0][0]
    dtype = accumulation_dtype(first.dtype)
    r = _total(terms)
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    size_a = (wide_a - wide_b if from_sum else wide_a).abs()
    size_b = wide_b.abs()
    small, large = torch.minimum(size_a, size_b), torch.maximum(size_a, size_b)
    ratio = torch.where(large == 0, 1.0, small / large)
    major = 1 / (1 + ratio)
    minor = ratio * major
    r_a = _like(first, r * torch.where(size_a >= size_b, major, minor))
    r_b = _like(first, r * torch.where(size_a >= size_b, minor, major))
    if inplace and same_layout(a, first):
        r_a, r_b = a.copy_(r_a), first.copy_(r_b)
    return r_a, mass(r_a), r_b, mass(r_b)


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
        The mass in front of the ReLU, which a NaN or an infinity makes one too.
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
    # Not mass(), which makes a tensor of all absolute values.
    inner = tuple(range(1, y.dim()))
    before = torch.linalg.vector_norm(y, 1, inner, dtype=torch.float64) if inner else y.abs()
    if relu:
        y.relu_()
    return before.to(wide)


def sums(values: Sequence[Tensor]) -> Tensor:
    """The sum of each tensor, in float64: of 32 or 16 bits, finite if all elements are."""
    return torch.stack([value.sum(dtype=torch.float64) for value in values])


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


def linear_rows(weight: Tensor, index: Tensor) -> Tensor:
    """``W[index]``: :func:`linear` of a one-hot g, one row per sample, without the product."""
    return weight.index_select(0, index)


def conv(
    g: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    stride: Ints = 1,
    padding: Ints = 0,
    dilation: Ints = 1,
    transposed: bool = False,
    output_padding: Ints = 0,
    groups: int = 1,
) -> Tensor:
    """The transpose of a convolution (its input gradient), 1 to 3 spatial axes.

    Args:
        g: Tensor at the convolution's output.
        weight: Its weight.
        input_shape: Shape of its input.
        stride: As in :func:`torch.ops.aten.convolution`; so are the following.
        padding: Implicit zeros on both sides.
        dilation: Spacing of the kernel's elements.
        transposed: The convolution is itself a transposed one.
        output_padding: Extra size of a transposed convolution's output.
        groups: Number of independent groups of channels.
    """
    rank = len(input_shape) - 2
    x = torch.empty(input_shape, dtype=g.dtype, device=g.device, memory_format=memory_format(g))
    stride, padding, dilation, output_padding = (
        ints(value, rank) for value in (stride, padding, dilation, output_padding)
    )
    result: Tensor = aten.convolution_backward.default(
        *(g, x, weight, None, stride, padding, dilation, transposed, output_padding, groups),
        [True, False, False],
    )[0]
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


def _like(model: Tensor, value: Tensor) -> Tensor:
    """``value`` in the dtype and memory format of ``model``."""
    result = torch.empty_like(model)
    if value.dtype == model.dtype and value.stride() == result.stride():
        return value
    return result.copy_(value)


def _total(terms: Sequence[Term]) -> Tensor:
    """``Σ_i factor_i · t_i`` in the accumulation dtype."""
    dtype = accumulation_dtype(terms[0][0].dtype)
    total: Tensor | None = None
    for t, factor in terms:
        value = t.to(dtype)
        if factor is not None:
            value = value * factor.view([-1] + [1] * (t.dim() - 1))
        total = value if total is None else total + value
    assert total is not None
    # One term without factor is the term itself: never hand out the caller's own tensor.
    return total.clone() if total is terms[0][0] else total


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
