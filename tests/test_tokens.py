"""The relevance of an integer goes back to it whole, whatever index was computed from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import InputError, LayerRelativeLRP, RelativeLRP
from tests.small import of

COLUMNS = torch.tensor([[1, 3, 4, 2], [2, 2, 4, 1], [4, 1, 3, 3]])

Index = Callable[[Tensor], Tensor]

ALONE: dict[str, Index] = {
    "an offset": lambda c: c + 3,
    "a hash": lambda c: (c + 1) * 31 % 11,
    "counted from the end": lambda c: 9 - c,
    "halved": lambda c: c // 2,
    "divided by a mode": lambda c: torch.div(c, 2, rounding_mode="floor"),
    "bounded": lambda c: c.clamp(2, 3),
    "squared": lambda c: c**2,
    "times itself": lambda c: c * c,
    "bits": lambda c: (c & 3) ^ 1,
    "shifted": lambda c: c << 1,
    "an absolute value": lambda c: (c - 10).abs(),
    "a table of integers": lambda c: torch.arange(39, -1, -1)[c],
    "a cast": lambda c: c.int(),
}
TOGETHER: dict[str, Index] = {
    "a crossed column": lambda c: c[:, :2] * 5 + c[:, 2:],
    "a sum": lambda c: c.sum(1, keepdim=True),
    "digits": lambda c: (c * torch.tensor([1, 2, 3, 1])).sum(1, keepdim=True),
    "sorted": lambda c: c.sort(1).values,
    "the largest": lambda c: c.amax(1, keepdim=True),
}


def embedded(index: Index) -> nn.Module:
    torch.manual_seed(0)
    own = {"e": nn.Embedding(40, 6), "o": nn.Linear(6, 2)}
    return of(lambda s, c: s.o(s.e(index(c)).relu().sum(1)), **own)


@pytest.mark.parametrize("name", ALONE)
def test_an_index_of_one_integer(name: str) -> None:
    model = embedded(ALONE[name])
    vectors = LayerRelativeLRP(model, model.e).attribute(COLUMNS, 1)
    torch.testing.assert_close(RelativeLRP(model).attribute(COLUMNS, 1), vectors.sum(2))


@pytest.mark.parametrize("name", TOGETHER)
def test_an_index_of_several_integers(name: str) -> None:
    model = embedded(TOGETHER[name])
    vectors = LayerRelativeLRP(model, model.e).attribute(COLUMNS, 1)
    found = RelativeLRP(model).attribute(COLUMNS, 1)
    torch.testing.assert_close(found.sum(1), vectors.sum((1, 2)))
    assert found.abs().sum() <= len(COLUMNS)


def test_a_crossed_column_is_shared_alike() -> None:
    found = RelativeLRP(embedded(TOGETHER["a crossed column"])).attribute(COLUMNS, 1)
    torch.testing.assert_close(found[:, :2], found[:, 2:])


def test_one_hot_is_an_embedding() -> None:
    model = embedded(lambda c: c)
    vectors = RelativeLRP(model).attribute(COLUMNS, 1)
    rows = of(
        lambda s, c: s.o((F.one_hot(c, 40).float() @ s.e.weight).relu().sum(1)),
        e=model.e,
        o=model.o,
    )
    torch.testing.assert_close(RelativeLRP(rows).attribute(COLUMNS, 1), vectors)


@pytest.mark.parametrize("index", [lambda c: c.cumsum(1), lambda c: c.diff(dim=1) + 9])
def test_integers_that_get_lost_are_an_error(index: Index) -> None:
    with pytest.raises(InputError, match="Explain the layer that embeds them"):
        RelativeLRP(embedded(index)).attribute(COLUMNS, 1)
