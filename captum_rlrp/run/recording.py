"""Explanations recorded as CUDA graphs: small batches wait for launches, not for arithmetic.

A recording reads the parameters where they lie, so a change in place shows at once; other
parameters, shapes, strides or settings of PyTorch make another recording. Inputs and the start are
copied to where the recording reads them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, cuda
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..rules.pass_ import Pass
from .program import Program, Result, totals

_CAPACITY = 4  # each keeps the memory of a whole explanation

T = TypeVar("T")
Begin = Callable[[Tensor], tuple[Tensor, Tensor | None]]
Outcome = tuple[Result, Tensor]


@dataclass
class Task:
    """What is explained.

    Attributes:
        program: The program.
        values: The values of its placeholders.
        explained: Those whose relevance is asked for.
        begin: The model's output → relevance there, and the column where it starts.
        batch: Number of samples.
        measure_delta: Whether to measure the violation of the local law.
    """

    program: Program
    values: Mapping[Node, Any]
    explained: Sequence[Node]
    begin: Begin
    batch: int
    measure_delta: bool

    @property
    def inputs(self) -> dict[Node, Tensor]:
        """Tensors that another call may pass anew: a recording copies them."""
        values = {node: self.values[node] for node in self.program.graph.inputs}
        return {node: value for node, value in values.items() if isinstance(value, Tensor)}

    def key(self) -> Hashable:
        """The same for tasks that one recording serves."""
        tensors = {n: v for n, v in self.values.items() if isinstance(v, Tensor)}
        inputs = self.inputs
        read = tuple(v.data_ptr() for n, v in tensors.items() if n not in inputs)
        kinds = tuple((v.shape, v.stride(), v.dtype, v.device) for v in tensors.values())
        return (self.program, self.batch, self.measure_delta, kinds, read, _settings())

    def run(self) -> Outcome:
        """The relevance, and what tells whether it can be trusted (:func:`totals`)."""
        run = self.forward()
        return self.back(run, *self.begin(run.values[run.output]))

    def forward(self) -> Pass:
        """The first half of :meth:`run`."""
        return self.program.forward(self.values)

    def back(self, run: Pass, start: Tensor, column: Tensor | None) -> Outcome:
        """The second half, from that start."""
        output = run.values[run.output]
        result = self.program.propagate(run, start, column, self.batch, self.measure_delta)
        return result, totals(run, [*self.floating, output], result)

    @property
    def floating(self) -> list[Tensor]:
        """The explained inputs that are floating-point numbers."""
        values = [self.values[node] for node in self.explained]
        return [x for x in values if x.is_floating_point()]

    @property
    def device(self) -> torch.device | None:
        """Where all tensors lie; None if they lie in several places."""
        devices = {v.device for v in self.values.values() if isinstance(v, Tensor)}
        return devices.pop() if len(devices) == 1 else None


# ---- what records ------------------------------------------------------------------------------


class CannotRecordError(Exception):
    """An operation waits for the device, say: the task has to run as ever."""


class Tape(Protocol):
    """Records what a function has the device do."""

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """The function's result, whose tensors hold nothing yet, and what fills them anew.

        Raises:
            CannotRecordError: The function cannot be recorded.
        """


class CudaTape:
    """CUDA graphs that share their memory, to be replayed in the order they were recorded in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = cuda.graph_pool_handle()

    def record(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """See :class:`Tape`."""
        graph = cuda.CUDAGraph()

        def replay() -> None:
            with cuda.device(self._device):
                graph.replay()

        with _CAPTURING, self._on_device():
            try:
                result = self._capture(graph, function)
            except _CaptureBrokenError as broken:
                self._clean_up(graph)
                raise broken.error from None
        return result, replay

    def _clean_up(self, graph: cuda.CUDAGraph) -> None:
        """Does what torch leaves undone where it cannot end a capture."""
        _BROKEN.append(graph)
        for give_back in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with contextlib.suppress(RuntimeError):  # if torch did it after all
                give_back(self._device.index, self._pool)
        # Random generators take themselves for captured until a capture succeeds.
        with contextlib.suppress(Exception):
            _BROKEN.append(cuda.CUDAGraph())
            self._capture(_BROKEN[-1], lambda: torch.zeros(1, device=self._device))

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        with cuda.device(self._device):
            stream = cuda.current_stream()
            try:
                yield
            finally:  # torch stays on the stream of a capture that it cannot end
                cuda.set_stream(stream)

    def _capture(self, graph: cuda.CUDAGraph, function: Callable[[], T]) -> T:
        made: list[T] = []
        failure: Exception | None = None
        try:
            # The stream that torch takes by default belongs to one device, for all of them. Other
            # threads may use the device meanwhile.
            with cuda.graph(
                graph, self._pool, _stream(self._device), capture_error_mode="thread_local"
            ):
                try:
                    made.append(function())
                except Exception as error:  # which the error at the end of the capture would hide
                    failure = error
        except RuntimeError as error:
            raise _CaptureBrokenError(_blame(failure or error)) from None
        if failure is not None:
            raise _blame(failure, broken=False)
        return made[0]


class _CaptureBrokenError(Exception):
    """A capture that torch could not end; `error` is the one to raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _blame(error: Exception, broken: bool = True) -> Exception:
    """The error itself, but where it is the capture's and not the function's."""
    of_capture = isinstance(error, RuntimeError) and (broken or "captur" in str(error))
    if not of_capture or isinstance(error, torch.OutOfMemoryError):
        return error
    made = CannotRecordError(str(error))
    made.__cause__ = error
    return made


_CAPTURING = threading.Lock()  # torch captures one graph at a time
_BROKEN: list[cuda.CUDAGraph] = []  # the allocator may ask them still whether they capture


@functools.cache
def _stream(device: torch.device) -> cuda.Stream:
    return cuda.Stream(device)


class Probe(TorchDispatchMode):
    """Tells, from a run as ever, what a recording could not hold; a failed one does damage.

    Attributes:
        obstacle: The first operation that waits for the device, or leaves it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.obstacle: str | None = None
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.obstacle is None:
            tensors = [t for t in tree_iter((args, kwargs, result)) if isinstance(t, Tensor)]
            if _waits(func, tensors) or any(t.device != self._device for t in tensors):
                self.obstacle = str(func)
        return result


def _waits(func: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether an operation has to know values, which the host reads."""
    if "index" in func._schema.name:  # a mask is turned into the places where it is True
        return any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in func.tags for tag in tags)


def _settings() -> Hashable:
    """What the choice of kernels goes by, apart from tensors."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    return (
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (cudnn.conv.fp32_precision, matmul.fp32_precision),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )


# ---- what is recorded --------------------------------------------------------------------------


class Recording:
    """A task that can be done again and again, on other inputs and from other starts.

    Args:
        tape: What it is recorded on.
        task: The task.
        start: Relevance at the output, as it was for this task.
        column: The column where it starts.
    """

    def __init__(self, tape: Tape, task: Task, start: Tensor, column: Tensor | None) -> None:
        self.is_used = False
        self._places = {node: value.clone() for node, value in task.inputs.items()}
        values: dict[Node, Any] = {**task.values, **self._places}
        task = replace(task, values=values)
        self._start, self._column = start.clone(), _copied(column)
        run, self._forward = tape.record(task.forward)
        self._output = run.values[run.output]
        outcome, self._back = tape.record(lambda: task.back(run, self._start, self._column))
        self._result, self._totals = outcome

    def __call__(self, task: Task) -> Outcome:
        """What :meth:`Task.run` returns."""
        for node, place in self._places.items():
            place.copy_(task.values[node])
        self._forward()
        try:
            start, column = task.begin(self._output.clone())  # which may call the user's function
            self._start.copy_(start)
            if self._column is not None and column is not None:
                self._column.copy_(column)
            self._back()
            relevance = {node: _copied(r) for node, r in self._result.relevance.items()}
            result = replace(self._result, relevance=relevance, delta=_copied(self._result.delta))
        finally:
            numbers = self._totals.cpu()  # waits: whoever comes next writes over all of it
        return result, numbers


class Recordings:
    """The latest recordings, of which each is made when a task comes for the second time.

    A recording serves one thread at a time; others run as ever meanwhile. No lock is held while
    a task runs.

    Args:
        tape: Makes what they are recorded on, for a device.
        device_type: Tasks on other devices, or on several, run as ever.
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
        self._kept: OrderedDict[Hashable, Recording] = OrderedDict()
        self._met: OrderedDict[Hashable, bool] = OrderedDict()  # whether to record it next time
        self._lock = threading.Lock()

    def run(self, task: Task) -> Outcome:
        """As :meth:`Task.run`."""
        device = task.device
        if device is None or device.type != self._device_type:
            return task.run()
        key = task.key()
        with self._lock:
            recording = self._kept.get(key)
            makes = recording is None and self._met.get(key, False)
            # While one thread makes it, or where it cannot be made, others do not try.
            _refresh(self._met, key, not makes and self._met.get(key, True), 8 * self._capacity)
            if recording is not None:
                self._kept.move_to_end(key)
                if recording.is_used:
                    recording = None
                else:
                    recording.is_used = True
        if makes:
            return self._run_and_record(task, key, device)
        if recording is None:
            return task.run()
        try:
            return recording(task)
        finally:
            recording.is_used = False

    def _run_and_record(self, task: Task, key: Hashable, device: torch.device) -> Outcome:
        may_record = True  # next time, if this one fails for reasons of its own
        try:
            probe = Probe(device)
            outcome, start, column = _probed(task, probe)
            if probe.obstacle is not None:
                may_record = False
                return outcome
            try:
                recording = Recording(self._tape(device), task, start, column)
            except CannotRecordError:
                may_record = False
                return outcome
            with self._lock:
                _refresh(self._kept, key, recording, self._capacity)
            return outcome
        finally:
            with self._lock:
                _refresh(self._met, key, may_record, 8 * self._capacity)


def _probed(task: Task, probe: Probe) -> tuple[Outcome, Tensor, Tensor | None]:
    with probe:
        run = task.forward()
    start, column = task.begin(run.values[run.output])
    with probe:
        return task.back(run, start, column), start, column


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


def _refresh(kept: OrderedDict[Hashable, T], key: Hashable, value: T, capacity: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > capacity:
        kept.popitem(last=False)
