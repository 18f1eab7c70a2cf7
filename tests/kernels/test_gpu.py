"""What only a GPU can get wrong: streams, devices, launches of unusual size, repeatability.

The ops, all that have a CUDA kernel, are those of ``test_ops.py``.
"""

from __future__ import annotations

import functools

import pytest
import torch

from captum_rlrp.errors import InputError
from captum_rlrp.kernels import compiled, reference
from captum_rlrp.run.cuda_graphs import CannotRecordError, CudaTape

from .common import HAVE_GPU, agree, exact, rand
from .test_ops import NAMES, calls

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAVE_GPU, reason="needs a GPU")]
GPU = "cuda"


def tensors(values):
    return [v for v in values if isinstance(v, torch.Tensor)]


def arguments(device=GPU):
    """Every op with its arguments, the same values each time."""
    torch.manual_seed(0)
    return {
        name: [a.to(device) if isinstance(a, torch.Tensor) else a for a in given]
        for name, given in calls().items()
    }


def outcomes(given):
    """What the ops return and what they write over, by name; the arguments stay as they are."""
    results = {}
    for name, values in given.items():
        copies = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
        returned = getattr(torch.ops.captum_rlrp, name)(*copies)
        results[name] = tensors([returned] if isinstance(returned, torch.Tensor) else returned)
        results[name] += tensors(copies)
    return results


def assert_equal(actual, expected):
    for name, values in expected.items():
        pairs = zip(actual[name], values, strict=True)
        assert all(torch.equal(a, e) for a, e in pairs), name


def test_repeats_give_the_same_bits():
    given = arguments()
    first = outcomes(given)
    for _ in range(5):
        assert_equal(outcomes(given), first)


def test_another_stream():
    given = arguments()
    expected = outcomes(given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows must wait its turn on this stream
        late = {
            name: [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
            for name, values in given.items()
        }
        actual = outcomes(late)
    stream.synchronize()
    assert_equal(actual, expected)


def test_the_cpu_computes_the_same():
    expected = outcomes(arguments("cpu"))
    for name, values in outcomes(arguments()).items():
        for actual, right in zip(values, expected[name], strict=True):
            agree(actual, exact(right), torch.float32, scale=4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    expected = outcomes(arguments("cpu"))
    for name, values in outcomes(arguments("cuda:1")).items():
        for actual, right in zip(values, expected[name], strict=True):
            assert actual.device == torch.device("cuda:1")
            agree(actual, exact(right), torch.float32, scale=4)


@pytest.mark.parametrize("index", range(max(torch.cuda.device_count(), 1)))
def test_graph_capture(index):
    device = torch.device("cuda", index)
    given = arguments(device)
    expected = outcomes(given)  # which warms up
    actual, replay = CudaTape(device).record(lambda: outcomes(given))
    for _ in range(2):
        for values in actual.values():
            for value in values:
                value.zero_()
        replay()
        torch.cuda.synchronize(device)
        assert_equal(actual, expected)


def ours():
    raise InputError("ours")


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda: torch.randn(2, device="cuda").sum().item(), CannotRecordError),
        (lambda: torch.cuda.synchronize(), CannotRecordError),
        (lambda: torch.empty(2**45, device="cuda"), torch.OutOfMemoryError),
        (ours, InputError),
    ],
    ids=["reads", "waits", "out of memory", "ours"],
)
def test_a_failed_capture_leaves_nothing_behind(function, error):
    stream = torch.cuda.current_stream()
    tape = CudaTape(torch.device("cuda", torch.cuda.current_device()))
    with pytest.raises(error):
        tape.record(function)
    assert torch.cuda.current_stream() == stream
    assert not torch.cuda.is_current_stream_capturing()
    x = torch.randn(1000, device="cuda")  # by a generator that is not captured any more
    y, replay = tape.record(functools.partial(torch.mul, x, 2))
    replay()
    assert torch.equal(y, x * 2)
    del x, y, replay
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("shape", [(70_000, 3), (1, 20_000_001), (65_537, 1, 2, 2)], ids=str)
def test_large_grids(shape):
    x = rand(*shape, dtype=torch.float32, device=GPU)
    d = x.abs() + 1
    agree(compiled.multiply(x, d), reference.multiply(exact(x), exact(d)), torch.float32)
    s, seen = compiled.divide(x, d)
    expected, largest = reference.divide(exact(x), exact(d))
    agree(s, expected, torch.float32)
    agree(seen, largest, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_operands_on_two_devices_are_refused(name):
    given = arguments()[name]
    for i, value in enumerate(given):
        if isinstance(value, torch.Tensor) and len(tensors(given)) > 1:
            moved = [*given[:i], value.cpu(), *given[i + 1 :]]
            with pytest.raises(RuntimeError, match=r"device|backend"):
                getattr(torch.ops.captum_rlrp, name)(*moved)
