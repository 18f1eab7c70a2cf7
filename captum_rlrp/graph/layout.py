"""Where the batch lies in a value, for networks that move or merge the batch dimension.

Attention windows merge it with the windows, ``nn.MultiheadAttention`` puts it second. Everything
in the method is per sample, so every value knows how to be seen with its samples first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Sample of an element: ``(index along dim // inner) % batch size``."""

    dim: int = 0
    inner: int = 1

    def samples_first(self, value: Tensor, batch: int) -> Tensor:
        """The value with the samples as dimension 0 (a view)."""
        size = value.shape[self.dim] if value.dim() else 1
        if self.dim == 0 and size == batch:
            return value
        if self.dim == 0 and self.inner * batch == size:
            return value.unflatten(0, (batch, self.inner))
        parts = (size // (batch * self.inner), batch, self.inner)
        return value.unflatten(self.dim, parts).movedim(self.dim + 1, 0)

    def restore(self, value: Tensor, shape: Sequence[int]) -> Tensor:
        """Inverse of :meth:`samples_first`."""
        if value.shape == torch.Size(shape):
            return value
        if self.dim == 0 and self.inner * value.shape[0] == shape[0]:
            return value.flatten(0, 1)
        return value.movedim(0, self.dim + 1).flatten(self.dim, self.dim + 2)

    def spread(self, factor: Tensor, shape: Sequence[int]) -> Tensor:
        """One number per sample, shaped to broadcast against a value of the given shape."""
        outer = shape[self.dim] // (len(factor) * self.inner) if shape else 1
        if self.inner > 1:
            factor = factor.repeat_interleave(self.inner)
        if outer > 1:
            factor = factor.repeat(outer)
        return factor.view([-1 if d == self.dim else 1 for d in range(len(shape))])


class _Whole(Layout):
    """Every element belongs to the one sample."""

    def samples_first(self, value: Tensor, batch: int) -> Tensor:
        return value.unsqueeze(0)

    def restore(self, value: Tensor, shape: Sequence[int]) -> Tensor:
        return value.squeeze(0)

    def spread(self, factor: Tensor, shape: Sequence[int]) -> Tensor:
        return factor.view([1] * len(shape))


WHOLE = _Whole()
"""The layout of every value in a graph captured for a batch of one."""


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format of an image."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def channels_last(x: Tensor) -> Tensor:
    """An image, or filters, laid out channels_last; anything else as it is."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5:
        return x.contiguous(memory_format=torch.channels_last_3d)
    return x


def infer(
    shape: Sequence[int | torch.SymInt],
    batch: sympy.Symbol,
    sources: Sequence[tuple[Sequence[int | torch.SymInt], Layout]],
    reshapes: bool,
) -> Layout | None:
    """Layout of a call's result from its symbolic shape and its operands' layouts.

    Args:
        shape: The result's symbolic shape.
        batch: The symbol of the batch size.
        sources: Shape and layout of each operand that depends on the inputs.
        reshapes: The call keeps the order of the elements (``view`` and its kin).

    Returns:
        The layout, or None where the samples cannot be told apart.
    """
    expressions = [expression(size) for size in shape]
    carrying = [d for d, e in enumerate(expressions) if batch in e.free_symbols]
    if len(carrying) != 1:
        return None
    (dim,) = carrying
    per_batch = expressions[dim].coeff(batch)
    if not per_batch.is_Integer or expressions[dim] != per_batch * batch:
        return None
    if per_batch == 1:
        return Layout(dim, 1)
    for source_shape, layout in sources:
        if reshapes:
            trailing = _product(source_shape[layout.dim + 1 :])
            below = _product(shape[dim + 1 :])
            stride = layout.inner * trailing
            if stride % below == 0:
                return Layout(dim, int(stride // below))
        elif any(expression(size) == expressions[dim] for size in source_shape):
            return Layout(dim, layout.inner)
    return None


def expression(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a formula of the batch size."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _product(sizes: Sequence[int | torch.SymInt]) -> int:
    result = 1
    for size in sizes:
        result *= int(expression(size))
    return result
