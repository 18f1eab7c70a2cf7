"""A picture of how relevance flows through a network's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

POSITIVE, NEGATIVE, BETWEEN = "#c8443c", "#3f6fb5", "#c9ced6"
LABEL = "#667085"
_BAR = 0.5  # width of a bar, of the 1 from layer to layer
_LABEL = {"ha": "center", "va": "bottom", "fontsize": 8, "color": LABEL}


def draw_flow(
    mass: Mapping[str, float],
    positive: Mapping[str, float],
    edges: Sequence[tuple[str, str]],
    ax: Any = None,
) -> Any:
    """One bar per layer, in order; ribbons to the next layer, arcs to those further on.

    Args:
        mass: Layer → Σ|R|, in order of execution.
        positive: Layer → the positive part of it.
        edges: Pairs (earlier, later) of layers that relevance goes between.
        ax: Where to draw; a new figure by default.
    """
    from matplotlib import pyplot as plt

    names = list(mass)
    if ax is None:
        size = (min(3 + 0.42 * len(names), 40), 4.8)
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    place = {name: i for i, name in enumerate(names)}
    carried = carried_by(mass, edges)
    top = max(mass.values(), default=0.0) or 1.0
    longest = max((place[v] - place[u] for u, v in edges), default=1)
    for (u, v), amount in carried.items():
        left, right = place[u] + _BAR / 2, place[v] - _BAR / 2
        if place[v] == place[u] + 1:
            ax.fill_between([left, right], [amount, amount], color=BETWEEN, linewidth=0, zorder=1)
        else:
            height = top * (1.08 + 0.45 * (place[v] - place[u]) / longest)
            _arc(ax, (place[u], mass[u]), (place[v], mass[v]), height, 0.6 + 7 * amount / top)
            ax.text((place[u] + place[v]) / 2, height + 0.03 * top, f"{amount:.2f}", **_LABEL)
    x = range(len(names))
    plus = [positive[name] for name in names]
    minus = [mass[name] - positive[name] for name in names]
    ax.bar(x, plus, _BAR, color=POSITIVE, label="speaks for the output", zorder=2)
    ax.bar(x, minus, _BAR, bottom=plus, color=NEGATIVE, label="speaks against it", zorder=2)
    ax.set_xticks(list(x), names, rotation=90, fontsize=8)
    ax.set_xlim(-0.7, len(names) - 0.3)
    ax.set_ylim(0, 1.8 * top if any(place[v] > place[u] + 1 for u, v in edges) else 1.25 * top)
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= 1.001 * top])
    ax.set_ylabel("Σ|R|, the share of relevance")
    ax.set_xlabel("← relevance runs from the output back to the input", loc="right")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    return ax


def carried_by(
    mass: Mapping[str, float], edges: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], float]:
    """How much relevance goes along each edge, as far as the layers' masses tell.

    A layer with one source sends it all it has. Among several sources, one with no other way to go
    received its whole relevance there, and the others share what is left, evenly.
    """
    into: dict[str, list[str]] = {}
    out: dict[str, list[str]] = {}
    for u, v in edges:
        into.setdefault(v, []).append(u)
        out.setdefault(u, []).append(v)
    carried: dict[tuple[str, str], float] = {}
    for v, sources in into.items():
        certain = [u for u in sources if len(out[u]) == 1] if len(sources) > 1 else []
        for u in certain:
            carried[u, v] = mass[u]
        others = [u for u in sources if u not in certain]
        rest = max(mass[v] - sum(mass[u] for u in certain), 0.0)
        for u in others:
            carried[u, v] = rest / len(others)
    return {edge: carried[edge] for edge in edges}


def _arc(
    ax: Any, left: tuple[float, float], right: tuple[float, float], height: float, width: float
) -> None:
    """A line from the top of one bar over those between to the top of another."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    # A Bézier curve reaches 3/4 of the way to its corners.
    up = [(4 * height - y) / 3 for _, y in (left, right)]
    corners = [left, (left[0], up[0]), (right[0], up[1]), right]
    path = Path(corners, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    ax.add_patch(PathPatch(path, fill=False, edgecolor=BETWEEN, linewidth=width, zorder=1))
    ax.update_datalim([left, (right[0], height)])
