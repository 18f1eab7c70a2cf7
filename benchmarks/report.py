"""Figures of ``run.py`` to JSON, to sections of ``docs/benchmarks.md`` and to a plot."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from contenders import FLOOR, METHODS, OURS, SUBJECTS, YARDSTICK

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

Figures = dict[str, Any]

SECTIONS = ("models", "families", "kernels", "breakdown")
EMPTY = "\n\n".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in SECTIONS) + "\n"
PALETTE = ("#c1272d", "#7b1fa2", "#0b3c5d", "#e08e0b", "#6a8e3f", "#8a8a8a")
COLORS = dict(zip(METHODS, PALETTE, strict=True))


def write(folder: Path, section: str, device: str, figures: Figures) -> None:
    """Keep the figures, then write the section anew from those of all devices."""
    results = folder / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    prefix = "" if section == "models" else f"{section}-"
    suffix = "" if figures["dtype"] == "float32" else f"-{figures['dtype']}"
    suffix += "-channels_last" if figures.get("channels_last") else ""
    (results / f"{prefix}{device}{suffix}.json").write_text(json.dumps(figures, indent=1) + "\n")

    parts = []
    for path in sorted(results.glob("*.json")):
        known = json.loads(path.read_text())
        if section == "models" and "cells" in known:
            picture = folder / "docs" / "images" / f"benchmarks-{path.stem}.png"
            plot(known, picture)
            parts.append(models_section(known, path.stem, picture.name))
        elif section == "kernels" and "kernels" in known:
            parts.append(kernels_section(known, path.stem.removeprefix("kernels-")))
        elif section == "families" and "families" in known:
            parts.append(families_section(known, path.stem.removeprefix("families-")))
        elif section == "breakdown" and "breakdown" in known:
            parts.append(breakdown_section(known, path.stem.removeprefix("breakdown-")))
    document = folder / "docs" / "benchmarks.md"
    text = document.read_text() if document.exists() else EMPTY
    document.parent.mkdir(parents=True, exist_ok=True)
    document.write_text(replace(text, section, "\n\n".join(parts)))
    print(f"wrote {document}")


def replace(text: str, section: str, content: str) -> str:
    """`text` with `content` between the section's markers."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the document has no place between {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


# --- models -------------------------------------------------------------------------------------


def circumstances(figures: Figures) -> str:
    versions = ", ".join(f"{name} {v.split('+')[0]}" for name, v in figures["versions"].items())
    return (
        f"* Machine: {figures['machine']}; {figures['threads']} threads\n"
        f"* Versions: {versions}; {figures['backend']} kernels\n"
        f"* Date: {figures['date']}; command: `{figures['command']}`"
    )


def models_section(figures: Figures, title: str, picture: str) -> str:
    parts = [
        f"### {title}",
        f"{circumstances(figures)}\n* {figures['dtype']}, images of {figures['size']}²"
        + (", models and images in channels_last" if figures.get("channels_last") else ""),
        f"![Time and peak memory against batch, {title}](images/{picture})",
    ]
    for name, subject in SUBJECTS.items():
        cells = [c for c in figures["cells"] if c["model"] == name]
        if cells:
            parts += [f"#### {subject.title}", model_table(cells), *model_notes(cells)]
    return "\n\n".join(parts)


