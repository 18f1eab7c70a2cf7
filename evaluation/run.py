"""One network, trained on one data set from one seed: everything that is measured of it."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation import measures, networks
from evaluation.data import Data, Samples, load
from evaluation.methods import METHODS, OURS, Explain, Method, applicable, prepare
from evaluation.protocol import Cell, Protocol

Record = dict[str, Any]

BLOCK = 30  # samples explained at once


@dataclass
class Subject:
    """A network that is explained, and the samples that it is explained on."""

    network: nn.Module
    data: Data
    samples: Samples
    seed: int
    trained_s: float | None = None  # processor time of its training

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device


def trained(cell: Cell, seed: int, protocol: Protocol, folder: Path, device: str) -> Subject:
    """The cell's network, from the cache or trained now."""
    data = load(cell.data, cell.size)
    torch.manual_seed(seed)
    network = networks.build(cell.network, data, protocol.width)
    stored = folder / f"{cell.network}-{cell.data}-{seed}.pt"
    if not stored.exists():
        start = time.process_time()
        networks.train(network, data, protocol, cell.steps, seed, device)
        seconds = time.process_time() - start
        torch.save({"state": network.state_dict(), "seconds": seconds}, stored)
    kept = torch.load(stored, weights_only=True)
    network.load_state_dict(kept["state"])
    return Subject(network.to(device).eval(), data, data.test(cell.samples), seed, kept["seconds"])


def evaluate(cell: Cell, seed: int, protocol: Protocol, folder: Path, device: str) -> None:
    """Measure one network and store the figures as JSON; what is stored already is kept."""
    methods = dict(METHODS)
    path = folder / f"{cell.network}-{cell.data}-{seed}.json"
    record: Record = json.loads(path.read_text()) if path.exists() else {}
    methods = {name: m for name, m in methods.items() if name not in record.get("asked", ())}
    if not methods:
        return
    subject = trained(cell, seed, protocol, folder, device)
    start = time.process_time()
    if not record:
        tested = subject.data.test(protocol.tested)
        record = {
            "cell": asdict(cell),
            "seed": seed,
            "classes": subject.data.classes,
            "train_seconds": subject.trained_s,
            "accuracy": networks.accuracy(subject.network, tested, device),
            "parameters": sum(p.numel() for p in subject.network.parameters()),
            "asked": [],
            "methods": {},
        }
    record["methods"] |= measured(subject, methods, protocol, folder / path.stem)
    record["asked"] += list(methods)
    if OURS in methods and seed == protocol.seeds[0] and device == "cpu":
        record["quantus"] = against_quantus(subject, protocol)
    # On a machine that others use too, the time on a core says more than the clock.
    record["seconds"] = record.get("seconds", 0.0) + time.process_time() - start
    # Written elsewhere first: a run that is cut short leaves no half of a file.
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(record))
    draft.replace(path)


def against_quantus(subject: Subject, protocol: Protocol) -> dict[str, float]:
    """How far the measures are from the same ones in Quantus, on ten samples."""
    few = subject.samples.first(10)
    explain = prepare(METHODS[OURS], subject.network, subject.data, protocol)
    return measures.quantus_differences(subject.network, few, explain(few.inputs, few.labels))


def measured(
    subject: Subject, methods: dict[str, Method], protocol: Protocol, gallery: Path
) -> dict[str, Record]:
    """Every method on the subject; of the first seed, the first maps are kept for the gallery."""
    results: dict[str, Record] = {}
    maps: dict[str, list[Tensor]] = {}
    changed = [measures.randomised(subject.network, share, 7) for share in (0.5, 1.0)]
    for name, method in applicable(methods, subject.network):
        try:
            results[name], both = one_method(subject, method, changed, protocol)
            maps[name] = [values[: protocol.gallery] for values in both]
        except Exception as error:
            if name == OURS:
                raise
            lines = str(error).strip().splitlines() or [""]
            results[name] = {"error": f"{type(error).__name__}: {lines[0]}"}
    if subject.seed == protocol.seeds[0]:
        path = Path(f"{gallery}.maps")
        if path.exists():
            maps = torch.load(path, weights_only=False)["maps"] | maps
        torch.save({"samples": subject.samples.first(protocol.gallery), "maps": maps}, path)
    return results


