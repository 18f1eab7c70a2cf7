"""Every kind of layer and of merge against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import (
    Value,
    agrees,
    attend,
    cat,
    chain,
    explain,
    frozen,
    make,
    randomise_norms,
    relative_error,
    stack,
)
from tests.paths import TOLERANCE, all_paths

BATCH = 2


def check(model: nn.Module, make_twin: Callable[..., Callable], *inputs: Tensor) -> None:
    """Compare the package with the oracle in both dtypes, a different target for each sample.

    ``make_twin(model)`` gives the same network in the oracle's words.
    """
    model = frozen(randomise_norms(model))
    inputs = tuple(x.double() for x in inputs)
    outputs = model(*inputs).shape[1]
    targets = [(i + 1) % outputs for i in range(inputs[0].shape[0])]
    agrees(make_twin(model), model, *inputs)
    expected = explain(make_twin(model), inputs, targets)
    assert all(e.isfinite().all() for e in expected)
    assert any(e.abs().sum() > 1e-3 for e in expected), "the example explains nothing"
    for dtype, tolerance in TOLERANCE.items():
        actual = all_paths(frozen(model, dtype), tuple(x.to(dtype) for x in inputs), targets)
        for a, e in zip(actual, expected, strict=True):
            assert relative_error(a, e) <= tolerance


# ---- chains: x → [layers] → flatten → Linear -----------------------------------------------------

Link = tuple[str, nn.Module]


def check_chain(links: list[Link], *shape: int) -> None:
    """A sequence of modules, each with the oracle's word for it."""
    x = torch.randn(BATCH, *shape)
    body = nn.Sequential(*(module for _, module in links)).eval()
    features = body(x).flatten(1).shape[1]
    kinds = [kind for kind, _ in links] + ["move", "dense"]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(features, 3))
    check(model, lambda m: chain(list(zip(kinds, m, strict=True))), x)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


DENSE = {"linear", "linear, no bias", "linear on a sequence", "matmul with a constant",
         "constant times it", "bilinear form with a constant"}  # fmt: skip
POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool2d with every option", "avg_pool2d divisor",
         "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool2d global",
         "adaptive_avg_pool3d", "mean over space", "mean, kept axis", "sum over space"}  # fmt: skip
