"""Recurrent cells, by their gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..tracing import Arguments


def gates(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Any = None, c: Any = None) -> Tensor:
    """What the gates are made of: a linear map of the input and one of the state."""
    return nn.functional.linear(x, w, b) + nn.functional.linear(h, u, c)


def weights(a: Arguments) -> Sequence[Any]:
    """A cell's weights and biases."""
    return a["w_ih"], a["w_hh"], a["b_ih"], a["b_hh"]


def lstm_cell(a: Arguments) -> tuple[Tensor, Tensor]:
    """``aten.lstm_cell``: the state and the memory."""
    i, f, g, o = gates(a["input"], a["hx"][0], *weights(a)).chunk(4, -1)
    c = f.sigmoid() * a["hx"][1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(a: Arguments) -> Tensor:
    """``aten.gru_cell``: the state."""
    w, u, b, c = weights(a)
    of_x = nn.functional.linear(a["input"], w, b).chunk(3, -1)
    of_h = nn.functional.linear(a["hx"], u, c).chunk(3, -1)
    reset, keep = ((p + q).sigmoid() for p, q in zip(of_x[:2], of_h[:2], strict=True))
    new = (of_x[2] + reset * of_h[2]).tanh()
    return (a["hx"] - new) * keep + new
