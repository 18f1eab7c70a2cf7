"""torchvision's networks against the float64 oracle, and at their real size against the laws."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from captum_rlrp import RelativeLRP
from tests.oracle import Value, agrees, explain, frozen, randomise_norms, relative_error
from tests.paths import TOLERANCE, all_paths

# ---- the oracle's walk through VGG and ResNet, by hand -------------------------------------------


def vgg_features(layers: nn.Sequential, x: Value) -> Value:
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            x = x.act(torch.relu)
        elif isinstance(layer, nn.MaxPool2d):
            x = x.route(layer)
        else:
            assert isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
            x = x.spatial(layer) if isinstance(layer, nn.Conv2d) else x.move(layer)
    return x


def vgg(model: torchvision.models.VGG) -> Callable[[Value], Value]:
    def twin(x: Value) -> Value:
        x = vgg_features(model.features, x).pool(model.avgpool).move(lambda t: t.flatten(1))
        first, _, _, second, _, _, third = model.classifier
        return x.dense(first).act(torch.relu).dense(second).act(torch.relu).dense(third)

    return twin


def residual_block(block: BasicBlock | Bottleneck, x: Value) -> Value:
    h = x.spatial(block.conv1).move(block.bn1).act(torch.relu)
    h = h.spatial(block.conv2).move(block.bn2)
    if isinstance(block, Bottleneck):
        h = h.act(torch.relu).spatial(block.conv3).move(block.bn3)
    skip = x
    if block.downsample is not None:
        conv, norm = block.downsample
        skip = x.spatial(conv).move(norm)
    return (h + skip).act(torch.relu)


def resnet(model: torchvision.models.ResNet) -> Callable[[Value], Value]:
    def twin(x: Value) -> Value:
        x = x.spatial(model.conv1).move(model.bn1).act(torch.relu).route(model.maxpool)
        for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
            for block in layer:
                x = residual_block(block, x)
        return x.pool(model.avgpool).move(lambda t: t.flatten(1)).dense(model.fc)

    return twin


# ---- blocks --------------------------------------------------------------------------------------


class WithHead(nn.Module):
    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.body(x), 2).mean(2))


def check(model: nn.Module, make_twin: Callable, x: Tensor, targets: list[int]) -> None:
    model = frozen(randomise_norms(model))
    agrees(make_twin(model), model, x)
    (expected,) = explain(make_twin(model), (x,), targets)
    for dtype, tolerance in TOLERANCE.items():
        (attribution,) = all_paths(frozen(model, dtype), x.to(dtype), targets)
        assert relative_error(attribution, expected) <= tolerance


def _downsample(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))


BLOCKS: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "basic": (lambda: [BasicBlock(4, 4), BasicBlock(4, 4)], 4),
    "basic, strided": (lambda: [BasicBlock(4, 6, 2, _downsample(4, 6, 2)), BasicBlock(6, 6)], 6),
    "bottleneck": (lambda: [Bottleneck(4, 1), Bottleneck(4, 1)], 4),
    "bottleneck, strided": (lambda: [Bottleneck(4, 2, 2, _downsample(4, 8, 2))], 8),
    "bottleneck, grouped": (
        lambda: [Bottleneck(4, 2, 1, _downsample(4, 8, 1), groups=2, base_width=64)],
        8,
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_residual_blocks(name: str) -> None:
    factory, channels = BLOCKS[name]

    def make_twin(model: WithHead) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            for block in model.body:
                x = residual_block(block, x)
            return x.pool(lambda t: t.mean((2, 3))).dense(model.head)

        return twin

    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    check(WithHead(nn.Sequential(*factory()), channels), make_twin, x, [2, 0])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_vgg_block(batch_norm: bool) -> None:
    cfg: list = [4, "M", 6, 6, "M"]
    features = torchvision.models.vgg.make_layers(cfg, batch_norm=batch_norm)

    def make_twin(model: WithHead) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            return (
                vgg_features(model.body, x).pool(lambda t: t.flatten(2).mean(2)).dense(model.head)
            )

        return twin

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    check(WithHead(features, 6), make_twin, x, [1, 2])


# ---- whole networks ------------------------------------------------------------------------------


def test_resnet18() -> None:
    model = torchvision.models.resnet18(num_classes=10)
    check(model, resnet, torch.randn(2, 3, 32, 32, dtype=torch.float64), [3, 7])


@pytest.mark.parametrize("arch", ["vgg11", "vgg11_bn"])
def test_vgg11(arch: str) -> None:
    model = getattr(torchvision.models, arch)(num_classes=10)
    model.avgpool = nn.AdaptiveAvgPool2d(1)  # the classifier's 100 million weights add nothing
    model.classifier[0] = nn.Linear(512, 64)
    model.classifier[3] = nn.Linear(64, 32)
    model.classifier[6] = nn.Linear(32, 10)
    check(model, vgg, torch.randn(2, 3, 32, 32, dtype=torch.float64), [0, 9])


@pytest.mark.parametrize("arch", ["vgg16", "resnet50", "resnext50_32x4d"])
def test_real_size(arch: str) -> None:
    """The whole list is run by scripts/coverage.py."""
    model = randomise_norms(getattr(torchvision.models, arch)(weights=None)).eval()
    x = torch.randn(1, 3, 224, 224)
    attribution, delta = RelativeLRP(model).attribute(x, 281, return_convergence_delta=True)
    assert attribution.shape == x.shape
    assert attribution.isfinite().all()
    assert 0 < attribution.double().abs().sum() <= 1 + 1e-5
    assert delta.item() <= 1e-4