LINEAR_LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear, no bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear on a sequence": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 9)),
    "conv1d strided, dilated, grouped": (
        lambda: nn.Conv1d(4, 4, 3, stride=2, dilation=2, groups=2, padding=3),
        (4, 9),
    ),
    "conv1d same": (lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=2), (2, 9)),
    "conv1d valid": (lambda: nn.Conv1d(2, 3, 4, padding="valid"), (2, 9)),
    "conv1d reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5)),
    "conv2d no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 5)),
    "conv2d oblong": (
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (2, 5, 6),
    ),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 4, 4)),
    "conv2d depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (3, 4, 4)),
    "conv2d pointwise": (lambda: nn.Conv2d(3, 4, 1), (3, 4, 4)),
    "conv1d that skips": (lambda: nn.Conv1d(3, 4, 1, stride=3), (3, 8)),
    "conv2d pointwise that skips": (lambda: nn.Conv2d(3, 4, 1, stride=2), (3, 5, 4)),
    "conv2d pointwise that skips rows, grouped": (
        lambda: nn.Conv2d(4, 4, 1, stride=(2, 1), groups=2),
        (4, 4, 3),
    ),
    "conv3d that skips": (lambda: nn.Conv3d(2, 3, 1, stride=(1, 2, 3)), (2, 3, 4, 4)),
    "conv2d one channel": (lambda: nn.Conv2d(1, 4, 3, padding=1), (1, 5, 5)),
    "conv2d stride skips a column": (lambda: nn.Conv2d(2, 3, 3, stride=2), (2, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (2, 5, 5)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 5, 5)),
    "conv2d same reflect": (
        lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"),
        (2, 5, 5),
    ),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "conv2d replicate": (
        lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="replicate"),
        (2, 5, 5),
    ),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(1, 0, 0)), (2, 3, 4, 3)),
    "conv3d replicate": (
        lambda: nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"),
        (2, 3, 3, 3),
    ),
    "conv3d grouped, dilated": (
        lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)),
        (2, 2, 4, 3),
    ),
    "conv_transpose1d": (
        lambda: nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 5),
    ),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=(0, 1)),
        (3, 3, 3),
    ),
    "conv_transpose2d dilated": (
        lambda: nn.ConvTranspose2d(2, 3, (3, 2), dilation=(1, 2), bias=False),
        (2, 3, 3),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), (2, 2, 2, 3)),
    "avg_pool1d": (lambda: nn.AvgPool1d(3, stride=2, padding=1), (3, 7)),
    "avg_pool2d": (lambda: nn.AvgPool2d(2), (2, 4, 4)),
    "avg_pool2d with every option": (
        lambda: nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
        (2, 6, 5),
    ),
    "avg_pool2d divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), (2, 4, 4)),
    "avg_pool3d": (lambda: nn.AvgPool3d(2, stride=1), (2, 3, 2, 3)),
    "adaptive_avg_pool1d": (lambda: nn.AdaptiveAvgPool1d(3), (2, 7)),
    "adaptive_avg_pool2d": (lambda: nn.AdaptiveAvgPool2d((2, 3)), (2, 5, 7)),
    "adaptive_avg_pool2d global": (lambda: nn.AdaptiveAvgPool2d(1), (3, 4, 4)),
    "adaptive_avg_pool3d": (lambda: nn.AdaptiveAvgPool3d((1, 2, None)), (2, 3, 3, 2)),
    "mean over space": (lambda: Call(lambda x: x.mean((2, 3))), (3, 4, 4)),
    "mean, kept axis": (lambda: Call(lambda x: torch.mean(x, dim=-1, keepdim=True)), (3, 4)),
    "sum over space": (lambda: Call(lambda x: x.sum(dim=(2, 3))), (3, 4, 4)),
    "interpolate bilinear": (
        lambda: Call(lambda x: F.interpolate(x, (5, 7), mode="bilinear")),
        (2, 3, 4),
    ),
    "interpolate aligned corners": (
        lambda: Call(
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        ),
        (2, 3, 3),
    ),
    "interpolate linear": (
        lambda: Call(lambda x: F.interpolate(x, scale_factor=2, mode="linear")),
        (2, 4),
    ),
    "interpolate bicubic": (
        lambda: Call(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")),
        (2, 3, 3),
    ),
    "matmul with a constant": (
        lambda: Call(lambda x: x @ torch.arange(8, dtype=x.dtype).reshape(4, 2).sub(3.5)),
        (3, 4),
    ),
    "constant times it": (
        lambda: Call(lambda x: torch.linspace(-1, 1, 6).to(x).reshape(2, 3) @ x),
        (3, 4),
    ),
    "bilinear form with a constant": (
        lambda: Call(
            lambda x: torch.einsum("bij,jk->bik", x, torch.linspace(-1, 1, 8).to(x).reshape(4, 2))
        ),
        (3, 4),
    ),
}


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_linear_layer(name: str) -> None:
    factory, shape = LINEAR_LAYERS[name]
    kind = "dense" if name in DENSE else "pool" if name in POOLS else "spatial"
    check_chain([(kind, factory()), ("act", nn.LeakyReLU(0.1))], *shape)


# One input: relevance passes, whatever the coefficients are.
ONE_INPUT = {
    "linear": (lambda: nn.Linear(1, 4), (1,)),
    "linear on a sequence": (lambda: nn.Linear(1, 2), (3, 1)),
    "matmul with a constant": (
        lambda: Call(lambda x: x @ torch.linspace(-1, 2, 4).to(x).reshape(1, 4)),
        (3, 1),
    ),
    "constant times it": (
        lambda: Call(lambda x: torch.linspace(-1, 1, 3).to(x).reshape(3, 1) @ x),
        (1, 4),
    ),
    "einsum": (
        lambda: Call(
            lambda x: torch.einsum("j,...ij->i...j", torch.tensor([-1.0, 2]).to(x), x).movedim(0, 1)
        ),
        (3, 2),
    ),
    "vector": (lambda: Call(lambda x: F.linear(x, x.new_tensor([-2.0]))[:, None]), (3, 1)),
    "conv2d": (lambda: nn.Conv2d(1, 3, 1), (1, 3, 3)),
    "conv2d, depthwise and strided": (lambda: nn.Conv2d(2, 4, 1, 2, groups=2), (2, 3, 3)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(1, 3, 2, 2), (1, 3, 3)),
    "average pool": (lambda: nn.AvgPool2d(1, 2), (2, 3, 3)),
    "global pool": (lambda: nn.AdaptiveAvgPool2d(1), (4, 1, 1)),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (2, 1, 1)),
    "unfold": (lambda: nn.Unfold(2), (2, 3, 3)),
}


