"""A run as pages for the browser: one folder, no network, no server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .charts import FOR, NEUTRAL, RIGHT, bars, flow, histogram
from .classes import class_summaries
from .pictures import heat_uri, picture_uri, saturation
from .store import Array, StorageError
from .stored import StoredRun, softmax

THUMBNAIL = 96  # pixels
CHUNK = {"thumbs": 96, "detail": 16}  # rows per file that the page loads on demand
INLINE = 6_000_000  # bytes up to which everything is in index.html itself
LIKELIEST = 5
GENERATOR = '<meta name="generator" content="captum_rlrp">'
_OWN = re.compile(r"(thumbs|detail)-\d{5,}\.js")


def build_report(run: str | Path, out: str | Path | None = None, limit: int | None = None) -> Path:
    r"""
    Writes a report of a run that :func:`explain_dataset` made, also of one cut short.

    Small reports are one file, ``index.html``. Larger ones have their pictures in
    ``data/`` beside it, which the page loads as it needs them: some 7 KB for a thumbnail
    with its heat map, and 15 to 60 KB for the page of a sample (112 pixels a side in runs of more
    than 1,000 rows, else 224).

    Args:

        run (str or Path): The folder of the run.
        out (str or Path, optional): Where to write; ``report`` in it by default.
        limit (int, optional): Show the first rows only.

    Returns:

        *Path* of ``index.html``.

    Raises:

        StorageError: If the folder holds no run, or `out` cannot be written or holds another page.
    """
    folder = Path(out) if out is not None else Path(run) / "report"
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}.")
    check_place(folder)
    stored = StoredRun(run)
    count = min(len(stored), limit or len(stored))
    try:
        for old in folder.glob("data/*.js"):
            if _OWN.fullmatch(old.name):
                old.unlink()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        inline, size = {}, 0
        for name, rows in _chunks(stored, count):
            text = _script_safe(rows)
            size += len(text)
            if size <= INLINE:
                inline[name] = text
            else:
                for earlier, content in inline.items():
                    _write_chunk(folder, earlier, content)
                inline = {}
                _write_chunk(folder, name, text)
        page = _render(stored, count, inline if size <= INLINE else {})
        (folder / "index.html").write_text(page, encoding="utf-8")
        if not any((folder / "data").iterdir()):
            (folder / "data").rmdir()
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror}.") from None
    finally:
        stored.close()
    return folder / "index.html"


def check_place(folder: Path) -> None:
    """Nothing that is not a report's is replaced.

    Raises:
        StorageError: If another page is in the folder.
    """
    page = folder / "index.html"
    if page.exists() and GENERATOR not in page.read_text("utf-8", errors="replace")[:4000]:
        raise StorageError(
            f"{page} is there and no report of captum_rlrp, so it is not replaced. Choose another "
            "folder (--out)."
        )


# ---- rows ---------------------------------------------------------------------------------------


def _chunks(stored: StoredRun, count: int) -> Iterator[tuple[str, list[Any]]]:
    """Name and rows of every file that the page loads."""
    pixels = 224 if count <= 1000 else 112
    pending: dict[str, list[Any]] = {"thumbs": [], "detail": []}
    for row, thumb, detail in _rows(stored, count, pixels):
        for kind, content in (("thumbs", thumb), ("detail", detail)):
            pending[kind].append(content)
            if len(pending[kind]) == CHUNK[kind] or row == count - 1:
                yield f"{kind}-{row // CHUNK[kind]:05d}", pending[kind]
                pending[kind] = []


def _rows(stored: StoredRun, count: int, pixels: int) -> Iterator[tuple[int, Any, Any]]:
    """Number, thumbnail and details of every row."""
    layers = [n for n in stored.names("layers") if stored.file[f"layers/{n}"].ndim == 4][:12]
    masses = {name: stored.file[f"mass/{name}"][:] for name in stored.names("mass")}
    show = {"image": _image, "text": _text, "table": _table}[stored.kind]
    for start in range(0, count, 64):
        stop = min(start + 64, count)
        relevance = stored.rows("attribution", start, stop)
        chances = softmax(stored.file["prediction"][start:stop])
        inner = {name: stored.rows(f"layers/{name}", start, stop).sum(1) for name in layers}
        for i, row in enumerate(range(start, stop)):
            thumb, detail = show(stored, row, relevance[i], pixels)
            order = chances[i].argsort()[::-1][:LIKELIEST]
            detail["likeliest"] = [[int(c), _short(chances[i][c])] for c in order]
            detail["flow"] = [[name, _short(mass[row])] for name, mass in masses.items()]
            detail["layers"] = [[n, *_heat(values[i], pixels)] for n, values in inner.items()]
            yield row, thumb, detail


def _image(stored: StoredRun, row: int, relevance: Array, pixels: int) -> tuple[Any, Any]:
    heat = relevance.sum(0)
    picture: tuple[str | None, str | None] = (None, None)
    if "data" in stored.data:
        data = stored.data["data"][int(stored.index[row])]
        picture = picture_uri(data, THUMBNAIL), picture_uri(data, pixels, 88)
    return (
        [picture[0], *_heat(heat, THUMBNAIL)],
        {"picture": picture[1], "heat": _heat(heat, pixels)},
    )


def _heat(relevance: Array, pixels: int) -> list[Any]:
    where, largest, saturated = heat_uri(relevance, pixels)
    return [where, _short(largest), _short(saturated)]


def _text(stored: StoredRun, row: int, relevance: Array, pixels: int) -> tuple[Any, Any]:
    words = stored.data["tokens"].asstr()[int(stored.index[row])].tolist()
    pairs = [[word, _short(r)] for word, r in zip(words, relevance, strict=True)]
    while len(pairs) > 1 and pairs[-1][0] in ("[PAD]", "<pad>", "") and pairs[-1][1] == 0:
        pairs.pop()
    return pairs[:24], {"tokens": pairs}


def _table(stored: StoredRun, row: int, relevance: Array, pixels: int) -> tuple[Any, Any]:
    flat = relevance.flatten()
    values = None
    if "data" in stored.data:
        values = stored.data["data"][int(stored.index[row])].flatten()
    order = np.abs(flat).argsort()[::-1]
    entries = [
        [int(k), _short(flat[k]), None if values is None else _short(values[k])] for k in order[:40]
    ]
    return entries[:6], {"features": entries}


# ---- the page -----------------------------------------------------------------------------------


def _render(stored: StoredRun, count: int, inline: dict[str, str]) -> str:
    try:
        import jinja2
    except ImportError:
        raise StorageError(
            "Reports are written by jinja2, which is not installed: "
            'pip install "captum-rlrp[dataset]".'
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("captum_rlrp.dataset", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    right = stored.predicted == stored.label
    known = stored.labelled.astype(bool)
    first = np.unique(stored.index, return_index=True)[1]  # several targets: a sample counts once
    judged = first[known[first]]
    shown_flow = _flow(stored)
    overview = {
        "accuracy": float(right[judged].mean()) if len(judged) else None,
        "samples": len(first),
        "mass": float(stored.mass.mean()),
        "delta": float(stored.delta.max()),
    }
    return environment.get_template("report.html").render(
        about=stored.about,
        shown=count,
        rows=len(stored),
        overview=overview,
        charts=_charts(stored, first, known & right, known & ~right, shown_flow is None),
        flow=shown_flow,
        skipped=_skipped(stored),
        kind=stored.kind,
        report=_script_safe(_report(stored, count, right, known)),
        inline=inline,
        generator=GENERATOR,
        title=stored.about.get("model_name", stored.about["model"]),
    )


def _report(stored: StoredRun, count: int, right: Array, known: Array) -> dict[str, Any]:
    """What the page's script reads."""
    part = slice(0, count)
    used = np.unique(np.concatenate([stored.label, stored.target, stored.predicted]))
    classes = max(int(used.max()) + 1, stored.file["prediction"].shape[1])
    return {
        "kind": stored.kind,
        "classes": [stored.class_name(i) for i in range(classes)],
        "features": stored.about.get("feature_names") or [],
        "chunk": CHUNK,
        "saturated": _short(_typical(stored)),
        "rows": {
            "name": stored.name[part].tolist(),
            "label": np.where(known, stored.label.astype(int), -1)[part].tolist(),
            "target": stored.target[part].tolist(),
            "predicted": stored.predicted[part].tolist(),
            "confidence": [round(float(c), 4) for c in stored.confidence[part]],
            "mass": [_short(m) for m in stored.mass[part]],
            "delta": [_short(d, 2) for d in stored.delta[part]],
        },
        "summaries": class_summaries(stored, right & known, known, count),
    }


