"""What adds up, or is overwritten, at indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tracing import Arguments


def scatter_add(a: Arguments) -> Tensor:
    """Adds to zeros, and that to what was there."""
    zeros = torch.zeros_like(a["self"])
    return a["self"] + zeros.scatter_add(a["dim"], a["index"], a["src"])


def index_add(a: Arguments) -> Tensor:
    """Adds whole slices: the same as adding their elements one by one."""
    source = a["source"] if a["alpha"] == 1 else a["source"] * a["alpha"]
    dim = a["dim"] % a["self"].dim()
    shape = [1] * source.dim()
    shape[dim] = -1
    index = a["index"].view(shape).expand(source.shape)
    return scatter_add({"self": a["self"], "dim": dim, "index": index, "src": source})


def index_reduce(a: Arguments) -> Tensor:
    """Reduces whole slices, element by element."""
    source, dim = a["source"], a["dim"] % a["self"].dim()
    shape = [1] * source.dim()
    shape[dim] = -1
    index = a["index"].view(shape).expand(source.shape)
    return scatter_reduce({**a, "dim": dim, "index": index, "src": source})


def scatter(a: Arguments) -> Any:
    """Overwrites elements: what is written there, and the rest of what was there."""
    x, dim, index = a["self"], a["dim"], a["index"]
    ones = torch.ones_like(index, dtype=x.dtype)
    reached = torch.zeros_like(x).scatter_add(dim, index, ones) > 0
    if "src" not in a:
        return x.masked_fill(reached, a["value"])
    return torch.where(reached, torch.zeros_like(x).scatter_add(dim, index, a["src"]), x)


def index_fill(a: Arguments) -> Tensor:
    """One number at the places of an index."""
    x, dim = a["self"], a["dim"] % a["self"].dim()
    at = torch.arange(x.shape[dim], device=x.device)
    filled = (at[:, None] == a["index"]).any(1).view(-1, *[1] * (x.dim() - dim - 1))
    return torch.where(filled, a["value"], x)


def quantile(a: Arguments) -> Tensor:
    """Between two neighbours in the order of size."""
    x, q, dim, kind = a["self"], a["q"], a["dim"], a["interpolation"]
    if dim is None:
        x, dim = x.flatten(), 0
    q = q if isinstance(q, Tensor) else torch.full((), q, dtype=x.dtype, device=x.device)
    rank = q.reshape(-1) * (x.shape[dim] - 1)
    low, high = (rank.round(), rank.round()) if kind == "nearest" else (rank.floor(), rank.ceil())
    weight = {"lower": 0.0, "nearest": 0.0, "higher": 1.0, "midpoint": 0.5}.get(kind, rank - low)
    ordered = x.sort(dim)[0].movedim(dim, -1)
    below, above = (ordered.index_select(-1, side.long()) for side in (low, high))
    result = below * (1 - weight) + above * weight
    result = result.movedim(-1, 0) if q.dim() else result.squeeze(-1)
    return result.unsqueeze(dim % x.dim() + q.dim()) if a["keepdim"] else result


def embedding_bag(a: Arguments) -> Any:
    """Bags of one length: the sum, or mean, or largest, of their embeddings."""
    rows: Tensor = torch.nn.functional.embedding(a["indices"], a["weight"])
    kept = torch.ones_like(rows[..., :1])
    if a["padding_idx"] is not None:
        kept = (a["indices"] != a["padding_idx"]).to(rows.dtype).unsqueeze(-1)
    if a["per_sample_weights"] is not None:
        rows = rows * a["per_sample_weights"].reshape(a["indices"].shape).unsqueeze(-1)
    if a["mode"] == 2:
        return rows.masked_fill(kept == 0, float("-inf")).amax(1), None, None, None
    total = (rows * kept).sum(1)
    if a["mode"] == 1:
        total = total / kept.sum(1).clamp_min(1)
    return total, None, None, None


def scatter_reduce(a: Arguments) -> Tensor:
    """Sums, means and extrema at indices, by what is added there."""
    x, dim, index, source = a["self"], a["dim"], a["index"], a["src"]
    includes, kind = a["include_self"], a["reduce"]
    base = x if includes else torch.zeros_like(x)
    if kind == "sum" and includes:
        return scatter_add(a)
    count = torch.zeros_like(x).scatter_add(dim, index, torch.ones_like(source))
    reached = count > 0
    total = base + torch.zeros_like(x).scatter_add(dim, index, source)
    if kind == "sum":
        return torch.where(reached, total, x)
    if kind == "mean":
        mean = total / (count + 1 if includes else count.clamp_min(1))
        return mean if includes else torch.where(reached, mean, x)
    if kind in ("amax", "amin"):
        # Each winner gives its value, ties share it.
        best = torch.scatter_reduce(x, dim, index, source, kind, include_self=includes)
        wins = (source == best.gather(dim, index)).to(source.dtype)
        shares = torch.zeros_like(x).scatter_add(dim, index, wins)
        won = torch.zeros_like(x).scatter_add(dim, index, source * wins) / shares.clamp_min(1)
        return torch.where(shares > 0, won, x)
    return torch.scatter_reduce(x, dim, index, source, kind, include_self=includes)
