"""LayerRelativeLRP: relevance anywhere inside the network."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerLRP
from captum.attr._utils.attribution import LayerAttribution
from torch import Tensor, nn

from captum_rlrp import LayerRelativeLRP, RelativeLRP
from tests.oracle import Attribution, Value, cat, frozen, randomise_norms, relative_error


class Net(nn.Module):
    """Two sections, a norm alone, a skip connection, a container and a reused ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.alone = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.conv(x)))
        h = self.relu(self.alone(h + self.block(h)))
        return self.head(self.flat(self.mean(self.pool(h))))


def oracle(model: Net, x: Tensor, targets: list[int]) -> dict[str, Tensor]:
    """Relevance at every value of the network by name, in float64."""
    m = frozen(model)
    rows: dict[str, list[Tensor]] = {}
    for i, target in enumerate(targets):
        v = {"input": Value(x[i : i + 1].double())}
        v["conv"] = v["input"].spatial(m.conv)
        v["norm"] = v["conv"].move(m.norm)
        v["relu 1"] = v["norm"].act(F.relu)
        v["block.0"] = v["relu 1"].spatial(m.block[0])
        v["block.1"] = v["block.0"].move(m.block[1])
        v["sum"] = v["relu 1"] + v["block.1"]
        v["alone"] = v["sum"].move(m.alone)
        v["relu 2"] = v["alone"].act(F.relu)
        v["pool"] = v["relu 2"].route(m.pool)
        v["mean"] = v["pool"].pool(m.mean)
        v["flat"] = v["mean"].move(m.flat)
        v["head"] = v["flat"].dense(m.head)
        relevance = Attribution(v["head"], (target,))
        for name, value in v.items():
            rows.setdefault(name, []).append(relevance.at(value))
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.fixture
def model() -> Net:
    return randomise_norms(Net()).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 2, 6, 6, dtype=torch.float64)


TARGETS = [2, 0]


def close(actual: Tensor, expected: Tensor) -> None:
    assert relative_error(actual, expected) <= 1e-9


# name of the module → the oracle's value at its output, and at its input
SITES = {
    "conv": ("conv", "input"),
    "norm": ("norm", "conv"),
    "block": ("block.1", "relu 1"),
    "block.0": ("block.0", "relu 1"),
    "block.1": ("block.1", "block.0"),
    "alone": ("alone", "sum"),
    "pool": ("pool", "relu 2"),
    "mean": ("mean", "pool"),
    "flat": ("flat", "mean"),
    "head": ("head", "flat"),
}


@pytest.mark.parametrize("name", ["conv", "block", "pool"])
def test_output_of_one_layer(model: Net, x: Tensor, name: str) -> None:
    attribution = LayerRelativeLRP(model, model.get_submodule(name)).attribute(x, TARGETS)
    assert isinstance(attribution, Tensor)
    close(attribution, oracle(model, x, TARGETS)[SITES[name][0]])


def test_input_of_one_layer(model: Net, x: Tensor) -> None:
    attribution = LayerRelativeLRP(model, model.alone).attribute(
        x, TARGETS, attribute_to_layer_input=True
    )
    assert isinstance(attribution, Tensor)
    close(attribution, oracle(model, x, TARGETS)["sum"])


@pytest.mark.parametrize("at_input", [False, True])
def test_every_place(model: Net, x: Tensor, at_input: bool) -> None:
    layers = [model.get_submodule(name) for name in SITES]
    attributions = LayerRelativeLRP(model, layers).attribute(
        x, TARGETS, attribute_to_layer_input=at_input
    )
    expected = oracle(model, x, TARGETS)
    for sites, attribution in zip(SITES.values(), attributions, strict=True):
        close(attribution, expected[sites[at_input]])


def test_several_layers_in_one_pass(model: Net, x: Tensor) -> None:
    names = ["pool", "conv", "head"]
    expected = oracle(model, x, TARGETS)
    for kind in (list, tuple):
        layers = kind(model.get_submodule(name) for name in names)
        attributions = LayerRelativeLRP(model, layers).attribute(x, TARGETS)
        assert isinstance(attributions, list)
        assert len(attributions) == len(names)
        for name, attribution in zip(names, attributions, strict=True):
            close(attribution, expected[SITES[name][0]])


def test_one_layer_in_a_list(model: Net, x: Tensor) -> None:
    (attribution,) = LayerRelativeLRP(model, [model.pool]).attribute(x, TARGETS)
    close(attribution, oracle(model, x, TARGETS)["pool"])


def test_all_layers(model: Net, x: Tensor) -> None:
    method = LayerRelativeLRP(model, None)
    attributions = method.attribute(x, TARGETS)
    names = method.layer_names(x)
    assert len(attributions) == len(names)
    assert list(dict.fromkeys(names)) == [
        "conv", "norm", "relu", "block.0", "block.1", "alone", "pool", "mean", "flat", "head"
    ]  # fmt: skip
    expected = oracle(model, x, TARGETS)
    for name, attribution in zip(names, attributions, strict=True):
        if name != "relu":
            close(attribution, expected[SITES[name][0]])


