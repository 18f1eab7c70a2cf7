"""Recurrent layers as export can take them: each one call, and packed sequences as padded ones.

The sizes of packed ones depend on values, so no static graph holds them. While a model is captured,
``pack_padded_sequence`` leaves the padding where it is, the recurrent layers run over it, and
``pad_packed_sequence`` masks what they wrote there. A backward direction reads each sequence from
its own end. No relevance reaches the padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from .recurrent import recurrent_layer

_LAYERS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


class RecurrentLayers(TorchFunctionMode):
    """The mode in which a recurrent layer is one call, and packing pads."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "sort" and _is_packing():
            return args[0], _Order()  # padded sequences need no order
        if any(isinstance(value, _Order) for value in args):
            return args[0]
        if name == "_pack_padded_sequence":
            sequence, lengths, batch_first = args
            sequence = sequence.transpose(0, 1) if batch_first else sequence
            made = _Lengths(lengths.to(sequence.device), *sequence.shape[:2])
            return sequence.flatten(0, 1), made  # as packed data is: steps and samples in one
        if name == "_pad_packed_sequence" and isinstance(args[1], _Lengths):
            return _pad(*args)
        if name in _LAYERS and isinstance(args[1], _Lengths):
            return _run(name, *args)
        if name in _LAYERS and isinstance(args[-1], bool) and args[0].shape[args[-1]]:
            return _layer_by_layer(name, func, *args)
        return func(*args, **kwargs)


def _is_packing() -> bool:
    """Whether ``pack_padded_sequence`` made the call, through modes of export's own."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and "torch" in frame.f_globals.get("__name__", ""):
        if frame.f_code is pack_padded_sequence.__code__:
            return True
        frame = frame.f_back
    return False


class _Order:
    """The order of the sequences: as they came."""

    device = torch.device("cpu")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0]

    def to(self, *args: Any) -> _Order:
        return self

    cpu = to
    scatter_ = to

    def numel(self) -> int:
        return 0


class _Lengths:
    """What stands for the sizes of the batch at each step."""

    device = torch.device("cpu")

    def __init__(self, lengths: Tensor, steps: int, batch: Any) -> None:
        self.lengths, self.steps, self.batch = lengths, steps, batch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise CaptureError(
            f"A packed sequence cannot be captured behind {getattr(func, '__name__', func)}: pass "
            "it to a recurrent layer and to pad_packed_sequence only."
        )

    def __getitem__(self, step: int) -> Any:
        return self.batch  # of the first step: all sequences

    def size(self, dim: int = 0) -> int:
        return self.steps

    def __len__(self) -> int:
        return self.steps

    @property
    def valid(self) -> Tensor:
        """Which steps are no padding, shape (steps, batch)."""
        steps = torch.arange(self.steps, device=self.lengths.device)
        return steps[:, None] < self.lengths[None]

    @property
    def backward(self) -> Tensor:
        """Where each step of the sequences lies when they are read from their ends."""
        steps = torch.arange(self.steps, device=self.lengths.device)[:, None]
        return torch.where(self.valid, self.lengths[None] - 1 - steps, steps)


class _NoCells:
    """The last cell states, which the layers do not tell for padded sequences."""

    def index_select(self, *args: Any) -> _NoCells:
        return self

    def __getattr__(self, name: str) -> Any:
        raise CaptureError(
            "The cell state at the end of a packed sequence cannot be captured; use the hidden "
            "state, or padded sequences."
        )

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__("item")


def _layer_by_layer(
    name: str,
    func: Callable[..., Any],
    data: Tensor,
    state: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, ...]:
    """A stack of layers, each one call."""
    if dropout and train and layers > 1:  # random: left as it is, to be refused by name
        return func(
            data, state, weights, has_biases, layers, dropout, train, bidirectional, batch_first
        )
    states = list(state) if name == "lstm" else [state]
    directions = 2 if bidirectional else 1
    size = len(weights) // layers
    data = data.transpose(0, 1) if batch_first else data
    hidden: list[Tensor] = []
    cells: list[Tensor] = []
    for i in range(layers):
        start = [s[i * directions : (i + 1) * directions] for s in states]
        own = list(weights[i * size : (i + 1) * size])
        if name == "lstm":
            cells.append(recurrent_layer(name, data, start, own, has_biases, True))
        data = recurrent_layer(name, data, start, own, has_biases, False)
        first, last = data[-1], data[0]
        hidden += [first] if directions == 1 else [first.chunk(2, -1)[0], last.chunk(2, -1)[1]]
    data = data.transpose(0, 1) if batch_first else data
    ends = [torch.stack(hidden), *([torch.cat(cells)] if cells else [])]
    return (data, *ends)


def _pad(
    data: Tensor, lengths: _Lengths, batch_first: bool, value: float, steps: int
) -> tuple[Tensor, Tensor]:
    data = data.unflatten(0, (lengths.steps, lengths.batch))
    padded = torch.where(lengths.valid[:, :, None], data, value)
    if steps > lengths.steps:
        padded = torch.nn.functional.pad(
            padded, (0, 0, 0, 0, 0, steps - lengths.steps), value=value
        )
    return (padded.transpose(0, 1) if batch_first else padded), lengths.lengths


def _run(
    name: str,
    data: Tensor,
    lengths: _Lengths,
    state: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Any, ...]:
    data = data.unflatten(0, (lengths.steps, lengths.batch))
    directions = 2 if bidirectional else 1
    size = len(weights) // (layers * directions)
    last: list[Tensor] = []
    for i in range(layers):
        if i and dropout and train:
            data = torch.dropout(data, dropout, True)
        outputs = []
        for direction in range(directions):
            at = i * directions + direction
            start = [s[at : at + 1] for s in (state if name == "lstm" else [state])]
            own = list(weights[at * size : (at + 1) * size])
            read = _at(data, lengths.backward) if direction else data
            output = recurrent_layer(name, read, start, own, has_biases, False)
            last.append(_at(output, (lengths.lengths - 1)[None]))
            outputs.append(_at(output, lengths.backward) if direction else output)
        data = torch.cat(outputs, -1) if bidirectional else outputs[0]
    hidden, data = torch.cat(last), data.flatten(0, 1)
    return (data, hidden, _NoCells()) if name == "lstm" else (data, hidden)


def _at(data: Tensor, steps: Tensor) -> Tensor:
    return data.gather(0, steps[:, :, None].expand(-1, -1, data.shape[2]))
