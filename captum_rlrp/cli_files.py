"""The files of the command: pictures in, heat maps and reports out.

No output ever replaces a file that the command did not write itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import visualization
from matplotlib.figure import Figure
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from . import __version__

_WRITER = "captum-rlrp"


class CommandError(Exception):
    """A mistake in what the user handed in; the message is all they need."""


class UnreadableImageError(CommandError):
    """One file is no image; the others can still be explained."""


@dataclass
class Report:
    """What the JSON of one image holds. ``seconds`` is the explanation alone."""

    image: str
    heatmap: str
    arch: str
    weights: str
    target: int
    class_name: str | None
    logit: float
    probability: float
    sum_abs_relevance: float
    delta: float
    seconds: float
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


def read_image(path: Path) -> Any:
    """The image, upright, in RGB with 8 bits for each colour."""
    try:
        with Image.open(path) as image:
            return _in_8_bits(path, ImageOps.exif_transpose(image)).convert("RGB")
    except UnidentifiedImageError:
        raise UnreadableImageError(f"{path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{path} cannot be read: {first_line(error)}") from None


def _in_8_bits(path: Path, image: Any) -> Any:
    """Grey pictures of 16 bits, which Pillow would cut off at white."""
    if image.mode == "F":
        raise UnreadableImageError(
            f"{path} holds floating-point numbers, of which no range is known to be black and "
            "white; convert it to 8 or 16 bits"
        )
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise UnreadableImageError(f"{path} holds levels beyond 16 bits; convert it to 8 or 16")
    return Image.fromarray(np.rint(levels / 257).astype(np.uint8))


def displayed(image: Tensor, preprocess: Any) -> Tensor:
    """What the network was shown, with the normalisation taken back: height, width, 3."""
    mean, std = getattr(preprocess, "mean", [0.0]), getattr(preprocess, "std", [1.0])
    image = image.cpu().permute(1, 2, 0)
    return (image * torch.tensor(std) + torch.tensor(mean)).clamp(0, 1)


def draw(path: Path, report: Report, attribution: Tensor, image: Tensor) -> None:
    """Overlay the relevance, red for and blue against the target, on the image."""
    relevance = attribution.cpu().permute(1, 2, 0)
    largest = relevance.abs().max()
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    target = report.class_name or f"class {report.target}"
    visualization.visualize_image_attr(
        # To scale 1: Captum takes shares this small for zeros, and refuses to draw no relevance.
        (relevance / largest).numpy() if largest > 0 else None,
        image.numpy(),
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
