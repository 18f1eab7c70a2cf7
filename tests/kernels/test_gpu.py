"""What only a GPU can get wrong: streams, devices, launches of unusual size, repeatability."""

from __future__ import annotations

import pytest
import torch

from captum_rlrp.kernels import compiled, reference

from .common import HAVE_GPU, agree, exact, rand

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAVE_GPU, reason="needs a GPU")]


def results(x, g, r):
    f = torch.rand(len(x), generator=torch.Generator().manual_seed(1)).to(x.device)
    y, winners = compiled.max_pool(x, 3, 2, 1)
    return [
        *compiled.product(x, g),
        *compiled.split(x, g, [(g, f)]),
        y,
        compiled.max_unpool(r, winners, x.shape, 3, 2, 1),
        compiled.avg_pool(r, x.shape, 3, 2, 1),
    ]


def inputs(device):
    x, g = (rand(3, 17, 31, 29, dtype=torch.float32, device=device) for _ in range(2))
    return x, g, rand(3, 17, 16, 15, dtype=torch.float32, device=device)


def test_repeats_give_the_same_bits():
    arguments = inputs("cuda")
    first = results(*arguments)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(*arguments), strict=True))


def test_another_stream():
    arguments = inputs("cuda")
    expected = results(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # what follows must wait its turn on this stream
        late = [t.clone() for t in arguments]
        actual = results(*late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    expected = results(*(t.cpu() for t in inputs("cuda:0")))
    torch.manual_seed(0)
    for actual, right in zip(results(*inputs("cuda:1")), expected, strict=True):
        assert actual.device == torch.device("cuda:1")
        agree(actual, exact(right), torch.float32, scale=4)


def test_graph_capture():
    arguments = inputs("cuda")
    expected = results(*arguments)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    f = torch.rand(3, device="cuda")
    with torch.cuda.stream(stream):
        compiled.accumulate([(arguments[0], f)])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, s = compiled.product(*arguments[:2])
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(q, expected[0])
    assert torch.equal(s, expected[1])


@pytest.mark.parametrize("shape", [(70_000, 3), (1, 20_000_001), (65_537, 1, 2, 2)], ids=str)
def test_large_grids(shape):
    x = rand(*shape, dtype=torch.float32, device="cuda")
    q, s = compiled.product(x, x)
    expected, mass = reference.product(exact(x), exact(x))
    agree(q, expected, torch.float32)
    agree(s, mass, torch.float32)


def test_operands_on_two_devices_are_refused():
    x = torch.randn(2, 3, device="cuda")
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.captum_rlrp.product(x, x.cpu(), None)
