"""The pictures of the report."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from evaluation.compare import Record, Summary, interval
from evaluation.data import MIDDLE, SPREAD
from evaluation.measures import MEASURES
from evaluation.methods import METHODS, OURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

Table = dict[str, dict[str, Summary]]  # by measure, then method

# Relative LRP in red; the LRP family warm, gradients cold, the control grey.
COLORS = {
    OURS: "#c1272d",
    "Captum LRP": "#e08e0b",
    "zennit ε": "#f2c14e",
    "EpsilonPlus": "#8c5a2b",
    "EpsilonGammaBox": "#c08552",
    "α2β1": "#5e3c23",
    "gradient": "#9ecae1",
    "input×gradient": "#4292c6",
    "integrated gradients": "#0b3c5d",
    "SmoothGrad": "#2a9d8f",
    "Grad-CAM": "#7b5ea7",
    "random": "#8a8a8a",
}
MARKERS = dict(zip(METHODS, "osvD^<>PX*ph", strict=True))


def color(method: str) -> str:
    """Methods that are not in the list are black."""
    return COLORS.get(method, "black")


def tidy(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def save(figure: Any, path: Path, dpi: int = 100) -> None:
    """As a PNG of 256 colours, spread so that a thin line's colour is kept like a wide area's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    plt.close(figure)
    picture = Image.open(drawn).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(path, optimize=True)


# --- overview -----------------------------------------------------------------------------------


def overview(tables: dict[str, Table], measures: Sequence[str], path: Path) -> None:
    """Methods by measures: means over the cells, and in each column dark for the better."""
    methods = [m for m in METHODS if any(m in table.get("abpc", {}) for table in tables.values())]
    means = np.full((len(methods), len(measures)), np.nan)
    for i, method in enumerate(methods):
        for j, measure in enumerate(measures):
            found = [
                table[measure][method].mean
                for table in tables.values()
                if method in table.get(measure, {})
            ]
            # A mean over fewer cells than others have would compare what is not comparable.
            if found and len(found) == sum(measure in table for table in tables.values()):
                means[i, j] = np.mean(found)
    signs = np.array([MEASURES[m].better for m in measures])
    scores = means * signs
    high = np.nanmax(scores, axis=0)
    # By rank: one runaway value must not wash out a whole column.
    beaten = (scores[:, None] > scores[None, :]).sum(1)
    shades = np.where(np.isnan(scores), np.nan, beaten / np.maximum(1, beaten.max(0)))
    figure, axis = plt.subplots(figsize=(11.5, 0.4 * len(methods) + 1.3), layout="constrained")
    axis.imshow(np.ma.masked_invalid(shades), cmap="YlGn", vmin=0, vmax=1.25, aspect="auto")
    for i in range(len(methods)):
        for j in range(len(measures)):
            best = np.isfinite(scores[i, j]) and round(scores[i, j], 2) == round(high[j], 2)
            text = f"{means[i, j]:.2f}" if np.isfinite(means[i, j]) else "–"
            weight = "bold" if best else "normal"
            axis.text(j, i, text, ha="center", va="center", fontsize=9, fontweight=weight)
    arrows = {1: "↑", -1: "↓"}
    axis.set_xticks(
        range(len(measures)),
        [
            f"{MEASURES[m].title.replace(' ', chr(10))} {arrows[MEASURES[m].better]}"
            for m in measures
        ],
        fontsize=9,
    )
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(methods)), methods, fontsize=10)
    axis.get_yticklabels()[methods.index(OURS)].set_fontweight("bold")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_xlabel(
        f"means over {len(tables)} networks trained on pictures with masks; "
        "the darker the higher a method's place in the column, bold: the best",
        fontsize=9,
    )
    save(figure, path)


# --- one measure, cell by cell ------------------------------------------------------------------


