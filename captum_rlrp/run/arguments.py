"""The arguments of a call: what tells them apart, and which of them belong to the samples."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import InputError
from ..graph.capture import carries_batch

# Nested as the arguments are: whether dimension 0 of each is the batch.
Batched = Sequence[Any]


def signature(value: Any, batch: int) -> Hashable:
    """The same for arguments that one capture serves.

    Raises:
        InputError: If an argument is of a type that no graph can hold.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise InputError(
                f"An argument is a {kind} tensor, which has no place for relevance at every "
                "element; pass a dense one (x.to_dense(), torch.nested.to_padded_tensor)."
            )
        if value.is_meta:
            raise InputError("An argument is on the meta device, where tensors have no values.")
        batched = value.dim() > 0 and value.shape[0] == batch
        shape = value.shape[1:] if batched else value.shape
        return (batched, tuple(shape), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return (type(value), *(signature(item, batch) for item in value))
    if isinstance(value, dict):
        return tuple((key, signature(item, batch)) for key, item in value.items())
    try:
        hash(value)
    except TypeError as error:
        raise InputError(
            f"additional_forward_args holds a {type(value).__name__}, which cannot be part of a "
            "captured graph; pass tensors, numbers, strings, None, or lists and dicts of them."
        ) from error
    return (type(value), value)


def take(value: Any, rows: slice | list[int], batched: Any) -> Any:
    """The arguments of some of the samples."""
    if isinstance(value, Tensor):
        return value[rows] if batched else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(take(v, rows, b) for v, b in zip(value, batched, strict=True))
    if isinstance(value, dict):
        return {key: take(item, rows, batched[key]) for key, item in value.items()}
    return value


def guesses(args: Sequence[Any], batch: int, explained: int) -> Iterator[Batched]:
    """What may belong to the samples, the likeliest first.

    What has the batch's size does, but a further argument may have it by chance: a weight for each
    of three columns in a batch of three.
    """
    likely = carries_batch(args, batch)
    yield likely
    flags, spec = tree_flatten(likely)
    first = len(tree_flatten(likely[:explained])[0])
    doubtful = [i for i in range(first, len(flags)) if flags[i]][:4]
    for count in range(1, len(doubtful) + 1):
        for chosen in itertools.combinations(doubtful, count):
            changed = [flag and i not in chosen for i, flag in enumerate(flags)]
            yield tree_unflatten(changed, spec)


def has_edges(additional: Sequence[Any]) -> bool:
    """Whether there are pairs of node numbers among the arguments, as graph networks take them."""
    leaves = tree_flatten(list(additional))[0]
    return any(
        isinstance(leaf, Tensor)
        and leaf.dim() == 2
        and leaf.shape[0] == 2
        and leaf.dtype in (torch.int64, torch.int32)
        for leaf in leaves
    )


def device_of(args: Sequence[Any]) -> str:
    """The type of the device that the arguments are on."""
    if isinstance(args[0], Tensor):
        return args[0].device.type
    leaves = tree_flatten(list(args))[0]
    return next((a.device.type for a in leaves if isinstance(a, Tensor)), "cpu")


def shapes_of(args: Sequence[Any]) -> str:
    """The tensors' shapes and dtypes, for an error."""
    tensors = [a for a in tree_flatten(list(args))[0] if isinstance(a, Tensor)]
    return ", ".join(f"{tuple(a.shape)} {str(a.dtype).removeprefix('torch.')}" for a in tensors)
