"""From stored results to ``docs/evaluation-small.md``; what is written there by hand stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import figures
from evaluation.compare import Record, Summary, column, load, values
from evaluation.measures import MEASURES
from evaluation.methods import METHODS, OURS
from evaluation.protocol import Protocol

LOCALISATION = ("mass", "rank", "pointing", "distractor")
FLIPPING = ("morf", "lerf", "abpc", "insertion", "srg")
SANITY = ("similarity", "sensitivity", "randomised_half", "randomised")

NETWORKS = {
    "dense": "dense net",
    "cnn": "simple CNN",
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "resnet50": "ResNet50",
    "own": "own network",
}
DATA = {"digits": "digits", "breast_cancer": "breast cancer", "shapes": "shapes",
        "cutouts": "cut-outs", "pictures": "own pictures"}  # fmt: skip
LAWS = {
    "mass": "Σ\\|R\\| ≤ 1",
    "logit": "ΣR = f(x)",
    "rise": "ΣR = f(x) − f(0)",
    "": "none",
}


def title(cell: tuple[str, str]) -> str:
    return f"{NETWORKS[cell[0]]}, {DATA[cell[1]]}"


def write(protocol: Protocol, folder: Path, document: Path, template: Path) -> None:
    """Draw the figures and fill the document's places, marked by comments, from stored results."""
    cells = load(protocol, folder)
    if not cells:
        raise SystemExit(f"no results of the {protocol.name} protocol in {folder}")
    shaken = _json(folder / "robustness.json", {"seconds": 0.0, "rows": []})
    rows = shaken["rows"]
    busy = shaken["seconds"]
    for record in (record for records in cells.values() for record in records):
        busy += record.get("seconds", 0.0) + (record.get("train_seconds") or 0.0)
    images = document.parent / "images" / "evaluation"
    tables = {cell: tabulated(records) for cell, records in cells.items()}
    parts = {
        "circumstances": circumstances(protocol, _json(folder / "run.json", {}), busy),
        "summary": summary(cells, tables, images),
        "settings": settings(protocol),
        "measures": measures(),
        "networks": accuracies(cells),
        "cells": "\n\n".join(cell_section(cell, tables[cell], cells[cell]) for cell in cells),
        "robustness": robustness(rows, images) if rows else "Not run.",
        "conservation": conservation(cells),
        "gallery": galleries(cells, folder, images, protocol),
    }
    text = (document if document.exists() else template).read_text()
    for name, content in parts.items():
        text = replaced(text, name, content)
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(text)
    print(f"wrote {document}")


def _json(path: Path, default: Any) -> Any:
    import json

    return json.loads(path.read_text()) if path.exists() else default