def dots(tables: dict[str, Table], measures: Sequence[str], path: Path) -> None:
    """Means with their intervals: one column of panels for each cell, one row for each measure."""
    figure, grid = plt.subplots(
        len(measures),
        len(tables),
        figsize=(2.1 * len(tables) + 1.6, 2.9 * len(measures)),
        squeeze=False,
        sharey=True,
        sharex="row",
        layout="constrained",
    )
    methods = list(METHODS)
    for row, measure in enumerate(measures):
        for axis, (name, table) in zip(grid[row], tables.items(), strict=True):
            for place, method in enumerate(methods):
                summary = table.get(measure, {}).get(method)
                if summary is None:
                    continue
                axis.plot([summary.low, summary.high], [place] * 2, color=color(method), lw=2)
                axis.plot(summary.mean, place, "o", color=color(method), ms=6)
            if row == 0:
                axis.set_title(name, fontsize=10)
            tidy(axis)
            axis.set_yticks(range(len(methods)), methods, fontsize=9)
            better = "higher is better" if MEASURES[measure].better > 0 else "lower is better"
            axis.set_xlabel(f"{MEASURES[measure].title} ({better})", fontsize=8)
    grid[0, 0].invert_yaxis()
    save(figure, path)


# --- curves -------------------------------------------------------------------------------------


def curves(cells: dict[str, list[Record]], path: Path) -> None:
    """Flipping curves with their bands; above, the most relevant first, below, the least."""
    figure, grid = plt.subplots(
        2,
        len(cells),
        figsize=(2.5 * len(cells) + 0.4, 5.6),
        squeeze=False,
        sharex=True,
        sharey="col",
        layout="constrained",
    )
    handles: dict[str, Line2D] = {}
    for column, (name, records) in enumerate(cells.items()):
        for row, kind in enumerate(("morf", "lerf")):
            axis = grid[row, column]
            for method in reversed(METHODS):
                drawn = [r["methods"].get(method, {}).get("curves", {}).get(kind) for r in records]
                if any(curve is None for curve in drawn):
                    continue
                points = np.array(drawn, dtype=float)  # (seeds, samples, steps + 1)
                x = np.linspace(0, 100, points.shape[2])
                bands = np.array([interval(points[:, :, k]) for k in range(points.shape[2])])
                ours = method == OURS
                (handles[method],) = axis.plot(
                    x, points.mean((0, 1)), color=color(method), lw=2.4 if ours else 1.1
                )
                axis.fill_between(
                    x, *bands.T, color=color(method), alpha=0.2 if ours else 0.06, lw=0
                )
            tidy(axis)
        grid[0, column].set_title(name, fontsize=10)
        grid[1, column].set_xlabel("% of the patches removed", fontsize=9)
    grid[0, 0].set_ylabel("probability of the class,\nmost relevant removed first", fontsize=9)
    grid[1, 0].set_ylabel("probability of the class,\nleast relevant removed first", fontsize=9)
    names = [name for name in METHODS if name in handles]
    figure.legend(
        [handles[n] for n in names],
        names,
        loc="outside lower center",
        ncol=6,
        frameon=False,
        fontsize=9,
    )
    save(figure, path)


# --- gallery ------------------------------------------------------------------------------------


