"""The ops as PyTorch sees them: schemas, fakes, and what they do with bad arguments."""

from __future__ import annotations

import random

import pytest
import torch

from captum_rlrp.kernels import compiled

from .common import DIAGONAL, every_device, needs_extension, rand

pytestmark = needs_extension
ops = torch.ops.captum_rlrp


def calls(dtype=torch.float32, layout="contiguous", device="cpu", n=2):
    """Every op with arguments that it takes."""

    def make(*shape):
        return rand(*shape, dtype=dtype, layout=layout, device=device)

    x, r = make(n, 6, 9, 8), make(n, 6, 4, 4)
    f = torch.rand(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(device)
    channels = torch.rand(2, 6, dtype=f.dtype, device=device)
    window = ([3, 2], [2, 2], [0, 0])
    winners = (make(n, 6, 4, 4).abs() * 3).to(torch.int32)
    shape = [n, 6, 9, 8]
    return {
        "divide": (x, make(n, 6, 9, 8).abs()),
        "multiply": (x, make(n, 6, 9, 8), True),
        "split": (x, make(n, 6, 9, 8), make(n, 6, 9, 8), True),
        "finish_": (make(n, 6, 9, 8), *channels, make(n, 6, 9, 8), True),
        "max_pool": (x, *window, [1, 1], False),
        "max_unpool": (r, winners.to(torch.uint8), shape, *window, [1, 1], False),
        "adaptive_max_pool": (x, [4, 4]),
        "adaptive_max_unpool": (r, winners, shape),
        "avg_pool": (r, shape, *window, False, True, None),
        "adaptive_avg_pool": (r, shape),
    }


NAMES = list(calls())


@every_device
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "layout"), DIAGONAL, ids=str)
@pytest.mark.parametrize("n", [2, 0])
def test_opcheck(device, name, dtype, layout, n):
    torch.library.opcheck(
        getattr(ops, name).default, calls(dtype, layout, device, n)[name], raise_exception=True
    )


def bad_tensors(value):
    """Wrong things to put in the place of a tensor."""
    return {
        "double": value.double(),
        "integer": value.to(torch.int64),
        "complex": value.to(torch.complex64),
        "one axis more": value[None],
        "one sample": value[:1],
        "one column": value[..., :1],
        "scalar": value.new_empty(()),
        "two batches": torch.cat([value, value]),
    }


def refused(name, arguments):
    """Whether the op refuses, in words that name it; a schema's refusal counts."""
    try:
        getattr(ops, name)(*arguments)
    except (RuntimeError, NotImplementedError) as error:
        return f"captum_rlrp::{name.rstrip('_')}" in str(error)
    except (ValueError, TypeError, IndexError):
        return True
    return False


# Tensors that look wrong in the abstract and are right for the op: (op, position, what).
RIGHT = {
    ("avg_pool", 0, "double"),
    ("adaptive_avg_pool", 0, "double"),
    ("max_pool", 0, "double"),
    ("max_pool", 0, "one sample"),
    ("max_pool", 0, "two batches"),
    ("max_unpool", 0, "double"),
    ("adaptive_max_pool", 0, "double"),
    ("adaptive_max_pool", 0, "one column"),
    ("adaptive_max_pool", 0, "one sample"),
    ("adaptive_max_pool", 0, "two batches"),
    ("adaptive_max_unpool", 0, "double"),
    ("adaptive_avg_pool", 0, "one column"),
}


@pytest.mark.parametrize("name", NAMES)
def test_bad_tensors_are_refused(name):
    good = calls()[name]
    for position, value in enumerate(good):
        if not isinstance(value, torch.Tensor):
            continue
        for what, bad in bad_tensors(value).items():
            arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in good]
            arguments[position] = bad
            expected = (name, position, what) not in RIGHT
            assert refused(name, arguments) == expected, (position, what)


@pytest.mark.parametrize("name", [n for n in NAMES if "pool" in n])
def test_bad_numbers_are_refused(name):
    good = calls()[name]
    for position, value in enumerate(good):
        if not isinstance(value, list):
            continue
        bad_lists = [[-1] * len(value), [2**62] * len(value), value[:1], [*value, 1], []]
        for bad in bad_lists:
            assert refused(name, [*good[:position], bad, *good[position + 1 :]]), (position, bad)


@pytest.mark.parametrize("seed", range(4))
def test_random_pooling_arguments_never_crash(seed):
    rng = random.Random(seed)
    numbers = [-1, 0, 1, 1, 2, 2, 3, 3, 5, 2**31, 2**62]
    for _ in range(300):
        rank = rng.choice([1, 2, 2, 3])
        x = torch.randn(2, 3, *(rng.choice([0, 1, 4, 7]) for _ in range(rank)))
        r = torch.randn(2, 3, *(rng.choice([0, 1, 2, 3, 4]) for _ in range(rank)))
        kernel, stride, padding, dilation = (
            [rng.choice(numbers) for _ in range(rank)] for _ in range(4)
        )
        window = (kernel, stride, padding, dilation, rng.random() < 0.5)
        if not refused("max_pool", (x, *window)):
            y, winners = ops.max_pool(x, *window)
            result = ops.max_unpool(y, winners, x.shape, *window)
            assert float(result.sum()) == pytest.approx(float(y.sum()), abs=1e-4)
            assert refused("max_unpool", (r, winners, x.shape, *window)) == (r.shape != y.shape)
        average = (kernel, stride, padding, rng.random() < 0.5, True, None)
        if not refused("avg_pool", (r, x.shape, *average)):
            ops.avg_pool(r, x.shape, *average)


