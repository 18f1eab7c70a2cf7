"""Which values of a captured graph are surely not negative: they need no absolute values."""

from __future__ import annotations

from typing import Any

from torch.fx import Node


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Whatever the operand is.
_NOT_NEGATIVE = _names(
    "relu relu6 sigmoid hardsigmoid softmax _softmax _safe_softmax softplus exp exp2 abs square "
    "sqrt"
)
# As long as all operands are.
_KEEPS = _names(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d mean sum amax cat stack add mul "
    "dropout feature_dropout reshape view flatten unflatten squeeze unsqueeze permute transpose "
    "expand slice select clone contiguous to _to_copy alias upsample_nearest2d upsample_bilinear2d "
    "pixel_shuffle pad constant_pad_nd"
)
_TAKES_NUMBERS = _names("add mul pad constant_pad_nd")


def is_nonnegative(node: Node) -> bool:
    """Whether a value is surely not negative. It is worked out once, and noted at the node."""
    known: bool | None = node.meta.get("nonnegative")
    if known is None:
        known = node.meta["nonnegative"] = _infer(node)
    return known


def _infer(node: Node) -> bool:
    packet: Any = getattr(node.target, "overloadpacket", None)
    name = packet.__name__ if packet is not None else ""
    if name in ("hardtanh", "clamp", "clamp_min"):
        bound = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
        return isinstance(bound, (int, float)) and bound >= 0
    if name in _NOT_NEGATIVE:
        return True
    operands = node.all_input_nodes
    given = (*node.args, *node.kwargs.values()) if name in _TAKES_NUMBERS else ()
    numbers = [a for a in given if isinstance(a, (int, float))]
    if (
        name not in _KEEPS
        or not operands
        or any(a < 0 for a in numbers)
        or node.kwargs.get("alpha")
    ):
        return False
    return all(map(is_nonnegative, operands))
