"""The files of ``captum-rlrp explain``: a heat map and a report for each picture.

No output ever replaces a file that the command did not write itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from captum.attr import visualization
from matplotlib.figure import Figure
from PIL import Image

from . import __version__
from .dataset.store import Array

_WRITER = "captum-rlrp"


@dataclass
class Report:
    """What the JSON of one image holds."""

    image: str
    heatmap: str
    model: str
    weights: str | None
    target: int
    class_name: str | None
    logit: float
    probability: float
    sum_abs_relevance: float
    delta: float
    predictions: list[dict[str, Any]]


def file_names(paths: Sequence[Path], out: Path) -> list[str]:
    """One name per image for its results.

    Images that share a name are numbered, and so are those whose name is taken by a file that is
    not ours.
    """
    inputs = {path.resolve() for path in paths}
    names: list[str] = []
    for path in paths:
        name, number = path.stem, 2
        while name in names or not all(_is_free(out / f"{name}{end}", inputs) for end in _ENDINGS):
            name, number = f"{path.stem}-{number}", number + 1
        names.append(name)
    return names


_ENDINGS = (".png", ".json")


def _is_free(path: Path, inputs: set[Path]) -> bool:
    """Whether nothing is there, or a result of an earlier run."""
    if path.resolve() in inputs or path.is_symlink():
        return False
    if not path.exists():
        return True
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                return str(image.info.get("Software", "")).startswith(_WRITER)
        report = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(report, dict) and str(report.get("writer", "")).startswith(_WRITER)
    except (OSError, ValueError, SyntaxError):
        return False


def draw(path: Path, report: Report, attribution: Array, image: Array) -> None:
    """Overlay the relevance, red for and blue against the target, on the image.

    Both are (channels, height, width), the image in 8 bits.
    """
    relevance = attribution.transpose(1, 2, 0)
    largest = np.abs(relevance).max()
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    target = report.class_name or f"class {report.target}"
    visualization.visualize_image_attr(
        # To scale 1: Captum takes shares this small for zeros, and refuses to draw no relevance.
        relevance / largest if largest > 0 else None,
        np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3)) / 255,
        method="blended_heat_map" if largest > 0 else "original_image",
        sign="all",
        cmap="seismic",
        alpha_overlay=0.6,
        show_colorbar=bool(largest > 0),
        title=f"{target} ({report.probability:.1%})",
        plt_fig_axis=(figure, figure.subplots()),
        use_pyplot=False,
    )
    figure.savefig(path, dpi=100, metadata={"Software": f"{_WRITER} {__version__}"})


def write_report(path: Path, report: Report) -> None:
    """The report as JSON."""
    content = {"writer": f"{_WRITER} {__version__}", **asdict(report)}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
