"""Finds what the forward may fuse: folded batch norms, activations and sums in one call.

Values that no rule reads are never made: ``conv → batch norm → + skip → relu`` is one call. The
reference backend runs the graph as captured instead, and both give the same relevance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.capture import CapturedGraph, bind, reads_values
from ..kernels import convolution, onednn
from ..kernels.reference import ints
from ..rules import Call, LinearRule
from ..rules.convolution import Convolution
from ..rules.join import Extension, Join
from ..rules.normalization import BatchNorm
from ..rules.passthrough import PassThrough
from ..rules.pooling import MaxPool
from ..rules.shape import Move
from ..rules.skip import Sum
from .instructions import (
    FoldedConvolution,
    FusedConvolution,
    InPlace,
    Instruction,
    Linear,
    ReluInPlace,
    RememberedMaxPool,
    RestoredSum,
    WinnersPool,
)
from .sections import Plan, Section, Single, Step

aten = torch.ops.aten


def fuse(
    graph: CapturedGraph, plan: Plan, wanted: Collection[Node]
) -> tuple[Plan, dict[Node, Instruction]]:
    """Finds what can be fused.

    Args:
        graph: The captured model.
        plan: Its steps.
        wanted: Values whose relevance is asked for; links of sections among them stay apart.

    Returns:
        The plan with folded links, and the instruction for each node that ends a fusion.
    """
    users: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if reads_values(node):
                users[source].append(node)
    users[graph.output].append(graph.output)  # the caller reads it
    by_output = {step.output: step for step in plan.steps}
    starts = Counter(step.start for step in plan.steps if isinstance(step, Section))
    apart = {n for n in wanted if n not in starts and n not in by_output}

    instructions: dict[Node, Instruction] = {}
    steps: dict[Step, Step] = {}
    folded: dict[Node, FusedConvolution] = {}
    claimed: set[Node] = set()
    for step in plan.steps:
        if not isinstance(step, Section):
            continue
        for i, (rule, call) in enumerate(step.links):
            if type(rule) is not Convolution or not _is_plain(call):
                continue
            follows = step.links[i + 1] if i + 1 < len(step.links) else None
            made = _fuse_convolution(call, follows, plan, by_output, users, apart, claimed)
            if made is not None:
                folded[call.node] = made
                claimed.update(made.covers)
    for step in plan.steps:
        if isinstance(step, Section):
            links = _fold(step.links, folded)
            if links != tuple(step.links):
                steps[step] = replace(step, links=links)
    for made in folded.values():
        instructions[made.node] = made
        if made.other is not None:
            end = made.norm.node if made.norm is not None else made.conv.node
            for skip in map(by_output.get, made.covers):
                if isinstance(skip, Single) and type(skip.rule) is Sum:
                    restored = RestoredSum(end, made.other, made.node)
                    steps[skip] = replace(skip, rule=restored)
    for step in plan.steps:
        if isinstance(step, Single) and type(step.rule) is MaxPool and step.call.item is None:
            pool = WinnersPool(step.call, step.rule)
            instructions[step.output] = pool
            steps[step] = replace(step, rule=RememberedMaxPool(pool))
    for node in graph.nodes:
        if _packet(node) is aten.linear:
            instructions[node] = Linear(Call(node, node.target, bind(node), ()))
    steps.update(_extensions(plan, wanted))
    new_steps = tuple(steps.get(step, step) for step in plan.steps)
    kept = frozenset(n for step in new_steps for n in step.needs) | (plan.kept & set(wanted))
    covered = {n for made in folded.values() for n in made.covers}
    for step in new_steps:
        if isinstance(step, Single) and step.output not in covered:
            in_place = _in_place(step, users, kept)
            if in_place is not None:
                instructions[step.output] = in_place
    return replace(plan, steps=new_steps, kept=kept), instructions


def _is_plain(call: Call) -> bool:
    """A convolution with constant weights, not transposed, on a batch."""
    name = call.target.overloadpacket.__name__
    return (
        name in ("conv1d", "conv2d", "conv3d")
        and call.active == (call.args["input"],)
        and len(call.shape("input")) == len(call.shape("weight"))
    )


def _fuse_convolution(
    call: Call,
    follows: tuple[LinearRule, Call] | None,
    plan: Plan,
    by_output: dict[Node, Step],
    users: dict[Node, list[Node]],
    apart: Collection[Node],
    claimed: Collection[Node],
) -> FusedConvolution | None:
    node, covers = call.node, [call.node]
    norm = other = activation = None
    if (
        follows is not None
        and isinstance(follows[0], BatchNorm)
        and node not in apart
        and all(_is_given(n) for n in (*follows[1].nodes(), call.args["bias"]) if n is not node)
    ):
        norm = follows[1]
        node = norm.node
        covers.append(node)
    end = node

    def only_user() -> Node | None:
        return users[node][0] if len(users[node]) == 1 and users[node][0] is not node else None

    # The sum: only where a ReLU behind it lets the summand be recovered.
    after = only_user()
    step = by_output.get(after) if after is not None else None
    if after not in claimed and isinstance(step, Single) and type(step.rule) is Sum:
        assert after is not None
        relu = users[after][0] if len(users[after]) == 1 else None
        if (
            relu is not None
            and _packet(relu) is aten.relu
            and _packet(after) is aten.add
            and step.call.args.get("alpha", 1) == 1
            and len(set(step.call.active)) == 2
            and all(step.call.shape(n) == step.call.shape(after) for n in step.call.active)
            and _vanishes(relu, plan, set())
        ):
            other = next(n for n in step.call.active if n is not end)
            node = after
            covers.append(node)
    after = only_user()
    step = by_output.get(after) if after is not None else None
    if (
        after is not None
        and node not in plan.kept - ({end} if other is not None else set())
        and isinstance(step, Single)
        and isinstance(step.rule, PassThrough)
        and _in_place_twin(step.call) is not None
        and step.call.active[0] is node
    ):
        activation = step.call
        node = after
        covers.append(node)
    if other is not None and activation is None:
        return None
    activate = None if activation is None else _overwriting(activation)
    window, fused = _window(call), _fused(activation)
    x, weight = (call.args[name].meta["val"] for name in ("input", "weight"))
    suits = (
        window is not None
        and convolution.suits(x, weight, *window, call.args["groups"])
        and (norm is None or all(n.meta["val"].dtype == weight.dtype for n in norm.nodes()))
    )
    return FusedConvolution(
        node, call, norm, other, activation, tuple(covers), activate, window, fused, suits
    )


def _is_given(value: Node | None) -> bool:
    """Whether it is there when a run begins, as parameters are that nothing computes."""
    return value is None or value.op != "call_function"


def _window(call: Call) -> tuple[list[int], list[int], list[int]] | None:
    if isinstance(call.args["padding"], str):
        return None
    axes, args = len(call.shape("weight")) - 2, call.args
    return ints(args["stride"], axes), ints(args["padding"], axes), ints(args["dilation"], axes)


def _fused(activation: Call | None) -> onednn.Activation | None:
    if activation is None:
        return onednn.NONE
    found = onednn.ACTIVATIONS.get(activation.target.overloadpacket)
    if found is None:
        return None
    name, scalars = found
    return name, [activation.args[s] if isinstance(s, str) else s for s in scalars]


def _vanishes(value: Node, plan: Plan, seen: set[Node]) -> bool:
    """Whether relevance at a value is surely 0 wherever the value is.

    True behind every rule that multiplies by the value: then what lies under a ReLU needs no share.
    """
    consumers = [step for step in plan.steps if value in step.carriers]
    if not consumers or value in seen:
        return bool(consumers)
    seen.add(value)
    for step in consumers:
        if isinstance(step, Section):
            moves = all(isinstance(rule, Move) for rule, _ in step.links)
            if step.passes_through and not (moves and _vanishes(step.output, plan, seen)):
                return False
        elif not (
            isinstance(step.rule, (Sum, MaxPool)) or _packet(step.output) is aten.relu
        ) or not _vanishes(step.output, plan, seen):
            return False
    return True


def _fold(links: Any, folded: dict[Node, FusedConvolution]) -> tuple[tuple[LinearRule, Call], ...]:
    result: list[tuple[LinearRule, Call]] = []
    swallowed: set[Node] = set()
    for rule, call in links:
        made = folded.get(call.node)
        if made is not None:
            end = made.norm.node if made.norm is not None else call.node
            result.append((FoldedConvolution(made), replace(call, node=end)))
            swallowed.add(end)
        elif call.node not in swallowed:
            result.append((rule, call))
    return tuple(result)


def _extensions(plan: Plan, wanted: Collection[Node]) -> dict[Step, Step]:
    """Joins whose first operands an earlier one joined."""
    earlier: dict[Any, Node] = {}
    found: dict[Step, Step] = {}
    for step in plan.steps:
        if not isinstance(step, Single) or type(step.rule) is not Join or step.rule.stacks:
            continue
        value = step.output.meta["val"]
        operands, dim = step.rule.operands(step.call), step.call.args["dim"] % value.dim()
        # In 16 bits every partial sum would be rounded.
        if step.call.active != operands or value.dtype.itemsize < 4:
            continue
        for count in range(len(operands) - 1, 1, -1):
            joined = earlier.get((dim, operands[:count]))
            if joined is not None:
                found[step] = replace(step, rule=Extension(joined, count))
                break
        if step.output not in wanted:  # whose relevance has to be its own
            earlier[dim, operands] = step.output
    return found


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _in_place_twin(call: Call) -> Any:
    """``relu.default`` → ``relu_.default``, for elementwise calls of one tensor."""
    if len(list(call.nodes())) != 1 or call.item is not None:
        return None
    packet = getattr(aten, call.target.overloadpacket.__name__ + "_", None)
    return getattr(packet, call.target._overloadname, None) if packet is not None else None


def _in_place(
    step: Single, users: dict[Node, list[Node]], kept: frozenset[Node]
) -> InPlace | ReluInPlace | None:
    call = step.call
    if not isinstance(step.rule, PassThrough) or _in_place_twin(call) is None:
        return None
    operand = call.active[0]
    owned = (
        operand.op == "call_function"
        and _packet(operand) in _FRESH
        and users[operand] == [call.node]
        and operand not in kept
    )
    if not owned:
        return None
    if call.target is aten.relu.default:
        return ReluInPlace(call)
    return InPlace(call, _overwriting(call))


# Ops whose result is new memory that nothing else shares.
_FRESH = {
    aten.batch_norm, aten._native_batch_norm_legit_no_training, aten.add, aten.sub, aten.mul,
    aten.linear, aten.conv1d, aten.conv2d, aten.conv3d, aten.cat, aten.layer_norm,
    aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d, aten.addmm, aten.div,
}  # fmt: skip


def _overwriting(call: Call) -> Callable[[Tensor], Tensor]:
    """The elementwise call, made in place."""
    options = [
        (argument.name, argument.kwarg_only, call.args[argument.name])
        for argument in call.target._schema.arguments[1:]
    ]
    positional = [value for _, keyword, value in options if not keyword]
    keywords = {name: value for name, keyword, value in options if keyword}
    twin = _in_place_twin(call)
    return lambda y: twin(y, *positional, **keywords)
