"""Explains a data set, in one process or many, and loses nothing when it is killed."""

from __future__ import annotations

import hashlib
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import Dataset

from ..attribution import Backend
from ..errors import InputError
from ..graph.capture import check_eval_mode, unwrap
from .explaining import Explained, Explainer, Kept, Target
from .loading import batches_of, load
from .progress import Progress, Times
from .ranks import Ranks, joined
from .shown import Shown
from .store import (
    FILES,
    Run,
    StorageError,
    clear_parts,
    complete_shards,
    hdf5,
    merge,
    shard_path,
    write_shard,
)
from .stored import merge_statistics
from .virelay import write_project

_SHARD = 256  # samples, at most: what a kill costs, and what a rank holds in memory


def explain_dataset(
    model: nn.Module,
    dataset: Dataset[Any],
    out: str | Path,
    *,
    target: Target | Sequence[Target] = "predicted",
    layers: Sequence[str] = (),
    channels: Sequence[str] = (),
    statistics: Kept = (),
    unit_dim: int = 1,
    embedding: str | None = None,
    batch_size: int = 32,
    shard_size: int | None = None,
    dtype: Literal["float16", "float32"] = "float32",
    compression: str | None = "lzf",
    workers: int = 0,
    shown: Shown | None = None,
    backend: Backend = "auto",
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
) -> Path:
    r"""
    Explains every sample of a data set and stores the results in HDF5.

    Under torchrun, or in a process group that is there already, the ranks share the data set:
    each writes its own shards. A run that was killed goes on where it stopped when the same call
    is made again, on any number of ranks, and ends with the same bits: batches are fixed ranges of
    indices, always filled up to one size. (The bits depend on the device and on the number of
    threads of PyTorch, as every sum of floating-point numbers does.)

    Args:

        model (nn.Module): A model in eval mode, on the device to run on, that returns one row of
                scores per sample.
        dataset (Dataset): With ``__len__`` and ``__getitem__``; gives inputs, or pairs
                ``(inputs, label)``. Inputs are a tensor, or a tuple of the tensor that is
                explained and constants of the model's further arguments. A sample that raises is
                listed in ``skipped.csv``, with the error.
        out (str or Path): A folder: a new one, or that of the run to go on with.
        target (str, int, or list): ``"predicted"``, ``"label"``, the number of an output,
                or several of them: one row per sample and target.
        layers (list[str]): Names of layers whose relevance is kept whole.
        channels (list[str]): Names of layers of which each channel's sum is kept.
        statistics (list[str] or "all"): Names of layers, or every leaf, of which
                :class:`RelevanceStatistics` are kept, in ``statistics.h5``: per class explained,
                also of the inputs and the layers named above. They take no row per sample.
        unit_dim (int): The dimension of a layer's values in which its channels lie: 1 fits
                convolutions and dense layers, -1 transformers. Of pictures and convolutions it is
                always 1.
        embedding (str, optional): The layer at which integer inputs (tokens) are explained. Not
                needed if the model has only one, or is Hugging Face's.
        batch_size (int): Samples explained together, at most.
        shard_size (int, optional): Samples per file. By default at most 256, and so few that
                every rank has four shards.
        dtype (str): ``"float32"``, or ``"float16"``, which holds the relevance times 2¹⁵ (the
                data sets' attribute ``scale``): 11 significant bits down to shares of 2e-9.
        compression (str, optional): ``"lzf"``, ``"gzip"`` or None.
        workers (int): Processes that read samples ahead; 0 reads in between.
        shown (Shown, optional): Names and normalisation, for reports.
        backend (str): As for :class:`RelativeLRP`.
        progress (bool): Whether the first rank draws a bar on standard error.
        about (dict, optional): More attributes for the file.

    Returns:

        *Path* of ``attribution.h5``, which holds ``attribution``, ``prediction``, ``label`` and
        ``index`` (as ViRelAy and CoRelAy read them), ``target``, ``delta``, ``mass/…`` (Σ|R|),
        ``layers/…`` and ``channels/…``.

    Raises:

        InputError: If model, data set and options do not fit each other, or not one sample could
            be read.
        StorageError: If `out` holds a different run, or cannot be written.

    Examples::

        >>> path = explain_dataset(model, photos, "run", channels=["layer4"])
        >>> with h5py.File(path) as file:
        ...     first = file["attribution"][0]
    """
    folder, shown, model = Path(out), shown or Shown(), unwrap(model)
    hdf5()
    check_eval_mode(model)
    samples = _size(dataset)
    targets: list[Target] = list(target) if isinstance(target, (list, tuple)) else [target]  # type: ignore[list-item]
    _check(targets, batch_size, shard_size, dtype, compression)
    if samples < batch_size:  # what fills a batch up costs as much
        batch_size, shard_size = samples, None
    explainer = Explainer(
        model,
        targets,
        layers,
        channels,
        statistics,
        unit_dim,
        embedding,
        batch_size,
        dtype,
        backend,
    )
    depends = {
        "weights_sha256": weights_hash(model),
        "model": type(model).__name__,
        "targets": targets,
        "layers": list(layers),
        "channels": list(channels),
        "statistics": statistics if statistics == "all" else list(statistics),
        "unit_dim": unit_dim,
        "embedding": embedding,
        "dtype": dtype,
        "compression": compression,
        "keep_inputs": shown.keep_inputs,
        "backend": backend,
        "versions": versions(),
    }
    with joined() as ranks:
        if shard_size is None:
            per_rank = samples // (4 * ranks.world * batch_size)
            shard_size = batch_size * max(1, min(per_rank, _SHARD // batch_size))
        run = Run(samples, batch_size, shard_size, depends)
        run.about = {
            "class_names": list(shown.class_names or ()),
            "feature_names": list(shown.feature_names or ()),
            "layer_order": [n for n, _ in model.named_modules() if n in {*layers, *channels}],
            "command": shlex.join(sys.argv),
            "started": _now(),
            **(about or {}),
        }
        run, done = _agree(folder, run, ranks)
        todo = [shard for shard in run.shards() if shard not in set(done)]
        times = Times()
        bar = Progress(folder, run, sum(b - a for a, b in done), progress and ranks.rank == 0)
        try:
            _work(folder, run, todo[ranks.rank :: ranks.world], explainer, dataset, shown, workers,
                  times, bar)  # fmt: skip
        finally:
            bar.close()
        everyone = ranks.gather(times)
        path = folder / "attribution.h5"
        # Of a call that had nothing to do, the times of the last one that had stay.
        if ranks.rank == 0 and (todo or "finished" not in run.about):
            if statistics:
                merge_statistics(folder)
            summary = _summary(everyone)
            merge(folder, summary)
            write_project(folder, run)
            run.about["finished"] = summary["finished"]
            run.write(folder)
        reached = ranks.gather(None)
        assert reached
    _check_some(path)
    return path


def _work(
    out: Path,
    run: Run,
    shards: Sequence[tuple[int, int]],
    explainer: Explainer,
    dataset: Dataset[Any],
    shown: Shown,
    workers: int,
    times: Times,
    bar: Progress,
) -> None:
    """Explain and write this rank's shards."""
    begin = time.perf_counter()
    plan = [batches_of(start, stop, run.batch_size) for start, stop in shards]
    flat = [batch for batches in plan for batch in batches]
    pin = next((p.is_cuda for p in explainer.model.parameters()), False)
    loaded = times.waited_for(load(dataset, flat, workers, pin))
    for (start, stop), batches in zip(shards, plan, strict=True):
        shard = Explained()
        for indices in batches:
            batch = next(loaded)
            earlier = len(shard.failed)
            explainer.explain(batch, shard)
            if failed := {index for index, _ in shard.failed[earlier:]}:
                batch = batch.without(failed)
            shard.add(shown.arrays(batch, dataset))
            shard.failed += batch.skipped
            times.samples += len(batch.index)
            times.first = times.first or time.perf_counter() - begin
            bar.explained(len(indices), times, time.perf_counter() - begin)
        before = time.perf_counter()
        arrays = shard.rows() | (shard.statistics.arrays() if shard.statistics.layers else {})
        write_shard(shard_path(out, start, run), start, stop, arrays, sorted(shard.failed),
                    run.depends["compression"])  # fmt: skip
        times.writing += time.perf_counter() - before
        bar.shard_written(stop - start)
    times.total = time.perf_counter() - begin


def _agree(out: Path, run: Run, ranks: Ranks) -> tuple[Run, list[tuple[int, int]]]:
    """The run to go on with, a new one or that in the folder, and its complete shards.

    Rank 0 looks, and tells the others, errors too.
    """
    found: tuple[Run, list[tuple[int, int]]] | Exception | None = None
    if ranks.rank == 0:
        try:
            try:
                (out / "shards").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"{out} cannot be written: {error.strerror}.") from None
            if (out / "run.json").exists():
                run = _same(Run.read(out), run, out)
            elif found_files := [name for name in FILES if (out / name).exists()]:
                raise StorageError(
                    f"{out} holds no run, but {', '.join(found_files)}, which a run would replace. "
                    "Choose another folder."
                )
            clear_parts(out)
            done = complete_shards(out, run)
            if len(done) < len(run.shards()):
                run.about.pop("finished", None)
            run.write(out)
            found = run, done
        except StorageError as error:
            found = error
    found = ranks.from_first(found)
    if isinstance(found, Exception):
        raise found
    assert found is not None
    return found


def _same(old: Run, new: Run, out: Path) -> Run:
    """The old run, if the new one would give the same."""
    # Written as JSON and read again, tuples are lists.
    ours = {"samples": new.samples, "batch_size": new.batch_size, **new.depends}
    theirs = {"samples": old.samples, "batch_size": old.batch_size, **old.depends}
    differ = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if differ:
        said = "; ".join(f"{k} was {theirs.get(k)!r}, now {ours.get(k)!r}" for k in differ)
        raise StorageError(
            f"{out} holds another run: {said}. Choose another folder, or remove this one."
        )
    return Run(old.samples, old.batch_size, old.shard_size, old.depends, old.about)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of the parameters and buffers, by name, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(
                value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of what results depend on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("captum-rlrp", "captum"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _size(dataset: Any) -> int:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(
            f"{type(dataset).__name__} is not a map-style data set: a run that can go on where it "
            "stopped needs __len__ and __getitem__."
        )
    if len(dataset) == 0:
        raise InputError("The data set is empty.")
    return len(dataset)


def _check(
    targets: Sequence[Any], batch: int, shard: int | None, dtype: str, compression: str | None
) -> None:
    if not targets:
        raise InputError("There is no target: pass 'predicted', 'label' or numbers of outputs.")
    for target in targets:
        if target not in ("predicted", "label") and not isinstance(target, int):
            raise InputError(
                f"Target {target!r} is neither 'predicted' nor 'label' nor the number of an output."
            )
    if batch < 1 or (shard is not None and (shard < 1 or shard % batch)):
        raise InputError(
            f"shard_size ({shard}) must be a multiple of batch_size ({batch}), both at least 1."
        )
    if dtype not in ("float16", "float32"):
        raise InputError(f"dtype must be 'float16' or 'float32', not {dtype!r}.")
    if compression not in ("lzf", "gzip", None):
        raise InputError(f"compression must be 'lzf', 'gzip' or None, not {compression!r}.")


def _summary(everyone: Sequence[Times]) -> dict[str, Any]:
    total = max(times.total for times in everyone)
    busy = sum(times.total for times in everyone) or 1.0
    return {
        "ranks": len(everyone),
        "finished": _now(),
        "seconds": round(total, 3),
        "seconds_first_batch": round(max(times.first for times in everyone), 3),
        "samples_per_second": round(sum(t.samples for t in everyone) / (total or 1.0), 3),
        "share_waiting_for_data": round(sum(t.waiting for t in everyone) / busy, 4),
        "share_writing": round(sum(t.writing for t in everyone) / busy, 4),
    }


def _check_some(path: Path) -> None:
    with hdf5().File(path, "r") as file:
        if "attribution" in file:
            return
    raise InputError(
        f"Not one sample could be read; the reasons are in {path.parent / 'skipped.csv'}."
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
