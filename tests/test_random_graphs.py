"""Random networks against the oracle. ``RANDOM_GRAPHS=2000 RANDOM_SEED=1000`` runs others."""

from __future__ import annotations

import os

import pytest
import torch

from tests.oracle import agrees, explain, relative_error
from tests.paths import all_paths
from tests.random_graphs import random_graph

FIRST = int(os.environ.get("RANDOM_SEED", "0"))
COUNT = int(os.environ.get("RANDOM_GRAPHS", "200"))
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
@pytest.mark.usefixtures("captured_once")
def test_random_graph(seed: int) -> None:
    graph = random_graph(seed)
    agrees(graph.twin, graph.model, graph.inputs)
    (expected,) = explain(graph.twin, (graph.inputs,), graph.targets)
    for dtype, tolerance in TOLERANCE.items():
        (attribution,) = all_paths(
            graph.model.to(dtype), graph.inputs.to(dtype), graph.targets,
            tolerance=tolerance, delta=tolerance,
        )  # fmt: skip
        error = relative_error(attribution, expected)
        assert error <= tolerance, f"{dtype}: off by {error:.1e} in\n{graph}"
