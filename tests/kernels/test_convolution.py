"""Dense layers and convolutions, backwards: against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from captum_rlrp.kernels import reference

from .common import agree, compare, every_device, exact, rand

# in channels, weight shape, rank-long input, stride, padding, dilation, transposed, extra, groups
CONVOLUTIONS = [
    (3, (16, 3, 3, 3), (9, 8), 1, 1, 1, False, 0, 1),
    (3, (16, 3, 7, 7), (17, 15), 2, 3, 1, False, 0, 1),
    (4, (16, 4, 3, 2), (11, 10), [2, 1], [1, 0], [1, 2], False, 0, 1),
    (1, (16, 1, 2, 2), (7, 7), 3, 0, 1, False, 0, 1),
    (3, (24, 3, 5, 3), (14, 19), [3, 2], [0, 4], [2, 3], False, 0, 1),
    (2, (8, 2, 11, 11), (30, 9), [4, 1], [2, 5], 1, False, 0, 1),
    (4, (8, 4, 3, 3), (1, 1), 1, 1, 1, False, 0, 1),
    (6, (64, 6, 3, 3), (1, 1), 1, 1, 1, False, 0, 1),
    (3, (32, 3, 4, 4), (12, 8), 4, 0, 1, False, 0, 1),
    (3, (20, 3, 3, 3), (9, 8), 1, 1, 1, False, 0, 1),
    (6, (8, 6, 3, 3), (9, 8), 2, 1, 1, False, 0, 1),
    (6, (16, 6, 1, 1), (9, 8), 1, 0, 1, False, 0, 1),
    (6, (16, 6, 1, 1), (9, 8), 2, 0, 1, False, 0, 1),
    (6, (6, 1, 3, 3), (9, 8), 1, 1, 1, False, 0, 6),
    (6, (4, 3, 3, 3), (9, 8), 1, 2, 2, False, 0, 2),
    (6, (6, 4, 3, 3), (5, 4), 2, 1, 1, True, 1, 1),
    (6, (8, 6, 3), (11,), 2, 1, 1, False, 0, 1),
    (1, (32, 1, 7), (40,), 2, 3, 1, False, 0, 1),
    (6, (6, 1, 3), (11,), 1, [2], [2], False, 0, 6),
    (6, (6, 4, 3), (5,), 2, 1, 1, True, 1, 1),
    (3, (16, 3, 3, 3, 3), (5, 6, 7), 1, 1, 1, False, 0, 1),
]


@compare
@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv(backend, device, dtype, layout, case):
    channels, weight_shape, size, *options = case
    rank = len(size)
    stride, padding, dilation, transposed, extra, groups = options
    lists = [reference.ints(v, rank) for v in (stride, padding, dilation)]
    x = rand(2, channels, *size, dtype=dtype, device=device, layout=layout)
    weight = rand(*weight_shape, dtype=dtype, device=device)
    wide = exact(x).contiguous().requires_grad_()
    y = torch.convolution(
        wide, exact(weight), None, *lists, transposed, reference.ints(extra, rank), groups
    )
    g = rand(*y.shape, dtype=dtype, device=device, layout=layout)
    (expected,) = torch.autograd.grad(y, wide, exact(g))
    agree(backend.conv(g, weight, x.shape, *options), expected, dtype, scale=8)


# The last two are enough work for oneDNN.
@compare
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize(
    ("shape", "width"),
    [((2, 7), 5), ((2, 3, 7), 5), ((0, 7), 5), ((7,), 5), ((40, 130), 210), ((5, 9, 130), 210)],
    ids=str,
)
def test_linear(backend, shape, width, layout):
    x = rand(*shape, dtype=torch.float32)
    weight = rand(width, shape[-1], dtype=torch.float32, layout=layout)
    g = rand(*shape[:-1], width, dtype=torch.float32, layout=layout)
    wide = exact(x).requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(wide, exact(weight)), wide, exact(g))
    agree(backend.linear(g, weight), expected, torch.float32, scale=4)


@compare
def test_linear_rows_are_a_one_hot_product(backend):
    weight, index = torch.randn(5, 7), torch.tensor([4, 0, 4])
    expected = F.one_hot(index, 5).float() @ weight
    assert torch.equal(backend.linear_rows(weight, index), expected)
