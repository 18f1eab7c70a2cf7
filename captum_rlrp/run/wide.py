"""Explanations that float32 cannot hold, in float64 on the reference kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .program import Result, find_non_finite
from .task import Begin, Start, Task

# The least relevance of a sample, and the largest sum of values, that can be trusted.
_RANGE = {torch.float32: (1e-25, 1e30), torch.float64: (0.0, 1e290)}


def wide_enough(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16: shares of a unit are often less than the least that it holds, 6e-8."""
    return torch.float32 if dtype == torch.float16 else dtype


def unsound(totals: Tensor, dtype: torch.dtype, batch: int) -> list[int]:
    """The samples whose relevance vanished; all where a value is not finite or too large.

    Args:
        totals: See :func:`captum_rlrp.run.program.totals`; reading them waits for the device.
        dtype: float64 if relevance is in that, else float32, whose range bfloat16 has too.
        batch: Number of samples.
    """
    least, most = _RANGE[dtype]
    numbers = totals.tolist()
    if not all(map(math.isfinite, numbers)) or max(numbers) >= most:
        return list(range(batch))
    return [i for i, mass in enumerate(numbers[len(numbers) - batch :]) if mass < least]


def run_wide(task: Task) -> Result:
    """Runs a task in float64.

    Raises:
        NonFiniteError: Where that does not help, naming the cause.
    """
    for i, x in enumerate(task.values[node] for node in task.explained):
        if x.is_floating_point() and not x.isfinite().all():
            kind = "NaN" if x.isnan().any() else "infinite values"
            sample = int((~x.isfinite()).flatten(1).any(1).nonzero()[0]) if x.dim() > 1 else 0
            raise NonFiniteError(
                f"Input {i} contains {kind} (first in sample {sample}); an explanation needs "
                "finite inputs. Remove or impute them."
            )
    error = find_non_finite(task.program, task.values)
    if error is not None:
        raise error
    result, totals = replace(task, begin=_widened(task.begin)).run()
    if not all(map(math.isfinite, totals.tolist())):
        raise NonFiniteError(
            "Relevance overflowed although every value of the model is finite: the weights or "
            "inputs are too large or too small even for float64. Rescale them."
        )
    for node, r in result.relevance.items():
        if r is None or not node.meta["val"].dtype.is_floating_point:
            continue
        dtype = wide_enough(node.meta["val"].dtype)
        masses = r.abs().flatten(1).amax(1) if r.dim() > 1 else r.abs()
        if bool(((masses > 0) & (masses < torch.finfo(dtype).tiny)).any()):
            raise NonFiniteError(
                f"Relevance shrinks to {float(masses.min()):.1e} on its way to the input, less "
                f"than {dtype} can hold: contributions cancel in each of very many layers. "
                "Use float64 (model.double(), inputs.double())."
            )
    return result


def _widened(begin: Begin) -> Begin:
    def wide(output: Tensor) -> Start:
        start, column = begin(output)
        return start.double(), column

    return wide
