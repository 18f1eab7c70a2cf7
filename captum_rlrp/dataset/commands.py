"""The commands ``captum-rlrp dataset`` and ``captum-rlrp report``, and what ``explain`` shares."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import InputError
from .files import load_data, words_of
from .ranks import local_rank, share_of_cores
from .runner import explain_dataset
from .shown import Shown
from .sources import Source, count_outputs, load_model
from .store import hdf5


def add_parsers(commands: Any) -> None:
    """Add the two to the parser's subcommands."""
    dataset = commands.add_parser(
        "dataset",
        help="explain a data set, on one process or, by torchrun, on many",
        description="Explains every sample and stores the results in HDF5. The same command again "
        "goes on where a run stopped. On several GPUs or machines: torchrun --nproc-per-node N -m "
        "captum_rlrp dataset …",
    )
    add_options(dataset)
    dataset.add_argument("--out", required=True, type=Path, metavar="DIR")
    dataset.add_argument("--channels", default="", help="layers whose channels' sums are kept")
    dataset.add_argument(
        "--statistics", default="", metavar="LAYERS|all", help="layers of which statistics are kept"
    )
    dataset.add_argument(
        "--unit-dim",
        type=int,
        default=1,
        metavar="N",
        help="dimension in which channels lie: 1 (the default), or -1 for transformers",
    )
    dataset.add_argument("--shard-size", type=int, metavar="N", help="samples per file")
    dataset.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    dataset.add_argument("--compression", choices=["lzf", "gzip", "none"], default="lzf")
    dataset.add_argument("--workers", type=int, default=2, help="processes that read samples")
    dataset.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="of PyTorch, for each process (default: this machine's cores shared among its ranks)",
    )
    dataset.add_argument("--no-inputs", action="store_true", help="do not store the inputs")
    dataset.set_defaults(run=run_dataset)

    report = commands.add_parser(
        "report",
        help="show a run as pages for the browser",
        description="Writes DIR/report/index.html, which needs neither network nor server.",
    )
    report.add_argument("run_folder", type=Path, metavar="DIR", help="the folder of a run")
    report.add_argument("--out", type=Path, metavar="DIR", help="default: DIR/report")
    report.add_argument("--limit", type=int, metavar="N", help="show the first N samples only")
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.set_defaults(run=run_report)


def add_options(parser: Any) -> None:
    """Which model, which data, what is explained."""
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="picture files, a folder of pictures or of one folder per class, a CSV file with the "
        "columns file or text and label, or module:function that returns a Dataset",
    )
    parser.add_argument(
        "--model",
        "--arch",
        required=True,
        help="resnet50 (torchvision), timm/NAME, hf/NAME or hf/FOLDER, or module:function",
    )
    parser.add_argument("--weights", metavar="FILE|DEFAULT|NAME", help="state-dict file, or a name")
    parser.add_argument(
        "--target",
        default="predicted",
        help="predicted (the default), label, the number of a class, or several, with commas",
    )
    parser.add_argument("--layers", default="", help="layers whose relevance is kept, with commas")
    parser.add_argument("--embedding", help="the layer at which tokens are explained")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    parser.add_argument(
        "--features", default="", metavar="NAMES", help="names of a table's columns, with commas"
    )
    parser.add_argument("--pixels", type=int, metavar="N", help="side of pictures, if not known")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="length of texts")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1 …")


def loaded(options: argparse.Namespace) -> tuple[Source, Dataset[Any]]:
    """Model, on its device, and data."""
    hdf5()
    device = _device(options.device, local_rank())
    source = load_model(options.model, options.weights, options.pixels)
    if options.classes is not None:
        source.class_names = _read_names(options.classes)
    data = load_data(options.data, source, options.tokens)
    names, outputs = source.class_names, count_outputs(source, data)
    if options.classes is not None and outputs not in (None, len(names or ())):
        raise InputError(
            f"{options.classes} names {len(names or ())} classes; the network has {outputs}."
        )
    unknown = getattr(data, "unknown", ())
    if unknown and int(os.environ.get("RANK", "0")) == 0:
        print(
            f"captum-rlrp: note: {len(unknown)} labels are no class of the model "
            f"({', '.join(unknown[:4])}{' …' if len(unknown) > 4 else ''}); their samples count as "
            "unlabelled. --classes names the classes.",
            file=sys.stderr,
        )
    source.model.to(device)
    return source, data


def explained(
    options: argparse.Namespace, source: Source, data: Dataset[Any], out: Path, **more: Any
) -> Path:
    """Explain as the options of :func:`add_options` say, and more of :func:`explain_dataset`'s."""
    keep = more.pop("keep_inputs", True)
    names = source.class_names, parts(options.features), source.mean, source.std
    return explain_dataset(
        source.model,
        data,
        out,
        target=[_target(part) for part in parts(options.target)],
        layers=parts(options.layers),
        embedding=options.embedding,
        batch_size=options.batch_size,
        shown=Shown(*names, words_of(source), keep),
        about={"model_name": options.model, "data": " ".join(options.data)},
        **more,
    )


def run_dataset(options: argparse.Namespace) -> int:
    """Load model and data, explain."""
    threads = options.threads or share_of_cores()
    if threads is not None:
        torch.set_num_threads(threads)
    source, data = loaded(options)
    statistics = parts(options.statistics)
    path = explained(
        options,
        source,
        data,
        options.out,
        channels=parts(options.channels),
        statistics="all" if statistics == ["all"] else statistics,
        unit_dim=options.unit_dim,
        shard_size=options.shard_size,
        dtype=options.dtype,
        compression=None if options.compression == "none" else options.compression,
        workers=options.workers,
        keep_inputs=not options.no_inputs,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        _tell(path)
    return 0


def run_report(options: argparse.Namespace) -> int:
    """Write the pages."""
    from .report import build_report

    page = build_report(options.run_folder, options.out, limit=options.limit)
    print(page)
    if options.open:
        webbrowser.open(page.resolve().as_uri())
    return 0


def _tell(path: Path) -> None:
    with hdf5().File(path, "r") as file:
        about = dict(file.attrs)
    print(path)
    if "samples_per_second" in about:
        print(
            f"{about['samples_per_second']:.1f} samples a second on {about['ranks']} ranks; of the "
            f"time, {about['share_waiting_for_data']:.1%} waited for data and "
            f"{about['share_writing']:.1%} wrote"
        )
    if about["skipped"]:
        table = path.parent / "skipped.csv"
        print(f"{about['skipped']} samples skipped: {table} says why", file=sys.stderr)


def parts(text: str) -> list[str]:
    """What stands between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _target(text: str) -> Any:
    if text == "auto":
        return "predicted"
    return int(text) if text.lstrip("-").isdigit() else text


def _read_names(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The class names in {path} cannot be read: {error}.") from None


def _device(name: str, local_rank: int) -> torch.device:
    """Of this process: each of a machine's has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"Device {name!r} cannot be used: {str(error).splitlines()[0]}.") from None
    return device
