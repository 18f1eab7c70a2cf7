"""Absolute values of weights, by one call for many layers: on a GPU each call is a launch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.layout import channels_last
from ..plan.steps import Single, Step
from ..rules import LinearRule

_MOST_BYTES = 2**28  # held at a time, beside a larger layer's


def groups(steps: Sequence[Step], active: Collection[Node]) -> dict[int, list[Node]]:
    """The constants whose absolute values the law reads, those together that are made together.

    Args:
        steps: The steps, in the order of the forward.
        active: Values that depend on the inputs: their absolute values are each step's own.

    Returns:
        The number of the step that is the first on the way back to read a group → its nodes.
    """
    found: dict[int, list[Node]] = {}
    met: set[Node] = set()
    first, size = -1, _MOST_BYTES
    for i in reversed(range(len(steps))):
        step = steps[i]
        if not isinstance(step, Single) or not isinstance(step.rule, LinearRule):
            continue
        for node in step.rule.magnitudes(step.call):
            if node in met or node in active or not _is_floating(node):
                continue
            met.add(node)
            bytes_ = node.meta["val"].numel() * node.meta["val"].dtype.itemsize
            if size + bytes_ > _MOST_BYTES:
                first, size = i, 0
            size += bytes_
            found.setdefault(first, []).append(node)
    return found


def _is_floating(node: Node) -> bool:
    value: Any = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def magnitudes(nodes: Sequence[Node], values: Mapping[Node, Any]) -> dict[Node, Tensor]:
    """Their absolute values, by one call for all of a dtype.

    Filters are laid out as the images are, once for both of the law's convolutions.
    """
    found: dict[Node, Tensor] = {}
    for dtype in dict.fromkeys(values[node].dtype for node in nodes):
        alike = [node for node in nodes if values[node].dtype == dtype]
        made = torch._foreach_abs([channels_last(values[node]) for node in alike])
        found.update(zip(alike, made, strict=True))
    return found
