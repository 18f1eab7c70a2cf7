"""The kernels of the C++ and CUDA extension, each falling back to the reference where it must."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_rlrp.kernels import convolution, extension, fakes, onednn, reference
from captum_rlrp.kernels.extension import ops
from captum_rlrp.kernels.reference import Ints, Window, linear_rows

__all__ = [
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "adaptive_max_unpool",
    "add",
    "avg_pool",
    "conv",
    "conv_relevance",
    "divide",
    "finish_",
    "linear",
    "linear_relevance",
    "linear_rows",
    "matmul",
    "max_pool",
    "max_unpool",
    "multiply",
    "split",
    "sums",
    "working_memory",
]

working_memory = extension.WorkingMemory
if extension.available():
    fakes.register()

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_AXES = 8
_MANY_NUMBERS = 2**16  # of a tensor, from which the system's memory costs more than a call
_FEW_PRODUCTS = 2**17  # of a dense layer, up to which one call counts for more than fast products


def _covers(first: Tensor, *others: Tensor) -> bool:
    """Whether the extension runs on tensors of this device and (common) dtype."""
    for t in others:
        if t.dtype != first.dtype or t.device != first.device:
            return False
    return (
        (first.is_cpu or (first.is_cuda and extension.cuda_available()))
        and first.dtype in DTYPES
        and 1 <= first.dim() <= MAX_AXES
    )


# ---- the law ----------------------------------------------------------------------------------


def divide(r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`captum_rlrp.kernels.reference.divide`."""
    if not _covers(r, d) or r.shape != d.shape:
        return reference.divide(r, d)
    s, seen = ops.divide.default(r, d)
    return s, seen


def multiply(x: Tensor, g: Tensor, *, absolute: bool = False) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.multiply`."""
    if not _covers(x, g):
        return reference.multiply(x, g, absolute=absolute)
    q: Tensor = ops.multiply.default(x, g if g.shape == x.shape else g.expand_as(x), absolute)
    return q


def linear_relevance(
    x: Tensor, weight: Tensor, r: Tensor, magnitude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`captum_rlrp.kernels.reference.linear_relevance`."""
    is_small = x.numel() * weight.shape[0] < _FEW_PRODUCTS
    if (is_small or convolution.has_rows(x, weight)) and x.is_cpu and _covers(x, weight, r):
        q, seen = ops.linear_law.default(x, weight, r)
        return q, seen
    s, seen = divide(r, _product(x.abs(), weight.abs() if magnitude is None else magnitude))
    return multiply(x, linear(s, weight)), seen


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
    """See :func:`captum_rlrp.kernels.reference.conv_relevance`."""
    if _sees_all(x, weight, window):  # of 1×1 over all numbers of the image

        def flat(t: Tensor) -> Tensor:
            return t.reshape(len(t), -1, *[1] * len(window.stride))

        given = [None if t is None else flat(t) for t in (magnitude, other)]
        dense = window._replace(stride=[1] * len(window.stride))
        result, seen = conv_relevance(
            flat(x), flat(weight), r, dense,
            nonnegative=nonnegative, magnitude=given[0], other=given[1],
        )  # fmt: skip
        return result.view(x.shape).contiguous(memory_format=reference.memory_format(x)), seen
    is_ours = convolution.has_law(x, weight, window) and r.dtype == torch.float32
    if not is_ours and _leaves_out_pixels(weight, window):
        read = reference.every(window.stride)
        inputs = x[read].contiguous(memory_format=reference.memory_format(x))
        dense = window._replace(stride=[1] * len(window.stride))
        part, seen = conv_relevance(
            inputs, weight, r, dense, nonnegative=nonnegative, magnitude=magnitude
        )
        result = torch.zeros_like(x) if other is None else other.clone()
        result[read] += part
        return result, seen
    filters = convolution.Filters(weight, None, None, window.stride, window.padding)
    if not nonnegative and not (is_ours and convolution.has_product(weight, window)):
        x, nonnegative = _absolute(x), True
    if is_ours:
        s, seen = convolution.divide(r, x, filters, nonnegative=nonnegative)
        if convolution.has_product(weight, window):
            return convolution.product(x, s, filters, other), seen
    weight = weight.abs() if magnitude is None else magnitude
    if not is_ours:
        s, seen = divide(r, _convolve(x, weight, window))
    result = multiply(x, conv(s, weight, x.shape, window))
    return result if other is None else result + other, seen


def _sees_all(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether filters of several taps are as large as the image."""
    return (
        x.shape[2:] == weight.shape[2:]
        and x.shape[1] == weight.shape[1]
        and prod(weight.shape[2:]) > 1
        and x.numel() > 0
        and not any(window.padding)
        and max(window.dilation) == 1
        and not window.transposed
    )


def _leaves_out_pixels(weight: Tensor, window: Window) -> bool:
    """Whether filters of 1×1 go over every second pixel or so, and thus over an image of those."""
    return (
        prod(weight.shape[2:]) == 1
        and max(window.stride) > 1
        and not any(window.padding)
        and not window.transposed
    )


def split(a: Tensor, b: Tensor, r: Tensor, *, from_sum: bool = False) -> tuple[Tensor, Tensor]:
    """See :func:`captum_rlrp.kernels.reference.split`."""
    if not _covers(r, a, b) or not a.shape == b.shape == r.shape:
        return reference.split(a, b, r, from_sum=from_sum)
    r_a, r_b = ops.split.default(a, b, r, from_sum)
    return r_a, r_b


def empty_like(x: Tensor) -> Tensor:
    """Memory for a result like x: for a large one on the CPU what the last call left."""
    if x.is_cpu and x.numel() >= _MANY_NUMBERS and _covers(x):
        memory: Tensor = ops.empty_like.default(x)
        return memory
    return torch.empty_like(x)


def magnitude(x: Tensor) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.magnitude`."""
    return torch.abs(x, out=empty_like(x))


_absolute = magnitude  # where a parameter has that name


def add(terms: Sequence[Tensor]) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.add`."""
    return reference.add(terms, empty_like(terms[0]) if len(terms) > 1 else None)


