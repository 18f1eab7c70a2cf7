"""Classes compared: of each, its mean relevance and the channels that set it apart."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from .pictures import heat_uri, reduced
from .store import Array
from .stored import StoredRun

MOST = 60  # classes, the most frequent ones
UNITS = 8  # channels of each layer
_PIXELS = 112


def class_summaries(
    stored: StoredRun, right: Array, known: Array, count: int
) -> list[dict[str, Any]]:
    """One entry per class that was explained, the most frequent first.

    Mean maps are of the first `count` rows: of all, they would read the whole run.
    """
    numbers, counts = np.unique(stored.target, return_counts=True)
    chosen = numbers[(-counts).argsort(kind="stable")][:MOST]
    means = _mean_maps(stored, chosen, count) if stored.kind == "image" else {}
    apart = _apart(stored, chosen)
    summaries = []
    for number in chosen.tolist():
        rows = stored.target == number
        judged = rows & known
        summary: dict[str, Any] = {
            "class": number,
            "count": int(rows.sum()),
            "accuracy": round(float(right[judged].mean()), 4) if judged.any() else None,
            "confidence": round(float(stored.confidence[rows].mean()), 4),
            "mass": round(float(stored.mass[rows].mean()), 4),
            "units": apart.get(number, []),
        }
        if number in means:
            where, largest, saturated = heat_uri(means[number], _PIXELS)
            summary["heat"] = [where, float(f"{largest:.4g}"), float(f"{saturated:.4g}")]
        summaries.append(summary)
    return summaries


def _mean_maps(stored: StoredRun, classes: Array, count: int) -> dict[int, Array]:
    """Mean over each class's rows, of the first so many, of the heat map at the input."""
    sums: dict[int, Array] = {}
    counts: dict[int, int] = {}
    wanted = set(classes.tolist())
    for start in range(0, count, 64):
        maps = stored.rows("attribution", start, min(start + 64, count)).sum(1)
        for offset, heat in enumerate(maps):
            number = int(stored.target[start + offset])
            if number in wanted:
                small = reduced(heat, _PIXELS)
                sums[number] = sums[number] + small if number in sums else small.astype(float)
                counts[number] = counts.get(number, 0) + 1
    return {number: total / counts[number] for number, total in sums.items()}


def _apart(stored: StoredRun, classes: Array) -> dict[int, list[Any]]:
    """By class, per layer: the units in which it differs most surely from all others.

    Needs SciPy, two classes and two samples in them; empty otherwise.
    """
    found: dict[int, list[Any]] = {}
    statistics = stored.statistics()
    if not statistics.layers:
        return found
    for number in classes.tolist():
        layers = []
        for layer in statistics.layers:
            with contextlib.suppress(ValueError, ImportError):  # too few samples, or no SciPy
                test = statistics.compare(layer, number)
                surest = test.adjusted.argsort(stable=True)[:UNITS].tolist()
                layers.append(
                    [
                        layer,
                        [
                            [
                                u,
                                float(f"{test.difference[u]:.3g}"),
                                float(f"{test.adjusted[u]:.2g}"),
                            ]
                            for u in surest
                        ],
                    ]
                )
        found[number] = layers
    return found
