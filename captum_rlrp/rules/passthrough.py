"""Pass-through (method.md §3): each output has one input to send its relevance to, r_x = r_y."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Node

from .base import Call, Rule, sum_to
from .normalization import BatchNorm

if TYPE_CHECKING:
    from .pass_ import Pass


class PassThrough(Rule):
    """Elementwise non-linearities, softmax and normalisations, whose statistics are constants.

    Args:
        operand: Name of the argument that receives the relevance.
    """

    def __init__(self, operand: str = "self") -> None:
        self.operand = operand

    def select(self, call: Call) -> Rule | None:
        return self if call.slots == ((self.operand, None),) else None

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return (call.args[self.operand],)

    def saturates(self, call: Call) -> bool:
        """Whether an infinite operand may give a finite result that the model did not mean.

        In front of a softmax or an exponential an infinity is a mask, and ``nan_to_num`` is there
        to remove it.
        """
        means_it = "softmax" in call.name or call.name in ("exp", "exp2", "nan_to_num")
        return self.operand == "self" and not means_it

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        return (sum_to(r, run.like(call.args[self.operand]).shape),)


class InstanceNorm(PassThrough):
    """Instance norm on its own statistics; with running ones it is a linear map."""

    def __init__(self) -> None:
        super().__init__("input")

    def select(self, call: Call) -> Rule | None:
        if not call.args["use_input_stats"]:
            return BatchNorm().select(call)
        return super().select(call)


class Power(PassThrough):
    """A power, of a value or to one; of one value to another there is no rule."""

    def select(self, call: Call) -> Rule | None:
        return PassThrough(call.slots[0][0]) if len(call.slots) == 1 else None
