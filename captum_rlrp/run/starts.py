"""Where relevance starts, for some of the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .task import Begin, Start

StartFunction = Callable[[Tensor, slice], Start]
"""The model's output for some rows of the batch, and which → relevance there (:data:`.Start`)."""


def at_rows(start: StartFunction, rows: slice) -> Begin:
    """The start for these rows."""
    return lambda output: start(output, rows)


def of_row(start: StartFunction | Sequence[StartFunction], row: int) -> Any:
    """The start in one row of the output, where the others belong to other graphs."""
    if not callable(start):
        return [of_row(one, row) for one in start]

    def begin(output: Tensor, rows: slice) -> Start:
        own, _ = start(output[row : row + 1], slice(row, row + 1))
        whole = own.new_zeros(output.shape)
        whole[row : row + 1] = own
        return whole, None

    return begin


def within(start: StartFunction | Sequence[StartFunction], first: int) -> Any:
    """The start for some of the rows from `first` on."""
    if not callable(start):
        return [within(one, first) for one in start]
    return lambda output, rows: start(output, slice(first + rows.start, first + rows.stop))
