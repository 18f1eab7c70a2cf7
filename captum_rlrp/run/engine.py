"""Model and arguments to relevance: captures once per signature, binds values, runs.

Knows neither Captum nor targets; :mod:`captum_rlrp.attribution` adds those.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, ItemsView, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import CaptureError, InputError, NonFiniteError
from ..graph.capture import CAPTURING, CapturedGraph, capture, check_eval_mode, flatten_arguments
from ..kernels import reference
from ..plan.fusion import fuse
from ..plan.portions import divide, find_portion
from ..plan.steps import plan
from .program import Program, Result, find_non_finite
from .recording import Begin, Recordings, Task

_CACHED_PROGRAMS = 32

# Relevance at the output and, where it is one-hot along dimension 1, the column of each sample.
Start = tuple[Tensor, Tensor | None]
StartFunction = Callable[[Tensor, slice], Start]
WantedFunction = Callable[[CapturedGraph, Sequence[Node]], list[Node]]


class Remembered(NamedTuple):
    """A module at the capture: what the program took from it, apart from parameters."""

    module: weakref.ref[nn.Module]
    kind: type
    training: bool
    children: list[int]
    settings: ItemsView[str, Any]

    def is_as_it_was(self) -> bool:
        """Whether nothing has changed since."""
        module = self.module()  # another may have the id of one that is gone
        return (
            module is not None
            and type(module) is self.kind
            and module.training is self.training
            and [*map(id, module._modules.values())] == self.children
            and self.settings <= module.__dict__.items()
        )


@dataclass(frozen=True)
class Captured:
    """A program with what must hold for it to be used again.

    Attributes:
        program: What runs.
        plain: The same on the reference kernels, unfused: for numbers that leave float32's range.
        explained: The explained inputs.
        wanted: The values whose relevance is asked for.
        parameters: What the program reads of the model anew at every run.
        modules: What it took from the model's modules.
        portion: The most samples that are to go through at a time.
    """

    program: Program
    plain: Program
    explained: tuple[Node, ...]
    wanted: tuple[Node, ...]
    parameters: tuple[tuple[str, Node, torch.Size, torch.dtype, torch.device], ...]
    modules: tuple[Remembered, ...]
    portion: int | None

    @property
    def per_sample(self) -> bool:
        """Captured for a batch of one: samples go through one by one."""
        return self.program.graph.batch is None

    def bind(self, model: nn.Module) -> dict[Node, Tensor] | None:
        """The parameters as they are now; None where they do not fit the program any more."""
        if not all(module.is_as_it_was() for module in self.modules):
            return None
        values = {}
        try:
            for name, node, shape, dtype, device in self.parameters:
                value = values[node] = _attribute(model, name)
                if value.shape != shape or value.dtype != dtype or value.device != device:
                    return None
        except AttributeError:
            return None
        return values


@dataclass(frozen=True)
class Explanation:
    """Relevance at each value asked for, with the shape the value has, and the delta."""

    relevance: list[Tensor]
    delta: Tensor | None


class Engine:
    """Runs Relative LRP on one model, from any number of threads.

    Args:
        model: The unwrapped module.
        kernels: The backend.
        fuses: Whether the forward may fold and fuse; otherwise it runs as captured.
        layers: Names of the modules whose outputs are asked for; None stands for all leaves.
        recordings: CUDA graphs to replay where there are any; None does without.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: ModuleType,
        fuses: bool = True,
        layers: Sequence[str] | None = (),
        recordings: Recordings | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.fuses = fuses
        self.recordings = recordings
        self.kernels = kernels
        self._memory = kernels.working_memory()
        self._cache: OrderedDict[Hashable, Captured] = OrderedDict()
        self._lock = threading.Lock()

    def explain(
        self,
        inputs: Sequence[Tensor],
        additional: Sequence[Any],
        start: StartFunction,
        wanted: WantedFunction | None = None,
        key: Hashable = None,
        measure_delta: bool = False,
        internal_batch_size: int | None = None,
    ) -> Explanation:
        """Explains a batch.

        Args:
            inputs: The explained arguments, samples first.
            additional: The model's further arguments.
            start: Model output and the rows it stands for → relevance at the output, and the
                column where it starts.
            wanted: Which values' relevance to return; the inputs' by default.
            key: Tells `wanted` functions apart.
            measure_delta: Whether to measure the violation of the local law.
            internal_batch_size: Samples that go through at a time; by default all of them, or as
                many as are fast on a CPU.
        """
        args = (*inputs, *additional)
        batch = len(inputs[0])
        captured, parameters = self._bound(args, len(inputs), batch, wanted, key)
        size, portion = internal_batch_size or batch, captured.portion or batch
        if captured.per_sample:
            size = 1
        elif internal_batch_size is None and portion < batch and not _carry(additional, batch):
            size = divide(batch, portion)
        parts = []
        with self._memory:
            for first in range(0, batch, size):
                rows = slice(first, min(first + size, batch))
                some = args if size >= batch else _take(args, rows, batch)
                if size < batch and captured.program.graph.guards:  # forward may take another way
                    begin = functools.partial(_start_within, start, rows.start)
                    few, rest = some[: len(inputs)], some[len(inputs) :]
                    parts.append(self.explain(few, rest, begin, wanted, key, measure_delta))
                else:
                    parts.append(self._run(captured, parameters, some, rows, start, measure_delta))
        if len(parts) == 1:
            return parts[0]
        relevance = [
            torch.cat(values) for values in zip(*(p.relevance for p in parts), strict=True)
        ]
        deltas = [part.delta for part in parts if part.delta is not None]
        return Explanation(relevance, torch.cat(deltas) if deltas else None)

    # ---- capture -----------------------------------------------------------------------------

    def captured(
        self,
        args: Sequence[Any],
        explained: int,
        batch: int,
        wanted: WantedFunction | None = None,
        key: Hashable = None,
    ) -> Captured:
        """The program for arguments like these, captured if it is not at hand."""
        return self._bound(args, explained, batch, wanted, key)[0]

    def _bound(
        self,
        args: Sequence[Any],
        explained: int,
        batch: int,
        wanted: WantedFunction | None,
        key: Hashable,
    ) -> tuple[Captured, dict[Node, Tensor]]:
        """The program and the model's parameters."""
        signature: Hashable = (key, explained, _signature(args, batch))
        with self._lock:
            found = self._cache.get(signature)
            if found is not None and not found.program.graph.admits(batch):
                signature = (signature, batch)
                found = self._cache.get(signature)
            if found is not None:
                self._cache.move_to_end(signature)
        parameters = found.bind(self.model) if found is not None else None
        if found is not None and parameters is not None:
            return found, parameters
        with CAPTURING:
            made = self._capture(args, explained, batch, wanted)
        with self._lock:
            self._cache[signature] = made
            while len(self._cache) > _CACHED_PROGRAMS:
                self._cache.popitem(last=False)
        parameters = made.bind(self.model)
        if parameters is None:
            raise CaptureError(
                f"{type(self.model).__name__} was changed while it was captured, by another thread "
                "perhaps. Explain it again when nothing changes its modules."
            )
        return made, parameters

    def _capture(
        self, args: Sequence[Any], explained: int, batch: int, wanted: WantedFunction | None
    ) -> Captured:
        check_eval_mode(self.model)
        try:
            graph = capture(self.model, args, batch, self._layers())
        except CaptureError as error:
            graph = self._capture_single(args, batch, error)
        if graph.batch is None:
            graph = self._capture_single(args, batch, None)
        elif not graph.admits(batch):  # traced with two samples, where forward takes another way
            only_one = sympy.Eq(sympy.Symbol("batch"), batch)
            graph = replace(capture(self.model, args, None, self._layers()), guards=(only_one,))
        nodes = graph.inputs[:explained]
        taps = wanted(graph, nodes) if wanted else list(nodes)
        made = plan(graph, nodes, taps)
        plain = Program(graph, made, reference, taps)
        instructions = None
        if self.fuses:
            made, instructions = fuse(graph, made, taps)
        program = Program(graph, made, self.kernels, taps, instructions)
        parameters = tuple(
            (name, node, value.shape, value.dtype, value.device)
            for node, name in graph.parameters.items()
            for value in (_attribute(self.model, name),)
        )
        modules = tuple(map(_remember, self.model.modules()))
        divides = self.fuses and _device(args) == "cpu"
        portion = find_portion(graph, made.layouts) if divides else None
        return Captured(program, plain, tuple(nodes), tuple(taps), parameters, modules, portion)

    def _capture_single(
        self, args: Sequence[Any], batch: int, error: CaptureError | None
    ) -> CapturedGraph:
        """The model fixes its batch size: it may still run on one sample at a time."""
        try:
            return capture(self.model, _take(args, slice(0, 1), batch), None, self._layers())
        except CaptureError as second:
            self._check_runs(args)
            if error is not None:
                raise error from None
            raise CaptureError(
                f"{type(self.model).__name__} runs for a batch of {batch} only (its forward fixes "
                f"the batch size, in a reshape perhaps): {second}"
            ) from second

    def _layers(self) -> list[nn.Module]:
        if self.layers is None:
            return [m for m in self.model.modules() if not any(True for _ in m.children())]
        return [self.model.get_submodule(name) for name in self.layers]

    def _check_runs(self, args: Sequence[Any]) -> None:
        """Where the model itself fails on the arguments, that is the error to show."""
        try:
            with torch.no_grad():
                self.model(*args)
        except Exception as error:
            shapes = ", ".join(str(tuple(a.shape)) for a in args if isinstance(a, Tensor))
            raise InputError(
                f"{type(self.model).__name__} fails on these arguments (shapes {shapes}), "
                f"with or without an explanation: {type(error).__name__}: {error}"
            ) from error

    # ---- run ----------------------------------------------------------------------------------

    def _run(
        self,
        captured: Captured,
        parameters: dict[Node, Tensor],
        args: Sequence[Any],
        rows: slice,
        start: StartFunction,
        measure_delta: bool,
    ) -> Explanation:
        graph = captured.program.graph
        with torch.no_grad(), _no_autocast(args):
            values: dict[Node, Any] = {**graph.constants, **parameters}
            for node, value in zip(graph.inputs, flatten_arguments(args), strict=True):
                values[node] = value.detach() if isinstance(value, Tensor) else value
            inputs = {n: values[n] for n in graph.inputs if isinstance(values[n], Tensor)}
            task = Task(
                captured.program,
                values,
                inputs,
                captured.explained,
                lambda output: start(output, rows),
                rows.stop - rows.start,
                measure_delta,
            )
            result, totals = self.recordings.run(task) if self.recordings else task.run()
            if not _is_sound(totals, result):
                result = self._run_wide(replace(task, program=captured.plain))
            parts = []
            for node in captured.wanted:
                part = result.relevance.get(node)
                if part is None:  # nothing arrived: no way leads there from the output
                    like = result.likes.get(node, values.get(node))
                    assert like is not None
                    part = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
                parts.append(part)
        return Explanation(parts, result.delta)

    def _run_wide(self, task: Task) -> Result:
        """The same in float64, for relevance that nearly vanishes and values far from 1.

        Raises:
            NonFiniteError: Where that does not help, naming the cause.
        """
        for i, x in enumerate(task.values[node] for node in task.explained):
            if x.is_floating_point() and not x.isfinite().all():
                kind = "NaN" if x.isnan().any() else "infinite values"
                sample = int((~x.isfinite()).flatten(1).any(1).nonzero()[0]) if x.dim() > 1 else 0
                raise NonFiniteError(
                    f"Input {i} contains {kind} (first in sample {sample}); an explanation needs "
                    "finite inputs. Remove or impute them."
                )
        error = find_non_finite(task.program, task.values)
        if error is not None:
            raise error
        result, totals = replace(task, begin=_widened(task.begin)).run()
        if not all(map(math.isfinite, totals.tolist())):
            raise NonFiniteError(
                "Relevance overflowed although every value of the model is finite: the weights or "
                "inputs are too large or too small even for float64. Rescale them."
            )
        for node, r in result.relevance.items():
            dtype = node.meta["val"].dtype
            if r is None or not dtype.is_floating_point:
                continue
            masses = r.abs().flatten(1).amax(1) if r.dim() > 1 else r.abs()
            if bool(((masses > 0) & (masses < torch.finfo(dtype).tiny)).any()):
                raise NonFiniteError(
                    f"Relevance shrinks to {float(masses.min()):.1e} on its way to the input, less "
                    f"than {dtype} can hold: contributions cancel in each of very many layers. "
                    "Use float64 (model.double(), inputs.double())."
                )
        return result


