"""The measures, each a few lines on whole batches.

Where Quantus has the same measure, `quantus_differences` says how far it agrees; where Captum has
it, Captum computes it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.data import Samples
from evaluation.methods import Explain


@dataclass(frozen=True)
class Measure:
    """What a column of the report means."""

    title: str
    better: int  # +1: higher is better; -1: lower is; 0: no order
    source: str
    meaning: str


MEASURES: dict[str, Measure] = {
    "mass": Measure(
        "mass",
        +1,
        "Quantus RelevanceMassAccuracy (Arras et al. 2022)",
        "part of the positive relevance that lies on the object of the explained class",
    ),
    "rank": Measure(
        "rank",
        +1,
        "Quantus RelevanceRankAccuracy (Arras et al. 2022)",
        "part of the object's k pixels among the k most relevant",
    ),
    "pointing": Measure(
        "pointing",
        +1,
        "Quantus PointingGame (Zhang et al. 2018)",
        "the most relevant pixel lies on the object",
    ),
    "distractor": Measure(
        "on other",
        -1,
        "Quantus RelevanceMassAccuracy on the other object's mask",
        "part of the positive relevance that lies on the object of another class",
    ),
    "morf": Measure(
        "MoRF",
        -1,
        "Quantus PixelFlipping (Bach et al. 2015); = deletion (Petsiuk et al. 2018)",
        "area under the target's probability while the most relevant patches turn 0 first",
    ),
    "lerf": Measure(
        "LeRF",
        +1,
        "Quantus PixelFlipping, order reversed",
        "the same, the least relevant patches first",
    ),
    "abpc": Measure(
        "ABPC",
        +1,
        "area between perturbation curves (Šimić et al. 2022)",
        "LeRF minus MoRF area, patches replaced by 0",
    ),
    "insertion": Measure(
        "insertion",
        +1,
        "RISE (Petsiuk et al. 2018)",
        "area under the target's probability while the most relevant patches are put into the "
        "blurred picture; = LeRF with blur, read backwards",
    ),
    "srg": Measure(
        "SRG",
        +1,
        "symmetric relevance gain (Blücher et al. 2024)",
        "LeRF minus MoRF area, patches replaced by the blurred picture",
    ),
    "similarity": Measure(
        "other class",
        -1,
        "Quantus RandomLogit (Sixt et al. 2020), cosine instead of SSIM",
        "cosine similarity of the maps for the true and the other class",
    ),
    "sensitivity": Measure(
        "noise",
        -1,
        "captum.metrics.sensitivity_max (Yeh et al. 2019)",
        "largest relative change of the map under small noise on the input",
    ),
    "randomised_half": Measure(
        "random half",
        -1,
        "Quantus MPRT (Adebayo et al. 2018), two stages of it",
        "rank correlation of the absolute map after the later half of the parameters is drawn anew",
    ),
    "randomised": Measure(
        "random all",
        -1,
        "Quantus MPRT (Adebayo et al. 2018), its last stage",
        "rank correlation of the absolute map after all parameters are drawn anew",
    ),
}


# --- against the masks --------------------------------------------------------------------------


def relevance(attributions: Tensor) -> Tensor:
    """Signed relevance per place, (N, places): summed over the channels of a picture.

    In float64, where the products of runaway maps do not overflow.
    """
    finite = torch.nan_to_num(attributions.double(), 0.0, 0.0, 0.0)
    return (finite.sum(1) if finite.dim() == 4 else finite).flatten(1)


def mass_accuracy(places: Tensor, mask: Tensor) -> Tensor:
    """Part of the positive relevance on the mask; 0 where nothing is positive."""
    positive = places.clamp(min=0)
    positive = positive / positive.amax(1, keepdim=True).clamp(min=1e-300)
    return (positive * mask).sum(1) / positive.sum(1).clamp(min=1e-12)


def rank_accuracy(places: Tensor, mask: Tensor) -> Tensor:
    """Part of the mask that is among its k most relevant places, k the size of the mask."""
    order = places.argsort(1, descending=True)
    sizes = mask.sum(1, keepdim=True)
    first = torch.arange(places.shape[1], device=places.device) < sizes
    return (mask.gather(1, order) & first).sum(1) / sizes[:, 0].clamp(min=1)


def pointing(places: Tensor, mask: Tensor) -> Tensor:
    """Whether the most relevant place lies on the mask."""
    return mask.gather(1, places.argmax(1, keepdim=True))[:, 0].float()


# --- flipping curves ----------------------------------------------------------------------------


def patch_scores(attributions: Tensor, patch: int) -> Tensor:
    """Relevance per patch of a picture, or per feature, (N, patches)."""
    places = relevance(attributions)
    if attributions.dim() != 4 or patch == 1:
        return places
    height, width = attributions.shape[2:]
    maps = places.view(-1, 1, height, width)
    return F.avg_pool2d(maps, patch, ceil_mode=True).flatten(1)


def flipped(x: Tensor, replacement: Tensor, order: Tensor, count: int, patch: int) -> Tensor:
    """`x` with the first `count` patches of `order` taken from `replacement`."""
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True)
    if x.dim() != 4:
        return torch.where(chosen.view_as(x), replacement, x)
    rows, columns = (math.ceil(side / patch) for side in x.shape[2:])
    grid = chosen.view(-1, 1, rows, columns)
    grid = grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return torch.where(grid[:, :, : x.shape[2], : x.shape[3]], replacement, x)


@torch.no_grad()
def flipping_curve(
    network: nn.Module,
    x: Tensor,
    targets: Tensor,
    scores: Tensor,
    replacement: Tensor,
    steps: int,
    patch: int,
    descending: bool,
) -> Tensor:
    """The target's probability after 0, 1/steps, …, all of the patches are replaced, (N, steps+1).

    Patches of equal relevance (zeros, mostly) come in a random order that is the same for all
    methods and both directions.
    """
    shuffle = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(0))
    shuffle = shuffle.to(scores.device)
    order = shuffle[scores[:, shuffle].argsort(dim=1, descending=descending, stable=True)]
    points = []
    for step in range(steps + 1):
        count = round(step * scores.shape[1] / steps)
        outputs = network(flipped(x, replacement, order, count, patch))
        points.append(outputs.softmax(1).gather(1, targets[:, None])[:, 0])
    return torch.stack(points, dim=1)


def area(curve: Tensor) -> Tensor:
    """Area under a curve over [0, 1], by trapezes."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1))


