"""Products of several factors, and what repeats."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tracing import Arguments
from .statistics import reduced


def product(a: Arguments) -> Tensor:
    """Equal factors take equal parts: the product, spread evenly over a sum.

    x⁰ is 1 whatever x is; the product is broadcast, so it is a gate.
    """
    x, dims = a["self"], reduced(a)
    if a.get("dim") is None:
        x, dims = x.flatten(), [0]
    whole = x.prod(dims[0], keepdim=True)
    return (x.pow(0) * whole).mean(dims, keepdim=bool(a.get("keepdim")))


def running_product(a: Arguments) -> Tensor:
    """As the product, for every beginning of the axis."""
    dim = a["dim"] % a["self"].dim()
    x = a["self"].movedim(dim, -1)
    size = x.shape[-1]
    ones = torch.ones(size, size, dtype=x.dtype, device=x.device)
    part = ones.tril() / torch.arange(1, size + 1, dtype=x.dtype, device=x.device)[:, None]
    each = x.pow(0).unsqueeze(-2) * part
    return (each * x.cumprod(-1).unsqueeze(-1)).sum(-1).movedim(-1, dim)


def interpolated(a: Arguments) -> Tensor:
    """Two terms, each with its weight."""
    weight = a["weight"]
    return a["self"] * (1 - weight) + a["end"] * weight


def plus_product(a: Arguments) -> Tensor:
    """A sum with a product."""
    product = a["tensor1"] * a["tensor2"]
    return a["self"] + (product if a["value"] == 1 else product * a["value"])


def plus_quotient(a: Arguments) -> Tensor:
    """A sum with a quotient."""
    quotient = a["tensor1"] / a["tensor2"]
    return a["self"] + (quotient if a["value"] == 1 else quotient * a["value"])


def bilinear(a: Arguments) -> Tensor:
    """One matrix product after the other."""
    x, y, weight = a["input1"], a["input2"], a["weight"]
    outputs, first, second = weight.shape
    matrix = weight.permute(1, 0, 2).reshape(first, outputs * second)
    rows = (x @ matrix).unflatten(-1, (outputs, second))
    result = (rows @ y.unsqueeze(-1)).squeeze(-1)
    return result if a["bias"] is None else result + a["bias"]


def repeated(a: Arguments) -> Tensor:
    """Every element so many times, as an expansion that keeps the order."""
    x, times, dim = a["self"], a["repeats"], a["dim"]
    if not isinstance(times, int):
        return torch.repeat_interleave(x, times, dim)
    if dim is None:
        x, dim = x.flatten(), 0
    dim = dim % x.dim()
    shape = (*x.shape[: dim + 1], times, *x.shape[dim + 1 :])
    return x.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)


def solved(a: Arguments) -> Tensor:
    """``linalg.solve``: the product with the inverse, which is a constant where the matrix is."""
    matrix, b = a["A"], a["B"]
    is_vector = b.dim() == 1 or b.shape == matrix.shape[:-1]
    inverse = torch.linalg.inv(matrix)
    if is_vector:
        return (inverse @ b.unsqueeze(-1)).squeeze(-1)
    return inverse @ b if a["left"] else b @ inverse


def solved_triangular(a: Arguments) -> Tensor:
    """The same with the half of a matrix."""
    matrix = a["self"].triu() if a["upper"] else a["self"].tril()
    if a["unitriangular"]:
        ones = torch.ones_like(matrix).tril().triu()
        matrix = matrix * (1 - ones) + ones
    return solved({"A": matrix, "B": a["B"], "left": a["left"]})


def unpacked(a: Arguments) -> Tensor:
    """A product with packed weights: what they make of unit vectors is the matrix."""
    x, weight, *more = (a[name] for name in ("self", "mat2", "qGroupSize", "qScaleAndZeros"))
    product = torch.ops.aten._weight_int4pack_mm
    if weight.dtype == torch.uint8:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return x @ product(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), weight, *more)


def outer(a: Arguments) -> Tensor:
    """A product of a column and a row."""
    other = a.get("vec2", a.get("other"))
    return a["self"].unsqueeze(-1) @ other.unsqueeze(-2)  # type: ignore[union-attr]
