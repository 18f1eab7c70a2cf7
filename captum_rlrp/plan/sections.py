"""Graph to steps: which calls carry relevance, by which rule, and where linear sections lie.

Sections (method.md §2) are maximal chains of linear maps. One starts at a model input, behind a
non-linear op or a merge, or at a value with more than one consumer, and ends at the next of these.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ..errors import CaptureError, InputError, UnsupportedOperationError
from ..graph.active import active_values, is_root, nodes_of, source_call
from ..graph.capture import CapturedGraph, bind, place_of, reads_values
from ..graph.layout import WHOLE, Layout, infer
from ..rules import Call, LinearRule, Relevance, Rule, find_rule, reshapes
from ..rules.section import Links, relative

if TYPE_CHECKING:
    from ..run.program import Run


@dataclass(frozen=True, eq=False)
class Single:
    """A step of one call that is no link of a section."""

    rule: Rule
    call: Call

    @property
    def output(self) -> Node:
        return self.call.node

    @property
    def carriers(self) -> tuple[Node, ...]:
        return self.rule.carriers(self.call)

    @property
    def needs(self) -> tuple[Node, ...]:
        return self.rule.needs(self.call)

    def propagate(self, run: Run, terms: list[Relevance]) -> list[list[Relevance]]:
        return self.rule.propagate(run, self.call, terms)


@dataclass(frozen=True, eq=False)
class Section:
    """A linear section."""

    start: Node
    links: Links
    passes_through: bool

    @property
    def output(self) -> Node:
        return self.links[-1][1].node

    @property
    def carriers(self) -> tuple[Node, ...]:
        return (self.start,)

    @property
    def needs(self) -> tuple[Node, ...]:
        values = tuple(node for rule, call in self.links for node in rule.needs(call))
        return values if self.passes_through else (*values, self.start)

    def propagate(self, run: Run, terms: list[Relevance]) -> list[list[Relevance]]:
        if not self.passes_through:
            return [[relative(run, self.start, self.links, run.merge(self.output, terms))]]
        for rule, call in reversed(self.links):
            keeps_mass = run.like(call.node).shape == run.like(rule.operand(call)).shape
            terms = [
                Relevance(rule.route(run, call, t.values), t.factor, t.mass if keeps_mass else None)
                for t in terms
            ]
            here = rule.operand(call)
            if here is not self.start and run.is_tapped(here):
                run.tap(here, terms)
        return [terms]


Step = Single | Section


@dataclass(frozen=True, eq=False)
class Plan:
    """What to do with a captured graph.

    Attributes:
        steps: In execution order; the relevance pass takes them in reverse.
        layouts: Where the batch lies in each value that carries relevance.
        roots: The values relevance is propagated to at the latest.
        kept: The values that the relevance pass reads.
    """

    steps: tuple[Step, ...]
    layouts: dict[Node, Layout]
    roots: tuple[Node, ...]
    kept: frozenset[Node]


def plan(graph: CapturedGraph, explained: Sequence[Node], taps: Collection[Node] = ()) -> Plan:
    """Finds the steps by which relevance goes from the output to the explained inputs.

    Args:
        graph: The captured model.
        explained: Placeholders of the inputs to explain.
        taps: Further values whose relevance is wanted (layers).

    Raises:
        UnsupportedOperationError: Listing every op that relevance would have to cross without a
            rule.
        InputError: If the output does not depend on the explained inputs.
        CaptureError: If a value on the way mixes the samples of the batch.
    """
    active = active_values(graph, explained)
    if graph.output not in active:
        raise InputError(
            "The output does not depend on the inputs, or only by comparisons and integers: "
            "there is no way for relevance to go."
        )
    calls = _carrying_calls(graph, active)
    layouts = _layouts(graph, active, calls)
    for tap in taps:
        if tap in active and tap not in layouts:
            layouts[tap] = _layout_of(tap, graph, layouts)
    steps = _steps(graph, calls)
    kept = frozenset(node for step in steps for node in step.needs)
    inner = [
        rule.operand(call)
        for step in steps
        if isinstance(step, Section) and not step.passes_through
        for rule, call in step.links
    ]
    kept |= {node for node in inner if node in taps}
    roots = tuple(n for n in graph.nodes if n in active and is_root(n, active))
    return Plan(tuple(steps), layouts, roots, kept)


def make_call(node: Node, active: Collection[Node]) -> Call:
    """The call that yields a node's value, seen through the choice of its first item."""
    source = source_call(node)
    item = None if source is node else int(node.args[1])  # type: ignore[arg-type]
    if isinstance(source.target, torch._ops.OpOverload):
        args = bind(source)
    else:
        args = {str(i): value for i, value in enumerate(source.args)}
    operands = [n for value in args.values() for n in nodes_of(value) if n in active]
    return Call(node, source.target, args, tuple(operands), item)