def model_table(cells: list[Figures]) -> str:
    lines = [
        "| batch | method | ms per image | × InputXGradient | rounds | "
        "peak MiB per image | of the first call | MiB kept |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in cells:
        start = f"| {cell['batch']} | {emphasised(cell['method'])} |"
        if not cell["seconds"]:
            what = f"**fails**: {cell['error']}" if cell["error"] else cell["note"]
            lines.append(f"{start} {(what or '').replace('|', '¦')} | | | | | |")
            continue
        values = [
            number(per_image(cell) * 1e3),
            number(cell["ratio"], 2),
            str(len(cell["seconds"])),
            *(number(m and m / cell["batch"]) for m in (cell["peak_mib"], cell["first_peak_mib"])),
            number(cell["kept_mib"]),
        ]
        lines.append(f"{start} {' | '.join(values)} |")
    return "\n".join(lines)


def model_notes(cells: list[Figures]) -> list[str]:
    """First call, other batch sizes, cost against batch."""
    ours = [c for c in cells if c["method"] == OURS and c["seconds"]]
    notes = []
    if ours and ours[0]["first_s"] is not None:
        notes.append(
            f"Relative LRP's first call (capture and planning, batch 1): {ours[0]['first_s']:.2f} "
            "s; once per process "
            f"{ours[0]['loading_s']:.1f} s more, for importing what captures."
        )
    others = [
        f"batch {c['batch']}: {c['new_batch_s']:.3g} s, then {c['later_s']:.3g} s"
        for c in ours
        if c["batch"] > 1 and c["new_batch_s"] is not None
    ]
    if others:
        notes.append(f"First and second call at another batch size: {'; '.join(others)}.")
    grown = [
        f"{c['growth']:.2f} times as much at batch {c['batch']} as at batch {before['batch']}"
        for before, c in itertools.pairwise(ours)
        if c.get("growth") is not None
    ]
    if grown:
        notes.append(f"A sample costs {', '.join(grown)} (alone in a process, sizes in turns).")
    return ["\n".join(notes)] if notes else []


def per_image(cell: Figures) -> float:
    return statistics.median(cell["seconds"]) / cell["batch"]


def emphasised(method: str) -> str:
    return f"**{method}**" if method == OURS else method


def number(value: float | None, digits: int | None = None) -> str:
    if value is None:
        return "–"
    if digits is None:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def plot(figures: Figures, path: Path) -> None:
    """Time above, peak memory below, one column per model."""
    cells = figures["cells"]
    names = [name for name in SUBJECTS if any(c["model"] == name for c in cells)]
    figure, axes = plt.subplots(
        2, len(names), figsize=(2.6 * len(names) + 0.6, 5.4), squeeze=False, sharex=True
    )
    handles = {}
    for column, name in enumerate(names):
        for method in METHODS:
            timed = [
                c for c in cells if (c["model"], c["method"]) == (name, method) and c["seconds"]
            ]
            style = {
                "color": COLORS[method],
                "linestyle": ":" if method == FLOOR else "-",
                "linewidth": 2.2 if method in (OURS, YARDSTICK) else 1.3,
                "marker": "o",
                "markersize": 3.5,
            }
            batches = [c["batch"] for c in timed]
            seconds = [statistics.median(c["seconds"]) for c in timed]
            if timed:
                handles[method] = axes[0, column].plot(batches, seconds, **style)[0]
            weighed = [c for c in timed if c["peak_mib"]]
            peaks = [c["peak_mib"] for c in weighed]
            axes[1, column].plot([c["batch"] for c in weighed], peaks, **style)
        axes[0, column].set_title(SUBJECTS[name].title, fontsize=10)
        axes[1, column].set_xlabel("batch", fontsize=9)
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({c["batch"] for c in cells}))
        axis.xaxis.set_major_formatter("{x:.0f}")
        if axis.lines and any(len(line.get_xdata()) for line in axis.lines):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("seconds per call", fontsize=9)
    axes[1, 0].set_ylabel("peak MiB beyond the model", fontsize=9)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="lower center",
        ncol=min(len(handles), 2 * len(names)),
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- kernels ------------------------------------------------------------------------------------


def kernels_section(figures: Figures, title: str) -> str:
    lines = [
        f"### {title}",
        "",
        circumstances(figures),
        "",
        "| kernel and sizes | ATen, ms | compiled, ms | ATen / compiled |",
        "|---|--:|--:|--:|",
    ]
    for row in figures["kernels"]:
        aten, compiled = row["aten_s"] * 1e3, row["compiled_s"] * 1e3
        name = row["kernel"].replace("torch.", "").replace("contiguous_format", "contiguous")
        lines.append(f"| {name} | {aten:.3g} | {compiled:.3g} | {row['ratio']:.2f} |")
    return "\n".join(lines)


