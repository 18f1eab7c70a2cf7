"""Count, mean and squared deviations, class by class: what statistics keep of a layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError

UnitDim = int | None
_PER_SAMPLE = 3  # numbers beside the units: Σ|R|, its positive part, effective units


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of some quantities, in float64."""

    count: int
    mean: Tensor
    squares: Tensor

    @staticmethod
    def of(values: Tensor) -> Moments:
        """Of the rows of a matrix."""
        mean = values.mean(0)
        return Moments(len(values), mean, (values - mean).square().sum(0))

    def __or__(self, other: Moments) -> Moments:
        """Of both together (Chan et al.): no large sums are subtracted from each other."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart.square() * (self.count * other.count / count)
        return Moments(count, mean, self.squares + other.squares + between)

    def __getitem__(self, part: slice) -> Moments:
        """Of some of the quantities."""
        return Moments(self.count, self.mean[part], self.squares[part])

    @property
    def error(self) -> Tensor:
        """Standard error of the mean; NaN for a single sample."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt()


@dataclass
class LayerMoments:
    """By class, the moments of a layer's units and, behind them, of three numbers per sample."""

    classes: dict[int, Moments] = field(default_factory=dict)

    def add(self, relevance: Tensor, classes: Tensor, unit_dim: UnitDim = 1) -> None:
        """Count a batch in, samples first."""
        values, classes = _measured(relevance, unit_dim), classes.cpu()
        self.merge(
            LayerMoments({n: Moments.of(values[classes == n]) for n in classes.unique().tolist()})
        )

    def merge(self, other: LayerMoments) -> None:
        """Count in what another one has counted."""
        for number, made in other.classes.items():
            known = self.classes.get(number)
            self.classes[number] = made if known is None else known | made

    def units(self, of: int | None) -> Moments:
        """Of the units, in one class or in all."""
        return self._of(of)[:-_PER_SAMPLE]

    def shape(self, of: int | None) -> Moments:
        """Of Σ|R|, its positive part, and the effective number of units."""
        return self._of(of)[-_PER_SAMPLE:]

    def others(self, but: int) -> Moments:
        """Of the units, in all classes but one."""
        others = [number for number in sorted(self.classes) if number != but]
        if not others:
            raise InputError(f"There is no class but {but}.")
        return _all(self.classes[number] for number in others)[:-_PER_SAMPLE]

    def _of(self, of: int | None) -> Moments:
        if of is None:
            return _all(self.classes[number] for number in sorted(self.classes))
        if of not in self.classes:
            raise InputError(f"No sample of class {of}; there are {sorted(self.classes)}.")
        return self.classes[of]


def _all(moments: Iterable[Moments]) -> Moments:
    return functools.reduce(Moments.__or__, moments)


def unit_sums(relevance: Tensor, unit_dim: UnitDim = 1) -> Tensor:
    """Relevance of each unit, summed over the positions that it has: (samples, units)."""
    if unit_dim is None or relevance.dim() <= 2:
        return relevance.flatten(1) if relevance.dim() > 1 else relevance.unsqueeze(1)
    return relevance.movedim(unit_dim, 1).flatten(2).sum(2, dtype=torch.float64)


def _measured(relevance: Tensor, unit_dim: UnitDim) -> Tensor:
    """A row per sample: its units' relevance, Σ|R|, the positive part, the effective units.

    Sums are taken where the relevance lies: a layer's values are many more than its units.
    """
    flat, units = unit_sums(relevance, None), unit_sums(relevance, unit_dim).double()
    mass, squares = units.abs().sum(1), units.square().sum(1)
    effective = torch.where(squares == 0, 0.0, mass.square() / squares)
    total = flat.abs().sum(1, dtype=torch.float64)
    positive = flat.clamp_min(0).sum(1, dtype=torch.float64)
    return torch.cat([units, torch.stack([total, positive, effective], 1)], 1).cpu()
