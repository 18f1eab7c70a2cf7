"""Model and example arguments to a static graph of ATen calls.

The user's module is only read.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import CaptureError, TrainingModeError
from .aliases import unshared
from .captured import CapturedGraph, flatten_arguments
from .export import example, export, quiet
from .form import PLAIN, Form
from .nodes import bind, dependents, place_of, reads_values
from .normalise import inline_subgraphs, normalise
from .random_calls import check_deterministic
from .sizes import close
from .written_out import HasRule

__all__ = [
    "CAPTURING",
    "CapturedGraph",
    "OpenCapture",
    "bind",
    "capture",
    "carries_batch",
    "check_eval_mode",
    "dependents",
    "flatten_arguments",
    "place_of",
    "reads_values",
    "unshared",
    "unwrap",
]

# torch.export patches process-wide state while it traces, so one capture runs at a time. Symbolic
# sizes that another thread compared meanwhile would end up in the trace: who does so holds it too.
CAPTURING = threading.RLock()


_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself behind ``DataParallel``, its distributed kin and ``torch.compile``.

    Raises:
        CaptureError: If the model is of a kind that cannot be captured, with what to do instead.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{name or 'The model'} is a TorchScript module, which has no graph of ATen calls. "
                "Explain the Python module that it was made from, with "
                "load_state_dict(scripted.state_dict())."
            )
        if any(kind.__name__ in _SHARDED for kind in type(module).__mro__):
            raise CaptureError(
                f"The parameters of {name or 'the model'} are sharded over processes by FSDP. "
                "Gather the full state dict (torch.distributed.checkpoint.state_dict."
                "get_model_state_dict with full_state_dict=True), load it into a module that is "
                "not sharded, and explain that."
            )
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_eval_mode(model: nn.Module) -> None:
    """Refuses modules that behave differently in training (batch statistics, random masks).

    Raises:
        TrainingModeError: Naming each such module.
    """
    # In training these use the batch's statistics or draw random numbers.
    stateful = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    found = [
        (name or "the model itself", type(module).__name__)
        for name, module in model.named_modules()
        if module.training
        and isinstance(module, stateful)
        and not (isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0)
        and not (
            isinstance(module, nn.modules.instancenorm._InstanceNorm)
            and not module.track_running_stats
        )
    ]
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise TrainingModeError(
                f"{name or 'The model'} ({type(module).__name__}) keeps no running statistics, so "
                "it mixes the samples of a batch in eval mode too. Give it some "
                "(track_running_stats=True and a pass over data in training mode), or put a "
                "GroupNorm in its place."
            )
    if found:
        listed = ", ".join(f"{name} ({kind})" for name, kind in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise TrainingModeError(
            f"The model is in training mode: {listed}{more} would mix the samples of a batch or "
            "draw random numbers. Call model.eval() before attributing."
        )


def capture(
    model: nn.Module,
    args: Sequence[Any],
    batch_size: int | None,
    layers: Collection[nn.Module] = (),
    form: Form = PLAIN,
    batched: Any = None,
    allow_random: bool = False,
    has_rule: HasRule = lambda _: True,
) -> CapturedGraph:
    """Captures ``model(*args)``.

    Args:
        model: A module in eval mode; left as it is.
        args: Its arguments, in the order of `form`.
        batch_size: The size of dimension 0 of the tensors that carry the batch. The batch is
            left symbolic where the model allows it. None captures exactly these arguments.
        layers: Modules whose outputs must be values of their own, even where they return what
            they were given (``nn.Identity``).
        form: How the model is called, and which output counts.
        batched: Of each argument, nested as it is, whether it carries the batch; by default every
            tensor of that size does.
        allow_random: Whether random numbers that forward draws count as constants.
        has_rule: Whether relevance can cross calls of an op. Others are decomposed where PyTorch
            has a decomposition.

    Raises:
        CaptureError: If export refuses, with its own text, or if forward draws random numbers.
        InputError: If the output is not one tensor.
    """
    check_eval_mode(model)
    if batched is None:
        batched = carries_batch(args, batch_size)
    with CAPTURING, torch.inference_mode(False), torch.no_grad(), quiet():
        program = _exported(model, args, batch_size, layers, form, batched)
        graph = normalise(program, model, has_rule)
    if not allow_random:
        check_deterministic(graph)
    return graph


def _exported(
    model: nn.Module,
    args: Sequence[Any],
    batch_size: int | None,
    layers: Collection[nn.Module],
    form: Form,
    batched: Any,
    sizes: Collection[int] = (),
) -> Any:
    pairs = [example(v, b, batch_size, sizes) for v, b in zip(args, batched, strict=True)]
    return export(model, form, [p[0] for p in pairs], [p[1] for p in pairs], layers)


class OpenCapture:
    """What was captured of a model with sizes left open, for any of these sizes.

    Args:
        model: As for :func:`capture`, like all the others.
        args: Arguments to trace with.
        batch_size: The size of the batch.
        layers: Modules whose outputs must be values of their own.
        form: How the model is called.
        batched: Of each argument, whether it carries the batch.
        sizes: Which dimensions are left open, in all arguments that carry the batch.
        allow_random: Whether random numbers count as constants.
        has_rule: Whether relevance can cross calls of an op.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        batch_size: int,
        layers: Collection[nn.Module],
        form: Form,
        batched: Any,
        sizes: Collection[int],
        allow_random: bool,
        has_rule: HasRule,
    ) -> None:
        self._model, self._allow_random, self._has_rule = model, allow_random, has_rule
        self._batched = tree_leaves(batched)
        with CAPTURING, torch.inference_mode(False), torch.no_grad():
            self._program = _exported(model, args, batch_size, layers, form, batched, sizes)
            inline_subgraphs(self._program.graph, self._program.graph_module)

    def graph(self, args: Sequence[Any]) -> CapturedGraph | None:
        """The graph for arguments of these sizes; None where forward goes another way there."""
        with CAPTURING, torch.inference_mode(False), torch.no_grad(), quiet():
            program = close(self._program, tree_leaves(list(args)), self._batched)
            if program is None:
                return None
            graph = normalise(program, self._model, self._has_rule)
        if not self._allow_random:
            check_deterministic(graph)
        return replace(graph, guards=(*graph.guards, *program.guards))


def carries_batch(args: Sequence[Any], batch_size: int | None) -> Any:
    """Of each argument, nested as it is, whether its dimension 0 has the batch's size."""

    def carries(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch_size

    return [tree_map(carries, value) for value in args]
