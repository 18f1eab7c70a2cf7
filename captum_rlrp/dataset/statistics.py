"""Relevance over a data set: per class, per layer, in one pass over the batches.

What is kept does not grow with the number of samples: for every class and layer the count, the mean
and the sum of squared deviations of each unit's relevance.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution import Backend
from ..errors import InputError
from ..graph.capture import unwrap
from ..inputs import check_inputs
from .flow import draw_flow
from .moments import LayerMoments, Moments, UnitDim
from .significance import benjamini_hochberg, holm, two_sided_p
from .sites import ChosenStart, Sites
from .store import PER_SHARD, Array, hdf5, written


@dataclass(frozen=True)
class Comparison:
    """Welch's t-test of the difference between two classes, unit by unit.

    Attributes:
        difference: Mean relevance in the first class less that in the second.
        t: The statistic; infinite where both classes are constant and differ.
        p: Two-sided p-values of the single tests.
        adjusted: The same, corrected for the number of units tested.
    """

    difference: Tensor
    t: Tensor
    p: Tensor
    adjusted: Tensor

    def significant(self, level: float = 0.05) -> Tensor:
        """Units that differ at this level after correction, the surest first."""
        units = self.adjusted.argsort(stable=True)
        return units[self.adjusted[units] < level]


class RelevanceStatistics:
    r"""
    Statistics of Relative LRP over a data set: relevance per class of every unit of every
    layer, tests of the differences between classes, and the layers' share of relevance.

    Made by :meth:`collect`, or kept by :func:`explain_dataset` and read by :meth:`load`. Holds
    no reference to the model: it may be pickled.

    A *unit* is a channel, a neuron or an input feature. Its relevance in a sample is summed over
    the positions it has (see `unit_dim` of :meth:`collect`). A *class* is the output that is
    explained, or the sample's label. Wherever a class may be given, None stands for all samples.

    Attributes:

        layers (list[str]): ``"input"`` (``"input 0"``, ... where there are several) and the
                names of the layers, in order of execution. The further calls of a module that
                is called several times are ``"name#2"`` and so on.
        edges (list[tuple[str, str]]): Which layer relevance reaches which from: pairs
                (earlier, later).

    Examples::

        >>> statistics = RelevanceStatistics.collect(model, loader, target="label")
        >>> mean = statistics.mean("layer4.0.conv1", 3)  # of each channel, for class 3
        >>> difference = statistics.compare("layer4.0.conv1", 3, 5)
        >>> channels = difference.significant()[:10]  # those that tell class 3 from class 5
        >>> axis = statistics.plot_flow()
    """

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.edges: list[tuple[str, str]] = []
        self._known: dict[str, LayerMoments] = {}

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        layers: Sequence[nn.Module] | None = None,
        target: int | Literal["label"] | None = None,
        group_by: Literal["target", "label"] = "target",
        unit_dim: UnitDim | Mapping[str, UnitDim] = 1,
        backend: Backend = "auto",
    ) -> RelevanceStatistics:
        r"""
        Explains every batch once.

        Args:

            model (nn.Module): A model in eval mode that returns one row of scores per sample.
            loader (Iterable): Batches: a tensor, a tuple ``(inputs,)`` or ``(inputs, labels)``,
                    as a ``DataLoader`` gives them; `inputs` may itself be a tuple of tensors.
                    They are moved to the device of the model.
            layers (list[nn.Module], optional): The layers to look at besides the inputs.
                    Every leaf module that carries relevance if None.
                    Default: None
            target (int or str, optional): The output to explain: the one that is largest
                    (None), that of the sample's label ("label"), or always the same one.
                    Default: None
            group_by (str): Whether a sample's class is the output explained ("target") or its
                    label.
                    Default: "target"
            unit_dim (int or None, or dict of them by layer): The dimension of a layer's
                    values, samples being dimension 0, along which the units lie; relevance is
                    summed over the others. None makes every element a unit. 1 fits dense layers
                    and convolutions, -1 the tokens of a transformer. In a dict, layers that are
                    missing have 1.
                    Default: 1
            backend (str): As for :class:`RelativeLRP`.

        Raises:

            InputError: If there is no sample, or labels are asked for and missing, besides what
                :meth:`LayerRelativeLRP.attribute` raises.
        """
        model = unwrap(model)
        sites = Sites(model, layers or (), layers is None, backend)
        device = next((p.device for p in model.parameters()), None)
        made = cls()
        for batch in loader:
            inputs, labels = _unpack(batch, device)
            if len(inputs[0]) == 0:
                continue
            if labels is None and "label" in (target, group_by):
                raise InputError("The batches hold no labels: they must be pairs (inputs, labels).")
            explained = labels if target == "label" else target
            start = ChosenStart(functools.partial(_choose, explained), len(inputs[0]), model)
            relevance, _ = sites.explain(inputs, (), start)
            classes = labels if group_by == "label" else start.columns
            assert classes is not None
            made.add(relevance, classes, unit_dim)
            made.edges = sites.edges
        if not made.layers:
            raise InputError("The loader holds no samples.")
        return made

    def add(
        self,
        relevance: Mapping[str, Tensor],
        classes: Tensor,
        unit_dim: UnitDim | Mapping[str, UnitDim] = 1,
    ) -> None:
        r"""
        Counts a batch in that was explained elsewhere.

        Args:

            relevance (dict[str, Tensor]): By layer, dimension 0 being samples; the same layers
                    every time.
            classes (Tensor): The class of each sample, shape ``(N,)``.
            unit_dim (int or None, or dict of them by layer): As for :meth:`collect`.
                    Default: 1
        """
        self._same_layers(list(relevance))
        for name, values in relevance.items():
            dim = unit_dim.get(name, 1) if isinstance(unit_dim, Mapping) else unit_dim
            self._known[name].add(values, classes, dim)

    def merge(self, other: RelevanceStatistics) -> None:
        r"""
        Counts in what another one has counted, of other samples.

        Args:

            other (RelevanceStatistics): Of the same layers.

        Raises:

            InputError: If the layers differ.
        """
        self._same_layers(other.layers)
        for name in other.layers:
            self._known[name].merge(other._known[name])
        self.edges = self.edges or other.edges

    # ---- what is known -----------------------------------------------------------------------

    @property
    def counts(self) -> dict[int, int]:
        """Number of samples per class."""
        some = self._known[self.layers[0]].classes
        return {number: some[number].count for number in sorted(some)}

    def mean(self, layer: str, of: int | None = None) -> Tensor:
        """Mean relevance of each unit in a class, shape ``(units,)``."""
        return self._layer(layer).units(of).mean

    def standard_error(self, layer: str, of: int | None = None) -> Tensor:
        """Standard error of :meth:`mean`; NaN for a single sample."""
        return self._layer(layer).units(of).error

    def mass(self, layer: str, of: int | None = None) -> float:
        """Mean of Σ|R| over the layer: the part of the one unit of relevance that passes it.

        Parts that go around the layer are missing, so is what cancelled behind it.
        """
        return float(self._layer(layer).shape(of).mean[0])

    def positive_share(self, layer: str, of: int | None = None) -> float:
        """The part of Σ|R| that is positive; NaN if there is none at all."""
        mass, positive, _ = self._layer(layer).shape(of).mean.tolist()
        return positive / mass if mass else float("nan")

    def effective_units(self, layer: str, of: int | None = None) -> float:
        """Mean of (Σ|R_u|)² / ΣR_u²: k if k units share a sample's relevance evenly."""
        return float(self._layer(layer).shape(of).mean[2])

    def compare(
        self,
        layer: str,
        a: int,
        b: int | None = None,
        correction: Literal["holm", "benjamini-hochberg"] = "holm",
    ) -> Comparison:
        r"""
        Tests, unit by unit, whether two classes differ in mean relevance, by Welch's t-test
        (which lets their variances differ). Samples must be independent of each other.

        Args:

            layer (str): One of :attr:`layers`.
            a (int): A class.
            b (int, optional): Another; all others together if None.
                    Default: None
            correction (str): "holm" bounds the chance of any false alarm among the units,
                    "benjamini-hochberg" the expected part of false alarms among those found.
                    Default: "holm"

        Returns:

            :class:`Comparison`: The differences, their p-values and the corrected ones.
        """
        first = self._layer(layer).units(a)
        second = self._layer(layer).units(b) if b is not None else self._layer(layer).others(a)
        if min(first.count, second.count) < 2:
            raise InputError("A comparison needs at least two samples on both sides.")
        if correction not in ("holm", "benjamini-hochberg"):
            raise InputError(f"No such correction: {correction!r}.")
        difference = first.mean - second.mean
        one, two = first.error.square(), second.error.square()
        t = difference / (one + two).sqrt()
        freedom = (one + two).square() / (
            one.square() / (first.count - 1) + two.square() / (second.count - 1)
        )
        constant = one + two == 0
        t = torch.where(constant & (difference == 0), 0.0, t)
        p = two_sided_p(t, torch.where(constant, 1.0, freedom))
        adjusted = holm(p) if correction == "holm" else benjamini_hochberg(p)
        return Comparison(difference, t, p, adjusted)

    def plot_flow(self, ax: Any = None, of: int | None = None) -> Any:
        r"""
        Draws how relevance flows through the network: one bar per layer in order of execution,
        as high as its :meth:`mass` and divided into positive and negative relevance. Ribbons
        join layers that follow each other, arcs those that others lie between (skip
        connections), as wide as what they carry.

        Args:

            ax (matplotlib.axes.Axes, optional): Where to draw; a new figure by default.
            of (int, optional): A class; all samples by default.

        Returns:

            *matplotlib.axes.Axes*: The axes drawn on (``.figure`` is the figure).
        """
        mass = {name: self.mass(name, of) for name in self.layers}
        positive = {name: self._layer(name).shape(of).mean[1].item() for name in self.layers}
        return draw_flow(mass, positive, self.edges, ax)

    # ---- on disk -------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write them to an HDF5 file."""
        with written(Path(path)) as file:
            for name, array in self.arrays().items():
                kind = hdf5().string_dtype() if array.dtype == object else array.dtype
                file.create_dataset(name, data=array, dtype=kind)

    @classmethod
    def load(cls, path: str | Path) -> RelevanceStatistics:
        """Read what :meth:`save` wrote, or ``statistics.h5`` of :func:`explain_dataset`."""
        with hdf5().File(path, "r") as file:
            return cls.of_arrays(file)

    def arrays(self) -> dict[str, Array]:
        """All that is known, as arrays by name."""
        found: dict[str, Array] = {
            PER_SHARD + "layers": np.array(self.layers, dtype=object),
            PER_SHARD + "edges": np.array([name for edge in self.edges for name in edge], object),
        }
        for i, name in enumerate(self.layers):
            known = self._known[name].classes
            moments = [known[number] for number in sorted(known)]
            found[f"{PER_SHARD}{i}/class"] = np.array(sorted(known), np.int64)
            found[f"{PER_SHARD}{i}/count"] = np.array([m.count for m in moments], np.int64)
            found[f"{PER_SHARD}{i}/mean"] = torch.stack([m.mean for m in moments]).numpy()
            found[f"{PER_SHARD}{i}/squares"] = torch.stack([m.squares for m in moments]).numpy()
        return found

    @classmethod
    def of_arrays(cls, file: Any) -> RelevanceStatistics:
        """From an open file that holds :meth:`arrays`."""
        made = cls()
        made._same_layers(file[PER_SHARD + "layers"].asstr()[:].tolist())
        ends = file[PER_SHARD + "edges"].asstr()[:].tolist()
        made.edges = list(zip(ends[::2], ends[1::2], strict=True))
        for i, name in enumerate(made.layers):
            group = file[f"{PER_SHARD}{i}"]
            mean, squares = (torch.from_numpy(group[key][:]) for key in ("mean", "squares"))
            entries = zip(group["class"][:].tolist(), group["count"][:].tolist(), strict=True)
            made._known[name].classes = {
                number: Moments(count, mean[row], squares[row])
                for row, (number, count) in enumerate(entries)
            }
        return made

    # ---- inside --------------------------------------------------------------------------------

    def _same_layers(self, layers: list[str]) -> None:
        if not self.layers:
            self.layers = list(layers)
            self._known = {name: LayerMoments() for name in layers}
        elif self.layers != layers:
            raise InputError(
                f"These are statistics of the layers {', '.join(self.layers)}, not of "
                f"{', '.join(layers)}."
            )

    def _layer(self, layer: str) -> LayerMoments:
        if layer not in self._known:
            raise InputError(f"No layer {layer!r}; there are {', '.join(self.layers)}.")
        return self._known[layer]


def _unpack(batch: Any, device: torch.device | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Inputs and labels of a batch, on the model's device."""
    inputs, labels = batch, None
    if isinstance(batch, (list, tuple)):
        inputs, labels = batch if len(batch) == 2 else (batch[0], None)
    tensors = check_inputs(tuple(inputs) if isinstance(inputs, list) else inputs)
    if labels is not None:
        labels = torch.as_tensor(labels, device=device).reshape(-1)
    return tuple(x.to(device) for x in tensors), labels


def _choose(target: Tensor | int | None, output: Tensor, rows: slice) -> Tensor:
    """The column to explain of each row."""
    if isinstance(target, Tensor):
        return target[rows]
    largest = output.argmax(1)
    return largest if target is None else torch.full_like(largest, target)
