"""``as_strided`` picks by places in memory: those of the model, whatever ours are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from captum_rlrp.run.calls import _sum
from tests.paths import all_paths

from .small import agree, explained, of

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def plain(y: Tensor) -> Tensor:
    """Channels 1 and 2, positions first."""
    return y.flatten(2)[:, 1:3].transpose(1, 2)


# On (batch, 4, 6, 6): by places in memory, and the same without.
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "of a whole": (lambda y: y.as_strided((len(y), 36, 2), (144, 1, 36), 36), plain),
    "of a transposed one": (
        lambda y: y.transpose(1, 3).as_strided((len(y), 36, 2), (144, 1, 36), 36),
        plain,
    ),
    "of a part, from where it begins": (
        lambda y: y[:, 1:].as_strided((len(y), 36, 2), (144, 1, 36)),
        plain,
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_as_without_places(name: str) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 3, padding=1)
    by_places, otherwise = PAIRS[name]
    head = nn.Linear(otherwise(torch.zeros(1, 4, 6, 6)).numel(), 3)

    def network(pick: Callable[[Tensor], Tensor]) -> nn.Module:
        return of(lambda s, x: s.h(pick(s.c(x).relu()).flatten(1)), c=first, h=head)

    (found,) = all_paths(network(by_places), X, 1)
    agree(found, explained(network(otherwise), X, 1))


def test_parts_of_a_product_that_are_written_to() -> None:
    """Writes through views are captured as places in memory, behind a transposed convolution."""
    torch.manual_seed(0)
    layer, head = nn.Conv1d(4, 6, 3, padding=1), nn.Linear(12, 3)

    def in_place(y: Tensor) -> Tensor:
        first, second = y.transpose(1, 2).split([2, 4], -1)
        first.mul_(2)
        return torch.cat([first.mean(1), second.amax(1), y.mean(2)], 1)

    def otherwise(y: Tensor) -> Tensor:
        first = y[:, :2] * 2
        return torch.cat([first.mean(2), y[:, 2:].amax(2), first.mean(2), y[:, 2:].mean(2)], 1)

    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2))

    def network(function: Callable[[Tensor], Tensor]) -> nn.Module:
        return of(lambda s, x: s.h(function(s.c(x).tanh() + 0)), c=layer, h=head)

    (found,) = all_paths(network(in_place), x, 1)
    agree(found, explained(network(otherwise), x, 1))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [None, [], [1], [-3, 1], [2, 0, -1]], ids=str)
def test_sums_lie_as_their_operand_does(dim: list[int] | None, keepdim: bool) -> None:
    halves = torch.randn(2, 8, 5, 6).to(memory_format=torch.channels_last).view(2, 2, 4, 5, 6)
    for x in (halves, torch.randn(2, 2, 4, 5, 6), torch.randn(2, 1, 1, 5, 6).expand(2, 2, 4, 5, 6)):
        y = _sum(x, dim, keepdim)
        torch.testing.assert_close(y, x.sum(dim, keepdim))
    half = _sum(halves, [1])
    assert half.is_contiguous(memory_format=torch.channels_last)
