"""Which sizes of a model's arguments change from call to call, and captures that leave them open.

The first call is captured as it is. Where another comes of the same form, but of another size, the
dimensions that differ are left open in one more capture, which then serves every size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from ..errors import RelativeLRPError
from ..graph.capture import CapturedGraph, OpenCapture
from ..graph.fingerprint import Fingerprint
from .arguments import Batched

_KEPT = 8


@dataclass
class _Seen:
    """Arguments of one form.

    Attributes:
        shapes: Those of the last call.
        sizes: The dimensions that have changed.
        opened: The capture that leaves these open.
        fingerprint: What it took from the model's modules.
        fixed: Whether sizes stay fixed: export took them for constants.
    """

    shapes: list[torch.Size | None]
    sizes: set[int] = field(default_factory=set)
    opened: OpenCapture | None = None
    fingerprint: Fingerprint | None = None
    fixed: bool = False


class OpenSizes:
    """What is known of the sizes that one model is called with."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, _Seen] = OrderedDict()
        self._used: _Seen | None = None

    def graph(
        self,
        model: nn.Module,
        after: nn.Module,
        key: Hashable,
        args: Sequence[Any],
        batched: Batched,
        capture: Callable[[set[int]], OpenCapture],
    ) -> CapturedGraph | None:
        """The graph for these arguments, of a capture that leaves sizes open; None without one.

        Args:
            model: The model.
            after: Its twin, after its forward ran.
            key: The form of the call.
            args: The arguments.
            batched: Which of them belong to the samples.
            capture: Captures with some dimensions left open.
        """
        leaves, spec = tree_flatten(list(args))
        flags = tree_leaves(list(batched))
        shapes = [x.shape if isinstance(x, Tensor) else None for x in leaves]
        kinds = (_kind(x, has) for x, has in zip(leaves, flags, strict=True))
        name = (key, repr(spec), *kinds)
        seen = self._seen.setdefault(name, _Seen(shapes))
        self._seen.move_to_end(name)
        while len(self._seen) > _KEPT:
            self._seen.popitem(last=False)
        changed = {
            d
            for old, new, has in zip(seen.shapes, shapes, flags, strict=True)
            if has and old is not None and new is not None
            for d in range(1, len(new))
            if old[d] != new[d]
        }
        seen.shapes = shapes
        if seen.fixed:
            return None
        if seen.fingerprint is not None and not seen.fingerprint.fits(model):
            seen.opened = seen.fingerprint = None
        try:
            if not changed <= seen.sizes:
                seen.sizes |= changed
                seen.opened = None
            if seen.opened is None and seen.sizes:
                seen.opened = capture(seen.sizes)
                seen.fingerprint = Fingerprint(model, after)
            graph = None if seen.opened is None else seen.opened.graph(args)
        except (RelativeLRPError, RuntimeError, TypeError, ValueError):
            seen.fixed, seen.opened = True, None
            return None
        self._used = None if graph is None else seen
        return graph

    def refuse(self) -> bool:
        """Keeps the sizes fixed that were left open last, if there were such."""
        seen, self._used = self._used, None
        if seen is None:
            return False
        seen.fixed, seen.opened = True, None
        return True


def _kind(value: Any, has_batch: bool) -> Hashable:
    """What must be equal for one capture to serve; all sizes, where it is not of the samples."""
    if not isinstance(value, Tensor):
        return (type(value), value)
    shape = value.dim() if has_batch else tuple(value.shape)
    return (has_batch, shape, value.dtype, value.device)