_RANGE = {torch.float32: (1e-25, 1e30), torch.float64: (0.0, 1e290)}


def _is_sound(totals: Tensor, result: Result) -> bool:
    """Whether all was finite, no divisor too small, and no sample's relevance vanished."""
    wide = any(r is not None and r.dtype == torch.float64 for r in result.relevance.values())
    least, most = _RANGE[torch.float64 if wide else torch.float32]
    numbers = totals.tolist()
    return all(map(math.isfinite, numbers)) and numbers[-2] >= least and max(numbers) < most


def _widened(begin: Begin) -> Begin:
    def wide(output: Tensor) -> tuple[Tensor, Tensor | None]:
        start, column = begin(output)
        return start.double(), column

    return wide


def _start_within(start: StartFunction, first: int, output: Tensor, rows: slice) -> Start:
    """The start for some of the rows from `first` on."""
    return start(output, slice(first + rows.start, first + rows.stop))


def _no_autocast(args: Sequence[Any]) -> Any:
    """The captured graph holds the casts it needs; an ambient autocast would add others."""
    device = _device(args)
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _device(args: Sequence[Any]) -> str:
    return next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")


def _attribute(model: nn.Module, name: str) -> Tensor:
    *path, last = name.split(".")
    module: Any = model
    for part in path:
        module = module._modules[part] if part in module._modules else getattr(module, part)
    value = module._parameters.get(last)
    if value is None:
        value = module._buffers.get(last)
    if value is None:
        value = getattr(module, last)
    return value


