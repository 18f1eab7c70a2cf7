"""Explain two small digit classifiers with Relative LRP, beside input×gradient and Captum's LRP.

    python examples/demo.py [--out DIR]

Every picture holds one handwritten digit of scikit-learn's data set among fragments of other
digits. The networks learn to name the whole digit; nothing tells them where it is. An explanation
convinces where it finds the digit and leaves the fragments alone, and because we put the digit
there ourselves, "on digit", the part of the positive relevance that lies on its strokes, measures
just that.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from captum.attr import LRP, InputXGradient
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn

from captum_rlrp import RelativeLRP

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CANVAS, DIGIT, FRAGMENT, FRAGMENTS = 32, 16, 6, 8
SHOWN = 6  # digits per figure


# --- data ---------------------------------------------------------------------------------------


@dataclass
class Scenes:
    images: Tensor  # (N, 1, CANVAS, CANVAS) in [0, 1]
    labels: Tensor  # (N,)
    masks: Tensor  # (N, 1, CANVAS, CANVAS), True on the strokes of the digit


def load_split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The digits at 16×16, cut into 1437 for training and 360 for testing."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return (images[train], labels[train]), (images[test], labels[test])


def compose(digits: Tensor, labels: Tensor, generator: torch.Generator) -> Scenes:
    """Put each digit at a random place among fragments of other digits."""

    def places(size: int, within: int, *shape: int) -> list:
        return torch.randint(within - size + 1, (*shape, 2), generator=generator).tolist()

    count = len(digits)
    sources = torch.randint(count, (count, FRAGMENTS), generator=generator).tolist()
    cuts = places(FRAGMENT, DIGIT, count, FRAGMENTS)
    pastes = places(FRAGMENT, CANVAS, count, FRAGMENTS)
    homes = places(DIGIT, CANVAS, count)

    images = torch.zeros(count, 1, CANVAS, CANVAS)
    masks = torch.zeros_like(images, dtype=torch.bool)
    for i, digit in enumerate(digits):
        for source, cut, paste in zip(sources[i], cuts[i], pastes[i], strict=True):
            images[i][window(paste, FRAGMENT)] = digits[source][window(cut, FRAGMENT)]
        home = window(homes[i], DIGIT)
        images[i][home] = digit
        masks[i][home] = digit > 0.15
    return Scenes(images, labels, masks)


def window(corner: list[int], size: int) -> tuple[slice, slice, slice]:
    y, x = corner
    return slice(None), slice(y, y + size), slice(x, x + size)


# --- networks -----------------------------------------------------------------------------------


# Both are written so that Captum's LRP can read all of them but the "+" (it has no rule for
# nn.Flatten, say).


class SimpleCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(8),
        )
        self.classifier = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class Block(nn.Module):
    """A residual block as people write it: batch norm, and a functional ``+`` for the skip."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = None
        if stride > 1 or width_in != width:
            self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu2(branch + (x if self.shortcut is None else self.shortcut(x)))


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            Block(16, 16, stride=1),
            Block(16, 32, stride=2),
            Block(32, 64, stride=2),
            nn.AdaptiveAvgPool2d(1),
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def train(model: nn.Module, digits: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    batch = 64
    steps = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        scenes = compose(digits, labels, generator)  # new surroundings every time
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(scenes.images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# --- explanations -------------------------------------------------------------------------------


@dataclass
class Explanation:
    """What one method said about the pictures, or the error it raised instead."""

    method: str
    attributions: Tensor | None = None
    delta: Tensor | None = None
    seconds: tuple[float, ...] = ()  # of the first call, which may prepare things, and the next
    error: str = ""

    def total(self) -> Tensor:
        """Sum of absolute relevance per picture."""
        assert self.attributions is not None
        return self.attributions.abs().flatten(1).sum(1)

    def share(self, masks: Tensor) -> Tensor:
        """Part of the positive relevance that lies on the mask, per picture."""
        assert self.attributions is not None
        positive = self.attributions.clamp(min=0)
        return (positive * masks).flatten(1).sum(1) / positive.flatten(1).sum(1)


def explain(model: nn.Module, images: Tensor, targets: Tensor) -> list[Explanation]:
    """Run every method; the last one may fail, and the figure then shows how."""
    explanations = []
    for name, method in (
        ("Relative LRP", RelativeLRP(model)),
        ("input × gradient", InputXGradient(model)),
        ("Captum LRP", LRP(model)),
    ):
        explanation = Explanation(name)
        try:
            for _ in range(2):
                inputs = images.clone().requires_grad_(not isinstance(method, RelativeLRP))
                start = time.perf_counter()
                result = method.attribute(inputs, target=targets)
                explanation.seconds += (time.perf_counter() - start,)
                explanation.attributions = result.detach()
            if method.has_convergence_delta():
                _, explanation.delta = method.attribute(
                    inputs, target=targets, return_convergence_delta=True
                )
        except Exception as error:
            if isinstance(method, RelativeLRP):
                raise
            explanation.error = f"{type(error).__name__}: {error}"
        explanations.append(explanation)
    return explanations


# --- figure -------------------------------------------------------------------------------------


def choose(labels: Tensor) -> list[int]:
    """The first picture of each class until there are enough, right or wrong."""
    firsts: dict[int, int] = {}
    for index, label in enumerate(labels.tolist()):
        firsts.setdefault(label, index)
    return list(firsts.values())[:SHOWN]


def draw(
    path: Path, name: str, scenes: Scenes, predicted: Tensor, explanations: list[Explanation]
) -> None:
    chosen = choose(scenes.labels)
    columns = 1 + len(explanations)
    size = (2.3 * columns, 2.45 * len(chosen) + 1.5)
    figure, grid = plt.subplots(len(chosen), columns, figsize=size, layout="constrained")
    figure.suptitle(
        f"{name}: which pixels speak for the digit it named?\n"
        "red: for it · blue: against it · outline: where the digit is (the network is never told)",
        fontsize=11,
    )
    grid[0, 0].set_title("picture", fontsize=12, fontweight="bold")
    for axis, explanation in zip(grid[0, 1:], explanations, strict=True):
        axis.set_title(explanation.method, fontsize=12, fontweight="bold")
    for index, axes in zip(chosen, grid, strict=True):
        label, guess = int(scenes.labels[index]), int(predicted[index])
        axes[0].imshow(scenes.images[index, 0], cmap="gray_r", vmin=0, vmax=1)
        verdict = f"named {guess}" if guess == label else f"named {guess}, is a {label}"
        axes[0].set_xlabel(verdict, fontsize=10)
        for axis, explanation in zip(axes[1:], explanations, strict=True):
            draw_panel(axis, explanation, index, scenes.masks)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_panel(axis: Axes, explanation: Explanation, index: int, masks: Tensor) -> None:
    if explanation.attributions is None:
        text = textwrap.fill(explanation.error, 28)
        axis.text(0.5, 0.5, text, ha="center", va="center", fontsize=7, color="darkred")
        return
    relevance = explanation.attributions[index, 0]
    finite = bool(relevance.isfinite().all())
    scale = float(relevance.abs().max()) if finite else 1.0
    axis.imshow(relevance, cmap="seismic", vmin=-(scale or 1.0), vmax=scale or 1.0)
    axis.contour(masks[index, 0], levels=[0.5], colors="black", linewidths=0.5, alpha=0.6)
    if finite:
        total, share = float(explanation.total()[index]), float(explanation.share(masks)[index])
        axis.set_xlabel(f"Σ|R| = {total:.3g}   on digit: {share:.0%}", fontsize=8.5)
    else:
        axis.set_xlabel("NaN or infinite", fontsize=8.5, color="darkred")


# --- the whole ----------------------------------------------------------------------------------


def report(explanations: list[Explanation], scenes: Scenes) -> None:
    ink = (scenes.images * scenes.masks).flatten(1).sum(1) / scenes.images.flatten(1).sum(1)
    print(f"  of the ink in the pictures, {ink.mean():.0%} is the digit's")
    print(f"  {'':<18}{'Σ|R|':>22}{'largest |delta|':>17}{'on digit':>10}{'seconds':>18}")
    for e in explanations:
        if e.attributions is None:
            print(f"  {e.method:<18}{e.error}")
            continue
        total = e.total()
        spread = f"{total.min():.3g} … {total.max():.3g}"
        delta = "" if e.delta is None else f"{e.delta.abs().max():.2g}"
        share = f"{e.share(scenes.masks).mean():.0%}"
        seconds = ", then ".join(f"{value:.2f}" for value in e.seconds)
        print(f"  {e.method:<18}{spread:>22}{delta:>17}{share:>10}{seconds:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    train_digits, test_digits = load_split()
    scenes = compose(*test_digits, torch.Generator().manual_seed(2))
    figures = []
    for name, build, epochs, file in (
        ("A simple CNN", SimpleCNN, 15, "simple_cnn.png"),
        ("A residual network", ResidualNet, 8, "residual_net.png"),
    ):
        torch.manual_seed(0)
        start = time.perf_counter()
        model = train(build(), *train_digits, epochs)
        with torch.no_grad():
            predicted = model(scenes.images).argmax(1)
        accuracy = (predicted == scenes.labels).double().mean()
        print(
            f"{name}: {accuracy:.1%} of {len(predicted)} test pictures right, "
            f"trained in {time.perf_counter() - start:.0f} s; explaining all of them"
        )
        explanations = explain(model, scenes.images, predicted)
        report(explanations, scenes)
        draw(out / file, name, scenes, predicted, explanations)
        figures.append(out / file)
    print(
        "Captum's LRP reports delta in units of the logit, Relative LRP as a share of the mass.\n"
        "The first call of Relative LRP captures the network's graph; later ones reuse it."
    )
    print("Figures:", *(path.resolve() for path in figures), sep="\n  ")


if __name__ == "__main__":
    main()