@pytest.mark.parametrize("name", ONE_INPUT)
def test_one_input_for_each_output(name: str) -> None:
    factory, shape = ONE_INPUT[name]
    check_chain([("act", nn.Tanh()), ("move", factory()), ("act", nn.Tanh())], *shape)


# Behind a convolution: in the final section, and by its own law in front of a non-linearity.
KINDS = {"average pool": "pool", "another convolution": "spatial", "mean": "pool"}
BEHIND_A_CONVOLUTION = {
    "batch norm": (lambda: nn.BatchNorm2d(4), "2d"),
    "batch norm, not affine": (lambda: nn.BatchNorm2d(4, affine=False), "2d"),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), "1d"),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), "3d"),
    "average pool": (lambda: nn.AvgPool2d(2, 1), "2d"),
    "another convolution": (lambda: nn.Conv2d(4, 3, 2), "2d"),
    "nearest upsampling": (lambda: nn.Upsample(scale_factor=2), "2d"),
    "identity": (lambda: nn.Identity(), "2d"),
    "constant factor": (lambda: Call(lambda x: 0.5 * x), "2d"),
    "negation": (lambda: Call(lambda x: -x), "2d"),
    "division by a constant": (lambda: Call(lambda x: x / 3.0), "2d"),
    "constant summand": (lambda: Call(lambda x: x + 1.5), "2d"),
    "constant minus it": (lambda: Call(lambda x: 1.0 - x), "2d"),
    "constant tensors": (
        lambda: Call(lambda x: x * torch.tensor([1.0, -2, 3, 0.5]).to(x)[:, None, None] + 0.1),
        "2d",
    ),
    "permute": (lambda: Call(lambda x: x.permute(0, 2, 3, 1)), "2d"),
    "transpose": (lambda: Call(lambda x: x.transpose(1, 3)), "2d"),
    "reshape": (lambda: Call(lambda x: x.reshape(x.shape[0], 2, -1)), "2d"),
    "view by size()": (lambda: Call(lambda x: x.view(x.size(0), -1)), "2d"),
    "flatten": (lambda: Call(lambda x: torch.flatten(x, 1)), "2d"),
    "unflatten": (lambda: nn.Unflatten(1, (2, 2)), "2d"),
    "unsqueeze and squeeze": (lambda: Call(lambda x: x.unsqueeze(1).squeeze(1)), "2d"),
    "slice": (lambda: Call(lambda x: x[:, 1:3, ::2, -2:]), "2d"),
    "one index": (lambda: Call(lambda x: x[:, 2]), "2d"),
    "select": (lambda: Call(lambda x: x.select(2, 1)), "2d"),
    "narrow": (lambda: Call(lambda x: x.narrow(1, 1, 2)), "2d"),
    "flip": (lambda: Call(lambda x: x.flip(-1)), "2d"),
    "roll": (lambda: Call(lambda x: torch.roll(x, 1, -1)), "2d"),
    "expand": (lambda: Call(lambda x: x[:, None].expand(-1, 2, -1, -1, -1)), "2d"),
    "repeat": (lambda: Call(lambda x: x.repeat(1, 2, 1, 1)), "2d"),
    "pad by a constant": (lambda: Call(lambda x: F.pad(x, (1, 0, 2, 1), value=0.5)), "2d"),
    "zero padding": (lambda: nn.ZeroPad2d(1), "2d"),
    "reflection padding": (lambda: nn.ReflectionPad2d(1), "2d"),
    "replication padding": (lambda: nn.ReplicationPad2d((0, 1, 2, 0)), "2d"),
    "circular padding": (lambda: Call(lambda x: F.pad(x, (1, 1), mode="circular")), "1d"),
    "pixel shuffle": (lambda: nn.PixelShuffle(2), "2d"),
    "contiguous and clone": (lambda: Call(lambda x: x.contiguous().clone()), "2d"),
    "mean": (lambda: Call(lambda x: x.mean(1)), "2d"),
}


