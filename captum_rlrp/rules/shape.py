"""Shape ops: views, slices, expansions, flips. Relevance follows the elements (method.md §6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Call, Rule
from .linear import LinearRule
from .pass_ import Part

if TYPE_CHECKING:
    from .pass_ import Like, Pass

aten = torch.ops.aten


class Move(LinearRule):
    """An op whose outputs are one element of its input each, or a constant."""

    def one_to_one(self, call: Call) -> bool:
        return True

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        back = _BACK.get(call.target)
        if back is None or any(node is not self.operand(call) for node in call.nodes()):
            return super().transpose(run, call, g, absolute=absolute)
        return back(g, call.args, run.like(self.operand(call)))


def _into_part(take: Any) -> Callable[..., Tensor]:
    """What a part of a value came from: zeros around it, if it is not the whole."""

    def back(g: Tensor, args: dict[str, Any], like: Like) -> Tensor:
        if g.shape == like.shape:
            return g
        whole = like.zeros(g.dtype)
        take(whole, *(v for name, v in args.items() if name != "self")).copy_(g)
        return whole

    return back


# The commonest of them; automatic differentiation finds the others.
_BACK: dict[Any, Callable[[Tensor, dict[str, Any], Like], Tensor]] = {
    aten.permute.default: lambda g, args, _: g.permute(
        [[d % g.dim() for d in args["dims"]].index(d) for d in range(g.dim())]
    ),
    aten.transpose.int: lambda g, args, _: g.transpose(args["dim0"], args["dim1"]),
    aten.t.default: lambda g, args, _: g.t(),
    aten.expand.default: lambda g, args, like: g.sum_to_size(like.shape),
    aten.roll.default: lambda g, args, _: g.roll([-n for n in args["shifts"]], args["dims"]),
    aten.flip.default: lambda g, args, _: g.flip(args["dims"]),
    aten.select.int: _into_part(aten.select.int),
    aten.slice.Tensor: _into_part(aten.slice.Tensor),
}


class Slice(Move):
    """Some of the elements along an axis; no other part of the value is made."""

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor | Part]:
        like = run.like(self.operand(call))
        args = call.args
        if r.shape == like.shape or any(node is not self.operand(call) for node in call.nodes()):
            return super().propagate(run, call, r)
        dim = args["dim"] % len(like.shape)
        if "index" in args:
            return (Part(r.unsqueeze(dim), dim, args["index"] % like.shape[dim]),)
        start, _, step = slice(args["start"], args["end"], args["step"]).indices(like.shape[dim])
        return (Part(r, dim, start),) if step == 1 else super().propagate(run, call, r)


class Reshape(Move):
    """Keeps the order of the elements."""

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        return g.reshape(run.like(self.operand(call)).shape)


class Copy(Move):
    """Keeps the values: ``clone``, ``contiguous``, a cast, dropout in eval mode."""

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        return g


class Dropout(Copy):
    """Dropout in eval mode."""

    def select(self, call: Call) -> Rule | None:
        return None if call.args["train"] and call.args["p"] else self


class Pad(Move):
    """Padding; what stands on the constant is dropped."""

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        overrides = {"value": 0.0} if call.args.get("value") else {}
        return run.evaluate(call, {self.slot(call): x}, overrides=overrides)

    def transpose(self, run: Pass, call: Call, g: Tensor, *, absolute: bool = False) -> Tensor:
        if "pad" not in call.args or call.args.get("mode", "constant") != "constant":
            return super().transpose(run, call, g, absolute=absolute)
        cut: Tensor = aten.constant_pad_nd.default(g, [-n for n in run.value(call.args["pad"])])
        return cut


class Overlapping(LinearRule):
    """Any other linear op of one operand whose coefficients are not negative.

    Args:
        operand: Name of the argument it is linear in; any single one by default.
    """

    def __init__(self, operand: str | None = None) -> None:
        self._name = operand

    def select(self, call: Call) -> Rule | None:
        if self._name is not None and not call.is_active(self._name):
            return None
        return self if len(call.active) == 1 else None


class GridSample(Overlapping):
    """``grid_sampler``, bilinear or nearest; a grid that depends on the inputs is a gate."""

    def select(self, call: Call) -> Rule | None:
        is_cubic = call.args.get("interpolation_mode") == 2  # whose coefficients have both signs
        return self if call.is_active("input") and not is_cubic else None


class Difference(LinearRule):
    """``diff``: each output is a difference of neighbours, n times over."""

    def select(self, call: Call) -> Rule | None:
        return self if call.slots == (("self", None),) else None

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        dim = call.args["dim"]
        sides = [call.args.get(name) for name in ("prepend", "append")]
        before, after = (
            None if side is None else x.new_zeros([*map(int, run.value(side).shape)])
            for side in sides
        )
        x = torch.cat([part for part in (before, x, after) if part is not None], dim)
        for _ in range(call.args["n"]):
            left, right = x.narrow(dim, 0, x.shape[dim] - 1), x.narrow(dim, 1, x.shape[dim] - 1)
            x = right + left if absolute else right - left
        return x


class Interpolate(LinearRule):
    """Upsampling. Nearest neighbour copies elements; the others average them.

    Args:
        nearest: Whether it copies.
        cubic: Whether coefficients may be negative.
    """

    def __init__(self, nearest: bool = False, cubic: bool = False) -> None:
        self.nearest, self.cubic = nearest, cubic

    def one_to_one(self, call: Call) -> bool:
        before, after = call.shape(self.operand(call))[2:], call.shape(call.node)[2:]
        return self.nearest or all(b in (1, a) for b, a in zip(before, after, strict=True))

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        if not (absolute and self.cubic):
            return super().apply(run, call, x)
        rows, columns = (self._coefficients(run, call, x, axis) for axis in (2, 3))
        return rows.t() @ x @ columns

    def _coefficients(self, run: Pass, call: Call, x: Tensor, axis: int) -> Tensor:
        """Those along one axis, not negative: read off unit vectors, constant along the other."""
        other, length = 5 - axis, x.shape[axis]
        units = torch.eye(length, dtype=x.dtype, device=x.device).unsqueeze(other - 1)[None]
        overrides = {}
        # An axis of 1 is enough, which only the antialiased one takes for another case.
        if call.args["output_size"] is not None and not call.name.endswith("_aa"):
            size = list(run.like(call.node).shape[2:])
            size[other - 2] = 1
            overrides["output_size"] = size
        else:
            units = units.expand([-1 if a != other else x.shape[other] for a in range(4)])
        made = run.evaluate(call, {self.slot(call): units}, overrides=overrides)
        return made.select(other, 0)[0].abs()
