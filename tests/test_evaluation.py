"""The evaluation's measures against cases worked out by hand, and the whole on a known answer."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from captum_rlrp import RelativeLRP
from evaluation import compare, data, measures, networks, robustness, run
from evaluation.methods import METHODS, OURS, prepare
from evaluation.protocol import PROTOCOLS, TINY, Cell

# --- localisation -------------------------------------------------------------------------------

PLACES = torch.tensor([[4.0, 3.0, -2.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mask", "mass", "rank", "pointing"),
    [
        ([True, False, False, False], 4 / 8, 1.0, 1.0),
        ([True, False, True, False], 4 / 8, 0.5, 1.0),
        ([False, True, False, True], 4 / 8, 0.5, 0.0),
        ([False, False, True, False], 0.0, 0.0, 0.0),
    ],
)
def test_localisation_by_hand(mask, mass, rank, pointing):
    mask = torch.tensor([mask])
    assert measures.mass_accuracy(PLACES, mask).item() == pytest.approx(mass)
    assert measures.rank_accuracy(PLACES, mask).item() == pytest.approx(rank)
    assert measures.pointing(PLACES, mask).item() == pointing


def test_relevance_sums_channels_and_drops_what_is_not_finite():
    maps = torch.tensor([[[[1.0, float("nan")]], [[2.0, -1.0]], [[-4.0, float("inf")]]]])
    assert measures.relevance(maps).tolist() == [[-1.0, -1.0]]


def test_runaway_maps_do_not_overflow():
    places = torch.tensor([[1e38, 1e38, -3e38]]).double() * 1e100
    mask = torch.tensor([[True, False, False]])
    assert measures.mass_accuracy(places, mask).item() == pytest.approx(0.5)
    assert measures.cosine(places, places).item() == pytest.approx(1.0)


# --- flipping -----------------------------------------------------------------------------------


class Sigmoid(nn.Module):
    """Two classes; the second one's probability is the logistic function of w·x."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = torch.tensor(weights, dtype=torch.float32)

    def forward(self, x):
        score = x.flatten(1) @ self.weights
        return torch.stack([torch.zeros_like(score), score], dim=1)


def test_flipping_curve_by_hand():
    x, scores = torch.ones(1, 3), torch.tensor([[1.0, 5.0, 3.0]])
    zeros, target = torch.zeros(1, 3), torch.tensor([1])
    network = Sigmoid(1.0, 5.0, 3.0)

    def curve(descending):
        return measures.flipping_curve(network, x, target, scores, zeros, 3, 1, descending)

    most, least = curve(True), curve(False)
    assert torch.allclose(most, torch.tensor([[9.0, 4.0, 1.0, 0.0]]).sigmoid())
    assert torch.allclose(least, torch.tensor([[9.0, 8.0, 5.0, 0.0]]).sigmoid())
    expected = (most[0, 0] / 2 + most[0, 1] + most[0, 2] + most[0, 3] / 2) / 3
    assert measures.area(most).item() == pytest.approx(expected.item())
    assert measures.area(least) > measures.area(most)


def test_patches_of_pictures():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    scores = measures.patch_scores(maps, 2)
    assert scores.tolist() == [[2.5, 4.5, 10.5, 12.5]]
    order = scores.argsort(dim=1, descending=True)
    flipped = measures.flipped(torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), order, 1, 2)
    assert flipped[0, :, 2:, 2:].sum() == 0
    assert flipped.sum() == 3 * 12


def test_ties_are_broken_alike_in_both_directions():
    x = torch.rand(4, 6)
    network, target = Sigmoid(*range(6)), torch.ones(4, dtype=torch.long)
    flat = torch.zeros(4, 6)
    curves = [
        measures.flipping_curve(network, x, target, flat, flat, 6, 1, direction)
        for direction in (True, False)
    ]
    assert torch.equal(*curves)


def test_blur_keeps_flat_pictures():
    x = torch.full((1, 3, 32, 32), 0.7)
    assert torch.allclose(measures.blurred(x), x)


# --- comparisons --------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans():
    a, b = torch.randint(0, 5, (2, 3, 20), generator=torch.Generator().manual_seed(0)).double()
    ours = measures.rank_correlation(a, b)
    for i in range(3):
        assert ours[i].item() == pytest.approx(spearmanr(a[i], b[i]).statistic)


