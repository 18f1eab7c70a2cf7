"""Whole models: the compiled kernels and the fused forward against the plain reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

from captum_rlrp import LayerRelativeLRP, NonFiniteError, RelativeLRP
from captum_rlrp.kernels import compiled, extension
from captum_rlrp.plan import instructions
from captum_rlrp.rules import Pass
from captum_rlrp.run.magnitudes import magnitudes
from captum_rlrp.run.program import Program

# Relative to the reference in float64, as a share of Σ|R|.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 0.25,
    torch.float16: 0.05,
}


def build(name: str) -> nn.Module:
    """A torchvision network whose batch norms do something."""
    torch.manual_seed(5)
    model = models.get_model(name, weights=None).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def narrow(model: nn.Module) -> nn.Module:
    """VGG's head holds nearly all of its weights: 64 units in place of 4096."""
    if isinstance(model, models.VGG):
        layers = (nn.Linear(25088, 64), nn.Linear(64, 64), nn.Linear(64, 1000))
        model.classifier[0], model.classifier[3], model.classifier[6] = layers
    return model


def distances(actual: Tensor, expected: Tensor) -> Tensor:
    """For each sample, the share of its Σ|R| that lies elsewhere."""
    gap = (actual.double().cpu() - expected.double().cpu()).abs().flatten(1).sum(1)
    return gap / expected.double().cpu().abs().flatten(1).sum(1)


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest of them."""
    return float(distances(actual, expected).max())


def test_the_compiled_backend_is_what_auto_takes() -> None:
    assert extension.available(), extension.load_error()
    assert RelativeLRP(nn.Linear(2, 2))._engine.kernels is compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_compiled_equals_reference_at_full_size(name: str) -> None:
    model, x = build(name), torch.randn(8, 3, 224, 224)
    expected = RelativeLRP(model, backend="reference").attribute(x, target=7)
    actual = RelativeLRP(model, backend="compiled").attribute(x, target=7)
    # Two elements of a window may be equal up to rounding, and each backend rounds otherwise:
    # then all that VGG's last pooling gives one of them lies elsewhere. That befalls a sixth of the
    # samples; of 48 others that were tried it moved one by 0.013, the rest by up to 0.005.
    apart = distances(actual, expected)
    without_ties = apart.max() if name == "resnet50" else apart.min()
    assert without_ties < TOLERANCE[torch.float32]
    assert apart.max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "resnet50"])
def test_compiled_equals_reference_at_full_size_in_float64(name: str) -> None:
    model, x = build(name).double(), torch.randn(1, 3, 224, 224, dtype=torch.float64)
    expected = RelativeLRP(model, backend="reference").attribute(x, target=7)
    actual = RelativeLRP(model, backend="compiled").attribute(x, target=7)
    assert distance(actual, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_equals_the_float64_reference(
    name: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    model, x = narrow(build(name)).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = RelativeLRP(model, backend="reference").attribute(x, target=[1, 2])
    x = x.to(dtype).contiguous(memory_format=layout)
    actual = RelativeLRP(model.to(dtype), backend="compiled").attribute(x, target=[1, 2])
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert distance(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "mobilenet_v2"])
def test_the_ways_of_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales applied behind a convolution, and absolute values of all weights worked out ahead."""
    propagate = Program.propagate
    ahead: list[int] = []

    def with_magnitudes(program: Program, run: Pass, *args: Any) -> Any:
        nodes = [node for _, read, _ in program.back for node in read]
        run.magnitudes.update(magnitudes(nodes, run.values))
        ahead.append(len(nodes))
        return propagate(program, run, *args)

    model, x = build(name).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = RelativeLRP(model, backend="reference").attribute(x, target=[1, 2])
    monkeypatch.setattr(instructions, "_adds_bias", lambda x: False)
    monkeypatch.setattr(Program, "propagate", with_magnitudes)
    actual, delta = RelativeLRP(model).attribute(x, target=[1, 2], return_convergence_delta=True)
    assert min(ahead) > 7
    assert distance(actual, expected) < TOLERANCE[torch.float64]
    assert delta.max() < 1e-10


