"""Ablation variants of the method, by hand and against matrices read off the Jacobian."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from evaluation.variants import VARIANTS
from tests.oracle import randomise_norms

ABSOLUTE = ["absolute sum", "absolute sum, mass carried"]


def dense(*rows: list[float], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias is not None).double()
    layer.weight.data = torch.tensor(rows, dtype=torch.float64)
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return layer


class Sum(nn.Module):
    """The first input element plus, or minus, the second."""

    def __init__(self, minus: bool = False) -> None:
        super().__init__()
        self.minus = minus

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :1], x[:, 1:]
        return a - b if self.minus else a + b


class Skip(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x)


class ConvNet(nn.Module):
    """A convolution and its batch norm, a skip connection, an average pool and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)))
        h = F.relu(h + self.block(h))
        return self.head(F.avg_pool2d(h, 2).flatten(1))


def explain(variant: str, model: nn.Module, *x: float) -> Tensor:
    inputs = torch.tensor([x], dtype=torch.float64)
    return VARIANTS[variant](model.eval())(inputs, 0)[0]


def equals(actual: Tensor, *fractions: str) -> None:
    expected = torch.tensor([float(Fraction(f)) for f in fractions], dtype=torch.float64)
    torch.testing.assert_close(actual.flatten(), expected, rtol=1e-12, atol=1e-14)


@pytest.fixture
def net() -> nn.Module:
    model = randomise_norms(ConvNet()).double().eval()
    with torch.no_grad():
        model.norm.weight[1] *= -1  # a batch norm may change the sign
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 4, 4, dtype=torch.float64)


# ---- all of them ---------------------------------------------------------------------------------


def test_default_is_relative_lrp(net: nn.Module, x: Tensor) -> None:
    expected = RelativeLRP(net).attribute(x, target=[0, 1, 2])
    assert torch.equal(VARIANTS["default"](net)(x, [0, 1, 2]), expected)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "default"])
def test_every_variant_differs_from_the_default(name: str, net: nn.Module, x: Tensor) -> None:
    default, made = (VARIANTS[n](net)(x, [0, 1, 2]) for n in ("default", name))
    assert made.shape == x.shape
    assert made.isfinite().all()
    apart = (F.normalize(made.flatten(1)) - F.normalize(default.flatten(1))).norm(dim=1)
    assert (apart > 1e-3).all()


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_crosses_attention(name: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).double().eval()
    made = VARIANTS[name](model)(torch.randn(2, 3, 8, dtype=torch.float64), 1)
    assert made.isfinite().all()
    assert (made.abs().flatten(1).sum(1) > 0).all()


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "shares"),
    [
        ("default", ("1/4", "3/4")),
        ("skip: half", ("1/2", "1/2")),
        ("skip: signed", ("-1/2", "3/2")),
    ],
)
def test_sum_of_the_method_document(variant: str, shares: tuple[str, str]) -> None:
    """a = 1 meets f = −3; a difference a − b is the sum of a and −b."""
    equals(explain(variant, Sum(), 1, -3), *shares)
    equals(explain(variant, Sum(minus=True), 1, 3), *shares)


def test_signed_shares_explode_and_zeros_are_halved() -> None:
    equals(explain("skip: signed", Sum(), 1000, -999), "1000", "-999")
    equals(explain("skip: signed", Sum(), 0, 0), "1/2", "1/2")


# ---- sections ------------------------------------------------------------------------------------


def test_mass_not_carried() -> None:
    """f = (2, 2), s = (3, 3), r_s = (1, 0): 1/3 on the skip, 2/3 on the branch.

    There q = (2/3, 2/3), of mass 4/3; carried to 2/3 it is (1/3, 1/3).
    """
    model = Skip(dense([1, 1], [0, 2]))
    equals(explain("default", model, 1, 1), "2/3", "1/3")
    equals(explain("mass not carried", model, 1, 1), "3/5", "2/5")  # (1, 2/3), scaled


def test_layer_by_layer() -> None:
    """Composed J = (2, 0). By layers: h = (3, −1), r_h = (3/4, −1/4), q = (1/2, 2)."""
    model = nn.Sequential(dense([1, 1], [1, -1]), dense([1, 1]))
    equals(explain("default", model, 1, 2), "1", "0")
    equals(explain("layer by layer", model, 1, 2), "1/5", "4/5")


