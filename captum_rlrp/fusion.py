"""The forward with fewer passes over memory: folded batch norm, fused activations and sums.

Values that no rule reads are never made: ``conv → batch norm → + skip → relu`` is one call. The
reference backend runs the graph as captured instead, and both give the same relevance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from .capture import CapturedGraph, reads_values
from .kernels import onednn
from .kernels.reference import accumulation_dtype, ints
from .rules import Call, LinearRule
from .rules.convolution import Convolution
from .rules.join import Extension, Join
from .rules.normalization import BatchNorm
from .rules.passthrough import PassThrough
from .rules.pooling import MaxPool
from .rules.shape import Move
from .rules.skip import Sum
from .sections import Plan, Section, Single, Step

if TYPE_CHECKING:
    from .program import Like, Run

aten = torch.ops.aten

# Activations with |act(z)| ≤ |z|.
_SHRINKING = {aten.relu, aten.relu6, aten.silu, aten.hardswish, aten.tanh}


@dataclass(frozen=True, eq=False)
class FusedConvolution:
    """conv → batch norm? → + other? → activation?, as one instruction.

    Attributes:
        node: The node whose value it yields.
        conv: The convolution.
        norm: The batch norm folded into it.
        other: The summand added to it.
        activation: The call of the elementwise activation at the end.
        covers: All nodes it stands for.
        activate: The activation, in place.
        window: Stride, padding and dilation for each axis; None where padding is a word.
        fused: What oneDNN calls the activation, if it knows it.
    """

    node: Node
    conv: Call
    norm: Call | None
    other: Node | None
    activation: Call | None
    covers: tuple[Node, ...]
    activate: Callable[[Tensor], Tensor] | None
    window: tuple[list[int], list[int], list[int]] | None
    fused: onednn.Activation | None

    @property
    def reads(self) -> tuple[Node, ...]:
        """The values it is computed from."""
        nodes = [*self.conv.nodes(), *([self.other] if self.other is not None else [])]
        if self.norm is not None:
            nodes += [n for n in self.norm.nodes() if n is not self.conv.node]
        return tuple(nodes)

    def fold(self, run: Run) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The convolution's parameters with the batch norm folded in.

        Returns:
            The weight, laid out as the convolutions of either direction want it; the bias; and each
            filter's ``Σ |w|``, if it is known.
        """
        weight: Tensor = run.value(self.conv.args["weight"])
        bias: Tensor | None = run.value(self.conv.args["bias"])
        x = run.like(self.conv.args["input"])
        if self.norm is None:
            if _is_laid_out(weight, x):
                return weight, bias, None
            folded, mass = run.kernels.accumulate([(weight, None)], out=_new_weight(weight, x))
            return folded, bias, mass
        scale, shift = run.scratch[self.norm.node]
        factor = scale.to(accumulation_dtype(weight.dtype))
        folded, mass = run.kernels.accumulate([(weight, factor)], out=_new_weight(weight, x))
        return folded, shift, mass

    def __call__(self, run: Run) -> Tensor:
        x: Tensor = run.value(self.conv.args["input"])
        other: Tensor | None = run.value(self.other)
        if self.norm is not None and self._leaves_weight(run, x):
            return self._normalize(run, x, other)
        weight, bias, mass = self.fold(run)
        y = self._convolve(run, x, other, weight, bias, mass)
        # For the way back, unless it takes more memory than a batch's output.
        if self.norm is not None and (len(x) == 1 or not self._outweighs(run, x)):
            run.scratch[self] = (weight, None)
        return y

    def _outweighs(self, run: Run, x: Tensor) -> bool:
        """Whether the weight has more elements than the output."""
        weight: Tensor = run.value(self.conv.args["weight"])
        return weight.numel() > len(x) * math.prod(self.conv.shape(self.conv.node)[1:])

    def _leaves_weight(self, run: Run, x: Tensor) -> bool:
        """Whether it is less work to scale the output: a weight to be laid out is copied anyway."""
        weight: Tensor = run.value(self.conv.args["weight"])
        is_laid_out = _is_laid_out(weight, run.like(self.conv.args["input"]))
        return (is_laid_out and self._outweighs(run, x)) or _dwarfs(weight, x)

    def _normalize(self, run: Run, x: Tensor, other: Tensor | None) -> Tensor:
        assert self.norm is not None
        weight: Tensor = run.value(self.conv.args["weight"])
        if _dwarfs(weight, x):
            y = self._plain(x.contiguous(), weight, None)
            y = y.contiguous(memory_format=run.like(self.conv.args["input"]).memory_format)
        else:
            y = self._plain(x, weight, None)
        scale, shift = (_per_channel(v, y.dim()) for v in run.scratch[self.norm.node])
        return self._finish(run, torch.addcmul(shift, y, scale, out=y), other)

    def _convolve(
        self,
        run: Run,
        x: Tensor,
        other: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        mass: Tensor | None,
    ) -> Tensor:
        if self.fused is not None and self.window is not None and onednn.covers(x, weight):
            groups = self.conv.args["groups"]
            y = onednn.convolution(x, weight, bias, *self.window, groups, self.fused, other)
            if y is not None:
                if self.activation is not None:  # oneDNN's hide even a NaN
                    source = self.conv.args["input"]
                    shrinks = _packet(self.activation.node) in _SHRINKING
                    result = self.node if shrinks else None
                    run.watch_convolution(source, weight, mass, bias, self.other, result, y)
                return y
        return self._finish(run, self._plain(x, weight, bias), other)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution alone."""
        args = self.conv.args
        if self.window is not None and onednn.covers(x, weight):
            plain = onednn.convolution(x, weight, bias, *self.window, args["groups"])
            assert plain is not None
            return plain
        y: Tensor = self.conv.target(
            x, weight, bias, args["stride"], args["padding"], args["dilation"], args["groups"]
        )
        return y

    def _finish(self, run: Run, y: Tensor, other: Tensor | None) -> Tensor:
        """The sum and the activation, in place."""
        if other is not None:
            y = y.add_(other)
        if self.activate is None:
            return y
        run.watch(y)
        return self.activate(y)


@dataclass(frozen=True, eq=False)
class InPlace:
    """An elementwise call that overwrites an operand nobody reads again."""

    node: Node
    call: Call
    covers: tuple[Node, ...]
    activate: Callable[[Tensor], Tensor]

    @property
    def reads(self) -> tuple[Node, ...]:
        """The values it is computed from."""
        return tuple(self.call.nodes())

    def __call__(self, run: Run) -> Tensor:
        return self.activate(run.value(self.call.active[0]))


@dataclass(frozen=True, eq=False)
class WinnersPool:
    """Max pooling that leaves the winners for the way back, so that its input is not kept."""

    node: Node
    call: Call
    rule: MaxPool
    covers: tuple[Node, ...]

    @property
    def reads(self) -> tuple[Node, ...]:
        """The values it is computed from."""
        return tuple(self.call.nodes())

    def __call__(self, run: Run) -> Tensor:
        y, run.scratch[self] = self.rule.pool(run, self.call)
        return y


Instruction = FusedConvolution | InPlace | WinnersPool


class RememberedMaxPool(MaxPool):
    """Max pooling whose winners the forward left."""

    def __init__(self, instruction: WinnersPool) -> None:
        super().__init__(instruction.rule.axes, instruction.rule.adaptive)
        self.instruction = instruction

    def needs(self, call: Call) -> tuple[Node, ...]:
        return ()

    def winners(self, run: Run, call: Call) -> Tensor:
        winners: Tensor = run.scratch.pop(self.instruction)
        return winners


class FoldedConvolution(Convolution):
    """A convolution, with the batch norm behind it if there is one, as one link of a section."""

    def __init__(self, instruction: FusedConvolution) -> None:
        self.instruction = instruction

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(n for n in self.instruction.reads if n not in call.active)

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        made = self.instruction
        left: tuple[Tensor, Tensor | None] | None = run.scratch.pop(made, None)
        if left is None:
            scale = None if made.norm is None else run.scratch[made.norm.node][0]
            left = run.value(made.conv.args["weight"]), scale
        weight, scale = left
        if scale is not None:
            g = g * _per_channel(scale, g.dim()).to(g.dtype)
        if not _dwarfs(weight, g):
            return self._transpose(run, call, g, weight)
        like = run.like(self.operand(call))
        result = self._transpose(run, call, g.contiguous(), weight)
        return result.contiguous(memory_format=like.memory_format)

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        args, weight = call.args, self.instruction.fold(run)[0].to(x.dtype)
        y: Tensor = call.target(
            x, weight, None, args["stride"], args["padding"], args["dilation"], args["groups"]
        )
        return y


class RestoredSum(Sum):
    """A skip connection whose first summand was never stored: a = relu(a + b) − b.

    Args:
        first: The call's operand that is recovered.
        other: The operand that is kept.
        result: The value behind the ReLU.
    """

    def __init__(self, first: Node, other: Node, result: Node) -> None:
        self.first, self.other, self.result = first, other, result

    def needs(self, call: Call) -> tuple[Node, ...]:
        return (self.result, self.other)

    def propagate(self, run: Run, call: Call, terms: Any) -> Any:
        s, b = run.value(self.result), run.value(self.other)
        r_a, r_b = run.split(call.node, self.result, s, b, terms, from_sum=True)
        by_node = {self.first: [r_a], self.other: [r_b]}
        return [by_node[node] for node in call.active]


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
            pool = WinnersPool(step.output, step.call, step.rule, (step.output,))
            instructions[step.output] = pool
            steps[step] = replace(step, rule=RememberedMaxPool(pool))
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


@dataclass(frozen=True, eq=False)
class BatchNorms:
    """The scale and shift of several batch norms, worked out together: each is a few tiny calls.

    Attributes:
        folded: The convolutions they are folded into.
    """

    folded: tuple[FusedConvolution, ...]

    def __call__(self, run: Run) -> None:
        """Leaves them in the run's scratch, where a batch norm's node finds both."""
        norms = [made.norm for made in self.folded if made.norm is not None]

        def gather(calls: Iterable[Call], name: str) -> Tensor | None:
            values = [run.value(call.args[name]) for call in calls]
            return None if values[0] is None else torch.cat(values)

        variance, mean = gather(norms, "running_var"), gather(norms, "running_mean")
        assert variance is not None
        assert mean is not None
        scale = (variance + norms[0].args["eps"]).rsqrt()
        weight, offset = gather(norms, "weight"), gather(norms, "bias")
        if weight is not None:
            scale = scale * weight
        bias = gather((made.conv for made in self.folded), "bias")
        shift = mean * scale if bias is None else (mean - bias) * scale
        shift = -shift if offset is None else offset - shift
        sizes = [run.value(norm.args["running_var"]).numel() for norm in norms]
        for norm, *both in zip(norms, scale.split(sizes), shift.split(sizes), strict=True):
            run.scratch[norm.node] = tuple(both)


def batch_norms(instructions: Iterable[Instruction]) -> list[BatchNorms]:
    """The batch norms folded into convolutions, those together that are computed alike."""
    alike: dict[Any, list[FusedConvolution]] = {}
    for made in instructions:
        if isinstance(made, FusedConvolution) and made.norm is not None:
            args = made.norm.args
            value = args["running_var"].meta["val"]
            absent = (args["weight"] is None, args["bias"] is None, made.conv.args["bias"] is None)
            alike.setdefault((value.dtype, args["eps"], absent), []).append(made)
    return [BatchNorms(tuple(group)) for group in alike.values()]


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
    return FusedConvolution(
        node, call, norm, other, activation, tuple(covers), activate, window, fused
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


def _in_place(step: Single, users: dict[Node, list[Node]], kept: frozenset[Node]) -> InPlace | None:
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
    return InPlace(call.node, call, (call.node,), _overwriting(call)) if owned else None


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


def _per_channel(value: Tensor, dims: int) -> Tensor:
    """Shaped to multiply the channels."""
    return value.view([1, -1] + [1] * (dims - 2))


def _new_weight(weight: Tensor, x: Like) -> Tensor:
    """Uninitialised, laid out as x is; for signals, as the images of one row that they go as."""
    if onednn.covers_signal(x, weight):
        rows = weight.unsqueeze(2)
        return torch.empty_like(rows, memory_format=torch.channels_last).squeeze(2)
    return torch.empty_like(weight, memory_format=x.memory_format)


def _dwarfs(weight: Tensor, image: Tensor) -> bool:
    """Whether it is cheaper to lay out an image as the weight is than the other way round."""
    return (
        weight.dim() == 4
        and weight.numel() > 20 * image.numel()
        and not weight.is_contiguous(memory_format=torch.channels_last)
        and onednn.covers(image, weight)
    )


def _is_laid_out(weight: Tensor, x: Like) -> bool:
    if onednn.covers_signal(x, weight):
        return weight.unsqueeze(2).is_contiguous(memory_format=torch.channels_last)
    return weight.is_contiguous(memory_format=x.memory_format)
