"""The kernels of the C++ and CUDA extension, each falling back to the reference where it must."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from captum_rlrp.kernels import convolution, extension, onednn, reference
from captum_rlrp.kernels.extension import ops
from captum_rlrp.kernels.reference import (
    Ints,
    Term,
    linear_rows,
    mass,
)

__all__ = [
    "accumulate",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "adaptive_max_unpool",
    "avg_pool",
    "conv",
    "finish_",
    "linear",
    "linear_rows",
    "mass",
    "max_pool",
    "max_unpool",
    "product",
    "split",
    "sums",
    "working_memory",
]

working_memory = extension.working_memory

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_AXES = 8


def _covers(first: Tensor, *others: Tensor) -> bool:
    """Whether the extension runs on tensors of this device and (common) dtype."""
    device, dtype = first.device, first.dtype
    for t in others:
        if t.dtype != dtype or t.device != device:
            return False
    return (
        (device.type == "cpu" or (device.type == "cuda" and extension.cuda_available()))
        and dtype in DTYPES
        and 1 <= first.dim() <= MAX_AXES
    )


# ---- element by element ----------------------------------------------------------------------


def product(
    x: Tensor, g: Tensor, factor: Tensor | None = None, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """See :func:`captum_rlrp.kernels.reference.product`."""
    if not _covers(x, g):
        return reference.product(x, g, factor, inplace=inplace)
    if inplace and reference.same_layout(x, g):
        return g, ops.product_.default(x, g, factor)
    q, s = ops.product.default(x, g.expand_as(x), factor)
    return q, s


def accumulate(terms: Sequence[Term], *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`captum_rlrp.kernels.reference.accumulate`."""
    short = _at_most_two(terms)
    if short is None:
        return reference.accumulate(terms, out=out)
    if out is not None:
        return out, ops.accumulate_.default(out, *short)
    r, s = ops.accumulate.default(*short)
    return r, s