def gallery(stored: Path, title: str, classes: Sequence[str], path: Path) -> None:
    """One column for each method; every picture twice, explained for each of its two objects."""
    kept = torch.load(stored, weights_only=False)
    samples, maps = kept["samples"], kept["maps"]
    methods = [name for name in METHODS if name != "random"]
    side = samples.inputs.shape[-1]
    rows = [
        (i, k) for i in range(len(samples.inputs)) for k in range(len(next(iter(maps.values()))))
    ]
    figure, grid = plt.subplots(
        len(rows),
        1 + len(methods),
        figsize=(1.06 * (1 + len(methods)), 1.12 * len(rows) + 0.65),
        squeeze=False,
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    figure.suptitle(title, fontsize=11)
    for axes, (index, which) in zip(grid, rows, strict=True):
        wanted = (samples.labels, samples.others)[which][index]
        mask = (samples.masks, samples.other_masks)[which]
        picture = samples.inputs[index] * SPREAD + MIDDLE
        if mask is None:  # prepared for weights from elsewhere
            picture = (picture - picture.min()) / (picture.max() - picture.min()).clamp_min(1e-12)
        picture = picture.clamp(0, 1)
        axes[0].imshow(picture.permute(1, 2, 0))
        axes[0].set_ylabel(classes[int(wanted)].replace("stereo_", "")[:14], fontsize=9)
        for axis, method in zip(axes[1:], methods, strict=True):
            if method not in maps:
                axis.text(0.5, 0.5, "error", ha="center", va="center", fontsize=8)
                continue
            values = maps[method][which][index].view(side, side).double()
            # The same for every method: full colour at the 99.5th percentile of |R|.
            scale = float(values.abs().quantile(0.995)) or float(values.abs().max()) or 1.0
            axis.imshow(values, cmap="seismic", vmin=-scale, vmax=scale)
            if mask is not None:
                axis.contour(mask[index, 0], levels=[0.5], colors="black", linewidths=0.7)
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_aspect("equal")
    for axis, name in zip(grid[0], ["picture", *methods], strict=True):
        axis.set_title(
            name.replace(" gradients", "\ngradients").replace("Epsilon", "Epsilon\n"),
            fontsize=8,
            fontweight="bold" if name == OURS else "normal",
        )
    save(figure, path, dpi=90)


# --- robustness ---------------------------------------------------------------------------------


def robustness(rows: Sequence[Record], path: Path) -> None:
    """Size and jump of every method's maps against cancellation, and against depth."""
    groups = {
        "dense": ("a dense net", "pre-activation ÷ its usual size"),
        "residual": ("ResNet18, a block that nearly undoes its input", "h + F(h), in units of h"),
        "random init": ("ResNets at random initialisation", "layers"),
    }
    figure, grid = plt.subplots(2, 3, figsize=(12.5, 7.2), sharex="col", layout="constrained")
    handles: dict[str, Line2D] = {}
    for column, (group, (title, label)) in enumerate(groups.items()):
        for row, figure_name in enumerate(("amplification", "change")):
            axis = grid[row, column]
            for method in reversed(METHODS):
                places, largest = worst(rows, group, method, figure_name)
                if not places:
                    continue
                ours = method == OURS
                (handles[method],) = axis.plot(
                    places,
                    largest,
                    color=color(method),
                    marker=MARKERS[method],
                    ms=6 if ours else 4,
                    lw=2.6 if ours else 1.2,
                    zorder=5 if ours else 2,
                )
            axis.set_yscale("log")
            if group == "random init":
                axis.set_xticks(sorted({r["place"] for r in rows if r["group"] == group}))
                axis.xaxis.set_major_formatter("{x:.0f}")
            else:
                axis.set_xscale("log")
                if row == 0:
                    axis.invert_xaxis()
            tidy(axis)
        grid[0, column].set_title(title, fontsize=11)
        grid[1, column].set_xlabel(label, fontsize=9)
    for axis in grid[0]:
        axis.axhline(1, color="black", lw=0.8, ls=":")
        # What falls below has vanished: the stabiliser ε was larger than what it stabilises.
        axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-9))
    grid[0, 0].set_ylabel("largest |R| per unit of relevance\n(dotted: 1)", fontsize=10)
    grid[1, 0].set_ylabel("relative change of the map when\nthe input changes by 1e-6", fontsize=10)
    names = [name for name in METHODS if name in handles]
    figure.legend(
        [handles[n] for n in names], names, loc="outside lower center", ncol=6, frameon=False
    )
    save(figure, path)


def worst(
    rows: Sequence[Record], group: str, method: str, figure_name: str
) -> tuple[list[float], list[float]]:
    """The largest finite value at each place of a group."""
    found: dict[float, float] = {}
    for row in rows:
        if (row["group"], row["method"]) == (group, method):
            finite = [v for v in row.get(figure_name, ()) if v is not None]
            if finite:
                found[row["place"]] = max(found.get(row["place"], 0.0), *finite)
    return list(found), list(found.values())