def test_bias_shared() -> None:
    """q = (1, 2) and the bias 3: half of the unit is lost."""
    equals(explain("default", dense([1, 1], bias=[3]), 1, 2), "1/3", "2/3")
    equals(explain("bias shared", dense([1, 1], bias=[3]), 1, 2), "1/6", "1/3")
    equals(explain("bias shared", dense([1, 1], bias=[-3]), 1, 2), "1/6", "1/3")


def test_bias_shared_counts_what_a_section_adds_in_all() -> None:
    """The biases (1, 2) of the first layer are 1·1 + 2·2 = 5 at the end, less 2: b = 3."""
    model = nn.Sequential(dense([1, 0], [0, 1], bias=[1, 2]), dense([1, 2], bias=[-2]))
    equals(explain("bias shared", model, 1, 2), "1/8", "4/8")


TWO_LAYERS = nn.Sequential(dense([2, -1], [1, 1]), nn.ReLU(), dense([1, -1]))


def test_positive_products() -> None:
    """h = (1, 2). Products (1, −2): only the first counts; then (2, −1): again the first."""
    equals(explain("default", TWO_LAYERS, 1, 1), "0", "-1")
    equals(explain("positive products", TWO_LAYERS, 1, 1), "1", "0")
    equals(explain("positive products", dense([2, -1]), -1, -1), "0", "1")


def test_absolute_sum() -> None:
    """r_h = (1/3, −2/3); then 2/3·1/3 − 1/2·2/3 = −1/9 and −1/3·1/3 − 1/2·2/3 = −4/9."""
    equals(explain("absolute sum", TWO_LAYERS, 1, 1), "-1/9", "-4/9")
    equals(explain("absolute sum, mass carried", TWO_LAYERS, 1, 1), "-1/5", "-4/5")


def test_no_products_no_relevance() -> None:
    for variant in VARIANTS:
        equals(explain(variant, TWO_LAYERS, 0, 0), "0", "0")


@pytest.mark.parametrize("variant", ["positive products", *ABSOLUTE])
def test_stages_by_their_matrices(variant: str, net: nn.Module, x: Tensor) -> None:
    """Without the skip: the same from J itself, a batch norm and a reshape folded in."""
    model = nn.Sequential(
        net.conv, net.norm, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), net.head
    ).eval()
    expected = []
    for i, sample in enumerate(x):
        values = [sample[None]]
        stages = [model[:2], model[3:5], model[5:]]
        for k, stage in enumerate(stages):
            out = stage(values[-1])
            values.append(F.relu(out) if k == 0 else out)
        r = F.one_hot(torch.tensor(i), 4).double()
        for stage, value in zip(reversed(stages), reversed(values[:-1]), strict=True):
            matrix = torch.autograd.functional.jacobian(stage, value).reshape(len(r), -1)
            products = matrix * value.reshape(-1)
            if variant == "positive products":
                q = products.clamp_min(0).T @ r
            else:
                q = (products / products.abs().sum(1, keepdim=True)).T @ r
            r = q if variant == "absolute sum" else q * r.abs().sum() / q.abs().sum()
        expected.append(r.reshape(sample.shape))
    made = VARIANTS[variant](model)(x, list(range(3)))
    torch.testing.assert_close(made, torch.stack(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_scaling_a_hidden_neuron(factor: float) -> None:
    """The function stays the same, and so does "absolute sum"; the default does not."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x = torch.randn(50, 6, dtype=torch.float64)
    targets = model(x).argmax(1)

    def all_variants() -> dict[str, Tensor]:
        return {n: VARIANTS[n](model)(x, targets) for n in ("default", *ABSOLUTE)}

    before, output = all_variants(), model(x)
    with torch.no_grad():
        model[0].weight[2] *= factor
        model[0].bias[2] *= factor
        model[2].weight[:, 2] /= factor
    torch.testing.assert_close(model(x), output)
    after = all_variants()
    changed = {n: (after[n] - before[n]).abs().sum(1).mean().item() for n in before}
    assert changed["default"] > 0.05
    assert max(changed[n] for n in ABSOLUTE) < 1e-12