class Convolutions(nn.Module):
    """Convolutions that :mod:`kernels.convolution` covers, in all the ways that a forward fuses."""

    def __init__(self, activation: nn.Module, padding: Any, channels: int) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Conv2d(channels, 64, 3, padding=padding, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.left = nn.Conv2d(64, 32, 3, padding=(0, 2))
        self.right = nn.Conv2d(64, 32, 3, padding=(0, 2), bias=False)
        self.last = nn.Conv2d(32, 32, 3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.uniform_(self.norm.weight, -1.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.2, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        x = torch.relu(x + self.second(x))  # two consumers: not to be written over
        x = self.left(x) - self.activation(self.right(x))
        return self.activation(self.last(x)).mean((2, 3))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(), nn.Identity()], ids=str
)
@pytest.mark.parametrize("padding", [1, 0, "same"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("channels", [32, 3])
def test_our_convolutions_in_a_model(
    activation: nn.Module, padding: Any, layout: torch.memory_format, channels: int
) -> None:
    torch.manual_seed(3)
    model = Convolutions(activation, padding, channels).eval().to(memory_format=layout)
    x = torch.randn(3, channels, 13, 14)
    method = RelativeLRP(model, backend="compiled")
    actual, delta = method.attribute(x, target=5, return_convergence_delta=True)
    layers = [
        LayerRelativeLRP(model, layer, backend="compiled").attribute(x, target=5)
        for layer in (model.first, model.second)
    ]
    model, wide = model.double(), x.double()
    expected = RelativeLRP(model, backend="reference").attribute(wide, target=5)
    assert distance(actual, expected) < TOLERANCE[torch.float32]
    assert distance(method.attribute(wide, target=5), expected) < TOLERANCE[torch.float64]
    assert delta.max() < 1e-4
    for layer, found in zip((model.first, model.second), layers, strict=True):
        expected = LayerRelativeLRP(model, layer, backend="reference").attribute(wide, target=5)
        assert distance(found, expected) < TOLERANCE[torch.float32]


class Lines(nn.Module):
    """The same along one axis: of signals, with a stride, and of images as Inception has them."""

    def __init__(self, activation: nn.Module, padding: int) -> None:
        super().__init__()
        self.activation = activation
        self.first = nn.Conv1d(32, 64, 7, stride=2, padding=padding, bias=False)
        self.norm = nn.BatchNorm1d(64)
        self.second = nn.Conv1d(64, 64, 5, padding=2)
        self.third = nn.Conv1d(64, 32, 4, stride=2, padding=padding)
        self.down = nn.Conv2d(32, 64, (7, 1), padding=(3, 0))
        self.along = nn.Conv2d(64, 32, (1, 3), stride=(1, 2), padding=(0, 1))
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.uniform_(self.norm.weight, -1.5, 1.5)
        nn.init.uniform_(self.norm.bias, -0.2, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(self.first(x)))
        x = torch.relu(x + self.second(x))
        x = self.activation(self.third(x))
        x = x[:, :, :12].unflatten(2, (3, 4))
        return self.along(self.activation(self.down(x))).mean((2, 3))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.SiLU(), nn.LeakyReLU(), nn.Identity()], ids=str
)
@pytest.mark.parametrize("padding", [3, 0])
@pytest.mark.parametrize("batch", [1, 3])
def test_our_convolutions_along_one_axis_in_a_model(
    activation: nn.Module, padding: int, batch: int
) -> None:
    torch.manual_seed(3)
    model = Lines(activation, padding).eval()
    x = torch.randn(batch, 32, 71)
    method = RelativeLRP(model, backend="compiled")
    actual, delta = method.attribute(x, target=5, return_convergence_delta=True)
    found = LayerRelativeLRP(model, model.second, backend="compiled").attribute(x, target=5)
    model, wide = model.double(), x.double()
    expected = RelativeLRP(model, backend="reference").attribute(wide, target=5)
    assert distance(actual, expected) < TOLERANCE[torch.float32]
    assert delta.max() < 1e-4
    expected = LayerRelativeLRP(model, model.second, backend="reference").attribute(wide, target=5)
    assert distance(found, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1e37])
