"""A model's twin to a graph of ATen calls, by ``torch.export``."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.export import _trace
from torch.fx import Graph
from torch.utils._pytree import tree_leaves

from ..errors import CaptureError, RelativeLRPError
from .aliases import has_aliased_write
from .form import Form
from .local_norm import LocalNorms
from .packed import RecurrentLayers
from .plain import plain_layers
from .twins import Root, twin


def export(
    model: nn.Module,
    form: Form,
    args: Sequence[Any],
    dynamic: Sequence[Any],
    layers: Collection[nn.Module],
) -> Any:
    """The exported program of ``form.call(model, args)``.

    Args:
        model: The model, left as it is.
        form: How it is called.
        args: Example arguments; the tensors' values do not matter.
        dynamic: Of each, which dimensions are left open, as export wants it.
        layers: See :func:`captum_rlrp.graph.twins.twin`.

    Raises:
        CaptureError: If export refuses, with its own text.
    """
    root = twin(model, form, layers)
    try:
        with quiet(), plain_layers(), LocalNorms(), RecurrentLayers():
            program = torch.export.export(
                _SameBatch(root, dynamic), tuple(args), dynamic_shapes=(tuple(dynamic),)
            )
            # Inverts nothing, but makes writes to what has another name functional, casts as
            # autocast regions do, and maps as vmap does.
            if has_aliased_write(program.graph) or _has_regions(program.graph):
                program = program.run_decompositions({})
            return program
    except RelativeLRPError:
        raise
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            raise
        raise CaptureError(_explain(error, model)) from error


def _has_regions(graph: Graph) -> bool:
    """Whether some calls run under another autocast, or under vmap."""
    return any(
        (
            isinstance(node.target, torch._ops.HigherOrderOperator)
            and node.target.name() == "wrap_with_autocast"
        )
        or getattr(node.target, "__module__", None) == "torch._functorch.predispatch"
        for node in graph.nodes
    )


class _SameBatch(nn.Module):
    """Tells export that the open sizes of all arguments are one."""

    def __init__(self, root: Root, dynamic: Sequence[Any]) -> None:
        super().__init__()
        self.model = root.model
        self.form = root.form
        self.training = root.training
        self._open = [
            isinstance(d, dict) and 0 in d
            for d in tree_leaves(list(dynamic), is_leaf=lambda d: d is None or _is_shape(d))
        ]

    def forward(self, *args: Any) -> Tensor:
        leaves = tree_leaves(args)
        sizes = [x.shape[0] for x, is_open in zip(leaves, self._open, strict=True) if is_open]
        for size in sizes[1:]:
            torch._check(size == sizes[0])
        return self.form.call(self.model, args)


def _is_shape(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, int) for key in value)


def example(
    value: Any, batched: Any, size: int | None, sizes: Collection[int] = ()
) -> tuple[Any, Any]:
    """An argument to trace with, and which of its dimensions are open.

    Export takes a size of 0 or 1 for a constant, so it never sees one as the batch.

    Args:
        value: The argument.
        batched: Whether its dimension 0 is the batch; nested as the argument is.
        size: The size of the batch, or None to capture exactly this argument.
        sizes: Further dimensions to leave open, where the batch is.
    """
    if isinstance(value, Tensor):
        if size is not None and batched:
            shape = (max(size, 2), *value.shape[1:])
            made = torch.empty(shape, dtype=value.dtype, device=value.device)
            wide = [d for d in sizes if d < made.dim() and made.shape[d] > 1]
            return made, dict.fromkeys((0, *wide), torch.export.Dim.AUTO)
        return value.detach(), None
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        pairs = [example(v, b, size, sizes) for v, b in zip(value, batched, strict=True)]
        return type(value)(p[0] for p in pairs), type(value)(p[1] for p in pairs)
    if isinstance(value, dict):
        named = {key: example(v, batched[key], size, sizes) for key, v in value.items()}
        return {k: p[0] for k, p in named.items()}, {k: p[1] for k, p in named.items()}
    return value, None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Export warns of its own working, and logs and prints what it raises anyway."""
    names = (
        "torch._subclasses", "torch.export", "torch._export", "torch._subclasses.fake_tensor",
        "torch.fx", "torch.fx.experimental.symbolic_shapes",
    )  # fmt: skip
    loggers = [logging.getLogger(name) for name in names]
    disabled = [logger.disabled for logger in loggers]
    silent = mock.patch.object(_trace, "print", create=True)
    with warnings.catch_warnings(), silent:
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, was in zip(loggers, disabled, strict=True):
                logger.disabled = was


def _sparse(model: nn.Module) -> str:
    """The name of a sparse tensor of the model, if there is one."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return next((name for name, value in named if "sparse" in str(value.layout)), "")


def _explain(error: Exception, model: nn.Module) -> str:
    text = str(error).strip()
    lower = text.lower()
    if any(parameter.is_meta for parameter in model.parameters()):
        cause = (
            "some of its weights are on the meta device, as those that are offloaded are; load it "
            "whole, on one device"
        )
    elif "sparse" in lower and (sparse := _sparse(model)):
        cause = f"{sparse} is sparse; keep it dense, by to_dense(), or as indices for index_add"
    elif "torch.classes.quantized" in lower:
        cause = (
            "its weights are packed by torch.ao.quantization; explain the model as it was before"
        )
    elif "data-dependent" in lower or "guardondatadependent" in lower or "unbacked" in lower:
        cause = (
            "its forward branches or indexes on the values of a tensor, so it is no static graph; "
            "replace the branch by torch.where or move it out of forward"
        )
    elif (
        isinstance(error, (TypeError, RuntimeError)) and "missing" in lower and "argument" in lower
    ):
        cause = "its forward wants other arguments; pass them by additional_forward_args"
    elif "pytree" in lower or "unsupported type" in lower or "unsupported input type" in lower:
        cause = "an argument is of a type that export does not know; pass tensors, numbers or None"
    else:
        cause = "torch.export refused its forward; its own words follow"
    return (
        f"{type(model).__name__} cannot be captured: {cause}.\n"
        f"torch.export said ({type(error).__name__}): {text}"
    )
