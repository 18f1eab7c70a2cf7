"""Our own convolutions: against PyTorch's convolution in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from captum_rlrp.kernels import compiled, convolution, reference
from captum_rlrp.kernels.convolution import Filters
from captum_rlrp.kernels.extension import ops
from captum_rlrp.kernels.reference import Window

from .common import agree, assert_same_bits, exact, needs_extension, rand

pytestmark = needs_extension

SQUARE = (3, 3)
# batch, input channels, filters, size, taps, stride, padding
CASES = [
    (2, 32, 32, (6, 8), SQUARE, (1, 1), (1, 1)),
    (1, 32, 64, (7, 5), SQUARE, (1, 1), (1, 1)),  # the last outputs in half a patch
    (3, 64, 32, (9, 4), SQUARE, (1, 1), (0, 2)),
    (1, 96, 32, (3, 3), SQUARE, (1, 1), (0, 0)),  # a single output
    (5, 32, 32, (1, 1), SQUARE, (1, 1), (1, 1)),
    (2, 32, 96, (1, 9), SQUARE, (1, 1), (2, 1)),
    (2, 32, 32, (15, 17), SQUARE, (1, 1), (2, 2)),  # several blocks, one over two images
    (1, 512, 256, (4, 6), SQUARE, (1, 1), (1, 1)),
    (1, 1024, 64, (36, 34), SQUARE, (1, 1), (1, 1)),  # filters in several goes, and a few at a time
    (2, 32, 32, (208, 200), SQUARE, (1, 1), (1, 1)),  # results past the caches
    (0, 32, 32, (4, 4), SQUARE, (1, 1), (1, 1)),
    (2, 32, 64, (9, 12), (5, 5), (1, 1), (2, 2)),  # other taps along both axes
    (1, 64, 32, (8, 11), (7, 4), (1, 1), (3, 0)),
    (1, 32, 32, (9, 6), (2, 6), (2, 1), (1, 5)),
    (1, 32, 32, (7, 7), (7, 7), (1, 1), (0, 0)),  # a single output
    (1, 512, 96, (4, 6), (5, 5), (1, 1), (2, 2)),
    (1, 1024, 64, (18, 17), (5, 5), (1, 1), (2, 2)),  # filters in several goes
    # Every phase at each end.
    *((2, 32, 64, (9 + n, 10 - n), SQUARE, (2, 2), (n % 3, 1)) for n in range(4)),
    *((1, 64, 32, (12 + n, 14), (5, 7), (2, 3), (2, n)) for n in range(3)),
    (0, 32, 32, (9, 9), SQUARE, (2, 2), (1, 1)),
    (2, 32, 64, (5, 13), (1, 3), (1, 1), (0, 1)),  # taps along one axis: in threes,
    (2, 64, 32, (12, 5), (4, 1), (1, 1), (3, 0)),  # with one left over,
    (1, 32, 32, (6, 11), (1, 5), (1, 1), (0, 2)),  # with two
    (1, 32, 32, (3, 9), (1, 2), (1, 1), (0, 0)),
    (3, 32, 96, (101, 1), (7, 1), (1, 1), (6, 0)),  # several blocks
    (1, 256, 224, (3, 64), (1, 16), (1, 1), (0, 5)),
    (1, 1024, 96, (3, 80), (1, 16), (1, 1), (0, 5)),  # filters in several goes
    (1, 32, 32, (1, 64), (1, 64), (1, 1), (0, 0)),  # a single output
    (0, 32, 32, (1, 20), (1, 7), (1, 2), (0, 3)),
    # Every phase at each end.
    *((1, 32, 64, (2, 20 + n), (1, 7), (1, 2), (0, n)) for n in range(4)),
    *((2, 64, 32, (20 + n, 3), (5, 1), (3, 1), (n, 0)) for n in range(4)),
    (1, 32, 32, (1, 14), (1, 3), (1, 3), (0, 0)),  # inputs that nothing reads
    (3, 32, 64, (5, 11), (1, 1), (1, 1), (0, 0)),  # 1×1: three blocks of pixels, some left over
    (1, 64, 32, (1, 1), (1, 1), (1, 1), (0, 0)),
    (3, 1024, 32, (5, 11), (1, 1), (1, 1), (0, 0)),  # pixels that are copied, one way
    (1, 2048, 1056, (2, 3), (1, 1), (1, 1), (0, 0)),  # filters in several goes, either way
    (1, 64, 64, (208, 200), (1, 1), (1, 1), (0, 0)),  # results past the caches
    (0, 32, 32, (4, 4), (1, 1), (1, 1), (0, 0)),
    (2, 32, 64, (9, 8), (1, 1), (2, 2), (0, 0)),  # pixels that nothing reads
    (3, 1024, 40, (7, 10), (1, 1), (3, 2), (0, 0)),
    (1, 64, 64, (416, 400), (1, 1), (2, 2), (0, 0)),
    (2, 32, 32, (5, 6), (1, 1), (2**40, 9), (0, 0)),  # a single one is read
    (2, 96, 32, (29,), (1,), (1,), (0,)),
    # 1×1 of channels in eights: what is left over is a vector, half of one, or both.
    (2, 24, 40, (9, 7), (1, 1), (1, 1), (0, 0)),
    (1, 144, 56, (5, 11), (1, 1), (1, 1), (0, 0)),
    (3, 8, 8, (4, 4), (1, 1), (1, 1), (0, 0)),
    (2, 16, 112, (7, 7), (1, 1), (1, 1), (0, 0)),
    (1, 1032, 80, (3, 5), (1, 1), (1, 1), (0, 0)),
    (1, 72, 2056, (2, 7), (1, 1), (1, 1), (0, 0)),  # filters in several goes, either way
    (2, 40, 56, (168, 160), (1, 1), (1, 1), (0, 0)),  # results past the caches
    (2, 24, 88, (30,), (1,), (1,), (0,)),
    # Channels that leave a vector unfilled.
    (2, 18, 36, (9, 10), SQUARE, (1, 1), (1, 1)),
    (1, 76, 50, (17, 14), SQUARE, (1, 1), (1, 1)),
    (2, 152, 152, (6, 7), SQUARE, (1, 1), (1, 1)),  # fewer patches than filters
    (1, 1030, 67, (36, 34), SQUARE, (1, 1), (1, 1)),  # filters in several goes
    (2, 20, 33, (10, 9), SQUARE, (2, 2), (1, 1)),
    (1, 45, 31, (8, 11), (5, 4), (1, 2), (2, 1)),
    (2, 19, 70, (3, 40), (1, 7), (1, 2), (0, 3)),
    (2, 17, 100, (9, 7), (1, 1), (1, 1), (0, 0)),
    (1, 300, 3, (5, 11), (1, 1), (1, 1), (0, 0)),
    (2, 6, 39, (9, 8), (1, 1), (2, 2), (0, 0)),
    (3, 2, 5, (6, 6), SQUARE, (1, 1), (1, 1)),
    (1, 70, 30, (208, 200), SQUARE, (1, 1), (1, 1)),  # results past the caches
    (2, 21, 22, (31,), (5,), (1,), (2,)),
    (2, 32, 32, (30,), (7,), (1,), (3,)),  # signals
    (2, 32, 64, (31,), (6,), (2,), (2,)),
    (1, 64, 32, (3,), (3,), (2,), (0,)),
]
# Few input channels, forward alone.
FROM_FEW = [
    (2, 3, 64, (40, 45), (7, 7), (2, 2), (3, 3)),
    (1, 3, 32, (9, 57), SQUARE, (1, 1), (1, 1)),  # blocks in the midst of rows
    (3, 1, 32, (5, 5), (5, 5), (1, 1), (2, 2)),  # each at an edge but one
    (2, 4, 96, (8, 9), (2, 8), (2, 5), (1, 7)),
    (1, 2, 32, (3, 4), (3, 4), (3, 4), (0, 0)),  # a single output
    (2, 3, 64, (230, 220), SQUARE, (1, 1), (1, 1)),  # results past the caches
    (0, 3, 32, (9, 9), SQUARE, (1, 1), (1, 1)),
    (2, 3, 64, (9, 8), (1, 1), (1, 1), (0, 0)),
    (2, 3, 23, (19, 18), (7, 7), (2, 2), (3, 3)),
    (1, 3, 512, (64, 64), (32, 32), (32, 32), (0, 0)),  # filters in several goes
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_forward_case = pytest.mark.parametrize("case", CASES + FROM_FEW, ids=str)
every_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])


def make(case, layout):
    """An image or a signal, and filters with a number for each."""
    n, channels, count, size, taps, stride, padding = case
    x = rand(n, channels, *size, dtype=torch.float32, layout=layout)
    weight = rand(count, channels, *taps, dtype=torch.float32, layout=layout)
    return x, Filters(weight, torch.rand(count) + 0.5, torch.randn(count), stride, padding)


def per_sample(vector, image):
    return exact(vector).view(-1, *[1] * (image.dim() - 1))


def scaled(filters):
    return exact(filters.weight) * per_sample(filters.scale, filters.weight)


def convolved(x, weight, filters, bias=None):
    convolve = F.conv1d if x.dim() == 3 else F.conv2d
    groups = x.shape[1] // weight.shape[1]
    return convolve(x, weight, bias, filters.stride, filters.padding, groups=groups)


def like_image(x):
    """x in channels_last, which no memory format describes for signals."""
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def assert_total(total, summands):
    """Of each sample, before ReLU."""
    summands = summands.flatten(1)
    assert ((total - summands.sum(1)).abs() <= 1e-5 * summands.abs().sum(1)).all()


@every_forward_case
@every_layout
@pytest.mark.parametrize("relu", [False, True])
def test_forward(case, layout, relu):
    x, filters = make(case, layout)
    expected = convolved(exact(x), scaled(filters), filters, exact(filters.shift))
    other = rand(*expected.shape, dtype=torch.float32, layout=layout)
    expected = expected + exact(other)
    y, total = convolution.forward(x, filters, other, relu=relu)
    agree(y, expected.relu() if relu else expected, torch.float32, scale=4)
    assert_total(total, expected)
    assert y.movedim(1, -1).is_contiguous()


@every_forward_case
def test_forward_of_filters_alone(case):
    x, filters = make(case, "channels_last")
    filters = filters._replace(scale=None, shift=None)
    y, total = convolution.forward(x, filters)
    expected = convolved(exact(x), exact(filters.weight), filters)
    agree(y, expected, torch.float32, scale=4)
    assert_total(total, expected)


@every_forward_case
@every_layout
def test_the_law(case, layout):
    """Both halves, each output against what it is made of: nothing else may round it."""
    x, filters = make(case, layout)
    x = like_image(x.abs()) if layout == "channels_last" else x.abs()
    x[..., x.shape[-1] // 2 :] *= 1e-6  # small beside large
    assert_law(relevance(x, filters, layout), x, filters)


def relevance(x, filters, layout):
    shape = convolved(x, filters.weight, filters).shape
    return rand(*shape, dtype=torch.float32, layout=layout)


def assert_law(r, x, filters):
    """Of x ≥ 0, and the same whatever its signs; returns s and the result, but of few channels."""
    wide, weight = exact(x).requires_grad_(), exact(filters.weight).abs()
    d = convolved(wide, weight, filters)
    s, total = convolution.divide(r, x, filters, nonnegative=True)
    signed = with_signs(x)
    assert_equal(convolution.divide(r, signed, filters), (s, total))
    expected = torch.where(d > 0, exact(r) / d, 0.0).detach()
    assert ((exact(s) - expected).abs() <= 3e-5 * expected.abs()).all()
    assert ((total - expected.flatten(1).abs().sum(1)).abs() <= 3e-5 * total).all()
    if x.shape[1] == filters.weight.shape[1] <= 4:
        return None
    (g,) = torch.autograd.grad(d, wide, expected, retain_graph=True)
    (bound,) = torch.autograd.grad(d, wide, expected.abs())
    q = convolution.product(x, s, filters)
    assert_equal([convolution.product(signed, s, filters)], [q])
    assert ((exact(q) - exact(x) * g).abs() <= 5e-5 * exact(x) * bound).all()
    return s, q


def with_signs(x):
    return torch.where(torch.rand_like(x) < 0.5, x, -x)


def assert_equal(results, expected):
    """To the bit."""
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        (2, 64, 256, (11, 13), (1, 1), (1, 1), (0, 0)),
        (3, 72, 120, (7, 7), (1, 1), (1, 1), (0, 0)),  # vectors, and half of one, left over
        (1, 1024, 152, (5, 11), (1, 1), (1, 1), (0, 0)),
        (2, 200, 328, (9, 8), (1, 1), (2, 2), (0, 0)),
        (1, 128, 2048, (1, 64), (1, 1), (1, 1), (0, 0)),
        (2, 64, 128, (14, 15), SQUARE, (2, 2), (1, 1)),
        (1, 32, 96, (9, 10), (5, 4), (1, 1), (2, 1)),
        (2, 96, 288, (31,), (1,), (1,), (0,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_images_with_many_zeros(case, kept):
    """What is 0 at all of a few neighbours is left out; a zero may have a sign."""
    x, filters = make(case, "channels_last")

    def thinned(image):
        """Of whole channels, and of pixels by themselves."""
        full = (torch.rand(image.shape[:2]) < kept).view(*image.shape[:2], *[1] * (image.dim() - 2))
        thin = torch.where(full & (torch.rand_like(image) < 0.7), image, image * 0)
        return torch.where(torch.rand_like(image) < 1e-3, image, thin)

    x = thinned(x)
    y = convolved(exact(x), scaled(filters), filters, exact(filters.shift))
    ours, total = convolution.forward(x, filters)
    agree(ours, y, torch.float32, scale=4)
    assert_total(total, y)
    assert_law(thinned(torch.randn(y.shape)), x.abs(), filters)


# channels, size, taps, stride, padding
DEPTHWISE = [
    (24, (9, 7), SQUARE, (1, 1), (1, 1)),
    (40, (12, 13), (5, 5), (2, 2), (2, 2)),
    (8, (4, 4), SQUARE, (1, 1), (1, 1)),
    (96, (14, 15), SQUARE, (2, 2), (0, 1)),
    (72, (9, 20), (7, 3), (1, 2), (3, 0)),
    (32, (1, 9), (1, 5), (1, 3), (0, 4)),
    (144, (3, 3), SQUARE, (1, 1), (0, 0)),  # a single output
    (32, (160, 150), SQUARE, (1, 1), (1, 1)),  # results past the caches
    (16, (5, 30), (4, 2), (4, 2), (0, 0)),  # inputs that nothing reads
    (56, (31,), (7,), (2,), (3,)),
    (19, (12, 9), SQUARE, (1, 1), (1, 1)),  # a vector that is not filled
    (45, (40, 37), (7, 7), (1, 1), (3, 3)),
    (3, (9, 9), (5, 5), (2, 2), (2, 2)),
    (72, (40, 37), (7, 7), (1, 1), (3, 3)),  # many taps: tiles of the image,
    (24, (9, 150), (4, 7), (1, 1), (1, 6)),  # several along
    (16, (90, 60), (7, 7), (1, 1), (0, 0)),  # and down
    (40, (33, 30), (9, 8), (2, 2), (3, 4)),
    (8, (5, 3), (7, 7), (1, 1), (3, 3)),
    (48, (300,), (31,), (1,), (15,)),
    (32, (3, 70), (63, 63), (1, 1), (31, 31)),
]


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
@every_layout
def test_the_law_depthwise(case, layout):
    channels, size, taps, stride, padding = case
    axes = len(size)
    window = Window([*stride], [*padding], [1] * axes, False, [0] * axes, channels)
    x = rand(2, channels, *size, dtype=torch.float32, layout=layout).abs()
    x[..., x.shape[-1] // 2 :] *= 1e-6
    weight = rand(channels, 1, *taps, dtype=torch.float32, layout=layout)
    assert convolution.has_law(x, weight, window) == convolution._IS_FAST
    filters = Filters(weight, None, None, stride, padding)
    s, q = assert_law(relevance(x, filters, layout), x, filters)
    other = torch.randn_like(x)
    both = exact(convolution.product(x, s, filters, other))
    agree((both - exact(q)).float(), exact(other), torch.float32, scale=4)


# groups, batch, channels, filters, size, taps, stride, padding
GROUPED = [
    (2, 2, 64, 96, (11, 10), SQUARE, (1, 1), (1, 1)),
    (3, 1, 72, 48, (21, 22), SQUARE, (1, 1), (1, 1)),  # vectors that are not filled
    (4, 2, 16, 8, (7, 9), SQUARE, (2, 2), (1, 1)),
    (2, 2, 64, 128, (104, 100), SQUARE, (1, 1), (1, 1)),  # results past the caches
    (2, 1, 38, 20, (9, 8), (5, 4), (1, 2), (2, 1)),
    (5, 2, 10, 15, (8, 8), (7, 7), (2, 2), (3, 3)),  # few channels each
    (4, 3, 96, 60, (5, 11), (1, 1), (1, 1), (0, 0)),
    (2, 1, 160, 256, (9, 8), (1, 1), (2, 2), (0, 0)),
    (6, 2, 6, 12, (9, 9), SQUARE, (1, 1), (1, 1)),
    (2, 2, 50, 44, (31,), (5,), (1,), (2,)),
    (2, 0, 64, 64, (5, 5), SQUARE, (1, 1), (1, 1)),
]


@pytest.mark.parametrize("case", GROUPED, ids=str)
@every_layout
def test_groups(case, layout):
    """A group is a convolution of its own."""
    groups, n, channels, count, size, taps, stride, padding = case
    x, filters = make((n, channels, count, size, taps, stride, padding), layout)
    filters = filters._replace(weight=filters.weight[:, : channels // groups])
    y = convolved(exact(x), scaled(filters), filters, exact(filters.shift))
    ours, total = convolution.forward(x, filters)
    agree(ours, y, torch.float32, scale=4)
    assert_total(total, y)
    assert_law(relevance(x, filters, layout), x.abs(), filters)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_divisor_that_is_not_finite_shows(value):
    x = torch.rand(2, 32, 6, 6)
    x[1, 3, 2, 2] = value
    filters = Filters(torch.randn(32, 32, 3, 3), None, None, [1, 1], [1, 1])
    _, total = convolution.divide(torch.randn(2, 32, 6, 6), x, filters)
    assert total.isfinite().tolist() == [True, False]


@pytest.mark.parametrize(
    "case",
    [
        (3, 64, 96, (21, 13), SQUARE, (1, 1), (1, 1)),
        (1, 64, 96, (21, 23), SQUARE, (1, 1), (1, 1)),  # fewer patches than filters
        (3, 64, 96, (21, 13), SQUARE, (2, 2), (1, 1)),
        (3, 64, 96, (215,), (7,), (2,), (3,)),
        (3, 64, 96, (21, 13), (1, 1), (1, 1), (0, 0)),
        (3, 100, 330, (13, 40), (1, 1), (1, 1), (0, 0)),
        (3, 3, 96, (41, 23), (5, 5), (2, 2), (2, 2)),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_zeros", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(case, has_zeros):
    x, filters = make(case, "channels_last")
    if has_zeros:  # of which some blocks leave out much, and others nothing
        x[..., x.shape[-1] // 2 :] *= (torch.rand(x.shape[1]) < 0.4).view(-1, *[1] * (x.dim() - 2))
    g = torch.randn_like(convolution.forward(x, filters)[0])

    def results():
        return (
            *convolution.forward(x, filters),
            *convolution.divide(g, x, filters),
            *convolution.divide(g, x.abs(), filters, nonnegative=True),
            *([convolution.product(x, g, filters)] if x.shape[1] > 4 else ()),
        )

    assert_same_bits(results, (1, 2, 5, 9))


# batch, channels, filters, size, taps, stride, padding
FEW = [
    (2, 3, 64, (40, 150), (7, 7), (2, 2), (3, 3)),  # vectors of inputs: 4 and 1 for each phase
    (1, 3, 32, (9, 224), SQUARE, (1, 1), (1, 1)),
    (
        3,
        1,
        8,
        (28, 28),
        SQUARE,
        (1, 1),
        (1, 1),
    ),  # as many filters as a block has, fewer than a vector
    (2, 2, 24, (7, 21), (5, 2), (3, 1), (9, 4)),  # more padding than taps
    (2, 4, 16, (6, 70), (1, 7), (1, 3), (0, 0)),
    (1, 4, 40, (13, 1), (7, 1), (1, 1), (2, 0)),
    (1, 3, 8, (5, 37), (4, 2), (2, 5), (0, 1)),  # inputs that nothing reads
    (1, 2, 8, (2, 2), SQUARE, (2, 2), (1, 1)),  # a phase without inputs
]


@pytest.mark.parametrize("case", FEW, ids=str)
@every_layout
def test_transpose_to_few_channels(case, layout):
    x, filters = make(case, layout)
    wide = exact(x).requires_grad_()
    y = convolved(wide, exact(filters.weight), filters)
    g = rand(*y.shape, dtype=torch.float32, layout=layout)
    (expected,) = torch.autograd.grad(y, wide, exact(g))
    result = ops.conv_few(g, filters.weight, x.shape, filters.stride, filters.padding)
    agree(result, expected, torch.float32, scale=4)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("taps", "stride"),
    [
        *((taps, (1, 1)) for taps in [(1, 1), SQUARE, (1, 3), (1, 4), (5, 1), (1, 7), (8, 1)]),
        *(((1, k), (1, 2)) for k in (3, 4, 7)),
        *(((k, 1), (2, 1)) for k in (5, 8)),
        *((taps, (2, 2)) for taps in [SQUARE, (5, 5), (7, 6)]),
        ((5, 4), (1, 1)),
    ],
    ids=str,
)
def test_equal_pixels_give_equal_outputs(taps, stride):
    """So that a uniform region of an image has the ties that it has without this algorithm."""
    x = torch.randn(1, 32, 1, 1).expand(1, 32, 20, 20)
    filters = Filters(torch.randn(32, 32, *taps), None, None, stride, [0, 0])
    y, _ = convolution.forward(x, filters)
    assert torch.equal(y, y[..., :1, :1].expand_as(y))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(value):
    x = torch.randn(1, 32, 12, 12)
    x[0, 3, 8, 8] = value
    weight = torch.rand(32, 32, 3, 3) * (1 if value > 0 else -1)
    y, total = convolution.forward(x, Filters(weight, None, None, [1, 1], [1, 1]), relu=True)
    assert not y.isfinite().all()
    assert y[..., :2, :2].isfinite().all()  # far away
    assert not total.isfinite().any()


def test_an_infinity_that_relu_hides_shows_in_the_sum():
    x, weight = torch.rand(2, 32, 5, 5), torch.rand(32, 32, 1, 1)
    x[0, 3, 4, 4] = -float("inf")
    y, total = convolution.forward(x, Filters(weight, None, None, [1, 1], [0, 0]), relu=True)
    assert y.isfinite().all()
    assert total.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_among_few_channels_stays_so(value):
    x = torch.randn(2, 3, 16, 16)
    x[1, 2, 7, 8] = value
    weight = torch.rand(32, 3, 3, 3) + 0.1
    y, total = convolution.forward(x, Filters(weight, None, None, [1, 1], [1, 1]), relu=True)
    met = torch.zeros(16, 16, dtype=torch.bool)
    met[6:9, 7:10] = True
    assert y[0].isfinite().all()
    assert y[1][:, ~met].isfinite().all()
    assert not y[1][:, met].isfinite().any() or value < 0
    assert total.isfinite().tolist() == [True, False]


def covers(x, weight, *window):
    return convolution.suits(x, weight, *window) and convolution.pays(x, weight)


def test_what_it_covers():
    x, weight = torch.randn(2, 32, 8, 8), torch.randn(64, 32, 3, 3)
    window = ([1, 1], [1, 1], [1, 1])
    fast = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    assert covers(x, weight, *window, 1) == fast
    for size, taps, arguments in (
        ((1, 1), (3, 3), ([1, 1], [1, 1], [1, 1], 1)),
        ((8, 8), (1, 3), ([1, 1], [0, 2], [1, 1], 1)),
        ((8, 8), (32, 1), ([2, 1], [31, 0], [1, 1], 1)),
        ((1, 3), (1, 3), ([1, 2], [0, 0], [1, 1], 1)),
        ((12, 12), (3, 3), ([2, 2], [1, 1], [1, 1], 1)),
        ((20, 20), (5, 7), ([1, 2], [2, 3], [1, 1], 1)),
        ((40,), (7,), ([2], [3], [1], 1)),
        ((40,), (1,), ([1], [0], [1], 1)),
        ((5, 1), (1, 1), ([1, 1], [0, 0], [1, 1], 1)),
    ):
        signal, filters = torch.randn(1, 32, *size), torch.randn(64, 32, *taps)
        assert covers(signal, filters, *arguments) == fast
    assert covers(x, weight[:20], *window, 1) == fast
    assert covers(torch.cat([x, x], 1), weight, *window, 2) == fast
    few = torch.randn(64, 3, 7, 7)
    assert covers(torch.randn(1, 3, 9, 9), few, [2, 2], [3, 3], [1, 1], 1) == fast
    refused = [
        (x[:, :3], few, [8, 2], [3, 3], [1, 1], 1),
        (x[:, :3], few[:60], [2, 2], [3, 3], [1, 1], 1),
        (x[:, :3], few[..., :1], [2, 1], [3, 0], [1, 1], 1),
        (x.double(), weight.double(), *window, 1),
        (x.bfloat16(), weight, *window, 1),
        (x[0], weight, *window, 1),
        (x, weight, [3, 1], [1, 1], [1, 1], 1),
        (x, weight, [1, 1], [1, 3], [1, 1], 1),
        (x, weight, [1, 1], [1, 1], [1, 2], 1),
        (x, weight[:, :16], *window, 2),
        (x, weight[:32, :1], *window, 32),
        (x, weight[:12], *window, 1),
        (x, weight[..., :2], *window, 1),
        (x, weight[..., :1], [1, 1], [1, 1], [1, 1], 1),
        (x, weight[..., :1], [3, 1], [1, 0], [1, 1], 1),
        (x, weight[..., :1], [1, 2], [1, 0], [1, 1], 1),
        (x, weight[:, :, :1, :2], [1, 1], [0, 0], [1, 1], 1),
        (x, weight[..., :1, :1], [1, 1], [1, 1], [1, 1], 1),
        (x[..., :1, :1], weight[..., :1, :1], [1, 1], [0, 0], [1, 1], 1),
        (x[0], weight[..., 0], [1], [1], [2], 1),
        (x, weight[..., 0], [1], [1], [1], 1),
        (x[..., None], weight[..., None], [1, 1, 1], [1, 1, 0], [1, 1, 1], 1),
        (x, weight[:0], *window, 1),
        (x.to("meta"), weight.to("meta"), *window, 1),
    ]
    assert not any(covers(*arguments) for arguments in refused)


def test_the_law_of_a_covered_convolution_is_its_own(monkeypatch):
    made = torch.ones(2, 32, 8, 8)
    monkeypatch.setattr(convolution, "_IS_FAST", True)
    monkeypatch.setattr(convolution, "divide", lambda r, x, f, **_: (r, r.sum()))
    monkeypatch.setattr(convolution, "product", lambda x, s, f, other: made)
    x, weight, r = torch.rand(2, 32, 8, 8), torch.randn(64, 32, 3, 3), torch.randn(2, 64, 8, 8)
    window = Window([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert compiled.conv_relevance(x, weight, r, window)[0] is made


@pytest.mark.parametrize("padded", [0, 1])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("channels", [(3, 64), (64, 32), (5, 7)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_law_is_added_to_what_arrived(channels, kernel, stride, padded, layout):
    inputs, outputs = channels
    padding = padded * (kernel // 2)
    window = Window([stride] * 2, [padding] * 2, [1] * 2, False, [0] * 2, 1)
    x = rand(2, inputs, 13, 11, dtype=torch.float32)
    weight = torch.randn(outputs, inputs, kernel, kernel)
    y = torch.ops.aten.convolution.default(exact(x), exact(weight), None, *window)
    r, other = torch.randn(y.shape), torch.randn(x.shape)
    kept = other.clone()
    expected, _ = reference.conv_relevance(exact(x), exact(weight), exact(r), window)
    arguments = [t.contiguous(memory_format=layout) for t in (x, r, other)]
    result, _ = compiled.conv_relevance(
        arguments[0], weight, arguments[1], window, other=arguments[2]
    )
    agree(result, expected + other, torch.float32, scale=4)
    assert torch.equal(arguments[2], kept)


@pytest.mark.parametrize("size", [(7,), (7, 7), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("channels", [32, 5])
@pytest.mark.parametrize("with_other", [False, True])
def test_the_law_of_filters_as_large_as_the_image(size, channels, with_other):
    axes = len(size)
    window = Window([2] * axes, [0] * axes, [1] * axes, False, [0] * axes, 1)
    x, weight = (
        rand(3, channels, *size, dtype=torch.float32),
        torch.randn(64, channels, *size),
    )
    r = torch.randn(3, 64, *[1] * axes)
    other = torch.randn_like(x) if with_other else None
    result, seen = compiled.conv_relevance(x, weight, r, window, other=other)
    expected, _ = reference.conv_relevance(exact(x), exact(weight), exact(r), window)
    agree(result, expected + (0 if other is None else exact(other)), torch.float32, scale=4)
    assert seen.isfinite().all()


@pytest.mark.parametrize("size", [(9,), (9, 8), (5, 8, 7)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_law_of_1x1_that_leaves_out_pixels(size, groups):
    axes = len(size)
    window = Window([2, 3, 2][:axes], [0] * axes, [1] * axes, False, [0] * axes, groups)
    x = rand(2, 32, *size, dtype=torch.float32)
    weight = torch.randn(64, 32 // groups, *[1] * axes)
    y = torch.ops.aten.convolution.default(exact(x), exact(weight), None, *window)
    r = torch.randn(y.shape)
    result, seen = compiled.conv_relevance(x, weight, r, window)
    expected, _ = reference.conv_relevance(exact(x), exact(weight), exact(r), window)
    agree(result, expected, torch.float32, scale=4)
    assert seen.isfinite().all()
    other = torch.randn_like(x)
    both, _ = compiled.conv_relevance(x, weight, r, window, other=other)
    agree(both, expected + other, torch.float32, scale=4)
    read = reference.every(window.stride)
    result[read] = 0
    assert result.count_nonzero() == 0
