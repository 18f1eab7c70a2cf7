"""What the extension's ops return, for tracing: shapes, dtypes, strides."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from captum_rlrp.kernels import reference


def _sums(t: Tensor) -> Tensor:
    return t.new_empty(t.shape[0], dtype=reference.accumulation_dtype(t.dtype))


def _seen(t: Tensor) -> Tensor:
    return t.new_empty(1, dtype=reference.accumulation_dtype(t.dtype))


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
    return _channels_last(x, (len(x), len(weight), *size)), _sums(x)


def register() -> None:
    """Tells PyTorch."""
    fake = torch.library.register_fake
    fake("captum_rlrp::divide")(lambda r, d: (torch.empty_like(d), _seen(d)))
    fake("captum_rlrp::multiply")(lambda x, g, absolute: torch.empty_like(x))
    fake("captum_rlrp::linear_law")(lambda x, *_: (x.new_empty(x.shape), _seen(x)))
    fake("captum_rlrp::matmul")(lambda a, b: a.new_empty((*a.shape[:-1], b.shape[-1])))
    fake("captum_rlrp::split")(lambda a, b, r, _: (torch.empty_like(r), torch.empty_like(r)))
    fake("captum_rlrp::finish_")(lambda y, *_: _seen(y))
    fake("captum_rlrp::sums")(lambda v: v[0].new_empty(len(v), dtype=torch.float64))
    fake("captum_rlrp::empty_like")(lambda x: torch.empty_like(x))
    fake("captum_rlrp::max_pool")(_fake_max_pool)
    fake("captum_rlrp::max_unpool")(lambda r, winners, shape, *_: _image(r, shape))
    fake("captum_rlrp::adaptive_max_pool")(
        lambda x, size: _winners(_image(x, (*x.shape[:2], *size)), torch.int32)
    )
    fake("captum_rlrp::adaptive_max_unpool")(lambda r, winners, shape: _image(r, shape))
    fake("captum_rlrp::avg_pool")(lambda r, shape, *_: _image(r, shape))
    fake("captum_rlrp::conv_few")(lambda g, weight, shape, *_: _channels_last(g, shape))
    fake("captum_rlrp::convolution")(_fake_convolution)
    fake("captum_rlrp::convolution_divide")(lambda r, x, *_: (_channels_last(r, r.shape), _sums(x)))
    fake("captum_rlrp::convolution_product")(lambda x, *_: _channels_last(x, x.shape))
    fake("captum_rlrp::adaptive_avg_pool")(lambda r, shape: _image(r, shape))
