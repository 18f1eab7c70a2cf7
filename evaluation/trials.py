"""Other laws than the one taken, measured where choices are made; docs/trials.md tells the result.

``python -m evaluation.trials --pictures FOLDER --weights FOLDER`` stores every figure as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation import real, real_measures, run
from evaluation.laws import Law, attribute
from evaluation.protocol import REAL, REDUCED

TRIALS: dict[str, Law] = {
    "the law": Law(),
    "final section: with the mean before it": Law(final="composed"),
    "spatial: negative × −1/3": Law(spatial=-1 / 3),
    "spatial: positive over absolute sum": Law(spatial=0),
    "spatial: positive over their sum": Law(spatial=0, divisor="positive"),
    "spatial: signed": Law(spatial=-1),
    "dense: unsigned": Law(dense=1),
    "dense: positive over absolute sum": Law(dense=0),
    "dense: negative × −1/3": Law(dense=-1 / 3),
    "1×1: signed": Law(pointwise=-1),
    "1×1: negative × −1/3": Law(pointwise=-1 / 3),
    "1×1: positive over absolute sum": Law(pointwise=0),
    "depthwise: signed": Law(depthwise=-1),
    "depthwise: negative × −1/3": Law(depthwise=-1 / 3),
    "average pooling: signed": Law(pool=-1),
    "first: flat": Law(first="flat"),
    "first: |w|": Law(first="|w|"),
    "first: w²": Law(first="w²"),
    "divisor with the bias": Law(divisor="bias"),
    "squares": Law(divisor="squares"),
    "max pooling: shares": Law(winner=False),
    "sums: halves": Law(sums="half"),
    "final section: none": Law(final="layer"),
    "final section: all dense layers": Law(final="dense"),
    "relative signs": Law(relative=True),
    "relative signs, last layer only": Law(relative=True, final="layer"),
    "relative signs, last layer only, signed pools": Law(relative=True, final="layer", pool=-1),
    "relative signs, halves": Law(relative=True, sums="half"),
    "relative signs, last layer only, halves": Law(relative=True, final="layer", sums="half"),
    "relative signs, last layer only, signed sums": Law(
        relative=True, final="layer", sums="signed"
    ),
    "relative signs, last layer only, norms": Law(relative=True, final="layer", sums="norm"),
    "relative signs, signed sums": Law(relative=True, sums="signed"),
    "relative signs, norms": Law(relative=True, sums="norm"),
    "last layer only, halves": Law(final="layer", sums="half"),
    "norms": Law(sums="norm"),
    "last layer only, norms": Law(final="layer", sums="norm"),
    "last layer only, dense unsigned": Law(final="layer", dense=1),
    "all dense, spatial −1/3": Law(final="dense", spatial=-1 / 3),
    "all dense, spatial −1/2": Law(final="dense", spatial=-1 / 2),
    "all dense, spatial −0.8": Law(final="dense", spatial=-0.8),
    "all dense, spatial positive over their sum": Law(final="dense", spatial=0, divisor="positive"),
    "all dense, spatial positive over absolute": Law(final="dense", spatial=0),
    "all dense, spatial signed": Law(final="dense", spatial=-1),
    "all dense, bias": Law(final="dense", divisor="bias"),
    "all dense, max shares": Law(final="dense", winner=False),
    "all dense, contrast": Law(final="dense", unit="contrast"),
    "dense: root of squares": Law(divisor="root dense"),
    "dense: root of squares, spatial −1/3": Law(divisor="root dense", spatial=-1 / 3),
    "dense: root of squares, last layer only": Law(divisor="root dense", final="layer"),
    "spatial positive, dense root": Law(divisor="root dense", spatial=0),
    "start: class less others": Law(unit="contrast"),
}
TABLES = ("digits", "breast_cancer")


def by_token(law: Law) -> Callable[[real.Sentence], Tensor]:
    return lambda s: attribute(s.network, s.embeddings, 0, law).sum(-1)[0]


def table(name: str, laws: dict[str, Law], folder: Path) -> dict[str, real_measures.Figures]:
    """ABPC on the dense network trained in minutes, all seeds one after the other."""
    cell = next(cell for cell in REDUCED.cells if cell.data == name)
    found: dict[str, real_measures.Figures] = {law: {"abpc": []} for law in laws}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in REDUCED.seeds:
        subject = run.trained(cell, seed, REDUCED, folder, "cpu")
        network, x = subject.network.requires_grad_(False), subject.samples.inputs
        for name, law in laws.items():
            maps = attribute(network, x, subject.samples.labels, law)
            found[name]["abpc"] += run.abpc(network, x, subject.samples.labels, maps, REDUCED)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("build/evaluation/trials"))
    parser.add_argument("--only", nargs="*", help="these networks or tables")
    parser.add_argument("--laws", nargs="*", help="those whose name holds one of these")
    parser.add_argument("--few", action="store_true", help="half of the pictures, no SRG by mean")
    given = parser.parse_args(arguments)
    laws = {
        n: law for n, law in TRIALS.items() if not given.laws or any(s in n for s in given.laws)
    }
    given.results.mkdir(parents=True, exist_ok=True)
    for name in given.only or (*TABLES, "minilm", *(p.network for p in REAL)):
        path = given.results / f"{name}{'-few' * given.few}.json"
        stored = json.loads(path.read_text()) if path.exists() else {}
        missing = {n: law for n, law in laws.items() if n not in stored}
        if not missing:
            continue
        if name in TABLES:
            stored |= table(name, missing, given.results / "trained")
        elif name == "minilm":
            chosen = list(real.sentences())
            stored |= {
                n: real_measures.deletion(by_token(law), chosen) for n, law in missing.items()
            }
        else:
            protocol = next(p for p in REAL if p.network == name)
            subject = real_measures.subject(protocol, "choice", given.weights, given.pictures)
            if given.few:
                subject = subject.first(24, 6)
            for law_name, law in missing.items():

                def explain(
                    x: Tensor, target: Tensor, law: Law = law, network: nn.Module = subject.network
                ) -> Tensor:
                    return attribute(network, x, target, law)

                stored[law_name] = real_measures.figures(explain, subject, not given.few)
                path.write_text(json.dumps(stored))
        path.write_text(json.dumps(stored))
        print(summary(name, stored), flush=True)


def summary(name: str, stored: dict[str, real_measures.Figures]) -> str:
    """Means and standard errors."""
    lines = [name]
    for law, figures in stored.items():
        parts = []
        for key, values in figures.items():
            v = torch.tensor(values, dtype=torch.float64)
            parts.append(f"{key} {v.mean():.3f} ± {v.std() / len(v) ** 0.5:.3f}")
        lines.append(f"  {law:40} {'  '.join(parts)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
