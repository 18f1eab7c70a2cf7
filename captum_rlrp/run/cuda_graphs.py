"""Explanations recorded as CUDA graphs.

A recording reads the parameters where they lie, so a change in place shows at once; other
parameters, shapes, strides or settings of PyTorch make another recording. Inputs and the start are
copied to where the recording reads them.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, cuda
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .recording import Replay
from .task import Outcome, Task
from .trace import waits

T = TypeVar("T")


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
            if waits(func, tensors) or any(t.device != self._device for t in tensors):
                self.obstacle = str(func)
        return result


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


class CudaGraphs:
    """Records tasks as CUDA graphs: small batches wait for launches, not for arithmetic.

    Args:
        tape: Makes what they are recorded on, for a device.
        capacity: How many are kept: each holds the memory of a whole explanation.
    """

    def __init__(self, tape: Callable[[torch.device], Tape] = CudaTape, capacity: int = 4) -> None:
        self._tape = tape
        self.capacity = capacity

    def key(self, task: Task) -> Hashable:
        """See :class:`.recording.Recorder`."""
        tensors = {n: v for n, v in task.values.items() if isinstance(v, Tensor)}
        inputs = task.inputs
        read = tuple(v.data_ptr() for n, v in tensors.items() if n not in inputs)
        kinds = tuple((v.shape, v.stride(), v.dtype, v.device) for v in tensors.values())
        return (task.program, task.batch, task.measure_delta, kinds, read, _settings())

    def record(self, task: Task) -> tuple[Outcome, Replay | None]:
        """See :class:`.recording.Recorder`."""
        device = task.device
        assert device is not None
        probe = Probe(device)
        with probe:
            run = task.forward()
        start, column = task.begin(run.values[run.output])
        with probe:
            outcome = task.back(run, start, column)
        if probe.obstacle is not None:
            return outcome, None
        try:
            return outcome, Recording(self._tape(device), task, start, column)
        except CannotRecordError:
            return outcome, None


class Recording:
    """A task that can be done again and again, on other inputs and from other starts.

    It serves one thread at a time.

    Args:
        tape: What it is recorded on.
        task: The task.
        start: Relevance at the output, as it was for this task.
        column: The column where it starts.
    """

    def __init__(self, tape: Tape, task: Task, start: Tensor, column: Tensor | None) -> None:
        self._lock = threading.Lock()
        self._places = {node: value.clone() for node, value in task.inputs.items()}
        values: dict[Node, Any] = {**task.values, **self._places}
        task = replace(task, values=values)
        self._start, self._column = start.clone(), _copied(column)
        run, self._forward = tape.record(task.forward)
        self._output = run.values[run.output]
        outcome, self._back = tape.record(lambda: task.back(run, self._start, self._column))
        self._result, self._totals = outcome

    def __call__(self, task: Task) -> Outcome | None:
        """What :meth:`Task.run` returns; None while another thread uses the recording."""
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._replay(task)
        finally:
            self._lock.release()

    def _replay(self, task: Task) -> Outcome:
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


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()
