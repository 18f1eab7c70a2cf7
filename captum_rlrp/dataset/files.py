"""Data by name: a folder of pictures, single files, a CSV table, or a user's own function."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .sources import Source, call_named

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class PictureFiles(Dataset[Any]):
    """Pictures in files, with labels where they are known."""

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
        with Image.open(self.paths[index]) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
        return self.transform(upright), self.labels[index]


class Texts(Dataset[Any]):
    """Texts as tokens, all brought to one length; the attention mask is a second input."""

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
    owners = [path.relative_to(root).parts[0] for path in paths]
    is_labelled = all(len(path.relative_to(root).parts) > 1 for path in paths)
    folders = sorted(set(owners)) if is_labelled else []
    numbers = label_numbers(folders, source.class_names)
    if source.class_names is None and folders:
        source.class_names = folders
    labels = [numbers.get(owner) for owner in owners]
    return PictureFiles(paths, labels, _transform(source), root)


def label_numbers(labels: Sequence[str], class_names: Sequence[str] | None) -> dict[str, int]:
    """Which output each label means.

    By the class's name; else, if there are as many labels as classes or no names are known, by
    order, as torchvision's ImageFolder counts. Labels that fit neither way mean nothing.
    """
    if class_names is None:
        return {label: i for i, label in enumerate(sorted(labels))}
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
    if all(label.isdigit() for label in given if label):
        labels = [int(label) if label else None for label in given]
    else:
        distinct = sorted({label for label in given if label})
        numbers = label_numbers(distinct, source.class_names)
        if source.class_names is None:
            source.class_names = distinct
        labels = [numbers.get(label) for label in given]
    if column == "text":
        return Texts([row["text"] for row in rows], labels, source.tokenizer, length)
    files = [path.parent / row["file"] for row in rows]
    return PictureFiles(files, labels, _transform(source), None)


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
