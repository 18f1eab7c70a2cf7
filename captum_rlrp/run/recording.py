"""Explanations recorded as CUDA graphs: small batches wait for launches, not for arithmetic.

A recording reads the parameters where they lie, so a change in place shows at once; other
parameters, shapes or strides make another recording. Inputs and the start are copied to where the
recording reads them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

from .program import Program, Result, totals

_CAPACITY = 4  # each keeps the memory of a whole explanation

T = TypeVar("T")
Begin = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Task:
    """What is explained.

    Attributes:
        program: The program.
        values: The values of its placeholders.
        inputs: Those among them that are copied: tensors that another call may pass anew.
        explained: Those whose relevance is asked for.
        begin: The model's output → relevance there, and the column where it starts.
        batch: Number of samples.
        measure_delta: Whether to measure the violation of the local law.
    """

    program: Program
    values: Mapping[Node, Any]
    inputs: Mapping[Node, Tensor]
    explained: Sequence[Node]
    begin: Begin
    batch: int
    measure_delta: bool

    def key(self) -> Hashable:
        """The same for tasks that one recording serves."""
        tensors = {n: v for n, v in self.values.items() if isinstance(v, Tensor)}
        read = tuple(v.data_ptr() for n, v in tensors.items() if n not in self.inputs)
        kinds = tuple((v.shape, v.stride(), v.dtype, v.device) for v in tensors.values())
        return (self.program, self.batch, self.measure_delta, kinds, read)

    def run(self) -> tuple[Result, Tensor]:
        """The relevance, and what tells whether it can be trusted (:func:`totals`)."""
        run = self.program.forward(self.values)
        output = run.values[run.output]
        start, column = self.begin(output)
        result = self.program.propagate(run, start, column, self.batch, self.measure_delta)
        return result, totals(run, [*self.floating, output], result)

    @property
    def floating(self) -> list[Tensor]:
        """The explained inputs that are floating-point numbers."""
        values = [self.values[node] for node in self.explained]
        return [x for x in values if x.is_floating_point()]


class Tape(Protocol):
    """Records what a function has the device do."""

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """The function's result, whose tensors hold nothing yet, and what fills them anew."""


class CudaTape:
    """CUDA graphs that share their memory, to be replayed in the order they were recorded in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """See :class:`Tape`."""
        graph = torch.cuda.CUDAGraph()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        # Other threads may use the device meanwhile.
        capture = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            result = function()
        return result, replay


class Recording:
    """A task that can be done again and again, on other inputs and from other starts."""

    def __init__(self, tape: Tape, task: Task) -> None:
        self._places = {node: value.clone() for node, value in task.inputs.items()}
        values: dict[Node, Any] = {**task.values, **self._places}
        task = replace(task, values=values)
        run, self._forward = tape.record(lambda: task.program.forward(task.values))
        self._output = run.values[run.output]
        # The start depends on the output: on its shape at least, where the target is a function
        # of it on its values too.
        self._forward()
        start, column = task.begin(self._output)
        self._start, self._column = start.clone(), _copied(column)

        def back() -> tuple[Result, Tensor]:
            start = (self._start, self._column)
            result = task.program.propagate(run, *start, task.batch, task.measure_delta)
            return result, totals(run, [*task.floating, self._output], result)

        (self._result, self._totals), self._back = tape.record(back)

    def __call__(self, task: Task) -> tuple[Result, Tensor]:
        """What :meth:`Task.run` returns."""
        for node, place in self._places.items():
            place.copy_(task.inputs[node])
        self._forward()
        start, column = task.begin(self._output)
        self._start.copy_(start)
        if self._column is not None and column is not None:
            self._column.copy_(column)
        self._back()
        relevance = {node: _copied(r) for node, r in self._result.relevance.items()}
        delta = _copied(self._result.delta)
        numbers = self._totals.cpu()  # waits: whoever comes next writes over all of it
        return replace(self._result, relevance=relevance, delta=delta), numbers


class Recordings:
    """The latest recordings, of which each is made when a task comes for the second time.

    Args:
        tape: Makes what they are recorded on, for a device.
        device_type: Tasks on other devices run as ever.
        capacity: How many are kept.
    """

    def __init__(
        self,
        tape: Callable[[torch.device], Tape] = CudaTape,
        device_type: str = "cuda",
        capacity: int = _CAPACITY,
    ) -> None:
        self._tape = tape
        self._device_type = device_type
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, task: Task) -> tuple[Result, Tensor]:
        """As :meth:`Task.run`."""
        if any(x.device.type != self._device_type for x in task.inputs.values()):
            return task.run()
        key = task.key()
        with self._lock:
            if key not in self._kept and key in self._met:
                self._kept[key] = self._recorded(task)
            recording = self._kept.get(key)
            _refresh(self._met, key, None, 8 * self._capacity)
            if recording is not None:
                _refresh(self._kept, key, recording, self._capacity)
                return recording(task)
        return task.run()

    def _recorded(self, task: Task) -> Recording | None:
        """None where an operation cannot be recorded, as it waits for the device."""
        try:
            return Recording(self._tape(next(iter(task.inputs.values())).device), task)
        except RuntimeError:
            return None


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


def _refresh(kept: OrderedDict[Hashable, T], key: Hashable, value: T, capacity: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > capacity:
        kept.popitem(last=False)
