"""Measures every method on really trained networks and writes the tables of docs/evaluation.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from evaluation import real, real_measures, real_methods, report
from evaluation.compare import interval, paired_p
from evaluation.protocol import REAL

Stored = dict[str, real_measures.Figures | str]  # by method; a string is an error

TITLES = {
    "lite0": "EfficientNet-Lite0, ImageNet",
    "resnet20": "ResNet20, CIFAR-10",
    "resnet32": "ResNet32, CIFAR-10",
    "vgg": "VGG, CIFAR-10",
    "minilm": "all-MiniLM-L6-v2, sentences",
}
MEASURES = {"srg": "SRG, blur", "srg_mean": "SRG, mean", "grid": "grid"}
YARDSTICKS = {"minilm": "integrated gradients"}  # EpsilonPlus elsewhere


def evaluate(weights: Path, pictures: Path, folder: Path, only: str | None = None) -> None:
    """All that is missing; figures are stored after every method."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TITLES:
        if only in (None, name):
            try:
                one(name, weights, pictures, folder / f"{name}.json")
            except real.Absent as absent:
                print(f"{TITLES[name]}: left out, {absent}")


def one(name: str, weights: Path, pictures: Path, path: Path) -> None:
    """Every method on one network."""
    stored: Stored = json.loads(path.read_text()) if path.exists() else {}
    names = real_methods.SENTENCE_METHODS if name == "minilm" else tuple(real_methods.METHODS)
    missing = [method for method in names if method not in stored]
    if not missing:
        return
    if name == "minilm":
        sentences = list(real.sentences())

        def measure(method: str) -> real_measures.Figures:
            return real_measures.deletion(real_methods.by_token(method), sentences)
    else:
        protocol = next(p for p in REAL if p.network == name)
        subject = real_measures.subject(protocol, "report", weights, pictures)

        def measure(method: str) -> real_measures.Figures:
            explain = real_methods.prepare(method, name, subject.network)
            return real_measures.figures(explain, subject)

    for method in missing:
        stored[method] = attempt(measure, method)
        path.write_text(json.dumps(stored))


def attempt(
    measure: Callable[[str], real_measures.Figures], method: str
) -> real_measures.Figures | str:
    """An error of a peer is a row of the table."""
    try:
        return measure(method)
    except Exception as error:
        if method == real_methods.OURS:
            raise
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def write(folder: Path, document: Path) -> None:
    """The tables, between the document's marks."""
    parts = []
    for name, title in TITLES.items():
        path = folder / f"{name}.json"
        text = table(name, json.loads(path.read_text())) if path.exists() else "Not measured."
        parts.append(f"### {title}\n\n{text}")
    document.write_text(report.replaced(document.read_text(), "real", "\n\n".join(parts)))


def table(name: str, stored: Stored) -> str:
    """Means, half widths of the intervals, and what differs from the yardstick."""
    yardstick = stored.get(YARDSTICKS.get(name, "EpsilonPlus"))
    found = [f for f in stored.values() if not isinstance(f, str)]
    shown = [measure for measure in MEASURES if measure in found[0]]
    rows, errors = [], []
    for method in [m for m in real_methods.METHODS if m in stored]:
        figures = stored[method]
        if isinstance(figures, str):
            errors.append(f"* {method} fails: `{figures}`")
            continue
        cells = [report.bold(method)]
        for measure in shown:
            values = np.array([figures[measure]])
            low, high = interval(values)
            mark = ""
            if isinstance(yardstick, dict) and figures is not yardstick:
                other = np.array([yardstick[measure]])
                if paired_p(values, other) < 0.05:
                    mark = " ▲" if values.mean() > other.mean() else " ▼"
            cells.append(f"{values.mean():.3f} ± {(high - low) / 2:.3f}{mark}")
        rows.append(cells)
    count = {measure: len(found[0][measure]) for measure in shown}
    names = {"srg": "token deletion"} if name == "minilm" else MEASURES
    head = ["method", *(f"{names[m]} ({count[m]})" for m in shown)]
    return "\n\n".join([report.table(head, rows), *(["\n".join(errors)] if errors else [])])
