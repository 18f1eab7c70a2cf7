"""The weights of attention, made once, and the moves around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from captum_rlrp.rules import attention, shape
from tests.oracle import frozen, relative_error
from tests.paths import all_paths
from tests.small import of

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 5
SHUT = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(1)
SHUT[2] = False  # a token that may look at none
ADDED = torch.linspace(-2, 2, TOKENS * TOKENS, dtype=torch.float64).view(TOKENS, TOKENS)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "shut": {"attn_mask": SHUT},
    "added": {"attn_mask": ADDED},
}


def attending(options: dict[str, Any]) -> nn.Module:
    """Two heads of 4 features."""

    def forward(s: Any, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in s.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return s.o(y.transpose(1, 2).flatten(2).relu()[:, 2:].flatten(1))

    torch.manual_seed(1)
    return frozen(of(forward, qkv=nn.Linear(6, 24), o=nn.Linear(24, 3)))


@pytest.mark.parametrize("kind", OPTIONS)
def test_weights_of_the_forward_made_again_or_by_the_operation(kind: str) -> None:
    model, x = attending(OPTIONS[kind]), torch.randn(2, TOKENS, 6, dtype=torch.float64)
    (found,) = all_paths(model, x, [0, 2])
    with mock.patch.object(attention, "_FEW", 0):
        again = RelativeLRP(model).attribute(x, [0, 2])
        with mock.patch.object(attention, "_LARGEST", 0):
            expected = RelativeLRP(model).attribute(x, [0, 2])
    assert expected.any()
    assert relative_error(again, expected) <= 1e-10
    assert relative_error(found, expected) <= 1e-10


def test_several_targets_read_the_same_weights() -> None:
    model, x = attending({}), torch.randn(2, TOKENS, 6, dtype=torch.float64)
    rlrp = RelativeLRP(model)
    together = rlrp.attribute(x, [[0, 1, 2], [0, 1, 2]])
    for target in range(3):
        alone = rlrp.attribute(x, target)
        assert relative_error(together[:, target], alone) <= 1e-10


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "permute": lambda x: x.permute(0, 3, -3, 2),
    "transpose": lambda x: x.transpose(-1, 1),
    "t": lambda x: x.flatten(1).t().t(),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "expand to more axes": lambda x: x[:, :1, :1].squeeze(1).unsqueeze(1).expand(-1, 2, 3, -1),
    "select": lambda x: x[:, 1, :, -2],
    "slice": lambda x: x[:, :, 1:4:2, -3:],
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_back(name: str) -> None:
    """As automatic differentiation moves them, sign and all."""
    move = MOVES[name]
    model = frozen(of(lambda s, x: s.o(move(s.a(x)).relu().flatten(1)), **_layers(move)))
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    found = RelativeLRP(model).attribute(x, [0, 2])
    with mock.patch.object(shape, "_BACK", {}):
        expected = RelativeLRP(model).attribute(x, [0, 2])
    assert expected.any()
    assert relative_error(found, expected) <= 1e-12


def _layers(move: Callable[[Tensor], Tensor]) -> dict[str, nn.Module]:
    size = move(torch.zeros(2, 2, 4, 5)).flatten(1).shape[1]
    return {"a": nn.Linear(5, 5), "o": nn.Linear(size, 3)}