def replaced(text: str, name: str, content: str) -> str:
    """`text` with `content` between the markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the document has no place between {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def bold(method: str) -> str:
    return f"**{method}**" if method == OURS else method


# --- the parts ----------------------------------------------------------------------------------


def circumstances(protocol: Protocol, run: Record, busy: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    return "\n".join(
        [
            f"* The {protocol.name} protocol; seeds {', '.join(map(str, protocol.seeds))}",
            f"* Command: `{run.get('command', '')}`, {run.get('date', '')}; "
            + f"{busy / 60:.0f} minutes of processor time on all cores together, training included",
            f"* Machine: {run.get('machine', '')}",
            f"* Versions: {versions}",
            f"* Hidden layers of VGG and ResNet50: {protocol.width:g} times torchvision's width",
        ]
    )


def settings(protocol: Protocol) -> str:
    """What the protocol fixes in numbers."""
    p = protocol
    steps = ", ".join(f"{cell.steps} ({title((cell.network, cell.data))})" for cell in p.cells)
    return "\n".join(
        [
            f"* Training: AdamW, one cycle, largest learning rate {p.learning_rate:g}, batches of "
            f"{p.batch}, steps: {steps}.",
            f"* Curves of {p.flips} steps. Noise: {p.stability_samples} draws of at most "
            f"{p.stability_radius:g} in each input element. Noise and randomisation are measured "
            f"on the first {p.probes} samples, everything else on all.",
            f"* Integrated gradients: {p.integration_steps} steps. SmoothGrad: {p.smooth_samples} "
            f"samples, noise {p.smooth_noise:g} of the input's range. Grad-CAM: the deepest layer "
            f"with maps of at least {p.cam_side}×{p.cam_side}.",
        ]
    )


def measures() -> str:
    rows = [
        [f"{m.title} {'↑' if m.better > 0 else '↓'}", m.meaning, m.source]
        for m in MEASURES.values()
    ]
    return table(["measure", "what it is", "source"], rows).replace("|--:", "|---")


def tabulated(records: list[Record]) -> figures.Table:
    names = [name for name in METHODS if name in records[0]["methods"]]
    found = {measure: column(records, names, measure) for measure in MEASURES}
    return {measure: summaries for measure, summaries in found.items() if summaries}


def summary(
    cells: dict[tuple[str, str], list[Record]],
    tables: dict[tuple[str, str], figures.Table],
    images: Path,
) -> str:
    """The overview plot, and on each measure how often Relative LRP wins and loses."""
    pictured = {title(c): t for c, t in tables.items() if "mass" in t}
    parts = []
    if pictured:
        shown = [*LOCALISATION, *FLIPPING, *SANITY]
        figures.overview(pictured, shown, images / "overview.png")
        figures.dots(pictured, ("mass", "abpc", "srg"), images / "measures.png")
        figures.curves({title(c): cells[c] for c in cells}, images / "curves.png")
        parts = [
            "![Methods by measures](images/evaluation/overview.png)",
            "![Means and intervals of mass, ABPC and SRG](images/evaluation/measures.png)",
            "![Flipping curves with 95 % bands](images/evaluation/curves.png)",
        ]
    rows = []
    for measure, known in MEASURES.items():
        counts, ranks, peers = Counter(), [], []
        alike: Counter[int] = Counter()  # of them, those with the same order of means in every seed
        for cell in tables.values():
            if measure not in cell:
                continue
            others = [s for n, s in cell[measure].items() if n not in (OURS, "random")]
            for other in others:
                counts[other.better] += 1
                alike[other.better] += other.seeds_for_us in (0, other.seeds)
            ours = cell[measure][OURS].mean * known.better
            ranks.append(1 + sum(other.mean * known.better > ours for other in others))
            peers.append(1 + len(others))
        if ranks:
            rows.append(
                [
                    f"{known.title} {'↑' if known.better > 0 else '↓'}",
                    f"{counts[-1]} ({alike[-1]})",
                    str(counts[0]),
                    f"{counts[1]} ({alike[1]})",
                    ", ".join(f"{r}/{p}" for r, p in zip(ranks, peers, strict=True)),
                ]
            )
    order = "; ".join(title(cell) for cell in tables)
    head = ["measure", "wins", "no difference", "losses", "place in each cell"]
    parts += [
        table(head, rows),
        "In brackets: the means are ordered that way in every seed. Places, in this order of cells "
        f"where the measure applies: {order}.",
    ]
    return "\n\n".join(parts)


def accuracies(cells: dict[tuple[str, str], list[Record]]) -> str:
    rows = []
    for cell, records in cells.items():
        accuracy = ", ".join(
            "–" if record["accuracy"] is None else f"{record['accuracy']:.1%}" for record in records
        )
        known = [record.get("train_seconds") for record in records]
        seconds = ", ".join("–" if value is None else f"{value:.0f}" for value in known)
        parameters = f"{records[0]['parameters']:,}"
        explained = str(records[0]["cell"]["samples"])
        side = records[0]["cell"]["size"]
        size = f"{side}×{side}" if "mass" in records[0]["methods"][OURS]["figures"] else "–"
        rows.append([title(cell), size, parameters, accuracy, explained, seconds])
    head = [
        "network, data",
        "pictures",
        "parameters",
        "test accuracy by seed",
        "explained",
        "training, s",
    ]
    text = table(head, rows)
    if any(" –" in row[-1] or row[-1].startswith("–") for row in rows):
        text += "\n\n–: trained in an earlier run; not part of the processor time above."
    return text


def cell_section(cell: tuple[str, str], columns: figures.Table, records: list[Record]) -> str:
    parts = [f"### {title(cell)}"]
    for group in (LOCALISATION, FLIPPING, SANITY):
        shown = [measure for measure in group if measure in columns]
        if shown:
            parts.append(measure_table(columns, shown, [*METHODS]))
    parts += failures(records)
    return "\n\n".join(parts)


def measure_table(columns: figures.Table, shown: list[str], methods: list[str]) -> str:
    head = ["method"]
    for measure in shown:
        head.append(f"{MEASURES[measure].title} {'↑' if MEASURES[measure].better > 0 else '↓'}")
    rows = []
    for method in methods:
        entries = [columns[measure].get(method) for measure in shown]
        if any(entries):
            rows.append([bold(method), *(entry_text(entry) for entry in entries)])
    return table(head, rows)


def entry_text(entry: Summary | None) -> str:
    if entry is None:
        return "–"
    mark = {1: " ▲", -1: " ▼", 0: ""}[entry.better]
    return f"{entry.mean:.3f} ± {(entry.high - entry.low) / 2:.3f}{mark}"


def failures(records: list[Record]) -> list[str]:
    """Errors, and maps with NaN or infinity."""
    lines = []
    for name in records[0]["methods"]:
        errors = {r["methods"][name]["error"] for r in records if "error" in r["methods"][name]}
        for error in sorted(errors):
            lines.append(f"* {name} fails: `{error.replace('|', '¦')[:160]}`")
        broken = values(records, name, "nonfinite")
        if broken is not None and broken.any():
            lines.append(f"* {name}: {broken.mean():.0%} of the maps hold NaN or infinity")
    return ["\n".join(lines)] if lines else []


def conservation(cells: dict[tuple[str, str], list[Record]]) -> str:
    """Each method against its own law, over all cells."""
    rows = []
    for name, method in METHODS.items():
        pooled: dict[str, list[float]] = {"law_error": [], "amplification": [], "nonfinite": []}
        seconds = []
        for records in cells.values():
            for record in records:
                entry = record["methods"].get(name, {})
                seconds += [entry["seconds"] * 1e3] if "seconds" in entry else []
                for key in pooled:
                    found = entry.get("figures", {}).get(key, [])
                    pooled[key] += [np.inf if value is None else value for value in found]
        if not seconds:
            continue
        law = pooled["law_error"]
        rows.append(
            [
                bold(name),
                method.source,
                LAWS[method.law],
                f"{np.median(law):.2g}" if law else "–",
                f"{max(law):.2g}" if law else "–",
                f"{max(pooled['amplification']):.2g}",
                f"{np.mean(pooled['nonfinite']):.1%}",
                f"{np.median(seconds):.1f}",
            ]
        )
    head = ["method", "as run here", "its law", "median error", "largest error",
            "largest \\|R\\| per unit", "non-finite maps", "ms per sample"]  # fmt: skip
    quantus: dict[str, float] = {}
    for records in cells.values():
        for name, value in (records[0].get("quantus") or {}).items():
            quantus[name] = max(quantus.get(name, 0.0), value)
    note = (
        "Milliseconds include the first call, for Relative LRP the capture of the network; what a "
        "call costs is in [benchmarks.md](benchmarks.md)."
    )
    if quantus:
        agreement = ", ".join(f"{MEASURES[n].title} {v:.1g}" for n, v in quantus.items())
        note += " Largest difference from the same measure in Quantus, on ten samples a cell: "
        note += f"{agreement}."
    return f"{table(head, rows)}\n\n{note}"


def robustness(rows: list[Record], images: Path) -> str:
    figures.robustness(rows, images / "robustness.png")
    groups = list(dict.fromkeys(row["group"] for row in rows))
    names = {
        group: title(tuple(group.split(", "))) if ", " in group else group  # type: ignore[arg-type]
        for group in groups
    }
    head = ["method", *(names[group] for group in groups)]
    parts = ["![Largest relevance, and change of the map](images/evaluation/robustness.png)"]
    for key, caption in (
        ("amplification", "Largest |R| per unit of relevance, the worst of each group:"),
        ("change", "Relative change of the map under a 1e-6 change of the input, the worst:"),
        ("nonfinite", "Share of maps that hold NaN or infinity:"),
    ):
        if key == "nonfinite" and not any(sum(filter(None, r.get(key, ()))) for r in rows):
            parts.append("No map of any method holds NaN or infinity.")
            continue
        lines = []
        for method in METHODS:
            cells = []
            for group in groups:
                found = [r for r in rows if (r["group"], r["method"]) == (group, method)]
                pooled = [v for r in found for v in r.get(key, ())]
                if not pooled:
                    cells.append("error" if any("error" in r for r in found) else "–")
                elif key == "nonfinite":
                    cells.append(f"{np.mean([v or 0 for v in pooled]):.0%}")
                else:
                    cells.append("∞" if None in pooled else f"{max(pooled):.2g}")
            lines.append([bold(method), *cells])
        parts += [caption.replace("|R|", "\\|R\\|"), table(head, lines)]
    return "\n\n".join(parts)


def galleries(
    cells: dict[tuple[str, str], list[Record]], folder: Path, images: Path, protocol: Protocol
) -> str:
    parts = []
    for network, data in cells:
        stored = folder / f"{network}-{data}-{protocol.seeds[0]}.maps"
        records = cells[network, data]
        if not stored.exists() or (network != "own" and values(records, OURS, "mass") is None):
            continue
        path = images / f"gallery-{network}-{data}.png"
        figures.gallery(stored, title((network, data)), records[0]["classes"], path)
        parts.append(f"![{title((network, data))}](images/evaluation/{path.name})")
    return "\n\n".join(parts) if parts else "No pictures."