@pytest.mark.parametrize("name", BEHIND_A_CONVOLUTION)
@pytest.mark.parametrize("final", [False, True])
def test_behind_a_convolution(name: str, final: bool) -> None:
    factory, dims = BEHIND_A_CONVOLUTION[name]
    n = int(dims[0])
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][n - 1]
    links = [("spatial", conv(2, 4, 3, padding=1))]
    links.append((KINDS.get(name, "move"), factory()))
    if not final:
        links.append(("act", nn.Tanh()))
    check_chain(links, 2, *[4, 3, 3][:n])


@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_padding_between_convolutions(value: float) -> None:
    pad = Call(lambda x: F.pad(x, (1, 0, -1, 2), value=value))
    first = [("spatial", nn.Conv2d(2, 4, 3)), ("act", nn.ReLU())]
    check_chain(
        [*first, ("move", pad), ("spatial", nn.Conv2d(4, 3, 2)), ("act", nn.ReLU())], 2, 6, 6
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_alone_passes_relevance_through(dims: int, affine: bool) -> None:
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims - 1](3, affine=affine)
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](2, 3, 2)
    links = [("spatial", conv), ("act", nn.ReLU()), ("move", norm), ("act", nn.ReLU())]
    check_chain(links, 2, *[4, 4, 3][:dims])


def test_batch_norm_on_the_input() -> None:
    check_chain([("move", nn.BatchNorm1d(5)), ("act", nn.Tanh()), ("dense", nn.Linear(5, 4))], 5)


def test_batch_norm_on_rows() -> None:
    check_chain([("dense", nn.Linear(4, 5)), ("move", nn.BatchNorm1d(5)), ("act", nn.ReLU())], 4)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: Call(F.relu),
    "torch.relu_": lambda: Call(torch.relu_),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "leaky_relu in place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "elu": lambda: nn.ELU(0.7),
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "softplus": lambda: nn.Softplus(2.0),
    "softsign": nn.Softsign,
    "tanhshrink": nn.Tanhshrink,
    "hardshrink": lambda: nn.Hardshrink(0.1),
    "softshrink": lambda: nn.Softshrink(0.1),
    "threshold": lambda: nn.Threshold(0.1, 0.2),
    "prelu": nn.PReLU,
    "prelu per channel": lambda: nn.PReLU(4),
    "clamp": lambda: Call(lambda x: x.clamp(-0.5, 0.5)),
    "clamp from below": lambda: Call(lambda x: torch.clamp(x, min=0)),
    "abs": lambda: Call(torch.abs),
    "square": lambda: Call(lambda x: x**2),
    "exp": lambda: Call(torch.exp),
    "sqrt": lambda: Call(lambda x: torch.sqrt(x * x + 1.0)),
    "softmax": lambda: nn.Softmax(1),
    "log_softmax": lambda: nn.LogSoftmax(-1),
    "layer norm": lambda: _norm(nn.LayerNorm([4, 4, 4])),
    "layer norm, no affine": lambda: nn.LayerNorm([4, 4], elementwise_affine=False),
    "group norm": lambda: _norm(nn.GroupNorm(2, 4)),
    "instance norm": lambda: _norm(nn.InstanceNorm2d(4, affine=True)),
    "instance norm, no affine": lambda: nn.InstanceNorm2d(4),
}


def _norm(norm: nn.Module) -> nn.Module:
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    check_chain([("spatial", nn.Conv2d(2, 4, 3, padding=1)), ("act", ACTIVATIONS[name]())], 2, 4, 4)


def test_dropout_in_eval_mode() -> None:
    for dropout in (nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)):
        conv = nn.Conv2d(2, 3, 2)
        check_chain([("spatial", conv), ("act", nn.ReLU()), ("act", dropout)], 2, 3, 3)


