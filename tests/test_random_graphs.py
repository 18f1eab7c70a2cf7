"""Random networks against the oracle. ``RANDOM_GRAPHS=2000 RANDOM_SEED=1000`` runs others."""

from __future__ import annotations

import os

import pytest
import torch

from captum_rlrp import RelativeLRP
from tests.oracle import agrees, explain, relative_error
from tests.random_graphs import random_graph

FIRST = int(os.environ.get("RANDOM_SEED", "0"))
COUNT = int(os.environ.get("RANDOM_GRAPHS", "200"))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
@pytest.mark.usefixtures("captured_once")
def test_random_graph(seed: int) -> None:
    graph = random_graph(seed)
    x, targets, model = graph.inputs, graph.targets, graph.model
    agrees(graph.twin, model, x)
    (expected,) = explain(graph.twin, (x,), targets)
    for backend, dtype, tolerance in (
        ("reference", torch.float64, 1e-8),
        ("auto", torch.float64, 1e-8),
        ("auto", torch.float32, 2e-3),
    ):
        rlrp = RelativeLRP(model.to(dtype), backend=backend)
        attribution, delta = rlrp.attribute(x.to(dtype), targets, return_convergence_delta=True)
        error = relative_error(attribution, expected)
        assert error <= tolerance, f"{backend}, {dtype}: off by {error:.1e} in\n{graph}"
        assert delta.max() <= tolerance, f"{backend}, {dtype}: delta {delta.max():.1e} in\n{graph}"
        assert attribution.abs().sum() <= len(x) * (1 + 1e-4)