def test_many_axes_fall_back_to_the_reference():
    x = torch.randn(2, *[1] * 8, 3)
    assert torch.equal(compiled.multiply(x, x), x * x)
    with pytest.raises(RuntimeError, match=r"captum_rlrp::multiply.*axes"):
        ops.multiply(x, x, False)


def test_an_expanded_output_is_refused():
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="expanded"):
        ops.finish_(torch.randn(2, 1).expand(2, 3), None, None, x, False)


def test_sums():
    x = torch.randn(3, 4, 5)
    torch.library.opcheck(ops.sums.default, ([x, x[0], x[0, 0, 0]],), raise_exception=True)
    assert refused("sums", ([],))
    assert refused("sums", ([x, x.to(torch.int64)],))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_require_gradients_are_taken(name):
    first, *rest = calls()[name]
    with torch.no_grad():
        getattr(ops, name)(first.requires_grad_(), *rest)


FEW = (torch.randn(2, 16, 5, 4), torch.randn(16, 3, 3, 3), [2, 3, 9, 8], [2, 2], [1, 1])


def test_opcheck_of_few_channels():
    torch.library.opcheck(ops.conv_few.default, FEW, raise_exception=True)


@pytest.mark.parametrize(
    ("position", "bad"),
    [
        (0, torch.randn(2, 16, 5, 4).double()),
        (0, torch.randn(2, 16, 5)),
        (0, torch.randn(2, 16, 6, 4)),
        (0, torch.randn(1, 16, 5, 4)),
        (0, torch.randn(2, 8, 5, 4)),
        (1, torch.randn(16, 5, 3, 3)),
        (1, torch.randn(16, 0, 3, 3)),
        (1, torch.randn(12, 3, 3, 3)),
        (1, torch.randn(16, 3, 3, 3).half()),
        (1, torch.randn(16, 3, 0, 3)),
        (2, [2, 3, 9]),
        (2, [2, 3, -9, 8]),
        (2, [2, 3, 2**62, 8]),
        *((k, bad) for k in (3, 4, 5) for bad in ([-1, -1], [2**62] * 2, [1], [1, 1, 1], [])),
        (3, [0, 0]),
        (5, [0, 0]),
    ],
)
def test_few_channels_refuse_what_does_not_fit(position, bad):
    arguments = [*FEW[:position], bad, *FEW[position + 1 :]]
    assert refused("conv_few", arguments)


IMAGE = torch.randn(2, 32, 6, 5).to(memory_format=torch.channels_last)
G, FILTERS, SCALE = torch.randn(2, 64, 4, 3), torch.randn(64, 32, 3, 3), torch.rand(64)
LINE, LINE_G = torch.randn(64, 32, 1, 3), torch.randn(2, 64, 6, 2)
CONVOLUTIONS = {
    "convolution": (IMAGE, FILTERS, SCALE, torch.randn(64), G, [1, 1], [0, 0], True),
    "convolution_divide": (G, IMAGE, FILTERS, [1, 1], [0, 0], False),
    "convolution_product": (IMAGE, G, FILTERS, IMAGE, [1, 1], [0, 0]),
}
STRIDED = {
    "convolution": (IMAGE, LINE, None, None, LINE_G, [1, 2], [0, 0], False),
    "convolution_divide": (LINE_G, IMAGE, LINE, [1, 2], [0, 0], True),
    "convolution_product": (IMAGE, LINE_G, LINE, None, [1, 2], [0, 0]),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
@pytest.mark.parametrize("calls", [CONVOLUTIONS, STRIDED], ids=["3×3", "line"])
def test_opcheck_of_convolutions(name, calls):
    arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in calls[name]]
    torch.library.opcheck(getattr(ops, name).default, arguments, raise_exception=True)


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions_refuse_what_does_not_fit(name):
    good = CONVOLUTIONS[name]
    for position, value in enumerate(good):
        if isinstance(value, list):
            bad = [[0], [0, 0, 0], [], [-1, 0], [0, 3], [2**62, 0], [2, 1]]
        elif isinstance(value, torch.Tensor):
            bad = list(bad_tensors(value).values())
            if value.dim() == 1 and len(value) == 64:
                bad = [b for b in bad if b.shape != value.shape or b.dtype != torch.float32]
        else:
            continue
        for wrong in bad:
            assert refused(name, [*good[:position], wrong, *good[position + 1 :]]), (
                position,
                wrong,
            )


def test_convolutions_refuse_images_that_do_not_fit():
    x, g, weight, *rest = CONVOLUTIONS["convolution_product"]
    for image in (x[..., :-1], x[:, :, :2]):
        assert refused("convolution_product", (image, g, weight, *rest))
    window = ([1, 1], [0, 0], False)
    assert refused("convolution", (x[:, :, :2], weight, None, None, None, *window))
    for strange in (
        weight[:, :20],
        weight[:63, :16],
        torch.randn(64, 32, 2, 65),
        torch.randn(64, 32, 65, 1),
    ):
        assert refused("convolution", (x, strange, None, None, None, *window))
    assert refused("convolution", (x[:, :20], weight[:, :16], None, None, None, *window))
    x, weight, *_ = STRIDED["convolution"]
    point = torch.randn(64, 32, 1, 1)
    for stride in ([1, 0], [-1, 1]):
        assert refused("convolution", (x, point, None, None, None, stride, [0, 0], False))
    for stride in ([2, 1], [1, 4], [1, 0], [1, -1], [1, 2**62]):
        assert refused("convolution", (x, weight, None, None, None, stride, [0, 0], False))