CHOICES = {
    "max_pool1d": (lambda: nn.MaxPool1d(3, 2, padding=1), (6,)),
    "max_pool1d dilated": (lambda: nn.MaxPool1d(2, 1, dilation=3), (7,)),
    "max_pool2d": (lambda: nn.MaxPool2d(2), (4, 4)),
    "max_pool2d overlapping": (lambda: nn.MaxPool2d(3, 2, padding=1), (5, 6)),
    "max_pool2d oblong": (lambda: nn.MaxPool2d((2, 3), (1, 2), (1, 0), (2, 1)), (5, 6)),
    "max_pool2d ceil": (lambda: nn.MaxPool2d(2, ceil_mode=True), (5, 3)),
    "max_pool3d": (lambda: nn.MaxPool3d(2, 1, padding=(0, 1, 0)), (3, 2, 3)),
    "adaptive_max_pool1d": (lambda: nn.AdaptiveMaxPool1d(3), (7,)),
    "adaptive_max_pool2d": (lambda: nn.AdaptiveMaxPool2d((2, 3)), (5, 4)),
    "adaptive_max_pool2d global": (lambda: nn.AdaptiveMaxPool2d(1), (4, 4)),
    "adaptive_max_pool3d": (lambda: nn.AdaptiveMaxPool3d((1, 2, 2)), (2, 3, 4)),
    "amax": (lambda: Call(lambda x: x.amax((2, 3))), (3, 4)),
    "amax kept": (lambda: Call(lambda x: torch.amax(x, 1, keepdim=True)), (3, 4)),
    "max over an axis": (lambda: Call(lambda x: x.max(dim=-1).values), (3, 4)),
}


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("after_relu", [False, True])
def test_choice(name: str, after_relu: bool) -> None:
    factory, size = CHOICES[name]
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(size) - 1](2, 3, 3, padding=1)
    act = nn.ReLU() if after_relu else nn.Tanh()
    check_chain([("spatial", conv), ("act", act), ("route", factory())], 2, *size)


def test_max_pool_begins_the_final_section() -> None:
    conv, pool, again = nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2)
    check_chain([("spatial", conv), ("route", pool), ("spatial", again)], 2, 8, 8)


# ---- graphs: written twice, once for torch and once for the oracle -------------------------------


class Graph(nn.Module):
    """Two branches from one stem, joined by ``join``, and a head."""

    def __init__(self, join: Callable[..., Tensor], features: int) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.join = join
        self.head = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        return self.head(self.join(self.left(h), self.right(h)).flatten(1))


