"""Graph to steps: which calls carry relevance, by which rule, and where the final section is."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import InputError, UnsupportedOperationError
from ..graph.active import active_values, is_root, nodes_of, source_call
from ..graph.capture import CapturedGraph, bind, place_of, reads_values
from ..graph.layout import WHOLE, Layout, infer
from ..graph.mixing import mixed
from ..graph.sign import is_nonnegative
from ..rules import Call, LinearRule, Part, Pass, Rule, Slot, find_rule, reshapes
from ..rules.final import explain_output


@dataclass(frozen=True, eq=False)
class Single:
    """One call and its rule."""

    rule: Rule
    call: Call

    @cached_property
    def output(self) -> Node:
        """The value that relevance comes from."""
        return self.call.node

    @cached_property
    def carriers(self) -> tuple[Node, ...]:
        """The values that it goes to."""
        return self.rule.carriers(self.call)

    @cached_property
    def needs(self) -> tuple[Node, ...]:
        """The values that are read."""
        return self.rule.needs(self.call)

    def propagate(self, run: Pass, r: Tensor) -> Sequence[Tensor | Part]:
        """Relevance at each carrier."""
        return self.rule.propagate(run, self.call, r)


@dataclass(frozen=True, eq=False)
class Final:
    """The final section (method.md §2).

    Attributes:
        links: Its linear maps, first to last.
        asked: Values inside it whose relevance is asked for.
    """

    links: tuple[tuple[LinearRule, Call], ...]
    asked: tuple[Node, ...] = ()

    @cached_property
    def output(self) -> Node:
        """The value that relevance comes from."""
        return self.links[-1][1].node

    @cached_property
    def carriers(self) -> tuple[Node, ...]:
        """The values that it goes to: the section's input, and those asked for."""
        rule, call = self.links[0]
        return (rule.operand(call), *self.asked)

    @cached_property
    def needs(self) -> tuple[Node, ...]:
        """The values that are read."""
        fixed = [node for rule, call in self.links for node in rule.fixed(call)]
        return (*fixed, *self.carriers)

    def propagate(self, run: Pass, r: Tensor) -> Sequence[Tensor | Part]:
        """Relevance at each carrier."""
        return explain_output(run, self.links, r, self.carriers)


Step = Single | Final


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
    for node in graph.nodes:  # operands first, so that no chain of them is followed at once
        is_nonnegative(node)
    steps = _steps(graph, calls, taps)
    kept = frozenset(node for step in steps for node in step.needs)
    roots = tuple(n for n in graph.nodes if n in active and is_root(n, active))
    return Plan(steps, layouts, roots, kept)


def make_call(node: Node, active: Collection[Node]) -> Call:
    """The call that yields a node's value, seen through the choice of its first item."""
    source = source_call(node)
    item = None if source is node else int(node.args[1])  # type: ignore[arg-type]
    if isinstance(source.target, torch._ops.OpOverload):
        args = bind(source)
    else:
        args = {str(i): value for i, value in enumerate(source.args)}
    slots = tuple(slot for name, value in args.items() for slot in _slots(name, value, active))
    call = Call(node, source.target, args, (), item, slots)
    return replace(call, active=tuple(map(call.at, slots)))


def _slots(name: str, value: object, active: Collection[Node]) -> list[Slot]:
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
        return [(name, i) for i, item in items if isinstance(item, Node) and item in active]
    return [(name, None)] if isinstance(value, Node) and value in active else []


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
                raise mixed(node)
    return layouts


def _layout_of(node: Node, graph: CapturedGraph, layouts: dict[Node, Layout]) -> Layout:
    layout = layouts.get(node)
    if layout is None:
        raise mixed(node)
    return layout


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


def _steps(
    graph: CapturedGraph, calls: dict[Node, tuple[Rule, Call]], taps: Collection[Node]
) -> tuple[Step, ...]:
    links = _final_links(graph, calls)
    inside = {call.node for _, call in links}
    singles = [Single(rule, call) for node, (rule, call) in calls.items() if node not in inside]
    if not links:
        return tuple(singles)
    asked = tuple(rule.operand(call) for rule, call in links[1:] if rule.operand(call) in taps)
    behind = next((i for i, s in enumerate(singles) if s.call.node in _ends(graph)), len(singles))
    return (*singles[:behind], Final(links, asked), *singles[behind:])


def _ends(graph: CapturedGraph) -> list[Node]:
    """The output, and what is in front of a softmax that ends the model, innermost last."""
    found = [graph.output]
    while _is_softmax(found[-1]):
        source = found[-1].args[0]
        assert isinstance(source, Node)
        found.append(source)
    return found


def _is_softmax(node: Node) -> bool:
    return "softmax" in getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _final_links(
    graph: CapturedGraph, calls: dict[Node, tuple[Rule, Call]]
) -> tuple[tuple[LinearRule, Call], ...]:
    """The linear maps that end at the output, each the only reader of the one before.

    Pooling over positions in front of weights is none of them: it keeps its own law.
    """
    consumers: Counter[Node] = Counter()
    for node in graph.nodes:
        if node.target is not operator.getitem and reads_values(node):
            consumers.update(n for a in (*node.args, *node.kwargs.values()) for n in nodes_of(a))
    end = _ends(graph)[-1]
    node, links, weighs = end, [], False
    while node in calls and (node is end or consumers[node] == 1):
        rule, call = calls[node]
        if not isinstance(rule, LinearRule) or (
            weighs and rule.pools and not rule.one_to_one(call)
        ):
            break
        links.append((rule, call))
        weighs = weighs or bool(rule.constants and not rule.one_to_one(call))
        node = rule.operand(call)
    links.reverse()
    # One input for each output: there is nothing to share.
    return () if all(rule.one_to_one(call) for rule, call in links) else tuple(links)