def _typical(stored: StoredRun) -> float:
    """At which colours saturate on one scale for all: the middle of some samples' own."""
    some = stored.rows("attribution", 0, min(len(stored), 64))
    if stored.kind == "image":
        return float(np.median([saturation(r.sum(0), THUMBNAIL) for r in some]))
    return float(np.median(np.abs(some.reshape(len(some), -1)).max(1)))


def _charts(
    stored: StoredRun, first: Array, right: Array, wrong: Array, bare: bool
) -> list[tuple[str, str]]:
    confidence, unknown = stored.confidence, ~(right | wrong)
    groups = [
        (name, confidence[first][chosen[first]], colour)
        for name, chosen, colour in (
            ("right", right, RIGHT),
            ("wrong", wrong, FOR),
            ("no label", unknown, NEUTRAL),
        )
    ]
    charts = [
        ("Confidence of the predictions", histogram(groups, "probability of the likeliest class")),
        ("Relevance that reaches the input", histogram([("", stored.mass, NEUTRAL)], "Σ|R|")),
        ("Conservation", histogram([("", stored.delta, NEUTRAL)], "largest violation")),
    ]
    names = stored.names("mass")
    if len(names) > 1 and bare:
        means = [float(stored.file[f"mass/{name}"][:].mean()) for name in names]
        charts.append(("Flow through the network", bars(names, means, "mean Σ|R| of the layer")))
    return charts


def _flow(stored: StoredRun) -> str | None:
    statistics = stored.statistics()
    return flow(statistics) if statistics.edges and len(statistics.layers) > 1 else None


def _skipped(stored: StoredRun) -> list[tuple[str, str]]:
    path = stored.path / "skipped.csv"
    if not path.exists():
        return []
    import csv

    with path.open(newline="", encoding="utf-8") as file:
        return [(row[0], row[1]) for row in list(csv.reader(file))[1:]]


def _write_chunk(folder: Path, name: str, text: str) -> None:
    content = f"receive({json.dumps(name)},{text})\n"
    (folder / "data" / f"{name}.js").write_text(content, encoding="utf-8")


def _script_safe(value: Any) -> str:
    """JSON that may stand in a script of a page."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _short(value: Any, digits: int = 4) -> float:
    number = float(value)
    return float(f"{number:.{digits}g}") if math.isfinite(number) else 0.0
