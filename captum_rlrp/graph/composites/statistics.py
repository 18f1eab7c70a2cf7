"""Variances, norms and distances."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import Arguments


def reduced(a: Arguments) -> list[int]:
    """The dimensions that an op reduces."""
    x, dim = a["self"], a.get("dim")
    if dim is None or dim == []:
        return list(range(x.dim()))
    return [dim] if isinstance(dim, int) else list(dim)


def variance(a: Arguments) -> Tensor:
    """The mean square of what is left without the mean."""
    x, dims = a["self"], reduced(a)
    correction = a.get("correction", 1.0 if a.get("unbiased", True) else 0.0)
    correction = 1.0 if correction is None else correction
    count = 1
    for d in dims:
        count = count * x.shape[d]
    square = (x - x.mean(dims, keepdim=True)).square()
    return square.sum(dims, keepdim=bool(a.get("keepdim"))) / (count - correction)


def mean(a: Arguments) -> Tensor:
    """The mean over what the op reduces."""
    return a["self"].mean(reduced(a), keepdim=bool(a.get("keepdim")))


def norm(a: Arguments) -> Tensor:
    """Norms by powers, sums and roots."""
    x, dims, keep = a["self"], reduced(a), bool(a.get("keepdim"))
    p = a.get("ord", a.get("p", 2))
    p = 2.0 if p is None else float(p)
    if a.get("dtype") is not None:
        x = x.to(a["dtype"])
    if p == 2:
        return x.square().sum(dims, keepdim=keep).sqrt()
    if p == 1:
        return x.abs().sum(dims, keepdim=keep)
    if p == float("inf"):
        return x.abs().amax(dims, keepdim=keep)
    if p == float("-inf"):
        return x.abs().amin(dims, keepdim=keep)
    return x.abs().pow(p).sum(dims, keepdim=keep).pow(1 / p)


def log_sum_exp(a: Arguments) -> Tensor:
    """Σ softmax(x) · logsumexp(x): exact, and shared as the exponentials are.

    The second factor is broadcast, so it is a gate.
    """
    x, dims = a["self"], reduced(a)
    total = torch.logsumexp(x, dims, keepdim=True)
    share = (x - total).exp() if len(dims) > 1 else x.softmax(dims[0])
    return (share * total).sum(dims, keepdim=bool(a.get("keepdim")))


def running_log_sum_exp(a: Arguments) -> Tensor:
    """The same for every beginning of the axis."""
    x = a["self"].movedim(a["dim"], -1)
    size = x.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    share = x.unsqueeze(-2).expand(*x.shape, size).masked_fill(later, float("-inf")).softmax(-1)
    return (share * x.logcumsumexp(-1).unsqueeze(-1)).sum(-1).movedim(-1, a["dim"])


def broadcast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two operands of one shape."""
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return (x if x.shape == shape else x.expand(shape)), (
        y if y.shape == shape else y.expand(shape)
    )


def cosine(a: Arguments) -> Tensor:
    """The norms are gates, as the statistics of a normalisation are."""
    dim, eps = a["dim"], a["eps"]
    x, y = broadcast(a["x1"], a["x2"])

    def unit(v: Tensor) -> Tensor:
        return v * v.square().sum(dim, keepdim=True).sqrt().clamp_min(eps).reciprocal()

    return (unit(x) * unit(y)).sum(dim)


def distances(a: Arguments) -> Tensor:
    """Norms of all differences."""
    difference = a["x1"].unsqueeze(-2) - a["x2"].unsqueeze(-3)
    return norm({"self": difference, "p": a["p"], "dim": [-1]})


def pair_distance(a: Arguments) -> Tensor:
    """Norms of differences, row by row."""
    difference = a["x1"] - a["x2"] + a["eps"]
    return norm({"self": difference, "p": a["p"], "dim": [-1], "keepdim": a["keepdim"]})
