"""Attention (method.md §6): the weights are a gate, the value path is a dense map."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Call, Rule, Slot
from .dense import MatrixProduct
from .linear import LinearRule

if TYPE_CHECKING:
    from .pass_ import Pass

aten = torch.ops.aten

_LARGEST = 2**25  # weights that are made at once
_FEW = 2**22  # or kept from the forward to the way back


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

    def weights(self, run: Pass, call: Call, dtype: torch.dtype) -> Tensor | None:
        """The matrix, if it is made as a whole."""
        return weights_of(run, call, dtype)

    def shares(self, run: Pass, call: Call, x: Tensor, r: Tensor) -> Tensor:
        """The law; the weights are made once for both products, where they are not too many."""
        weights = self.weights(run, call, r.dtype)
        if weights is None:
            return super().shares(run, call, x, r)
        matmul = run.kernels.matmul
        s, seen = run.kernels.divide(r, matmul(weights, run.kernels.magnitude(x)))
        run.check(seen)
        result: Tensor = run.kernels.multiply(x, matmul(weights.mT, s))
        return result


def weights_of(run: Pass, call: Call, dtype: torch.dtype) -> Tensor | None:
    """``softmax(QKᵀ·scale + mask)``; None where that is too large, or heads share operands."""
    names = ("query", "key", "value", "attn_mask")
    q, k, v, mask = (run.value(call.args[name]) for name in names)
    if (
        not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        or q.shape[:-1].numel() * k.shape[-2] > _LARGEST
    ):
        return None
    scale = call.args.get("scale")
    scaled = q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores: Tensor = run.kernels.matmul(scaled, k.to(dtype).mT)
    if call.args["is_causal"]:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores.softmax(-1)
    masks = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, float("-inf")) if masks else scores + mask.to(dtype)
    # Of a row that is masked altogether the attention is 0.
    return aten._safe_softmax(scores, -1)


class ScaledDotProductAttention(MatrixProduct):
    """``softmax(QKᵀ·scale + mask) V``: the product of the attention weights and V."""

    def __init__(self, linear: Callable[[Slot], LinearRule] = _Weighted) -> None:
        super().__init__(linear)

    def select(self, call: Call) -> Rule | None:
        dropped = call.args.get("dropout_p")
        return self if call.is_active("value") and not dropped else None

    def slots(self, call: Call) -> list[Slot]:
        return [("value", None)]


# ---- with the weights of the forward -----------------------------------------------------------


def kept_weights(run: Pass, call: Call) -> Tensor | None:
    """The weights, where the forward is to make and keep them: on a CPU, if they are few."""
    q, k = run.value([call.args["query"], call.args["key"]])
    few = q.shape[:-1].numel() * k.shape[-2] <= _FEW
    if not few or not q.is_cpu or q.dtype.itemsize < 4:
        return None
    return weights_of(run, call, q.dtype)


class _Remembered(_Weighted):
    """The same map, with the weights that the forward left if it did."""

    def __init__(self, slot: Slot, key: Any) -> None:
        super().__init__(slot)
        self._key = key

    def weights(self, run: Pass, call: Call, dtype: torch.dtype) -> Tensor | None:
        weights: Tensor | None = run.scratch.pop(self._key, None)
        return super().weights(run, call, dtype) if weights is None else weights.to(dtype)


class RememberedAttention(ScaledDotProductAttention):
    """Attention of which the forward may have left the weights.

    Args:
        key: Where in the run's scratch.
    """

    def __init__(self, key: Any) -> None:
        super().__init__(lambda slot: _Remembered(slot, key))
