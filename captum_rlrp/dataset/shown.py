"""How samples are shown: names of classes and features, pictures, words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .loading import Batch
from .store import PER_SAMPLE, Array


@dataclass(frozen=True)
class Shown:
    """What a report needs besides the numbers.

    Attributes:
        class_names: Of the model's outputs.
        feature_names: Of the columns, for tables.
        mean, std: Of each channel, as the pictures were normalised.
        words: The words of a sample's tokens, for text.
        keep_inputs: Whether the inputs are stored; without them a report shows heat maps alone.
    """

    class_names: Sequence[str] | None = None
    feature_names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    words: Callable[[list[int]], list[str]] | None = None
    keep_inputs: bool = True

    def arrays(self, batch: Batch, dataset: Dataset[Any]) -> dict[str, Array]:
        """What is stored of a batch's samples in order to show them."""
        if not batch.index:
            return {}
        x = batch.inputs[0]
        names = np.array([sample_name(dataset, index) for index in batch.index], dtype=object)
        arrays = {PER_SAMPLE + "name": names}
        if self.keep_inputs:
            arrays[PER_SAMPLE + "data"] = self._pictures(x) if x.dim() == 4 else x.numpy()
            if self.words is not None and not x.is_floating_point():
                tokens = [[str(word) for word in self.words(row)] for row in x.tolist()]
                arrays[PER_SAMPLE + "tokens"] = np.array(tokens, dtype=object)
        return arrays

    def _pictures(self, x: Tensor) -> Array:
        """In 8 bits, the normalisation taken back; if unknown, from the least value to the most."""
        x = x.float()
        if self.mean is not None and self.std is not None:
            shape = (1, -1, 1, 1)
            x = x * torch.tensor(self.std).view(shape) + torch.tensor(self.mean).view(shape)
        elif bool((x < 0).any() or (x > 1).any()):
            least, largest = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            x = (x - least) / (largest - least).clamp_min(1e-12)
        return (x.clamp(0, 1) * 255).round().byte().numpy()


def sample_name(dataset: Dataset[Any], index: int) -> str:
    """Its file, where the data set tells: by ``names``, or ``samples`` as torchvision's do."""
    for attribute in ("names", "samples", "imgs"):
        entries = getattr(dataset, attribute, None)
        if isinstance(entries, Sequence) and len(entries) > index:
            entry = entries[index]
            return str(entry[0] if isinstance(entry, (tuple, list)) else entry)
    return str(index)