JOINS: dict[str, tuple[Callable[..., Tensor], Callable[..., Value], int]] = {
    "a + b": (lambda a, b: a + b, lambda a, b: a + b, 4),
    "torch.add with alpha": (
        lambda a, b: torch.add(a, b, alpha=2.5),
        lambda a, b: a + b.move(lambda t: 2.5 * t),
        4,
    ),
    "a - b": (lambda a, b: a - b, lambda a, b: a - b, 4),
    "in-place sum": (lambda a, b: a.add_(b), lambda a, b: a + b, 4),
    "a + a": (lambda a, b: a + a + b, lambda a, b: (a + a) + b, 4),
    "sum of three": (
        lambda a, b: a + b + torch.tanh(a),
        lambda a, b: (a + b) + a.act(torch.tanh),
        4,
    ),
    "broadcast along a kept axis": (
        lambda a, b: a + b.mean(1, keepdim=True),
        lambda a, b: a + b.pool(lambda t: t.mean(1, keepdim=True)),
        4,
    ),
    "broadcast along a new axis": (
        lambda a, b: a.reshape(-1, 2, 2) + b[:, None, :2],
        lambda a, b: a.move(lambda t: t.reshape(-1, 2, 2)) + b.move(lambda t: t[:, None, :2]),
        4,
    ),
    "broadcast difference": (
        lambda a, b: a.mean(1, keepdim=True) - b,
        lambda a, b: a.pool(lambda t: t.mean(1, keepdim=True)) - b,
        4,
    ),
    "both broadcast": (
        lambda a, b: a[:, :, None] + b[:, None, :],
        lambda a, b: a.move(lambda t: t[:, :, None]) + b.move(lambda t: t[:, None, :]),
        16,
    ),
    "product": (lambda a, b: a * b, lambda a, b: a * b, 4),
    "square by hand": (lambda a, b: a * a + b, lambda a, b: (a * a) + b, 4),
    "gate": (
        lambda a, b: a * torch.sigmoid(b.mean(1, keepdim=True)),
        lambda a, b: a * b.pool(lambda t: t.mean(1, keepdim=True)).act(torch.sigmoid),
        4,
    ),
    "gate first": (
        lambda a, b: torch.sigmoid(b[:, :1]) * a,
        lambda a, b: b.move(lambda t: t[:, :1]).act(torch.sigmoid) * a,
        4,
    ),
    "matrix product": (
        lambda a, b: a.reshape(-1, 2, 2) @ b.reshape(-1, 2, 2),
        lambda a, b: _square(a) @ _square(b),
        4,
    ),
    "similarities": (
        lambda a, b: _similar(a.reshape(-1, 2, 2)) + b.reshape(-1, 2, 2),
        lambda a, b: _similar(_square(a), lambda v: v.move(_turn)) + _square(b),
        4,
    ),
    "outer product": (
        lambda a, b: a[:, :, None] @ b[:, None, :],
        lambda a, b: a.move(lambda t: t[:, :, None]) @ b.move(lambda t: t[:, None, :]),
        16,
    ),
    "outer product by broadcasting": (
        lambda a, b: a[:, :, None] * b[:, None, :],
        lambda a, b: a.move(lambda t: t[:, :, None]) * b.move(lambda t: t[:, None, :]),
        16,
    ),
    "einsum of two": (
        lambda a, b: torch.einsum("bij,bkj->bki", a.reshape(-1, 2, 2), b.reshape(-1, 2, 2)),
        lambda a, b: _square(b) @ _square(a).move(_turn),
        4,
    ),
    "attention": (
        lambda a, b: _attend(a.reshape(-1, 2, 2), b.reshape(-1, 2, 2)),
        lambda a, b: _attend_twin(_square(a), _square(b)),
        4,
    ),
    "attention of one token": (
        lambda a, b: _attend(a[:, None], b[:, None]),
        lambda a, b: _attend_twin(a.move(lambda t: t[:, None]), b.move(lambda t: t[:, None])),
        4,
    ),
    "attention written out": (
        lambda a, b: _similar(a.reshape(-1, 2, 2)).softmax(-1) @ b.reshape(-1, 2, 2),
        lambda a, b: attend(
            torch.matmul, make("gate", lambda t: _similar(t).softmax(-1), _square(a)), _square(b)
        ),
        4,
    ),
    "gate of equal shape": (
        lambda a, b: a * torch.sigmoid(b),
        lambda a, b: a * b.act(torch.sigmoid),
        4,
    ),
    "cat": (lambda a, b: torch.cat([a, b], 1), lambda a, b: cat([a, b], 1), 8),
    "cat with itself": (
        lambda a, b: torch.cat([a, b, a], dim=-1),
        lambda a, b: cat([a, b, a], -1),
        12,
    ),
    "stack": (lambda a, b: torch.stack([a, b], 1), lambda a, b: stack([a, b], 1), 8),
    "stack, then mean": (
        lambda a, b: torch.stack([a, b], 2).mean(2),
        lambda a, b: stack([a, b], 2).pool(lambda t: t.mean(2)),
        4,
    ),
    "maximum": (
        torch.maximum,
        lambda a, b: stack([a, b], 0).route(lambda t: t.amax(0)),
        4,
    ),
    "chunks": (
        lambda a, b: _gated(*a.chunk(2, 1)) + b[:, :2],
        lambda a, b: (
            a.move(lambda t: t[:, :2]) * a.move(lambda t: t[:, 2:]).act(torch.tanh)
            + b.move(lambda t: t[:, :2])
        ),
        2,
    ),
    "splits of unequal size": (
        lambda a, b: _relu_second(*torch.cat([a, b], 1).split([3, 5], 1)),
        lambda a, b: _split_twin(cat([a, b], 1)),
        8,
    ),
    "unbind": (
        lambda a, b: _difference(*torch.stack([a, b], 1).unbind(1)),
        lambda a, b: _unbind_twin(stack([a, b], 1)),
        4,
    ),
    "slices that overlap": (
        lambda a, b: a[:, :3] + a[:, 1:] * 0.5 + b[:, 1:],
        lambda a, b: (
            a.move(lambda t: t[:, :3])
            + a.move(lambda t: t[:, 1:] * 0.5)
            + b.move(lambda t: t[:, 1:])
        ),
        3,
    ),
}


