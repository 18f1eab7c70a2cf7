"""Steps to a run: one forward that keeps what the rules read, one relevance pass in reverse."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import NonFiniteError
from ..graph.capture import CapturedGraph, place_of
from ..graph.layout import channels_last
from ..kernels import compiled
from ..plan.instructions import Instruction, batch_norms
from ..plan.steps import Plan, Single, Step
from ..rules import Like, Pass
from ..rules.passthrough import PassThrough
from ..rules.skip import Sum
from .calls import own_call
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


# A call of the forward: its node, what makes the value, all nodes it stands for, those freed then.
_Step = tuple[Node, Callable[[Pass], Any], Sequence[Node], list[Node]]


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
        self.measured = frozenset(n for n in graph.nodes if n in plan.layouts)
        # Activation → its operand, where an infinity could vanish without a trace.
        self.saturates = {
            step.output: step.carriers[0]
            for step in plan.steps
            if isinstance(step, Single)
            and isinstance(step.rule, PassThrough)
            and step.rule.saturates(step.call)
        }
        self.given = [n for n in graph.nodes if n.op == "placeholder" and n in self.measured]
        self.calls = self._calls()
        # A kept value is freed as soon as the last step that reads it is done.
        made = groups(plan.steps, plan.layouts)
        seen: set[Node] = set()
        self.back: list[tuple[Step, list[Node], list[Node]]] = []
        for i, step in enumerate(plan.steps):
            freed = [n for n in dict.fromkeys(step.needs) if n not in seen]
            self.back.insert(0, (step, made.get(i, []), freed))
            seen.update(step.needs)

    def _calls(self) -> list[_Step]:
        """What the forward does."""
        covered = {n for made in self.instructions.values() for n in made.covers}
        calls: list[_Step] = []
        last: dict[Node, list[Node]] = {}
        for node in self.graph.nodes:
            made = self.instructions.get(node)
            if node.op != "call_function" or (made is None and node in covered):
                continue
            freed: list[Node] = []
            last.update(dict.fromkeys(made.reads if made else node.all_input_nodes, freed))
            covers = made.covers if made else (node,) if node in self.measured else ()
            calls.append((node, made or self._plain(node), covers, freed))
        for node, freed in last.items():
            if node not in self.plan.kept and node is not self.graph.output:
                freed.append(node)
        return calls

    def _plain(self, node: Node) -> Callable[[Pass], Any]:
        """The call as captured; where an infinity could vanish in it, its operand is checked."""
        target: Any = node.target
        if self.kernels is compiled:
            target = own_call(node) or target
        args, kwargs, operand = node.args, node.kwargs, self.saturates.get(node)

        def call(run: Pass) -> Any:
            if operand in run.values:
                run.watch(run.values[operand])
            return target(*run.value(args), **(run.value(kwargs) if kwargs else kwargs))

        return call

    def forward(self, given: Mapping[Node, Any]) -> Pass:
        """Runs the model on the values of its placeholders."""
        run = Pass(self.kernels, dict(given), {}, self.plan.layouts, self.graph.output)
        values, likes = run.values, run.likes
        for node in self.given:
            likes[node] = _like(values[node])
        if self.instructions:
            # One conversion here keeps every image channels_last to the end.
            for node in self.plan.roots:
                if node.op == "placeholder":
                    values[node] = channels_last(values[node])
        for norms in self.norms:
            norms(run)
        for node, make, covers, freed in self.calls:
            values[node] = value = make(run)
            if covers:
                like = _like(value)
                for covered in covers:
                    likes[covered] = like
            for done in freed:
                values.pop(done, None)
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
        for step, read, freed in self.back:
            # On a CPU kernels read without the sign, or a layer's are made when it is its turn.
            if read and start.device.type == "cuda":
                run.magnitudes.update(magnitudes(read, run.values))
            terms = arrived.pop(step.output, None)
            if terms is not None:
                r = run.total(step.output, terms)
                if step.output in relevance:
                    relevance[step.output] = _own(r)
                for node, part in zip(step.carriers, step.propagate(run, r), strict=True):
                    arrived.setdefault(node, []).append(part)
            for node in freed:
                run.values.pop(node, None)
                run.magnitudes.pop(node, None)
        for node in relevance:
            if node in arrived:
                relevance[node] = _own(run.total(node, arrived[node]))
        return Result(relevance, run.violation, run.likes)


def _like(value: Tensor) -> Like:
    return Like(value.shape, value.dtype, value.device, value.stride())


def _own(r: Tensor) -> Tensor:
    """A copy in memory that outlives the run: the kernels' working memory does not."""
    return r.clone()


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
    checked = [torch.cat(run.checked)] if run.checked else []
    masses = [
        run.samples_first(node, r).reshape(run.batch, -1).abs().sum(1)
        for node, r in result.relevance.items()
        if r is not None
    ]
    mass = sum(masses[1:], masses[0]) if masses else values[-1].new_zeros(run.batch)
    return torch.cat([run.kernels.sums([*values, *checked]), mass])