# --- families -----------------------------------------------------------------------------------


def spread(ratios: Iterable[float]) -> str:
    known = list(ratios)
    if not known:
        return "–"
    cheap = sum(ratio <= 1 for ratio in known)
    return f"median {statistics.median(known):.2f}, {cheap} at most 1, at most {max(known):.2f}"


def families_section(figures: Figures, title: str) -> str:
    """How the ratios to the yardstick are distributed, and the worst of them."""
    rows = figures["families"]
    known = sorted((r for r in rows if "ratio" in r), key=lambda r: -r["ratio"])
    lines = [
        f"### {title}: {len(rows)} families of timm, batch 2",
        f"{circumstances(figures)}\n* ratio to {YARDSTICK}: {spread(r['ratio'] for r in known)}"
        f"\n* the floor's: {spread(r['floor'] for r in known if 'floor' in r)}",
    ]
    table = [
        "| the slowest | model | ms | ratio | the floor's | first call, s |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for r in known[:12]:
        least = f"{r['floor']:.2f}" if "floor" in r else "–"
        took = f"{r['seconds'] * 1e3:.0f} | {r['ratio']:.2f} | {least} | {r['first_s']:.1f}"
        table.append(f"| {r['family']} | {r['model']} | {took} |")
    failed = [f"* {r['family']}: {r['error']}" for r in rows if "error" in r]
    return "\n\n".join([*lines, "\n".join(table), *(["\n".join(failed)] if failed else [])])


# --- breakdown ----------------------------------------------------------------------------------


def breakdown_section(figures: Figures, title: str) -> str:
    copy = figures["copy"]
    parts = [
        f"### {title}",
        f"{circumstances(figures)}\n* {figures['dtype']}, batch {figures['batch']}; a plain copy "
        f"moves {copy / 1e9:.0f} GB/s",
    ]
    for one in figures["breakdown"]:
        title = SUBJECTS[one["model"]].title
        parts += [f"#### {title}: {one['seconds'] * 1e3:.1f} ms", breakdown_table(one, copy)]
    return "\n\n".join(parts)


def breakdown_table(one: Figures, copy: float) -> str:
    """Products, each of our kernels, the longest of what else there is, and what is left."""
    lines = [
        "| | calls | ms | of the time | GB/s | of a copy's |",
        "|---|--:|--:|--:|--:|--:|",
    ]

    def row(name: str, parts: list[Figures], seconds: float | None = None) -> None:
        taken = sum(part["seconds"] for part in parts) if seconds is None else seconds
        calls = str(sum(part["calls"] for part in parts)) if parts else ""
        moved = sum(part["moved"] for part in parts if not part["is_product"])
        speed = moved / taken if moved and taken else None
        speeds = "| |" if speed is None else f"| {speed / 1e9:.0f} | {speed / copy:.0%} |"
        share = taken / one["seconds"]
        lines.append(f"| {name} | {calls} | {taken * 1e3:.2f} | {share:.1%} {speeds}")

    def longest(parts: list[Figures]) -> list[Figures]:
        return sorted(parts, key=lambda part: -part["seconds"])

    parts = one["parts"]
    row("convolutions and dense layers", [p for p in parts if p["is_product"]])
    ours = longest([p for p in parts if p["is_ours"] and not p["is_product"]])
    for part in ours:
        row(f"`{part['op'].partition('::')[2]}`", [part])
    others = longest([p for p in parts if not p["is_product"] and not p["is_ours"]])
    for part in others[:4]:
        row(f"`{part['op']}`", [part])
    row("other operations", others[4:])
    row("nothing of these", [], one["seconds"] - sum(part["seconds"] for part in parts))
    return "\n".join(lines)
