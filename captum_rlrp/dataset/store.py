"""What a run leaves on disk: shards in HDF5, each complete or absent, and one view over them.

run.json            what is run: the plan, and what the results depend on
shards/000000.h5    samples 0 … shard_size - 1, and so on
attribution.h5      all rows, by virtual data sets over the shards
data.h5             the inputs, row i being sample i
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RelativeLRPError

Array = NDArray[Any]
# float16 holds relevance times this, so that shares of a millionth keep all their digits.
SCALE = {"float16": 2.0**15, "float32": 1.0}
PER_SAMPLE = "sample/"  # arrays with one row per sample; the others have one per explanation
# What a run writes beside its shards.
FILES = (
    *("run.json", "attribution.h5", "data.h5", "statistics.h5"),
    *("skipped.csv", "label_map.json", "project.yaml"),
)
PER_SHARD = "statistics/"  # what a shard keeps of all its samples together
_BESIDE = ("skipped/", PER_SHARD)  # not one row per sample or explanation
_SMALL = ("index", "label", "target", "delta", "mass")  # copied, not linked


class StorageError(RelativeLRPError):
    """A file of a run cannot be written or read."""


def hdf5() -> Any:
    """The h5py module."""
    try:
        import h5py
    except ImportError:
        raise StorageError(
            'Runs are stored by h5py, which is not installed: pip install "captum-rlrp[dataset]".'
        ) from None
    return h5py


@dataclass
class Run:
    """The content of ``run.json``.

    Attributes:
        samples: Size of the data set.
        batch_size: Samples explained together.
        shard_size: Samples of a shard, a multiple of `batch_size`.
        depends: What results depend on; a run goes on only if all of it is unchanged.
        about: What else is to be known: the command, versions, names to show.
    """

    samples: int
    batch_size: int
    shard_size: int
    depends: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(out: Path) -> Run:
        """Of a folder."""
        path = out / "run.json"
        try:
            return Run(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise StorageError(
                f"{out} holds no run.json: it is not the folder of a run (captum-rlrp dataset … "
                "--out makes one)."
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{path} cannot be read: {error}") from None

    def write(self, out: Path) -> None:
        """Into a folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str)
        write_file(out / "run.json", (text + "\n").encode())

    def shards(self) -> list[tuple[int, int]]:
        """First sample and end of each shard."""
        starts = range(0, self.samples, self.shard_size)
        return [(start, min(start + self.shard_size, self.samples)) for start in starts]


# ---- writing ----------------------------------------------------------------------------------


def shard_path(out: Path, start: int, run: Run) -> Path:
    """Where the shard lies that begins with this sample."""
    return out / "shards" / f"{start // run.shard_size:06d}.h5"


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Write all or nothing: under another name, to the disk, and only then under its own."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Make room" if full else "Remedy that"
        raise StorageError(
            f"{path} cannot be written: {error.strerror}. All shards written before it are "
            f"complete. {remedy} and run the same command again: it goes on where it stopped."
        ) from None


def write_shard(
    path: Path,
    start: int,
    stop: int,
    arrays: Mapping[str, Array],
    skipped: Sequence[tuple[int, str]],
    compression: str | None,
) -> None:
    """Write a shard; the file is made in memory, so that a kill leaves none that is half one."""
    h5py = hdf5()
    text = h5py.string_dtype()
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        for name, array in arrays.items():
            if array.dtype == object:
                file.create_dataset(name, data=array, dtype=text)
                continue
            options: dict[str, Any] = {}
            if array.ndim > 1 and array.size:
                # One row is one chunk: a reader of one sample reads no other. The checksum tells
                # a flipped bit when the row is read.
                options = {"chunks": (1, *array.shape[1:]), "fletcher32": True}
                if compression is not None:
                    options |= {"compression": compression, "shuffle": True}
            made = file.create_dataset(name, data=array, **options)
            if array.dtype in (np.float16,):
                made.attrs["scale"] = SCALE["float16"]
        file.create_dataset("skipped/index", data=np.array([i for i, _ in skipped], np.int64))
        reasons = np.array([reason for _, reason in skipped], dtype=object)
        file.create_dataset("skipped/reason", data=reasons, dtype=text)
        file.attrs.update(start=start, stop=stop)
        file.flush()
        image = file.id.get_file_image()
    write_file(path, image)


def clear_parts(out: Path) -> None:
    """Remove what killed processes left half-written."""
    own = [part for name in FILES for part in out.glob(f"{name}.*.part")]
    for part in [*own, *(out / "shards").glob("*.h5.*.part")]:
        with contextlib.suppress(OSError):
            part.unlink()


# ---- reading ----------------------------------------------------------------------------------


def is_complete(path: Path, start: int, stop: int) -> bool:
    """Whether the file holds this shard; a truncated one does not open."""
    try:
        with hdf5().File(path, "r") as file:
            return bool(file.attrs["start"] == start and file.attrs["stop"] == stop)
    except (OSError, KeyError, RuntimeError):
        return False


def complete_shards(out: Path, run: Run) -> list[tuple[int, int]]:
    """The shards that are there, in order."""
    known = {path.name for path in (out / "shards").glob("*.h5")}
    return [
        (start, stop)
        for start, stop in run.shards()
        if (path := shard_path(out, start, run)).name in known and is_complete(path, start, stop)
    ]


