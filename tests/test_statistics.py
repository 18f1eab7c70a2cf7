"""RelevanceStatistics against NumPy and SciPy on stored attributions, and by hand."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_rlrp import InputError, LayerRelativeLRP, RelativeLRP, RelevanceStatistics
from captum_rlrp.dataset.flow import carried_by
from captum_rlrp.dataset.significance import benjamini_hochberg, holm, two_sided_p
from captum_rlrp.run import capturing
from tests.oracle import randomise_norms

matplotlib.use("Agg")
from matplotlib import pyplot as plt

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A skip connection, a ReLU that is called twice, a channel that is always 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.conv(x)))
        h = self.relu(h + self.branch(h))
        return self.head(self.pool(h).flatten(1))


LAYERS = ["input", "conv", "norm", "relu", "branch", "relu#2", "pool", "head"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = randomise_norms(Net()).double().eval()
    with torch.no_grad():
        model.norm.weight[1], model.norm.bias[1] = 0, -1
    return model


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(41, 2, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (41,), generator=generator)


@pytest.fixture(scope="module")
def statistics(model: nn.Module, data: tuple[Tensor, Tensor]) -> RelevanceStatistics:
    """Explains the labels, in batches of 8 and a last one of 1."""
    return RelevanceStatistics.collect(
        model, DataLoader(TensorDataset(*data), batch_size=8), target="label"
    )


@pytest.fixture(scope="module")
def stored(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
    """The attributions themselves, by layer."""
    x, labels = data
    explainer = LayerRelativeLRP(model)
    names = explainer.layer_names(x)
    found: dict[str, np.ndarray] = {"input": RelativeLRP(model).attribute(x, labels).numpy()}
    for name, value in zip(names, explainer.attribute(x, labels), strict=True):
        calls = value if isinstance(value, tuple) else (value,)
        for i, call in enumerate(calls):
            found[name if i == 0 else f"{name}#{i + 1}"] = call.numpy()
    return found


@pytest.fixture
def no_figures() -> Iterator[None]:
    yield
    plt.close("all")


def units(value: np.ndarray) -> np.ndarray:
    return value.reshape(*value.shape[:2], -1).sum(2)


def close(actual: object, expected: object) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-9, atol=1e-12)


# ---- against the stored attributions -------------------------------------------------------------


def test_layers_and_counts(
    statistics: RelevanceStatistics, data: tuple[Tensor, Tensor], stored: dict[str, np.ndarray]
) -> None:
    assert statistics.layers == LAYERS
    assert set(stored) == set(LAYERS)
    assert statistics.counts == {i: int((data[1] == i).sum()) for i in range(3)}


@pytest.mark.parametrize("of", [None, 0, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_mean_error_and_shape(
    layer: str,
    of: int | None,
    statistics: RelevanceStatistics,
    data: tuple[Tensor, Tensor],
    stored: dict[str, np.ndarray],
) -> None:
    chosen = np.ones(41, bool) if of is None else (data[1] == of).numpy()
    value = stored[layer][chosen]
    close(statistics.mean(layer, of), units(value).mean(0))
    close(statistics.standard_error(layer, of), scipy.stats.sem(units(value), 0))
    flat = value.reshape(len(value), -1)
    close(statistics.mass(layer, of), np.abs(flat).sum(1).mean())
    close(statistics.positive_share(layer, of), flat.clip(0).sum() / np.abs(flat).sum())
    effective = np.abs(units(value)).sum(1) ** 2 / (units(value) ** 2).sum(1)
    close(statistics.effective_units(layer, of), effective.mean())


@pytest.mark.parametrize("layer", ["input", "branch", "pool"])
def test_comparison(
    layer: str,
    statistics: RelevanceStatistics,
    data: tuple[Tensor, Tensor],
    stored: dict[str, np.ndarray],
) -> None:
    value, labels = units(stored[layer]), data[1].numpy()
    for b, others in ((2, labels == 2), (None, labels != 0)):
        a, rest = value[labels == 0], value[others]
        alive = (value != 0).any(0)
        expected = scipy.stats.ttest_ind(a[:, alive], rest[:, alive], equal_var=False)
        made = statistics.compare(layer, 0, b)
        close(made.difference, a.mean(0) - rest.mean(0))
        close(made.t[torch.from_numpy(alive)], expected.statistic)
        close(made.p[torch.from_numpy(alive)], expected.pvalue)
        assert (made.p[torch.from_numpy(~alive)] == 1).all()
        close(made.adjusted, holm(made.p))
        found = statistics.compare(layer, 0, b, correction="benjamini-hochberg")
        close(found.adjusted, scipy.stats.false_discovery_control(made.p.numpy()))


@pytest.mark.parametrize("size", [1, 7, 41])
def test_batches_do_not_matter(
    size: int, model: nn.Module, data: tuple[Tensor, Tensor], statistics: RelevanceStatistics
) -> None:
    batches = zip(*(part.split(size) for part in data), strict=True)
    again = RelevanceStatistics.collect(model, batches, [model.branch], target="label")
    assert again.layers == ["input", "branch"]
    assert again.edges == [("input", "branch")]
    for of in (None, 0, 1, 2):
        for made in (RelevanceStatistics.mean, RelevanceStatistics.standard_error):
            close(made(again, "branch", of), made(statistics, "branch", of))


# ---- what is explained, and what is a unit -------------------------------------------------------


def test_predicted_class_is_explained_by_default(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x = data[0]
    predicted = model(x).argmax(1)
    expected = units(RelativeLRP(model).attribute(x, target=predicted).numpy())
    for batches in ([x[:20], x[20:]], [(x,)], [[x, data[1]]]):
        made = RelevanceStatistics.collect(model, batches, layers=[])
        assert made.counts == Counter(predicted.tolist())
        for number in made.counts:
            close(made.mean("input", number), expected[predicted == number].mean(0))


def test_one_output_by_label(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, labels = data
    made = RelevanceStatistics.collect(model, [data], layers=[], target=1, group_by="label")
    expected = units(RelativeLRP(model).attribute(x, target=1).numpy())
    close(made.mean("input", 2), expected[labels == 2].mean(0))


def test_units(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Every pixel a unit at the input, columns at the convolution, channels elsewhere."""
    x = data[0]
    made = RelevanceStatistics.collect(model, [x], target=0, unit_dim={"input": None, "conv": -1})
    attributions = RelativeLRP(model).attribute(x, target=0)
    close(made.mean("input"), attributions.flatten(1).mean(0))
    at_conv = LayerRelativeLRP(model, model.conv).attribute(x, target=0)
    close(made.mean("conv"), at_conv.sum((1, 2)).mean(0))
    assert len(made.mean("branch")) == 4


