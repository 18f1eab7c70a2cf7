"""Slices: relevance of parts of a value, put together where it is its turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.paths import all_paths

from .small import agree, explained, of

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Take = Callable[[Tensor, int, int, int], Tensor]


def by_slices(y: Tensor, dim: int, start: int, end: int) -> Tensor:
    return y.narrow(dim, start, end - start)


def by_numbers(y: Tensor, dim: int, start: int, end: int) -> Tensor:
    return y.index_select(dim, torch.arange(start, end))


# What is made of y, of (batch, 6, 6, 6), by what takes a part of it.
USES: dict[str, Callable[[Tensor, Take], Tensor]] = {
    "all of it, in any order": lambda y, take: torch.cat(
        [3 * take(y, 1, 4, 6), take(y, 1, 0, 1).relu(), 2 * take(y, 1, 1, 4)], 1
    ),
    "with a gap": lambda y, take: torch.cat([take(y, 1, 4, 6), take(y, 1, 0, 3)], 1),
    "one": lambda y, take: take(y, 2, 2, 5),
    "overlapping": lambda y, take: take(y, 1, 0, 4) + take(y, 1, 2, 6).relu(),
    "of several axes": lambda y, take: take(y, 1, 0, 3) + take(y, 2, 0, 3).transpose(1, 2),
    "beside the whole": lambda y, take: torch.cat([y, take(y, 3, 0, 2), take(y, 3, 2, 6)], 3),
    "beside a convolution": lambda y, take: (
        nn.functional.conv2d(y, torch.ones(6, 6, 1, 1))
        + torch.cat([take(y, 1, 3, 6), take(y, 1, 0, 3)], 1)
    ),
    "of a part": lambda y, take: take(take(y, 1, 1, 5), 2, 0, 2) - take(take(y, 2, 3, 5), 1, 2, 6),
    "single ones": lambda y, take: torch.stack([y.select(1, -1), y[:, 2], 2 * y.select(1, 0)], 1),
    "every second": lambda y, take: y[:, ::2] + 2 * take(y, 1, 3, 6),
}


@pytest.mark.parametrize("name", USES)
def test_the_same_as_by_numbers(name: str) -> None:
    torch.manual_seed(0)
    use, first = USES[name], nn.Conv2d(3, 6, 3, padding=1)
    head = nn.Linear(use(torch.zeros(1, 6, 6, 6), by_slices).numel(), 3)

    def network(take: Take) -> nn.Module:
        return of(lambda s, x: s.h(use(s.c(x).relu(), take).flatten(1)), c=first, h=head)

    (found,) = all_paths(network(by_slices), X, 1)
    agree(found, explained(network(by_numbers), X, 1))


def test_by_hand() -> None:
    """x₀ twice, x₂ once, of three: what was in no slice gets nothing."""
    model = of(lambda s, x: s.h(torch.cat([x[:, 2:], x[:, :1], x[:, 0:1]], 1)), h=nn.Linear(3, 1))
    model.h.weight.data = torch.tensor([[2.0, -1.0, 3.0]])
    found = explained(model, torch.tensor([[1.0, 5.0, 2.0]]), 0)
    torch.testing.assert_close(found, torch.tensor([[2 / 8, 0.0, 4 / 8]]))
