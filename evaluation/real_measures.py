"""The measures on really trained networks; `evaluation.protocol.Real` says what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation import real
from evaluation.measures import flipped, mass_accuracy, patch_scores, relevance
from evaluation.protocol import SENTENCE_STEPS, Real

Explain = Callable[[Tensor, Tensor], Tensor]  # inputs, targets → attributions
Figures = dict[str, list[float]]

BLOCK = 16  # pictures explained at once


@dataclass
class Subject:
    """A network, pictures that it names rightly, and mosaics of them."""

    protocol: Real
    network: nn.Module
    inputs: Tensor
    labels: Tensor
    mosaics: Tensor  # (N, 4): numbers of pictures of different classes

    def first(self, count: int, mosaics: int) -> Subject:
        """The first pictures and mosaics only."""
        few = quadruples(self.labels[:count])[:mosaics]
        return Subject(self.protocol, self.network, self.inputs[:count], self.labels[:count], few)


@torch.no_grad()
def subject(protocol: Real, part: str, weights: Path, folder: Path) -> Subject:
    """The network and the pictures of the part "choice" or "report"."""
    network = real.CLASSIFIERS[protocol.network](weights)
    found = real.pictures(protocol.network, folder)
    scores = torch.cat([network(block) for block in found.inputs.split(BLOCK)]).softmax(1)
    confidence, named = scores.max(1)
    usable = ((named == found.labels) & (confidence > protocol.confidence)).nonzero()[:, 0]
    ends = (protocol.choice, protocol.choice + protocol.report)
    usable = usable[: ends[0]] if part == "choice" else usable[ends[0] : ends[1]]
    labels = found.labels[usable]
    return Subject(
        protocol, network, found.inputs[usable], labels, quadruples(labels)[: protocol.mosaics]
    )


def quadruples(labels: Tensor) -> Tensor:
    """Each picture at most once, the next ones of classes that are not in the mosaic yet."""
    left, found = list(range(len(labels))), []
    while True:
        chosen: list[int] = []
        for index in left:
            if len(chosen) < 4 and int(labels[index]) not in labels[chosen].tolist():
                chosen.append(index)
        if len(chosen) < 4:
            return torch.tensor(found)
        found.append(chosen)
        left = [index for index in left if index not in chosen]


def figures(explain: Explain, of: Subject, by_mean: bool = True) -> Figures:
    """SRG by blur and by mean for each picture, the grid's share for each mosaic."""
    blocks = zip(of.inputs.split(BLOCK), of.labels.split(BLOCK), strict=True)
    maps = torch.cat([explain(x, target).detach() for x, target in blocks])
    if not maps.flatten(1).isfinite().all(1).any():
        raise ValueError("no map is finite")
    found = {
        "srg": gain(of, maps, smooth(of.inputs, of.protocol.sigma)).tolist(),
        "grid": [grid(explain, of, chosen) for chosen in of.mosaics],
    }
    if by_mean:
        mean = of.inputs.mean((2, 3), keepdim=True).expand_as(of.inputs)
        found["srg_mean"] = gain(of, maps, mean).tolist()
    return found


@torch.no_grad()
def gain(of: Subject, maps: Tensor, replacement: Tensor) -> Tensor:
    """SRG of every picture."""
    p = of.protocol
    scores = patch_scores(maps, p.patch)
    # Equal patches come in one random order, the same for all methods.
    shuffle = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(0))
    total = torch.zeros(len(maps))
    for sign in (-1, 1):
        order = shuffle[scores[:, shuffle].argsort(dim=1, descending=sign < 0, stable=True)]
        for step in range(1, p.steps):
            count = round(step * scores.shape[1] / p.steps)
            x = flipped(of.inputs, replacement, order, count, p.patch)
            outputs = torch.cat([of.network(block) for block in x.split(BLOCK)]).softmax(1)
            total += sign * outputs.gather(1, of.labels[:, None])[:, 0]
    return total / (p.steps - 1)


def smooth(x: Tensor, sigma: float) -> Tensor:
    """Convolved with a Gaussian, the picture reflected at its border."""
    reach = min(round(3 * sigma), x.shape[-1] - 1)
    axis = torch.arange(-reach, reach + 1).to(x)
    kernel = torch.exp(-0.5 * (axis / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel[:, :, None], groups=x.shape[1])
    return F.conv2d(rows, kernel[:, :, :, None], groups=x.shape[1])


def grid(explain: Explain, of: Subject, chosen: Tensor) -> float:
    """The mean over the four classes of one mosaic."""
    a, b, c, d = of.inputs[chosen]
    mosaic = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
    side = a.shape[-1]
    masks = torch.zeros(4, 2 * side, 2 * side, dtype=torch.bool)
    for cell in range(4):
        top, left = cell // 2 * side, cell % 2 * side
        masks[cell, top : top + side, left : left + side] = True
    maps = explain(mosaic.expand(4, -1, -1, -1).clone(), of.labels[chosen]).detach()
    return float(mass_accuracy(relevance(maps), masks.flatten(1)).mean())


@torch.no_grad()
def deletion(explain: Callable[[real.Sentence], Tensor], sentences: list[real.Sentence]) -> Figures:
    """The gain for every sentence when tokens are taken out; `explain` gives one value a token."""
    gains = []
    for sentence in sentences:
        scores = explain(sentence)[1:-1]
        order = 1 + scores.argsort(descending=True, stable=True)
        curves = []
        for ranked in (order.flip(0), order):
            points = []
            for step in range(1, SENTENCE_STEPS):
                keep = torch.ones(len(sentence.tokens), dtype=torch.bool)
                keep[ranked[: round(step * len(ranked) / SENTENCE_STEPS)]] = False
                points.append(sentence.cosine(keep))
            curves.append(sum(points) / len(points))
        gains.append(curves[0] - curves[1])
    return {"srg": gains}
