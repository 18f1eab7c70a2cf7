"""One explanation of a whole model, beside one input×gradient.

    pytest benchmarks/test_models.py --benchmark-group-by=group

Small batches and few rounds, to notice a change; ``run.py`` measures more, and with care.
"""

from __future__ import annotations

import pytest
import torch
from contenders import OURS, SUBJECTS, YARDSTICK, contender

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = {"cnn_1d": 8, "tiny_mlp": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [YARDSTICK, OURS])
@pytest.mark.parametrize("name", SUBJECTS)
def test_model(benchmark, name, method):
    batch = BATCHES.get(name, 2)
    subject = SUBJECTS[name]
    explain = contender(subject, method, DEVICE, torch.float32)
    inputs = subject.inputs(batch, DEVICE, torch.float32)

    def timed():
        attributions = explain(*inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return attributions

    benchmark.group = f"{subject.title}, batch {batch}"
    attributions = benchmark.pedantic(
        timed, rounds=50 if name == "tiny_mlp" else 5, warmup_rounds=1
    )
    assert attributions.isfinite().all()
