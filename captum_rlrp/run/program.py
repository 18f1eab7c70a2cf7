"""Steps to a run: one forward that keeps what the rules read, one relevance pass in reverse."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import NonFiniteError
from ..graph.capture import CapturedGraph, place_of, unshared
from ..graph.layout import Layout, memory_format
from ..kernels.reference import same_layout
from ..plan.instructions import Instruction, ReluInPlace, batch_norms
from ..plan.sections import Plan, Single
from ..rules import Call, Part, Relevance
from ..rules.passthrough import PassThrough
from ..rules.skip import Sum


class Like(NamedTuple):
    """What is remembered of a value that was not kept."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format


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
        self.watched = {
            node: operand
            for node, operand in self.saturates.items()
            if not isinstance(self.instructions.get(node), ReluInPlace)
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
        seen: set[Node] = set()
        for i, step in enumerate(plan.steps):
            for node in step.needs:
                if node not in seen:
                    seen.add(node)
                    self.finished[i].append(node)
        # What a fused run may write over once it was read for the last time.
        overwritable = unshared(graph) - {graph.output} if self.instructions else frozenset()
        self.spent = [overwritable.intersection(nodes) for nodes in self.finished]

    def forward(self, values: Mapping[Node, Any]) -> Run:
        """Runs the model on the values of its placeholders."""
        return Run(self, dict(values))


class Run:
    """One forward and the relevance pass over it. Rules read it; nothing outlives it."""

    def __init__(self, program: Program, values: dict[Node, Any]) -> None:
        self.program = program
        self.kernels = program.kernels
        self.batch = 1
        self.measures_delta = False
        self.scratch: dict[Any, Any] = {}  # what an instruction leaves for the pass back
        self._values = values
        self._likes: dict[Node, Like] = {}
        self._taps: dict[Node, list[Relevance]] = {}
        self._masses: list[Tensor] = []
        self._spent: frozenset[Node] = frozenset()  # values nobody reads after the present step
        self._watched: list[Tensor] = []
        self._energies: dict[Node, float] = {}  # upper bounds of Σx²
        self._delta: Tensor | None = None
        self._column: Tensor | None = None
        for node in program.graph.nodes:
            if node in values and node in program.measured:
                self._remember(values[node], node)
        if program.instructions:
            # One conversion here keeps every image channels_last to the end.
            for node in program.plan.roots:
                if node.op == "placeholder":
                    values[node] = _channels_last(values[node])
        for norms in program.norms:
            norms(self)
        for i, node in enumerate(program.calls):
            made = program.instructions.get(node)
            if node in program.watched and program.watched[node] in values:
                self.watch(values[program.watched[node]])
            if made is not None:
                value = made(self)
                self._remember(value, *made.covers)
            else:
                value = node.target(*self._resolve(node.args), **self._resolve(node.kwargs))  # type: ignore[operator]
                if node in program.measured:
                    self._remember(value, node)
            values[node] = value
            for done in program.released[i]:
                values.pop(done, None)
        self.output: Tensor = values[program.graph.output]

    def _remember(self, value: Tensor, *nodes: Node) -> None:
        like = Like(value.shape, value.dtype, value.device, memory_format(value))
        for node in nodes:
            self._likes[node] = like

    def _resolve(self, argument: Any) -> Any:
        if isinstance(argument, Node):
            return self._values[argument]
        if isinstance(argument, (list, tuple)):
            return type(argument)([self._resolve(item) for item in argument])
        if isinstance(argument, dict):
            return {key: self._resolve(item) for key, item in argument.items()}
        if isinstance(argument, slice):
            return slice(*map(self._resolve, (argument.start, argument.stop, argument.step)))
        return argument

    # ---- what rules read ----------------------------------------------------------------------

    def value(self, argument: Any) -> Any:
        """The value of a node, or of an argument made of nodes."""
        return self._values[argument] if type(argument) is Node else self._resolve(argument)

    def like(self, node: Node) -> Like:
        """Shape, dtype and device of a value, kept or not."""
        return self._likes[node]

    def start_column(self, node: Node) -> Tensor | None:
        """At the output, where one unit of relevance starts: its column for each sample."""
        return self._column if node is self.program.graph.output else None

    def layout(self, node: Node) -> Layout:
        """Where the batch lies in a value."""
        return self.program.plan.layouts[node]

    def evaluate(
        self,
        call: Call,
        values: Mapping[Node, Tensor],
        *,
        dtype: torch.dtype | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Calls the op again with other values for some operands.

        Args:
            call: The call.
            values: Operand → value to use in its place.
            dtype: Floating-point operands are cast to it.
            overrides: Argument name → value to use in its place.
        """
        if dtype is None and values:
            dtype = next(iter(values.values())).dtype

        def fill(argument: Any) -> Any:
            if isinstance(argument, Node):
                if argument in values:
                    value = values[argument]
                elif argument in self._values:
                    value = self._values[argument]
                else:  # an active operand the adjoint does not depend on: its shape will do
                    like = self._likes[argument]
                    value = torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
                if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
                    value = value.to(dtype)
                    return value.clone() if value.is_inference() else value
                return value
            if isinstance(argument, (list, tuple)):
                return type(argument)(fill(item) for item in argument)
            return argument

        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in call.target._schema.arguments:
            value = call.args[parameter.name]
            if overrides and parameter.name in overrides:
                value = overrides[parameter.name]
            if parameter.name == "dtype" and isinstance(value, torch.dtype):
                value = dtype
            if parameter.kwarg_only:
                kwargs[parameter.name] = fill(value)
            else:
                args.append(fill(value))
        result = call.target(*args, **kwargs)
        return result[call.item] if call.item is not None else result

    # ---- relevance arithmetic, per sample ------------------------------------------------------

    def merge(self, node: Node, terms: Sequence[Relevance]) -> Relevance:
        """The sum of what arrived at a value, as one term with its mass."""
        if len(terms) == 1 and terms[0].mass is not None:
            return terms[0]
        layout = self.layout(node)
        views = [(layout.samples_first(t.values, self.batch), t.factor) for t in terms]
        # Fresh memory costs more than the sum: it is written over a term that nobody else reads.
        first = views[0][0]
        ours = (v for (v, _), t in zip(views, terms, strict=True) if t.owned)
        out = next((v for v in ours if same_layout(first, v)), None)
        values, mass = self.kernels.accumulate(views, out=out)
        self._masses.append(mass)
        return Relevance(layout.restore(values, self.like(node).shape), None, mass, owned=True)

    def split(
        self,
        node: Node,
        first: Node,
        a: Tensor,
        b: Tensor,
        terms: Sequence[Relevance],
        from_sum: bool = False,
    ) -> tuple[Relevance, Relevance]:
        """Both shares of a sum.

        Args:
            node: The sum.
            first: The node that `a` is the value of.
            a: The first summand; with `from_sum`, relu(a + b).
            b: The second.
            terms: What arrived at the sum.
            from_sum: What `a` is.
        """
        layout, shape = self.layout(node), self.like(node).shape
        views = [(layout.samples_first(t.values, self.batch), t.factor) for t in terms]
        dtype = terms[0].values.dtype
        a, b = (layout.samples_first(v.to(dtype), self.batch) for v in (a, b))
        inplace = first in self._spent and terms[0].owned and a.data_ptr() != b.data_ptr()
        r_a, s_a, r_b, s_b = self.kernels.split(a, b, views, from_sum=from_sum, inplace=inplace)
        self._masses += [s_a, s_b]
        return (
            Relevance(layout.restore(r_a, shape), None, s_a, owned=True),
            Relevance(layout.restore(r_b, shape), None, s_b, owned=True),
        )

    def carry(
        self,
        node: Node,
        g: Tensor,
        r: Relevance,
        *,
        may_overwrite: bool = False,
        part: Part | None = None,
    ) -> Relevance:
        """``v ⊙ g``, carried to the mass of `r`: the rule of method.md §2 at the value `node`.

        Args:
            node: The value.
            g: What it is multiplied by.
            r: Relevance at the end of the section.
            may_overwrite: Whether the memory of g may be used.
            part: Where g lies in the value, if it is 0 elsewhere.
        """
        assert r.mass is not None
        layout, shape = self.layout(node), g.shape
        v = self._values[node] if part is None else self._values[node][part]
        if v.dtype != g.dtype:
            v = v.to(g.dtype)
        v = layout.samples_first(v, self.batch)
        g = layout.samples_first(g, self.batch)
        if part is not None:  # v lies scattered: the result is better laid out as g is
            v, g, may_overwrite = g, v, False
        # Rather over v than over g: the next g then finds the memory of this one free.
        elif node in self._spent and same_layout(v, g):
            v, g, may_overwrite = g, v, True
        q, s = self.kernels.product(v, g, r.factor, inplace=may_overwrite)
        carried = self.carried(layout.restore(q, shape), s, r)
        return carried if part is None else carried._replace(part=part)

    def carried(self, q: Tensor, mass: Tensor, r: Relevance) -> Relevance:
        """Products of that mass, carried to the mass of `r`."""
        assert r.mass is not None
        self._masses.append(mass)
        # Where ‖q‖₁ = 0, q is 0 and stays 0 whatever the factor, as long as that is finite.
        factor = r.mass / mass.clamp_min(_TINY[mass.dtype])
        return Relevance(q, factor, r.mass, owned=True)

    def is_spent(self, node: Node) -> bool:
        """Whether nobody reads a value after this step, and it may be written over."""
        return node in self._spent

    def plain(self, node: Node) -> Tensor | None:
        """A value, if it lies in memory samples first."""
        value: Tensor = self._values[node]
        if self.layout(node) != _PLAIN or value.shape[0] != self.batch or 0 in value.stride():
            return None
        return value

    def whole(self, node: Node, terms: list[Relevance]) -> list[Relevance]:
        """Terms that lie in a part of the value only, written into one that fills all of it."""
        parts = [term for term in terms if term.part is not None]
        if not parts:
            return terms
        result = [term for term in terms if term.part is None]
        for term in parts:
            at = next((i for i, t in enumerate(result) if t.owned), None)
            if at is None:
                like = self.like(node)
                values = torch.empty(
                    like.shape,
                    dtype=term.values.dtype,  # float32 even in a model of 16 bits
                    device=like.device,
                    memory_format=like.memory_format,
                ).zero_()
                values[term.part] = term.values
                result.append(term._replace(values=values, owned=True, part=None))
            else:
                result[at] = self._add_part(node, result[at], term)
        return result

    def _add_part(self, node: Node, term: Relevance, part: Relevance) -> Relevance:
        """Adds a part to what may be written over; the sum keeps the pending factor of that."""
        assert part.factor is not None
        ratio, factor = part.factor, term.factor
        if factor is not None:
            # 0 only where nothing arrived. An infinite ratio would only ever meet zeros.
            factor = torch.where(factor == 0, 1, factor)
            ratio = (ratio / factor).clamp_max(torch.finfo(ratio.dtype).max)
        layout = self.layout(node)
        there = layout.samples_first(term.values[part.part], self.batch)
        values = layout.samples_first(part.values, self.batch)
        _, mass = self.kernels.accumulate([(there, None), (values, ratio)], out=there)
        self._masses.append(mass)
        return Relevance(term.values, factor, None, owned=True)

    def is_tapped(self, node: Node) -> bool:
        """Whether the relevance at this value is asked for."""
        return node in self.program.wanted

    def tap(self, node: Node, terms: list[Relevance]) -> None:
        """Notes the relevance at a value inside a section."""
        self._taps[node] = terms

    def record_delta(self, start: Node, q: Relevance, end: Node, y: Tensor, r: Relevance) -> None:
        """Violation of the local law, |Σ q − Σ (y − b) r| / ‖q‖₁.

        Args:
            start: The section's input.
            q: Relevance there: the products q, and the factor ‖r‖₁ / ‖q‖₁ still to be applied.
            end: Its output.
            y: The output's value less its constant.
            r: Relevance at the output.
        """
        assert q.factor is not None
        assert r.mass is not None

        def total(node: Node, value: Tensor) -> Tensor:
            value = self.layout(node).samples_first(value, self.batch)
            return value.flatten(1).sum(1, dtype=torch.float64) if value.dim() > 1 else value

        left, right = total(start, q.values), total(end, y * r.values)
        if r.factor is not None:
            right = right * r.factor
        violation = (left - right).abs() * q.factor / r.mass
        # Where no mass arrived or ‖q‖₁ = 0 there is nothing to violate.
        carries = q.factor < 0.5 * r.mass / _TINY[q.factor.dtype]
        violation = torch.where(carries, violation, 0.0)
        self._delta = violation if self._delta is None else torch.maximum(self._delta, violation)

    # ---- the pass -----------------------------------------------------------------------------

    def propagate(
        self, start: Tensor, column: Tensor | None, batch: int, measure_delta: bool
    ) -> Result:
        """Carries relevance from the output to the values asked for.

        Args:
            start: Relevance at the output.
            column: Where it is one-hot along dimension 1, the column of its 1 per sample.
            batch: Number of samples.
            measure_delta: Whether to measure the violation of the local law.
        """
        self.batch = batch
        self.measures_delta = measure_delta
        self._column = column
        plan = self.program.plan
        # One unit for each sample.
        unit = start.new_ones(batch)
        self._masses.append(unit)
        arrived = {self.program.graph.output: [Relevance(start, None, unit)]}
        wanted: dict[Node, list[Relevance]] = {}
        for i in reversed(range(len(plan.steps))):
            step = plan.steps[i]
            terms = arrived.pop(step.output, None)
            if terms is not None:
                terms = self.whole(step.output, terms)
                if not measure_delta:  # which reads the value once more
                    self._spent = self.program.spent[i]
                if self.is_tapped(step.output):
                    wanted[step.output] = terms
                    terms = [term._replace(owned=False) for term in terms]
                for node, parts in zip(
                    step.carriers, _apart(step.propagate(self, terms)), strict=True
                ):
                    arrived.setdefault(node, []).extend(parts)
            for node in self.program.finished[i]:
                self._values.pop(node, None)
        self._spent = frozenset()
        wanted.update(self._taps)
        for node in self.program.wanted:
            if node in arrived:
                wanted[node] = arrived[node]
        relevance = {node: self._total(node, wanted.get(node)) for node in self.program.wanted}
        return Result(relevance, self._final_delta(start), self._likes)

    def _total(self, node: Node, terms: list[Relevance] | None) -> Tensor | None:
        if not terms:
            return None
        layout = self.layout(node)
        terms = self.whole(node, terms)
        views = [(layout.samples_first(t.values, self.batch), t.factor) for t in terms]
        # The user keeps it: it must not lie in the kernels' working memory.
        values, mass = self.kernels.accumulate(views, out=torch.empty_like(views[0][0]))
        self._masses.append(mass)
        return layout.restore(values, self.like(node).shape)

    def _final_delta(self, start: Tensor) -> Tensor | None:
        if not self.measures_delta:
            return None
        if self._delta is None:
            return torch.zeros(self.batch, dtype=torch.float64, device=start.device)
        return self._delta

    def watch(self, value: Tensor) -> None:
        """Has :meth:`sums` tell whether a value is finite that an activation is about to hide.

        A sum is finite only if every summand is.
        """
        wide = torch.promote_types(value.dtype, torch.float32)
        self.watch_sum(value.sum(dtype=wide).reshape(1))

    def watch_sum(self, total: Tensor) -> None:
        """The same, where the sums of its parts are known."""
        self._watched.append(total)

    def watch_convolution(
        self,
        source: Node,
        weight: Tensor,
        mass: Tensor | None,
        bias: Tensor | None,
        other: Node | None,
        result: Node | None,
        y: Tensor,
    ) -> None:
        """The same for oneDNN's convolution with a ReLU, whose operand was never stored: by bounds.

        By Cauchy and Schwarz |Σ w x|² ≤ Σw² Σx², and Σx² of the next convolution's input follows
        from this one's: few images need a pass of their own. Each filter's Σw² is at most (Σ|w|)²,
        which is `mass` squared.
        """
        of_weight = _energy(weight if mass is None else mass)
        of_bias = 0.0 if bias is None else _energy(bias)
        known = self._energies.get(source, math.inf)
        if not known * of_weight < _LARGE:
            known = self._energies[source] = _energy(self._values[source])
        if not known * of_weight + of_bias < _LARGE:
            self._watched.append(y.new_full((1,), math.inf))
            return
        if result is None:
            return
        # Each x meets every tap of a filter at most once; each bias every place.
        places = y.numel() // len(weight)
        bound = 2 * (math.prod(weight.shape[2:]) * of_weight * known + places * of_bias)
        if other is not None:
            bound = 2 * (bound + self._energies.get(other, math.inf))
        self._energies[result] = bound

    def sums(self, inputs: Sequence[Tensor]) -> Tensor:
        """Sums that are finite if their summands are, in one tensor: a look waits for the device.

        Args:
            inputs: The floating-point inputs.

        Returns:
            Those of what relevance met: one for each input, one of the output, one of all masses.
            Then that of the watched values, which may be infinite where values are merely huge.
        """
        watched = [torch.cat(self._watched)] if self._watched else []
        return self.kernels.sums([*inputs, self.output, torch.cat(self._masses), *watched])


_PLAIN = Layout()  # the batch comes first
_TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}
_LARGE = 1e74  # the square of what float32 holds, and some room


def _energy(value: Tensor) -> float:
    return torch.linalg.vector_norm(value).item() ** 2


def _channels_last(value: Tensor) -> Tensor:
    if value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    if value.dim() == 5:
        return value.contiguous(memory_format=torch.channels_last_3d)
    return value


def _apart(shares: list[list[Relevance]]) -> list[list[Relevance]]:
    """Memory that several carriers got at once belongs to none of them."""
    if len(shares) == 1:
        return shares
    count = Counter(t.values.untyped_storage().data_ptr() for part in shares for t in part)
    return [
        [
            t._replace(owned=t.owned and count[t.values.untyped_storage().data_ptr()] == 1)
            for t in part
        ]
        for part in shares
    ]


def find_non_finite(program: Program, values: dict[Node, Any]) -> NonFiniteError | None:
    """Runs the forward once more, looking at every value, to name the first that is not finite.

    An infinity is passed over where the model means it: a mask in front of a softmax or a maximum,
    or in the computation of a gate.
    """
    values = dict(values)
    resolve = Run._resolve
    probe = object.__new__(Run)
    probe._values = values
    met = set(program.saturates.values()) | program.plan.kept | {program.graph.output}
    for step in program.plan.steps:
        if isinstance(step, Single) and isinstance(step.rule, Sum):
            met.update(step.carriers)
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.target(*resolve(probe, node.args), **resolve(probe, node.kwargs))  # type: ignore[operator]
        values[node] = value
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