def test_laws():
    places = torch.tensor([[0.5, -0.25, 0.25]])
    logit, start = torch.tensor([2.0]), torch.tensor([1.0])

    def error(law):
        return measures.law_error(law, places, logit, start).item()

    assert [error(law) for law in ("mass", "logit", "rise")] == [0, 0.75, 0.5]
    assert measures.law_error("", places, logit, start) is None
    assert measures.amplification("logit", places, logit).item() == 0.25


def test_sensitivity_is_the_largest_relative_change():
    x = torch.full((4, 3, 2, 2), 0.5)

    def plain(radius, samples):  # the map is the input: its change is the noise
        return measures.sensitivity(lambda x, _: x, x, torch.zeros(4).long(), radius, samples)

    one, many = plain(0.02, 1), plain(0.02, 20)
    bound = 0.02 / 0.5  # were all the noise as large as it may be
    assert ((one > 0) & (one < bound)).all()
    assert (many <= bound).all()
    assert (many > bound / 3**0.5).all()  # the root mean square of uniform noise, exceeded
    constant = measures.sensitivity(lambda x, _: x * 0 + 1, x, torch.zeros(4).long(), 0.1, 3)
    assert constant.tolist() == [0.0] * 4


def test_randomised_leaves_the_first_layers():
    network = networks.dense(6, 3)
    half = measures.randomised(network, 0.5, 0)
    changed = [
        not torch.equal(p, q) for p, q in zip(network.parameters(), half.parameters(), strict=True)
    ]
    assert changed == [False] * 4 + [True] * 4


def test_holm():
    assert compare.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert compare.holm([0.9, 0.5]) == [1.0, 1.0]


def test_interval_holds_the_mean_and_shrinks():
    figures = np.random.default_rng(0).normal(3.0, 1.0, (3, 200))
    low, high = compare.interval(figures)
    assert low < figures.mean() < high < low + 0.6
    assert compare.interval(np.full((3, 5), 2.0)) == (2.0, 2.0)


def test_wins_and_losses_are_told_apart():
    better, worse = np.linspace(0.8, 1.0, 30), np.linspace(0.1, 0.3, 30)

    def record(shift):
        figures = {OURS: better, "gradient": worse + shift, "random": better}
        return {
            "methods": {
                name: {"figures": {"mass": list(v), "morf": list(v)}} for name, v in figures.items()
            }
        }

    records = [record(0.01 * seed) for seed in range(3)]
    mass = compare.column(records, [OURS, "gradient", "random"], "mass")
    assert (mass["gradient"].better, mass["gradient"].seeds_for_us) == (-1, 3)
    assert (mass["random"].better, mass["random"].p) == (0, 1.0)
    assert compare.column(records, [OURS, "gradient"], "morf")["gradient"].better == 1


# --- a network whose right answer is known ------------------------------------------------------


