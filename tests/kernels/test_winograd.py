"""3×3 convolutions by Winograd's algorithm: against PyTorch's convolution in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from captum_rlrp.kernels import compiled, winograd
from captum_rlrp.kernels.winograd import Filters

from .common import agree, exact, needs_extension, rand

pytestmark = needs_extension

# batch, input channels, filters, size, padding
CASES = [
    (2, 32, 32, (6, 8), (1, 1)),
    (1, 32, 64, (7, 5), (1, 1)),  # the last outputs in half a patch
    (3, 64, 32, (9, 4), (0, 2)),
    (1, 96, 32, (3, 3), (0, 0)),  # a single output
    (5, 32, 32, (1, 1), (1, 1)),
    (2, 32, 96, (1, 9), (2, 1)),
    (2, 32, 32, (15, 17), (2, 2)),  # several blocks of patches, one over two images
    (1, 512, 256, (4, 6), (1, 1)),  # filters in several goes, either way
    (1, 1024, 96, (5, 3), (1, 1)),
    (0, 32, 32, (4, 4), (1, 1)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])


def make(case, layout):
    """An image, filters, a number for each of those and the padding."""
    n, channels, count, size, padding = case
    x = rand(n, channels, *size, dtype=torch.float32, layout=layout)
    weight = rand(count, channels, 3, 3, dtype=torch.float32, layout=layout)
    return x, weight, torch.rand(count) + 0.5, list(padding)


def scaled(weight, scale):
    return exact(weight) * exact(scale).view(-1, 1, 1, 1)


@every_case
@every_layout
@pytest.mark.parametrize("relu", [False, True])
def test_forward(case, layout, relu):
    x, weight, scale, padding = make(case, layout)
    bias = torch.randn(len(weight))
    expected = F.conv2d(exact(x), scaled(weight, scale), exact(bias), padding=padding)
    other = rand(*expected.shape, dtype=torch.float32, layout=layout)
    expected = expected + exact(other)
    y, mass = winograd.convolution(x, Filters(weight, scale, bias, padding), other, relu=relu)
    agree(y, expected.relu() if relu else expected, torch.float32, scale=4)
    agree(mass, scaled(weight, scale).abs().sum((1, 2, 3)), torch.float32, scale=4)
    assert y.is_contiguous(memory_format=torch.channels_last)


@every_case
def test_forward_of_filters_alone(case):
    x, weight, _, padding = make(case, "channels_last")
    y, mass = winograd.convolution(x, Filters(weight, None, None, padding))
    agree(y, F.conv2d(exact(x), exact(weight), padding=padding), torch.float32, scale=4)
    agree(mass, exact(weight).abs().sum((1, 2, 3)), torch.float32, scale=4)


@every_case
@every_layout
def test_transpose(case, layout):
    x, weight, scale, padding = make(case, layout)
    filters = Filters(weight, scale, None, padding)
    wide = exact(x).requires_grad_()
    y = F.conv2d(wide, scaled(weight, scale), padding=padding)
    g = rand(*y.shape, dtype=torch.float32, layout=layout)
    (expected,) = torch.autograd.grad(y, wide, exact(g))
    agree(winograd.transpose(g, filters), expected, torch.float32, scale=4)

    factor = torch.rand(len(x)) + 0.5
    expected = expected * exact(x) * exact(factor).view(-1, 1, 1, 1)
    q = x.contiguous(memory_format=torch.channels_last).clone()
    mass = winograd.product(q, g, filters, factor)
    agree(q, expected, torch.float32, scale=4)
    agree(mass, expected.abs().sum((1, 2, 3)), torch.float32, scale=4)


def test_results_do_not_depend_on_the_number_of_threads():
    x, weight, scale, padding = make((3, 64, 96, (21, 13), (1, 1)), "channels_last")
    g, filters = torch.randn(3, 96, 21, 13), Filters(weight, scale, None, padding)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            q = x.clone()
            results.append(
                [
                    *winograd.convolution(x, filters),
                    winograd.product(q, g, filters, None),
                    q,
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_equal_pixels_give_equal_outputs():
    """So that a uniform region of an image has the ties that it has without this algorithm."""
    x = torch.randn(1, 32, 1, 1).expand(1, 32, 20, 20)
    y, _ = winograd.convolution(x, Filters(torch.randn(32, 32, 3, 3), None, None, [0, 0]))
    assert torch.equal(y, y[..., :1, :1].expand_as(y))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(value):
    x = torch.randn(1, 32, 8, 8)
    x[0, 3, 4, 4] = value
    weight = torch.rand(32, 32, 3, 3) * (1 if value > 0 else -1)
    y, _ = winograd.convolution(x, Filters(weight, None, None, [1, 1]), relu=True)
    assert not y.isfinite().all()
    assert y[..., :2, :2].isfinite().all()  # far away


def test_what_it_covers():
    x, weight = torch.randn(2, 32, 8, 8), torch.randn(64, 32, 3, 3)
    window = ([1, 1], [1, 1], [1, 1])
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert winograd.covers(x, weight, *window, 1) == fast
    refused = [
        (x.double(), weight.double(), *window, 1),
        (x.bfloat16(), weight, *window, 1),
        (x[:1], weight, *window, 1),
        (x[0], weight, *window, 1),
        (x, weight, [2, 1], [1, 1], [1, 1], 1),
        (x, weight, [1, 1], [1, 3], [1, 1], 1),
        (x, weight, [1, 1], [1, 1], [1, 2], 1),
        (x, weight[:, :16], *window, 2),
        (x, weight[:20], *window, 1),
        (x, weight[..., :2], *window, 1),
        (x, weight[:0], *window, 1),
        (x.to("meta"), weight.to("meta"), *window, 1),
    ]
    assert not any(winograd.covers(*arguments) for arguments in refused)


def test_the_gradient_of_a_covered_convolution_is_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(winograd, "_IS_FAST", True)
    monkeypatch.setattr(winograd, "transpose", lambda *a: calls.append(a) or "made")
    g, weight = torch.randn(2, 64, 8, 8), torch.randn(64, 32, 3, 3)
    assert compiled.conv(g, weight, (2, 32, 8, 8), 1, 1) == "made"
    assert len(calls) == 1
