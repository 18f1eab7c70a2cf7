"""Captum's own tools take the explainers as they take Captum's methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from captum.concept import TCAV, Concept
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

from captum_rlrp import LayerRelativeLRP, RelativeLRP

from .small import agree, explained, mlp, rows

X = rows()


def test_infidelity_and_sensitivity() -> None:
    model = mlp()
    relevance = explained(model, X, 1)

    def perturbed(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(inputs) * 0.01
        return noise, inputs - noise

    assert infidelity(model, perturbed, X, relevance, target=1).shape == (3,)
    largest = sensitivity_max(RelativeLRP(model).attribute, X, target=1, n_perturb_samples=2)
    assert largest.isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_tcav(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    model = mlp()

    def concept(number: int, shift: float) -> Concept:
        data = [(torch.randn(4) + shift) for _ in range(12)]
        return Concept(number, f"c{number}", torch.utils.data.DataLoader(data, batch_size=4))

    tcav = TCAV(
        model,
        "1",
        layer_attr_method=LayerRelativeLRP(model, model[0]),
        save_path=str(tmp_path),
    )
    scores: Any = tcav.interpret(X, [[concept(0, 2.0), concept(1, -2.0)]], target=1)
    (of_layers,) = scores.values()
    assert of_layers["1"]["sign_count"].sum() == pytest.approx(1)


def test_distributed_wrapper_of_one_process(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no distributed package")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        model = mlp()
        wrapped = nn.parallel.DistributedDataParallel(model)
        agree(explained(wrapped, X), explained(model, X))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_quantus_takes_it_as_explain_func() -> None:
    import quantus  # takes seconds

    def explain(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> Any:
        x, classes = torch.as_tensor(inputs).float(), torch.as_tensor(targets).long()
        return RelativeLRP(model).attribute(x, classes).sum(1, keepdim=True).numpy()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
    ).eval()
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()
    y = model(torch.from_numpy(x)).argmax(1).numpy()
    common = {"model": model, "x_batch": x, "y_batch": y, "explain_func": explain}
    common |= {"a_batch": None, "device": "cpu"}
    options = {"disable_warnings": True, "display_progressbar": False}
    sparse = quantus.Sparseness(**options)(**common)
    stable = quantus.MaxSensitivity(nr_samples=2, **options)(**common)
    flips = quantus.PixelFlipping(features_in_step=16, **options)(**common)
    assert len(sparse) == len(stable) == len(flips) == 2
    assert all(0 < float(score) < 1 for score in sparse)
    assert all(0 <= float(score) < 10 for score in stable)
    assert all(len(curve) == 4 for curve in flips)
