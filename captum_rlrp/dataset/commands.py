"""The commands ``captum-rlrp dataset`` and ``captum-rlrp report``."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError


def add_parsers(commands: Any) -> None:
    """Add the two to the parser's subcommands."""
    dataset = commands.add_parser(
        "dataset",
        help="explain a data set, on one process or, by torchrun, on many",
        description="Explains every sample and stores the results in HDF5. The same command again "
        "goes on where a run stopped. On several GPUs or machines: torchrun --nproc-per-node N -m "
        "captum_rlrp dataset …",
    )
    dataset.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="a folder of pictures or of one folder per class, a CSV file with the columns file or "
        "text and label, module:function that returns a Dataset, or picture files",
    )
    dataset.add_argument(
        "--model",
        required=True,
        help="resnet50 (torchvision), timm/NAME, hf/NAME or hf/FOLDER, or module:function",
    )
    dataset.add_argument(
        "--weights", metavar="FILE|DEFAULT|NAME", help="state-dict file, or a name"
    )
    dataset.add_argument("--out", required=True, type=Path, metavar="DIR")
    dataset.add_argument(
        "--target",
        default="predicted",
        help="predicted (the default), label, the number of a class, or several, with commas",
    )
    dataset.add_argument("--layers", default="", help="layers whose relevance is kept, with commas")
    dataset.add_argument("--channels", default="", help="layers whose channels' sums are kept")
    dataset.add_argument("--embedding", help="the layer at which tokens are explained")
    dataset.add_argument("--batch-size", type=int, default=32, metavar="N")
    dataset.add_argument("--shard-size", type=int, metavar="N", help="samples per file")
    dataset.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    dataset.add_argument("--compression", choices=["lzf", "gzip", "none"], default="lzf")
    dataset.add_argument("--workers", type=int, default=2, help="processes that read samples")
    dataset.add_argument("--classes", type=Path, metavar="FILE", help="class names, one per line")
    dataset.add_argument(
        "--features", metavar="NAMES", help="names of a table's columns, with commas"
    )
    dataset.add_argument("--no-inputs", action="store_true", help="do not store the inputs")
    dataset.add_argument("--pixels", type=int, metavar="N", help="side of pictures, if not known")
    dataset.add_argument("--tokens", type=int, default=128, metavar="N", help="length of texts")
    dataset.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1 …")
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


def run_dataset(options: argparse.Namespace) -> int:
    """Load model and data, explain."""
    from .files import load_data, words_of
    from .ranks import local_rank
    from .runner import explain_dataset
    from .shown import Shown
    from .sources import load_model
    from .store import hdf5

    hdf5()
    source = load_model(options.model, options.weights, options.pixels)
    if options.classes is not None:
        source.class_names = options.classes.read_text(encoding="utf-8").splitlines()
    data = load_data(options.data, source, options.tokens)
    source.model.to(_device(options.device, local_rank()))
    path = explain_dataset(
        source.model,
        data,
        options.out,
        target=[_target(part) for part in _parts(options.target)],
        layers=_parts(options.layers),
        channels=_parts(options.channels),
        embedding=options.embedding,
        batch_size=options.batch_size,
        shard_size=options.shard_size,
        dtype=options.dtype,
        compression=None if options.compression == "none" else options.compression,
        workers=options.workers,
        shown=Shown(
            source.class_names,
            _parts(options.features or ""),
            source.mean,
            source.std,
            words_of(source),
            not options.no_inputs,
        ),
        about={"model_name": options.model, "data": " ".join(options.data)},
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
    from .store import hdf5

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


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _target(text: str) -> Any:
    return int(text) if text.lstrip("-").isdigit() else text


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