def test_a_reused_module_gives_one_entry_per_call(model: Net, x: Tensor) -> None:
    attributions = LayerRelativeLRP(model, model.relu).attribute(x, TARGETS)
    assert isinstance(attributions, tuple)
    expected = oracle(model, x, TARGETS)
    first, second = attributions
    close(first, expected["relu 1"])
    close(second, expected["relu 2"])


def test_input_of_a_reused_module(model: Net, x: Tensor) -> None:
    first, second = LayerRelativeLRP(model, model.relu).attribute(
        x, TARGETS, attribute_to_layer_input=True
    )
    expected = oracle(model, x, TARGETS)
    close(first, expected["norm"])
    close(second, expected["alone"])


def test_the_whole_model_as_the_layer(model: Net, x: Tensor) -> None:
    expected = oracle(model, x, TARGETS)
    close(LayerRelativeLRP(model, model).attribute(x, TARGETS), expected["head"])
    at_input = LayerRelativeLRP(model, model).attribute(x, TARGETS, attribute_to_layer_input=True)
    close(at_input, expected["input"])
    close(at_input, RelativeLRP(model).attribute(x, TARGETS))


def test_delta_is_the_same_as_without_layers(model: Net, x: Tensor) -> None:
    for layer in (model.pool, [model.pool, model.conv], None):
        _, delta = LayerRelativeLRP(model, layer).attribute(
            x, TARGETS, return_convergence_delta=True
        )
        assert delta.shape == (2,)
        assert delta.max() <= 1e-10


def test_results_are_detached_and_contiguous(model: Net, x: Tensor) -> None:
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    for attribution in LayerRelativeLRP(model, [model.conv, model.flat, model.pool]).attribute(
        x, TARGETS
    ):
        assert attribution.is_contiguous()
        assert not attribution.requires_grad
        assert attribution.dtype == x.dtype


def test_float32(model: Net, x: Tensor) -> None:
    expected = oracle(model, x, TARGETS)
    model.float()
    names = list(SITES)
    layers = [model.get_submodule(name) for name in names]
    attributions = LayerRelativeLRP(model, layers).attribute(x.float(), TARGETS)
    for name, attribution in zip(names, attributions, strict=True):
        assert attribution.dtype == torch.float32
        assert relative_error(attribution, expected[SITES[name][0]]) <= 1e-4


def test_family_and_signature(model: Net) -> None:
    method = LayerRelativeLRP(model, model.conv)
    assert isinstance(method, LayerAttribution)
    assert method.layer is model.conv
    ours, theirs = (inspect.signature(c.attribute).parameters for c in (LayerRelativeLRP, LayerLRP))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert method.has_convergence_delta() is True


def test_interpolate_to_the_size_of_the_input(model: Net, x: Tensor) -> None:
    attribution = LayerRelativeLRP(model, model.pool).attribute(x, TARGETS)
    assert LayerAttribution.interpolate(attribution, (6, 6)).shape == (2, 4, 6, 6)


def test_an_empty_batch(model: Net, x: Tensor) -> None:
    layers = [model.pool, model.relu]
    pool, relus = LayerRelativeLRP(model, layers).attribute(x[:0], 1)
    assert pool.shape == (0, 4, 3, 3)
    assert [r.shape for r in relus] == [(0, 4, 6, 6)] * 2


# ---- modules that give and take tuples -----------------------------------------------------------


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.a(x)), torch.tanh(self.b(x))


class Join(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 1)


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fork, self.join, self.head = Fork(), Join(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(*self.fork(x)))


@pytest.mark.parametrize("at_input", [False, True])
def test_tuples(at_input: bool) -> None:
    model = Forked().double().eval()
    m, x = frozen(model), torch.randn(1, 4, dtype=torch.float64)
    start = Value(x)
    a, b = start.dense(m.fork.a).act(torch.relu), start.dense(m.fork.b).act(torch.tanh)
    joined = cat([a, b], 1)
    relevance = Attribution(joined.dense(m.head), (1,))
    layer = model.join if at_input else model.fork
    attribution = LayerRelativeLRP(model, layer).attribute(x, 1, attribute_to_layer_input=at_input)
    assert isinstance(attribution, tuple)
    left, right = attribution
    close(left, relevance.at(a))
    close(right, relevance.at(b))
    close(LayerRelativeLRP(model, model.join).attribute(x, 1), relevance.at(joined))


# ---- embeddings ----------------------------------------------------------------------------------


def test_embedding() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    model = model.double().eval()
    tokens = torch.tensor([[1, 2, 3], [8, 8, 0]])
    attribution = LayerRelativeLRP(model, model[0]).attribute(tokens, target=[0, 2])
    m = frozen(model)
    rows = []
    for token, target in zip(tokens, (0, 2), strict=True):
        start = Value(m[0](token[None]))
        out = start.move(m[1]).dense(m[2]).act(torch.relu).dense(m[4])
        rows.append(Attribution(out, (target,)).at(start))
    close(attribution, torch.cat(rows))


