"""The protocol: what is compared, on what, and how. Fixed before the runs, for all methods alike.

* Networks are trained here, once for each seed; weights, training data and order depend on the seed
  alone. The test samples are the same for every seed: the first ones of the test set, whether the
  network names them rightly or not. Nothing is left out.
* Explained is the logit of the true class (in scenes: of the first object). The other class, for
  class sensitivity, is that of the second object in scenes, and drawn at random elsewhere.
* Every method runs with its authors' or its library's defaults where it has any. No setting was
  tuned on these data, for any method.
* Attributions are summed over colour channels, with their sign, and then over square patches
  (1/16 of a picture's side) for the curves.
* A method that raises an error is listed with that error. A map with NaN or infinity counts in the
  share of non-finite maps; for all other measures its bad entries count as 0.
* Intervals: 95 %, bootstrap over training seeds and, within them, over samples.
* Tests: Wilcoxon's signed-rank test, two-sided, over samples, of Relative LRP against each other
  method; a sample's value is its mean over the seeds. Holm's correction over the methods of a
  table column. Beside it stands in how many seeds the means are ordered that way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One network on one data set."""

    network: str
    data: str
    samples: int  # explained, for each seed
    steps: int  # of training, with batches of `Protocol.batch`
    size: int = 32  # side of generated pictures


@dataclass(frozen=True)
class Protocol:
    """Everything that a run depends on."""

    name: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    width: float = 0.25  # of VGG's and ResNet50's hidden layers, against torchvision's
    batch: int = 32
    learning_rate: float = 2e-3
    tested: int = 500  # samples on which accuracy is measured

    probes: int = 12  # samples for the measures that explain again and again
    flips: int = 8  # steps of a flipping curve
    integration_steps: int = 12
    smooth_samples: int = 8
    smooth_noise: float = 0.15  # of the input's range: SmoothGrad's authors say 10 to 20 %
    stability_radius: float = 0.02  # largest change of an input element
    stability_samples: int = 2
    cam_side: int = 4  # Grad-CAM reads the deepest layer whose maps are at least this large

    gallery: int = 3  # first test samples, drawn for the first seed

    cancellation: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-4, 1e-6)
    depths: tuple[str, ...] = ("resnet18", "resnet34", "resnet50")
    nudge: float = 1e-6


REDUCED = Protocol(
    "reduced",
    (
        Cell("dense", "digits", 100, 1000),
        Cell("dense", "breast_cancer", 100, 300),
        Cell("cnn", "shapes", 40, 500),
        Cell("cnn", "cutouts", 40, 400),
        Cell("vgg16", "shapes", 20, 400),
        Cell("vgg19", "cutouts", 20, 240),
        Cell("resnet50", "cutouts", 12, 120, size=64),
    ),
)

# Torchvision's networks as they are, at their real size. For a GPU.
FULL = Protocol(
    "full",
    (
        Cell("dense", "digits", 360, 2000),
        Cell("dense", "breast_cancer", 114, 600),
        *(
            Cell(network, data, 200, 3000, size=224)
            for network in ("cnn", "vgg16", "vgg19", "resnet50")
            for data in ("shapes", "cutouts")
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    width=1.0,
    learning_rate=5e-4,
    tested=1000,
    probes=50,
    flips=16,
    integration_steps=50,
    smooth_samples=25,
    stability_samples=10,
    depths=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
)

# Everything once, in a minute: to see whether it runs.
TINY = Protocol(
    "tiny",
    (
        Cell("dense", "digits", 8, 60),
        Cell("cnn", "shapes", 6, 20),
        Cell("vgg16", "shapes", 4, 2),
        Cell("resnet50", "cutouts", 4, 2),
    ),
    seeds=(0, 1),
    width=0.0625,
    tested=50,
    probes=3,
    flips=4,
    integration_steps=4,
    smooth_samples=2,
    stability_samples=1,
    gallery=2,
    cancellation=(1.0, 1e-3, 1e-6),
    depths=("resnet18",),
)


@dataclass(frozen=True)
class Real:
    """What is measured on really trained networks, and on which pictures. Fixed before the runs.

    * Pictures that the network names rightly with more than `confidence`, in an order drawn once.
      The first `choice` of them serve to choose between laws, the next `report` for the report.
    * Maps are signed and summed over colours, then over patches of `patch` pixels a side.
    * SRG: the mean, over the parts j/`steps` that are replaced, of the target's probability when
      the least relevant patches go first, less the same when the most relevant go first. Replaced
      by the blurred picture (Gaussian of `sigma` pixels, reflected at the border), or by its mean.
    * Grid pointing game (Böhle et al. 2021): mosaics of 2×2 whole pictures of different classes,
      each class asked for in turn; the part of the positive relevance that lies in its cell. 0
      where nothing is positive; chance is 0.25.
    * Sentences: the part of SRG's curve is the cosine similarity to the other sentence of the pair
      when tokens are taken out, all but the first and the last, which are marks.
    * Intervals: 95 %, bootstrap over pictures (mosaics, sentences). Tests: Wilcoxon's signed-rank
      test over the same, two-sided, against EpsilonPlus (integrated gradients for sentences).
    """

    network: str
    confidence: float
    choice: int
    report: int
    mosaics: int  # of the pictures of either part
    sigma: float
    patch: int
    steps: int


REAL = (
    Real("lite0", 0.7, choice=64, report=48, mosaics=8, sigma=12, patch=16, steps=6),
    Real("resnet20", 0.9, choice=96, report=192, mosaics=24, sigma=4, patch=2, steps=9),
    Real("resnet32", 0.9, choice=96, report=192, mosaics=24, sigma=4, patch=2, steps=9),
    Real("vgg", 0.7, choice=96, report=192, mosaics=24, sigma=4, patch=2, steps=9),
)
SENTENCE_STEPS = 6

PROTOCOLS = {protocol.name: protocol for protocol in (REDUCED, FULL, TINY)}
