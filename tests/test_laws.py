"""The second implementation of the law, on the worked examples of docs/method.md."""

import pytest
import torch
from torch import nn

from evaluation.laws import Law, attribute

X = torch.tensor([[1.0, 2.0]], dtype=torch.float64)


def dense(first, last):
    network = nn.Sequential(
        nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)
    ).double()
    network[0].weight.data = torch.tensor(first).double()
    network[2].weight.data = torch.tensor(last).double()
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("first", "law", "expected"),
    [
        ([[1, 1], [1, -1]], Law(), (1 / 3, 2 / 3)),
        ([[3, -1], [1, -1]], Law(), (3 / 5, -2 / 5)),
        ([[3, -1], [1, -1]], Law(dense=1.0), (3 / 5, 2 / 5)),
        ([[3, -1], [1, -1]], Law(dense=0.0), (3 / 5, 0)),
        ([[3, -1], [1, -1]], Law(dense=-1 / 3), (3 / 5, -2 / 15)),
        ([[3, -1], [1, -1]], Law(dense=0.0, divisor="positive"), (1, 0)),
    ],
)
def test_dense(first, law, expected):
    found = attribute(dense(first, [[2, 3]]), X, 0, law)
    torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))


def test_spatial():
    network = nn.Sequential(
        nn.Conv1d(1, 2, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(2, 1, bias=False)
    ).double()
    network[0].weight.data = torch.tensor([[[3.0, -1.0]], [[1.0, -1.0]]]).double()
    network[3].weight.data = torch.tensor([[2.0, 3.0]]).double()
    found = attribute(network.requires_grad_(False), X[:, None], 0)
    torch.testing.assert_close(found, torch.tensor([[[3 / 5, 2 / 5]]], dtype=torch.float64))


def test_skip():
    class Skip(nn.Module):
        def forward(self, x):
            return (x[:, :1] + x[:, 1:]).sigmoid()

    found = attribute(Skip(), torch.tensor([[1.0, -3.0]]), 0)
    torch.testing.assert_close(found, torch.tensor([[1 / 4, 3 / 4]]))


def test_linear_network_is_one_section():
    network = nn.Linear(2, 1).double().requires_grad_(False)
    q = X * network.weight
    torch.testing.assert_close(attribute(network, X, 0), q / q.abs().sum())


def test_relevance_adds_up_and_scales_of_neurons_do_not_matter():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double().eval().requires_grad_(False)  # fmt: skip
    network[1].running_mean.normal_()
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    found = attribute(network, x, 1)
    start = network[:-2](x).flatten(1) * network[-1].weight[1]
    expected = (start.sum(1) / start.abs().sum(1)).nan_to_num()
    torch.testing.assert_close(found.sum((1, 2, 3)), expected)
    network[4].weight[:, 0] /= 7
    network[1].weight[0] *= 7
    network[1].bias[0] *= 7
    torch.testing.assert_close(attribute(network, x, 1), found)


@pytest.mark.parametrize("mean_first", [True, False])
def test_mean_beside_the_last_weights(mean_first):
    """In front of them it has its own law; behind them it is part of the final section."""
    x = torch.tensor([[[1.0, -3.0], [2.0, 2.0]]], dtype=torch.float64)  # (1, positions, features)

    class Mean(nn.Module):
        def forward(self, x):
            y = x.tanh()
            weight = torch.tensor([[1.0, 2.0]]).double()
            if mean_first:
                return nn.functional.linear(y.mean(1), weight)
            return nn.functional.linear(y, weight).mean(1)

    y = x.tanh()[0]
    weight = torch.tensor([1.0, 2.0]).double()
    if mean_first:
        start = y.mean(0) * weight
        expected = start / start.abs().sum() * y.abs() / y.abs().sum(0)
    else:
        expected = y * weight / (y * weight).abs().sum()
    torch.testing.assert_close(attribute(Mean(), x, 0)[0], expected)
