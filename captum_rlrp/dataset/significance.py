"""p-values and their corrections for many tests; SciPy does the first, on demand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def two_sided_p(t: Tensor, freedom: Tensor) -> Tensor:
    """Probability that |T| is at least |t| for Student's T with so many degrees of freedom."""
    tail: Tensor = torch.as_tensor(_scipy_stats().t.sf(t.abs().numpy(), freedom.numpy()))
    return 2 * tail


def holm(p: Tensor) -> Tensor:
    """Adjusted p-values: below α, the chance of any false alarm among all tests is below α."""
    order = p.argsort()
    factors = torch.arange(len(p), 0, -1, dtype=p.dtype)
    adjusted = (p[order] * factors).cummax(0).values.clamp(max=1)
    return torch.empty_like(p).scatter_(0, order, adjusted)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjusted p-values: of those below α, a part below α is expected to be false alarms."""
    return torch.as_tensor(_scipy_stats().false_discovery_control(p.numpy()))


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("Comparing classes needs SciPy: pip install scipy") from error
    return stats
