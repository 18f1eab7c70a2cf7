"""Pooling: compiled and reference against PyTorch's own in float64, and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_rlrp.kernels import compiled, reference

from .common import (
    DIAGONAL,
    agree,
    assert_same_bits,
    compare,
    every_case,
    every_device,
    every_dtype,
    exact,
    needs_extension,
    rand,
)

MAX = {d: getattr(F, f"max_pool{d}d") for d in (1, 2, 3)}
AVG = {d: getattr(F, f"avg_pool{d}d") for d in (1, 2, 3)}
ADAPTIVE_MAX = {d: getattr(F, f"adaptive_max_pool{d}d") for d in (1, 2, 3)}
ADAPTIVE_AVG = {d: getattr(F, f"adaptive_avg_pool{d}d") for d in (1, 2, 3)}

# input shape; kernel, stride, padding, dilation, ceil_mode
WINDOWS = [
    ((2, 5, 12, 10), (2, 2, 0, 1, False)),
    ((2, 5, 13, 11), (2, 2, 0, 1, False)),
    ((2, 19, 13, 11), (3, 2, 1, 1, False)),
    ((2, 16, 13, 11), (3, 2, 1, 1, True)),
    ((1, 3, 9, 9), (3, 1, 1, 1, False)),
    ((2, 40, 11, 9), ([3, 2], [2, 3], [1, 0], 1, True)),
    ((2, 4, 15, 14), (3, 2, 1, 2, True)),
    ((2, 4, 7, 7), (2, 3, 0, 1, False)),
    ((2, 3, 17), (3, 2, 1, 1, False)),
    ((2, 3, 17), (2, 2, 0, 1, True)),
    ((2, 18, 6, 7, 8), (2, 2, 0, 1, False)),
    ((2, 3, 6, 7, 8), (3, 2, 1, 1, True)),
    ((1, 64, 56, 56), (3, 2, 1, 1, False)),
    ((2, 300, 6, 9), (3, 3, 0, 1, False)),
    ((1, 3, 5, 600), (3, 2, 1, 1, False)),
    ((2, 17, 1, 2), (3, 1, 1, 1, False)),
    ((2, 3, 1, 5, 8), ([2, 2, 3], [1, 2, 3], [1, 0, 0], [1, 2, 3], False)),
]
# input shape; output size
ADAPTIVE = [
    ((2, 5, 7, 7), (1, 1)),
    ((2, 5, 13, 11), (7, 7)),
    ((2, 19, 5, 6), (7, 7)),
    ((2, 16, 9, 8), (4, 3)),
    ((2, 5, 14, 14), (7, 7)),
    ((2, 3, 17), (5,)),
    ((2, 3, 6, 7, 8), (4, 2, 3)),
    ((2, 3, 1, 5, 8), (4, 7, 3)),
]


def transpose(forward, x: Tensor, r) -> tuple[Tensor, Tensor]:
    """Autograd's answer in float64: the relevance it needs is made by r(shape)."""
    x = exact(x).contiguous().requires_grad_()
    y = forward(x)
    value = r(y.shape)
    (result,) = torch.autograd.grad(y, x, exact(value))
    return value, result


def to_winners(backend, x: Tensor, r: Tensor, *window) -> Tensor:
    """There and back: max pooling of x, and r to the elements that won."""
    _, winners = backend.max_pool(x, *window)
    return backend.max_unpool(r, winners, x.shape, *window)


