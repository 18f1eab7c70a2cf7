"""One batch: model and targets in, the arrays that are stored out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..attribution import Backend, LayerRelativeLRP, RelativeLRP
from ..errors import InputError, NonFiniteError
from .loading import NO_LABEL, Batch
from .store import PER_SAMPLE, SCALE, Array

Target = int | Literal["predicted", "label"]


class Explainer:
    """Explains batches of one size.

    Args:
        model: In eval mode, on its device; returns one row of scores per sample, as a tensor or
            as a Hugging Face output with ``logits``.
        targets: The outputs to explain, each giving one row per sample.
        layers: Names of layers whose relevance is kept.
        channels: Names of layers of which each channel's sum is kept.
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
        embedding: str | None = None,
        batch_size: int = 32,
        dtype: Literal["float16", "float32"] = "float32",
        backend: Backend = "auto",
    ) -> None:
        self.model, self.targets, self.backend = _Rows(model), list(targets), backend
        self.layers, self.channels = list(layers), list(channels)
        self.embedding, self.batch_size = embedding, batch_size
        self.dtype = np.dtype(dtype)
        for name in dict.fromkeys(
            [*self.layers, *self.channels, *([embedding] if embedding else [])]
        ):
            self._module(name)
        self._method: RelativeLRP | LayerRelativeLRP | None = None

    def __call__(self, batch: Batch) -> tuple[dict[str, Array], list[tuple[int, str]]]:
        """The arrays of a batch, and the samples that could not be explained, with reasons.

        Sample by sample, if the model computes what is not finite for one of them.
        """
        if not batch.index:
            return {}, []
        try:
            return self._explain(batch), []
        except NonFiniteError:
            parts, failed = [], []
            for i, index in enumerate(batch.index):
                one = tuple(x[i : i + 1] for x in batch.inputs)
                try:
                    parts.append(self._explain(Batch([index], one, batch.labels[i : i + 1], [])))
                except NonFiniteError as error:
                    failed.append((index, str(error).splitlines()[0]))
            return joined_rows(parts), failed

    # ---- inside --------------------------------------------------------------------------------

    def _explain(self, batch: Batch) -> dict[str, Array]:
        count = len(batch.index)
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        inputs = tuple(_filled(x, self.batch_size).to(device) for x in batch.inputs)
        labels = _filled(batch.labels, self.batch_size).to(device)
        with torch.no_grad():
            scores = self.model(*inputs)
        if scores.dim() != 2:
            raise InputError(
                f"The model returns shape {tuple(scores.shape)}; to explain a data set it must "
                "return one row of scores per sample."
            )
        rows: dict[str, list[Tensor]] = {}  # by name: one tensor per target
        chosen = [_choose(target, scores, labels[:count]) for target in self.targets]
        for target in chosen:
            for name, value in self._relevance(inputs, target).items():
                rows.setdefault(name, []).append(value[:count])
        arrays = {name: self._stored(name, values) for name, values in rows.items()}
        times = len(self.targets)
        predicted = scores.argmax(1)[:count].cpu().numpy()
        known = batch.labels.numpy() != NO_LABEL
        # ViRelAy wants a label for every row.
        label = np.where(known, batch.labels.numpy(), predicted)
        index = np.array(batch.index, np.int64)
        arrays |= {
            "prediction": scores[:count].float().cpu().numpy().repeat(times, 0),
            "label": label.astype(np.uint16).repeat(times),
            "index": index.repeat(times),
            "target": torch.stack(chosen, 1)[:count].flatten().cpu().numpy().astype(np.uint16),
            PER_SAMPLE + "index": index,
            PER_SAMPLE + "label": label.astype(np.uint16),
            PER_SAMPLE + "labelled": known,
        }
        return arrays

    def _relevance(self, inputs: tuple[Tensor, ...], target: Tensor) -> dict[str, Tensor]:
        """By name: relevance of the input and the layers, channel sums, delta, Σ|R|."""
        method = self._made(inputs[0])
        if isinstance(method, RelativeLRP):
            first, delta = method.attribute(
                inputs[0], target, inputs[1:] or None, return_convergence_delta=True
            )
            return {"attribution": first, "delta": delta, "mass/input": _mass(first)}
        (first, *others), delta = method.attribute(
            inputs[0], target, inputs[1:] or None, return_convergence_delta=True
        )
        result = {"delta": delta, "mass/input": _mass(first)}
        # Of tokens: what their embedding's features got, together.
        result["attribution"] = first if inputs[0].is_floating_point() else first.flatten(2).sum(2)
        for name, values in zip(dict.fromkeys([*self.layers, *self.channels]), others, strict=True):
            for i, value in enumerate(values if isinstance(values, tuple) else (values,)):
                key = name if i == 0 else f"{name}#{i + 1}"
                if len(value) != len(inputs[0]):
                    raise InputError(
                        f"Layer {name} gives shape {tuple(value.shape)}, which does not begin with "
                        "the batch; leave it out."
                    )
                result[f"mass/{key}"] = _mass(value)
                if name in self.layers:
                    result[f"layers/{key}"] = value
                if name in self.channels:
                    result[f"channels/{key}"] = (
                        value.flatten(2).sum(2) if value.dim() > 2 else value
                    )
        return result

    def _made(self, first: Tensor) -> RelativeLRP | LayerRelativeLRP:
        if self._method is None:
            others = [self._module(n) for n in dict.fromkeys([*self.layers, *self.channels])]
            if not first.is_floating_point():
                place = self._module(self.embedding or self._only_embedding())
                self._method = LayerRelativeLRP(self.model, [place, *others], self.backend)
            elif others:
                modules = [self.model.input, *others]
                self._method = LayerRelativeLRP(self.model, modules, self.backend)
            else:
                self._method = RelativeLRP(self.model, self.backend)
        return self._method

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
        found = [
            name
            for name, module in self.model.model.named_modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
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
    """A model with its input as a layer, so that one pass explains both, and with plain scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.input, self.model = nn.Identity(), model
        self.train(model.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        output: Any = self.model(self.input(inputs[0]), *inputs[1:])
        return output if isinstance(output, Tensor) else output.logits


def joined_rows(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    """The arrays of several batches, one after the other."""
    parts = [part for part in parts if part]
    return (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    )


def _filled(x: Tensor, size: int) -> Tensor:
    """With the last row repeated, so that every batch has the shape that was captured."""
    return x if len(x) == size else torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])])


def _mass(relevance: Tensor) -> Tensor:
    flat = relevance.flatten(1) if relevance.dim() > 1 else relevance[:, None]
    return flat.abs().sum(1, dtype=torch.float64)


def _choose(target: Target, scores: Tensor, labels: Tensor) -> Tensor:
    """The output to explain of each sample; those that fill the batch up count, too."""
    if target == "predicted":
        return scores.argmax(1)
    if target == "label":
        if bool((labels == NO_LABEL).any()):
            raise InputError(
                "The labels are to be explained, and some samples have none. Explain the "
                "prediction (target 'predicted'), or give every sample its label."
            )
        chosen = _filled(labels, len(scores))
    else:
        chosen = torch.full((len(scores),), target, device=scores.device)
    if not 0 <= int(chosen.min()) <= int(chosen.max()) < scores.shape[1]:
        raise InputError(
            f"Target {int(chosen.max())} is out of range: the model has {scores.shape[1]} outputs, "
            f"0 to {scores.shape[1] - 1}."
        )
    return chosen
