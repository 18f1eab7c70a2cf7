"""Pass-through (method.md §3): each output has one input to send its relevance to, r_x = r_y."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from .base import Call, Relevance, Rule, sum_to

if TYPE_CHECKING:
    from ..run.program import Run


class PassThrough(Rule):
    """Elementwise non-linearities, softmax and normalisations, whose statistics are constants.

    Args:
        operand: Name of the argument that receives the relevance.
    """

    def __init__(self, operand: str = "self") -> None:
        self.operand = operand

    def select(self, call: Call) -> Rule | None:
        return self if call.is_active(self.operand) else None

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return (call.args[self.operand],)

    def saturates(self, call: Call) -> bool:
        """Whether an infinite operand may give a finite result that the model did not mean.

        In front of a softmax an infinity is a mask, and ``nan_to_num`` is there to remove it.
        """
        name = call.target.overloadpacket.__name__
        return self.operand == "self" and "softmax" not in name and name != "nan_to_num"

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        shape = run.like(call.args[self.operand]).shape
        if run.like(call.node).shape == shape:
            return [terms]
        return [[Relevance(sum_to(t.values, shape), t.factor) for t in terms]]


class InstanceNorm(PassThrough):
    """Instance norm on its own statistics; with running ones it is a linear map."""

    def __init__(self) -> None:
        super().__init__("input")

    def select(self, call: Call) -> Rule | None:
        if not call.args["use_input_stats"]:
            from .normalization import BatchNorm

            return BatchNorm().select(call)
        return super().select(call)
