"""Sizes that change from call to call: one capture serves them, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import LayerRelativeLRP, RelativeLRP
from captum_rlrp.graph import capture

from .small import agree, explained, of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models exported since."""
    made: list[Any] = []
    export = capture.export
    monkeypatch.setattr(capture, "export", lambda *args: made.append(args[0]) or export(*args))
    return made


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(2, 3, *size) for size in sizes]


def sequences(*lengths: int) -> list[Tensor]:
    return [torch.randn(2, length, 4) for length in lengths]


def mixed(s: Any, x: Tensor) -> Tensor:
    y = F.interpolate(F.max_pool2d(s.c(x).relu(), 2, ceil_mode=True), x.shape[2:])
    y = F.adaptive_avg_pool2d(torch.cat([x, y], 1), (2, 3))
    return s.h(y.flatten(1))


def turning(s: Any, x: Tensor) -> Tensor:
    y = s.c(x)
    return s.h((y if x.shape[2] > 18 else y.relu()).mean((2, 3)))


def counting(s: Any, x: Tensor) -> Tensor:
    return s.h(F.avg_pool2d(s.c(x).relu(), int(x.shape[2]) - 2).flatten(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "pictures": (
        lambda: of(mixed, c=nn.Conv2d(3, 4, 3, padding=1), h=nn.Linear(42, 3)),
        images((16, 16), (20, 16), (21, 33), (9, 40)),
    ),
    "another way by size": (
        lambda: of(turning, c=nn.Conv2d(3, 4, 3), h=nn.Linear(4, 3)),
        images((16, 16), (17, 16), (20, 20), (22, 20), (17, 18)),
    ),
    "a size as a number": (
        lambda: of(counting, c=nn.Conv2d(3, 4, 3), h=nn.Linear(4, 3)),
        images((16, 16), (17, 17), (20, 20)),
    ),
    "recurrent": (
        lambda: of(
            lambda s, x: s.o(s.l(x)[0][:, -1]),
            l=nn.LSTM(4, 6, batch_first=True),
            o=nn.Linear(6, 3),
        ),
        sequences(5, 6, 9, 3, 1),
    ),
    "attention": (
        lambda: of(
            lambda s, x: s.o(s.t(x).mean(1)),
            t=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            o=nn.Linear(4, 3),
        ),
        sequences(5, 6, 9, 1, 2),
    ),
    "a transform": (
        lambda: of(lambda s, x: s.o(torch.fft.rfft(x, dim=1).abs().mean(1)), o=nn.Linear(4, 3)),
        sequences(5, 6, 9, 8),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_size_as_by_an_explainer_of_its_own(name: str) -> None:
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make()
    rlrp = RelativeLRP(model)
    for x in inputs:
        agree(rlrp.attribute(x, 1), explained(model, x, 1))


def test_two_exports_serve_forty_sizes(exports: list[Any]) -> None:
    model = of(mixed, c=nn.Conv2d(3, 4, 3, padding=1), h=nn.Linear(42, 3))
    rlrp = RelativeLRP(model)
    sizes = [(8 + i, 9 + i) for i in range(40)]
    for x in images(*sizes):
        found = rlrp.attribute(x, 0)
    assert len(exports) == 2
    agree(found, explained(model, x, 0))
    captures = rlrp._engine._capture
    rlrp._engine._capture = None  # type: ignore[assignment,method-assign]
    for x in images(*sizes):  # each is at hand now
        rlrp.attribute(x, 0)
    rlrp._engine._capture = captures  # type: ignore[method-assign]


def test_batches_of_any_number_and_size(exports: list[Any]) -> None:
    model = of(mixed, c=nn.Conv2d(3, 4, 3, padding=1), h=nn.Linear(42, 3))
    rlrp = RelativeLRP(model)
    for batch, size in ((2, 8), (3, 9), (9, 9), (4, 12), (1, 10), (5, 10)):
        x = torch.randn(batch, 3, size, size)
        agree(rlrp.attribute(x, 1), torch.cat([explained(model, one[None], 1) for one in x]))


def test_weights_that_change_between_sizes() -> None:
    model = of(turning, c=nn.Conv2d(3, 4, 3), h=nn.Linear(4, 3))
    rlrp = RelativeLRP(model)
    for i, x in enumerate(images((20, 20), (21, 20), (22, 22), (23, 23), (24, 24))):
        if i == 2:
            model.c.bias = None
        if i == 3:
            model.c.register_forward_hook(
                lambda module, args, y: y * torch.arange(4.0)[:, None, None]
            )
        if i == 4:
            model.h = nn.Linear(4, 3)
        agree(rlrp.attribute(x, 1), explained(model, x, 1))


def test_layers_and_tokens() -> None:
    torch.manual_seed(0)
    model = of(
        lambda s, i, mask: s.o((s.e(i).tanh() * mask[..., None]).mean(1)),
        e=nn.Embedding(9, 4),
        o=nn.Linear(4, 3),
    )
    layer, rlrp = LayerRelativeLRP(model, model.e), RelativeLRP(model)
    for length in (5, 6, 9, 4):
        ids, mask = torch.randint(0, 9, (2, length)), torch.ones(2, length)
        mask[:, -1] = 0
        found = layer.attribute(ids, 1, additional_forward_args=(mask,))
        assert found.shape == (2, length, 4)
        assert not found[:, -1].any()
        agree(rlrp.attribute(ids, 1, additional_forward_args=(mask,)), found.sum(-1))
