"""Free photographs, explained on EfficientNet-Lite0: ``python -m evaluation.gallery``."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from evaluation import real
from evaluation.measures import relevance
from evaluation.real_methods import OURS, prepare

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGE = (
    Path(__file__).resolve().parent.parent / "docs" / "images" / "evaluation" / "photographs.jpg"
)
METHODS = (OURS, "EpsilonPlus", "Grad-CAM", "integrated gradients", "input×gradient")

# Explained is a class that the network names first or, the cat, second by a hair. The dahlia is
# none of its thousand classes.
PHOTOGRAPHS = {
    "cat": ("skimage", "chelsea", "Egyptian cat", 285),
    "coffee": ("skimage", "coffee", "espresso", 967),
    "rocket": ("skimage", "rocket", "missile", 657),
    "flower": ("sklearn", "flower.jpg", "daisy", 985),
    "temple": ("sklearn", "china.jpg", "palace", 698),
}


def photograph(source: str, name: str) -> Tensor:
    """The middle 224×224 of a picture that is installed with its library, in [0, 1]."""
    if source == "skimage":
        from skimage import data

        pixels = getattr(data, name)()
    else:
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(name)
    picture = torch.tensor(np.array(pixels)[:, :, :3]).permute(2, 0, 1).float() / 255
    return v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(picture)


def main() -> None:
    network = real.efficientnet_lite0()
    pictures = torch.stack([photograph(*entry[:2]) for entry in PHOTOGRAPHS.values()])
    inputs = (pictures - 0.5) / 0.5
    scores = network(inputs).softmax(1)
    for name, row in zip(PHOTOGRAPHS, scores, strict=True):
        top = row.topk(3)
        print(name, [f"{i}: {p:.2f}" for p, i in zip(*map(Tensor.tolist, top), strict=True)])
    targets = torch.tensor([entry[3] for entry in PHOTOGRAPHS.values()])
    maps = {m: relevance(prepare(m, "lite0", network)(inputs, targets)) for m in METHODS}
    draw(pictures, maps)


def draw(pictures: Tensor, maps: dict[str, Tensor]) -> None:
    """A row for each photograph; red speaks for the class, blue against it."""
    rows, columns = len(pictures), 1 + len(maps)
    figure, grid = plt.subplots(
        rows, columns, figsize=(1.75 * columns, 1.8 * rows + 0.2), layout="constrained"
    )
    for row, (name, entry) in enumerate(PHOTOGRAPHS.items()):
        grid[row, 0].imshow(pictures[row].permute(1, 2, 0).clamp(0, 1))
        grid[row, 0].set_ylabel(f"{name}: {entry[2]}", fontsize=8)
        for axis, (method, values) in zip(grid[row, 1:], maps.items(), strict=True):
            r = values[row].view(224, 224)
            scale = float(r.abs().quantile(0.995))
            axis.imshow(r, cmap="seismic", vmin=-scale, vmax=scale)
            if row == 0:
                axis.set_title(
                    method, fontsize=9, fontweight="bold" if method == OURS else "normal"
                )
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(IMAGE, dpi=80, pil_kwargs={"quality": 85})
    plt.close(figure)


if __name__ == "__main__":
    main()
