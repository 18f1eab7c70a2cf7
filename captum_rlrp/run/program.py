"""Steps to a run: one forward that keeps what the rules read, one relevance pass in reverse."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import NonFiniteError
from ..graph.capture import CapturedGraph, place_of
from ..graph.layout import channels_last, memory_format
from ..plan.instructions import Instruction, batch_norms
from ..plan.steps import Plan, Single
from ..rules import Like, Pass
from ..rules.passthrough import PassThrough
from ..rules.skip import Sum
from .magnitudes import groups, magnitudes


@dataclass(frozen=True)
class Result:
    """Outcome of a run.

    Attributes:
        relevance: Relevance at each value asked for; None where none arrived.
        delta: Largest violation of the local law per sample, shape ``(batch,)``, if measured.
        likes: Shapes of the model's values.
    """

    relevance: dict[Node, Tensor | None]
    delta: Tensor | None
    likes: Mapping[Node, Like]


class Program:
    """A captured graph with its plan; holds no tensor but the constants of the forward.

    Args:
        graph: The captured model.
        plan: Its steps.
        kernels: The backend that does the arithmetic.
        wanted: The values whose relevance is asked for.
        instructions: What the forward does in place of the calls; nothing by default.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        plan: Plan,
        kernels: ModuleType,
        wanted: Collection[Node],
        instructions: Mapping[Node, Instruction] | None = None,
    ) -> None:
        self.graph = graph
        self.plan = plan
        self.kernels = kernels
        self.wanted = tuple(wanted)
        self.instructions = instructions or {}
        self.norms = batch_norms(self.instructions.values())
        covered = {n for made in self.instructions.values() for n in made.covers}
        self.calls = [
            node
            for node in graph.nodes
            if node.op == "call_function" and (node in self.instructions or node not in covered)
        ]
        self.measured = frozenset(n for n in graph.nodes if n in plan.layouts)
        # Activation → its operand, where an infinity could vanish without a trace.
        self.saturates = {
            step.output: step.carriers[0]
            for step in plan.steps
            if isinstance(step, Single)
            and isinstance(step.rule, PassThrough)
            and step.rule.saturates(step.call)
        }
        last: dict[Node, int] = {}
        for i, node in enumerate(self.calls):
            made = self.instructions.get(node)
            for source in made.reads if made is not None else node.all_input_nodes:
                last[source] = i
        keep = plan.kept | {graph.output}
        self.released: list[list[Node]] = [[] for _ in self.calls]
        for node, i in last.items():
            if node not in keep:
                self.released[i].append(node)
        # A kept value is freed as soon as the last step that reads it is done.
        self.finished: list[list[Node]] = [[] for _ in plan.steps]
        self.magnitudes = groups(plan.steps, plan.layouts)
        seen: set[Node] = set()
        for i, step in enumerate(plan.steps):
            for node in step.needs:
                if node not in seen:
                    seen.add(node)
                    self.finished[i].append(node)

    def forward(self, values: Mapping[Node, Any]) -> Pass:
        """Runs the model on the values of its placeholders."""
        run = Pass(self.kernels, dict(values), {}, self.plan.layouts, self.graph.output)
        values = run.values
        for node in self.graph.nodes:
            if node in values and node in self.measured:
                run.likes[node] = _like(values[node])
        if self.instructions:
            # One conversion here keeps every image channels_last to the end.
            for node in self.plan.roots:
                if node.op == "placeholder":
                    run.values[node] = channels_last(values[node])
        for norms in self.norms:
            norms(run)
        for i, node in enumerate(self.calls):
            made = self.instructions.get(node)
            if made is not None:
                value = made(run)
                for covered in made.covers:
                    run.likes[covered] = _like(value)
            else:
                operand = self.saturates.get(node)
                if operand in values:
                    run.check(values[operand].sum(dtype=torch.float64))
                value = node.target(*run.value(node.args), **run.value(node.kwargs))  # type: ignore[operator]
                if node in self.measured:
                    run.likes[node] = _like(value)
            run.values[node] = value
            for done in self.released[i]:
                run.values.pop(done, None)
        return run

    def propagate(
        self, run: Pass, start: Tensor, column: Tensor | None, batch: int, measure_delta: bool
    ) -> Result:
        """Carries relevance from the output to the values asked for.

        Args:
            run: The forward.
            start: Relevance at the output.
            column: Where it is one-hot along dimension 1, the column of its 1 per sample.
            batch: Number of samples.
            measure_delta: Whether to measure the violation of the local law.
        """
        run.batch, run.column = batch, column
        if measure_delta:
            run.violation = torch.zeros(batch, dtype=torch.float64, device=start.device)
        arrived = run.arrived = {self.graph.output: [start]}
        relevance: dict[Node, Tensor | None] = dict.fromkeys(self.wanted)
        for i in reversed(range(len(self.plan.steps))):
            step = self.plan.steps[i]
            # On a CPU kernels read without the sign, or a layer's are made when it is its turn.
            if i in self.magnitudes and start.device.type == "cuda":
                run.magnitudes.update(magnitudes(self.magnitudes[i], run.values))
            terms = arrived.pop(step.output, None)
            if terms is not None:
                r = terms[0] if len(terms) == 1 else self.kernels.add(terms)
                if step.output in relevance:
                    relevance[step.output] = _own(r)
                for node, part in zip(step.carriers, step.propagate(run, r), strict=True):
                    arrived.setdefault(node, []).append(part)
            for node in self.finished[i]:
                run.values.pop(node, None)
                run.magnitudes.pop(node, None)
        for node in relevance:
            if node in arrived:
                terms = arrived[node]
                relevance[node] = _own(terms[0] if len(terms) == 1 else self.kernels.add(terms))
        return Result(relevance, run.violation, run.likes)


