"""What a fused forward does in place of the captured calls, and the rules for the way back.

Each yields the value of one node, and leaves what the way back needs in ``run.scratch``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.layout import memory_format
from ..kernels import convolution, onednn
from ..kernels.convolution import Filters
from ..kernels.reference import accumulation_dtype
from ..rules import Call, Pass
from ..rules.attention import kept_weights
from ..rules.normalization import batch_norm_scale
from ..rules.pooling import MaxPool
from ..rules.skip import Sum

aten = torch.ops.aten

_LARGE_WEIGHT = 2**18  # elements


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
        suits: Whether the convolution is one of ours, wherever that pays.
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
    suits: bool

    @property
    def reads(self) -> tuple[Node, ...]:
        """The values it is computed from."""
        nodes = [*self.conv.nodes(), *([self.other] if self.other is not None else [])]
        if self.norm is not None:
            nodes += [n for n in self.norm.nodes() if n is not self.conv.node]
        return tuple(nodes)

    def fold(self, run: Pass, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight with the batch norm folded in, laid out as oneDNN wants it; and the bias."""
        weight: Tensor = run.value(self.conv.args["weight"])
        bias: Tensor | None = run.value(self.conv.args["bias"])
        if self.norm is None:
            return weight if _is_laid_out(weight, x) else _new_weight(weight, x).copy_(weight), bias
        scale, shift = run.scratch[self.norm.node]
        scale = scale.view([-1] + [1] * (weight.dim() - 1)).to(weight.dtype)
        return torch.mul(weight, scale, out=_new_weight(weight, x)), shift

    def filters(self, run: Pass, x: Tensor) -> Filters | None:
        """The filters for :mod:`.kernels.convolution`, if that covers x."""
        if not self.suits:
            return None
        weight: Tensor = run.value(self.conv.args["weight"])
        if not convolution.pays(x, weight):
            return None
        assert self.window is not None
        scale, shift = None, run.value(self.conv.args["bias"])
        if self.norm is not None:
            scale, shift = run.scratch[self.norm.node]
        stride, padding, _ = self.window
        return Filters(weight, scale, shift, stride, padding)

    def __call__(self, run: Pass) -> Tensor:
        x: Tensor = run.value(self.conv.args["input"])
        other: Tensor | None = run.value(self.other)
        filters = self.filters(run, x)
        if filters is not None:
            return self._by_ours(run, x, other, filters)
        if self.norm is not None and self._leaves_weight(run, x):
            return self._normalize(run, x, other)
        return self._convolve(run, x, other, *self.fold(run, x))

    def _by_ours(self, run: Pass, x: Tensor, other: Tensor | None, filters: Filters) -> Tensor:
        if self.fused is None or self.fused[0] not in ("none", "relu"):
            y, _ = convolution.forward(x, filters)
            return self._finish(run, y, other)
        relu = self.activation is not None
        y, total = convolution.forward(x, filters, other, relu=relu)
        if relu:  # which hides a −∞
            run.check(total)
        return y

    def _outweighs(self, run: Pass, x: Tensor) -> bool:
        """Whether the weight has more elements than the output."""
        weight: Tensor = run.value(self.conv.args["weight"])
        return weight.numel() > len(x) * math.prod(self.conv.shape(self.conv.node)[1:])

    def _leaves_weight(self, run: Pass, x: Tensor) -> bool:
        """Whether it is less work to scale the output: a weight to be laid out is copied anyway."""
        if not _adds_bias(x):  # what adds the shift scales on the way
            return True
        weight: Tensor = run.value(self.conv.args["weight"])
        is_laid_out = _is_laid_out(weight, x)
        return (is_laid_out and self._outweighs(run, x)) or onednn.dwarfs(weight, x)

    def _normalize(self, run: Pass, x: Tensor, other: Tensor | None) -> Tensor:
        assert self.norm is not None
        weight: Tensor = run.value(self.conv.args["weight"])
        scale, shift = run.scratch[self.norm.node]
        return self._finish(run, self._plain(x, weight, None), other, scale, shift)

    def _convolve(
        self,
        run: Pass,
        x: Tensor,
        other: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        if self.fused is not None and self.window is not None and onednn.covers(x, weight):
            groups = self.conv.args["groups"]
            y = onednn.convolution(x, weight, bias, *self.window, groups, self.fused, other)
            if y is not None:
                # oneDNN's activations hide even a NaN. The law's divisor tells of one in x or the
                # weight.
                if self.activation is not None and bias is not None:
                    run.check(bias)
                return y
        if _adds_bias(x):
            return self._finish(run, self._plain(x, weight, bias), other)
        return self._finish(run, self._plain(x, weight, None), other, None, bias)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution alone."""
        args = self.conv.args
        bias = None if bias is None else bias.to(weight.dtype)
        if self.window is not None and onednn.covers(x, weight):
            plain = onednn.convolution(x, weight, bias, *self.window, args["groups"])
            assert plain is not None
            return plain
        y: Tensor = self.conv.target(
            x, weight, bias, args["stride"], args["padding"], args["dilation"], args["groups"]
        )
        return y

    def _ends_in_relu(self) -> bool:
        return self.activation is not None and self.activation.target is aten.relu.default

    def _finish(
        self,
        run: Pass,
        y: Tensor,
        other: Tensor | None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """What follows the convolution, in place: one pass, and one for other activations."""
        relu = self._ends_in_relu()
        if relu or not (other is scale is shift is None):
            run.check(run.kernels.finish_(y, scale, shift, other, relu=relu))
        elif self.activate is not None:
            run.watch(y)
        return y if relu or self.activate is None else self.activate(y)


@dataclass(frozen=True, eq=False)
class BatchNorms:
    """The scale and shift of several batch norms, worked out together: each is a few tiny calls.

    Attributes:
        folded: The convolutions they are folded into.
    """

    folded: tuple[FusedConvolution, ...]

    def __call__(self, run: Pass) -> None:
        """Leaves them in the run's scratch, in float32 at least, for their batch norms' nodes."""
        norms = [made.norm for made in self.folded if made.norm is not None]

        def gather(calls: Iterable[Call], name: str) -> Tensor | None:
            values = [run.value(call.args[name]) for call in calls]
            if values[0] is None:
                return None
            return torch.cat(values).to(accumulation_dtype(values[0].dtype))

        variance, mean = gather(norms, "running_var"), gather(norms, "running_mean")
        assert variance is not None
        assert mean is not None
        scale = batch_norm_scale(variance, norms[0].args["eps"], gather(norms, "weight"))
        offset, bias = gather(norms, "bias"), gather((made.conv for made in self.folded), "bias")
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
            alike.setdefault((value.dtype, value.device, args["eps"], absent), []).append(made)
    return [BatchNorms(tuple(group)) for group in alike.values()]


@dataclass(frozen=True, eq=False)
class _OneCall:
    """What stands for one call of the graph."""

    call: Call

    @property
    def node(self) -> Node:
        """The node whose value it yields."""
        return self.call.node

    @property
    def covers(self) -> tuple[Node, ...]:
        """All nodes it stands for."""
        return (self.call.node,)

    @property
    def reads(self) -> tuple[Node, ...]:
        """The values it is computed from."""
        return tuple(self.call.nodes())


@dataclass(frozen=True, eq=False)
class InPlace(_OneCall):
    """An elementwise call that overwrites an operand nobody reads again; that is checked first."""

    activate: Callable[[Tensor], Tensor]

    def __call__(self, run: Pass) -> Tensor:
        value: Tensor = run.value(self.call.active[0])
        run.watch(value)
        return self.activate(value)


@dataclass(frozen=True, eq=False)
class ReluInPlace(_OneCall):
    """The same for ReLU; the operand is watched on the way."""

    def __call__(self, run: Pass) -> Tensor:
        value: Tensor = run.value(self.call.active[0])
        run.check(run.kernels.finish_(value, relu=True))
        return value


@dataclass(frozen=True, eq=False)
class WinnersPool(_OneCall):
    """Max pooling that leaves the winners for the way back, so that its input is not kept."""

    rule: MaxPool

    def __call__(self, run: Pass) -> Tensor:
        y, run.scratch[self] = self.rule.pool(run, self.call)
        return y


@dataclass(frozen=True, eq=False)
class Linear(_OneCall):
    """A dense layer by oneDNN where that is faster: on some processors twice."""

    def __call__(self, run: Pass) -> Tensor:
        args = self.call.args
        x, weight, bias = run.value([args["input"], args["weight"], args["bias"]])
        product = onednn.linear if onednn.multiplies(x, weight) else torch.nn.functional.linear
        return product(x, weight, bias)


@dataclass(frozen=True, eq=False)
class Attention(_OneCall):
    """Attention that leaves its weights for the way back, if they are few."""

    def __call__(self, run: Pass) -> Tensor:
        weights, args = kept_weights(run, self.call), self.call.args
        if weights is None:
            y: Tensor = self.call.target(**{name: run.value(args[name]) for name in args})
            return y
        run.scratch[self] = weights
        product: Tensor = run.kernels.matmul(weights, run.value(args["value"]))
        return product


Instruction = Attention | FusedConvolution | InPlace | Linear | ReluInPlace | WinnersPool


class RememberedMaxPool(MaxPool):
    """Max pooling whose winners the forward left."""

    def __init__(self, instruction: WinnersPool) -> None:
        super().__init__(instruction.rule.axes, instruction.rule.adaptive)
        self.instruction = instruction

    def needs(self, call: Call) -> tuple[Node, ...]:
        return ()

    def winners(self, run: Pass, call: Call) -> Tensor:
        winners: Tensor = run.scratch.pop(self.instruction)
        return winners


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

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        s, b = (run.value(node).to(r.dtype) for node in (self.result, self.other))
        r_a, r_b = run.kernels.split(s, b, r, from_sum=True)
        by_node = {self.first: r_a, self.other: r_b}
        return [by_node[node] for node in call.active]


def _adds_bias(x: Tensor) -> bool:
    """Whether convolutions of x add it, and round once; elsewhere that is a pass of its own."""
    return x.device.type == "cpu"


def _new_weight(weight: Tensor, x: Tensor) -> Tensor:
    """Uninitialised, laid out as oneDNN wants it for x."""
    if _is_large_of_signals(weight, x):
        filters, channels, taps = weight.shape
        return weight.new_empty(filters, taps, channels).transpose(1, 2)
    return torch.empty_like(weight, memory_format=memory_format(x))


def _is_laid_out(weight: Tensor, x: Tensor) -> bool:
    if _is_large_of_signals(weight, x):
        return weight.transpose(1, 2).is_contiguous()
    return weight.is_contiguous(memory_format=memory_format(x))


def _is_large_of_signals(weight: Tensor, x: Tensor) -> bool:
    """Whether oneDNN would take long to lay out the filters; smaller ones stay as they lie."""
    return weight.dim() == 3 and weight.numel() >= _LARGE_WEIGHT and onednn.covers(x, weight)
