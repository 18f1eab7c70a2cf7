"""The networks, and the routine that trains them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models import resnet, vgg
from tqdm import tqdm

from evaluation.data import Data, Samples
from evaluation.protocol import Protocol


def dense(inputs: int, classes: int) -> nn.Module:
    """Three hidden layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((inputs, 128), (128, 64), (64, 32)):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, classes))


class SimpleCNN(nn.Module):
    """Five convolutions with batch norm, and the largest response over the picture."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, pool in (
            (channels, 16, True),
            (16, 32, True),
            (32, 48, False),
            (48, 64, True),
            (64, 64, False),
        ):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
        self.features = nn.Sequential(*layers)
        self.pool = nn.MaxPool2d(size // 8)
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def narrow_vgg(configuration: str, width: float, classes: int) -> nn.Module:
    """Torchvision's VGG with batch norm, its hidden layers `width` times as wide.

    At width 1 it is torchvision's network. Below, one pooled linear layer takes the place of the
    three dense ones, which hold nine tenths of the parameters and expect 7×7 maps.
    """
    layers = [
        entry if entry == "M" else max(4, int(entry * width)) for entry in vgg.cfgs[configuration]
    ]
    features = vgg.make_layers(layers, batch_norm=True)
    if width == 1:
        return vgg.VGG(features, num_classes=classes)
    network = SmallHeadVGG(features)
    network.classifier = nn.Linear(layers[-2], classes)
    return network


class SmallHeadVGG(vgg.VGG):
    """Torchvision's VGG, and its forward, without building the large dense layers first."""

    def __init__(self, features: nn.Module) -> None:
        nn.Module.__init__(self)
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(1)


def build(name: str, data: Data, width: float) -> nn.Module:
    """A fresh network; torch's seed decides on its weights."""
    classes = len(data.classes)
    if name == "dense":
        network = dense(math.prod(data.shape), classes)
    elif name == "cnn":
        network = SimpleCNN(data.shape[0], data.shape[-1], classes)
    elif name in ("vgg16", "vgg19"):
        network = narrow_vgg({"vgg16": "D", "vgg19": "E"}[name], width, classes)
    elif name == "resnet50":
        # Torchvision narrows the inner layers of the bottlenecks, between the skip connections.
        inner = max(4, int(64 * width))
        network = resnet.ResNet(
            resnet.Bottleneck, [3, 4, 6, 3], classes, zero_init_residual=True, width_per_group=inner
        )
    else:
        raise ValueError(f"there is no network {name!r}")
    return in_eval(network)


def in_eval(network: nn.Module) -> nn.Module:
    """Evaluation mode, with ReLUs that leave their input alone, as hooks of some methods need."""
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return network.eval()


def pretrained(arch: str, weights: str) -> nn.Module:
    """One of torchvision's classifiers with weights of that name or in that file."""
    if Path(weights).is_file():
        state = torch.load(weights, map_location="cpu", weights_only=True)
        outputs = next(v for k, v in reversed(state.items()) if k.endswith("bias")).shape[0]
        network = models.get_model(arch, num_classes=outputs)
        network.load_state_dict(state)
    else:
        network = models.get_model(arch, weights=weights)
    return in_eval(network)


def cam_layers(network: nn.Module) -> Iterator[nn.Module]:
    """Layers that Grad-CAM may read, from the input on."""
    if isinstance(network, resnet.ResNet):
        yield from (network.layer1, network.layer2, network.layer3, network.layer4)
    elif isinstance(features := getattr(network, "features", None), nn.Sequential):
        yield from (module for module in features if isinstance(module, nn.ReLU))


def train(
    network: nn.Module, data: Data, protocol: Protocol, steps: int, seed: int, device: str
) -> nn.Module:
    """Cross-entropy against the classes in the picture, AdamW, one cycle of the learning rate."""
    generator = torch.Generator().manual_seed(1000 + seed)
    network = network.to(device).train()
    rate = protocol.learning_rate
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in tqdm(range(steps), desc="train", leave=False, disable=None):
        inputs, present = data.batch(protocol.batch, generator)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs.to(device)), present.to(device)).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, samples: Samples, device: str) -> float:
    """Share of samples whose k classes are just the k likeliest ones."""
    right = 0
    for inputs, present in zip(
        samples.inputs.split(100), (samples.present > 0).split(100), strict=True
    ):
        order = network(inputs.to(device)).cpu().argsort(1, descending=True)
        found = present.gather(1, order).long().cumsum(1)
        wanted = present.sum(1, keepdim=True)
        right += int((found.gather(1, wanted - 1) == wanted).sum())
    return right / len(samples.inputs)