def blurred(x: Tensor) -> Tensor:
    """The picture without its details: a Gaussian as wide as a tenth of its side."""
    side = x.shape[-1]
    reach = max(1, side // 4)
    axis = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (axis / (side / 10)) ** 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, :, None], groups=x.shape[1])
    return F.conv2d(rows, kernel[:, :, :, None], groups=x.shape[1])


# --- comparisons of maps ------------------------------------------------------------------------


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of two maps, 0 where one of them is 0."""
    a, b = (v / v.abs().amax(1, keepdim=True).clamp(min=1e-300) for v in (a, b))
    return F.cosine_similarity(a, b, dim=1)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, per row; 0 where a row is constant."""
    ranks = [_ranks(values) for values in (a, b)]
    return cosine(*(rank - rank.mean(1, keepdim=True) for rank in ranks))


def _ranks(values: Tensor) -> Tensor:
    """Ranks in each row, ties sharing their mean."""
    rows = []
    for row in values:
        _, inverse, counts = row.unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        rows.append((ends - (counts - 1) / 2)[inverse])
    return torch.stack(rows)


def randomised(network: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy of the network whose last `share` of layers is initialised anew."""
    network = copy.deepcopy(network)
    layers = [m for m in network.modules() if hasattr(m, "reset_parameters")]
    torch.manual_seed(seed)
    for layer in layers[round(len(layers) * (1 - share)) :]:
        layer.reset_parameters()
    return network.eval()


def sensitivity(
    explain: Explain, x: Tensor, targets: Tensor, radius: float, samples: int
) -> Tensor:
    """Captum's largest relative change of the map under noise of at most `radius`."""
    from captum.metrics import sensitivity_max

    def function(inputs: tuple[Tensor, ...], target: Tensor) -> tuple[Tensor]:
        # A tuple, as Captum reads a lone tensor as one explanation for each row.
        return (torch.nan_to_num(explain(inputs[0], target).double(), 0.0, 0.0, 0.0),)

    torch.manual_seed(0)
    return sensitivity_max(
        function, x, perturb_radius=radius, n_perturb_samples=samples, target=targets
    ).detach()


# --- conservation -------------------------------------------------------------------------------


def law_error(law: str, places: Tensor, logit: Tensor, start: Tensor) -> Tensor | None:
    """How far a map's sum is from what its method promises, relative to the promise."""
    total, mass = places.double().sum(1), places.double().abs().sum(1)
    if law == "mass":
        return (mass - 1).clamp(min=0)
    if law == "logit":
        return (total - logit).abs() / logit.abs()
    if law == "rise":
        return (total - (logit - start)).abs() / (logit - start).abs()
    return None


def amplification(law: str, attributions: Tensor, logit: Tensor) -> Tensor:
    """Largest |R| per unit of the relevance that a method starts with."""
    largest = attributions.abs().flatten(1).amax(1)
    return largest / logit.abs() if law in ("logit", "rise") else largest


# --- against Quantus ----------------------------------------------------------------------------


def quantus_differences(
    network: nn.Module, samples: Samples, attributions: Tensor
) -> dict[str, float]:
    """The largest difference between the measures above and the same ones in Quantus.

    Where there are masks, of localisation; in pictures of one channel, of pixel flipping (Quantus
    flips every channel for itself).
    """
    import quantus

    x, y = samples.inputs, samples.labels
    places = relevance(attributions)
    maps = places.view(-1, 1, *x.shape[2:])

    def theirs(
        metric: Callable, a: Tensor, mask: Tensor | None = None, **options: object
    ) -> Tensor:
        instance = metric(abs=False, normalise=False, disable_warnings=True, **options)
        arrays = {"x_batch": x.numpy(), "y_batch": y.numpy(), "a_batch": a.numpy()}
        if mask is not None:
            arrays["s_batch"] = mask.numpy()
        return torch.tensor(instance(model=network, **arrays, softmax=True), dtype=torch.float64)

    differences = {}
    if samples.masks is not None:
        mask, flat = samples.masks, samples.masks.flatten(1)
        for name, metric, given, ours in (
            ("mass", quantus.RelevanceMassAccuracy, maps.clamp(min=0), mass_accuracy),
            ("rank", quantus.RelevanceRankAccuracy, maps, rank_accuracy),
            ("pointing", quantus.PointingGame, maps, pointing),
        ):
            differences[name] = theirs(metric, given, mask) - ours(places, flat)
    elif x.dim() == 4 and x.shape[1] == 1 and places.shape[1] % 8 == 0:
        curve = flipping_curve(network, x, y, places, torch.zeros(()), 8, 1, True)
        each = places.shape[1] // 8
        flips = theirs(quantus.PixelFlipping, maps, features_in_step=each, perturb_baseline=0.0)
        differences["morf"] = flips - curve[:, 1:]
    return {name: float(value.abs().max()) for name, value in differences.items()}