def split(
    a: Tensor, b: Tensor, terms: Sequence[Term], *, from_sum: bool = False, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`captum_rlrp.kernels.reference.split`."""
    first = terms[0][0]
    short = _at_most_two(terms) if _covers(first, a, b) and a.shape == b.shape else None
    if short is None or a.shape != first.shape:
        return reference.split(a, b, terms, from_sum=from_sum, inplace=inplace)
    if inplace and reference.same_layout(a, short[0]):
        s_a, s_b = ops.split_.default(a, b, *short, from_sum)
        return a, s_a, short[0], s_b
    r_a, s_a, r_b, s_b = ops.split.default(a, b, *short, from_sum)
    return r_a, s_a, r_b, s_b


_Short = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _at_most_two(terms: Sequence[Term]) -> _Short | None:
    """The terms as the ops take them, with all but the last added up; None if not covered."""
    first = terms[0][0]
    if not _covers(first, *(t for t, _ in terms)) or any(t.shape != first.shape for t, _ in terms):
        return None
    if len(terms) > 2:
        if first.dtype.itemsize == 2:  # partial sums would be rounded to 16 bits
            return None
        total, _ = accumulate(terms[:2])
        for t, factor in terms[2:-1]:
            ops.accumulate_.default(total, total, None, t, factor)
        return (total, None, *terms[-1])
    return (*terms[0], *terms[1]) if len(terms) == 2 else (*terms[0], None, None)


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
    wide = reference.accumulation_dtype(y.dtype)
    scale, shift = (None if v is None else v.to(wide) for v in (scale, shift))
    mass: Tensor = ops.finish_.default(y, scale, shift, other, relu)
    return mass


def sums(values: Sequence[Tensor]) -> Tensor:
    """See :func:`captum_rlrp.kernels.reference.sums`."""
    if all(v.device.type == "cpu" and v.dtype in DTYPES for v in values):
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
    """See :func:`captum_rlrp.kernels.reference.conv`."""
    float_on_cpu = g.device.type == "cpu" and g.dtype == weight.dtype == torch.float32
    if float_on_cpu and g.dim() == 3 and not transposed:  # oneDNN is faster at images
        image_shape = [*input_shape[:2], 1, input_shape[2]]
        image = conv(
            reference.as_image(g),
            weight.unsqueeze(2),
            image_shape,
            [1, *reference.ints(stride, 1)],
            [0, *reference.ints(padding, 1)],
            [1, *reference.ints(dilation, 1)],
            groups=groups,
        )
        return image.squeeze(2)
    if float_on_cpu and g.dim() == 4 and not transposed and g.numel() > 0:
        window = [reference.ints(v, 2) for v in (stride, padding, dilation)]
        # oneDNN's input gradient is poor at a handful of channels.
        if input_shape[1] <= 4 and weight.shape[0] >= 8 and groups == 1:
            overlapping = any(k > s for k, s in zip(weight.shape[2:], window[0], strict=True))
            if not overlapping or weight.shape[0] % 8:
                return _conv_by_matmul(g, weight, input_shape, *window)
            is_fast = max(window[0]) > 1 or reference.memory_format(g) == torch.channels_last
            if is_fast and max(window[2]) == 1:
                result: Tensor = ops.conv_few.default(g, weight, list(input_shape), *window[:2])
                return result
        elif convolution.suits(
            g, weight, window[0], window[1], window[2], groups
        ) and convolution.pays(g, weight):
            filters = convolution.Filters(weight, None, None, window[0], window[1])
            return convolution.transpose(g, filters, input_shape[2:])
        elif onednn.covers(g, weight) and onednn.is_product(
            g, weight, window[0], window[1], groups
        ):
            return onednn.product(g, weight.transpose(0, 1), None)
    options = (stride, padding, dilation, transposed, output_padding, groups)
    if onednn.dwarfs(weight, g):
        image = reference.conv(onednn.contiguous(g), weight, input_shape, *options)
        return image.contiguous(memory_format=reference.memory_format(g))
    return reference.conv(g, weight, input_shape, *options)


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


# ---- what the ops return, for tracing: shapes, dtypes, strides -------------------------------


def _masses(t: Tensor) -> Tensor:
    return t.new_empty(t.shape[0], dtype=reference.accumulation_dtype(t.dtype))


def _image(model: Tensor, shape: Sequence[int]) -> Tensor:
    if model.dim() == 3:
        return _image(model.unsqueeze(2), (*shape[:2], 1, shape[2])).squeeze(2)
    layout = reference.memory_format(model)
    return torch.empty(shape, dtype=model.dtype, device=model.device, memory_format=layout)


def _winners(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return y, torch.empty_like(y, dtype=dtype)


def _fake_max_pool(x: Tensor, kernel: list[int], *rest: Any) -> tuple[Tensor, Tensor]:
    shape = reference.max_pool(x, kernel, *rest)[0].shape
    return _winners(_image(x, shape), torch.uint8 if prod(kernel) <= 256 else torch.int32)


def _channels_last(model: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=model.dtype, device=model.device, memory_format=torch.channels_last
    )


def _fake_convolution(
    x: Tensor,
    weight: Tensor,
    _scale: Any,
    _bias: Any,
    _other: Any,
    stride: list[int],
    padding: list[int],
    _relu: bool,
) -> tuple[Tensor, Tensor]:
    axes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    size = [(n + 2 * p - k) // s + 1 for n, k, s, p in axes]
    return _channels_last(x, (len(x), len(weight), *size)), _masses(x)


def _fake_convolution_transpose(
    g: Tensor, weight: Tensor, _scale: Any, size: list[int], *_: Any
) -> Tensor:
    return _channels_last(g, (len(g), weight.shape[1], *size))


def _register_fakes() -> None:
    fake = torch.library.register_fake
    fake("captum_rlrp::product")(lambda x, g, factor: (torch.empty_like(x), _masses(x)))
    fake("captum_rlrp::product_")(lambda x, g, factor: _masses(x))
    fake("captum_rlrp::accumulate")(lambda t, *_: (torch.empty_like(t), _masses(t)))
    fake("captum_rlrp::accumulate_")(lambda r, t, *_: _masses(t))
    fake("captum_rlrp::split")(
        lambda a, b, t, *_: (torch.empty_like(t), _masses(t), torch.empty_like(t), _masses(t))
    )
    fake("captum_rlrp::split_")(lambda a, b, t, *_: (_masses(t), _masses(t)))
    fake("captum_rlrp::finish_")(lambda y, *_: _masses(y))
    fake("captum_rlrp::sums")(lambda v: v[0].new_empty(len(v), dtype=torch.float64))
    fake("captum_rlrp::max_pool")(_fake_max_pool)
    fake("captum_rlrp::max_unpool")(lambda r, winners, shape, *_: _image(r, shape))
    fake("captum_rlrp::adaptive_max_pool")(
        lambda x, size: _winners(_image(x, (*x.shape[:2], *size)), torch.int32)
    )
    fake("captum_rlrp::adaptive_max_unpool")(lambda r, winners, shape: _image(r, shape))
    fake("captum_rlrp::avg_pool")(lambda r, shape, *_: _image(r, shape))
    fake("captum_rlrp::conv_few")(lambda g, weight, shape, *_: _channels_last(g, shape))
    fake("captum_rlrp::convolution")(_fake_convolution)
    fake("captum_rlrp::convolution_transpose")(_fake_convolution_transpose)
    fake("captum_rlrp::convolution_product")(lambda x, *_: (_channels_last(x, x.shape), _masses(x)))
    fake("captum_rlrp::convolution_product_")(lambda x, *_: _masses(x))
    fake("captum_rlrp::adaptive_avg_pool")(lambda r, shape: _image(r, shape))


if extension.available():
    _register_fakes()