class Planted(nn.Module):
    """Class k is the brightness of column k, through two convolutions and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 1, bias=False)
        self.second = nn.Conv2d(4, 1, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d((1, 8))
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.second.weight.fill_(0.25)

    def forward(self, x):
        return self.pool(self.second(self.first(x).relu()).relu()).flatten(1)


def test_planted_feature_is_found():
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    target = torch.tensor([0, 3, 7, 2, 3])
    maps = RelativeLRP(Planted()).attribute(x, target=target)
    mask = torch.zeros(5, 1, 8, 8, dtype=torch.bool)
    for i, column in enumerate(target):
        mask[i, :, :, column] = True
    places, flat = measures.relevance(maps), mask.flatten(1)
    assert measures.mass_accuracy(places, flat).tolist() == [1.0] * 5
    assert measures.rank_accuracy(places, flat).tolist() == [1.0] * 5
    assert measures.pointing(places, flat).tolist() == [1.0] * 5
    # The pool shares by brightness; the convolutions see one pixel each and pass it on.
    shares = x[0, 0, :, 0]
    assert torch.allclose(maps[0, 0, :, 0], shares / shares.sum())


# --- robustness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [robustness.cancelling_dense, robustness.cancelling_residual])
def test_small_sums_do_not_blow_up_relative_lrp(make):
    network, x = make(1e-6, 0)
    usual, _ = make(1.0, 0)
    with torch.no_grad():
        assert network(x).abs().max() < 1e-4 * usual(x).abs().max()
        target = int(network(x).argmax())
    maps = RelativeLRP(network).attribute(x, target=target)
    assert maps.isfinite().all()
    assert maps.abs().sum() <= 1 + 1e-9


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes", "cutouts"])
def test_scenes_know_their_objects(name):
    source = data.load(name, 32)
    samples = source.test(20)
    assert samples.inputs.shape == (20, 3, 32, 32)
    assert samples.inputs.min() >= source.low
    assert samples.inputs.max() <= source.high
    assert (samples.labels != samples.others).all()
    assert (samples.present.sum(1) - 1).abs().max() < 1e-6
    assert samples.masks.flatten(1).any(1).all()
    assert samples.other_masks.flatten(1).any(1).all()
    assert not (samples.masks & samples.other_masks).any()
    again = data.load(name, 32).test(5)
    assert torch.equal(again.inputs, samples.inputs[:5])


def test_training_scenes_differ_by_seed(monkeypatch):
    monkeypatch.setattr(data, "POOL", 64)
    source = data.load("shapes", 16)
    first, _ = source.batch(4, torch.Generator().manual_seed(0))
    second, _ = data.load("shapes", 16).batch(4, torch.Generator().manual_seed(1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_tables_hold_out_their_test_samples(name):
    source = data.load(name, 32)
    samples = source.test(1000)
    seen, _ = source.batch(5000, torch.Generator().manual_seed(0))
    flat = {tuple(row.tolist()) for row in seen.flatten(1)}
    assert not flat & {tuple(row.tolist()) for row in samples.inputs.flatten(1)}
    assert (samples.labels != samples.others).all()


def test_accuracy_wants_every_object_named():
    samples = data.Samples(
        torch.tensor([[5.0, 4.0, 0.0], [5.0, 0.0, 4.0], [0.0, 9.0, 0.0]]),
        torch.zeros(3),
        torch.zeros(3),
        torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]),
    )
    assert networks.accuracy(nn.Identity(), samples, "cpu") == pytest.approx(2 / 3)


# --- the whole ----------------------------------------------------------------------------------

PEERS = ("gradient", "input×gradient", "Captum LRP")


def test_results_follow_from_the_seed(tmp_path):
    cell = Cell("dense", "digits", 6, 40)
    methods = {name: METHODS[name] for name in (OURS, *PEERS)}
    records = []
    for place in ("a", "b"):
        folder = tmp_path / place
        folder.mkdir()
        subject = run.trained(cell, 1, TINY, folder, "cpu")
        records.append(run.measured(subject, methods, TINY, folder / "x"))
    for record in records:
        assert not any("error" in entry for entry in record.values())
        for entry in record.values():
            entry.pop("seconds")
    assert records[0] == records[1]
    other = run.trained(cell, 2, TINY, tmp_path, "cpu")
    assert not torch.equal(other.network[1].weight, subject.network[1].weight)


def test_an_error_of_a_peer_is_a_row(tmp_path):
    def broken(network, data, protocol):
        raise RuntimeError("no rule\nat all")

    subject = run.trained(Cell("dense", "digits", 4, 5), 1, TINY, tmp_path, "cpu")
    method = type(METHODS[OURS])(broken, "a test")
    results = run.measured(subject, {"broken": method}, TINY, tmp_path / "x")
    assert results["broken"]["error"] == "RuntimeError: no rule"


def test_methods_leave_network_and_inputs_alone():
    source = data.load("shapes", 32)
    torch.manual_seed(0)
    network = networks.build("cnn", source, 1.0)
    before = [p.clone() for p in network.parameters()]
    x = source.test(2).inputs
    kept = x.clone()
    for name in (OURS, "SmoothGrad", "Grad-CAM", "integrated gradients", "random"):
        maps = prepare(METHODS[name], network, source, TINY)(x, torch.tensor([0, 1]))
        assert maps.shape == x.shape
        assert not maps.requires_grad
    assert torch.equal(x, kept)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_every_protocol_wants_three_seeds_and_all_networks():
    for name in ("reduced", "full"):
        protocol = PROTOCOLS[name]
        assert len(protocol.seeds) >= 3
        networks_used = {cell.network for cell in protocol.cells}
        assert networks_used == {"dense", "cnn", "vgg16", "vgg19", "resnet50"}


def test_full_width_networks_are_torchvisions():
    from torchvision import models

    source = data.Data(tuple("abc"), (3, 32, 32), 0, 1, *[lambda *_: None] * 2)
    with torch.device("meta"):
        for name in ("vgg16_bn", "vgg19_bn", "resnet50"):
            theirs = models.get_model(name, num_classes=3).state_dict()
            ours = networks.build(name.removesuffix("_bn"), source, 1.0).state_dict()
            assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_numbers_of_json():
    values = torch.tensor([1.23456789, math.inf, math.nan])
    assert run.numbers(values) == [1.23457, None, None]
