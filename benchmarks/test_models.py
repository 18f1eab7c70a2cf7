"""One explanation of a whole model, beside one input×gradient.

    pytest benchmarks/test_models.py --benchmark-group-by=group

Small batches and few rounds, to notice a change; ``run.py`` measures more, and with care.
"""

from __future__ import annotations

import breakdown
import pytest
import torch
from contenders import OURS, SUBJECTS, YARDSTICK, Given, contender

pytest.importorskip("pytest_benchmark")

GIVEN = Given("cuda" if torch.cuda.is_available() else "cpu")
BATCHES = {"cnn_1d": 8, "tiny_mlp": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [YARDSTICK, OURS])
@pytest.mark.parametrize("name", SUBJECTS)
def test_model(benchmark, name, method):
    batch = BATCHES.get(name, 2)
    subject = SUBJECTS[name]
    explain = contender(subject, method, GIVEN)
    inputs = subject.inputs(batch, GIVEN)

    def timed():
        attributions = explain(*inputs)
        if GIVEN.device == "cuda":
            torch.cuda.synchronize()
        return attributions

    benchmark.group = f"{subject.title}, batch {batch}"
    attributions = benchmark.pedantic(
        timed, rounds=50 if name == "tiny_mlp" else 5, warmup_rounds=1
    )
    assert attributions.isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_breakdown():
    """What is counted as moved, by hand: a ReLU in place reads and writes a value once."""
    subject = SUBJECTS["tiny_mlp"]
    explain = contender(subject, OURS, GIVEN)
    parts = breakdown.parts_of(explain, subject.inputs(5, GIVEN), GIVEN.device)
    by_name = {part.op: part for part in parts}
    values = 5 * 128 * 4  # of one hidden layer, in bytes
    assert by_name["captum_rlrp::finish_"].moved == 2 * (2 * values + 5 * 4)
    assert by_name["aten::addmm"].is_product
    assert all(part.seconds > 0 for part in parts)