def merge(out: Path, attributes: Mapping[str, Any] | None = None) -> Path:
    """Make ``attribution.h5`` and ``data.h5`` over the complete shards, and ``skipped.csv``.

    May be called at any time, also of a run that was cut short.

    Args:
        out: The folder of the run.
        attributes: More of them for the file, besides those of ``run.json``.

    Returns:
        The path of ``attribution.h5``.

    Raises:
        StorageError: If no shard is complete, or a file cannot be written.
    """
    h5py, run = hdf5(), Run.read(out)
    shards = complete_shards(out, run)
    if not shards:
        raise StorageError(f"{out} holds no complete shard yet: run captum-rlrp dataset first.")
    parts = [_Part.of(shard_path(out, start, run)) for start, _ in shards]
    skipped = [entry for part in parts for entry in part.skipped]
    with_rows = [part for part in parts if part.rows]
    about = {**run.depends, **run.about, **(attributes or {})}
    about |= {"samples": run.samples, "skipped": len(skipped)}
    about["complete"] = len(shards) == len(run.shards())
    # attribution.h5 comes last: where it is, the others are.
    with written(out / "data.h5") as file:
        if with_rows:
            _link_samples(h5py, file, run.samples, with_rows)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["index", "reason"], *skipped])
    write_file(out / "skipped.csv", table.getvalue().encode())
    with written(out / "attribution.h5") as file:
        for name in with_rows[0].shapes if with_rows else ():
            if not name.startswith(PER_SAMPLE):
                _link_rows(h5py, file, name, with_rows)
        for key, value in about.items():
            plain = isinstance(value, (str, int, float, bool))
            file.attrs[key] = value if plain else json.dumps(value, default=str)
    return out / "attribution.h5"


@dataclass
class _Part:
    """What one shard holds."""

    path: Path
    shapes: dict[str, tuple[tuple[int, ...], Any]]  # by name: shape and dtype
    small: dict[str, Array]
    samples: Array
    skipped: list[tuple[int, str]]

    @property
    def rows(self) -> int:
        return len(self.small["index"]) if "index" in self.small else 0

    @staticmethod
    def of(path: Path) -> _Part:
        h5py = hdf5()
        with h5py.File(path, "r") as file:
            shapes: dict[str, tuple[tuple[int, ...], Any]] = {}

            def note(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset) and not name.startswith(_BESIDE):
                    shapes[name] = (item.shape, item.dtype)

            file.visititems(note)
            names = [
                n for n in shapes if n in _SMALL or n.startswith("mass/") or _is_small(n, shapes)
            ]
            return _Part(
                path,
                shapes,
                {name: file[name][()] for name in names},
                file[PER_SAMPLE + "index"][()] if PER_SAMPLE + "index" in file else np.empty(0),
                list(
                    zip(
                        file["skipped/index"][()].tolist(),
                        file["skipped/reason"].asstr()[()],
                        strict=True,
                    )
                ),
            )


def _is_small(name: str, shapes: Mapping[str, Any]) -> bool:
    return name.startswith(PER_SAMPLE) and (
        len(shapes[name][0]) == 1 or shapes[name][1].kind == "O"
    )


@contextlib.contextmanager
def written(path: Path) -> Iterator[Any]:
    """A small file, written as a shard is."""
    h5py = hdf5()
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="latest") as file:
        yield file
        file.flush()
        image = file.id.get_file_image()
    write_file(path, image)


def _link_rows(h5py: Any, file: Any, name: str, parts: Sequence[_Part]) -> None:
    if name in parts[0].small:
        file.create_dataset(name, data=np.concatenate([part.small[name] for part in parts]))
        return
    (_, *rest), dtype = parts[0].shapes[name]
    layout = h5py.VirtualLayout((sum(part.rows for part in parts), *rest), dtype)
    begin = 0
    for part in parts:
        shape = (part.rows, *rest)
        layout[begin : begin + part.rows] = h5py.VirtualSource(
            f"shards/{part.path.name}", name, shape, dtype
        )
        begin += part.rows
    # HDF5 reads a source that it cannot open as this value: not as 0, which would look like one.
    missing = np.nan if dtype.kind == "f" else None
    made = file.create_virtual_dataset(name, layout, fillvalue=missing)
    if dtype == np.float16:
        made.attrs["scale"] = SCALE["float16"]


def _link_samples(h5py: Any, file: Any, samples: int, parts: Sequence[_Part]) -> None:
    """Row i is sample i; those that were skipped or are not explained yet are zeros."""
    present = np.zeros(samples, bool)
    for part in parts:
        present[part.samples] = True
    file.create_dataset("present", data=present)
    names = [name for name in parts[0].shapes if name.startswith(PER_SAMPLE)]
    for name in names:
        short = name.removeprefix(PER_SAMPLE)
        (_, *rest), dtype = parts[0].shapes[name]
        if name in parts[0].small:
            whole = np.zeros((samples, *rest), dtype)
            if dtype.kind == "O":
                whole[...] = ""
            for part in parts:
                whole[part.samples] = part.small[name]
            kind = h5py.string_dtype() if dtype.kind == "O" else dtype
            file.create_dataset(short, data=whole, dtype=kind)
            continue
        layout = h5py.VirtualLayout((samples, *rest), dtype)
        for part in parts:
            source = h5py.VirtualSource(
                f"shards/{part.path.name}", name, (len(part.samples), *rest), dtype
            )
            for begin, end in _stretches(part.samples):
                first = int(part.samples[begin])
                layout[first : first + end - begin] = source[begin:end]
        file.create_virtual_dataset(short, layout)


def _stretches(numbers: Array) -> list[tuple[int, int]]:
    """Positions between which the numbers follow each other."""
    breaks = (np.diff(numbers) != 1).nonzero()[0] + 1
    edges = [0, *breaks.tolist(), len(numbers)]
    return list(itertools.pairwise(edges))