def _turn(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


def _square(v: Value) -> Value:
    return v.move(lambda t: t.reshape(-1, 2, 2))


def _similar(h: Any, turn: Callable[[Any], Any] = _turn) -> Any:
    """``h h'``: of a value and of itself."""
    return h @ turn(h)


def _attend(a: Tensor, b: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(a, b, a + b)


def _attend_twin(a: Value, b: Value) -> Value:
    def weigh(q: Tensor, k: Tensor) -> Tensor:
        return (q @ _turn(k) / q.shape[-1] ** 0.5).softmax(-1)

    return attend(torch.matmul, make("gate", weigh, a, b), a + b)


def _gated(a: Tensor, b: Tensor) -> Tensor:
    return a * torch.tanh(b)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return a - torch.tanh(b)


def _relu_second(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, torch.relu(b)], 1)


def _split_twin(v: Value) -> Value:
    return cat([v.move(lambda t: t[:, :3]), v.move(lambda t: t[:, 3:]).act(torch.relu)], 1)


def _unbind_twin(v: Value) -> Value:
    return v.move(lambda t: t[:, 0]) - v.move(lambda t: t[:, 1]).act(torch.tanh)


@pytest.mark.parametrize("name", JOINS)
def test_join(name: str) -> None:
    join, twin_join, features = JOINS[name]

    def make_twin(m: Graph) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            h = x.dense(m.stem).act(torch.tanh)
            joined = twin_join(h.dense(m.left), h.dense(m.right))
            return joined.move(lambda t: t.flatten(1)).dense(m.head)

        return twin

    check(Graph(join, features), make_twin, torch.randn(BATCH, 6))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 4), nn.Conv1d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(F.relu(self.a(a) + self.b(b).mean(-1)) + a[:, :4])


def test_several_inputs() -> None:
    def make_twin(m: TwoInputs) -> Callable[[Value, Value], Value]:
        def twin(a: Value, b: Value) -> Value:
            joined = a.dense(m.a) + b.spatial(m.b).pool(lambda t: t.mean(-1))
            return (joined.act(F.relu) + a.move(lambda t: t[:, :4])).dense(m.head)

        return twin

    check(TwoInputs(), make_twin, torch.randn(BATCH, 5), torch.randn(BATCH, 2, 6))


class Reused(nn.Module):
    """One module called twice, once on its own output, and a ReLU shared by all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.relu, self.head = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.layer(x))
        h = self.relu(self.layer(h) + x)
        return self.head(self.layer(h))


def test_module_used_several_times() -> None:
    def make_twin(m: Reused) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            h = x.dense(m.layer).act(F.relu)
            h = (h.dense(m.layer) + x).act(F.relu)
            return h.dense(m.layer).dense(m.head)

        return twin

    check(Reused(), make_twin, torch.randn(BATCH, 4))


class InPlace(nn.Module):
    """``h.relu_()`` changes h for every later reader."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        early = h * 2.0
        h.relu_()
        h += self.two(h)
        return self.head(h + early)


def test_in_place_operations() -> None:
    def make_twin(m: InPlace) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            h = x.dense(m.one)
            early = h.move(lambda t: 2.0 * t)
            h = h.act(torch.relu)
            h = h + h.dense(m.two)
            return (h + early).dense(m.head)

        return twin

    check(InPlace(), make_twin, torch.randn(BATCH, 4))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.conv(x)))
        gate = F.adaptive_avg_pool2d(h, 1)
        gate = torch.sigmoid(self.up(F.silu(self.down(gate))))
        return self.head((h * gate).mean((2, 3)))


