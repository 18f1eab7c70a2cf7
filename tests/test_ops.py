"""Operations that real networks use here and there, one network each, against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import (
    Value,
    agrees,
    chain,
    explain,
    frozen,
    randomise_norms,
    relative_error,
)
from tests.paths import all_paths

pytestmark = pytest.mark.usefixtures("one_thread")


class Around(nn.Module):
    """A layer and a non-linearity before, a layer behind."""

    def __init__(self, fn: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.fn = fn
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fn(torch.tanh(self.first(x))).flatten(1))


TURNED = torch.tensor([[[0.8, 0.1, 0.0], [-0.1, 0.9, 0.2]]], dtype=torch.float64)
GRID = F.affine_grid(TURNED, [1, 4, 6, 6], align_corners=False)
STEPS = torch.tensor([0.0, 1, 0.5, 2, 3, 1])
MASK = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) > 0.5


def unpooled(x: Tensor) -> Tensor:
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y, places, 2)


def written(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, [2, 0, 1]] = x[:, [0, 1, 3]]
    return y


def overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = x[:, 0]
    return y


def overwritten_in_part(x: Tensor) -> Tensor:
    y = torch.ones_like(x)
    y[:, :, 1:4, 2:] = x[:, :, :3, :4]
    y[:, :, :, 0] = 0.5
    return y


# Name → the operation, features behind it, and how the oracle is told.
OPS: dict[str, tuple[Callable[[Tensor], Tensor], int, Callable[[Value], Value] | str]] = {
    "bicubic": (lambda x: F.interpolate(x, size=(4, 7), mode="bicubic"), 112, "spatial"),
    "bicubic antialiased": (
        lambda x: F.interpolate(x, size=(4, 7), mode="bicubic", antialias=True),
        112,
        "spatial",
    ),
    "cumsum": (lambda x: x.cumsum(2), 144, "spatial"),
    "diff": (lambda x: x.diff(n=2), 96, "diff"),
    "trapezoid": (lambda x: torch.trapezoid(x, STEPS.to(x)), 24, "spatial"),
    "overlapping fold": (lambda x: F.fold(F.unfold(x, 3), 6, 3), 144, "overlapping fold"),
    "topk": (lambda x: x.flatten(2).topk(3, -1).values, 12, "route"),
    "topk, smallest": (lambda x: x.flatten(2).topk(2, 2, largest=False)[0], 8, "route"),
    "sort": (lambda x: x.sort(1, descending=True).values, 144, "route"),
    "kthvalue": (lambda x: x.kthvalue(2, 1).values, 36, "route"),
    "median": (lambda x: x.flatten(2).median(-1, keepdim=True).values, 4, "route"),
    "max of both axes": (lambda x: x.max(-1).values.max(-1).values, 4, "route"),
    "min": (lambda x: x.amin((2, 3)), 4, "route"),
    "grid_sample": (
        lambda x: F.grid_sample(x, GRID.to(x).expand(len(x), -1, -1, -1), align_corners=False),
        144,
        "spatial",
    ),
    "max_unpool": (unpooled, 144, "route"),
    "triu": (lambda x: x.triu(), 144, "move"),
    "tril": (lambda x: x.tril(1), 144, "move"),
    "masked_fill": (lambda x: x.masked_fill(MASK, 2.0), 144, "move"),
    "where, a constant": (lambda x: torch.where(MASK, x, x.new_tensor(3.0)), 144, "move"),
    "index_put": (written, 144, "route"),
    "a channel overwritten": (overwritten, 144, "route"),
    "overwritten in part": (overwritten_in_part, 144, "route"),
    "unfold": (lambda x: F.unfold(x, 3, padding=1, stride=2), 36 * 9, "move"),
    "fold": (lambda x: F.fold(F.unfold(x, 2, stride=2), 6, 2, stride=2), 144, "fold"),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1), 288, "move"),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1), 288, "move"),
    "lp_pool": (lambda x: F.lp_pool2d(x, 2, 2), 36, "lp_pool"),
    "normalize": (lambda x: F.normalize(x, dim=1), 144, "act"),
    "logsigmoid": (F.logsigmoid, 144, "act"),
    "mean by einsum": (lambda x: torch.einsum("bchw->bc", x) / 36, 4, "dense"),
}  # fmt: skip

TWINS: dict[str, Callable[[Value], Value]] = {
    "diff": lambda v: v.spatial(lambda t: t.diff(n=2)),
    "overlapping fold": lambda v: v.move(lambda t: F.unfold(t, 3)).spatial(
        lambda t: F.fold(t, 6, 3)
    ),
    "fold": lambda v: v.move(lambda t: F.fold(F.unfold(t, 2, stride=2), 6, 2, stride=2)),
    "lp_pool": lambda v: v.act(torch.square).pool(lambda t: F.avg_pool2d(t, 2) * 4).act(torch.sqrt),
}


@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    fn, features, kind = OPS[name]
    model = frozen(Around(fn, features))
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)

    def twin(v: Value) -> Value:
        v = v.spatial(model.first).act(torch.tanh)
        v = TWINS[kind](v) if kind in TWINS else getattr(v, kind)(fn)
        return v.move(lambda t: t.flatten(1)).dense(model.last)

    agrees(twin, model, x)
    (expected,) = explain(twin, (x,), [0, 2])
    (attribution,) = all_paths(model, x, [0, 2])
    assert attribution.abs().sum() > 0.05
    assert relative_error(attribution, expected) <= 1e-9


# ---- what random graphs brought to light ---------------------------------------------------------


def check(model: nn.Module, twin: Callable[[Value], Value], x: Tensor) -> None:
    agrees(twin, model, x)
    index = [(i,) * (model(x).dim() - 1) for i in range(2)]
    (expected,) = explain(twin, (x,), index)
    (attribution,) = all_paths(model, x, index)
    assert relative_error(attribution, expected) <= 1e-9


def test_folded_batch_norm_behind_an_uneven_padding() -> None:
    """A padding that differs between the sides is transposed in another way: with the fold too."""
    conv, norm, head = nn.Conv1d(2, 4, 2, padding="same"), nn.BatchNorm1d(4), nn.Linear(6, 3)
    model = frozen(randomise_norms(nn.Sequential(conv, norm, nn.ReLU(), head)))
    kinds = ["spatial", "move", "act", "dense"]
    check(model, chain(list(zip(kinds, model, strict=True))),
          torch.randn(2, 2, 6, dtype=torch.float64))  # fmt: skip


class Function(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.masked_fill(MASK, 2.0),
        lambda x: torch.where(MASK, x.new_tensor(3.0), x),
        lambda x: x.tril(),
        lambda x: F.pad(x, [1, 1]),
    ],
    ids=["masked_fill", "where", "tril", "pad"],
)
def test_what_arrives_at_a_constant_is_dropped(fn: Callable[[Tensor], Tensor]) -> None:
    model = frozen(nn.Sequential(nn.Tanh(), Function(fn), nn.Sigmoid(), nn.Conv2d(2, 3, 3)))
    kinds = ["act", "move", "act", "spatial"]
    check(model, chain(list(zip(kinds, model, strict=True))),
          torch.randn(2, 2, 6, 6, dtype=torch.float64))  # fmt: skip


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3)])
def test_upsampling_one_pixel_passes_relevance_through(mode: str, size: tuple[int, int]) -> None:
    model = frozen(nn.Sequential(nn.Tanh(), nn.Upsample(3 if size == (1, 1) else (2, 3), mode=mode),
                                 nn.Sigmoid(), nn.Conv2d(2, 3, 1)))  # fmt: skip
    kinds = ["act", "spatial", "act", "spatial"]
    check(model, chain(list(zip(kinds, model, strict=True))),
          torch.randn(2, 2, *size, dtype=torch.float64))  # fmt: skip


@pytest.mark.parametrize(("padding", "more"), [(0, 0), (1, 0), (1, 1), (0, 1)])
def test_transposed_convolution_whose_windows_tile_the_output(padding: int, more: int) -> None:
    """It passes relevance through; what arrives at a border of output padding is dropped."""
    up = nn.ConvTranspose2d(2, 4, 2, 2, padding, more, groups=2)
    model = frozen(nn.Sequential(nn.Tanh(), up, nn.Sigmoid(), nn.Conv2d(4, 3, 1)))
    kinds = ["act", "spatial", "act", "spatial"]
    check(model, chain(list(zip(kinds, model, strict=True))),
          torch.randn(2, 2, 3, 3, dtype=torch.float64))  # fmt: skip


def test_a_constant_before_the_value_in_a_concatenation() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Parameter(torch.randn(1, 2, 3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1).tanh())[:, 1:]

    model = frozen(Token())

    def twin(v: Value) -> Value:
        v = v.route(lambda t: torch.cat([model.token, t], 1)).act(torch.tanh)
        return v.dense(model.head).move(lambda t: t[:, 1:])

    check(model, twin, torch.randn(2, 4, 3, dtype=torch.float64))
