"""Comparing methods: who finds the pixels that matter, and who says the same twice?

    python examples/comparing_methods.py [--out DIR]

Relative LRP takes the place of any other Captum method, so Captum's measures apply to it as they
are. Here it stands beside input×gradient, integrated gradients and Captum's LRP on a small network
for handwritten digits, by three measures, each lower where better:

* flipping: take away the most relevant pixels first; the mean probability of the class meanwhile;
* infidelity: how far the attributions are from predicting what noise does to the output;
* sensitivity: how much the explanation changes (relatively) under a change too small to see.

What a reader should see: all find what matters, far ahead of chance. On so shallow a network
the methods that follow the gradient are ahead, in flipping and in infidelity: its signs
are still right. On deep networks they are far behind (``docs/evaluation.md``). Relative LRP is
steadier than the gradient. (By its default rule Captum's LRP is input×gradient in any network of
ReLUs.) No measure settles which explanation is right.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from captum.attr import LRP, InputXGradient, IntegratedGradients
from captum.metrics import infidelity, sensitivity_max
from sklearn.datasets import load_digits
from torch import Tensor, nn

from captum_rlrp import RelativeLRP

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Explain = Callable[..., Tensor]

# %% Data and network


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    learn, test = order[:1500], order[1500:]
    return images[learn], labels[learn], images[test], labels[test]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(10):
        for chosen in torch.randperm(len(labels), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    model.eval()


# %% Methods and measures


def methods(model: nn.Module) -> dict[str, Explain]:
    def random(inputs: Tensor, target: Tensor) -> Tensor:
        return torch.rand(inputs.shape, generator=torch.Generator().manual_seed(3))

    def brightness(inputs: Tensor, target: Tensor) -> Tensor:
        return inputs.clone()

    return {
        "Relative LRP": RelativeLRP(model).attribute,
        "input × gradient": InputXGradient(model).attribute,
        "integrated gradients": partial(IntegratedGradients(model).attribute, n_steps=20),
        "Captum LRP": LRP(model).attribute,
        "the brightest pixel": brightness,  # what anybody can say without the network
        "chance": random,
    }


def flipping(model: nn.Module, images: Tensor, target: Tensor, attributions: Tensor) -> Tensor:
    """Probability of the class with the 0, 1, 2, ... most relevant pixels taken away."""
    order = attributions.flatten(1).argsort(descending=True)
    left = images.flatten(1).clone()
    curve = []
    for k in range(left.shape[1] + 1):
        with torch.no_grad():
            scores = model(left.view_as(images)).softmax(1)
        curve.append(scores.gather(1, target[:, None]).mean())
        if k < left.shape[1]:
            left.scatter_(1, order[:, k : k + 1], 0)
    return torch.stack(curve)


def noise(inputs: Tensor) -> tuple[Tensor, Tensor]:
    change = 0.1 * torch.randn_like(inputs)
    return change, inputs - change


# %% The whole

STYLES: dict[str, dict] = {
    "Relative LRP": {"color": "#c8443c", "linewidth": 3},
    "input × gradient": {"color": "#3f6fb5", "linewidth": 2},
    "integrated gradients": {"color": "#e0a030"},
    "Captum LRP": {"color": "black", "linestyle": ":", "linewidth": 2},
    "the brightest pixel": {"color": "gray", "linestyle": "-."},
    "chance": {"color": "gray", "linestyle": "--"},
}


def draw(path: Path, images: Tensor, named: Tensor, heat: dict[str, Tensor], curves: dict) -> None:
    figure = plt.figure(figsize=(12.5, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    grid = left.subplots(len(images), 1 + len(heat))
    left.suptitle("What they say   (red: for the digit named · blue: against it)", fontsize=11)
    for row, axes in enumerate(grid):
        axes[0].imshow(images[row, 0], cmap="gray_r")
        axes[0].set_ylabel(f"named {int(named[row])}")
        for axis, (name, relevance) in zip(axes[1:], heat.items(), strict=True):
            scale = relevance[row].abs().max()
            axis.imshow(relevance[row, 0], cmap="seismic", vmin=-scale, vmax=scale)
            if row == 0:
                axis.set_title(name, fontsize=9)
        for axis in axes:
            axis.set_xticks([])
            axis.set_yticks([])
    axis = right.subplots()
    axis.set_title("How well they find what matters   (lower is better)", fontsize=11)
    for name, curve in curves.items():
        axis.plot(100 * torch.linspace(0, 1, len(curve)), curve, label=name, **STYLES[name])
    axis.set_xlabel("% of the pixels taken away, the most relevant first")
    axis.set_ylabel("mean probability of the digit named")
    axis.set_xlim(0, 100)
    axis.set_ylim(0, 1)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("methods"), help="folder for the figure")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)

    learn, learn_labels, images, labels = load()
    torch.manual_seed(0)
    model = Net()
    train(model, learn, learn_labels)
    with torch.no_grad():
        named = model(images).argmax(1)
    accuracy = (named == labels).double().mean().item()
    images, named = images[:100], named[:100]
    print(f"{accuracy:.1%} of {len(labels)} test digits right; explaining {len(images)} of them")

    heat, curves, results = {}, {}, {}
    print(f"  {'':<22}{'flipping':>9}{'infidelity':>12}{'sensitivity':>13}{'ms/image':>10}")
    for name, explain in methods(model).items():
        start = time.perf_counter()
        attributions = explain(images, target=named).detach()
        milliseconds = 1000 * (time.perf_counter() - start) / len(images)
        curves[name] = flipping(model, images, named, attributions)
        result = {"flipping": curves[name].mean().item()}
        line = f"  {name:<22}{result['flipping']:>9.3f}"
        if name not in ("the brightest pixel", "chance"):
            heat[name] = attributions[:4]
            torch.manual_seed(2)
            result["infidelity"] = infidelity(
                model, noise, images, attributions,
                target=named, n_perturb_samples=20, normalize=True,
            ).mean().item()  # fmt: skip
            result["sensitivity"] = sensitivity_max(
                explain, images, perturb_radius=0.02, n_perturb_samples=5, target=named
            ).mean().item()  # fmt: skip
            line += f"{result['infidelity']:>12.3f}{result['sensitivity']:>13.3f}"
            line += f"{milliseconds:>10.2f}"
        print(line)
        results[name] = result
    draw(out / "methods.png", images[:4], named, heat, curves)
    print("The first call of Relative LRP, which is timed here, captures the network's graph, too.")
    print("Figure:", (out / "methods.png").resolve(), sep="\n  ")
    return {"network": {"accuracy": accuracy}} | results


if __name__ == "__main__":
    main()
