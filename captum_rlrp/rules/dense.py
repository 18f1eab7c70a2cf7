"""Dense maps (method.md §2): ``Linear`` and products with a matrix, of constants or activations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.sign import is_nonnegative
from .base import Call, Rule, Slot, cast, once, sum_to
from .linear import LinearRule, places

if TYPE_CHECKING:
    from .pass_ import Part, Pass

aten = torch.ops.aten


class Dense(LinearRule):
    """A product of two matrices seen as linear in one of them, the other held fixed.

    Args:
        slot: Where the one stands; the only active operand by default.
    """

    signed = True
    constants = ("weight", "input", "self", "other", "mat1", "mat2", "batch1", "batch2", "vec",
                 "tensor", "tensors", "operands")  # fmt: skip
    shift: ClassVar[Mapping[str, Any]] = {"bias": None}

    def __init__(self, slot: Slot | None = None) -> None:
        self._slot = slot

    def slot(self, call: Call) -> Slot:
        return self._slot or call.slots[0]

    def select(self, call: Call) -> Rule | None:
        if any(call.is_active(name) for name in self.shift):
            return None
        return self if len(call.active) == 1 else MatrixProduct(type(self))

    @once
    def one_to_one(self, call: Call) -> bool:
        if "equation" in call.args:
            return _sums_nothing(call, self.slot(call)[1])
        first = next(name for name in _FIRST if name in call.args)
        return bool(call.shape(first)[-1] == 1)

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        factors = _factors(call)
        if factors is None:
            return super().apply(run, call, x, absolute=absolute)
        return self._multiply(run, call, factors, x, absolute)

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        factors = _factors(call)
        if factors is None:
            return super().transpose(run, call, g, absolute=absolute)
        product = self._multiply(run, call, factors, g, absolute, turned=True)
        return sum_to(product, run.like(self.operand(call)).shape)

    def _multiply(
        self,
        run: Pass,
        call: Call,
        factors: tuple[str, str],
        x: Tensor,
        absolute: bool,
        turned: bool = False,
    ) -> Tensor:
        """The product with x where the operand stands, and with the other factor, or its mT."""
        is_first = self.slot(call)[0] == factors[0]
        node = call.args[factors[is_first]]
        takes_size = absolute and not is_nonnegative(node)
        matrix = run.magnitude(node, x.dtype) if takes_size else cast(run.value(node), x.dtype)
        matrix = matrix.mT if turned else matrix
        product: Tensor = run.kernels.matmul(*((x, matrix) if is_first else (matrix, x)))
        return product

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        """``Aᵀ r`` with 1 in place of the coefficients."""
        slot = self.slot(call)
        ones = {
            (name, index): torch.ones_like(run.value(node), dtype=r.dtype)
            for name in self.constants
            if name in call.args and name not in self.shift
            for index, node in places(call.args[name])
            if (name, index) != slot
        }
        like = run.like(self.operand(call))
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(like.shape, dtype=r.dtype, device=r.device).requires_grad_()
            shift = {name: None for name in self.shift if name in call.args and name == "bias"}
            y = run.evaluate(call, {slot: x, **ones}, overrides=shift)
            (result,) = torch.autograd.grad(y, x, r.clone() if r.is_inference() else r)
        return result.detach()


# The factors of a product of matrices, one or one for each index in front.
_FACTORS = {
    "matmul": ("self", "other"), "mm": ("self", "mat2"), "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
}  # fmt: skip


@once
def _factors(call: Call) -> tuple[str, str] | None:
    """The names of the factors, if both are matrices."""
    names = _FACTORS.get(call.name)
    return names if names and all(len(call.shape(name)) > 1 for name in names) else None


# The first factor of a product, whose last axis is summed over.
_FIRST = ("mat1", "batch1", "mat", "input", "self")


def _sums_nothing(call: Call, operand: int | None) -> bool:
    """Whether an einsum sums over no axis of an operand that has more than one element."""
    terms, arrow, result = call.args["equation"].replace(" ", "").partition("->")
    if not arrow or operand is None:
        return False
    before, _, behind = terms.split(",")[operand].partition("...")
    shape = call.shape(call.args["tensors"][operand])
    sizes = [*zip(before, shape, strict=False)]
    sizes += [*zip(reversed(behind), reversed(shape), strict=False)]
    return all(letter in result or bool(size == 1) for letter, size in sizes)


class Linear(Dense):
    """``aten.linear``: y = x Wᵀ + b, linear in x."""

    def select(self, call: Call) -> Rule | None:
        is_of_rows = call.slots == (("input", None),) and len(call.shape("weight")) == 2
        return self if is_of_rows else Dense().select(call)

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        if absolute:
            return run.kernels.linear(g, run.magnitude(call.args["weight"], g.dtype))
        weight: Tensor = cast(run.value(call.args["weight"]), g.dtype)
        if call.node is run.output and run.column is not None:
            return run.kernels.linear_rows(weight, run.column)
        return run.kernels.linear(g, weight)

    def shares(self, run: Pass, call: Call, x: Tensor, r: Tensor) -> Tensor:
        node = call.args["weight"]
        magnitude = run.magnitude(node, r.dtype) if node in run.magnitudes else None
        weight = cast(run.value(node), r.dtype)
        result, seen = run.kernels.linear_relevance(x, weight, r, magnitude)
        run.check(seen)
        return result

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        return r.sum(-1, keepdim=True)


class WithShift(Dense):
    """``addmm`` and its kin: a product and a constant added to it."""

    shift: ClassVar[Mapping[str, Any]] = {"self": None}

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        like = run.like(call.node)
        zero = torch.zeros(like.shape, dtype=x.dtype, device=x.device)
        constants = tuple(name for name in self.constants if name != "self")
        return run.evaluate(
            call,
            {self.slot(call): x},
            absolute=constants if absolute else (),
            overrides={"self": zero, "beta": 0, "alpha": 1},
        )


# ---- products of two activations (§6) ----------------------------------------------------------

_SOFTMAX = {aten.softmax, aten._softmax, aten._safe_softmax}
# What may lie between a softmax and the product that uses its weights.
_KEEPS_WEIGHTS = {
    aten.dropout, aten.view, aten.reshape, aten.permute, aten.transpose, aten.contiguous,
    aten.clone, aten.unsqueeze, aten.squeeze, aten.expand, aten.to, aten._to_copy, aten.masked_fill,
    aten.mul, aten.div, aten.slice, aten.select, aten.flatten, aten.unflatten, aten.pad,
    aten.constant_pad_nd,
}  # fmt: skip


def is_weights(node: Any) -> bool:
    """Whether the value is the output of a softmax, reshaped or masked maybe."""
    while isinstance(node, Node):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _SOFTMAX:
            return True
        if packet not in _KEEPS_WEIGHTS:
            return False
        node = node.args[0]
    return False


class MatrixProduct(Rule):
    """y = A·V of two activations, as a dense map of V with the matrix A.

    Attention weights are a gate and receive nothing. Where neither operand is attention weights,
    each takes half of r, with the other as its matrix.

    Args:
        linear: The rule of the product as a map of one operand.
    """

    def __init__(self, linear: Callable[[Slot], LinearRule]) -> None:
        self.linear = functools.cache(linear)

    def slots(self, call: Call) -> list[Slot]:
        """Where the operands stand that receive relevance."""
        values = [slot for slot in call.slots if not is_weights(call.at(slot))]
        return values if len(values) == 1 else list(call.slots)

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return tuple(call.at(slot) for slot in self.slots(call))

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(call.nodes())

    def of(self, slot: Slot) -> LinearRule:
        """The product as a linear map of the operand at a place."""
        return self.linear(slot)

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor | Part]:
        slots = self.slots(call)
        r = r / len(slots) if len(slots) > 1 else r
        return [part for slot in slots for part in self.of(slot).propagate(run, call, r)]
