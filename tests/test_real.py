"""The measures on really trained networks, on networks made for the test."""

import pytest
import torch
from torch import nn

from evaluation import real, real_measures
from evaluation.protocol import REAL, Real
from evaluation.visible import visible

PROTOCOL = Real("test", 0.5, 8, 8, mosaics=2, sigma=2, patch=2, steps=4)


class Corner(nn.Module):
    """Class k looks at channel k of the upper left quarter."""

    def forward(self, x):
        return x[:, :4, :4, :4].mean((2, 3)) * 5


def subject():
    inputs = torch.rand(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 4
    inputs[range(8), labels, :4, :4] += 1
    mosaics = real_measures.quadruples(labels)
    return real_measures.Subject(PROTOCOL, Corner().eval(), inputs, labels, mosaics)


def test_mosaics_hold_four_classes_and_each_picture_once():
    labels = torch.tensor([0, 0, 1, 1, 2, 3, 3, 2, 0])
    found = real_measures.quadruples(labels)
    assert [labels[row].tolist() for row in found] == [[0, 1, 2, 3], [0, 1, 3, 2]]
    assert len(found.flatten().unique()) == 8


def test_grid_is_one_for_the_right_cell_and_a_quarter_for_a_flat_map():
    of = subject()
    labels = of.labels[of.mosaics[0]]

    def cell(x, target):
        maps = torch.zeros_like(x)
        for row, k in enumerate((labels[None] == target[:, None]).int().argmax(1).tolist()):
            maps[row, :, k // 2 * 8 : k // 2 * 8 + 8, k % 2 * 8 : k % 2 * 8 + 8] = 1
        return maps

    assert real_measures.grid(cell, of, of.mosaics[0]) == pytest.approx(1)
    flat = real_measures.grid(lambda x, t: torch.ones_like(x), of, of.mosaics[0])
    assert flat == pytest.approx(0.25)


def test_gain_is_antisymmetric_and_finds_what_matters():
    of = subject()
    maps = torch.zeros_like(of.inputs)
    maps[range(8), of.labels, :4, :4] = of.inputs[range(8), of.labels, :4, :4]
    replacement = torch.zeros_like(of.inputs)
    found = real_measures.gain(of, maps, replacement)
    assert (found > 0.05).all()
    distinct = maps + 1e-4 * torch.rand(maps.shape)
    there, back = (real_measures.gain(of, sign * distinct, replacement) for sign in (1, -1))
    torch.testing.assert_close(there, -back)


def test_smoothing_keeps_flat_pictures():
    flat = torch.full((1, 3, 32, 32), 0.7)
    torch.testing.assert_close(real_measures.smooth(flat, 4), flat)


def test_visible_network_is_the_same_function():
    torch.manual_seed(0)
    network = real.CifarResNet(2).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 32, 32)
    seen = visible(network)
    torch.testing.assert_close(seen(x), network(x), rtol=1e-4, atol=1e-5)
    kinds = {type(module).__name__ for module in seen.modules()}
    assert "BatchNorm2d" not in kinds
    assert "Add" in kinds


def test_what_is_absent_says_so(tmp_path):
    with pytest.raises(real.Absent, match="no file"):
        real.cifar_vgg(tmp_path)
    for protocol in REAL:
        with pytest.raises(real.Absent, match="no pictures"):
            real.pictures(protocol.network, tmp_path)