def _carrying_calls(graph: CapturedGraph, active: set[Node]) -> dict[Node, tuple[Rule, Call]]:
    """From the output backwards: each value that receives relevance, with its rule and call."""
    reached = {graph.output}
    found: dict[Node, tuple[Rule, Call]] = {}
    missing: list[Node] = []
    for node in reversed(graph.nodes):
        if node not in reached or node not in active or is_root(node, active):
            continue
        call = make_call(node, active)
        rule = find_rule(call) if call.active and call.item in (None, 0) else None
        if rule is None:
            missing.append(node)
            reached.update(call.active)
            continue
        found[node] = (rule, call)
        reached.update(rule.carriers(call))
    if missing:
        raise UnsupportedOperationError(_describe(missing))
    return {node: found[node] for node in graph.nodes if node in found}


def _describe(missing: list[Node]) -> str:
    lines = []
    for node in reversed(missing):
        lines.append(f"  {source_call(node).target} in {place_of(node)}")
    what = "operation has" if len(lines) == 1 else "operations have"
    return (
        f"{len(lines)} {what} no rule, so relevance cannot be propagated through:\n"
        + "\n".join(lines)
        + "\nRewrite them with supported operations, or give them a rule by "
        "captum_rlrp.register_rule (docs/adding-a-rule.md)."
    )


def _layouts(
    graph: CapturedGraph, active: set[Node], calls: dict[Node, tuple[Rule, Call]]
) -> dict[Node, Layout]:
    layouts: dict[Node, Layout] = {}
    carrying = set(calls) | {n for _, call in calls.values() for n in call.active}
    for node in graph.nodes:
        if node in active:
            layout = _infer_layout(node, graph, active, layouts)
            if layout is not None:
                layouts[node] = layout
            elif node in carrying and node in calls:
                raise _mixes(node)
    return layouts


def _layout_of(node: Node, graph: CapturedGraph, layouts: dict[Node, Layout]) -> Layout:
    layout = layouts.get(node)
    if layout is None:
        raise _mixes(node)
    return layout


def _mixes(node: Node) -> CaptureError:
    return CaptureError(
        f"The samples of a batch cannot be told apart behind {node.target} in {place_of(node)}: "
        "the model mixes them there, so there is no explanation per sample. Explain "
        "the samples one by one, or rewrite the operation."
    )


def _infer_layout(
    node: Node, graph: CapturedGraph, active: set[Node], layouts: dict[Node, Layout]
) -> Layout | None:
    if graph.batch is None:
        return WHOLE
    sources = [
        (source.meta["val"].shape, layouts[source])
        for source in source_call(node).all_input_nodes
        if source in layouts
    ]
    return infer(node.meta["val"].shape, graph.batch, sources, reshapes(node.target))


def _steps(graph: CapturedGraph, calls: dict[Node, tuple[Rule, Call]]) -> list[Step]:
    consumers: Counter[Node] = Counter([graph.output])
    for node in graph.nodes:
        if node.target is not operator.getitem and reads_values(node):
            consumers.update(n for a in (*node.args, *node.kwargs.values()) for n in nodes_of(a))

    steps: list[Step] = []
    open_chains: dict[Node, list[tuple[LinearRule, Call]]] = {}
    for node, (rule, call) in calls.items():
        if not isinstance(rule, LinearRule):
            steps.append(Single(rule, call))
            continue
        start = rule.operand(call)
        chain = open_chains.pop(start) if start in open_chains and consumers[start] == 1 else []
        chain.append((rule, call))
        open_chains[node] = chain
    for node in list(open_chains):
        chain = open_chains[node]
        start = chain[0][0].operand(chain[0][1])
        one_to_one = all(rule.one_to_one(call) for rule, call in chain)
        steps.append(Section(start, tuple(chain), one_to_one))
    position: Callable[[Step], int] = {n: i for i, n in enumerate(graph.nodes)}.__getitem__  # type: ignore[assignment]
    return sorted(steps, key=lambda step: position(step.output))  # type: ignore[arg-type]
