"""Attention (method.md §6): the weights are a gate, the value path is a dense map."""

from __future__ import annotations

from .base import Call, Rule, Slot
from .dense import MatrixProduct
from .linear import LinearRule


class _Weighted(LinearRule):
    """Attention as a map of V, whose matrix is not negative."""

    signed = True

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def slot(self, call: Call) -> Slot:
        return self._slot

    def one_to_one(self, call: Call) -> bool:
        """Whether there is a single token to attend to, with weight 1."""
        return bool(call.shape("value")[-2] == 1)


class ScaledDotProductAttention(MatrixProduct):
    """``softmax(QKᵀ·scale + mask) V``: the product of the attention weights and V."""

    def __init__(self) -> None:
        super().__init__(_Weighted)

    def select(self, call: Call) -> Rule | None:
        dropped = call.args.get("dropout_p")
        return self if call.is_active("value") and not dropped else None

    def slots(self, call: Call) -> list[Slot]:
        return [("value", None)]
