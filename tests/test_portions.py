"""Large batches on a CPU are divided, but only where no sample sees another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from captum_rlrp import LayerRelativeLRP, RelativeLRP
from captum_rlrp.errors import CaptureError
from captum_rlrp.plan.portions import divide, find_portion
from captum_rlrp.run import capturing
from captum_rlrp.run.engine import Engine
from tests.oracle import randomise_norms, relative_error
from tests.random_graphs import random_graph
from tests.test_torchvision import convnext, densenet, swin, vit

pytestmark = pytest.mark.usefixtures("one_thread")


class Of(nn.Module):
    """A layer, a function, a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.function(self.first(x).relu()))
        return y


# What a sample gives depends on the others here, on their number or on its place among them.
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax over the batch": lambda x: x.softmax(0),
    "less the batch's mean": lambda x: x - x.mean(0, keepdim=True),
    "kept where above the batch's mean": lambda x: x.masked_fill(x < x.mean(0), 0.0),
    "a gate of the batch's mean": lambda x: x * x.mean(0, keepdim=True).sigmoid(),
    "in reverse": lambda x: x.flip(0),
    "rolled": lambda x: x.roll(1, 0),
    "rolled as one": lambda x: x.roll(1),
    "the sums so far": lambda x: x.cumsum(0),
    "a triangle": lambda x: x.tril(),
    "divided by their number": lambda x: x / x.shape[0],
    "with its number": lambda x: x + torch.arange(x.shape[0])[:, None],
    "sorted": lambda x: x.sort(0).values,
    "picked": lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)],
    "their products": lambda x: (x @ x.t()).softmax(1) @ x,
    "by einsum": lambda x: torch.einsum("bd,cd->b", x, x)[:, None] * x,
    "attention among samples": lambda x: F.scaled_dot_product_attention(
        x[None], x[None], x[None]
    ).squeeze(0),
    "groups across samples": lambda x: F.group_norm(x.t()[None], 1)[0].t(),
    "a window over samples": lambda x: F.avg_pool1d(x.t()[None], 3, 1, 1)[0].t(),
    "largest of a window over samples": lambda x: F.max_pool1d(x.t()[None], 3, 1, 1)[0].t(),
    "halves in two orders": lambda x: (
        torch.stack([x, 2 * x]).flatten(0, 1) + torch.stack([x, 3 * x], 1).flatten(0, 1)
    ).view(x.shape[0], 2, 6)[:, 0],
}


def portion_of(model: nn.Module, x: Tensor) -> int | None:
    try:
        return RelativeLRP(model)._engine.captured((x,), 1, len(x)).portion
    except CaptureError:  # refused altogether
        return None


@pytest.mark.parametrize("name", MIXING)
def test_a_mixing_model_is_not_divided(name: str) -> None:
    torch.manual_seed(0)
    model, x = Of(MIXING[name]).eval(), torch.randn(8, 6)
    whole, parts = model(x), torch.cat([model(part) for part in x.split(2)])
    assert not torch.allclose(whole, parts), "it does not mix: the test is no test"
    assert portion_of(model, x) is None


