"""Model and arguments to a program, compared with what the model's own forward computes."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from ..errors import CaptureError, InputError
from ..graph.active import is_number
from ..graph.capture import (
    CapturedGraph,
    OpenCapture,
    capture,
    carries_batch,
    check_eval_mode,
    flatten_arguments,
)
from ..graph.fingerprint import Fingerprint
from ..graph.form import Form
from ..graph.mixing import check_apart
from ..graph.tokens import embeddings
from ..kernels import reference
from ..plan.fusion import fuse
from ..plan.portions import find_portion
from ..plan.steps import Plan, plan
from ..rules import has_rule
from .arguments import Batched, device_of, guesses, has_edges, take
from .open_sizes import OpenSizes
from .program import Program
from .trial import Trial

# Integer input → the values that it becomes, each with its indices.
Becomes = dict[Node, list[tuple[Node, Node]]]
# Its module, its name there, its node, and what it must be like.
_Parameter = tuple[weakref.ref[nn.Module], str, Node, torch.Size, torch.dtype, torch.device]
WantedFunction = Callable[[CapturedGraph, Sequence[Node]], list[Node]]


@dataclass(frozen=True)
class Captured:
    """A program with what must hold for it to be used again.

    Attributes:
        program: What runs.
        plain: The same on the reference kernels, unfused: for numbers that leave float32's range.
        explained: The explained inputs.
        wanted: The values whose relevance is asked for.
        becomes: Where integers among them are embedded.
        parameters: What the program reads of the model anew at every run.
        fingerprint: What it took from the model's modules.
        portion: The most samples that are to go through at a time.
        batched: Which arguments belong to the samples.
        only: The one batch size that it was checked for; None for any.
        rows: Of a graph network, whose arguments belong together: how many rows of scores it
            returns, one for each graph. None where each sample has a row of its own.
    """

    program: Program
    plain: Program
    explained: tuple[Node, ...]
    wanted: tuple[Node, ...]
    becomes: Becomes
    parameters: tuple[_Parameter, ...]
    fingerprint: Fingerprint
    portion: int | None
    batched: Batched
    only: int | None
    rows: int | None

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
            for owner, name, node, shape, dtype, device in self.parameters:
                value = values[node] = _attribute(owner(), name)  # type: ignore[arg-type]
                if value.shape != shape or value.dtype != dtype or value.device != device:
                    return None
        except AttributeError:
            return None
        return values


class Capturing:
    """Makes the programs of one model.

    Attributes:
        model: The unwrapped module.
        layers: Names of the modules whose outputs are asked for; None stands for all leaves.
        fuses: Whether the forward may fold and fuse; otherwise it runs as captured.
        kernels: The backend.
        allow_random: Whether random numbers that forward draws count as constants.
    """

    model: nn.Module
    layers: Sequence[str] | None
    fuses: bool
    kernels: ModuleType
    allow_random: bool
    _open_sizes: OpenSizes
    _memory: AbstractContextManager[Any]

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
        count = trial.output.shape[0] if trial.output.dim() else 1
        is_graph = count != batch and has_edges(args[explained:])
        if batch > 1 and count == 1 and not is_graph:
            raise InputError(
                f"{type(self.model).__name__} returns shape {tuple(trial.output.shape)} for a "
                f"batch of {batch}; an explanation needs one row of scores per sample."
            )
        if is_graph:
            graph, batched = self._only(args, batch, form), carries_batch(args, batch)
        else:
            graph, batched = self._graph(trial, explained, batch, form)
        try:
            made, taps, becomes = self._planned(graph, explained, wanted)
        except CaptureError as error:
            if graph.batch is None:
                raise
            if batch == 1:  # a model that cuts its batch of one still explains that one
                graph = self._only(args, batch, form)
            elif count == batch and not has_edges(args[explained:]):
                # The trial told the samples apart, though the calls alone do not.
                graph = self._single(args, batch, batched, form, error)
            else:
                raise
            made, taps, becomes = self._planned(graph, explained, wanted)
        reachable = [tap for tap in taps if tap in made.layouts]
        plain = Program(graph, made, reference, reachable)
        instructions = None
        if self.fuses:
            made, instructions = fuse(graph, made, taps)
        reachable = [tap for tap in taps if tap in made.layouts]
        program = Program(graph, made, self.kernels, reachable, instructions)
        parameters = tuple(
            (owner, rest, node, value.shape, value.dtype, value.device)
            for node, name in graph.parameters.items()
            for owner, rest in (_owner(self.model, name),)
            for value in (_attribute(owner(), rest),)  # type: ignore[arg-type]
        )
        divides = self.fuses and device_of(args) == "cpu"
        portion = find_portion(graph, made.layouts) if divides else None
        asked = tuple(taps) if wanted else graph.inputs[:explained]
        captured = Captured(
            program, plain, graph.inputs[:explained], asked, becomes, parameters,
            Fingerprint(self.model, trial.root.model), portion, tuple(batched),
            batch if batch == 1 or batched != carries_batch(args, batch) else None,
            count if is_graph else None,
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
                graph = self._opened(trial, batch, form, batched)
                graph = graph or self._traced(args, batch, form, batched)
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
        random = self.allow_random
        return capture(self.model, args, batch, layers, form, batched, random, has_rule)

    def _opened(
        self, trial: Trial, batch: int, form: Form, batched: Batched
    ) -> CapturedGraph | None:
        """The graph, of a capture that leaves open which sizes change from call to call."""
        layers = self._layers()
        autocast = torch.is_autocast_enabled(device_of(trial.args))
        key = (form, autocast, *map(id, layers))
        rest = self.allow_random, has_rule

        def capture(sizes: set[int]) -> OpenCapture:
            return OpenCapture(self.model, trial.args, batch, layers, form, batched, sizes, *rest)

        after = trial.root.model
        return self._open_sizes.graph(self.model, after, key, trial.args, batched, capture)

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
        one_by_one = captured.per_sample and captured.rows is None and batch > 1
        if self.allow_random or one_by_one:
            return
        parameters = captured.bind(self.model)
        if parameters is None:
            return
        with torch.no_grad(), no_autocast(trial.args), self._memory:
            values = self._values(captured, parameters, trial.args)
            run = captured.program.forward(values)
            trial.check(run.values[run.output])

    def _values(
        self, captured: Captured, parameters: dict[Node, Tensor], args: Sequence[Any]
    ) -> dict[Node, Any]:
        """The values of the graph's placeholders."""
        graph = captured.program.graph
        values: dict[Node, Any] = {**graph.constants, **parameters}
        for node, value in zip(graph.inputs, flatten_arguments(args), strict=True):
            values[node] = value.detach() if isinstance(value, Tensor) else value
        return values


def no_autocast(args: Sequence[Any]) -> Any:
    """The captured graph holds the casts it needs; an ambient autocast would add others."""
    device = device_of(args)
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def _owner(model: nn.Module, name: str) -> tuple[weakref.ref[nn.Module], str]:
    """The innermost module on the way to a parameter, and the rest of the way."""
    module = model
    part, dot, rest = name.partition(".")
    while dot and (child := module._modules.get(part)) is not None:
        module, name = child, rest
        part, dot, rest = name.partition(".")
    return weakref.ref(module), name


def _attribute(owner: nn.Module, name: str) -> Tensor:
    value: Any = owner._parameters.get(name)
    if value is None:
        value = owner._buffers.get(name)
    return operator.attrgetter(name)(owner) if value is None else value
