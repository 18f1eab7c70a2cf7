"""The command ``captum-rlrp``: ``explain``, ``dataset``, ``report`` and ``doctor``.

Everything that can go wrong with what the user hands in ends as one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import __version__
from .cli_files import Report, draw, file_names, write_report
from .dataset.commands import add_options, add_parsers, explained, loaded
from .dataset.files import PictureFiles, read_image
from .dataset.report import build_report, check_place
from .dataset.store import StorageError
from .dataset.stored import StoredRun, softmax
from .errors import InputError, RelativeLRPError
from .kernels import show_config

__all__ = ["main", "read_image"]  # scripts may read pictures as the command does

PREDICTIONS = 5  # how many of the likeliest classes the JSON lists


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (RelativeLRPError, OSError) as error:
        complain(str(error))
        return 2


def complain(message: str) -> None:
    """Say on stderr what went wrong, without disturbing a progress bar."""
    tqdm.write(f"captum-rlrp: error: {message}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    """The options, with their help."""
    parser = argparse.ArgumentParser(
        prog="captum-rlrp", description="Relative LRP for PyTorch networks."
    )
    parser.add_argument("--version", action="version", version=f"captum-rlrp {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    explain = commands.add_parser(
        "explain",
        help="explain a handful of files: pictures to look at, and a page",
        description="Writes one heatmap (PNG) and one report (JSON) per picture, and index.html, "
        "which shows them all. No file that is not this command's own is replaced.",
    )
    add_options(explain)
    explain.add_argument("--out", required=True, type=Path, metavar="DIR")
    explain.set_defaults(run=run_explain)

    add_parsers(commands)

    doctor = commands.add_parser("doctor", help="say which versions and kernels run here, and why")
    doctor.set_defaults(run=run_doctor)
    return parser


def run_doctor(options: argparse.Namespace) -> int:
    """Print versions, the kernels in use and the reason."""
    config = {"captum-rlrp": __version__, **show_config()}
    width = max(map(len, config))
    for name, value in config.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}: {part}" for key, part in value.items())
        print(f"{name:<{width}}  {value}")
    return 0


def run_explain(options: argparse.Namespace) -> int:
    """Explain every file; one that cannot be read is reported and skipped (exit code 2)."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{options.out} cannot be written: {error.strerror}.") from None
    check_place(options.out)
    source, data = loaded(options)
    with tempfile.TemporaryDirectory(prefix="captum-rlrp-") as folder:
        run = Path(folder)
        try:
            explained(options, source, data, run)
        except InputError:
            if not list(skipped(run)):
                raise
        else:
            if isinstance(data, PictureFiles):
                write_files(options, data.paths, run)
            print(build_report(run, options.out))
        reasons = list(skipped(run))
        for reason in reasons:
            complain(reason)
    return 2 if reasons else 0


def skipped(run: Path) -> Iterator[str]:
    """Why samples were left out."""
    path = run / "skipped.csv"
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            yield from (row["reason"] for row in csv.DictReader(file))


def write_files(options: argparse.Namespace, paths: Sequence[Path], run: Path) -> None:
    """The heat map and the report of each explanation in a run."""
    stored = StoredRun(run)
    try:
        images = [paths[i] for i in stored.index]
        for row, name in enumerate(file_names(images, options.out)):
            heatmap = options.out / f"{name}.png"
            report = report_of(options, stored, row, images[row], heatmap)
            picture = stored.data["data"][stored.index[row]]
            draw(heatmap, report, stored.rows("attribution", row, row + 1)[0], picture)
            write_report(options.out / f"{name}.json", report)
    finally:
        stored.close()


def report_of(
    options: argparse.Namespace, stored: StoredRun, row: int, image: Path, heatmap: Path
) -> Report:
    """What is said of one explanation."""
    logits = stored.file["prediction"][row]
    chances = softmax(logits[None])[0]
    names = stored.about["class_names"]

    def entry(index: int) -> dict[str, Any]:
        return {
            "target": index,
            "class_name": names[index] if index < len(names) else None,
            "logit": float(logits[index]),
            "probability": float(chances[index]),
        }

    target = entry(int(stored.target[row]))
    return Report(
        image=str(image),
        heatmap=heatmap.name,
        model=options.model,
        weights=options.weights,
        **target,
        sum_abs_relevance=float(stored.mass[row]),
        delta=float(stored.delta[row]),
        predictions=[entry(int(i)) for i in (-logits).argsort(kind="stable")[:PREDICTIONS]],
    )


if __name__ == "__main__":
    sys.exit(main())
