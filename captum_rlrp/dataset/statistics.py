"""Relevance over a data set: per class, per layer, in one pass over the batches.

What is kept does not grow with the number of samples: for every class and layer the count, the mean
and the sum of squared deviations of each unit's relevance.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..attribution import Backend
from ..errors import InputError
from ..graph.capture import CapturedGraph, unwrap
from ..graph.layers import layer_calls, leaf_calls, module_names
from ..inputs import check_inputs
from ..kernels import get_backend, is_reference_forced
from ..plan.steps import Final, Plan
from ..run.capturing import Captured
from ..run.engine import Engine
from ..targets import start_at
from .flow import draw_flow
from .significance import benjamini_hochberg, holm, two_sided_p

UnitDim = int | None


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

    @property
    def error(self) -> Tensor:
        """Standard error of the mean; NaN for a single sample."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self.squares / (self.count - 1) / self.count).sqrt()


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


@dataclass
class _Layer:
    """What is kept of one layer: moments per class of its units and of three numbers per sample."""

    units: dict[int, Moments] = field(default_factory=dict)
    shape: dict[int, Moments] = field(default_factory=dict)  # Σ|R|, positive part, effective units

    def add(self, units: Tensor, shape: Tensor, classes: Tensor) -> None:
        for number in classes.unique().tolist():
            chosen = classes == number
            for known, values in ((self.units, units), (self.shape, shape)):
                made = Moments.of(values[chosen])
                known[number] = known[number] | made if number in known else made


class RelevanceStatistics:
    r"""
    Statistics of Relative LRP over a data set: relevance per class of every unit of every
    layer, tests of the differences between classes, and the layers' share of relevance.

    Made by :meth:`collect`. Holds no reference to the model: it may be pickled.

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
        self._known: dict[str, _Layer] = {}

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
        names = None if layers is None else [module_names(model, unwrap(m))[0] for m in layers]
        fuses = not is_reference_forced(backend)
        engine = Engine(model, get_backend(backend), fuses, layers=names)
        device = next((p.device for p in model.parameters()), None)
        made = cls()
        sites: dict[tuple[Node, ...], list[tuple[str, Node]]] = {}

        def wanted(graph: CapturedGraph, explained: Sequence[Node]) -> list[Node]:
            found = _sites(model, graph, explained, layers)
            nodes = list(dict.fromkeys(node for _, node in found))
            sites[tuple(nodes)] = found
            return nodes

        for batch in loader:
            inputs, labels = _unpack(batch, device)
            if len(inputs[0]) == 0:
                continue
            if labels is None and "label" in (target, group_by):
                raise InputError("The batches hold no labels: they must be pairs (inputs, labels).")
            chosen: list[Tensor] = []
            choose = functools.partial(_choose, labels if target == "label" else target, chosen)
            start = functools.partial(start_at, choose, len(inputs[0]), model)
            explanation = engine.explain(inputs, (), start, wanted)
            captured = engine.captured(inputs, len(inputs), len(inputs[0]), wanted)
            classes = labels if group_by == "label" else torch.cat(chosen)
            assert classes is not None
            found = sites[captured.wanted]
            if not made.layers:
                made.layers = [name for name, _ in found]
                made._known = {name: _Layer() for name in made.layers}
                made.edges = _edges(captured.program.plan, found)
            by_node = dict(zip(captured.wanted, explanation.relevance, strict=True))
            for name, node in found:
                relevance = _samples_first(captured, node, by_node[node], len(inputs[0]))
                dim = unit_dim.get(name, 1) if isinstance(unit_dim, Mapping) else unit_dim
                units, shape = _measure(relevance, dim)
                made._known[name].add(units, shape, classes.cpu())
        if not made.layers:
            raise InputError("The loader holds no samples.")
        return made

    # ---- what is known -----------------------------------------------------------------------

    @property
    def counts(self) -> dict[int, int]:
        """Number of samples per class."""
        some = self._known[self.layers[0]].units
        return {number: some[number].count for number in sorted(some)}

    def mean(self, layer: str, of: int | None = None) -> Tensor:
        """Mean relevance of each unit in a class, shape ``(units,)``."""
        return self._moments(layer, of).mean

    def standard_error(self, layer: str, of: int | None = None) -> Tensor:
        """Standard error of :meth:`mean`; NaN for a single sample."""
        return self._moments(layer, of).error

    def mass(self, layer: str, of: int | None = None) -> float:
        """Mean of Σ|R| over the layer: the part of the one unit of relevance that passes it.

        Parts that go around the layer are missing, so is what cancelled behind it.
        """
        return float(self._shape(layer, of).mean[0])

    def positive_share(self, layer: str, of: int | None = None) -> float:
        """The part of Σ|R| that is positive; NaN if there is none at all."""
        mass, positive, _ = self._shape(layer, of).mean.tolist()
        return positive / mass if mass else float("nan")

    def effective_units(self, layer: str, of: int | None = None) -> float:
        """Mean of (Σ|R_u|)² / ΣR_u²: k if k units share a sample's relevance evenly."""
        return float(self._shape(layer, of).mean[2])

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
        first = self._moments(layer, a)
        second = self._moments(layer, b) if b is not None else self._others(layer, a)
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
        positive = {name: self._shape(name, of).mean[1].item() for name in self.layers}
        return draw_flow(mass, positive, self.edges, ax)

    # ---- inside --------------------------------------------------------------------------------

    def _layer(self, layer: str) -> _Layer:
        if layer not in self._known:
            raise InputError(f"No layer {layer!r}; there are {', '.join(self.layers)}.")
        return self._known[layer]

    def _moments(self, layer: str, of: int | None) -> Moments:
        return _merged(self._layer(layer).units, of)

    def _shape(self, layer: str, of: int | None) -> Moments:
        return _merged(self._layer(layer).shape, of)

    def _others(self, layer: str, but: int) -> Moments:
        units = self._layer(layer).units
        others = {number: moments for number, moments in units.items() if number != but}
        if not others:
            raise InputError(f"There is no class but {but}.")
        return _merged(others, None)


