"""Convolutions and transposed convolutions in 1 to 3 dimensions, spatial maps (method.md §2)."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.sign import is_nonnegative
from ..kernels.reference import Window, ints
from .base import Call, Rule, Slot, cast, once
from .dense import MatrixProduct
from .linear import LinearRule

if TYPE_CHECKING:
    from .pass_ import Pass


class Convolution(LinearRule):
    """y = w ∗ x + b, linear in the image or, where that is what depends on the inputs, in w."""

    constants = ("weight", "input")
    shift: ClassVar[Mapping[str, Any]] = {"bias": None}

    def __init__(self, slot: Slot | None = None) -> None:
        self._slot = slot

    def slot(self, call: Call) -> Slot:
        return self._slot or call.slots[0]

    def select(self, call: Call) -> Rule | None:
        if call.is_active("bias"):
            return None
        return self if len(call.active) == 1 else MatrixProduct(Convolution)

    @once
    def _of_image(self, call: Call) -> bool:
        """Whether it is linear in a batch of images, with padding alike on both sides."""
        return self.slot(call)[0] == "input" and _is_of_image(call)

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        if not self._of_image(call):
            return super().transpose(run, call, g, absolute=absolute)
        node = weight_of(call)
        weight = run.magnitude(node, g.dtype) if absolute else cast(run.value(node), g.dtype)
        shape = run.like(call.args["input"]).shape
        return run.kernels.conv(g, weight, shape, _window(call))

    def shares(self, run: Pass, call: Call, x: Tensor, r: Tensor) -> Tensor:
        if not self._of_image(call):
            return super().shares(run, call, x, r)
        node = weight_of(call)
        magnitude = run.magnitude(node, r.dtype) if node in run.magnitudes else None
        weight = cast(run.value(node), r.dtype) if magnitude is None else magnitude
        operand = self.operand(call)
        other = run.take(operand)
        result, seen = run.kernels.conv_relevance(
            x, weight, r, _window(call),
            nonnegative=is_nonnegative(operand), magnitude=magnitude, other=other,
        )  # fmt: skip
        run.check(seen)
        return result

    @once
    def one_to_one(self, call: Call) -> bool:
        return self.slot(call)[0] == "input" and _reads_one(call)

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        weight = run.value(call.args["weight"])
        ones = torch.ones_like(weight, dtype=r.dtype)
        shape = run.like(call.args["input"]).shape
        if len(shape) == weight.dim():
            return run.kernels.conv(r, ones, shape, _window(call))
        return run.kernels.conv(r.unsqueeze(0), ones, (1, *shape), _window(call)).squeeze(0)


class Deformable(LinearRule):
    """torchvision's convolution at places that the offsets move: these, and the mask, are gates."""

    constants = ("weight", "mask")

    def slot(self, call: Call) -> Slot:
        return ("input", None)

    def select(self, call: Call) -> Rule | None:
        return self if call.is_active("input") else None

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        return run.evaluate(
            call,
            {self.slot(call): x},
            absolute=self.constants if absolute else (),
            overrides={"bias": x.new_zeros(int(call.shape("weight")[0]))},
        )


@once
def _is_of_image(call: Call) -> bool:
    """Whether images come as a batch, with padding alike on both sides."""
    return len(call.shape("input")) == len(call.shape("weight")) and window(call) is not None


@once
def _reads_one(call: Call) -> bool:
    """Whether every output has one input."""
    found, weight = window(call), call.shape("weight")
    if found is None or not found.transposed:
        return bool(weight[1] * prod(weight[2:]) == 1 and found is not None)
    # Windows that tile the output (padding cuts it), one input channel a group.
    return bool(
        weight[0] == found.groups
        and list(weight[2:]) == found.stride
        and all(d == 1 for d in found.dilation)
        and all(o <= p for o, p in zip(found.output_padding, found.padding, strict=True))
    )


@once
def window(call: Call) -> Window | None:
    """The convolution's window; None where "same" pads more on one side than on the other."""
    rank = len(call.shape("weight")) - 2
    padding = _padding(call, rank)
    if padding is None:
        return None
    transposed = call.args.get("transposed")
    if transposed is None:
        transposed = "output_padding" in call.args
    args: Any = call.args
    return Window(
        ints(args["stride"], rank),
        padding,
        ints(args["dilation"], rank),
        transposed,
        ints(args.get("output_padding", 0), rank),
        args["groups"],
    )


def _window(call: Call) -> Window:
    found = window(call)
    assert found is not None
    return found


def _padding(call: Call, rank: int) -> list[int] | None:
    padding = call.args["padding"]
    if not isinstance(padding, str):
        return ints(padding, rank)
    if padding == "valid":
        return [0] * rank
    kernel, dilation = list(call.shape("weight")[2:]), ints(call.args["dilation"], rank)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [t // 2 for t in total] if all(t % 2 == 0 for t in total) else None


def weight_of(call: Call) -> Node:
    """The node of the filters."""
    node: Node = call.args["weight"]
    return node
