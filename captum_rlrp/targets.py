"""Where relevance starts: Captum's forms of a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from captum._utils.common import _select_targets
from torch import Tensor, nn

from .errors import InputError


def start_at(
    target: Any, whole: int, model: nn.Module, output: Tensor, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """One unit of relevance at the target of each sample (method.md §1).

    Args:
        target: The user's target, for all `whole` samples, or a function that finds one.
        whole: Number of samples the user passed.
        model: Named in errors.
        output: The model's output for some rows of them.
        rows: Which.
    """
    name, batch = type(model).__name__, rows.stop - rows.start
    if not output.is_floating_point():
        raise InputError(
            f"{name} returns {output.dtype}; an explanation needs floating-point scores."
        )
    start = torch.zeros(output.shape, dtype=dtype_of_relevance(output), device=output.device)
    shape = tuple(output.shape)
    if not shape and batch == 1 and target is None:
        return start + 1, None
    if not shape or shape[0] != batch:
        raise InputError(
            f"{name} returns shape {shape} for a batch of {batch}; an explanation needs one row of "
            "scores per sample."
        )
    if target is None:
        if output.numel() != batch:
            raise InputError(
                f"target is missing: {name} returns shape {shape}, more than one score per sample. "
                f"Pass target, {_target_hint(shape)}."
            )
        chosen = torch.arange(batch, device=output.device)
    else:
        if callable(target):
            target = target(output)
        chosen = _choose(output, target, whole, rows, name)
    if chosen.numel() != batch:
        raise InputError(
            f"target {_short(target)} selects {chosen.numel() // batch} scores per sample of the "
            f"output of shape {shape}; an explanation needs one: {_target_hint(shape)}."
        )
    start.view(-1).index_fill_(0, chosen, 1)
    if len(shape) != 2:
        return start, None
    return start, chosen if batch == 1 else chosen % shape[1]


def dtype_of_relevance(output: Tensor) -> torch.dtype:
    """What relevance is carried in from the output on.

    bfloat16 on a GPU, if the model computes in it: it has float32's range, half the memory traffic
    and the fast products. Shares fall below what float16 can hold; and a CPU gains nothing.
    """
    if output.dtype == torch.bfloat16 and output.device.type == "cuda":
        return torch.bfloat16
    return torch.float64 if output.dtype == torch.float64 else torch.float32


def _choose(output: Tensor, target: Any, whole: int, rows: slice, name: str) -> Tensor:
    """The positions of the target's scores, counted over the whole output."""
    shape = tuple(output.shape)

    def wrong(reason: str) -> InputError:
        what = f"target {_short(target)} does not fit {name}'s output of shape {shape}"
        return InputError(f"{what}: {reason}.")

    given = target
    if isinstance(given, Tensor):
        if given.is_floating_point():
            raise wrong(f"it must hold integers, not {given.dtype}")
        if given.numel() > 1 and given.dim() == 2 and 1 in given.shape:
            given = given.reshape(-1)
    if isinstance(given, list) or (isinstance(given, Tensor) and given.numel() > 1):
        if len(given) != whole:
            raise wrong(f"it has {len(given)} entries for a batch of {whole}")
        given = given[rows]
    numbers = _numbers(given)
    if len(shape) == 2:
        if any(not -shape[1] <= n < shape[1] for n in numbers):
            raise wrong(f"indices go from 0 to {shape[1] - 1}")
        flat = not isinstance(given, tuple) and not (
            isinstance(given, list) and any(isinstance(n, (tuple, list)) for n in given)
        )
        if flat and len(numbers) in (1, shape[0]):  # the usual case, in one call
            many = numbers * shape[0] if len(numbers) == 1 else numbers
            chosen = [i * shape[1] + n % shape[1] for i, n in enumerate(many)]
            # Without waiting for a GPU, which still runs the forward.
            at = torch.tensor(chosen, dtype=torch.int64)
            return at if output.is_cpu else at.to(output.device, non_blocking=True)
    positions = torch.arange(output.numel(), device=output.device).view(shape)
    if isinstance(given, Tensor):
        given = given.to(positions.device)
        # A negative index counts from the end, as in a list.
        given = given % shape[1] if given.numel() > 1 or len(shape) == 2 else given
    try:
        return _select_targets(positions, given).reshape(-1)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise wrong(f"{reason}. It must be {_target_hint(shape)}") from error


def _numbers(target: Any) -> list[int]:
    if isinstance(target, Tensor):
        return [int(n) for n in target.reshape(-1).tolist()]
    if isinstance(target, (list, tuple)):
        return [n for item in target for n in _numbers(item)]
    return [int(target)] if isinstance(target, int) else []


def _target_hint(shape: tuple[int, ...]) -> str:
    if len(shape) <= 2:
        return "an integer below " + str(shape[-1]) + " or one for each sample"
    sizes = " x ".join(str(size) for size in shape[1:])
    return f"a tuple of {len(shape) - 1} indices into {sizes}, or a list of one for each sample"


def _short(target: Any) -> str:
    text = repr(target)
    return text if len(text) <= 60 else text[:57] + "..."


def any_target(output: Tensor) -> Any:
    """Some target that fits, for the shapes of an empty batch."""
    return None if output.numel() == output.shape[0] else tuple([0] * (output.dim() - 1))


def at_hand(target: Any) -> Any:
    """The target where Python can read it: on a GPU that waits, later for the whole forward.

    NumPy's integers and arrays become PyTorch's.
    """
    if isinstance(target, Tensor):
        return target.cpu()
    if isinstance(target, (list, tuple)):
        found = map(at_hand, target)
        return list(found) if isinstance(target, list) else tuple(found)
    if isinstance(target, (np.ndarray, np.generic)) and target.dtype.kind in "iu":
        return torch.as_tensor(target.astype(np.int64))
    return target


def several(target: Any, batch: int) -> list[Any] | None:
    """The targets of each sample one after another, where there are several; None for one.

    Args:
        target: A range, for all samples, or a list with a list for each.
        batch: Number of samples.

    Raises:
        InputError: If the samples' lists differ in length.
    """
    if isinstance(target, range):
        return [int(index) for index in target]
    is_nested = isinstance(target, list) and target and all(isinstance(t, list) for t in target)
    if not is_nested:
        return None
    if len(target) != batch or len({len(own) for own in target}) > 1:
        raise InputError(
            f"Several targets of each sample are a list of {batch} lists, one for each sample, all "
            f"of one length, not {_short(target)}."
        )
    return [[own[k] for own in target] for k in range(len(target[0]))]


def region(target: Any) -> tuple[Any, Tensor] | None:
    """The class and the mask of a region, where the target is one."""
    if not isinstance(target, tuple) or not target or not isinstance(target[-1], Tensor):
        return None
    *index, mask = target
    if mask.dim() == 0:  # an index, as torch.unravel_index returns it
        return None
    if len(index) != 1:
        raise InputError(
            "A region is a pair of a class and a mask over the positions of the output, such as "
            "(3, mask) with a mask of height x width."
        )
    return index[0], mask
