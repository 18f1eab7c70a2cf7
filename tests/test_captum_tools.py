"""Captum's own tools take the explainers as they take Captum's methods."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.attr import configure_interpretable_embedding_layer as wrap
from captum.attr import remove_interpretable_embedding_layer as unwrap
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
        ["0", "1"],
        layer_attr_method=LayerRelativeLRP(model, None),
        save_path=str(tmp_path),
    )
    scores: Any = tcav.interpret(X, [[concept(0, 2.0), concept(1, -2.0)]], target=[1, 0, 2])
    (of_layers,) = scores.values()
    for layer in ("0", "1"):
        assert of_layers[layer]["sign_count"].sum() == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:In order to make embedding layers")
def test_an_embedding_that_captum_wraps() -> None:
    """As its tutorials on text do: embedded by hand, while the wrapper lets vectors through."""
    embedding = nn.Embedding(20, 4)
    model = nn.Sequential(embedding, nn.Flatten(), nn.Linear(12, 3)).eval()
    tokens = torch.tensor([[1, 5, 3], [7, 0, 19]])
    explainer = RelativeLRP(model)  # lives through both changes of the model
    of_tokens = explainer.attribute(tokens, 1)
    of_layer = LayerRelativeLRP(model, embedding).attribute(tokens, 1)
    wrapper = wrap(model, "0")
    of_vectors = explainer.attribute(wrapper.indices_to_embeddings(tokens), 1)
    unwrap(model, wrapper)
    agree(of_vectors, of_layer)
    agree(of_tokens, of_layer.sum(2))
    assert torch.equal(explainer.attribute(tokens, 1), of_tokens)


def _rank(rank: int, meet: str) -> None:
    """Explains, trains for a step with the other rank, and explains again."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    model = mlp()
    wrapped = nn.parallel.DistributedDataParallel(model)
    explainer = RelativeLRP(wrapped)
    before = explainer.attribute(X, 1)
    wrapped(X + rank).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    after = explainer.attribute(X, 1)
    assert not torch.allclose(before, after)
    agree(after, explained(copy.deepcopy(model), X, 1))
    agree(
        LayerRelativeLRP(wrapped, wrapped.module[0]).attribute(X, 1),
        LayerRelativeLRP(model, model[0]).attribute(X, 1),
    )
    both = [torch.empty_like(after) for _ in range(2)]
    torch.distributed.all_gather(both, after)
    assert torch.equal(both[0], both[1])
    if rank == 0:  # alone, and waits for nobody
        explainer.attribute(X[:1], 2)
    torch.distributed.destroy_process_group()


def test_distributed_wrapper_of_two_processes(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no distributed package")
    torch.multiprocessing.spawn(_rank, (f"file://{tmp_path / 'meet'}",), nprocs=2)


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
