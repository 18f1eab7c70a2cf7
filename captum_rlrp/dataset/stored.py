"""A stored run, read row by row, and its statistics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..errors import InputError
from .statistics import RelevanceStatistics
from .store import PER_SHARD, Array, Run, complete_shards, hdf5, merge, shard_path

Kind = Literal["image", "text", "table"]


class StoredRun:
    """The files of a run, opened for reading.

    Attributes:
        path: The folder.
        run: What was run.
        file, data: The open ``attribution.h5`` and ``data.h5``.
        about: The attributes of the first, lists as lists.
        index, label, target, predicted, confidence, mass, delta: One entry per row.
        labelled: Whether the row's sample has a label of its own.
        name: Of the row's sample.
    """

    def __init__(self, path: str | Path) -> None:
        h5py, self.path = hdf5(), Path(path)
        self.run = Run.read(self.path)
        there = (self.path / "attribution.h5").exists()
        self._cut = "finished" not in self.run.about or not there
        if self._cut:
            merge(self.path)
        self.file = h5py.File(self.path / "attribution.h5", "r")
        self.data = h5py.File(self.path / "data.h5", "r")
        self.about = {key: _plain(value) for key, value in self.file.attrs.items()}
        if "attribution" not in self.file:
            raise InputError(f"{path} holds no explanation: not one sample could be read.")
        self.index, self.label = self.file["index"][:], self.file["label"][:]
        self.target, self.delta = self.file["target"][:], self.file["delta"][:]
        self.mass = self.file["mass/input"][:]
        self.labelled = self.data["labelled"][:][self.index]
        self.name = self.data["name"].asstr()[:][self.index]
        self.predicted = np.empty(len(self.index), np.int64)
        self.confidence = np.empty(len(self.index))
        for start in range(0, len(self.index), 4096):
            part = slice(start, start + 4096)
            chances = softmax(self.file["prediction"][part])
            self.predicted[part], self.confidence[part] = chances.argmax(1), chances.max(1)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def kind(self) -> Kind:
        """What the samples are."""
        if self.file["attribution"].ndim == 4:
            return "image"
        return "text" if "tokens" in self.data else "table"

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Relevance of some rows, as shares, whatever it is stored as.

        The data set is opened anew, which closes the shards that were read before: HDF5 keeps
        open all that an open one has touched.
        """
        stored = self.file[name]
        values = stored[start:stop].astype(np.float32)
        return values / np.float32(stored.attrs.get("scale", 1))

    def names(self, group: Literal["layers", "channels", "mass"]) -> list[str]:
        """The layers of which this is kept, as they stand in the model."""
        if group not in self.file:
            return []
        kept: list[str] = []
        self.file[group].visititems(lambda name, item: kept.append(name))
        order = ["input", *self.run.about.get("layer_order", ())]
        place = {name: i for i, name in enumerate(order)}
        return sorted(kept, key=lambda name: (place.get(name.split("#")[0], len(place)), name))

    def class_name(self, number: int) -> str:
        """Of an output."""
        names = self.about.get("class_names") or []
        return names[number] if number < len(names) else f"class {number}"

    def statistics(self) -> RelevanceStatistics:
        """Per class explained: what the run kept, else of the channels and a table's columns."""
        if self.run.depends.get("statistics"):
            path = self.path / "statistics.h5"
            return RelevanceStatistics.load(merge_statistics(self.path) if self._cut else path)
        made, classes = RelevanceStatistics(), torch.from_numpy(self.target.astype(np.int64))
        keys = {name: f"channels/{name}" for name in self.names("channels")}
        if self.kind == "table":
            keys = {"input": "attribution", **keys}
        for start in range(0, len(self) if keys else 0, 4096):
            stop = start + 4096
            parts = {n: torch.from_numpy(self.rows(k, start, stop)) for n, k in keys.items()}
            made.add(parts, classes[start:stop], None)
        return made

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        self.data.close()


def merge_statistics(out: Path) -> Path:
    """Make ``statistics.h5`` from the complete shards, in their order: the same bits every time."""
    made, run = RelevanceStatistics(), Run.read(out)
    for start, _ in complete_shards(out, run):
        with hdf5().File(shard_path(out, start, run), "r") as file:
            if PER_SHARD + "layers" in file:  # not if all of its samples were skipped
                made.merge(RelevanceStatistics.of_arrays(file))
    made.save(out / "statistics.h5")
    return out / "statistics.h5"


def softmax(scores: Array) -> Array:
    """Of each row."""
    powers = np.exp((scores - scores.max(1, keepdims=True)).astype(np.float64))
    return powers / powers.sum(1, keepdims=True)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str) and (value.startswith(("[", "{")) or value == "null"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
