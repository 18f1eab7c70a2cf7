"""Data by name: a folder of pictures, single files, a CSV table, or a user's own function."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .loading import UnreadableError
from .sources import Source, call_named, count_outputs

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class PictureFiles(Dataset[Any]):
    """Pictures in files, with labels where they are known.

    Attributes:
        unknown: Names of labels that are no class of the model.
    """

    unknown: Sequence[str] = ()

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int | None],
        transform: Callable[[Any], Tensor],
        root: Path | None = None,
    ) -> None:
        self.paths, self.labels, self.transform = list(paths), list(labels), transform
        self.names = [str(p.relative_to(root) if root else p) for p in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        return self.transform(read_image(self.paths[index])), self.labels[index]


def read_image(path: Path) -> Any:
    """The picture, upright, in RGB with 8 bits for each colour."""
    try:
        with Image.open(path) as picture:
            return _in_8_bits(path, ImageOps.exif_transpose(picture)).convert("RGB")
    except UnidentifiedImageError:
        raise UnreadableError(f"{path} is not an image that Pillow can read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnreadableError(f"{path} cannot be read: {reason}") from None


def _in_8_bits(path: Path, picture: Any) -> Any:
    """Grey pictures of 16 bits, which Pillow would cut off at white."""
    if picture.mode == "F":
        raise UnreadableError(
            f"{path} holds floating-point numbers, of which no range is known to be black and "
            "white; convert it to 8 or 16 bits"
        )
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    levels = np.asarray(picture).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise UnreadableError(f"{path} holds levels beyond 16 bits; convert it to 8 or 16")
    return Image.fromarray(np.rint(levels / 257).astype(np.uint8))


class Texts(Dataset[Any]):
    """Texts as tokens, all brought to one length; the attention mask is a second input.

    Attributes:
        unknown: Names of labels that are no class of the model.
    """

    unknown: Sequence[str] = ()

    def __init__(
        self, texts: Sequence[str], labels: Sequence[int | None], tokenizer: Any, length: int
    ) -> None:
        self.names, self.labels = [text[:80] for text in texts], list(labels)
        self.tokens = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, ...], int | None]:
        row = (self.tokens["input_ids"][index], self.tokens["attention_mask"][index])
        return row, self.labels[index]


def load_data(names: Sequence[str], source: Source, length: int = 128) -> Dataset[Any]:
    """The data set.

    Args:
        names: A folder (of pictures, or of one folder per class), a CSV file with a header
            (``file`` or ``text``, and ``label`` if known), ``module:function``, or picture files.
        source: The model that it is for.
        length: Of texts, in tokens.
    """
    first = Path(names[0])
    if len(names) == 1 and ":" in names[0] and not first.exists():
        made = call_named(names[0])
        if not hasattr(made, "__getitem__"):
            raise InputError(
                f"{names[0]} returns a {type(made).__name__}, not a map-style Dataset."
            )
        return made
    missing = [name for name in names if not Path(name).exists()]
    if missing:
        raise InputError(f"There is no {', '.join(missing[:4])}.")
    if len(names) == 1 and first.is_dir():
        return _folder(first, source)
    if len(names) == 1 and first.suffix.lower() == ".csv":
        return _table(first, source, length)
    return PictureFiles([Path(name) for name in names], [None] * len(names), _transform(source))


def _folder(root: Path, source: Source) -> PictureFiles:
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if not paths:
        raise InputError(f"{root} holds no pictures ({', '.join(sorted(PICTURES))}).")
    made = PictureFiles(paths, [None] * len(paths), _transform(source), root)
    if all(len(path.relative_to(root).parts) > 1 for path in paths):
        label(made, [path.relative_to(root).parts[0] for path in paths], source)
    return made


def label(made: PictureFiles | Texts, given: Sequence[str], source: Source) -> None:
    """Give the samples their labels, of which "" is none, and unnamed classes these names."""
    distinct = sorted({name for name in given if name})
    if source.class_names is None and len(distinct) == count_outputs(source, made):
        source.class_names = distinct
    numbers = label_numbers(distinct, source.class_names)
    made.labels = [numbers.get(name) for name in given]
    made.unknown = [name for name in distinct if name not in numbers]


def label_numbers(labels: Sequence[str], class_names: Sequence[str] | None) -> dict[str, int]:
    """Which output each label means.

    By the class's name; else, if there are as many labels as classes, by order, as torchvision's
    ImageFolder counts. Labels that fit neither way mean nothing.
    """
    if class_names is None:
        return {}
    known = {_plain(name): i for i, name in enumerate(class_names)}
    found = {label: known[_plain(label)] for label in labels if _plain(label) in known}
    if not found and len(labels) == len(class_names):
        return {label: i for i, label in enumerate(sorted(labels))}
    return found


def _table(path: Path, source: Source, length: int) -> Dataset[Any]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}.") from None
    column = "text" if source.tokenizer is not None else "file"
    if not rows or column not in rows[0]:
        raise InputError(
            f"{path} must have a header with the column {column!r} (and 'label', if known), and a "
            "row for each sample."
        )
    given = [(row.get("label") or "").strip() for row in rows]
    made: PictureFiles | Texts
    blank: list[int | None] = [None] * len(rows)
    if column == "text":
        made = Texts([row["text"] for row in rows], blank, source.tokenizer, length)
    else:
        files = [path.parent / row["file"] for row in rows]
        made = PictureFiles(files, blank, _transform(source))
    if all(name.isdigit() for name in given if name):
        made.labels = [int(name) if name else None for name in given]
    else:
        label(made, given, source)
    return made


def _transform(source: Source) -> Callable[[Any], Tensor]:
    if source.transform is None:
        raise InputError("The model reads text: give a CSV file with a column 'text'.")
    return source.transform


def words_of(source: Source) -> Callable[[list[int]], list[str]] | None:
    """How tokens are written."""
    if source.tokenizer is None:
        return None
    return source.tokenizer.convert_ids_to_tokens


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", " ").replace("-", " ")
