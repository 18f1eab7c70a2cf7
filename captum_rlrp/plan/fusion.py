"""Finds what the forward may fuse: folded batch norms, activations and sums in one call.

Values that no rule reads are never made: ``conv → batch norm → + skip → relu`` is one call. The
reference backend runs the graph as captured instead, and both give the same relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.capture import CapturedGraph, bind, reads_values
from ..kernels import convolution, onednn
from ..kernels.reference import ints
from ..rules import Call, LinearRule, Rule
from ..rules.attention import RememberedAttention, ScaledDotProductAttention
from ..rules.convolution import Convolution
from ..rules.join import Extension, Join
from ..rules.normalization import BatchNorm
from ..rules.passthrough import PassThrough
from ..rules.pooling import MaxPool
from ..rules.shape import Move
from ..rules.skip import Sum
from .instructions import (
    Attention,
    FusedConvolution,
    InPlace,
    Instruction,
    Linear,
    ReluInPlace,
    RememberedMaxPool,
    RestoredSum,
    WinnersPool,
)
from .steps import Plan, Single, Step

aten = torch.ops.aten


def fuse(
    graph: CapturedGraph, plan: Plan, wanted: Collection[Node]
) -> tuple[Plan, dict[Node, Instruction]]:
    """Finds what can be fused.

    Args:
        graph: The captured model.
        plan: Its steps.
        wanted: Values whose relevance is asked for.

    Returns:
        The plan with rules that read what a fused forward leaves, and the instruction for each node
        that ends a fusion.
    """
    users: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if reads_values(node):
                users[source].append(node)
    users[graph.output].append(graph.output)  # the caller reads it
    calls = dict(_calls(plan))
    fused: dict[Node, FusedConvolution] = {}
    claimed: set[Node] = set()
    for node, (rule, call) in calls.items():
        if type(rule) is Convolution and node not in claimed and _is_plain(call):
            made = _fuse_convolution(call, plan, calls, users, claimed)
            fused[made.node] = made
            claimed.update(made.covers)
    instructions: dict[Node, Instruction] = dict(fused)
    exchanged: dict[Node, Rule] = {}
    for made in fused.values():
        if made.other is not None:
            end = made.norm.node if made.norm is not None else made.conv.node
            skip = next(n for n in made.covers if isinstance(calls[n][0], Sum))
            exchanged[skip] = RestoredSum(end, made.other, made.node)
    for node, (rule, call) in calls.items():
        if type(rule) is MaxPool and call.item is None:
            pool = WinnersPool(call, rule)
            instructions[node] = pool
            exchanged[node] = RememberedMaxPool(pool)
        if isinstance(rule, ScaledDotProductAttention):
            attention = Attention(call)
            instructions[node] = attention
            exchanged[node] = RememberedAttention(attention)
    for node in graph.nodes:
        if _packet(node) is aten.linear:
            instructions[node] = Linear(Call(node, node.target, bind(node), ()))
    exchanged.update(_extensions(plan, wanted))
    steps = tuple(
        replace(step, rule=exchanged[step.output])
        if isinstance(step, Single) and step.output in exchanged
        else step
        for step in plan.steps
    )
    kept = frozenset(n for step in steps for n in step.needs)
    for step in steps:
        if isinstance(step, Single) and step.output not in claimed:
            in_place = _in_place(step, users, kept)
            if in_place is not None:
                instructions[step.output] = in_place
    return replace(plan, steps=steps, kept=kept), instructions


def _calls(plan: Plan) -> Iterator[tuple[Node, tuple[Rule, Call]]]:
    """Every call that carries relevance, in order of execution."""
    for step in plan.steps:
        links = [(step.rule, step.call)] if isinstance(step, Single) else step.links
        for rule, call in links:
            yield call.node, (rule, call)


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
    plan: Plan,
    calls: Mapping[Node, tuple[Rule, Call]],
    users: Mapping[Node, list[Node]],
    claimed: Collection[Node],
) -> FusedConvolution:
    node, covers = call.node, [call.node]
    norm = other = activation = None

    def follower(after: Node, spared: Collection[Node] = ()) -> tuple[Rule, Call] | None:
        """What alone reads a value, if no rule does and nothing has claimed it yet."""
        only = users[after][0] if len(users[after]) == 1 else after
        free = only is not after and only not in claimed and after not in plan.kept - set(spared)
        return calls.get(only) if free else None

    found = follower(node)
    if found is not None and isinstance(found[0], BatchNorm):
        given = (*found[1].nodes(), call.args["bias"])
        if all(_is_given(n) for n in given if n is not node):
            norm = found[1]
            node = norm.node
            covers.append(node)
    end = node
    # A sum, only where a ReLU behind it lets the summand be recovered.
    found = follower(node, [node])
    if found is not None and type(found[0]) is Sum:
        add = found[1]
        behind = follower(add.node)
        if (
            behind is not None
            and _packet(behind[1].node) is aten.relu
            and add.name == "add"
            and add.args.get("alpha", 1) == 1
            and len(set(add.active)) == 2
            and all(add.shape(n) == add.shape(add.node) for n in add.active)
            and _readers(end, plan) == 1
            and _vanishes(behind[1].node, plan, set())
        ):
            other = next(n for n in add.active if n is not end)
            node = add.node
            covers.append(node)
    found = follower(node)
    if (
        found is not None
        and isinstance(found[0], PassThrough)
        and _in_place_twin(found[1]) is not None
        and found[1].active[0] is node
    ):
        activation = found[1]
        node = activation.node
        covers.append(node)
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


def _readers(value: Node, plan: Plan) -> int:
    """How many steps read a value."""
    return sum(value in step.needs for step in plan.steps)


def _vanishes(value: Node, plan: Plan, seen: set[Node]) -> bool:
    """Whether relevance at a value is surely 0 wherever the value is.

    True behind every rule that multiplies by the value: then what lies under a ReLU needs no share.
    """
    consumers = [step for step in plan.steps if value in step.carriers]
    if not consumers or value in seen:
        return bool(consumers)
    seen.add(value)
    return all(
        _multiplies(step) or (_keeps_zeros(step) and _vanishes(step.output, plan, seen))
        for step in consumers
    )


def _multiplies(step: Step) -> bool:
    """Whether the step multiplies relevance by the value that it reaches."""
    if not isinstance(step, Single):
        return True
    return isinstance(step.rule, LinearRule) and not step.rule.one_to_one(step.call)


def _keeps_zeros(step: Step) -> bool:
    """Whether an output is 0 wherever the input that it sends its relevance to is."""
    return isinstance(step, Single) and (
        isinstance(step.rule, (Sum, MaxPool, Move)) or _packet(step.output) is aten.relu
    )


def _extensions(plan: Plan, wanted: Collection[Node]) -> dict[Node, Rule]:
    """Joins whose first operands an earlier one joined."""
    earlier: dict[Any, Node] = {}
    found: dict[Node, Rule] = {}
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
                found[step.output] = Extension(joined, count)
                break
        if step.output not in wanted:  # whose relevance has to be its own
            earlier[dim, operands] = step.output
    return found


def _packet(node: Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _in_place_twin(call: Call) -> Any:
    """``relu.default`` → ``relu_.default``, for elementwise calls of one tensor."""
    first = call.target._schema.arguments[0].name
    if len(list(call.nodes())) != 1 or call.item is not None or not call.is_active(first):
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
