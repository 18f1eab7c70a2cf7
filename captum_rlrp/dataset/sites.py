"""Relevance at the inputs and at layers of a model, batch by batch, from one pass each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..attribution import Backend
from ..errors import InputError
from ..graph.capture import CapturedGraph, unwrap
from ..graph.layers import layer_calls, leaf_calls, module_names, tied_names
from ..kernels import get_backend, is_reference_forced
from ..plan.steps import Final, Plan
from ..run.capturing import Captured
from ..run.engine import Engine
from ..run.starts import StartFunction
from ..targets import start_at


class ChosenStart:
    """One unit of relevance where `choose` says, once the model's output is there.

    Args:
        choose: Scores of some rows of the batch and which these are → a column for each.
        batch: Number of samples.
        model: Named in errors.

    Attributes:
        scores, columns: What the model returned and what was chosen, for all samples.
    """

    def __init__(
        self, choose: Callable[[Tensor, slice], Tensor], batch: int, model: nn.Module
    ) -> None:
        self._choose, self._batch, self._model = choose, batch, model
        self.scores = self.columns = torch.empty(0)

    def __call__(self, output: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """The start in these rows; a batch may go through in portions, or twice."""
        if output.dim() != 2:
            raise InputError(
                f"The model returns shape {tuple(output.shape)}; over a data set it must return "
                "one row of scores per sample."
            )
        columns = self._choose(output, rows)
        if len(self.scores) != self._batch:
            self.scores = output.new_empty((self._batch, output.shape[1]))
            self.columns = columns.new_empty(self._batch)
        self.scores[rows], self.columns[rows] = output.detach(), columns
        return start_at(columns, len(output), self._model, output, slice(0, len(output)))


class Sites:
    """The places of a model at which relevance is looked at.

    Args:
        model: In eval mode.
        layers: Some of its modules.
        leaves: Whether every leaf that carries relevance is looked at besides.
        backend: As for :class:`RelativeLRP`.

    Attributes:
        names: ``"input"`` (``"input 0"``, … where there are several; none of integers) and the
            layers in order of execution, further calls as ``"name#2"``. Known after a batch.
        edges: Pairs (earlier, later) of them between which relevance goes.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], leaves: bool, backend: Backend
    ) -> None:
        self.model, self.leaves = model, leaves
        self.layers = [unwrap(layer) for layer in layers]
        named = None if leaves else [module_names(model, layer)[0] for layer in self.layers]
        fuses = not is_reference_forced(backend)
        self._engine = Engine(model, get_backend(backend), fuses, layers=named)
        self._sites: dict[tuple[Node, ...], list[tuple[str, Node]]] = {}
        self.names: list[str] = []
        self.edges: list[tuple[str, str]] = []

    def explain(
        self,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...],
        start: StartFunction,
        measure_delta: bool = False,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Relevance at each site, samples first, and the delta if it is measured.

        Args:
            inputs: What is explained.
            additional: Further arguments of the model.
            start: Where relevance starts, as the engine takes it.
            measure_delta: Whether to measure the violation of the local law.
        """
        batch = len(inputs[0])
        explanation = self._engine.explain(
            inputs, additional, start, self._wanted, measure_delta=measure_delta
        )
        captured = self._engine.captured((*inputs, *additional), len(inputs), batch, self._wanted)
        sites = self._sites[captured.wanted]
        if not self.names:
            self.names = [name for name, _ in sites]
            self.edges = _edges(captured.program.plan, sites)
        by_node = dict(zip(captured.wanted, explanation.relevance, strict=True))
        found = {name: _samples_first(captured, node, by_node[node], batch) for name, node in sites}
        return found, explanation.delta

    def _wanted(self, graph: CapturedGraph, explained: Sequence[Node]) -> list[Node]:
        sites = self._find(graph, explained)
        nodes = list(dict.fromkeys(node for _, node in sites))
        self._sites[tuple(nodes)] = sites
        return nodes

    def _find(self, graph: CapturedGraph, explained: Sequence[Node]) -> list[tuple[str, Node]]:
        """Name and value of each, in order of execution."""
        inputs = [node for node in explained if node.meta["val"].is_floating_point()]
        names = ["input"] if len(inputs) == 1 else [f"input {i}" for i in range(len(inputs))]
        groups = leaf_calls(self.model, graph, explained) if self.leaves else []
        for layer in self.layers:
            known, tied = module_names(self.model, layer), tied_names(self.model, layer)
            if known[0] not in dict(groups):
                groups.append((known[0], layer_calls(graph, explained, known, False, tied)))
        sites = [
            (name if i == 0 else f"{name}#{i + 1}", node)
            for name, nodes in groups
            for i, node in enumerate(nodes)
        ]
        position = {node: i for i, node in enumerate(graph.nodes)}
        sites.sort(key=lambda site: position[site[1]])
        return [*zip(names, inputs, strict=True), *sites]


def _edges(plan: Plan, sites: Sequence[tuple[str, Node]]) -> list[tuple[str, str]]:
    """Pairs of sites that relevance goes between without meeting another."""
    back: dict[Node, Collection[Node]] = {}
    for step in plan.steps:
        if isinstance(step, Final):
            back.update({call.node: (rule.operand(call),) for rule, call in step.links})
        else:
            back[step.output] = step.carriers
    names: dict[Node, str] = {}
    for name, node in sites:
        names.setdefault(node, name)
    edges = []
    for node, name in names.items():
        reached: dict[Node, None] = {}
        pending = list(back.get(node, ()))
        while pending:
            source = pending.pop(0)
            if source not in reached:
                reached[source] = None
                pending += () if source in names else back.get(source, ())
        edges += [(names[source], name) for source in reached if source in names]
    return edges


def _samples_first(captured: Captured, node: Node, relevance: Tensor, batch: int) -> Tensor:
    if captured.per_sample:
        return relevance
    return captured.program.plan.layouts[node].samples_first(relevance, batch)