def sizes_of_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Portions of two, and how many samples each run has."""
    monkeypatch.setattr(capturing, "find_portion", lambda *_: find_portion(*_) and 2)
    sizes, run = [], Engine._run

    def noted(
        engine: Engine, captured: Any, parameters: Any, args: Any, rows: slice, *_: Any
    ) -> Any:
        sizes.append(rows.stop - rows.start)
        return run(engine, captured, parameters, args, rows, *_)

    monkeypatch.setattr(Engine, "_run", noted)
    return sizes


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (lambda: models.resnet18(weights=None, num_classes=7), (3, 32, 32)),
    "densenet": (densenet, (3, 32, 32)),
    "shufflenet": (lambda: models.shufflenet_v2_x0_5(weights=None, num_classes=7), (3, 32, 32)),
    "efficientnet": (lambda: models.efficientnet_b0(weights=None, num_classes=7), (3, 32, 32)),
    "convnext": (convnext, (3, 32, 32)),
    "vision transformer": (vit, (3, 32, 32)),
    "swin": (swin, (3, 32, 32)),
    "signal": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(56, 7)),
        (2, 16),
    ),
    "encoder": (
        lambda: nn.Sequential(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
            nn.Flatten(),
            nn.Linear(40, 7),
        ),
        (5, 8),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_portions_change_no_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    make, shape = MODELS[name]
    model, x = randomise_norms(make()).double().eval(), torch.randn(5, *shape).double()
    targets = torch.arange(5)
    sizes = sizes_of_runs(monkeypatch)
    rlrp = RelativeLRP(model)
    parts, delta = rlrp.attribute(x, targets, return_convergence_delta=True)
    assert sizes == [2, 2, 1]
    whole = rlrp.attribute(x, targets, internal_batch_size=5)
    reference = RelativeLRP(model, backend="reference").attribute(x, targets)
    assert sizes == [2, 2, 1, 5, 5]
    for other in (whole, reference):
        assert relative_error(parts, other) < 1e-9
    assert delta.shape == (5,)


def test_random_graphs_keep_samples_apart_where_they_are_divided() -> None:
    divided = 0
    for seed in range(60):
        graph = random_graph(seed)
        x = torch.cat([graph.inputs, graph.inputs.flip(0)])
        if portion_of(graph.model, x) is None:
            continue
        divided += 1
        whole = graph.model(x)
        alone = torch.cat([graph.model(x[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(whole, alone, rtol=1e-9, atol=1e-9)
    assert divided > 20


def test_layers_of_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    model, x = models.resnet18(weights=None, num_classes=7).eval(), torch.randn(5, 3, 32, 32)
    layers = [model.layer1, model.fc]
    whole = LayerRelativeLRP(model, layers).attribute(x, 3)
    sizes = sizes_of_runs(monkeypatch)
    parts = LayerRelativeLRP(model, layers).attribute(x, 3)
    assert sizes == [2, 2, 1]
    for a, b in zip(parts, whole, strict=True):
        assert relative_error(a, b) < 1e-3


class Shifted(nn.Module):
    """Adds an argument to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y: Tensor = self.last((self.first(x) + shift).relu())
        return y


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 6), [2, 2, 1]), ((1, 6), [2, 2, 1]), ((), [2, 2, 1])]
)
def test_an_argument_that_may_belong_to_the_samples(
    shape: tuple[int, ...], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    model, x, shift = Shifted().eval(), torch.randn(5, 6), torch.randn(shape)
    sizes = sizes_of_runs(monkeypatch)
    parts = RelativeLRP(model).attribute(x, 1, additional_forward_args=shift)
    assert sizes == expected
    alone = RelativeLRP(model, backend="reference")
    for i in range(5):
        some = shift[i : i + 1] if shape == (5, 6) else shift
        one = alone.attribute(x[i : i + 1], 1, additional_forward_args=some)
        torch.testing.assert_close(parts[i : i + 1], one, rtol=1e-4, atol=1e-6)


def test_one_that_was_captured_with_another_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that happens to have as many rows as there are samples."""
    model, table = Of(lambda x: x).eval(), torch.randn(8, 6)
    sizes = sizes_of_runs(monkeypatch)

    class Distances(nn.Module):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:
            y: Tensor = model(x) @ rows.t()[:3]
            return y

    distances = Distances().eval()
    rlrp, x = RelativeLRP(distances), torch.randn(8, 6)
    ten = rlrp.attribute(torch.cat([x, x[:2]]), 7, additional_forward_args=table)
    eight = rlrp.attribute(x, 7, additional_forward_args=table)
    assert sizes == [2] * 9
    torch.testing.assert_close(eight, ten[:8])


@pytest.mark.parametrize(
    ("batch", "portion", "size"), [(8, 5, 4), (32, 5, 5), (5, 5, 5), (1, 4, 1), (9, 4, 3)]
)
def test_portions_are_of_about_the_same_size(batch: int, portion: int, size: int) -> None:
    assert divide(batch, portion) == size


def test_how_many_samples() -> None:
    x = torch.randn(8, 1, 256, 256)
    image = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten())
    # The largest value has 2 MiB for each sample.
    assert portion_of(nn.Sequential(image, nn.Linear(8 * 256 * 256, 1, bias=False)).eval(), x) == 16
    assert portion_of(nn.Conv2d(1, 128, 3, padding=1).eval(), x) == 4  # 32 MiB
    # 76 KiB for each sample, the largest value 64, and 208 MiB of weights.
    wide = nn.Sequential(nn.Linear(256, 16384, bias=False), nn.Linear(16384, 3072, bias=False))
    row = torch.randn(8, 256)
    weights = 4 * (256 * 16384 + 16384 * 3072)
    assert portion_of(wide.eval(), row) == weights // (4 * (16384 + 3072))
    assert portion_of(Of(torch.relu).eval(), torch.randn(8, 6)) == 2**25 // 24


class Branching(nn.Module):
    """Takes another way for few samples, as a forward may."""

    def __init__(self, asks: Callable[[int], bool]) -> None:
        super().__init__()
        self.asks = asks
        self.many, self.few = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.many(x) if self.asks(x.shape[0]) else self.few(x)
        return y


@pytest.mark.parametrize("asks", [lambda n: n > 4, lambda n: n % 2 == 0], ids=["many", "even"])
@pytest.mark.parametrize("order", [(8, 3, 6, 1), (1, 6, 8, 3), (3, 8, 1, 6)])
def test_a_forward_that_asks_how_many(
    asks: Callable[[int], bool], order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    model = Branching(asks).eval()
    rlrp = RelativeLRP(model)
    captures = []
    capture = rlrp._engine._capture
    monkeypatch.setattr(rlrp._engine, "_capture", lambda *a: captures.append(a) or capture(*a))
    counts = []
    for batch in order * 2:
        x = torch.randn(batch, 6)
        taken = model.many if asks(batch) else model.few
        expected = RelativeLRP(taken).attribute(x, 1)
        torch.testing.assert_close(rlrp.attribute(x, 1), expected)
        counts.append(len(captures))
    assert counts[-1] == counts[len(order) - 1], "captured again for the same number"
    x = torch.randn(9, 6)
    parts = rlrp.attribute(x, 1, internal_batch_size=6)
    first, last = (model.many if asks(n) else model.few for n in (6, 3))
    torch.testing.assert_close(parts[:6], RelativeLRP(first).attribute(x[:6], 1))
    torch.testing.assert_close(parts[6:], RelativeLRP(last).attribute(x[6:], 1))
    assert rlrp._engine.captured((x,), 1, 9).portion is None