def test_additional_forward_args() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: Tensor | None, times: int) -> Tensor:
            for _ in range(times):
                x = torch.relu(self.one(x))
            return self.two(x if scale is None else x * scale)

    model, x = Scaled().eval(), torch.randn(2, 4)
    method = LayerRelativeLRP(model, None)
    assert method.layer_names(x, (None, 1)) == ["one", "two"]
    assert len(method.attribute(x, 1, additional_forward_args=(None, 1))) == 2
    twice = LayerRelativeLRP(model, model.one).attribute(
        x, 1, additional_forward_args=(torch.rand(2, 4), 2)
    )
    assert isinstance(twice, tuple)
    assert len(twice) == 2


class PassesOn(nn.Module):
    """Modules that return what they were given, between others and at a fan-out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.inside = nn.Identity()
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.empty = nn.Sequential()
        self.branch = nn.Sequential(nn.Identity(), nn.Sequential())
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.empty(self.relu(self.norm(self.inside(self.conv(x)))))
        return self.head((h + 2 * self.branch(h)).flatten(1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_modules_that_do_nothing(backend: str) -> None:
    torch.manual_seed(0)
    model = randomise_norms(PassesOn()).eval()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    model.double()

    def at(layer: nn.Module, **options: bool) -> Tensor:
        explainer = LayerRelativeLRP(model, layer, backend=backend)
        return explainer.attribute(x, target=1, **options)

    torch.testing.assert_close(at(model.inside), at(model.conv))
    torch.testing.assert_close(at(model.inside, attribute_to_layer_input=True), at(model.conv))
    torch.testing.assert_close(at(model.empty), at(model.relu))
    # h + 2h: a third takes the direct way, two thirds go through the branch and what is in it.
    for layer in (model.branch, *model.branch):
        torch.testing.assert_close(at(layer), at(model.relu) * 2 / 3)
    assert "branch.0" in LayerRelativeLRP(model, backend=backend).layer_names(x)


def test_an_identity_as_the_model_and_at_its_ends() -> None:
    x = torch.randn(2, 4)
    identity = nn.Identity().eval()
    expected = torch.tensor([[0.0, 1, 0, 0]] * 2)
    torch.testing.assert_close(LayerRelativeLRP(identity, identity).attribute(x, 1), expected)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 3), nn.Identity()).eval()
    first = LayerRelativeLRP(model, model[0]).attribute(x, target=1)
    torch.testing.assert_close(first, RelativeLRP(model).attribute(x, target=1))
    last = LayerRelativeLRP(model, model[2]).attribute(x, target=1)
    torch.testing.assert_close(last, expected[:, :3])


class Concatenate(nn.Module):
    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, 1)


class DenseBlock(nn.Module):
    """Every layer sees what all layers before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.cats = nn.ModuleList(Concatenate() for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(1, 4))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = [torch.relu(self.first(x))]
        features.append(torch.relu(self.convs[0](features[0])))
        for join, norm, conv in zip(self.cats, self.norms, self.convs[1:], strict=False):
            features.append(torch.relu(conv(torch.relu(norm(join(*features))))))
        return self.head(self.cats[3](*features).mean((2, 3)))


def dense_block_oracle(model: DenseBlock, x: Tensor, target: int) -> dict[str, Tensor]:
    m = frozen(model)
    rows: dict[str, list[Tensor]] = {}
    for sample in x.double().split(1):
        v = {"input": Value(sample)}
        v["first"] = v["input"].spatial(m.first)
        features = [v["first"].act(torch.relu)]
        features.append(features[0].spatial(m.convs[0]).act(torch.relu))
        for i in range(3):
            v[f"cats.{i}"] = cat(features, 1)
            hidden = v[f"cats.{i}"].move(m.norms[i]).act(torch.relu).spatial(m.convs[i + 1])
            features.append(hidden.act(torch.relu))
        v["cats.3"] = cat(features, 1)
        relevance = Attribution(v["cats.3"].pool(lambda t: t.mean((2, 3))).dense(m.head), (target,))
        for name, value in v.items():
            rows.setdefault(name, []).append(relevance.at(value))
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_dense_block_whose_joins_extend_each_other(dtype: torch.dtype) -> None:
    model = randomise_norms(DenseBlock()).double().eval()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    expected = dense_block_oracle(model, x, 1)
    model, x = frozen(model, dtype), x.to(dtype)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert relative_error(RelativeLRP(model).attribute(x, 1), expected["input"]) <= tolerance
    for name in ("first", "cats.0", "cats.1", "cats.2", "cats.3"):
        actual = LayerRelativeLRP(model, model.get_submodule(name)).attribute(x, 1)
        assert relative_error(actual, expected[name]) <= tolerance, name
