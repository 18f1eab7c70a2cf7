"""``cat``, ``stack`` and writes into a part (method.md §6): relevance follows the elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Node

from .base import Call, Rule, Slot, sum_to
from .linear import LinearRule

if TYPE_CHECKING:
    from .pass_ import Pass


class Join(Rule):
    """Each operand takes its part of the relevance; a constant's part is not passed on."""

    def __init__(self, stacks: bool) -> None:
        self.stacks = stacks

    def operands(self, call: Call) -> tuple[Node, ...]:
        """What is joined, in order."""
        return tuple(call.args["tensors"])

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return tuple(operand for operand in self.operands(call) if operand in call.active)

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        dim = call.args["dim"] % r.dim()
        carriers = self.carriers(call)
        parts = []
        start = 0
        for operand in self.operands(call):
            active = operand in carriers
            if self.stacks:
                size = 1
            else:  # a constant's is known from the capture
                size = (run.like(operand).shape if active else call.shape(operand))[dim]
            if active:
                part = r.narrow(dim, start, size)
                parts.append(part.squeeze(dim) if self.stacks else part)
            start += size
        return parts


class Extension(Join):
    """``cat(a, b, c)`` where ``cat(a, b)`` is at hand, seen as ``cat(cat(a, b), c)``.

    In dense blocks every layer joins all outputs before it. So each output's relevance is summed
    once, and not once for every layer behind it.

    Args:
        joined: The value that its first operands make.
        count: How many they are.
    """

    def __init__(self, joined: Node, count: int) -> None:
        super().__init__(stacks=False)
        self.joined, self.count = joined, count

    def operands(self, call: Call) -> tuple[Node, ...]:
        return (self.joined, *call.args["tensors"][self.count :])

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return self.operands(call)


class _Written(LinearRule):
    """The result of a write as a linear map of one of the two values."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def slot(self, call: Call) -> Slot:
        return self._slot


class Scatter(Rule):
    """A value with a part replaced: what is replaced receives nothing, what replaces it does."""

    def needs(self, call: Call) -> tuple[Node, ...]:
        return tuple(node for node in call.nodes() if node not in call.active)

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        return [_Written(slot).transpose(run, call, r) for slot in call.slots]


class Overwrite(Rule):
    """``copy``: the whole value is replaced by another, which may be broadcast."""

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return (call.args["src"],) if call.is_active("src") else ()

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        return [sum_to(r, run.like(node).shape) for node in self.carriers(call)]