class Tokens(nn.Module):
    """A transformer on tokens: the batch is dimension 1 inside ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(ids)).mean(1))


def test_tokens() -> None:
    model, ids = Tokens().eval(), torch.randint(11, (6, 5))
    made = RelevanceStatistics.collect(model, [ids[:4], ids[4:]], target=1, unit_dim=-1)
    assert "input" not in made.layers
    assert made.layers[0] == "embedding"
    at_embedding = LayerRelativeLRP(model, model.embedding).attribute(ids, target=1)
    torch.testing.assert_close(made.mean("embedding"), at_embedding.sum(1).mean(0).double())
    assert all(name in made.layers for pair in made.edges for name in pair)


def test_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y)

    batch = ((torch.randn(5, 3).double(), torch.randn(5, 2).double()), torch.arange(5) % 2)
    made = RelevanceStatistics.collect(Two().double().eval(), [batch], target="label")
    assert made.layers == ["input 0", "input 1", "a", "b"]
    assert made.edges == [("input 0", "a"), ("input 1", "b")]
    close(made.mass("a") + made.mass("b"), 1)


# ---- by hand -------------------------------------------------------------------------------------


def test_network_of_the_method_document() -> None:
    """r_h = (1, 0) and r_x = (1/3, 2/3); effective units 1 and 1/(1/9 + 4/9) = 9/5."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double().eval()
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1, 1], [1, -1]])
        model[2].weight[:] = torch.tensor([[2, 3]])
        for layer in (model[0], model[2]):
            layer.bias.zero_()
    made = RelevanceStatistics.collect(model, [torch.tensor([[1.0, 2.0]]).double()])
    assert made.layers == ["input", "0", "1", "2"]
    close(made.mean("input"), [1 / 3, 2 / 3])
    close(made.mean("1"), [1, 0])
    assert made.standard_error("input").isnan().all()
    assert [made.mass(name) for name in made.layers] == [1, 1, 1, 1]
    close([made.effective_units(name) for name in made.layers], [9 / 5, 1, 1, 1])
    assert made.positive_share("input") == 1


