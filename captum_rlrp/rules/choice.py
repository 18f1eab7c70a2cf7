"""Choices (method.md §5): relevance goes whole to the element that was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from .base import Call, Rule, sum_to
from .linear import LinearRule
from .passthrough import PassThrough

if TYPE_CHECKING:
    from .pass_ import Pass


class Maximum(Rule):
    """Elementwise maximum or minimum of two values: to the winner, halves in a tie."""

    def __init__(self, sign: int) -> None:
        self.sign = sign

    def select(self, call: Call) -> Rule | None:
        return self if len(call.active) == 2 else PassThrough(call.slots[0][0])

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        a, b = (run.value(node) for node in call.active)
        share = (0.5 * (1 + self.sign * torch.sign(a - b))).to(r.dtype)
        return [sum_to(r * part, v.shape) for part, v in ((share, a), (1 - share, b))]


class Clamp(PassThrough):
    """``clamp`` to constants passes r on; to one other activation it is a maximum or a minimum."""

    def select(self, call: Call) -> Rule | None:
        if len(call.active) == 1:
            return PassThrough(call.slots[0][0])
        bounds = [name for name in ("min", "max") if call.args.get(name) is not None]
        if len(call.active) == 2 and len(bounds) == 1 and call.is_active("self"):
            return Maximum(1 if bounds == ["min"] else -1)
        return None


class Extremum(Rule):
    """``amax``, ``max(dim)`` and their minimum twins: to the first extreme element."""

    def __init__(self, largest: bool) -> None:
        self.largest = largest

    def select(self, call: Call) -> Rule | None:
        if "other" in call.args:
            return Maximum(1 if self.largest else -1).select(call)
        return self if "dim" in call.args else None

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        x: Tensor = run.value(call.active[0])
        dims = call.args["dim"]
        dims = [dims] if isinstance(dims, int) else list(dims) or list(range(x.dim()))
        dims = [d % x.dim() for d in dims]
        if len(dims) == 1:
            return (self._route(x, dims[0], r),)
        kept = [d for d in range(x.dim()) if d not in dims]
        moved = x.permute(kept + dims)
        routed = self._route(moved.flatten(len(kept)), -1, r).view(moved.shape)
        return (routed.permute([(kept + dims).index(d) for d in range(x.dim())]),)

    def _route(self, x: Tensor, dim: int, r: Tensor) -> Tensor:
        extreme = torch.max if self.largest else torch.min  # argmax is slow but along the last axis
        winner = extreme(x, dim, keepdim=True).indices
        return r.new_zeros(x.shape).scatter_(dim, winner, r.reshape(winner.shape))


class Chosen(Rule):
    """``topk``, ``sort``, ``median`` …: relevance of each value goes to where it was taken from."""

    def select(self, call: Call) -> Rule | None:
        return self if "dim" in call.args and call.item == 0 else None

    def needs(self, call: Call) -> tuple[Node, ...]:
        return call.active

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        dim, shape = call.args["dim"], run.like(call.active[0]).shape
        places = run.evaluate(replace(call, item=1), {})
        if call.args.get("keepdim") is False:
            places, r = places.unsqueeze(dim), r.unsqueeze(dim)
        return (r.new_zeros(shape).scatter_add_(dim, places, r),)


class Picked(Rule):
    """``fractional_max_pool``: to the maxima, whose places count over all positions of a channel.

    Args:
        axes: How many axes the positions have.
    """

    def __init__(self, axes: int) -> None:
        self.axes = axes

    def select(self, call: Call) -> Rule | None:
        return self if call.item == 0 else None

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(call.nodes())

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        shape = run.like(call.active[0]).shape
        places = run.evaluate(replace(call, item=1), {}).flatten(-self.axes)
        result = r.new_zeros(shape).flatten(-self.axes)
        result.scatter_add_(-1, places, r.flatten(-self.axes))
        return (result.view(shape),)


class Masked(LinearRule):
    """One branch behind a fixed mask, which multiplies by 0 or 1 and may add a constant."""

    def fixed(self, call: Call) -> tuple[Node, ...]:
        return _masks(call)

    def one_to_one(self, call: Call) -> bool:
        return True

    def apply(self, run: Pass, call: Call, x: Tensor, *, absolute: bool = False) -> Tensor:
        return x * self._kept(run, call)

    def route(self, run: Pass, call: Call, r: Tensor) -> Tensor:
        return sum_to(r * self._kept(run, call), run.like(self.operand(call)).shape)

    def _kept(self, run: Pass, call: Call) -> Tensor:
        (mask,) = (run.value(node) for node in _masks(call))
        covers = call.is_active("value") if "mask" in call.args else not call.is_active("other")
        return mask if covers else ~mask


class Where(Rule):
    """``where`` and ``masked_fill``: relevance follows the elements; the condition is a gate."""

    def select(self, call: Call) -> Rule | None:
        if any(name not in ("self", "other", "input", "value") for name, _ in call.slots):
            return None
        fixed = all(not node.meta.get("depends", True) for node in _masks(call))
        return Masked() if len(call.active) == 1 and fixed and _masks(call) else self

    def needs(self, call: Call) -> tuple[Node, ...]:
        return _masks(call)

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        (mask,) = (run.value(node) for node in _masks(call))
        first = "self" if "condition" in call.args else "value"  # taken where the mask is true
        return [
            sum_to(r * (mask if name == first else ~mask), run.like(node).shape)
            for (name, _), node in zip(call.slots, call.active, strict=True)
        ]


def _masks(call: Call) -> tuple[Node, ...]:
    masks = (call.args.get(name) for name in ("condition", "mask"))
    return tuple(mask for mask in masks if isinstance(mask, Node))