def _merged(classes: Mapping[int, Moments], of: int | None) -> Moments:
    if of is None:
        return functools.reduce(Moments.__or__, (classes[number] for number in sorted(classes)))
    if of not in classes:
        raise InputError(f"No sample of class {of}; there are {sorted(classes)}.")
    return classes[of]


def _unpack(batch: Any, device: torch.device | None) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Inputs and labels of a batch, on the model's device."""
    inputs, labels = batch, None
    if isinstance(batch, (list, tuple)):
        inputs, labels = batch if len(batch) == 2 else (batch[0], None)
    tensors = check_inputs(tuple(inputs) if isinstance(inputs, list) else inputs)
    if labels is not None:
        labels = torch.as_tensor(labels, device=device).reshape(-1)
    return tuple(x.to(device) for x in tensors), labels


def _choose(target: Tensor | int | None, chosen: list[Tensor], output: Tensor) -> Any:
    """The target of each sample; noted down, as it is the class of the sample, too."""
    if output.dim() != 2:
        raise InputError(
            f"The model returns shape {tuple(output.shape)}; statistics need one row of scores "
            "per sample."
        )
    if isinstance(target, Tensor):
        done = sum(len(part) for part in chosen)
        chosen.append(target[done : done + len(output)])
        return target
    largest = output.argmax(1)
    chosen.append(largest if target is None else torch.full_like(largest, target))
    return chosen[-1]


def _sites(
    model: nn.Module,
    graph: CapturedGraph,
    explained: Sequence[Node],
    layers: Sequence[nn.Module] | None,
) -> list[tuple[str, Node]]:
    """Name and value of each place relevance is measured at, in order of execution."""
    inputs = [node for node in explained if node.meta["val"].is_floating_point()]
    names = ["input"] if len(inputs) == 1 else [f"input {i}" for i in range(len(inputs))]
    if layers is None:
        groups = leaf_calls(model, graph, explained)
    else:
        found = [module_names(model, unwrap(layer)) for layer in layers]
        groups = [(name[0], layer_calls(graph, explained, name, False)) for name in found]
    sites = [
        (name if i == 0 else f"{name}#{i + 1}", node)
        for name, nodes in groups
        for i, node in enumerate(nodes)
    ]
    position = {node: i for i, node in enumerate(graph.nodes)}
    sites.sort(key=lambda site: position[site[1]])
    return [*zip(names, inputs, strict=True), *sites]


def _edges(plan: Plan, sites: Sequence[tuple[str, Node]]) -> list[tuple[str, str]]:
    """Pairs of sites that relevance goes between without meeting another."""
    back: dict[Node, Collection[Node]] = {}
    for step in plan.steps:
        if isinstance(step, Final):
            back.update({call.node: (rule.operand(call),) for rule, call in step.links})
        else:
            back[step.output] = step.carriers
    names: dict[Node, str] = {}
    for name, node in sites:
        names.setdefault(node, name)
    edges = []
    for node, name in names.items():
        reached: dict[Node, None] = {}
        pending = list(back.get(node, ()))
        while pending:
            source = pending.pop(0)
            if source not in reached:
                reached[source] = None
                pending += () if source in names else back.get(source, ())
        edges += [(names[source], name) for source in reached if source in names]
    return edges


def _samples_first(captured: Captured, node: Node, relevance: Tensor, batch: int) -> Tensor:
    if captured.per_sample:
        return relevance
    return captured.program.plan.layouts[node].samples_first(relevance, batch)


def _measure(relevance: Tensor, unit_dim: UnitDim) -> tuple[Tensor, Tensor]:
    """Relevance of each unit, and Σ|R|, its positive part and the effective number of units."""
    flat = relevance.flatten(1) if relevance.dim() > 1 else relevance.unsqueeze(1)
    units = flat
    if unit_dim is not None and relevance.dim() > 2:
        units = relevance.movedim(unit_dim, 1).flatten(2).sum(2, dtype=torch.float64)
    flat, units = flat.cpu().double(), units.cpu().double()
    mass, squares = units.abs().sum(1), units.square().sum(1)
    effective = torch.where(squares == 0, 0.0, mass.square() / squares)
    shape = torch.stack([flat.abs().sum(1), flat.clamp_min(0).sum(1), effective], 1)
    return units, shape