def test_constant_units() -> None:
    """Without variance a difference is certain, and no difference is none."""
    model = nn.Linear(2, 2, bias=False).eval()
    with torch.no_grad():
        model.weight[:] = torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    x = torch.ones(6, 2)
    made = RelevanceStatistics.collect(model, [(x, torch.arange(6) % 2)], target="label")
    # Shares (1/2, 1/2) and (1/4, 3/4).
    result = made.compare("input", 0, 1)
    assert result.p.tolist() == [0, 0]
    assert result.t.tolist() == [float("inf"), -float("inf")]
    assert result.significant().tolist() == [0, 1]
    alike = RelevanceStatistics.collect(
        model, [(x, torch.arange(6) % 2)], target=0, group_by="label"
    )
    assert alike.compare("input", 0, 1).p.tolist() == [1, 1]
    assert alike.compare("input", 0, 1).significant().tolist() == []


def test_student_distribution() -> None:
    t = torch.tensor([0.0, 0.01, 0.5, 1.0, -1.9, 5.0, 20.0, 300.0], dtype=torch.float64)
    cauchy = 1 - 2 / torch.pi * t.abs().atan()
    torch.testing.assert_close(two_sided_p(t, torch.ones(())), cauchy, rtol=1e-9, atol=1e-12)


def test_corrections_by_hand() -> None:
    p = torch.tensor([0.04, 0.01, 0.03, 0.5], dtype=torch.float64)
    close(holm(p), [0.09, 0.04, 0.09, 0.5])  # 4·0.01, 3·0.03, max(2·0.04, 0.09), 0.5
    close(benjamini_hochberg(p), [0.16 / 3, 0.04, 0.16 / 3, 0.5])  # 4/3·0.04 is below 4/2·0.03


# ---- the flow ------------------------------------------------------------------------------------


def test_edges_follow_relevance(statistics: RelevanceStatistics) -> None:
    expected = {
        *itertools.pairwise(LAYERS),
        ("relu", "relu#2"),  # the skip connection
    }
    assert set(statistics.edges) == expected


def test_gates_have_no_edges() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.head = nn.Conv2d(1, 2, 1), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x)
            gate = torch.sigmoid(self.gate(h.mean((2, 3))))
            return self.head((h * gate[:, :, None, None]).mean((2, 3)))

    made = RelevanceStatistics.collect(Gated().eval(), [torch.randn(3, 1, 4, 4)])
    assert made.edges == [("input", "conv"), ("conv", "head")]
    assert made.mass("gate") == 0


def test_relevance_along_edges() -> None:
    """b goes nowhere but to c, so c sends the rest, 0.6, past it; a sends all of b's to b."""
    mass = {"a": 0.9, "b": 0.4, "c": 1.0, "d": 1.0}
    edges = [("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")]
    carried = carried_by(mass, edges)
    assert list(carried) == edges
    close(list(carried.values()), [0.4, 0.4, 0.6, 1.0])


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("of", [None, 1])
def test_plot(of: int | None, statistics: RelevanceStatistics) -> None:
    ax = statistics.plot_flow(of=of)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == LAYERS
    plus, minus = ax.containers
    heights = [a.get_height() + b.get_height() for a, b in zip(plus, minus, strict=True)]
    close(heights, [statistics.mass(name, of) for name in LAYERS])
    arcs = [p for p in ax.patches if isinstance(p, matplotlib.patches.PathPatch)]
    assert len(arcs) == 1  # the skip connection
    _, mine = plt.subplots()
    assert statistics.plot_flow(mine) is mine


# ---- the rest ------------------------------------------------------------------------------------


