"""Laws that hold for every network, tried on random ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captum_rlrp import RelativeLRP
from tests.oracle import Value, explain, randomise_norms, relative_error

seeds = st.integers(0, 2**32 - 1)
widths = st.integers(2, 6)


def attribute(model: nn.Module, x: Tensor, target: object = 0) -> tuple[Tensor, Tensor]:
    model = model.double().eval()
    return RelativeLRP(model).attribute(x, target=target, return_convergence_delta=True)


def mass(attribution: Tensor) -> Tensor:
    return attribution.abs().flatten(1).sum(1)


@st.composite
def chains(draw: st.DrawFn, bias: bool = True, smooth: bool = True) -> nn.Sequential:
    """A convolutional network without merges for inputs of shape (2, 6, 6)."""
    torch.manual_seed(draw(seeds))
    layers: list[nn.Module] = []
    channels = 2
    for _ in range(draw(st.integers(1, 3))):
        out = draw(widths)
        layers.append(nn.Conv2d(channels, out, draw(st.sampled_from([1, 3])), padding=1, bias=bias))
        channels = out
        if bias and draw(st.booleans()):
            layers.append(nn.BatchNorm2d(channels))
        activations = [nn.ReLU(), nn.GELU(), nn.LeakyReLU()] if smooth else [nn.ReLU()]
        layers.append(draw(st.sampled_from(activations)))
        # An overlapping max pool would be a merge: two windows may share a winner.
        pools = [nn.Identity(), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2, ceil_mode=True)]
        layers.append(draw(st.sampled_from(pools)))
    layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3, bias=bias)]
    return randomise_norms(nn.Sequential(*layers)).double().eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 6, 6, dtype=torch.float64)


# ---- random graphs: one program, run by torch and by the oracle ----------------------------------

WIDTH = 4
UNARY = ("linear", "norm", "relu", "tanh", "scale", "flip")
BINARY = ("add", "sub", "mul", "gate")
Program = list[tuple[str, int, int]]


class Interpreter(nn.Module):
    """Runs (operation, operand, operand) instructions; a value may be read any number of times."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.layers = nn.ModuleList(_layer(op) for op, _, _ in program)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (op, i, j), layer in zip(self.program, self.layers, strict=True):
            a, b = values[i], values[j]
            if op in UNARY:
                values.append(layer(a))
            elif op == "add":
                values.append(a + b)
            elif op == "sub":
                values.append(a - b)
            elif op == "mul":
                values.append(a * b)
            else:
                values.append(a * torch.sigmoid(b.mean(1, keepdim=True)))
        return self.head(values[-1])

    def twin(self, x: Value) -> Value:
        values = [x]
        for (op, i, j), layer in zip(self.program, self.layers, strict=True):
            a, b = values[i], values[j]
            if op in ("relu", "tanh"):
                values.append(a.act(layer))
            elif op in UNARY:
                values.append(a.linear(layer))
            elif op == "add":
                values.append(a + b)
            elif op == "sub":
                values.append(a - b)
            elif op == "mul":
                values.append(a * b)
            else:
                gate = b.linear(lambda t: t.mean(1, keepdim=True)).act(torch.sigmoid)
                values.append(a * gate)
        return values[-1].linear(self.head)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -0.7 * x + 0.2


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


def _layer(op: str) -> nn.Module:
    factories = {
        "linear": lambda: nn.Linear(WIDTH, WIDTH),
        "norm": lambda: nn.BatchNorm1d(WIDTH),
        "relu": nn.ReLU,
        "tanh": nn.Tanh,
        "scale": Scale,
        "flip": Flip,
    }
    return factories.get(op, nn.Identity)()


@st.composite
def programs(draw: st.DrawFn) -> Program:
    length = draw(st.integers(1, 10))
    recent = st.integers(0, 2)  # operands are mostly young, so that most values are used
    return [
        (
            draw(st.sampled_from(UNARY + BINARY)),
            max(0, i - draw(recent)),
            max(0, i - draw(recent)),
        )
        for i in range(length)
    ]


@given(programs(), seeds)
def test_random_graph_agrees_with_the_oracle(program: Program, seed: int) -> None:
    torch.manual_seed(seed)
    model = randomise_norms(Interpreter(program)).double().eval().requires_grad_(False)
    x = torch.randn(2, WIDTH, dtype=torch.float64)
    (expected,) = explain(model.twin, (x,), [2, 1])
    attribution, delta = attribute(model, x, [2, 1])
    assert relative_error(attribution, expected) <= 1e-9
    assert mass(attribution).max() <= 1 + 1e-10
    assert delta.max() <= 1e-10


# ---- laws ----------------------------------------------------------------------------------------


@given(chains())
def test_mass_is_one_without_merges(model: nn.Sequential) -> None:
    attribution, delta = attribute(model, images(), [0, 1, 2])
    total = mass(attribution)
    dead = total == 0  # a layer whose every unit is off has nothing to attribute
    assert ((total - 1).abs() <= 1e-10).logical_or(dead).all()
    assert delta.max() <= 1e-10


@given(chains(), chains())
def test_mass_is_at_most_one_with_merges(one: nn.Sequential, two: nn.Sequential) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) - self.two(torch.tanh(x))

    attribution, delta = attribute(Both(), images(), 1)
    assert mass(attribution).max() <= 1 + 1e-10
    assert delta.max() <= 1e-10


