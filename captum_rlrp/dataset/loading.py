"""Reading samples: fixed batches of indices; a sample that cannot be read is listed, not fatal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError

NO_LABEL = -1


@dataclass
class Batch:
    """The readable samples of some indices.

    Attributes:
        index: Their numbers in the data set.
        inputs: Arguments of the model, one row per sample; empty if none could be read.
        labels: Their labels, -1 where there is none.
        skipped: Number and reason of each sample that could not be read.
    """

    index: list[int]
    inputs: tuple[Tensor, ...]
    labels: Tensor
    skipped: list[tuple[int, str]]

    def without(self, dropped: Collection[int]) -> Batch:
        """The batch less some samples, by number."""
        kept = [i for i, index in enumerate(self.index) if index not in dropped]
        return Batch(
            [self.index[i] for i in kept],
            tuple(x[kept] for x in self.inputs),
            self.labels[kept],
            self.skipped,
        )


def batches_of(start: int, stop: int, size: int) -> list[list[int]]:
    """The fixed batches of a range: what a sample is explained with never depends on the run."""
    return [list(range(i, min(i + size, stop))) for i in range(start, stop, size)]


def load(
    dataset: Dataset[Any], batches: Sequence[list[int]], workers: int, pin: bool
) -> Iterator[Batch]:
    """The batches in order, read ahead by worker processes if there are any."""
    loader = DataLoader(
        _Readable(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        # A generator of its own: reading must not draw from the user's random numbers.
        generator=torch.Generator(),
    )
    return iter(loader)


class UnreadableError(Exception):
    """A sample cannot be read; the message is all there is to say."""


class _Readable(Dataset[Any]):
    """A data set whose samples come with their number, and whose errors are values."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any, str]:
        try:
            return index, _checked(self.dataset[index]), ""
        except InputError:
            raise
        except UnreadableError as error:
            return index, None, str(error)
        except Exception as error:  # whatever a user's data set raises for a broken file
            return index, None, f"{type(error).__name__}: {_first_line(error)}"


def _checked(sample: Any) -> tuple[tuple[Tensor, ...], int]:
    """Inputs and label, -1 if there is none."""
    inputs, label = sample, NO_LABEL
    if isinstance(sample, (tuple, list)):
        if not 1 <= len(sample) <= 2:
            raise InputError(
                f"A sample of the data set has {len(sample)} parts: it must be the inputs, or a "
                "pair (inputs, label). Several inputs go into a tuple of their own."
            )
        inputs = sample[0]
        label = NO_LABEL if len(sample) == 1 or sample[1] is None else int(sample[1])
    parts = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    tensors = tuple(torch.as_tensor(part) for part in parts)
    if any(x.is_floating_point() and not x.isfinite().all() for x in tensors):
        raise ValueError("holds values that are infinite or not a number")
    return tensors, label


def _collate(samples: list[tuple[int, Any, str]]) -> Batch:
    good = [(index, *content) for index, content, _ in samples if content is not None]
    skipped = [(index, reason) for index, content, reason in samples if content is None]
    if not good:
        return Batch([], (), torch.empty(0, dtype=torch.long), skipped)
    shapes = [[tuple(x.shape) for x in inputs] for _, inputs, _ in good]
    for (index, _, _), shape in zip(good, shapes, strict=True):
        if shape != shapes[0]:
            raise InputError(
                f"Sample {index} has shape {shape}, sample {good[0][0]} has {shapes[0]}: bring all "
                "samples to one shape in the data set's transform."
            )
    columns = zip(*(inputs for _, inputs, _ in good), strict=True)
    return Batch(
        [index for index, _, _ in good],
        tuple(torch.stack(column) for column in columns),
        torch.tensor([label for _, _, label in good]),
        skipped,
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