# ---- the forward ------------------------------------------------------------------------------


def finish_(
    y: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    other: Tensor | None = None,
    *,
    relu: bool = False,
) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.finish_`."""
    if not _covers(y, *(() if other is None else (other,))):
        return reference.finish_(y, scale, shift, other, relu=relu)
    if scale is not None or shift is not None:
        wide = reference.accumulation_dtype(y.dtype)
        scale, shift = (None if v is None else v.to(wide) for v in (scale, shift))
    seen: Tensor = ops.finish_.default(y, scale, shift, other, relu)
    return seen


def sums(values: Sequence[Tensor]) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.sums`."""
    if all(v.is_cpu and v.dtype in DTYPES for v in values):
        result: Tensor = ops.sums.default(values)
        return result
    return reference.sums(values)


# ---- pooling ---------------------------------------------------------------------------------


def max_pool(
    x: Tensor,
    kernel: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`captum_rlrp.kernels.reference.max_pool`; winners are numbered in their window."""
    if not _covers(x):
        return reference.max_pool(x, kernel, stride, padding, dilation, ceil_mode)
    y, winners = ops.max_pool.default(
        x, *_window(x.dim() - 2, kernel, stride, padding, dilation), ceil_mode
    )
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
    """See :func:`captum_rlrp.kernels.reference.max_unpool`."""
    if winners.dtype == torch.int64:  # what the reference returns
        return reference.max_unpool(r, winners, input_shape, kernel)
    window = _window(r.dim() - 2, kernel, stride, padding, dilation)
    result: Tensor = ops.max_unpool.default(r, winners, list(input_shape), *window, ceil_mode)
    return result


def adaptive_max_pool(x: Tensor, output_size: Ints) -> tuple[Tensor, Tensor]:
    """See :func:`captum_rlrp.kernels.reference.adaptive_max_pool`."""
    if not _covers(x):
        return reference.adaptive_max_pool(x, output_size)
    y, winners = ops.adaptive_max_pool.default(x, reference.ints(output_size, x.dim() - 2))
    return y, winners


