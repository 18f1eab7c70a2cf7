"""What the user passes to ``attribute``, checked and in one form."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .errors import InputError
from .graph.form import Form


def named_inputs(inputs: Any, model: nn.Module, form: Form) -> tuple[Any, Form]:
    """A dict of inputs as a tuple, and the form of the call that they go to the model in.

    They go by name where forward has parameters of these names, and in one dict otherwise.
    """
    if not isinstance(inputs, Mapping):
        return inputs, form
    names = tuple(map(str, inputs))
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    by_name = all(name in parameters or takes_any for name in names)
    return tuple(inputs.values()), replace(form, names=names, in_dict=not by_name)


def check_inputs(inputs: Any) -> tuple[Tensor, ...]:
    """The inputs as a tuple of tensors.

    Raises:
        InputError: If they are something else, or differ in the size of the batch.
    """
    tensors: tuple[Any, ...] = (inputs,) if isinstance(inputs, Tensor) else inputs
    is_tuple = isinstance(tensors, tuple) and tensors
    if not is_tuple or not all(isinstance(x, Tensor) for x in tensors):
        raise InputError(
            f"inputs must be a tensor, or a tuple or dict of tensors, not {type(inputs).__name__}. "
            "Other arguments go to additional_forward_args."
        )
    for x in tensors:
        if x.is_nested:
            raise InputError(
                "An input is a nested tensor, which has no place for relevance at every element; "
                "pass a dense one (torch.nested.to_padded_tensor)."
            )
        if x.dim() == 0:
            raise InputError(
                "inputs must have a batch dimension (dimension 0); got a scalar tensor."
            )
    if len(tensors) > 1 and len({x.shape[0] for x in tensors}) > 1:
        sizes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise InputError(f"inputs must have the same batch size in dimension 0; got {sizes}.")
    return tensors


def batch_of(tensors: tuple[Tensor, ...], additional: tuple[Any, ...], model: nn.Module) -> int:
    """Number of samples: the rows of the inputs, or the bags of an ``EmbeddingBag``'s indices."""
    first = tensors[0]
    offsets = additional[0] if additional else None
    if (
        first.dim() == 1
        and not first.is_floating_point()
        and isinstance(offsets, Tensor)
        and offsets.dim() == 1
        and not offsets.is_floating_point()
        and any(isinstance(module, nn.EmbeddingBag) for module in model.modules())
    ):
        return len(offsets)
    return len(first)