@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d], ids=["signals", "images"])
def test_our_convolutions_hide_nothing(value: float, conv: type[nn.Conv1d]) -> None:
    model = nn.Sequential(conv(32, 32, 3), nn.ReLU(), conv(32, 2, 3), nn.Flatten())
    with torch.no_grad():
        model[0].weight[3] = value
        model[2].weight[:, 3] = 0
    size = (10,) if conv is nn.Conv1d else (10, 10)
    with pytest.raises(NonFiniteError):
        RelativeLRP(model.eval()).attribute(torch.ones(4, 32, *size), target=0)


class DilatedBlock(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(16, 16, 3, padding=dilation, dilation=dilation)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Conv1d(16, 16, 3, padding="same", groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_signals(batch: int, channels: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(instructions, "_LARGE_WEIGHT", 1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(channels, 16, 7, stride=2, padding=3),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(3, 2, 1),
        DilatedBlock(2),
        DilatedBlock(4),
        nn.AvgPool1d(2),
        nn.Conv1d(16, 32, 4, stride=3, groups=16),
        nn.GELU(),
        nn.ConvTranspose1d(32, 8, 3),
        nn.Hardswish(),
        nn.AdaptiveMaxPool1d(5),
        nn.Flatten(),
        nn.Linear(40, 10),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model, x = model.eval().double(), torch.randn(batch, channels, 128, dtype=torch.float64)
    expected = RelativeLRP(model, backend="reference").attribute(x, target=3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        actual = RelativeLRP(model.to(dtype)).attribute(x.to(dtype), target=3)
        assert actual.is_contiguous()
        assert distance(actual, expected) < TOLERANCE[dtype]


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x)


@pytest.mark.parametrize("batch", [1, 2, 40])
def test_batch_norms_of_every_kind(batch: int) -> None:
    """Folded together where they are alike: given or computed, with and without scale and bias."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU()),
        *(nn.Conv2d(6, 96, 3, stride=2), nn.BatchNorm2d(96, eps=0.1), nn.ReLU()),
        # Weights that dwarf their images.
        *(nn.Conv2d(96, 160, 3, padding=1, bias=False), nn.BatchNorm2d(160), nn.ReLU()),
        *(nn.Conv2d(160, 160, (3, 1), padding=(1, 0)), nn.BatchNorm2d(160), nn.Flatten()),
        nn.Linear(640, 3),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    nn.utils.parametrize.register_parametrization(model[10], "weight", Positive())
    model, x = model.eval().double(), torch.randn(batch, 3, 5, 5, dtype=torch.float64)
    expected = RelativeLRP(model, backend="reference").attribute(x, target=2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rlrp = RelativeLRP(model.to(dtype))
        actual, delta = rlrp.attribute(x.to(dtype), target=2, return_convergence_delta=True)
        assert distance(actual, expected) < TOLERANCE[dtype]
        assert distance(rlrp.attribute(x.to(dtype), target=2), expected) < TOLERANCE[dtype]
        assert delta.max() < {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1}[dtype]


@pytest.mark.parametrize("batch", [1, 40])
def test_dense_layers(batch: int) -> None:
    """Wide enough for oneDNN, which takes them over; a sequence and rows, with and without bias."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(24, 320), nn.LayerNorm(320), nn.GELU()),
        *(nn.Linear(320, 700, bias=False), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(2100, 520), nn.Tanh(), nn.Linear(520, 10)),
    )
    model, x = model.eval().double(), torch.randn(batch, 3, 24, dtype=torch.float64)
    expected = RelativeLRP(model, backend="reference").attribute(x, target=4)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rlrp = RelativeLRP(model.to(dtype))
        actual, delta = rlrp.attribute(x.to(dtype), target=4, return_convergence_delta=True)
        assert distance(actual, expected) < TOLERANCE[dtype]
        assert delta.max() < {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1}[dtype]


class Fork(nn.Module):
    """The skip connection reads every other pixel, the main branch all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.short = nn.Conv2d(4, 8, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x)
        return self.head(torch.relu(self.main(h) + self.norm(self.short(h))).mean((2, 3)))


@pytest.mark.parametrize("dead", ["nothing", "main", "pixels of the skip", "everything"])
@pytest.mark.parametrize("gain", [1.0, 1e4])
def test_a_branch_that_carries_nothing(dead: str, gain: float) -> None:
    """No infinite factor meets a zero, whichever branch explains nothing."""
    torch.manual_seed(0)
    model = Fork().eval()
    nn.init.normal_(model.norm.bias)  # so that its relevance is not 0 although its input is
    x = torch.rand(3, 4, 6, 6)
    with torch.no_grad():
        model.main.weight.mul_(0.0 if dead == "main" else gain)
        model.norm.bias.mul_(gain)
    if dead == "pixels of the skip":
        x[:, :, ::2, ::2] = -1
    if dead == "everything":
        x = -x
    expected = RelativeLRP(model.double(), backend="reference").attribute(x.double(), target=1)
    assert (dead == "everything") == bool((expected == 0).all())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        actual = RelativeLRP(model.to(dtype)).attribute(x.to(dtype), target=1)
        gap = (actual.double() - expected).abs().sum()
        assert gap <= TOLERANCE[dtype] * expected.abs().sum()


def test_relevance_is_float32_in_a_model_of_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[torch.dtype] = set()
    law = compiled.conv_relevance

    def spy(x: Tensor, weight: Tensor, r: Tensor, *rest: Any, **options: Any) -> Any:
        found.update((x.dtype, weight.dtype, r.dtype))
        return law(x, weight, r, *rest, **options)

    monkeypatch.setattr(compiled, "conv_relevance", spy)
    skipping = nn.Conv2d(4, 4, 1, stride=2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), skipping, nn.ReLU())
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 3, 6, 6, dtype=torch.bfloat16)
    RelativeLRP(model.eval().bfloat16()).attribute(x, target=1)
    assert found == {torch.float32}


class Aliases(nn.Module):
    """One value that is read last by a convolution, and before that under other names."""

    def __init__(self, rename: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rename = rename
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(108, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        other = self.rename(h)
        h = self.second(h).relu()
        return self.head((h + self.third(other).relu()).flatten(1))


@pytest.mark.parametrize(
    "rename",
    [
        lambda h: h.type_as(h),
        lambda h: torch.einsum("abcd->abdc", h),
        lambda h: F.dropout(h, 0.5, training=False),
        lambda h: h.view(-1, 3, 6, 6),
        lambda h: h.to(h.dtype),
        lambda h: torch.atleast_3d(h),
        lambda h: h[:, [2, 1, 0]],
        lambda h: h,
    ],
)
def test_nothing_is_written_over_that_is_read_under_another_name(
    rename: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model = Aliases(rename).eval()
    x = torch.randn(2, 3, 6, 6)
    before = x.clone()
    expected = RelativeLRP(model.double(), backend="reference").attribute(x.double(), target=1)
    actual = RelativeLRP(model.float()).attribute(x, target=1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(x, before)


def test_a_video_network_of_many_channels() -> None:
    """Filters of 1×1×1 and along one axis, of as many channels as the compiled ones want."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(3, 32, 3, padding=1), nn.BatchNorm3d(32), nn.ReLU(),
        nn.Conv3d(32, 64, 1), nn.ReLU(),
        nn.Conv3d(64, 32, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU(), nn.Conv3d(32, 32, (1, 3, 3)),
        nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 2),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 4, 6, 6)
    expected = RelativeLRP(model.double()).attribute(x.double(), 1)
    for backend in ("auto", "reference"):
        found = RelativeLRP(model.float(), backend=backend).attribute(x, 1)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_a_stale_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension._stale(extension.OPS) is None
    error = extension._stale((*extension.OPS, "an_op_to_come"))
    assert error is not None
    assert "another version" in str(error)
    assert "an_op_to_come" in str(error)


def test_every_op_that_kernels_call_is_asked_for() -> None:
    folder = Path(extension.__file__).parent
    text = "".join((folder / f"{name}.py").read_text() for name in ("compiled", "convolution"))
    called = set(re.findall(r"(?<![\w.])ops\.(\w+)", text))
    assert called <= set(extension.OPS)
    assert {"divide", "convolution"} <= called