def _like(value: Tensor) -> Like:
    return Like(value.shape, value.dtype, value.device, memory_format(value))


def _own(r: Tensor) -> Tensor:
    """A copy in memory that outlives the run: the kernels' working memory does not."""
    return torch.empty_like(r).copy_(r)


def find_non_finite(program: Program, values: Mapping[Node, Any]) -> NonFiniteError | None:
    """Runs the forward once more, looking at every value, to name the first that is not finite.

    An infinity is passed over where the model means it: a mask in front of a softmax or a maximum,
    or in the computation of a gate.
    """
    run = Pass(program.kernels, dict(values), {}, program.plan.layouts, program.graph.output)
    met = set(program.saturates.values()) | program.plan.kept | {program.graph.output}
    for step in program.plan.steps:
        if isinstance(step, Single) and isinstance(step.rule, Sum):
            met.update(step.carriers)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.target(*run.value(node.args), **run.value(node.kwargs))  # type: ignore[operator]
        run.values[node] = value
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if node in program.measured and not value.isfinite().all():
            is_nan = bool(value.isnan().any())
            if node in met or is_nan:
                return NonFiniteError(
                    f"The model produces {'NaN' if is_nan else 'infinite values'} at "
                    f"{node.target} in {place_of(node)}; an explanation needs finite values. Check "
                    "the weights and the scale of the inputs, or use a wider dtype (float32, "
                    "bfloat16)."
                )
    return None


def totals(run: Pass, values: Sequence[Tensor], result: Result) -> Tensor:
    """What tells whether an explanation can be trusted, in one tensor: a look waits for the device.

    Args:
        run: The run.
        values: The floating-point inputs and the output.
        result: What came of it.

    Returns:
        In float64: the sum of each value, of :attr:`Pass.checked`, and the absolute relevance
        of each sample, summed.
    """
    checked = [torch.cat([c.double() for c in run.checked])] if run.checked else []
    masses = torch.zeros(run.batch, dtype=torch.float64, device=values[-1].device)
    for node, r in result.relevance.items():
        if r is not None:
            masses += run.samples_first(node, r).reshape(run.batch, -1).abs().sum(1)
    return torch.cat([run.kernels.sums([*values, *checked]), masses])
