"""The charts of a report, drawn by Matplotlib as SVG that takes the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .flow import BETWEEN, LABEL, NEGATIVE, POSITIVE
from .statistics import RelevanceStatistics
from .store import Array

# Vermilion and blue of Okabe and Ito's palette: told apart with every kind of colour vision.
FOR, AGAINST = "#d55e00", "#0072b2"
RIGHT, NEUTRAL = "#009e73", "#8a8f98"
_INK = "#010203"  # stands for the colour of the page's text


def histogram(groups: Sequence[tuple[str, Array, str]], label: str) -> str:
    """Stacked histograms: name, values and colour of each group."""
    groups = [group for group in groups if len(group[1])]
    figure, axis = _axes()
    values = [np.asarray(group[1], float) for group in groups]
    everything = np.concatenate(values) if values else np.zeros(1)
    low, high = float(everything.min()), float(everything.max())
    bins = np.linspace(low, high if high > low else low + 1e-3, 25).tolist()
    colours, names = [group[2] for group in groups], [group[0] for group in groups]
    axis.hist(values, bins, stacked=True, color=colours, label=names)
    axis.ticklabel_format(axis="x", scilimits=(-3, 3))
    axis.set_xlabel(label)
    axis.set_ylabel("samples")
    axis.locator_params(axis="y", integer=True)
    if len(groups) > 1:
        axis.legend(frameon=False, fontsize=8, labelcolor=_INK)
    return svg(figure, f"Histogram: {label}")


def bars(names: Sequence[str], values: Sequence[float], label: str) -> str:
    """Horizontal bars, the first on top."""
    figure, axis = _axes(0.7 + 0.22 * len(names))
    axis.barh(range(len(names)), values, color=NEUTRAL)
    axis.set_yticks(range(len(names)), [name[-28:] for name in names])
    axis.invert_yaxis()
    axis.set_xlabel(label)
    return svg(figure, f"Bars: {label}")


def flow(statistics: RelevanceStatistics) -> str:
    """How relevance flows through the layers of which statistics are kept."""
    figure = Figure(figsize=(min(3 + 0.3 * len(statistics.layers), 30), 4), layout="constrained")
    with matplotlib.rc_context(
        {"text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
         "ytick.color": _INK}
    ):  # fmt: skip
        statistics.plot_flow(figure.subplots())
        text = svg(figure, "Flow of relevance through the layers")
    shown = {POSITIVE: "--for", NEGATIVE: "--against", BETWEEN: "--line", LABEL: "--soft"}
    for drawn, variable in shown.items():
        text = text.replace(drawn, f"var({variable})")
    return text


def svg(figure: Figure, title: str) -> str:
    """The figure's markup, to stand in a page."""
    buffer = io.StringIO()
    # A fixed salt: the same run gives the same page.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S).replace(_INK, "currentColor")
    # Identifiers are the page's: two charts must not share them.
    prefix = re.sub(r"\W+", "-", title)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _axes(height: float = 2.4) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(4.4, height), layout="constrained")
    axis = figure.subplots()
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axis.spines[side].set_color(_INK)
    axis.tick_params(colors=_INK, which="both", labelsize=8)
    axis.xaxis.label.set_color(_INK)
    axis.xaxis.get_offset_text().set_color(_INK)
    axis.yaxis.label.set_color(_INK)
    return figure, axis
