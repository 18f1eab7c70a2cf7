"""Shape ops: views, slices, expansions, flips. Relevance follows the elements (method.md §6)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import Call, LinearRule, Rule

if TYPE_CHECKING:
    from ..run.program import Run


class Move(LinearRule):
    """An op whose outputs are each one element of its input."""

    def one_to_one(self, call: Call) -> bool:
        return True


class Reshape(Move):
    """Keeps the order of the elements."""

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        return g.reshape(run.like(self.operand(call)).shape)


class Copy(Move):
    """Keeps the values: ``clone``, ``contiguous``, a cast, dropout in eval mode."""

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        return g


class Dropout(Copy):
    """Dropout in eval mode."""

    def select(self, call: Call) -> Rule | None:
        return None if call.args["train"] and call.args["p"] else self


class Pad(Move):
    """Padding. Constant padding has outputs that depend on no input, so alone it is a section."""

    def one_to_one(self, call: Call) -> bool:
        return call.args.get("mode", "constant") != "constant"

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        overrides = {"value": 0.0} if call.args.get("value") else {}
        return run.evaluate(call, {self.operand(call): x}, overrides=overrides)


class Interpolate(LinearRule):
    """Upsampling. Nearest neighbour copies elements; the others average them."""

    def __init__(self, nearest: bool) -> None:
        self.nearest = nearest

    def one_to_one(self, call: Call) -> bool:
        before, after = call.shape(self.operand(call))[2:], call.shape(call.node)[2:]
        return self.nearest or all(b in (1, a) for b, a in zip(before, after, strict=True))


class Linear(LinearRule):
    """Any other linear op of one operand, transposed by automatic differentiation.

    Args:
        operand: Name of the argument it is linear in; any single one by default.
    """

    def __init__(self, operand: str | None = None) -> None:
        self._name = operand

    def select(self, call: Call) -> Rule | None:
        if self._name is not None and not call.is_active(self._name):
            return None
        return self if len(call.active) == 1 else None
