"""One batch: model and targets in, the arrays that are stored out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution import Backend
from ..errors import InputError, NonFiniteError
from .loading import NO_LABEL, Batch
from .moments import unit_sums
from .sites import ChosenStart, Sites
from .statistics import RelevanceStatistics
from .store import PER_SAMPLE, SCALE, Array

Target = int | Literal["predicted", "label"]
Kept = Sequence[str] | Literal["all"]
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


@dataclass
class Explained:
    """What some samples gave.

    Attributes:
        arrays: By name, batch by batch, one row per explanation or per sample.
        failed: Number and reason of each sample that could not be explained.
        statistics: Of all of them, where asked for.
    """

    arrays: dict[str, list[Array]] = field(default_factory=dict)
    failed: list[tuple[int, str]] = field(default_factory=list)
    statistics: RelevanceStatistics = field(default_factory=RelevanceStatistics)

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Add rows of a batch."""
        for name, array in arrays.items():
            self.arrays.setdefault(name, []).append(array)

    def rows(self) -> dict[str, Array]:
        """The arrays, each in one."""
        return {name: np.concatenate(parts) for name, parts in self.arrays.items()}


class Explainer:
    """Explains batches of one size.

    Args:
        model: In eval mode, on its device; returns one row of scores per sample, as a tensor or
            as a Hugging Face output with ``logits``.
        targets: The outputs to explain, each giving one row per sample.
        layers: Names of layers whose relevance is kept.
        channels: Names of layers of which each channel's sum is kept.
        statistics: Names of layers of which statistics are kept, and of the inputs and the layers
            above with them; ``"all"`` for every leaf.
        unit_dim: The dimension in which a layer's channels lie, save those of pictures and
            convolutions.
        embedding: Where integer inputs are explained; the only embedding of the model if None.
        batch_size: Batches with fewer samples are filled up, so that all have one shape.
        dtype: In which relevance is stored.
        backend: As for :class:`RelativeLRP`.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        layers: Sequence[str] = (),
        channels: Sequence[str] = (),
        statistics: Kept = (),
        unit_dim: int = 1,
        embedding: str | None = None,
        batch_size: int = 32,
        dtype: Literal["float16", "float32"] = "float32",
        backend: Backend = "auto",
    ) -> None:
        # Errors name the user's class.
        self.model = type(type(model).__name__, (_Rows,), {})(model)
        self.targets, self.backend = list(targets), backend
        self.layers, self.channels, self.statistics = list(layers), list(channels), statistics
        self.unit_dim, self.embedding, self.batch_size = unit_dim, embedding, batch_size
        self.dtype = np.dtype(dtype)
        self.named = list(dict.fromkeys([*layers, *channels]))
        more = () if statistics == "all" else statistics
        self._looked_at = [self._module(name) for name in dict.fromkeys([*self.named, *more])]
        if embedding is not None:
            self._module(embedding)
        self._sites: Sites | None = None

    def explain(self, batch: Batch, into: Explained) -> None:
        """Explain a batch and add what it gives.

        Sample by sample, if the model computes what is not finite for one of them.
        """
        if not batch.index:
            return
        try:
            self._explain(batch, into)
        except NonFiniteError:
            for i, index in enumerate(batch.index):
                one = tuple(x[i : i + 1] for x in batch.inputs)
                try:
                    self._explain(Batch([index], one, batch.labels[i : i + 1], []), into)
                except NonFiniteError as error:
                    into.failed.append((index, str(error).splitlines()[0]))

    # ---- inside --------------------------------------------------------------------------------

    def _explain(self, batch: Batch, into: Explained) -> None:
        count = len(batch.index)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        inputs = tuple(_filled(x, self.batch_size).to(device) for x in batch.inputs)
        labels = _filled(batch.labels, self.batch_size).to(device)
        rows: dict[str, list[Tensor]] = {}  # by name: one tensor per target
        starts, found = [], []
        for target in self.targets:
            start = ChosenStart(partial(_choose, target, labels), self.batch_size, self.model)
            relevance, delta = self._at(inputs[0]).explain(inputs[:1], inputs[1:], start, True)
            assert delta is not None
            some = {n.removeprefix("model."): values[:count] for n, values in relevance.items()}
            for name, value in self._kept(some, inputs[0], delta[:count]).items():
                rows.setdefault(name, []).append(value)
            starts.append(start)
            found.append(some)
        if self.statistics:  # nothing is counted of a batch that fails
            for start, some in zip(starts, found, strict=True):
                dims = {name: self._unit_dim(name, value) for name, value in some.items()}
                into.statistics.add(some, start.columns[:count], dims)
            into.statistics.edges = [
                (a.removeprefix("model."), b.removeprefix("model."))
                for a, b in self._at(inputs[0]).edges
            ]
        arrays = {name: self._stored(name, values) for name, values in rows.items()}
        times, scores = len(self.targets), starts[0].scores[:count].float().cpu().numpy()
        known = batch.labels.numpy() != NO_LABEL
        # ViRelAy wants a label for every row.
        label = np.where(known, batch.labels.numpy(), scores.argmax(1))
        index = np.array(batch.index, np.int64)
        number = np.uint16 if scores.shape[1] <= 2**16 else np.uint32
        chosen = torch.stack([start.columns[:count] for start in starts], 1)
        arrays |= {
            "prediction": scores.repeat(times, 0),
            "label": label.astype(number).repeat(times),
            "index": index.repeat(times),
            "target": chosen.flatten().cpu().numpy().astype(number),
            PER_SAMPLE + "index": index,
            PER_SAMPLE + "label": label.astype(number),
            PER_SAMPLE + "labelled": known,
        }
        into.add(arrays)

    def _kept(
        self, relevance: dict[str, Tensor], first: Tensor, delta: Tensor
    ) -> dict[str, Tensor]:
        """By name: relevance of the input and the layers, channel sums, delta, Σ|R|."""
        if first.is_floating_point():
            place = attribution = relevance["input"]
        else:  # of tokens: what their embedding's features got, together
            place = relevance[self.embedding or self._only_embedding()]
            attribution = place.flatten(2).sum(2)
        result = {"delta": delta, "mass/input": _mass(place), "attribution": attribution}
        for name, value in relevance.items():
            layer = name.split("#")[0]
            if layer in self.named:
                result[f"mass/{name}"] = _mass(value)
            if layer in self.layers:
                result[f"layers/{name}"] = value
            if layer in self.channels:
                result[f"channels/{name}"] = unit_sums(value, self._unit_dim(name, value))
        return result

    def _unit_dim(self, site: str, value: Tensor) -> int:
        """Channels of pictures and behind convolutions come first in transformers, too."""
        name = site.split("#")[0]
        if name == "input":
            return 1 if value.dim() == 4 else self.unit_dim
        modules = dict(self.model.model.named_modules())
        return 1 if isinstance(modules.get(name), _CHANNELS_FIRST) else self.unit_dim

    def _at(self, first: Tensor) -> Sites:
        if self._sites is None:
            modules = list(self._looked_at)
            if not first.is_floating_point():
                modules.insert(0, self._module(self.embedding or self._only_embedding()))
            leaves = self.statistics == "all"
            self._sites = Sites(self.model, modules, leaves, self.backend)
        return self._sites

    def _module(self, name: str) -> nn.Module:
        try:
            return self.model.model.get_submodule(name)
        except AttributeError:
            names = [name for name, _ in self.model.model.named_modules() if name]
            raise InputError(
                f"The model has no layer {name!r}; its layers are {', '.join(names[:40])}"
                + (" …" if len(names) > 40 else "")
            ) from None

    def _only_embedding(self) -> str:
        # Hugging Face's models tell which of theirs is that of the tokens.
        told = getattr(self.model.model, "get_input_embeddings", lambda: None)()
        found = [
            name
            for name, module in self.model.model.named_modules()
            if (told is None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)))
            or (told is not None and module is told)
        ]
        if len(found) != 1:
            raise InputError(
                f"The inputs are integers, which are explained where they are embedded. The model "
                f"has {len(found)} embeddings ({', '.join(found[:8])}): name one as embedding."
            )
        return found[0]

    def _stored(self, name: str, values: list[Tensor]) -> Array:
        """Rows of sample 0 for each target, then those of sample 1, as they are stored."""
        array = torch.stack([value.detach() for value in values], 1).flatten(0, 1)
        if name == "delta" or name.startswith("mass/"):
            return array.float().cpu().numpy()
        scaled = array.double() * SCALE["float16"] if self.dtype == np.float16 else array
        return np.ascontiguousarray(scaled.to(getattr(torch, self.dtype.name)).cpu().numpy())


class _Rows(nn.Module):
    """A model with plain scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Any = self.model(*inputs)
        return output if isinstance(output, Tensor) else output.logits


def _filled(x: Tensor, size: int) -> Tensor:
    """With the last row repeated, so that every batch has the shape that was captured."""
    return x if len(x) == size else torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])


def _mass(relevance: Tensor) -> Tensor:
    flat = relevance.flatten(1) if relevance.dim() > 1 else relevance[:, None]
    return flat.abs().sum(1, dtype=torch.float64)


def _choose(target: Target, labels: Tensor, scores: Tensor, rows: slice) -> Tensor:
    """The output to explain of each of these rows; those that fill the batch up count, too."""
    if target == "predicted":
        return scores.argmax(1)
    if target == "label":
        if bool((labels == NO_LABEL).any()):
            raise InputError(
                "The labels are to be explained, and some samples have none. Explain the "
                "prediction (target 'predicted'), or give every sample its label."
            )
        chosen = labels[rows]
    else:
        chosen = torch.full((len(scores),), target, device=scores.device)
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < scores.shape[1]:
        raise InputError(
            f"Target {int(chosen.max())} is out of range: the model has {scores.shape[1]} outputs, "
            f"0 to {scores.shape[1] - 1}."
        )
    return chosen
