"""The law by Winograd's algorithm: what it would round away is found, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_rlrp.kernels import convolution
from captum_rlrp.kernels.convolution import Filters

from .common import exact, needs_extension

pytestmark = needs_extension

TOLERANCE = 5e-5  # of each divisor, and of what a result is the sum of
SMALLEST = 1e-44  # what a float of 1e-38 is rounded by


def filters_of(weight: Tensor, padding: int = 1) -> Filters:
    return Filters(weight, None, None, [1, 1], [padding, padding])


def law(r: Tensor, x: Tensor, weight: Tensor, padding: int = 1) -> tuple[Tensor, Tensor]:
    """s and the result, each held against float64."""
    filters, wide, taps = filters_of(weight, padding), exact(x), exact(weight).abs()
    s, total = convolution.divide(r, x, filters)
    assert total.isfinite().all()
    d = F.conv2d(wide, taps, padding=padding)
    expected = torch.where(d > 0, exact(r) / d, 0.0)
    assert ((exact(s) - expected).abs() <= TOLERANCE * expected.abs() + SMALLEST).all()
    q = convolution.product(x, s, filters)
    g = F.conv_transpose2d(exact(s), taps, padding=padding)
    bound = F.conv_transpose2d(exact(s).abs(), taps, padding=padding)
    assert ((exact(q) - wide * g).abs() <= TOLERANCE * wide * bound + SMALLEST).all()
    assert (q[wide * bound == 0] == 0).all()
    return s, q


def image(*shape: int) -> Tensor:
    """As behind a ReLU."""
    return torch.randn(shape).relu().contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 30), (33, 18)], ids=str)
def test_of_what_a_network_has(size, padding):
    x, weight = image(2, 64, *size), torch.randn(96, 64, 3, 3)
    law(torch.randn_like(F.conv2d(x, weight, padding=padding)), x, weight, padding)


@pytest.mark.parametrize("scale", [0.1, 1e-2, 1e-3, 1e-5, 1e-8, 1e-12, 1e-20])
@pytest.mark.parametrize("where", ["column", "pixel", "channels", "corner"])
def test_small_beside_large(scale, where):
    x = image(2, 64, 19, 22)
    if where == "column":
        x[..., 9:] *= scale
    elif where == "pixel":
        x *= scale
        x[0, :, 9, 10] /= scale
    elif where == "channels":  # other ones at other pixels
        x[:, :32, :, 9:] *= scale
        x[:, 32:, :, :9] *= scale
    else:
        x[..., 6:, 6:] *= scale
    law(torch.randn(2, 96, 19, 22), x, torch.randn(96, 64, 3, 3))


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-8, 1e-15])
def test_small_relevance_beside_large(scale):
    x, weight = image(2, 64, 19, 22), torch.randn(96, 64, 3, 3)
    r = torch.randn(2, 96, 19, 22)
    r[..., 10:] *= scale
    r[:, :, 4, 4] /= scale
    law(r, x, weight)


def test_regions_of_zeros_stay_zero():
    x, weight, r = image(2, 64, 30, 30), torch.randn(96, 64, 3, 3), torch.randn(2, 96, 30, 30)
    x[..., 5:17, 3:20] = 0
    r[..., 18:, 21:] = 0
    s, q = law(r, x, weight)
    assert (s[..., 6:16, 4:19] == 0).all()
    assert (q[..., 19:, 22:] == 0).all()
    assert (s[..., :5, :] != 0).all()


def test_zero_throughout():
    x, weight, r = image(2, 32, 12, 12), torch.randn(32, 32, 3, 3), torch.randn(2, 32, 12, 12)
    s, _ = law(r, torch.zeros_like(x), weight)
    _, q = law(torch.zeros_like(r), x, weight)
    _, p = law(r, x, torch.zeros_like(weight))
    assert s.count_nonzero() == q.count_nonzero() == p.count_nonzero() == 0


def test_filters_that_read_little():
    """Of one channel and one tap each: what others hold at other pixels means nothing to them."""
    x = image(2, 64, 20, 20) * 10.0 ** torch.randint(-8, 1, (2, 64, 20, 20))
    weight = torch.zeros(96, 64, 9)
    weight[torch.arange(96), torch.randint(64, (96,)), torch.randint(9, (96,))] = 1
    s, _ = convolution.divide(torch.ones(2, 96, 20, 20), x, filters_of(weight.view(96, 64, 3, 3)))
    d = F.conv2d(exact(x), exact(weight).view(96, 64, 3, 3), padding=1)
    expected = torch.where(d > 0, 1 / d, 0.0)
    assert ((exact(s) - expected).abs() <= TOLERANCE * expected).all()


def test_taps_that_none_of_the_filters_has():
    """As in a convolution that may not look ahead: relevance does not get there."""
    x, weight, r = image(1, 64, 16, 16) + 0.1, torch.randn(64, 64, 3, 3), torch.zeros(1, 64, 16, 16)
    weight[..., 2, :] = weight[..., 1, 2] = 0
    r[..., 7, 7] = 1
    _, q = law(r, x, weight)
    assert q[..., 8:, :].count_nonzero() == q[..., 7, 8:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("of_x", "of_weight"),
    [
        *((1e-36, 1e8), (1e-30, 1e-6), (1e-25, 1e-10), (1e-10, 1e-8), (1e10, 1e-30), (1e30, 1e4)),
        *((1e30, 1e-30), (1e36, 1.0), (1e37, 1e-10), (1.0, 1e-33), (1.0, 1e33), (1e-10, 1e37)),
    ],
)
def test_large_and_small_numbers(of_x, of_weight):
    """Also such that overflow on the way, or lose digits."""
    x = (torch.rand(1, 32, 13, 14) + 0.5) * of_x
    weight = (torch.rand(32, 32, 3, 3) + 0.1) * of_weight * 0.1
    d = F.conv2d(exact(x), exact(weight), padding=1)
    assert 1e-37 < float(d.min()) <= float(d.max()) < 1e38
    law((torch.rand(1, 32, 13, 14) + 0.5) * min(float(d.min()), 1.0), x, weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_reaches_only_what_meets_it(value):
    x, weight = image(2, 32, 14, 14) + 0.1, torch.randn(32, 32, 3, 3) + 3
    r = torch.rand(2, 32, 14, 14) + 0.5
    filters = filters_of(weight)
    before, _ = convolution.divide(r, x, filters)
    x[1, 5, 6, 7] = value
    s, total = convolution.divide(r, x, filters)
    met = torch.zeros(2, 1, 14, 14, dtype=torch.bool)
    met[1, :, 5:8, 6:9] = True
    met = met.expand_as(s)
    assert total.isfinite().tolist() == [True, False]
    assert (s[met].isnan() if value != value else s[met] == 0).all()
    assert ((s - before).abs() <= TOLERANCE * before.abs())[~met].all()
    x[1, 5, 6, 7] = 1
    before = convolution.product(x, r, filters)
    r[1, 5, 6, 7] = value
    q = convolution.product(x, r, filters)
    assert not q[met].isfinite().any()
    assert ((q - before).abs() <= TOLERANCE * before.abs())[~met].all()


def test_each_neuron_hands_on_what_it_got():
    """Whatever it reads: one at a time, among inputs of a wide range."""
    x = image(1, 32, 12, 12) * 10.0 ** torch.randint(-6, 1, (1, 1, 12, 12))
    weight = torch.randn(32, 32, 3, 3)
    x = x.expand(32, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    r = torch.zeros(32, 32, 12, 12)
    r[torch.arange(32), torch.arange(32), torch.randint(12, (32,)), torch.randint(12, (32,))] = 1
    s, _ = convolution.divide(r, x, filters_of(weight))
    q = exact(convolution.product(x, s, filters_of(weight)))
    taps = exact(weight).abs()
    shares = exact(r) / F.conv2d(exact(x), taps, padding=1)
    expected = exact(x) * F.conv_transpose2d(shares, taps, padding=1)
    assert ((q - expected).abs().sum((1, 2, 3)) <= 1e-5).all()


@pytest.mark.parametrize("channels", [(32, 32), (128, 256)], ids=str)
def test_a_sample_has_the_same_bits_alone_and_in_any_batch(channels):
    inputs, outputs = channels
    x, weight = image(6, inputs, 17, 14), torch.randn(outputs, inputs, 3, 3)
    x[3, ..., 8:] *= 1e-6
    r = torch.randn(6, outputs, 17, 14)
    filters = filters_of(weight)
    s, total = convolution.divide(r, x, filters)
    q = convolution.product(x, s, filters)
    for n in range(6):
        alone, sum_alone = convolution.divide(r[n : n + 1], x[n : n + 1], filters)
        assert torch.equal(alone[0], s[n])
        torch.testing.assert_close(sum_alone[0], total[n])
        assert torch.equal(convolution.product(x[n : n + 1], alone, filters)[0], q[n])


def test_equal_pixels_get_the_same():
    x = (torch.rand(1, 32, 1, 1) + 0.1).expand(1, 32, 20, 20)
    s, _ = convolution.divide(
        torch.ones(1, 32, 18, 18), x, filters := filters_of(torch.randn(32, 32, 3, 3), 0)
    )
    assert torch.equal(s, s[..., :1, :1].expand_as(s))
    inner = convolution.product(x, s, filters)[..., 4:16, 4:16]
    assert torch.equal(inner, inner[..., :1, :1].expand_as(inner))
