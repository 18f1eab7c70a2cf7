"""The picture of docs/concepts.md: ``python docs/figures/law.py`` writes docs/images/law.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RED, BLUE, GREY = "#c8443c", "#3f6fb5", "#666666"
IMAGE = Path(__file__).resolve().parent.parent / "images" / "law.png"


def unit(axis: Axes, x: float, y: float, text: str) -> None:
    """A neuron."""
    axis.add_patch(plt.Circle((x, y), 0.17, facecolor="white", edgecolor="black", zorder=3))
    axis.text(x, y, text, ha="center", va="center", fontsize=10, zorder=4)


def panel(
    axis: Axes, title: str, rows: list[tuple[str, float, float, str]], output: str, below: str
) -> None:
    """Inputs at the left with their contributions on the way to one output, and what comes back.

    Args:
        axis: Where to draw.
        title: Which map it is.
        rows: Value of an input, contribution, relevance, and the relevance in words.
        output: Value of the output.
        below: The sum in words.
    """
    unit(axis, 2.0, 0.5, output)
    axis.text(2.24, 0.5, "r = 1", va="center", fontsize=10, color=RED)
    for (value, contribution, relevance, words), y in zip(rows, (1.0, 0.0), strict=True):
        colour = RED if relevance > 0 else BLUE
        axis.plot([0.17, 1.84], [y, 0.5], color=colour, linewidth=9 * abs(relevance), alpha=0.45)
        label = f"{contribution:+g}".replace("-", "−")
        axis.text(1.0, y + (0.5 - y) * 0.5 + 0.13, label, ha="center", fontsize=10, color="black")
        unit(axis, 0.0, y, value)
        axis.text(-0.24, y, words, ha="right", va="center", fontsize=11, color=colour)
    axis.set_title(title, fontsize=11)
    axis.text(0.9, -0.42, below, ha="center", va="center", fontsize=9, color=GREY)
    axis.set(xlim=(-1.05, 2.85), ylim=(-0.55, 1.25), aspect="equal")
    axis.axis("off")


def draw() -> plt.Figure:
    """One law, three places; and what a divisor that cancels would do."""
    plt.rcParams["path.sketch"] = (0.7, 80, 2)
    figure, grid = plt.subplots(2, 2, figsize=(9.6, 5.4), layout="constrained")
    panel(
        grid[0, 0],
        "Dense map: the sign is kept",
        [("1", 3, 3 / 5, "3/5"), ("2", -2, -2 / 5, "−2/5")],
        "1",
        "c over Σ|c|:  3 and −2 over 5",
    )
    panel(
        grid[0, 1],
        "Convolution, pooling: both lobes share",
        [("1", 3, 3 / 5, "3/5"), ("2", -2, 2 / 5, "2/5")],
        "1",
        "|c| over Σ|c|:  3 and 2 over 5",
    )
    panel(
        grid[1, 0],
        "Skip connection: two contributions",
        [("1", 1, 1 / 4, "1/4"), ("−3", -3, 3 / 4, "3/4")],
        "−2",
        "|a| and |f| over |a| + |f|:  1 and 3 over 4",
    )
    panel(
        grid[1, 1],
        "Contributions that cancel",
        [("1", 1.001, 0.5002, "0.5002"), ("1", -1, -0.4998, "−0.4998")],
        ".001",
        "over Σ|c| = 2.001;  over their sum it would be 1001 and −1000",
    )
    figure.suptitle("Relevance goes in proportion to contributions", fontsize=13)
    return figure


if __name__ == "__main__":
    draw().savefig(IMAGE, dpi=110)
