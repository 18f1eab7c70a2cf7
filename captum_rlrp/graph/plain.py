"""PyTorch's layers as they are written: without what makes them faster, or writes to weights."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules import transformer


@contextlib.contextmanager
def plain_layers() -> Iterator[None]:
    """Layers that a graph can show and that leave the model as it is.

    The fused encoder kernels hide the layers that need rules. Whether a mask is a causal one is
    read off its values; it is applied as it is in either case. And an embedding with ``max_norm``
    shortens the user's vectors in place.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            mock.patch.object(transformer, "_detect_is_causal_mask", _hint),
            mock.patch.object(functional, "embedding", _shortened(functional.embedding)),
            mock.patch.object(functional, "embedding_bag", _shortened(functional.embedding_bag)),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _hint(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


def _shortened(embed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same embedding of vectors that were shortened first, in memory of their own."""
    signature = inspect.signature(embed)

    @functools.wraps(embed)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        longest = given.pop("max_norm", None)
        if longest is not None:
            weight = given["weight"]
            norm = weight.norm(given.get("norm_type", 2.0), 1, keepdim=True)
            scale = torch.where(norm > longest, longest / (norm + 1e-7), torch.ones_like(norm))
            given["weight"] = weight * scale
        return embed(*bound.args, **bound.kwargs)

    return run
