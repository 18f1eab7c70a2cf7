"""Explanations that are done again without the rules, as every explanation from the third on."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_iter
from torchvision import models

from captum_rlrp import LayerRelativeLRP, RelativeLRP
from captum_rlrp.kernels import compiled
from captum_rlrp.run import trace
from captum_rlrp.run.recording import Recordings
from captum_rlrp.run.task import Task

from .oracle import relative_error
from .small import assert_refuses, block, images, mlp, of, rows

SAME = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture
def model() -> nn.Module:
    return block()


def traces(rlrp: Any) -> Recordings:
    found: Recordings = rlrp._engine.recordings["cpu"]
    return found


def again(rlrp: RelativeLRP, *args: Any, **options: Any) -> None:
    """The same as of an explainer that has met nothing yet."""
    expected = RelativeLRP(rlrp.model).attribute(*args, **options)
    found = rlrp.attribute(*args, **options)
    for a, b in zip(tree_iter(found), tree_iter(expected), strict=True):
        torch.testing.assert_close(a, b, **SAME)


def assert_traces(model: nn.Module, count: int) -> None:
    """Pictures one after another are explained rightly, and that many traces made."""
    rlrp = RelativeLRP(model)
    for seed in range(5):
        again(rlrp, images(seed), target=1)
    assert len(traces(rlrp)) == count


Law = Callable[..., Any]


@pytest.fixture
def law_becomes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Law], Law]], None]:
    """Puts something around the law of convolutions."""
    return lambda around: monkeypatch.setattr(
        compiled, "conv_relevance", around(compiled.conv_relevance)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("delta", [False, True])
def test_other_inputs_and_targets(model: nn.Module, dtype: torch.dtype, delta: bool) -> None:
    rlrp = RelativeLRP(model.to(dtype))
    for seed in range(5):
        x = images(seed).to(dtype)
        again(rlrp, x, target=[seed % 5, 2 * seed % 5], return_convergence_delta=delta)
    assert len(traces(rlrp)) == 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_torchvision(name: str) -> None:
    torch.manual_seed(0)
    options = {"image_size": 64} if name == "vit_b_16" else {}
    rlrp = RelativeLRP(models.get_model(name, **options).eval())
    for seed in range(3):
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        again(rlrp, x, target=seed)
    assert len(traces(rlrp)) == 1


def test_layers(model: nn.Module) -> None:
    layers = LayerRelativeLRP(model, [model.inner, model.after])
    for seed in range(4):
        expected = LayerRelativeLRP(model, [model.inner, model.after]).attribute(images(seed), 1)
        torch.testing.assert_close(layers.attribute(images(seed), 1), expected, **SAME)
    assert len(traces(layers)) == 1


def test_the_rules_are_not_asked(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    rlrp = RelativeLRP(model)
    for _ in range(2):
        rlrp.attribute(images(), target=1)
    monkeypatch.setattr(Task, "forward", None)
    rlrp.attribute(images(), target=1)


def test_the_reference_is_always_asked(model: nn.Module) -> None:
    assert not RelativeLRP(model, backend="reference")._engine.recordings


def test_changes_of_the_model_show(model: nn.Module) -> None:
    rlrp = RelativeLRP(model)
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: model.inner.weight.data.mul_(-2),
        lambda: model.before[1].running_mean.add_(0.5),
        lambda: setattr(model.inner.weight, "data", torch.randn(8, 8, 3, 3)),
        lambda: model.to(memory_format=torch.channels_last),
        lambda: setattr(model, "inner", nn.Conv2d(8, 8, 1)),
    ]
    for change in changes:
        change()
        for seed in range(3):
            again(rlrp, images(seed), target=1)


def test_strides_and_sizes_have_traces_of_their_own(model: nn.Module) -> None:
    rlrp = RelativeLRP(model)
    for _ in range(3):
        for batch in (1, 2, 3):
            again(rlrp, images(batch=batch), target=0)
        again(rlrp, images().contiguous(memory_format=torch.channels_last), target=0)
        again(rlrp, images().transpose(2, 3), target=0)
    assert len(traces(rlrp)) == 5


def test_settings_have_traces_of_their_own(model: nn.Module) -> None:
    rlrp = RelativeLRP(model)
    for _ in range(3):
        again(rlrp, images(), target=1)
        with torch.inference_mode():
            again(rlrp, images(), target=1)
        with torch.backends.mkldnn.flags(enabled=False):
            again(rlrp, images(), target=1)
    assert len(traces(rlrp)) == 3


def test_one_tensor_as_two_inputs() -> None:
    rlrp = RelativeLRP(of(lambda self, x, y: self.a(x) + self.b(y), a=mlp(), b=nn.Linear(4, 3)))
    x, y = rows(), rows() + 1
    for inputs in ((x, x), (x, x), (x, y), (y, x)):
        again(rlrp, inputs, target=1)
    assert len(traces(rlrp)) == 1


def test_further_arguments(model: nn.Module) -> None:
    rlrp = RelativeLRP(model)
    for scale in (1.0, 2.0, -3.0, 0.5):
        weight = torch.full((2, 8, 4, 4), scale)
        again(rlrp, images(), target=2, additional_forward_args=(weight,))


def test_targets_that_depend_on_the_output_and_fail(model: nn.Module) -> None:
    rlrp = RelativeLRP(model)

    def fails(output: Tensor) -> Any:
        raise KeyError("the user's")

    for seed in range(4):
        again(rlrp, images(seed), target=lambda output: output.argmax(1))
        with pytest.raises(KeyError, match="the user's"):
            rlrp.attribute(images(seed), target=fails)


def test_errors_are_those_of_the_first_time(model: nn.Module) -> None:
    rlrp = RelativeLRP(model)
    for _ in range(3):
        rlrp.attribute(images(), target=1)
    assert_refuses(rlrp, images())
    again(rlrp, images() * 1e-30, target=1)  # which float32 cannot hold


@pytest.mark.parametrize("reads", ["a value", "a mask", "an array", "a list"])
def test_what_goes_by_values_is_not_traced(reads: str, model: nn.Module, law_becomes: Any) -> None:
    def reading(law: Law, x: Tensor, weight: Tensor, r: Tensor, *rest: Any, **options: Any) -> Any:
        if reads == "a value":
            assert float(r.sum()) < 2
        elif reads == "a mask":
            assert x[x > 0].dim() == 1
        elif reads == "an array":
            assert r.numpy().sum() < 2
        else:
            assert len(r.tolist()) == 2
        return law(x, weight, r, *rest, **options)

    law_becomes(lambda law: partial(reading, law))
    assert_traces(model, 0)


def test_numbers_that_a_rule_makes_a_tensor_of(model: nn.Module, law_becomes: Any) -> None:
    def scaled(law: Law, x: Tensor, weight: Tensor, r: Tensor, *rest: Any, **options: Any) -> Any:
        r = r.clone()
        r[:, 0] = 0
        return law(x, weight, r * torch.tensor(0.5).mul_(2), *rest, **options)

    law_becomes(lambda law: partial(scaled, law))
    assert_traces(model, 1)


def test_too_many_operations_are_not_traced(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "_LONGEST", 5)
    assert_traces(model, 0)


def test_an_operation_that_runs_in_no_mode(model: nn.Module, law_becomes: Any) -> None:
    """As those of torch.ops.higher_order."""

    def refusing(law: Law, *args: Any, **options: Any) -> Any:
        if _get_current_dispatch_mode() is not None:
            raise NotImplementedError("no rule for this mode")
        return law(*args, **options)

    law_becomes(lambda law: partial(refusing, law))
    assert_traces(model, 0)


class Memory(TorchDispatchMode):
    """How many bytes there are at most of what operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._met: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self._met and storage.nbytes():
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        self._met.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self._met.discard(place)
        self.now -= size


def test_values_are_freed_as_they_were() -> None:
    torch.manual_seed(0)
    rlrp = RelativeLRP(models.resnet18().eval())
    x = torch.randn(2, 3, 64, 64)
    rlrp.attribute(x, target=1)
    found = []
    for _ in range(3):  # as ever, while it is traced, and from the trace
        gc.collect()
        with Memory() as memory:
            rlrp.attribute(x, target=1)
        found.append(memory.most)
    assert len(traces(rlrp)) == 1
    assert max(found) <= 1.02 * found[0], found


def test_threads(model: nn.Module) -> None:
    rlrp = RelativeLRP(model)
    rlrp.attribute(images(), target=1)
    expected = [RelativeLRP(model).attribute(images(seed), target=seed) for seed in range(4)]
    wrong: list[float] = []

    def explain(seed: int) -> None:
        for _ in range(6):
            error = relative_error(rlrp.attribute(images(seed), target=seed), expected[seed])
            if error > 1e-5:  # products are divided among threads otherwise
                wrong.append(error)

    threads = [threading.Thread(target=explain, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(traces(rlrp)) == 1
