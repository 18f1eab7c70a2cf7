"""From stored figures to means, intervals and tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.measures import MEASURES
from evaluation.methods import OURS
from evaluation.protocol import Protocol

Record = dict[str, Any]

DRAWS = 1000
LEVEL = 0.05


@dataclass(frozen=True)
class Summary:
    """One method's mean of one measure, and how it compares with Relative LRP's."""

    mean: float
    low: float
    high: float
    p: float = float("nan")  # Holm-corrected; NaN for Relative LRP itself
    seeds_for_us: int = 0  # in which Relative LRP's mean is the better one
    seeds: int = 0
    better: int = 0  # +1: better than Relative LRP, -1: worse, 0: no significant difference


def load(protocol: Protocol, folder: Path) -> dict[tuple[str, str], list[Record]]:
    """The stored records of the protocol's cells, by seed; unfinished ones are left out."""
    found: dict[tuple[str, str], list[Record]] = {}
    for cell in protocol.cells:
        paths = [folder / f"{cell.network}-{cell.data}-{seed}.json" for seed in protocol.seeds]
        records = [json.loads(path.read_text()) for path in paths if path.exists()]
        if records:
            found[cell.network, cell.data] = records
    return found


def values(records: Sequence[Record], method: str, measure: str) -> np.ndarray | None:
    """(seeds, samples), NaN where a value is missing; None where the method has none at all."""
    rows = [record["methods"].get(method, {}).get("figures", {}).get(measure) for record in records]
    if not rows or any(row is None for row in rows):
        return None
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)


def interval(figures: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: seeds are drawn, then samples, with replacement."""
    rng = np.random.default_rng(seed)
    seeds, samples = figures.shape
    chosen_seeds = rng.integers(seeds, size=(DRAWS, seeds, 1))
    chosen_samples = rng.integers(samples, size=(DRAWS, 1, samples))
    drawn = figures[chosen_seeds, chosen_samples].reshape(DRAWS, -1)
    usable = ~np.isnan(drawn).all(1)
    if not usable.any():
        return float("nan"), float("nan")
    low, high = np.percentile(np.nanmean(drawn[usable], axis=1), [2.5, 97.5])
    return float(low), float(high)


def paired_p(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Wilcoxon's signed-rank test over samples, each averaged over the seeds."""
    from scipy.stats import wilcoxon

    difference = (ours - theirs).mean(0)
    difference = difference[np.isfinite(difference)]
    if len(difference) == 0 or not np.any(difference):
        return 1.0
    return float(wilcoxon(difference).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction."""
    order = np.argsort(p_values)
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = worst
    return corrected


def column(records: Sequence[Record], methods: Sequence[str], measure: str) -> dict[str, Summary]:
    """Every method's summary of one measure, in one cell."""
    figures = {name: values(records, name, measure) for name in methods}
    known = {
        name: value
        for name, value in figures.items()
        if value is not None and np.isfinite(value).any()
    }
    if OURS not in known:
        return {}
    ours, better = known[OURS], MEASURES[measure].better
    others = [name for name in known if name != OURS]
    corrected = dict(
        zip(others, holm([paired_p(ours, known[name]) for name in others]), strict=True)
    )
    summaries = {}
    for name, value in known.items():
        low, high = interval(value)
        summary = {"mean": float(np.nanmean(value)), "low": low, "high": high}
        if name == OURS:
            summaries[name] = Summary(**summary)
            continue
        lead = better * (np.nanmean(value, axis=1) - np.nanmean(ours, axis=1))
        significant = corrected[name] < LEVEL
        paired = better * np.nanmean(value - ours)
        summaries[name] = Summary(
            **summary,
            p=corrected[name],
            seeds_for_us=int((lead < 0).sum()),
            seeds=len(lead),
            better=int(np.sign(paired)) if significant else 0,
        )
    return summaries