def one_method(
    subject: Subject, method: Method, changed: list[nn.Module], protocol: Protocol
) -> tuple[Record, tuple[Tensor, Tensor]]:
    """One method's figures, one for each sample, and its maps for either class."""
    network, data, device = subject.network, subject.data, subject.device
    samples = subject.samples
    explain = prepare(method, network, data, protocol)
    x, labels = samples.inputs.to(device), samples.labels.to(device)

    start = time.perf_counter()
    maps = in_blocks(explain, x, labels)
    seconds = (time.perf_counter() - start) / len(x)
    others = measures.relevance(in_blocks(explain, x, samples.others.to(device)))
    places = measures.relevance(maps)

    with torch.no_grad():
        logit = network(x).gather(1, labels[:, None])[:, 0].double()
        start_logit = network(torch.zeros_like(x[:1]))[0, labels].double()
    figures: dict[str, Tensor | None] = {
        "nonfinite": (~maps.isfinite()).flatten(1).any(1).double(),
        "amplification": measures.amplification(method.law, maps, logit),
        "law_error": measures.law_error(method.law, maps.flatten(1), logit, start_logit),
        "similarity": measures.cosine(places, others),
    }
    if samples.masks is not None and samples.other_masks is not None:
        mask = samples.masks.flatten(1).to(device)
        figures["mass"] = measures.mass_accuracy(places, mask)
        figures["rank"] = measures.rank_accuracy(places, mask)
        figures["pointing"] = measures.pointing(places, mask)
        other = samples.other_masks.flatten(1).to(device)
        figures["distractor"] = measures.mass_accuracy(places, other)

    curves = flipping(network, x, labels, maps, protocol)
    figures["morf"], figures["lerf"] = (measures.area(curves[k]) for k in ("morf", "lerf"))
    figures["abpc"] = figures["lerf"] - figures["morf"]
    if "lerf_blur" in curves:
        figures["insertion"] = measures.area(curves["lerf_blur"])
        figures["srg"] = figures["insertion"] - measures.area(curves["morf_blur"])

    few, few_labels = x[: protocol.probes], labels[: protocol.probes]
    figures["sensitivity"] = measures.sensitivity(
        explain, few, few_labels, protocol.stability_radius, protocol.stability_samples
    )
    for name, other_network in zip(("randomised_half", "randomised"), changed, strict=True):
        new = explain.on(other_network)(few, few_labels)
        old = places[: protocol.probes].abs()
        figures[name] = measures.rank_correlation(old, measures.relevance(new).abs())
    record: Record = {
        "seconds": seconds,
        "figures": {k: numbers(v) for k, v in figures.items() if v is not None},
        "curves": {k: [numbers(row) for row in v] for k, v in curves.items()},
    }
    return record, (places.cpu(), others.cpu())


def in_blocks(explain: Explain, x: Tensor, targets: Tensor) -> Tensor:
    blocks = zip(x.split(BLOCK), targets.split(BLOCK), strict=True)
    return torch.cat([explain(inputs, wanted) for inputs, wanted in blocks])


def flipping(
    network: nn.Module, x: Tensor, labels: Tensor, maps: Tensor, protocol: Protocol
) -> dict[str, Tensor]:
    """The curves, most and least relevant first, for every replacement."""
    patch = max(1, x.shape[-1] // 16) if x.dim() == 4 else 1
    scores = measures.patch_scores(maps, patch)
    replacements = {"": torch.zeros_like(x)}
    if x.dim() == 4:
        replacements["_blur"] = measures.blurred(x)
    return {
        name + suffix: measures.flipping_curve(
            network, x, labels, scores, replacement, protocol.flips, patch, descending
        )
        for suffix, replacement in replacements.items()
        for name, descending in (("morf", True), ("lerf", False))
    }


def abpc(
    network: nn.Module, x: Tensor, labels: Tensor, maps: Tensor, protocol: Protocol
) -> list[float]:
    """LeRF minus MoRF area of every sample, elements replaced by 0."""
    curves = flipping(network, x, labels, maps, protocol)
    return (measures.area(curves["lerf"]) - measures.area(curves["morf"])).tolist()


def numbers(values: Tensor) -> list[float | None]:
    """Six digits are plenty; what is not finite is null in JSON."""
    return [
        float(f"{value:.6g}") if math.isfinite(value) else None
        for value in values.double().tolist()
    ]


def own_pictures(
    network: nn.Module, data: Data, count: int, protocol: Protocol, path: Path, device: str
) -> None:
    """The measures that need no masks, on a folder of pictures and a network with weights."""
    samples = data.test(count)
    network = network.to(device)
    with torch.no_grad():
        scores = torch.cat([network(block.to(device)).cpu() for block in samples.inputs.split(16)])
    known = samples.labels[0] >= 0
    accuracy = float((scores.argmax(1) == samples.labels).double().mean()) if known else None
    if not known:
        samples.labels = scores.argmax(1)
        samples.present = F.one_hot(samples.labels, scores.shape[1]).float()
    ranked = scores.argsort(1, descending=True)
    likeliest = ranked[:, 0] == samples.labels
    samples.others = torch.where(likeliest, ranked[:, 1], ranked[:, 0])
    subject = Subject(network, data, samples, protocol.seeds[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    record: Record = {
        "cell": asdict(Cell("own", "pictures", count, 0)),
        "seed": 0,
        "classes": data.classes if known else [f"class {i}" for i in range(scores.shape[1])],
        "accuracy": accuracy,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    record["methods"] = measured(subject, METHODS, protocol, path.with_suffix(""))
    path.write_text(json.dumps(record))
