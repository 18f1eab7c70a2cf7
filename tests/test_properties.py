"""Laws that hold for every network, tried on random ones, along every path."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from captum_rlrp import LayerRelativeLRP, RelativeLRP
from tests.oracle import Value, explain, randomise_norms, relative_error
from tests.paths import all_paths

seeds = st.integers(0, 2**32 - 1)
widths = st.integers(2, 6)


def attribute(model: nn.Module, x: Tensor, target: object = 0) -> Tensor:
    (attribution,) = all_paths(model.double().eval(), x, target)
    return attribution


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
                values.append(a.dense(layer) if op == "linear" else a.move(layer))
            elif op == "add":
                values.append(a + b)
            elif op == "sub":
                values.append(a - b)
            elif op == "mul":
                values.append(a * b)
            else:
                gate = b.pool(lambda t: t.mean(1, keepdim=True)).act(torch.sigmoid)
                values.append(a * gate)
        return values[-1].dense(self.head)


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
    assert relative_error(attribute(model, x, [2, 1]), expected) <= 1e-9


# ---- conservation --------------------------------------------------------------------------------


@given(chains())
def test_spatial_maps_keep_the_sum(model: nn.Sequential) -> None:
    """What a convolution hands on is what arrived, where no window stands on the bias alone."""
    assume(model[0].kernel_size == (3, 3))
    x = images().abs() + 0.1
    behind = LayerRelativeLRP(model, model[0]).attribute(x, 1)
    relevance = attribute(model, x, 1)
    torch.testing.assert_close(relevance.flatten(1).sum(1), behind.flatten(1).sum(1))
    # Both lobes of a filter share alike: no sign is turned round.
    assert relevance.abs().flatten(1).sum(1).le(behind.abs().flatten(1).sum(1) + 1e-12).all()


@given(seeds, widths, widths)
def test_dense_maps_keep_their_share_of_the_output(seed: int, n: int, width: int) -> None:
    """Σ_i r_i = Σ_j r_j (y_j − b_j) / D_j."""
    torch.manual_seed(seed)
    first, last = nn.Linear(n, width).double(), nn.Linear(width, 3).double()
    x = torch.randn(3, n, dtype=torch.float64)
    model = nn.Sequential(first, nn.Tanh(), last).eval()
    behind = LayerRelativeLRP(model, first).attribute(x, 1)
    with torch.no_grad():
        kept = (first(x) - first.bias) / (x.abs() @ first.weight.abs().T)
    torch.testing.assert_close(attribute(model, x, 1).sum(1), (kept * behind).sum(1))


@given(chains(), chains())
def test_no_share_is_larger_than_one(one: nn.Sequential, two: nn.Sequential) -> None:
    """Σ|R| ≤ 1 with merges too; :func:`all_paths` looks at it."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) - self.two(torch.tanh(x))

    attribute(Both(), images(), 1)


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
    assert not attribute(model, x)[:, 0].any()
    assert not attribute(model, 0 * x).any()


# ---- what changes nothing ------------------------------------------------------------------------


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
    assert relative_error(attribute(apart, x, 1), attribute(folded, x, 1)) <= 1e-9


@given(seeds, st.floats(1e-3, 1e3))
def test_the_scale_of_one_neuron_does_not_matter(seed: int, factor: float) -> None:
    """Its incoming weights times c, its outgoing ones by c: dense neurons and channels."""
    torch.manual_seed(seed)
    conv, one, two = nn.Conv2d(2, 4, 3), nn.Linear(16, 5), nn.Linear(5, 3)
    layers = [conv, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), one, nn.ReLU(), two]
    model = nn.Sequential(*layers).double()
    x = images()
    before = attribute(model, x, 1)
    with torch.no_grad():
        for layer, behind, columns in ((conv, one, slice(4, 8)), (one, two, slice(1, 2))):
            layer.weight[1] *= factor
            layer.bias[1] *= factor
            behind.weight[:, columns] /= factor
    assert relative_error(attribute(model, x, 1), before) <= 1e-9


@given(chains(bias=False, smooth=False), st.floats(0.01, 100), st.integers(0, 3))
def test_scaling_a_layer_of_a_bias_free_relu_net_changes_nothing(
    model: nn.Sequential, factor: float, which: int
) -> None:
    x = images()
    before = attribute(model, x, 1)
    layers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    layers[which % len(layers)].weight.data.mul_(factor)
    assert relative_error(attribute(model, x, 1), before) <= 1e-9


@given(chains(bias=False, smooth=False), st.sampled_from([1e-38, 0.01, 3.0, 100.0, 1e20]))
def test_scaling_the_input_of_a_bias_free_relu_net_changes_nothing(
    model: nn.Sequential, factor: float
) -> None:
    x = images()
    straight = attribute(model, x, 1)
    assert relative_error(attribute(model, factor * x, 1), straight) <= 1e-9
    model.float()
    (narrow,) = all_paths(model, x.float(), 1)
    (scaled,) = all_paths(model, (factor * x).float(), 1, tolerance=2e-3)
    # Numbers below 1.2e-38 hold fewer digits.
    assert relative_error(scaled, narrow) <= (1e-4 if factor > 1e-30 else 0.1)


@given(seeds, widths)
def test_permuting_hidden_units_changes_nothing(seed: int, width: int) -> None:
    torch.manual_seed(seed)
    one, two = nn.Linear(4, width).double(), nn.Linear(width, 3).double()
    model = nn.Sequential(one, nn.ReLU(), two)
    x = torch.randn(3, 4, dtype=torch.float64)
    before = attribute(model, x, 1)
    order = torch.randperm(width)
    one.weight.data, one.bias.data = one.weight.data[order], one.bias.data[order]
    two.weight.data = two.weight.data[:, order]
    assert relative_error(attribute(model, x, 1), before) <= 1e-9


@given(chains(), st.integers(0, 5), st.permutations(range(5)))
def test_neither_the_order_of_a_batch_matters_nor_its_size(
    model: nn.Sequential, cut: int, order: list[int]
) -> None:
    x, targets = images(5), torch.tensor([0, 1, 2, 1, 0])
    whole = attribute(model, x, targets)
    rlrp = RelativeLRP(model)
    parts = [rlrp.attribute(x[s], targets[s]) for s in (slice(cut), slice(cut, None))]
    assert relative_error(torch.cat(parts), whole) <= 1e-9
    assert relative_error(rlrp.attribute(x[order], targets[order]), whole[order]) <= 1e-9


@given(chains())
def test_memory_formats_and_dtypes(model: nn.Sequential) -> None:
    x = images()
    expected = attribute(model, x, 1)
    last = x.to(memory_format=torch.channels_last)
    assert relative_error(attribute(model, last, 1), expected) <= 1e-9
    assert relative_error(attribute(model, x.flip(-1).flip(-1)[:, :], 1), expected) <= 1e-9
    (single,) = all_paths(model.float(), x.float(), 1)
    assert relative_error(single, expected) <= 1e-4


def test_half_precision() -> None:
    """The activations are rounded to 16 bits, relevance is not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    x = torch.rand(2, 2, 8, 8) + 0.1
    for dtype, bound in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        rounded = x.to(dtype)
        (narrow,) = all_paths(model.to(dtype), rounded, [0, 2], tolerance=bound, delta=bound)
        (wide,) = all_paths(model.double(), rounded.double(), [0, 2])
        assert relative_error(narrow, wide) <= bound