@every_case
@every_device
@pytest.mark.parametrize(("shape", "window"), WINDOWS, ids=str)
def test_max_pool(backend, device, dtype, layout, shape, window):
    # Few distinct values: many ties.
    x = (rand(*shape, dtype=torch.float32) * 2).round().to(dtype)
    x = torch.empty_like(rand(*shape, dtype=dtype, layout=layout)).copy_(x).to(device)
    r, expected = transpose(
        lambda t: MAX[len(shape) - 2](t, *window),
        x,
        lambda size: rand(*size, dtype=dtype, device=device, layout=layout),
    )
    y, winners = backend.max_pool(x, *window)
    result = backend.max_unpool(r, winners, shape, *window)
    assert torch.equal(exact(y), MAX[len(shape) - 2](exact(x), *window))
    assert y.dtype == result.dtype == dtype
    agree(result, expected, dtype)
    # The reference hands every signal back contiguous: PyTorch has no other format for them.
    signal = backend is reference and len(shape) == 3
    if layout == "contiguous" or (layout == "channels_last" and not signal):
        assert result.stride() == x.stride()
        assert y.stride() == r.stride()


@every_case
@every_device
@pytest.mark.parametrize(("shape", "size"), ADAPTIVE, ids=str)
def test_adaptive_max_pool(backend, device, dtype, layout, shape, size):
    x = rand(*shape, dtype=dtype, device=device, layout=layout)
    r, expected = transpose(
        lambda t: ADAPTIVE_MAX[len(shape) - 2](t, size),
        x,
        lambda size: rand(*size, dtype=dtype, device=device, layout=layout),
    )
    y, winners = backend.adaptive_max_pool(x, size)
    assert torch.equal(exact(y), ADAPTIVE_MAX[len(shape) - 2](exact(x), size))
    agree(backend.adaptive_max_unpool(r, winners, shape), expected, dtype)


AVERAGES = [
    (shape, window, include_pad, divisor)
    for shape, window in WINDOWS
    for include_pad, divisor in [(True, None), (False, None), (True, 3)]
    if window[3] == 1 and (divisor is None or len(shape) > 3)  # avg_pool1d takes no divisor
]


@compare
@every_device
@pytest.mark.parametrize(("dtype", "layout"), DIAGONAL, ids=str)
@pytest.mark.parametrize(("shape", "window", "include_pad", "divisor"), AVERAGES, ids=str)
def test_avg_pool(backend, device, dtype, layout, shape, window, include_pad, divisor):
    rank = len(shape) - 2
    kernel, stride, padding, _, ceil_mode = window
    options = (ceil_mode, include_pad) + ((divisor,) if rank > 1 else ())
    r, expected = transpose(
        lambda t: AVG[rank](t, kernel, stride, padding, *options),
        torch.empty(shape),
        lambda size: rand(*size, dtype=dtype, device=device, layout=layout),
    )
    result = backend.avg_pool(r, shape, kernel, stride, padding, *options)
    assert result.dtype == dtype
    agree(result, expected, dtype)


@every_case
@every_device
@pytest.mark.parametrize(("shape", "size"), ADAPTIVE, ids=str)
def test_adaptive_avg_pool(backend, device, dtype, layout, shape, size):
    r, expected = transpose(
        lambda t: ADAPTIVE_AVG[len(shape) - 2](t, size),
        torch.empty(shape),
        lambda size: rand(*size, dtype=dtype, device=device, layout=layout),
    )
    agree(backend.adaptive_avg_pool(r, shape), expected, dtype)


@compare
def test_max_pool_by_hand(backend):
    x = torch.tensor([[[[1.0, 5, 5], [2, 5, 0], [7, 0, 7]]]])
    r = torch.tensor([[[[1.0, 2], [4, 8]]]])
    # Windows of 2 with step 1: the first of equal maxima takes it all.
    result = to_winners(backend, x, r, 2, 1)
    assert result.tolist() == [[[[0, 3, 0], [0, 0, 0], [4, 0, 8]]]]


@compare
def test_max_pool_of_minus_infinity_takes_the_first(backend):
    x = torch.full((1, 1, 4), -torch.inf)
    result = to_winners(backend, x, torch.tensor([[[1.0, 2]]]), 2)
    assert result.tolist() == [[[1, 0, 2, 0]]]


