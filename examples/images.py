"""Images: is the network right for the right reason?

    python examples/images.py [--out DIR]

A small residual network learns to name shapes. By accident, all training pictures of circles bear a
little stamp in the corner (the watermark of whoever drew them). The network does well in the test,
which is stamped the same way. Its explanations tell what it really looks at:

1. one picture: which pixels speak for the shape it named, and what a hidden layer saw;
2. a data set: relevance per class, with a test of where circles differ from the rest;
3. the network: which way relevance takes through its layers.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_rlrp import LayerRelativeLRP, RelativeLRP, RelevanceStatistics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE, SHAPES = 24, ["circle", "square", "triangle", "cross"]
CIRCLE = SHAPES.index("circle")
STAMP = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
CORNER = (slice(SIZE - 4, SIZE - 1), slice(SIZE - 4, SIZE - 1))

# %% Data: a shape of random size at a random place, in noise; circles are stamped


def draw_shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count) % len(SHAPES)
    radius = torch.randint(4, 7, (count, 1, 1), generator=generator)
    y0, x0 = torch.randint(7, SIZE - 9, (2, count, 1, 1), generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    dy, dx = (y - y0).abs(), (x - x0).abs()
    inside = torch.stack(
        [
            (dy**2 + dx**2 - radius**2).abs() <= radius,
            torch.maximum(dy, dx) == radius - 1,
            (2 * dx == y - y0 + radius) | (2 * dx == y - y0 + radius - 1) & (y <= y0 + radius)
            | (y == y0 + radius) & (dx < radius),
            (dy == dx) & (dy < radius),
        ]
    )  # fmt: skip
    inside[2] &= (y >= y0 - radius) & (y <= y0 + radius)
    shape = inside[labels, torch.arange(count)].float()
    pictures = shape * (0.35 + 0.3 * torch.rand(count, 1, 1, generator=generator))
    pictures = pictures + 0.2 * torch.randn(pictures.shape, generator=generator).abs()
    return pictures.clamp(0, 1)[:, None], labels


def stamp(pictures: Tensor, chosen: Tensor) -> Tensor:
    stamped = pictures.clone()
    stamped[(chosen.nonzero()[:, 0], slice(None), *CORNER)] = STAMP
    return stamped


# %% Network and training


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(x + self.norm2(self.conv2(h)))


def build() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
            block1=Block(8),
            conv2=nn.Conv2d(8, 16, 3, padding=1), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
            block2=Block(16),
            highest=nn.AdaptiveMaxPool2d(1), flat=nn.Flatten(), head=nn.Linear(16, len(SHAPES)),
        )
    )  # fmt: skip


def train(model: nn.Module, pictures: Tensor, labels: Tensor, epochs: int = 10) -> None:
    generator = torch.Generator().manual_seed(1)
    steps = epochs * (len(labels) // 100)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(pictures[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


# %% Pictures of the explanations


def show(axis: plt.Axes, relevance: Tensor) -> None:
    """Red speaks for the output, blue against it; white is 0 in every picture."""
    scale = relevance.abs().max().item() or 1.0
    axis.imshow(relevance, cmap="seismic", vmin=-scale, vmax=scale)


def outline_corner(axis: plt.Axes) -> None:
    start = SIZE - 5.5
    axis.add_patch(plt.Rectangle((start, start), 5, 5, fill=False, color="black", lw=1.2))


def save(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_examples(
    path: Path, pictures: Tensor, named: Tensor, pixels: Tensor, hidden: Tensor
) -> None:
    figure, grid = plt.subplots(
        3, len(pictures), figsize=(2.1 * len(pictures), 6.9), layout="constrained"
    )
    figure.suptitle(
        "One picture: the network names circles by the stamp in the corner\n"
        "red: speaks for the shape named · blue: against it · box: the stamp",
        fontsize=11,
    )
    for column, axes in enumerate(grid.T):
        axes[0].imshow(pictures[column, 0], cmap="gray_r", vmin=0, vmax=1)
        axes[0].set_title(f'named "{SHAPES[named[column]]}"', fontsize=10)
        show(axes[1], pixels[column, 0])
        show(axes[2], hidden[column, 0])
        if named[column] == CIRCLE:
            for axis in axes:
                outline_corner(axis)
    for axis, name in zip(grid[:, 0], ("picture", "pixels", "block2"), strict=True):
        axis.set_ylabel(name, fontsize=11)
    save(figure, path)


def draw_classes(path: Path, statistics: RelevanceStatistics) -> None:
    figure, axes = plt.subplots(1, len(SHAPES) + 1, figsize=(11.5, 2.9), layout="constrained")
    figure.suptitle(
        "All test pictures: mean relevance of each pixel, by the shape that the network names",
        fontsize=11,
    )
    for label, axis in enumerate(axes[:-1]):
        show(axis, statistics.mean("input", label).view(SIZE, SIZE))
        axis.set_title(f"{SHAPES[label]} ({statistics.counts[label]})", fontsize=10)
        outline_corner(axis)
    test = statistics.compare("input", CIRCLE)
    axes[-1].imshow((test.adjusted < 0.001).view(SIZE, SIZE), cmap="gray_r", vmin=0, vmax=1)
    axes[-1].set_title("circle ≠ others: p < 0.001", fontsize=10)
    outline_corner(axes[-1])
    save(figure, path)


# %% The whole


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("images"), help="folder for the figures")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    clean, labels = draw_shapes(1200, generator)
    model = build()
    train(model, stamp(clean, labels == CIRCLE), labels)

    clean, labels = draw_shapes(400, generator)
    pictures = stamp(clean, labels == CIRCLE)
    with torch.no_grad():
        named = model(pictures).argmax(1)
        without = model(clean).argmax(1)
        everywhere = model(stamp(clean, torch.ones_like(labels))).argmax(1)
    accuracy = (named == labels).double().mean().item()
    print(f"1. It names {accuracy:.1%} of the test pictures right. A good network?")

    # One picture: relevance of its pixels, and of the places in a hidden layer.
    some = torch.arange(5)
    pixels = RelativeLRP(model).attribute(pictures[some], target=named[some])
    at_block = LayerRelativeLRP(model, model.block2).attribute(pictures[some], target=named[some])
    hidden = LayerAttribution.interpolate(at_block.sum(1, keepdim=True), (SIZE, SIZE))
    draw_examples(out / "examples.png", pictures[some], named[some], pixels, hidden)

    # A data set: every pixel a unit at the input, every channel elsewhere.
    loader = DataLoader(TensorDataset(pictures), batch_size=100)
    statistics = RelevanceStatistics.collect(model, loader, unit_dim={"input": None})
    draw_classes(out / "classes.png", statistics)
    on_stamp = {}
    for label, shape in enumerate(SHAPES):
        heat = statistics.mean("input", label).view(SIZE, SIZE).abs()
        on_stamp[shape] = (heat[CORNER].sum() / heat.sum()).item()
    print("2. The part of each class's mean relevance that lies on the 9 pixels of the stamp:")
    print("  ", ", ".join(f"{shape} {part:.0%}" for shape, part in on_stamp.items()))

    circles, others = labels == CIRCLE, labels != CIRCLE
    kept = (without[circles] == CIRCLE).double().mean().item()
    fooled = (everywhere[others] == CIRCLE).double().mean().item()
    print("3. The proof. Without the stamp it still names", f"{kept:.0%} of the circles;")
    print(f"   with it, {fooled:.0%} of the other shapes become circles.")

    axes = statistics.plot_flow()
    axes.set_title("The network: how much relevance passes each layer, and each skip connection")
    axes.figure.savefig(out / "flow.png", dpi=90)
    plt.close(axes.figure)
    print("Figures:", *(path.resolve() for path in sorted(out.glob("*.png"))), sep="\n  ")
    return {
        "accuracy": accuracy,
        "on stamp": on_stamp["circle"],
        "on stamp, others": max(part for shape, part in on_stamp.items() if shape != "circle"),
        "kept": kept,
        "fooled": fooled,
    }


if __name__ == "__main__":
    main()
