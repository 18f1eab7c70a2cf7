"""Recorded explanations, on a tape that keeps every operation with its tensors, as a GPU would."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_rlrp import RelativeLRP
from captum_rlrp.errors import InputError
from captum_rlrp.kernels import compiled
from captum_rlrp.run import cuda_graphs
from captum_rlrp.run.cuda_graphs import CannotRecordError, CudaGraphs, CudaTape, Probe
from captum_rlrp.run.recording import Recordings
from captum_rlrp.run.task import Task

from . import small
from .small import assert_refuses, block


class FakeTape:
    """Replays the operations on the very tensors they were recorded with."""

    made = 0
    fails_with = None  # an error, once

    def __init__(self, device):
        type(self).made += 1

    def record(self, function):
        error, type(self).fails_with = self.fails_with, None
        if error is not None:
            raise error
        calls = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is torch.ops.aten._local_scalar_dense.default:
                    raise RuntimeError("a recording cannot wait for the device")
                result = func(*args, **(kwargs or {}))
                calls.append((func, args, kwargs or {}, result))
                return result

        with Recorder():
            made = function()

        def replay():
            for func, args, kwargs, result in calls:
                anew = func(*args, **kwargs)
                for place, value in zip(_tensors(result), _tensors(anew), strict=True):
                    if place.data_ptr() != value.data_ptr():  # no view, nothing in place
                        place.copy_(value)

        return made, replay


def _tensors(value):
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


@pytest.fixture
def model():
    return block().double()


def recorded(model, **options):
    """Relative LRP that records on the tape although there is no GPU."""
    method = RelativeLRP(model, **options)
    FakeTape.made, FakeTape.fails_with = 0, None
    method._engine.recordings = {"cpu": Recordings(CudaGraphs(FakeTape, capacity=2))}
    return method


def images(batch=2, seed=1):
    return small.images(seed, batch, torch.float64)


def agree(method, model, x, target, **options):
    expected = RelativeLRP(model, method.backend).attribute(x, target=target, **options)
    actual = method.attribute(x, target=target, **options)
    for a, e in zip(_tensors(actual), _tensors(expected), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_replays_other_inputs_and_targets(model, backend):
    method = recorded(model, backend=backend)
    for seed in range(5):
        agree(method, model, images(seed=seed), [seed % 5, (2 * seed) % 5])
    assert FakeTape.made == 1  # at the second call


def test_results_stay_what_they_were(model):
    method = recorded(model)
    results = [method.attribute(images(seed=seed), target=1) for seed in range(4)]
    again = [method.attribute(images(seed=seed), target=1) for seed in range(4)]
    for first, second in zip(results, again, strict=True):
        torch.testing.assert_close(first, second)


def test_a_change_of_the_weights_shows(model):
    method = recorded(model)
    for _ in range(3):
        agree(method, model, images(), 1)
    with torch.no_grad():
        model.inner.weight.mul_(-2)
        model.before[1].running_mean.add_(0.5)
    agree(method, model, images(), 1)
    assert FakeTape.made == 1
    model.inner.weight.data = torch.randn_like(model.inner.weight)  # other memory
    for _ in range(3):
        agree(method, model, images(), 1)
    assert FakeTape.made == 2


def test_every_signature_has_its_own_and_few_are_kept(model):
    method = recorded(model)
    for batch in (1, 2, 3, 1, 2, 3, 1, 2, 3):
        agree(method, model, images(batch), 0)
    assert len(method._engine.recordings["cpu"]) == 2
    agree(method, model, images(2), 0, return_convergence_delta=True)
    agree(method, model, images(2), 0, return_convergence_delta=True)


def test_a_target_that_depends_on_the_output(model):
    method = recorded(model)
    for seed in range(4):
        x = images(3, seed)
        agree(method, model, x, model(x).argmax(1))


def test_further_arguments_are_read_anew(model):
    method = recorded(model)
    for scale in (1.0, 2.0, -3.0, 0.5):
        weight = torch.full((2, 8, 4, 4), scale, dtype=torch.float64)
        weight[:, :4] = 1
        actual = method.attribute(images(), target=2, additional_forward_args=(weight,))
        expected = RelativeLRP(model).attribute(
            images(), target=2, additional_forward_args=(weight,)
        )
        torch.testing.assert_close(actual, expected)


def test_what_cannot_be_recorded_runs_as_ever(monkeypatch):
    law = compiled.conv_relevance

    def reads(x, weight, r, *rest, **options):
        assert r.sum().item() <= 1  # on the host
        return law(x, weight, r, *rest, **options)

    monkeypatch.setattr(compiled, "conv_relevance", reads)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).eval()
    method = recorded(model, backend="auto")
    expected = RelativeLRP(model).attribute(images().float(), target=1)
    for _ in range(3):
        torch.testing.assert_close(method.attribute(images().float(), target=1), expected)
    assert FakeTape.made == 0  # it was noticed before


def test_a_recording_that_fails_is_not_tried_again(model):
    method = recorded(model)
    for _ in range(4):
        FakeTape.fails_with = CannotRecordError("of a sort that no probe notices")
        agree(method, model, images(), 1)
    assert FakeTape.made == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), InputError("ours")], ids=str)
def test_other_errors_are_not_hidden(model, error):
    method = recorded(model)
    method.attribute(images(), target=1)
    FakeTape.fails_with = error
    with pytest.raises(type(error)):
        method.attribute(images(), target=1)
    for _ in range(3):
        agree(method, model, images(), 1)
    assert FakeTape.made == 2  # by the next call


def test_errors_are_those_without(model):
    method = recorded(model)
    for _ in range(2):
        method.attribute(images(), target=1)
    assert_refuses(method, images())
    agree(method, model, images(), 1)


def test_threads(model):
    method = recorded(model)
    wrong = []

    def explain(seed):
        x = images(seed=seed)
        expected = RelativeLRP(model).attribute(x, target=seed % 5)
        for _ in range(5):
            if not torch.allclose(method.attribute(x, target=seed % 5), expected):
                wrong.append(seed)

    threads = [threading.Thread(target=explain, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_target_may_explain_too_and_wait_for_others_that_do(model):
    method = recorded(model)
    found = []

    def other():
        found.append(method.attribute(images(seed=3), target=1))

    def target(output):
        other()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
        return [0, 2]

    for _ in range(3):
        agree(method, model, images(), target)
    expected = RelativeLRP(model).attribute(images(seed=3), target=1)
    assert len(found) == 12
    for each in found:
        torch.testing.assert_close(each, expected)


def test_a_target_that_fails_leaves_the_recording_to_others(model):
    method = recorded(model)

    def fails(output):
        raise KeyError("the user's")

    for _ in range(4):
        with pytest.raises(KeyError, match="the user's"):
            method.attribute(images(), target=fails)
    assert FakeTape.made == 0
    for _ in range(3):
        agree(method, model, images(), 1)
        with pytest.raises(KeyError, match="the user's"):
            method.attribute(images(), target=fails)
    assert FakeTape.made == 1


def test_what_a_target_keeps_of_the_output_stays(model):
    method = recorded(model)
    kept = []
    for seed in range(4):
        method.attribute(images(seed=seed), target=lambda output: kept.append(output) or 0)
    for seed, output in enumerate(kept):
        torch.testing.assert_close(output, model(images(seed=seed)))


def test_settings_have_recordings_of_their_own(model):
    method = recorded(model)
    for tf32 in (True, False):
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, tf32
        try:
            for _ in range(3):
                agree(method, model, images(), 1)
        finally:
            torch.backends.cudnn.allow_tf32 = before
    with torch.inference_mode():
        for _ in range(3):
            agree(method, model, images(), 1)
    assert FakeTape.made == 3
    agree(method, model, images(), 1)


def test_only_tasks_of_one_device_are_recorded():
    here, there = torch.ones(2), torch.ones(2, device="meta")

    def device(*values):
        return Task(None, dict(enumerate(values)), [], None, 2, False).device

    assert device(here, here, 3) == here.device
    assert device(here, there) is None


@pytest.mark.parametrize(
    ("function", "is_noticed"),
    [
        (lambda x: x.relu() * 2 + torch.ones(3), False),
        (lambda x: x[torch.tensor([0, 1])], False),
        (lambda x: x.index_select(0, torch.tensor([1])), False),
        (lambda x: x[x > 0], True),
        (lambda x: x.index_put((x > 0,), torch.zeros(()))[0], True),
        (lambda x: x.masked_fill(x > 0, 0.0), False),
        (lambda x: x * x.sum().item(), True),
        (lambda x: x if x.any() else -x, True),
        (lambda x: x.nonzero(), True),
        (lambda x: torch.unique(x), True),
        (lambda x: x.to("meta"), True),
    ],
)
def test_probe(function, is_noticed):
    x = torch.randn(3, 3)
    probe = Probe(x.device)
    with probe:
        function(x)
    assert (probe.obstacle is not None) == is_noticed


# ---- CUDA graphs, on a stand-in for torch.cuda ---------------------------------------------------


class FakeCuda:
    """Streams, and captures that end as torch's do: its stream stays if a broken one ends."""

    def __init__(self):
        self.index, self.streams = 0, {0: "default 0", 1: "default 1"}
        self.broken = self.capturing = False

    @contextlib.contextmanager
    def device(self, device):
        before, self.index = self.index, device.index
        try:
            yield
        finally:
            self.index = before

    def Stream(self, device):
        return f"own {device.index}"

    def current_stream(self):
        return self.streams[self.index]

    def set_stream(self, stream):
        self.streams[int(stream[-1])] = stream

    def graph_pool_handle(self):
        return (0, 1)

    def CUDAGraph(self):
        return FakeGraph(self)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        assert not self.capturing
        before = self.current_stream()
        self.set_stream(stream)
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            if self.broken:
                self.broken = False
                raise RuntimeError("operation failed due to a previous error during capture")
            self.set_stream(before)