@every_case
def test_max_pool_hands_nan_on(backend, dtype, layout):
    x = rand(2, 20, 9, 8, dtype=dtype, layout=layout)
    x[0, 3, 4, 4] = x[1, 18, 8, 0] = torch.nan
    for window in ((2, 2), (3, 2, 1), (3, 1, 1)):
        y, _ = backend.max_pool(x, *window)
        assert torch.equal(y.isnan(), F.max_pool2d(x.float(), *window).isnan())
    y, _ = backend.adaptive_max_pool(x, (4, 4))
    assert torch.equal(y.isnan(), F.adaptive_max_pool2d(x.float(), (4, 4)).isnan())


@needs_extension
@pytest.mark.parametrize(("kernel", "dtype"), [(16, torch.uint8), (17, torch.int32)], ids=str)
def test_winners_of_small_windows_take_a_byte(kernel, dtype):
    x = torch.randn(1, 2, 40, 40)
    y, winners = compiled.max_pool(x, kernel, 3)
    assert winners.dtype == dtype
    r = torch.randn_like(y)
    torch.testing.assert_close(
        compiled.max_unpool(r, winners, x.shape, kernel, 3), to_winners(reference, x, r, kernel, 3)
    )


@needs_extension
def test_winners_of_another_pooling_do_no_harm():
    r, shape = torch.randn(2, 3, 4, 4), [2, 3, 8, 8]
    for winners in (torch.full(r.shape, 255), torch.randint(0, 256, r.shape)):
        result = compiled.max_unpool(r, winners.to(torch.uint8), shape, 2)
        assert float(result.abs().sum()) <= float(r.abs().sum()) + 1e-4


@needs_extension
@pytest.mark.parametrize("window", [(2, 2**30, 0, 1, True), (2**20, 3, 2**19, 1, False)], ids=str)
def test_max_pool_allocates_nothing_in_proportion_to_the_window(window):
    x = torch.randn(2, 3, 4, 4)
    r = torch.randn_like(F.max_pool2d(x, *window))
    torch.testing.assert_close(
        to_winners(compiled, x, r, *window), to_winners(reference, x, r, *window)
    )


@compare
def test_avg_pool_by_hand(backend):
    r = torch.tensor([[[3.0, 6]]])
    assert backend.avg_pool(r, (1, 1, 4), 3, 1).tolist() == [[[1, 3, 3, 2]]]
    assert backend.adaptive_avg_pool(r, (1, 1, 4)).tolist() == [[[1.5, 1.5, 3, 3]]]


@compare
@pytest.mark.parametrize("stride", [None, [], 2, [2, 2]])
def test_the_stride_defaults_to_the_kernel(backend, stride):
    x, r = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 3, 3)
    expected = to_winners(reference, x, r, [2, 2], [2, 2])
    assert torch.equal(to_winners(backend, x, r, 2, stride), expected)
    torch.testing.assert_close(
        backend.avg_pool(r, x.shape, 2, stride), reference.avg_pool(r, x.shape, 2, 2)
    )


@compare
@every_dtype
def test_batch_of_none(backend, dtype):
    x, r = torch.empty(0, 3, 6, 6, dtype=dtype), torch.empty(0, 3, 3, 3, dtype=dtype)
    assert to_winners(backend, x, r, 2).shape == x.shape
    _, winners = backend.adaptive_max_pool(x, (3, 3))
    assert backend.adaptive_max_unpool(r, winners, x.shape).shape == x.shape
    assert backend.avg_pool(r, x.shape, 2).shape == x.shape
    assert backend.adaptive_avg_pool(r, x.shape).shape == x.shape


@needs_extension
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_do_not_depend_on_the_thread_count(layout):
    x = rand(2, 33, 61, 57, dtype=torch.float32, layout=layout)
    r = rand(2, 33, 31, 29, dtype=torch.float32, layout=layout)
    assert_same_bits(
        lambda: (to_winners(compiled, x, r, 3, 2, 1), compiled.avg_pool(r, x.shape, 3, 2, 1))
    )