def test_squeeze_and_excitation() -> None:
    def make_twin(m: SqueezeExcite) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            h = x.spatial(m.conv).move(m.norm).act(F.silu)
            gate = h.pool(lambda t: t.mean((2, 3), keepdim=True)).spatial(m.down).act(F.silu)
            gate = gate.spatial(m.up).act(torch.sigmoid)
            return (h * gate).pool(lambda t: t.mean((2, 3))).dense(m.head)

        return twin

    check(SqueezeExcite(), make_twin, torch.randn(BATCH, 2, 5, 5))


class DeadEnd(nn.Module):
    """A value that a dead branch reads too is no fan-out: only what reaches the output counts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.side = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        self.side(h).relu()
        return self.two(h)


def test_a_branch_that_ends_nowhere_does_not_end_the_final_section() -> None:
    def make_twin(m: DeadEnd) -> Callable[[Value], Value]:
        return lambda x: x.dense(m.one).dense(m.two)

    check(DeadEnd(), make_twin, torch.randn(BATCH, 4))


class FanOut(nn.Module):
    """h is read twice, and the output is no linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.two(h) + self.three(h)


def test_fan_out_in_front_of_a_sum() -> None:
    def make_twin(m: FanOut) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            h = x.dense(m.one)
            return h.dense(m.two) + h.dense(m.three)

        return twin

    check(FanOut(), make_twin, torch.randn(BATCH, 4))


class Forked(nn.Module):
    """A value that one branch reads whole and two at every other pixel, or these two alone."""

    def __init__(self, reads_all: bool) -> None:
        super().__init__()
        self.reads_all = reads_all
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.main = nn.Conv2d(6, 4, 3, stride=2, padding=1)
        self.short = nn.Conv2d(6, 4, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(6, 4, 1, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        y = self.norm(self.short(h)) + torch.tanh(self.other(h))
        if self.reads_all:
            y = y + self.main(h)
        return self.head(torch.relu(y).mean((2, 3)))


@pytest.mark.parametrize("reads_all", [True, False])
@pytest.mark.parametrize("size", [(5, 6), (1, 1)])
def test_strides_that_skip_pixels_of_a_shared_value(reads_all: bool, size: tuple[int, int]) -> None:
    def make_twin(m: Forked) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            h = x.spatial(m.stem).act(torch.relu)
            y = h.spatial(m.short).move(m.norm) + h.spatial(m.other).act(torch.tanh)
            if m.reads_all:
                y = y + h.spatial(m.main)
            return y.act(torch.relu).pool(lambda t: t.mean((2, 3))).dense(m.head)

        return twin

    check(Forked(reads_all), make_twin, torch.randn(BATCH, 2, *size))


class Nested(nn.Module):
    """DenseNet in small: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(2 * (i + 1), 2, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 * (i + 1)) for i in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            parts.append(layer(F.relu(norm(torch.cat(parts, 1)))))
        return self.head(torch.cat(parts, 1).mean((-2, -1)))


def test_dense_connections() -> None:
    def make_twin(m: Nested) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            parts = [x]
            for norm, layer in zip(m.norms, m.layers, strict=True):
                parts.append(cat(parts, 1).move(norm).act(F.relu).spatial(layer))
            return cat(parts, 1).pool(lambda t: t.mean((-2, -1))).dense(m.head)

        return twin

    check(Nested(), make_twin, torch.randn(BATCH, 2, 4, 4))


class WithParameters(nn.Module):
    """Parameters and buffers used directly are constants, also when computed from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.register_buffer("mean", torch.randn(5))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm(dim=1, keepdim=True)
        h = F.linear((x - self.mean) / 0.3, weight) * torch.exp(self.scale)
        return self.head(torch.relu(h))


def test_constants_computed_from_parameters() -> None:
    def make_twin(m: WithParameters) -> Callable[[Value], Value]:
        def twin(x: Value) -> Value:
            weight = m.weight / m.weight.norm(dim=1, keepdim=True)
            h = x.move(lambda t: (t - m.mean) / 0.3).dense(lambda t: F.linear(t, weight))
            h = h.move(lambda t: t * torch.exp(m.scale))
            return h.act(torch.relu).dense(m.head)

        return twin

    check(WithParameters(), make_twin, torch.randn(BATCH, 5))