def _remember(module: nn.Module) -> Remembered:
    # What the capture fixed of a layer of PyTorch's: strides, slopes, sizes. Other modules may
    # keep counters and the like, by which nothing can be told.
    known = type(module).__module__.startswith("torch.nn.")
    kinds = (bool, int, float, str, tuple)
    settings = {k: v for k, v in vars(module).items() if known and type(v) in kinds}
    children = [*map(id, module._modules.values())]
    return Remembered(
        weakref.ref(module), type(module), module.training, children, settings.items()
    )


def _signature(value: Any, batch: int) -> Hashable:
    if isinstance(value, Tensor):
        batched = value.dim() > 0 and value.shape[0] == batch
        shape = value.shape[1:] if batched else value.shape
        return (batched, tuple(shape), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return (type(value), *(_signature(item, batch) for item in value))
    if isinstance(value, dict):
        return tuple((key, _signature(item, batch)) for key, item in value.items())
    try:
        hash(value)
    except TypeError as error:
        raise InputError(
            f"additional_forward_args holds a {type(value).__name__}, which cannot be part of a "
            "captured graph; pass tensors, numbers, strings, None, or lists and dicts of them."
        ) from error
    return (type(value), value)


def _carry(additional: Sequence[Any], batch: int) -> bool:
    """Whether an argument has the batch's size: it may be of the samples, or happen to have it."""
    leaves = flatten_arguments(additional)
    return any(isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,) for leaf in leaves)


def _take(value: Any, rows: slice, batch: int) -> Any:
    """The arguments of some of the samples."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == batch else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_take(item, rows, batch) for item in value)
    if isinstance(value, dict):
        return {key: _take(item, rows, batch) for key, item in value.items()}
    return value