class FakeGraph:
    def __init__(self, owner):
        self.owner, self.replayed = owner, []

    def replay(self):
        self.replayed.append(self.owner.current_stream())


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(cuda_graphs, "cuda", fake)
    monkeypatch.setattr(cuda_graphs, "_BROKEN", [])
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda index, pool: None)
    cuda_graphs._stream.cache_clear()
    yield fake
    cuda_graphs._stream.cache_clear()


def tape(index=1):
    return CudaTape(torch.device("cuda", index))


def test_every_device_is_captured_on_a_stream_of_its_own(cuda):
    for index in (0, 1, 0):
        seen, replay = tape(index).record(lambda: (cuda.index, cuda.current_stream()))
        assert seen == (index, f"own {index}")
        assert (cuda.index, cuda.streams) == (0, {0: "default 0", 1: "default 1"})
        replay()
        assert cuda.index == 0


def capture_breaks(cuda, error):
    def function():
        cuda.broken = True
        if error is not None:
            raise error

    return function


REFUSED = RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("error", [REFUSED, RuntimeError("CUDNN_STATUS_INTERNAL_ERROR"), None])
@pytest.mark.parametrize("stream", ["default 1", "user's 1"])
def test_a_broken_capture_leaves_nothing_behind(cuda, error, stream):
    cuda.streams[1] = stream
    with pytest.raises(CannotRecordError):
        tape().record(capture_breaks(cuda, error))
    assert (cuda.index, cuda.streams) == (0, {0: "default 0", 1: stream})
    assert len(cuda_graphs._BROKEN) == 2  # with the one that sets the random generators right
    assert tape().record(lambda: 5)[0] == 5


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), InputError("ours")], ids=str)
def test_errors_of_the_function_are_its_own(cuda, error):
    def fails():
        raise error

    for function in (capture_breaks(cuda, error), fails):
        with pytest.raises(type(error)) as raised:
            tape().record(function)
        assert raised.value is error
        assert cuda.streams == {0: "default 0", 1: "default 1"}
    assert tape().record(lambda: 5)[0] == 5


def test_what_is_refused_in_a_capture_without_breaking_it(cuda):
    def refused():
        raise REFUSED

    with pytest.raises(CannotRecordError):
        tape().record(refused)
    with pytest.raises(RuntimeError, match="a check of ours"):
        tape().record(lambda: torch._check(False, lambda: "a check of ours"))
    assert not cuda_graphs._BROKEN
