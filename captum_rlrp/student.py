"""Student's t-distribution and corrections for many tests, so that nothing needs SciPy."""

from __future__ import annotations

import torch
from torch import Tensor


def two_sided_p(t: Tensor, freedom: Tensor) -> Tensor:
    """Probability that |T| is at least |t| for T with so many degrees of freedom, in float64.

    It is the regularised incomplete beta function I_x(ν/2, 1/2) at x = ν/(ν + t²).
    """
    t, freedom = torch.broadcast_tensors(t.double(), freedom.double())
    a, b = freedom / 2, torch.full_like(t, 0.5)
    square = t * t
    log_x, log_rest = -torch.log1p(square / freedom), torch.log(square / (freedom + square))
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    size = torch.exp(a * log_x + b * log_rest - log_beta)
    x, rest = freedom / (freedom + square), square / (freedom + square)
    # The fraction converges fast on this side; beyond it, I_x(a, b) = 1 − I_{1−x}(b, a).
    near = x < (a + 1) / (a + b + 2)
    fraction = _fraction(
        torch.where(near, a, b), torch.where(near, b, a), torch.where(near, x, rest)
    )
    p = torch.where(near, size * fraction / a, 1 - size * fraction / b)
    p = torch.where(square == 0, 1.0, torch.where(square.isinf(), 0.0, p))
    return p.clamp(0, 1)


def _fraction(a: Tensor, b: Tensor, x: Tensor, most: int = 10_000) -> Tensor:
    """The continued fraction of the incomplete beta function, by Lentz's method."""
    tiny = torch.finfo(x.dtype).tiny

    def nonzero(value: Tensor) -> Tensor:
        return torch.where(value.abs() < tiny, tiny, value)

    c = torch.ones_like(x)
    d = 1 / nonzero(1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, most):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = result
        for term in (even, odd):
            d = 1 / nonzero(1 + term * d)
            c = nonzero(1 + term / c)
            result = result * c * d
        if bool(((result - before).abs() <= 1e-15 * result.abs()).all()):
            break
    return result


def holm(p: Tensor) -> Tensor:
    """Adjusted p-values: below α, the chance of any false alarm among all tests is below α."""
    order = p.argsort()
    factors = torch.arange(len(p), 0, -1, dtype=p.dtype)
    adjusted = (p[order] * factors).cummax(0).values.clamp(max=1)
    return torch.empty_like(p).scatter_(0, order, adjusted)


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjusted p-values: of those below α, a part below α is expected to be false alarms."""
    order = p.argsort(descending=True)
    factors = len(p) / torch.arange(len(p), 0, -1, dtype=p.dtype)
    adjusted = (p[order] * factors).cummin(0).values.clamp(max=1)
    return torch.empty_like(p).scatter_(0, order, adjusted)
