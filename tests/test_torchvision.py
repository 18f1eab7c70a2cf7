"""Architectures of torchvision, from CNNs to transformers; scripts/coverage.py runs them all."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.densenet import DenseNet
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from captum_rlrp import RelativeLRP
from captum_rlrp.graph.capture import CapturedGraph
from tests.oracle import randomise_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def inception() -> nn.Module:
    model = models.googlenet(weights=None, init_weights=False, num_classes=7, aux_logits=False)
    model.transform_input = True
    return model


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(12, 24, 2), CNBlockConfig(24, None, 2)]
    return models.ConvNeXt(blocks, layer_scale=0.5, num_classes=7)


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, 2, 4, 24, 48, num_classes=7)


def swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=7)


def swin_v2() -> nn.Module:
    return models.SwinTransformer(
        [4, 4], 12, [2, 1], [2, 4], [4, 4], num_classes=7,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip


def maxvit() -> nn.Module:
    return MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.0, num_classes=7)


def densenet() -> nn.Module:
    return DenseNet(4, (2, 2), 8, num_classes=7)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mobilenet_v2": (partial(models.mobilenet_v2, width_mult=0.35, num_classes=7), 32),
    "mobilenet_v3_small": (partial(models.mobilenet_v3_small, num_classes=7), 32),
    "shufflenet_v2_x0_5": (partial(models.shufflenet_v2_x0_5, num_classes=7), 32),
    "squeezenet1_1": (partial(models.squeezenet1_1, num_classes=7), 32),
    "mnasnet0_5": (partial(models.mnasnet0_5, num_classes=7), 32),
    "efficientnet_b0": (partial(models.efficientnet_b0, num_classes=7), 32),
    "regnet_x_400mf": (partial(models.regnet_x_400mf, num_classes=7), 32),
    "regnet_y_400mf": (partial(models.regnet_y_400mf, num_classes=7), 32),
    "googlenet": (inception, 32),
    "densenet": (densenet, 32),
    "convnext": (convnext, 32),
    "vit": (vit, 32),
    "swin": (swin, 32),
    "swin_v2": (swin_v2, 32),
    "maxvit": (maxvit, 32),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name: str, captured_once: list[CapturedGraph]) -> None:
    make, size = ARCHITECTURES[name]
    model = randomise_norms(make()).eval()
    with torch.no_grad():  # heads and the like start at 0
        for parameter in model.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(0, 0.1)
    x = torch.randn(2, 3, size, size)
    attribution, delta = RelativeLRP(model).attribute(x, [1, 4], return_convergence_delta=True)
    assert attribution.shape == x.shape
    assert attribution.isfinite().all()
    assert delta.max() <= 1e-4
    mass = attribution.double().abs().flatten(1).sum(1)
    # At this size some end in a map of one pixel, where relevance of both signs takes the same way.
    assert ((mass > 1e-6) & (mass <= 1 + 1e-4)).all()

    # In double precision the two backends can be told apart from rounding, and so can samples.
    captured_once.clear()
    model, x = model.double(), x.double()
    compiled = RelativeLRP(model).attribute(x, [1, 4])
    reference = RelativeLRP(model, backend="reference")
    close(compiled, reference.attribute(x, [1, 4]))
    close(compiled[1:], reference.attribute(x[1:], 4))
    close(compiled, attribution.double(), 2e-2)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