@given(
    seeds,
    widths,
    st.sampled_from([1, 2]),
    st.sampled_from(["zeros", "reflect"]),
    st.booleans(),
)
def test_conv_and_norm_equal_the_folded_conv(
    seed: int, channels: int, stride: int, padding_mode: str, bias: bool
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(
        2, channels, 3, stride, padding=1, padding_mode=padding_mode, bias=bias
    ).double()
    norm = randomise_norms(nn.BatchNorm2d(channels)).double()
    norm.weight.data.mul_(torch.randn(channels).sign())
    rest = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]
    rest = [layer.double() for layer in rest]
    apart = nn.Sequential(conv, norm, *rest).eval()
    folded = nn.Sequential(fuse_conv_bn_eval(conv.eval(), norm.eval()), *rest).eval()
    x = images()
    left, right = attribute(apart, x, 1)[0], attribute(folded, x, 1)[0]
    assert relative_error(left, right) <= 1e-9


@given(seeds, widths, widths, widths)
def test_a_linear_equals_two_that_multiply_to_it(seed: int, n: int, inner: int, out: int) -> None:
    torch.manual_seed(seed)
    one, two = nn.Linear(n, inner).double(), nn.Linear(inner, out).double()
    product = nn.Linear(n, out).double()
    product.weight.data = two.weight.data @ one.weight.data
    product.bias.data = two.weight.data @ one.bias.data + two.bias.data
    head = nn.Linear(out, 3).double()
    x = torch.randn(3, n, dtype=torch.float64)
    apart = attribute(nn.Sequential(one, two, nn.ReLU(), head), x, 2)[0]
    together = attribute(nn.Sequential(product, nn.ReLU(), head), x, 2)[0]
    assert relative_error(apart, together) <= 1e-9


@given(chains(), st.integers(0, 5))
def test_splitting_a_batch_changes_nothing(model: nn.Sequential, cut: int) -> None:
    x, targets = images(5), torch.tensor([0, 1, 2, 1, 0])
    rlrp = RelativeLRP(model)
    whole, delta = rlrp.attribute(x, targets, return_convergence_delta=True)
    parts = [rlrp.attribute(x[s], targets[s]) for s in (slice(cut), slice(cut, None))]
    assert relative_error(torch.cat(parts), whole) <= 1e-9
    assert delta.shape == (5,)


@given(chains(), st.permutations(range(3)))
def test_the_order_of_a_batch_does_not_matter(model: nn.Sequential, order: list[int]) -> None:
    x, targets = images(3), torch.tensor([0, 1, 2])
    rlrp = RelativeLRP(model)
    straight = rlrp.attribute(x, targets)
    shuffled = rlrp.attribute(x[order], targets[order])
    assert relative_error(shuffled, straight[order]) <= 1e-9


@given(chains(bias=False, smooth=False), st.floats(0.01, 100), st.integers(0, 3), st.data())
def test_scaling_a_layer_of_a_bias_free_relu_net_changes_nothing(
    model: nn.Sequential, factor: float, which: int, data: st.DataObject
) -> None:
    x = images()
    before = attribute(model, x, 1)[0]
    layers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    layers[which % len(layers)].weight.data.mul_(factor)
    assert relative_error(attribute(model, x, 1)[0], before) <= 1e-9


@given(chains(bias=False, smooth=False), st.floats(0.01, 100))
def test_scaling_the_input_of_a_bias_free_relu_net_changes_nothing(
    model: nn.Sequential, factor: float
) -> None:
    x = images()
    rlrp = RelativeLRP(model)
    assert relative_error(rlrp.attribute(factor * x, 1), rlrp.attribute(x, 1)) <= 1e-9


@given(seeds, widths)
def test_permuting_hidden_units_changes_nothing(seed: int, width: int) -> None:
    torch.manual_seed(seed)
    one, two = nn.Linear(4, width).double(), nn.Linear(width, 3).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = attribute(nn.Sequential(one, nn.ReLU(), two), x, 1)[0]
    order = torch.randperm(width)
    one.weight.data, one.bias.data = one.weight.data[order], one.bias.data[order]
    two.weight.data = two.weight.data[:, order]
    assert relative_error(attribute(nn.Sequential(one, nn.ReLU(), two), x, 1)[0], before) <= 1e-9


@given(seeds, st.floats(-3, 3), st.floats(-3, 3))
def test_skip_shares_lie_between_zero_and_one(seed: int, a: float, b: float) -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    xs = tuple(torch.tensor([[v]], dtype=torch.float64) for v in (a, b))
    left, right = (r.item() for r in RelativeLRP(Sum().eval()).attribute(xs, target=0))
    assert 0 <= left <= 1
    assert 0 <= right <= 1
    assert abs(left + right - 1) <= 1e-12
    if a != 0 or b != 0:
        assert abs(left - abs(a) / (abs(a) + abs(b))) <= 1e-12


@given(chains())
def test_an_input_of_zero_receives_nothing(model: nn.Sequential) -> None:
    x = images()
    x[:, 0] = 0
    attribution, _ = attribute(model, x)
    assume(isinstance(model[0], nn.Conv2d))
    assert not attribution[:, 0].any()


@given(chains(smooth=False))
def test_relevance_is_zero_where_the_activation_is(model: nn.Sequential) -> None:
    """After a ReLU that starts a section, dead units have no relevance."""
    x = images()
    h = F.relu(x)
    attribution, _ = attribute(nn.Sequential(nn.ReLU(), *model), x)
    assert not attribution[h == 0].any()
