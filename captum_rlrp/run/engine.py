"""Model and arguments to relevance: captures once per signature, binds values, runs.

Knows neither Captum nor targets; :mod:`captum_rlrp.attribution` adds those.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..errors import CaptureError, InputError, NonFiniteError
from ..graph.active import is_number
from ..graph.capture import (
    CAPTURING,
    CapturedGraph,
    capture,
    carries_batch,
    check_eval_mode,
    flatten_arguments,
)
from ..graph.fingerprint import Fingerprint
from ..graph.form import PLAIN, Form
from ..graph.mixing import check_apart
from ..graph.tokens import at_numbers, embeddings
from ..kernels import reference
from ..plan.fusion import fuse
from ..plan.portions import divide, find_portion
from ..plan.steps import Plan, plan
from .arguments import Batched, device_of, guesses, signature, take
from .program import Program, Result, find_non_finite
from .recording import Begin, Recordings, Task
from .trial import Trial

_CACHED_PROGRAMS = 32

# Integer input → the values that it becomes, each with its indices.
Becomes = dict[Node, list[tuple[Node, Node]]]
# Relevance at the output and, where it is one-hot along dimension 1, the column of each sample.
Start = tuple[Tensor, Tensor | None]
StartFunction = Callable[[Tensor, slice], Start]
WantedFunction = Callable[[CapturedGraph, Sequence[Node]], list[Node]]


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
    becomes: Becomes
    parameters: tuple[tuple[str, Node, torch.Size, torch.dtype, torch.device], ...]
    fingerprint: Fingerprint
    portion: int | None
    batched: Batched
    only: int | None  # the one batch size it was checked for

    def admits(self, batch: int) -> bool:
        """Whether it holds for a batch of this size."""
        return self.only in (None, batch) and self.program.graph.admits(batch)

    @property
    def per_sample(self) -> bool:
        """Captured for a batch of one: samples go through one by one."""
        return self.program.graph.batch is None

    def bind(self, model: nn.Module) -> dict[Node, Tensor] | None:
        """The parameters as they are now; None where they do not fit the program any more."""
        if not self.fingerprint.fits(model):
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
        form: How the model is called, and which output counts.
        allow_random: Whether random numbers that forward draws count as constants.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: ModuleType,
        fuses: bool = True,
        layers: Sequence[str] | None = (),
        recordings: Recordings | None = None,
        form: Form = PLAIN,
        allow_random: bool = False,
    ) -> None:
        self.model = model
        self.layers = layers
        self.fuses = fuses
        self.recordings = recordings
        self.form = form
        self.allow_random = allow_random
        self.kernels = kernels
        self._memory = kernels.working_memory()
        self._cache: OrderedDict[Hashable, Captured] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: a copy captures anew."""
        state = dict(self.__dict__)
        for name in ("_memory", "_cache", "_lock"):
            del state[name]
        state["kernels"] = self.kernels.__name__
        state["recordings"] = self.recordings is not None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.kernels = importlib.import_module(state["kernels"])
        self.recordings = Recordings() if state["recordings"] else None
        self._memory = self.kernels.working_memory()
        self._cache = OrderedDict()
        self._lock = threading.Lock()

    def explain(
        self,
        inputs: Sequence[Tensor],
        additional: Sequence[Any],
        start: StartFunction | Sequence[StartFunction],
        wanted: WantedFunction | None = None,
        key: Hashable = None,
        measure_delta: bool = False,
        internal_batch_size: int | None = None,
        form: Form | None = None,
        batch: int | None = None,
    ) -> Explanation:
        """Explains a batch.

        Args:
            inputs: The explained arguments, samples first.
            additional: The model's further arguments.
            start: Model output and the rows it stands for → relevance at the output, and the
                column where it starts. Of several, the results are stacked behind the batch.
            wanted: Which values' relevance to return; the inputs' by default.
            key: Tells `wanted` functions apart.
            measure_delta: Whether to measure the violation of the local law.
            internal_batch_size: Samples that go through at a time; by default all of them, or as
                many as are fast on a CPU.
            form: How the model is called, if not as ever.
            batch: Number of samples, if not that of the first input's rows.
        """
        form = form or self.form
        args = (*inputs, *additional)
        batch = len(inputs[0]) if batch is None else batch
        captured, parameters = self._bound(args, len(inputs), batch, wanted, key, form)
        size, portion = internal_batch_size or batch, captured.portion or batch
        if captured.per_sample:
            size = 1
        elif internal_batch_size is None and portion < batch:
            size = divide(batch, portion)
        parts = []
        with self._memory:
            for first in range(0, batch, size):
                rows = slice(first, min(first + size, batch))
                some = args
                if size < batch:
                    pairs = zip(args, captured.batched, strict=True)
                    some = tuple(take(arg, rows, batched) for arg, batched in pairs)
                if size < batch and captured.program.graph.guards:  # forward may take another way
                    begin = _within(start, rows.start)
                    few, rest = some[: len(inputs)], some[len(inputs) :]
                    parts.append(
                        self.explain(few, rest, begin, wanted, key, measure_delta, None, form)
                    )
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
        form: Form | None = None,
    ) -> Captured:
        """The program for arguments like these, captured if it is not at hand."""
        return self._bound(args, explained, batch, wanted, key, form or self.form)[0]

    def _bound(
        self,
        args: Sequence[Any],
        explained: int,
        batch: int,
        wanted: WantedFunction | None,
        key: Hashable,
        form: Form,
    ) -> tuple[Captured, dict[Node, Tensor]]:
        """The program and the model's parameters."""
        autocast = torch.is_autocast_enabled(device_of(args))
        name: Hashable = (key, explained, form, autocast, signature(list(args), batch))
        with self._lock:
            found = self._cache.get(name)
            if found is not None and not found.admits(batch):
                if found.only == 1 and self._holds_for(found, args, batch, form):
                    found = self._cache[name] = replace(found, only=None)
                else:
                    name = (name, batch)
                    found = self._cache.get(name)
            if found is not None:
                self._cache.move_to_end(name)
        parameters = found.bind(self.model) if found is not None else None
        if found is not None and parameters is not None:
            return found, parameters
        with CAPTURING:
            made = self._capture(args, explained, batch, wanted, form)
        with self._lock:
            self._cache[name] = made
            while len(self._cache) > _CACHED_PROGRAMS:
                self._cache.popitem(last=False)
        parameters = made.bind(self.model)
        if parameters is None:
            raise CaptureError(
                f"{type(self.model).__name__} was changed while it was captured, by another thread "
                "perhaps. Explain it again when nothing changes its modules."
            )
        return made, parameters

    def _holds_for(self, found: Captured, args: Sequence[Any], batch: int, form: Form) -> bool:
        """Whether what was captured with one sample holds for several."""
        if found.per_sample or not found.program.graph.admits(batch):
            return False
        return self.allow_random or Trial(self.model, form, args).tells_apart(batch, found.batched)

    def _capture(
        self,
        args: Sequence[Any],
        explained: int,
        batch: int,
        wanted: WantedFunction | None,
        form: Form,
    ) -> Captured:
        check_eval_mode(self.model)
        trial = Trial(self.model, form, args)
        if batch > 1 and trial.output.shape[:1] == (1,):
            raise InputError(
                f"{type(self.model).__name__} returns shape {tuple(trial.output.shape)} for a "
                f"batch of {batch}; an explanation needs one row of scores per sample."
            )
        graph, batched = self._graph(trial, explained, batch, form)
        try:
            made, taps, becomes = self._planned(graph, explained, wanted)
        except CaptureError:
            if batch > 1 or graph.batch is None:
                raise
            # A model that cuts its batch of one still explains that one.
            graph = self._only(args, batch, form)
            made, taps, becomes = self._planned(graph, explained, wanted)
        reachable = [tap for tap in taps if tap in made.layouts]
        plain = Program(graph, made, reference, reachable)
        instructions = None
        if self.fuses:
            made, instructions = fuse(graph, made, taps)
        reachable = [tap for tap in taps if tap in made.layouts]
        program = Program(graph, made, self.kernels, reachable, instructions)
        parameters = tuple(
            (name, node, value.shape, value.dtype, value.device)
            for node, name in graph.parameters.items()
            for value in (_attribute(self.model, name),)
        )
        divides = self.fuses and device_of(args) == "cpu"
        portion = find_portion(graph, made.layouts) if divides else None
        asked = tuple(taps) if wanted else graph.inputs[:explained]
        captured = Captured(
            program, plain, graph.inputs[:explained], asked, becomes, parameters,
            Fingerprint(self.model, trial.root.model), portion, tuple(batched),
            batch if batch == 1 or batched != carries_batch(args, batch) else None,
        )  # fmt: skip
        self._compare(trial, captured, batch)
        return captured

    def _graph(
        self, trial: Trial, explained: int, batch: int, form: Form
    ) -> tuple[CapturedGraph, Batched]:
        """The graph, and which arguments belong to the samples, of which none sees another."""
        args = trial.args
        likely, *others = guesses(args, batch, explained)
        checks = batch > 1 and not self.allow_random and any(tree_leaves(likely[:explained]))
        apart = [b for b in (likely, *others) if not checks or trial.tells_apart(batch, b)]
        failed: CaptureError | None = None
        for batched in apart or [likely]:
            try:
                graph = self._traced(args, batch, form, batched)
            except CaptureError as error:
                failed = failed or error
                continue
            if graph.batch is None:
                continue
            # A forward that asks how many samples there are cannot be asked about one of them.
            if not apart and not (graph.guards and trial.tells_apart(batch, batched, True)):
                break
            if not graph.admits(batch):  # traced with two samples, which go another way
                return self._only(args, batch, form), batched
            return graph, batched
        if apart:
            return self._single(args, batch, apart[0], form, failed), apart[0]
        if failed is not None and not trial.is_random():
            failed = None
        raise failed or CaptureError(
            f"{type(self.model).__name__} mixes the samples of a batch: the first or the last of "
            f"the {batch} comes out otherwise by itself, so there is no explanation per sample. "
            "Something in forward runs along dimension 0 (a softmax, a sort, a mean over the "
            "batch) or depends on the number of samples. Explain them one by one, or rewrite it."
        )

    def _planned(
        self, graph: CapturedGraph, explained: int, wanted: WantedFunction | None
    ) -> tuple[Plan, list[Node], Becomes]:
        nodes = graph.inputs[:explained]
        becomes: Becomes = {}
        if wanted is None:
            taps = [node for node in nodes if is_number(node)]
            for node in nodes:
                if not is_number(node):
                    becomes[node] = embeddings(graph, nodes, node)
                    taps += [value for value, _ in becomes[node]]
        else:
            taps = wanted(graph, nodes)
        used = set(graph.nodes)
        made = plan(graph, nodes, [tap for tap in taps if tap in used])
        check_apart(graph, made.layouts)
        return made, taps, becomes

    def _traced(
        self, args: Sequence[Any], batch: int | None, form: Form, batched: Batched | None = None
    ) -> CapturedGraph:
        layers = self._layers()
        return capture(self.model, args, batch, layers, form, batched, self.allow_random)

    def _only(self, args: Sequence[Any], batch: int, form: Form) -> CapturedGraph:
        """The graph for a batch of exactly this size, seen as one sample."""
        only = sympy.Eq(sympy.Symbol("batch"), batch)
        return replace(self._traced(args, None, form), guards=(only,))

    def _single(
        self,
        args: Sequence[Any],
        batch: int,
        batched: Batched,
        form: Form,
        error: CaptureError | None,
    ) -> CapturedGraph:
        """The model fixes its batch size: it may still run on one sample at a time."""
        one = [take(arg, slice(0, 1), b) for arg, b in zip(args, batched, strict=True)]
        try:
            Trial(self.model, form, one)  # fills what the model caches for this size
            return self._traced(one, None, form)
        except (CaptureError, InputError) as second:
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

    def _compare(self, trial: Trial, captured: Captured, batch: int) -> None:
        """Whether the graph computes what the model does."""
        if self.allow_random or (captured.per_sample and batch > 1):
            return
        parameters = captured.bind(self.model)
        if parameters is None:
            return
        with torch.no_grad(), no_autocast(trial.args), self._memory:
            values = self._values(captured, parameters, trial.args)
            run = captured.program.forward(values)
            trial.check(run.values[run.output])

    # ---- run ----------------------------------------------------------------------------------

    def _run(
        self,
        captured: Captured,
        parameters: dict[Node, Tensor],
        args: Sequence[Any],
        rows: slice,
        start: StartFunction | Sequence[StartFunction],
        measure_delta: bool,
    ) -> Explanation:
        graph = captured.program.graph
        with torch.no_grad(), no_autocast(args):
            values = self._values(captured, parameters, args)
            inputs = {n: values[n] for n in graph.inputs if isinstance(values[n], Tensor)}
            starts = [start] if callable(start) else start
            task = Task(
                captured.program,
                values,
                inputs,
                captured.explained,
                _at(starts[0], rows),
                rows.stop - rows.start,
                measure_delta,
            )
            if callable(start):
                result, totals = self.recordings.run(task) if self.recordings else task.run()
                if not _is_sound(totals, result):
                    result = self._run_wide(replace(task, program=captured.plain))
                return Explanation(self._parts(captured, values, result), result.delta)
            run = task.forward()
            output = run.values[run.output]
            found = []
            for begin in starts:
                # Each pass back drops what it has read.
                again = replace(
                    run, values=dict(run.values), scratch=dict(run.scratch), checked=[*run.checked]
                )
                from_here = _at(begin, rows)
                result, totals = task.back(again, *from_here(output))
                if not _is_sound(totals, result):
                    wide = replace(task, program=captured.plain, begin=from_here)
                    result = self._run_wide(wide)
                found.append(Explanation(self._parts(captured, values, result), result.delta))
        return _stacked(found)

    def _parts(self, captured: Captured, values: dict[Node, Any], result: Result) -> list[Tensor]:
        """Relevance at the values asked for."""
        graph, parts = captured.program.graph, []
        for node in captured.wanted:
            part = result.relevance.get(node)
            if node in captured.becomes:
                at = [(v, i, result.relevance.get(v)) for v, i in captured.becomes[node]]
                met = [(v, i, r) for v, i, r in at if r is not None]
                part = at_numbers(graph, values, node, met)
            if part is None:  # nothing arrived: no way leads there from the output
                like = result.likes.get(node, values.get(node))
                assert like is not None
                part = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            parts.append(part)
        return parts

    def _values(
        self, captured: Captured, parameters: dict[Node, Tensor], args: Sequence[Any]
    ) -> dict[Node, Any]:
        """The values of the graph's placeholders."""
        graph = captured.program.graph
        values: dict[Node, Any] = {**graph.constants, **parameters}
        for node, value in zip(graph.inputs, flatten_arguments(args), strict=True):
            values[node] = value.detach() if isinstance(value, Tensor) else value
        return values

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


def _at(start: StartFunction, rows: slice) -> Begin:
    """The start for these rows."""
    return lambda output: start(output, rows)


def _within(start: StartFunction | Sequence[StartFunction], first: int) -> Any:
    """The start for some of the rows from `first` on."""
    if not callable(start):
        return [_within(one, first) for one in start]
    return lambda output, rows: start(output, slice(first + rows.start, first + rows.stop))


def _stacked(found: Sequence[Explanation]) -> Explanation:
    """Several explanations of the same samples, side by side."""
    pairs = zip(*(one.relevance for one in found), strict=True)
    deltas = [one.delta for one in found if one.delta is not None]
    return Explanation(
        [torch.stack(parts, 1) for parts in pairs], torch.stack(deltas, 1) if deltas else None
    )


def no_autocast(args: Sequence[Any]) -> Any:
    """The captured graph holds the casts it needs; an ambient autocast would add others."""
    device = device_of(args)
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


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
