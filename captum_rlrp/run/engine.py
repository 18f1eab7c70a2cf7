"""Model and arguments to relevance: captures once per signature, binds values, runs.

Knows neither Captum nor targets; :mod:`captum_rlrp.attribution` adds those.
"""

from __future__ import annotations

import importlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..errors import CaptureError, RelativeLRPError
from ..graph.capture import CAPTURING
from ..graph.form import PLAIN, Form
from ..graph.tokens import at_numbers
from ..plan.portions import divide
from ..rules import moves
from .arguments import device_of, signature, take
from .capturing import Captured, Capturing, WantedFunction, no_autocast
from .cuda_graphs import CudaGraphs
from .open_sizes import OpenSizes
from .program import Result
from .recording import Recordings
from .starts import StartFunction, at_rows, of_row, within
from .task import Outcome, Task
from .trace import Traces
from .wide import run_wide, unsound

_CACHED_PROGRAMS = 128
_OWN = ("_memory", "_cache", "_open_sizes", "_lock", "recordings")  # see Engine._make_own


@dataclass(frozen=True)
class Explanation:
    """Relevance at each value asked for, with the shape the value has, and the delta."""

    relevance: list[Tensor]
    delta: Tensor | None


@dataclass(frozen=True)
class _Found:
    """An explanation whose totals nobody has read yet: that waits for the device.

    Attributes:
        explanation: What was found.
        totals: What tells whether it can be trusted.
        dtype: Of the relevance.
        captured: What ran.
        parameters: With these parameters of the model.
        args: And these arguments, of the samples that went through together.
        rows: Their rows in the batch.
        start: Where relevance starts.
        task: The task of it all.
    """

    explanation: Explanation
    totals: Tensor
    dtype: torch.dtype
    captured: Captured
    parameters: dict[Node, Tensor]
    args: Sequence[Any]
    rows: slice
    start: StartFunction
    task: Task


