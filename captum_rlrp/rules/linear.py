"""The law of linear maps (method.md §2): the heart of the method.

Let y_j = Σ_i a_ji x_i + b_j be a linear map, c_ji = a_ji x_i the contribution of input i to j,
D_j = Σ_k |c_jk|, and r_j the relevance at output j. Then

    spatial maps     r_i = Σ_j r_j |c_ji| / D_j  =  |x_i| (|A|ᵀ s)_i
    dense maps       r_i = Σ_j r_j  c_ji  / D_j  =   x_i  ( Aᵀ s)_i         with s = r / D, 0/0 = 0

Nothing in a divisor cancels, and every share lies in [−1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.sign import is_nonnegative
from .base import Call, Rule, Slot, cast, once

if TYPE_CHECKING:
    from .pass_ import Part, Pass


class LinearRule(Rule):
    """A linear map of one operand. Its constant receives nothing.

    A map whose outputs have one input each (:meth:`one_to_one`) passes relevance on unchanged.

    Attributes:
        signed: Whether the map is a dense one.
        pools: Whether it is a mean or sum over positions.
        constants: Names of the arguments that hold the coefficients, where those may be negative.
        shift: Names of the arguments that are added, and what takes their place in ``A x``.
    """

    signed = False
    pools = False
    constants: tuple[str, ...] = ()
    shift: ClassVar[Mapping[str, Any]] = {}

    def slot(self, call: Call) -> Slot:
        """Where the operand stands that the map is linear in."""
        return call.slots[0]

    @once
    def operand(self, call: Call) -> Node:
        """The operand that the map is linear in."""
        return call.at(self.slot(call))

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return (self.operand(call),)

    def fixed(self, call: Call) -> tuple[Node, ...]:
        """The values that the coefficients depend on."""
        slot = self.slot(call)
        return tuple(
            node
            for name, value in call.args.items()
            if name not in self.shift
            for index, node in places(value)
            if (name, index) != slot
        )

    def magnitudes(self, call: Call) -> tuple[Node, ...]:
        """The coefficients whose absolute values the law reads."""
        if self.one_to_one(call):
            return ()
        slot = self.slot(call)
        return tuple(
            node
            for name in self.constants
            if name in call.args and name not in self.shift
            for index, node in places(call.args[name])
            if (name, index) != slot
        )

    def needs(self, call: Call) -> tuple[Node, ...]:
        if self.one_to_one(call):
            return self.fixed(call)
        return (*self.fixed(call), self.operand(call))

    def one_to_one(self, call: Call) -> bool:
        """Whether every output depends on one input at most."""
        return False

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        """``A x``, or ``|A| x``: the map without its constant."""
        shift = {name: value for name, value in self.shift.items() if name in call.args}
        return run.evaluate(
            call,
            {self.slot(call): x},
            absolute=self.constants if absolute else (),
            overrides=shift,
        )

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        """``Aᵀ g``, or ``|A|ᵀ g``: by automatic differentiation, exact for a linear map."""
        like = run.like(self.operand(call))
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros(like.shape, dtype=g.dtype, device=g.device).requires_grad_()
            y = self.apply(run, call, x, absolute=absolute)
            g = g.clone() if g.is_inference() else g
            (result,) = torch.autograd.grad(y, x, g, allow_unused=True)
        return x.detach() if result is None else result.detach()

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        """For a one-to-one map: relevance follows the elements, whatever the coefficients are."""
        return self.transpose(run, call, r)

    def shares(self, run: Pass, call: Call, x: Tensor, r: Tensor) -> Tensor:
        """The law."""
        size = x if is_nonnegative(self.operand(call)) else run.kernels.magnitude(x)
        d = self.apply(run, call, size, absolute=True)
        s, seen = run.kernels.divide(r, d)
        run.check(seen)
        g = self.transpose(run, call, s, absolute=not self.signed)
        return run.kernels.multiply(x, g, absolute=not self.signed)

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor | Part]:
        if self.one_to_one(call):
            return (self.route(run, call, r),)
        x = cast(run.values[self.operand(call)], r.dtype)
        result = self.shares(run, call, x, r)
        if run.violation is not None:
            self.measure(run, call, x, r, result)
        return (result,)

    def measure(self, run: Pass, call: Call, x: Tensor, r: Tensor, result: Tensor) -> None:
        """Notes how far ``Σ_i r_i`` is from what the law says, in parts of ``Σ_j |r_j|``."""
        d = self.apply(run, call, x.abs(), absolute=True)
        kept = d > 0  # of a spatial map; these are large: no float64 where a bit will do
        if self.signed:
            kept = torch.where(kept, self.apply(run, call, x).double() / d.double(), 0.0)
        note_violation(run, call, self.operand(call), r, kept, result)


def note_violation(
    run: Pass, call: Call, operand: Node, r: Tensor, kept: Tensor, result: Tensor
) -> None:
    """Notes ``|Σ_i r_i − Σ_j kept_j r_j| / Σ_j |r_j|`` of each sample (0 where nothing arrived)."""

    def total(node: Node, value: Tensor) -> Tensor:
        return run.samples_first(node, value).reshape(run.batch, -1).sum(1, dtype=torch.float64)

    assert run.violation is not None
    mass = total(call.node, r.abs())
    error = (total(operand, result) - total(call.node, kept * r)).abs()
    error = torch.where(mass > 0, error / mass, 0.0)
    run.violation = torch.maximum(run.violation, error)


def places(value: Any) -> list[tuple[int | None, Node]]:
    """The nodes of an argument, each with its index where that is a list."""
    if isinstance(value, Node):
        return [(None, value)]
    if isinstance(value, (list, tuple)):
        return [(i, node) for i, node in enumerate(value) if isinstance(node, Node)]
    return []