def adaptive_max_unpool(r: Tensor, winners: Tensor, input_shape: Sequence[int]) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.adaptive_max_unpool`."""
    if winners.dtype == torch.int64:
        return reference.adaptive_max_unpool(r, winners, input_shape)
    result: Tensor = ops.adaptive_max_unpool.default(r, winners, list(input_shape))
    return result


def _window(
    rank: int, kernel: Ints, stride: Ints | None, padding: Ints, dilation: Ints
) -> list[list[int]]:
    return [reference.ints(v, rank) for v in (kernel, stride or kernel, padding, dilation)]


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
    """See :func:`captum_rlrp.kernels.reference.avg_pool`."""
    if not _covers(r):
        options = (ceil_mode, count_include_pad, divisor_override)
        return reference.avg_pool(r, input_shape, kernel, stride, padding, *options)
    window = [reference.ints(v, r.dim() - 2) for v in (kernel, stride or kernel, padding)]
    result: Tensor = ops.avg_pool.default(
        r, list(input_shape), *window, ceil_mode, count_include_pad, divisor_override
    )
    return result


def adaptive_avg_pool(r: Tensor, input_shape: Sequence[int]) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.adaptive_avg_pool`."""
    if all(size == 1 for size in r.shape[2:]):  # global: equal parts, nothing to write
        return (r / prod(input_shape[2:])).expand(tuple(input_shape))
    if not _covers(r):
        return reference.adaptive_avg_pool(r, input_shape)
    result: Tensor = ops.adaptive_avg_pool.default(r, list(input_shape))
    return result


# ---- dense and convolution: ATen's, but where it is slow ---------------------------------------


def linear(g: Tensor, weight: Tensor) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.linear`."""
    if onednn.multiplies(g, weight.t()):
        return onednn.linear(g, weight.t())
    return reference.linear(g, weight)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.matmul`."""
    if convolution.has_matrices(a, b):
        a, b = (t if 1 in t.stride()[-2:] else t.contiguous() for t in (a, b))
        return ops.matmul.default(a, b)
    return reference.matmul(a, b)


def conv(g: Tensor, weight: Tensor, input_shape: Sequence[int], window: Window) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.conv`."""
    if not _is_float_on_cpu(g, weight) or window.transposed or g.numel() == 0 or g.dim() > 4:
        return reference.conv(g, weight, input_shape, window)
    if g.dim() == 3:  # oneDNN is faster at images
        shape = [*input_shape[:2], 1, input_shape[2]]
        return conv(reference.as_image(g), weight.unsqueeze(2), shape, _of_image(window)).squeeze(2)
    stride, padding, dilation = window[:3]
    # oneDNN's input gradient is poor at a handful of channels.
    if input_shape[1] <= 4 and weight.shape[0] >= 8 and window.groups == 1:
        overlapping = any(k > s for k, s in zip(weight.shape[2:], stride, strict=True))
        if not overlapping or weight.shape[0] % 8:
            return _conv_by_matmul(g, weight, input_shape, stride, padding, dilation)
        is_fast = max(stride) > 1 or reference.memory_format(g) == torch.channels_last
        if is_fast and max(dilation) == 1:
            result: Tensor = ops.conv_few.default(g, weight, list(input_shape), stride, padding)
            return result
    elif onednn.covers(g, weight) and onednn.is_product(g, weight, stride, padding, window.groups):
        return onednn.product(g, weight.transpose(0, 1), None)
    if onednn.dwarfs(weight, g):
        image = reference.conv(onednn.contiguous(g), weight, input_shape, window)
        return image.contiguous(memory_format=reference.memory_format(g))
    return reference.conv(g, weight, input_shape, window)


def _is_float_on_cpu(*operands: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in operands)


def _of_image(window: Window) -> Window:
    """The window of a signal seen as an image of one row."""
    return window._replace(
        stride=[1, *window.stride], padding=[0, *window.padding], dilation=[1, *window.dilation]
    )


def _convolve(x: Tensor, weight: Tensor, window: Window) -> Tensor:
    """The convolution itself, never by a scheme that mixes pixels."""
    if onednn.covers(x, weight) and not window.transposed:
        y = onednn.convolution(x, weight, None, *window[:3], window.groups)
        if y is not None:
            return y
    return torch.ops.aten.convolution.default(x, weight, None, *window)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ``."""
    if onednn.multiplies(x, weight):
        return onednn.linear(x, weight)
    return F.linear(x, weight)


def _conv_by_matmul(
    g: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """One matrix product and a fold: best where an image is cut into patches."""
    n, channels = g.shape[:2]
    columns = torch.matmul(
        weight.reshape(channels, -1).t(),
        # channels_last is taken as the transpose that it is, without a copy
        g.permute(0, 2, 3, 1).reshape(n, -1, channels).transpose(1, 2)
        if reference.memory_format(g) == torch.channels_last
        else g.reshape(n, channels, -1),
    )
    size, kernel = list(input_shape[2:]), list(weight.shape[2:])
    folded: Tensor = torch.ops.aten.col2im(columns, size, kernel, dilation, padding, stride)
    return folded.contiguous(memory_format=reference.memory_format(g))