class Engine(Capturing):
    """Runs Relative LRP on one model, from any number of threads.

    Args:
        model: The unwrapped module.
        kernels: The backend.
        fuses: Whether the forward may fold and fuse; otherwise it runs as captured.
        layers: Names of the modules whose outputs are asked for; None stands for all leaves.
        cuda_graphs: Whether to record explanations as CUDA graphs on a GPU.
        form: How the model is called, and which output counts.
        allow_random: Whether random numbers that forward draws count as constants.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: ModuleType,
        fuses: bool = True,
        layers: Sequence[str] | None = (),
        cuda_graphs: bool = False,
        form: Form = PLAIN,
        allow_random: bool = False,
    ) -> None:
        self.model = model
        self.layers = layers
        self.fuses = fuses
        self.cuda_graphs = cuda_graphs
        self.form = form
        self.allow_random = allow_random
        self.kernels = kernels
        self._make_own()

    def _make_own(self) -> None:
        """What belongs to this process."""
        self._memory = self.kernels.working_memory()
        self._cache: OrderedDict[Hashable, Captured] = OrderedDict()
        self._open_sizes = OpenSizes()
        self._lock = threading.Lock()
        traces = Recordings(Traces())
        graphs = Recordings(CudaGraphs()) if self.cuda_graphs else traces
        self.recordings = {"cpu": traces, "cuda": graphs} if self.fuses else {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: a copy captures anew."""
        state = {name: value for name, value in vars(self).items() if name not in _OWN}
        state["kernels"] = self.kernels.__name__
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.kernels = importlib.import_module(state["kernels"])
        self._make_own()

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
        batch = inputs[0].shape[0] if batch is None else batch
        captured, parameters = self._bound(args, len(inputs), batch, wanted, key, form)
        size, portion = internal_batch_size or batch, captured.portion or batch
        if captured.per_sample:
            size = 1
        elif internal_batch_size is None and portion < batch:
            size = divide(batch, portion)
        with self._memory:
            if captured.rows is not None:
                return self._run_graphs(captured, parameters, args, start, measure_delta)
            if size >= batch:
                rows = slice(0, batch)
                found = self._run(captured, parameters, args, rows, start, measure_delta)
                return self._settled(found, start)
            parts: list[Explanation | list[_Found]] = []
            for first in range(0, batch, size):
                rows = slice(first, min(first + size, batch))
                pairs = zip(args, captured.batched, strict=True)
                some = tuple(take(arg, rows, batched) for arg, batched in pairs)
                if captured.program.graph.guards:  # forward may take another way
                    begin = within(start, rows.start)
                    few, rest = some[: len(inputs)], some[len(inputs) :]
                    parts.append(
                        self.explain(few, rest, begin, wanted, key, measure_delta, None, form)
                    )
                else:
                    parts.append(self._run(captured, parameters, some, rows, start, measure_delta))
            settled = [p if isinstance(p, Explanation) else self._settled(p, start) for p in parts]
        relevance = [
            torch.cat(values) for values in zip(*(p.relevance for p in settled), strict=True)
        ]
        deltas = [part.delta for part in settled if part.delta is not None]
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
        kinds = signature(list(args), batch)
        name: Hashable = (key, explained, form, torch.is_autocast_enabled(device_of(args)), kinds)
        with self._lock:
            found = self._cache.get(name)
            if found is not None and not found.admits(batch):
                with CAPTURING:
                    holds = found.only == 1 and self._holds_for(found, args, batch, form)
                if holds:
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
            try:
                made = self._capture(args, explained, batch, wanted, form)
            except RelativeLRPError:
                if not self._open_sizes.refuse():
                    raise
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

    def _run_graphs(
        self,
        captured: Captured,
        parameters: dict[Node, Tensor],
        args: Sequence[Any],
        start: StartFunction | Sequence[StartFunction],
        measure_delta: bool,
    ) -> Explanation:
        """The graphs of one call, each in a pass of its own; no node is of two graphs."""
        assert captured.rows is not None
        runs = [
            self._run(captured, parameters, args, slice(0, 1), of_row(start, row), measure_delta)
            for row in range(captured.rows)
        ]
        parts = [self._settled(found, start) for found in runs]
        pairs = zip(*(part.relevance for part in parts), strict=True)
        relevance = [sum(values[1:], values[0]) for values in pairs]
        deltas = [part.delta for part in parts if part.delta is not None]
        return Explanation(relevance, torch.cat(deltas) if deltas else None)

    # ---- run ----------------------------------------------------------------------------------

    def _run(
        self,
        captured: Captured,
        parameters: dict[Node, Tensor],
        args: Sequence[Any],
        rows: slice,
        start: StartFunction | Sequence[StartFunction],
        measure_delta: bool,
    ) -> list[_Found]:
        """What is found for each start, without waiting for the device."""
        with torch.no_grad(), no_autocast(args):
            values = self._values(captured, parameters, args)
            starts = [start] if callable(start) else start
            task = Task(
                captured.program,
                values,
                captured.explained,
                at_rows(starts[0], rows),
                rows.stop - rows.start,
                measure_delta,
            )

            def found(begin: StartFunction, task: Task, outcome: Outcome) -> _Found:
                result, totals = outcome
                kinds = {r.dtype for r in result.relevance.values() if r is not None}
                dtype = torch.float64 if torch.float64 in kinds else torch.float32
                parts = Explanation(self._parts(captured, values, result), result.delta)
                return _Found(parts, totals, dtype, captured, parameters, args, rows, begin, task)

            if callable(start):
                device = task.device
                recordings = None if device is None else self.recordings.get(device.type)
                outcome = task.run() if recordings is None else recordings.run(task)
                return [found(start, task, outcome)]
            run = task.forward()
            output = run.values[run.output]
            several = []
            for begin in starts:
                # Each pass back drops what it has read.
                again = replace(
                    run, values=dict(run.values), scratch=dict(run.scratch), checked=[*run.checked]
                )
                task = replace(task, begin=at_rows(begin, rows))
                several.append(found(begin, task, task.back(again, *task.begin(output))))
        return several

    def _settled(
        self, found: Sequence[_Found], start: StartFunction | Sequence[StartFunction]
    ) -> Explanation:
        """What was found for one start, or for several side by side, once it is to be trusted."""
        with torch.no_grad(), no_autocast(found[0].args):
            settled = [self._trusted(one) for one in found]
        return settled[0] if callable(start) else _stacked(settled)

    def _trusted(self, found: _Found) -> Explanation:
        """The explanation; samples that float32 could not hold are explained in float64."""
        explanation, captured, task = found.explanation, found.captured, found.task
        weak, graph = unsound(found.totals, found.dtype, task.batch), captured.program.graph
        if len(weak) == task.batch or (weak and (graph.guards or not captured.admits(1))):
            result = run_wide(replace(task, program=captured.plain))
            return Explanation(self._parts(captured, task.values, result), result.delta)
        for i in weak:
            one = slice(i, i + 1)
            pairs = zip(found.args, captured.batched, strict=True)
            values = self._values(captured, found.parameters, [take(a, one, b) for a, b in pairs])
            first = found.rows.start + i
            begin = at_rows(found.start, slice(first, first + 1))
            wide = run_wide(
                Task(captured.plain, values, task.explained, begin, 1, task.measure_delta)
            )
            for whole, part in zip(
                explanation.relevance, self._parts(captured, values, wide), strict=True
            ):
                whole[one] = part
            if explanation.delta is not None and wide.delta is not None:
                explanation.delta[one] = wide.delta
        return explanation

    def _parts(
        self, captured: Captured, values: Mapping[Node, Any], result: Result
    ) -> list[Tensor]:
        """Relevance at the values asked for."""
        graph, parts = captured.program.graph, []
        for node in captured.wanted:
            part = result.relevance.get(node)
            if node in captured.becomes:
                at = [(v, i, result.relevance.get(v)) for v, i in captured.becomes[node]]
                met = [(v, i, r) for v, i, r in at if r is not None]
                part = at_numbers(graph, values, node, met, moves)
            if part is None:  # nothing arrived: no way leads there from the output
                like = result.likes.get(node, values.get(node))
                assert like is not None
                part = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            parts.append(part)
        return parts


def _stacked(found: Sequence[Explanation]) -> Explanation:
    """Several explanations of the same samples, side by side."""
    pairs = zip(*(one.relevance for one in found), strict=True)
    deltas = [one.delta for one in found if one.delta is not None]
    return Explanation(
        [torch.stack(parts, 1) for parts in pairs], torch.stack(deltas, 1) if deltas else None
    )
