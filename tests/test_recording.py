"""Recorded explanations, on a tape that keeps every operation with its tensors, as a GPU would."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_rlrp import RelativeLRP
from captum_rlrp.errors import NonFiniteError
from captum_rlrp.run.recording import Recordings


class FakeTape:
    """Replays the operations on the very tensors they were recorded with."""

    made = 0

    def __init__(self, device):
        type(self).made += 1

    def record(self, function):
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


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.after = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x, weight=None):
        x = self.before(x)
        x = self.pool(torch.relu(x + self.inner(x)))
        if weight is not None:
            x = x * weight
        return self.after(x.flatten(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block().double().eval()


def recorded(model, **options):
    """Relative LRP that records although there is no GPU."""
    method = RelativeLRP(model, **options)
    FakeTape.made = 0
    method._engine.recordings = Recordings(FakeTape, "cpu", capacity=2)
    return method


def images(batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)


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
    assert len(method._engine.recordings._kept) == 2
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


def test_what_cannot_be_recorded_runs_as_ever():
    torch.manual_seed(0)
    # In float32 oneDNN's convolutions ask for a bound on the host.
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).eval()
    method = recorded(model, backend="auto")
    expected = RelativeLRP(model).attribute(images().float(), target=1)
    for _ in range(3):
        torch.testing.assert_close(method.attribute(images().float(), target=1), expected)


def test_errors_are_those_without(model):
    method = recorded(model)
    for _ in range(2):
        method.attribute(images(), target=1)
    bad = images()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="Input 0 contains NaN"):
        method.attribute(bad, target=1)
    with pytest.raises(ValueError, match="target 7 does not fit"):
        method.attribute(images(), target=7)
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


def test_nothing_is_recorded_on_a_cpu(model):
    method = RelativeLRP(model, cuda_graphs=True)
    expected = RelativeLRP(model).attribute(images(), target=1)
    for _ in range(3):
        torch.testing.assert_close(method.attribute(images(), target=1), expected)
    assert not method._engine.recordings._kept