def test_pickles_without_the_model(statistics: RelevanceStatistics) -> None:
    again = pickle.loads(pickle.dumps(statistics))
    assert again.edges == statistics.edges
    close(again.mean("conv", 1), statistics.mean("conv", 1))


def test_model_is_left_alone(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    RelevanceStatistics.collect(model, [data[0]])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(module._forward_hooks for module in model.modules())


def test_errors(
    model: nn.Module, data: tuple[Tensor, Tensor], statistics: RelevanceStatistics
) -> None:
    collect = RelevanceStatistics.collect
    with pytest.raises(InputError, match="holds no samples"):
        collect(model, [])
    with pytest.raises(InputError, match="no labels"):
        collect(model, [data[0]], target="label")
    with pytest.raises(InputError, match="one row of scores"):
        collect(nn.Conv2d(2, 2, 1).double().eval(), [data[0]])
    with pytest.raises(InputError, match="not a module of the model"):
        collect(model, [data[0]], layers=[nn.ReLU()])
    with pytest.raises(InputError, match="No layer 'stem'; there are input, conv"):
        statistics.mean("stem")
    with pytest.raises(InputError, match=r"No sample of class 7; there are \[0, 1, 2\]"):
        statistics.mean("conv", 7)
    with pytest.raises(InputError, match="at least two samples"):
        collect(model, [(data[0][:3], [0, 0, 1])], target="label").compare("input", 0, 1)
    with pytest.raises(InputError, match="no class but 0"):
        collect(model, [data[0]], target=0).compare("input", 0)
    with pytest.raises(InputError, match="No such correction"):
        statistics.compare("conv", 0, 1, correction="none")


def test_what_is_kept_does_not_grow(model: nn.Module) -> None:
    """A generator of batches is read once; pickled, the result of many is as large as of few."""

    def size(count: int) -> int:
        batches = (torch.randn(4, 2, 6, 6, dtype=torch.float64) for _ in range(count))
        made = RelevanceStatistics.collect(model, batches, target=2)
        assert made.counts == {2: 4 * count}
        return len(pickle.dumps(made))

    assert abs(size(2) - size(6)) < 100


def test_dense_layers_have_their_neurons_as_units() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    x = F.normalize(torch.randn(9, 3))
    made = RelevanceStatistics.collect(model, [x])
    assert [len(made.mean(name)) for name in made.layers] == [3, 5, 5, 2]


def test_a_batch_that_goes_through_in_portions(
    model: nn.Module, data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large ones do on a CPU: the targets of each portion are its own samples'."""
    for target, batch in ((None, data[0]), ("label", data)):
        whole = RelevanceStatistics.collect(model, [batch], target=target)
        with monkeypatch.context() as patch:
            patch.setattr(capturing, "find_portion", lambda graph, layouts: 16)
            divided = RelevanceStatistics.collect(model, [batch], target=target)
        assert divided.counts == whole.counts
        for of in (None, *whole.counts):
            close(divided.mean("conv", of), whole.mean("conv", of))


def test_parts_counted_apart_and_saved(
    data: tuple[Tensor, Tensor],
    statistics: RelevanceStatistics,
    stored: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    """Two halves, explained elsewhere, written and read, are the whole."""
    halves = []
    for part in (slice(0, 20), slice(20, 41)):
        half = RelevanceStatistics()
        relevance = {name: torch.from_numpy(stored[name][part]) for name in LAYERS}
        half.add(relevance, data[1][part])
        half.edges = statistics.edges
        half.save(tmp_path / "half.h5")
        halves.append(RelevanceStatistics.load(tmp_path / "half.h5"))
    halves[0].merge(halves[1])
    assert halves[0].layers == LAYERS
    assert halves[0].edges == statistics.edges
    for layer in LAYERS:
        for of in (None, 0, 1, 2):
            close(halves[0].mean(layer, of), statistics.mean(layer, of))
            close(halves[0].standard_error(layer, of), statistics.standard_error(layer, of))
            close(halves[0].mass(layer, of), statistics.mass(layer, of))
    with pytest.raises(InputError, match="statistics of the layers input, conv"):
        halves[0].add({"conv": torch.zeros(2, 4)}, torch.zeros(2, dtype=torch.long))
