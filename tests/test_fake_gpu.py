"""Whole explanations on tensors of a GPU that is not there.

PyTorch's fake tensors have a device, a shape and no memory. They refuse what mixes devices and what
reads a value, for which a real GPU would have to be waited for. What is computed, they cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torchvision import models

from captum_rlrp import RelativeLRP
from captum_rlrp.run.engine import Engine


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.last = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0].mean(1))


class Signal(nn.Module):
    """Layers of one dimension, a gate, a skip, and a module that makes tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv1d(3, 16, 7, 2, 3), nn.BatchNorm1d(16), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.gate = nn.Conv1d(16, 16, 1)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool1d(self.first(x), 2)
        x = torch.relu(x + self.branch(x)) * self.gate(x).sigmoid()
        ramp = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        return self.last((x * ramp).amax(2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(x)[:, 0])


CASES: dict[str, tuple[Callable[[], nn.Module], Sequence[int]]] = {
    "ResNet18": (models.resnet18, (3, 64, 64)),
    "VGG11 with batch norm": (models.vgg11_bn, (3, 64, 64)),
    "MobileNetV3": (models.mobilenet_v3_small, (3, 64, 64)),
    "DenseNet": (lambda: models.DenseNet(4, (2, 2), 8), (3, 64, 64)),
    "recurrent": (Recurrent, (7, 6)),
    "signal": (Signal, (3, 64)),
    "attention": (Attention, (5, 8)),
}


def move(module: nn.Module) -> None:
    """Puts parameters without memory in the place of the module's own."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cuda"))
            part._parameters[name] = fake
        for name, value in list(part.named_buffers(recurse=False)):
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


@pytest.fixture
def without_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be done: the look at the sums, and autograd, whose engine asks for the device."""

    def gradient(y: Tensor, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        return (torch.empty_like(x),)

    monkeypatch.setattr(Engine, "_check_finite", lambda *_: None)
    monkeypatch.setattr(torch.autograd, "grad", gradient)


@pytest.mark.usefixtures("without_values")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # by which memory is told apart
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_all_stays_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    make, shape = CASES[name]
    model = make().eval().to(dtype)
    with FakeTensorMode(shape_env=ShapeEnv()):
        move(model)
        rlrp = RelativeLRP(model)
        for batch in (2, 3):
            x = torch.empty(batch, *shape, dtype=dtype, device="cuda")
            attribution, delta = rlrp.attribute(
                x, target=[1] * batch, return_convergence_delta=True
            )
            assert (attribution.shape, attribution.dtype) == (x.shape, dtype)
            assert attribution.device == delta.device == x.device
            assert attribution.is_contiguous()


@pytest.mark.usefixtures("without_values")
def test_a_read_is_noticed() -> None:
    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1, keepdim=True)

    rlrp = RelativeLRP(Reads())
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(2, 3, device="cuda")
        with pytest.raises(Exception, match="data-dependent"):
            rlrp.attribute(x, target=lambda y: [0] * int(y.sum()))
