"""Whole models on a GPU, against the plain reference in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_rlrp import RelativeLRP

from .test_backends import TOLERANCE, build, distances

pytestmark = pytest.mark.gpu

MODELS = ["resnet50", "vgg16", "mobilenet_v2", "densenet121"]
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


def apart(name: str, dtype: torch.dtype, layout: torch.memory_format, size: int = 96) -> Tensor:
    """For each sample, the share of its Σ|R| that lies elsewhere on the GPU.

    Apart from what the dtype cannot hold: much of a pixel's relevance is less than float16 has.
    """
    model, x = build(name).double(), torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = RelativeLRP(model, backend="reference").attribute(x, target=[1, 2])
    model, x = model.to("cuda", dtype), x.to("cuda", dtype).contiguous(memory_format=layout)
    actual = RelativeLRP(model, backend="compiled").attribute(x, target=[1, 2])
    assert (actual.device.type, actual.dtype) == ("cuda", dtype)
    assert actual.is_contiguous()
    gaps = (actual.double().cpu() - expected.to(dtype).double()).abs().flatten(1).sum(1)
    return gaps / expected.abs().flatten(1).sum(1)


@LAYOUTS
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_cuda_equals_the_float64_reference(
    name: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    found = apart(name, dtype, layout)
    bound = TOLERANCE[dtype]
    if name == "vgg16" and dtype == torch.float32:
        # Where two elements of a window are equal up to rounding, another one may win.
        assert found.min() < bound
        bound = 0.02
    assert found.max() < bound


@LAYOUTS
@pytest.mark.parametrize("name", MODELS)
def test_tf32(name: str, layout: torch.memory_format) -> None:
    """As PyTorch has it by default; conftest.py, which turns it off, sets it back."""
    torch.backends.cudnn.allow_tf32 = True
    assert apart(name, torch.float32, layout).max() < 0.05  # up to 0.012, emulated


@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_cuda_graphs_change_nothing(name: str) -> None:
    model = build(name).cuda()
    plain, recorded = RelativeLRP(model), RelativeLRP(model, cuda_graphs=True)
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.randn(1, 3, 96, 96, device="cuda")
        expected = plain.attribute(x, target=seed)
        assert distances(recorded.attribute(x, target=seed), expected).max() < 1e-4
    assert len(recorded._engine.recordings["cuda"]) == 1
    with torch.no_grad():
        next(model.parameters()).mul_(-1)
    expected = plain.attribute(x, target=1)
    assert distances(recorded.attribute(x, target=1), expected).max() < 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_graphs_on_a_second_device() -> None:
    for index in (0, 1):
        model = build("resnet18").to(torch.device("cuda", index))
        plain, recorded = RelativeLRP(model), RelativeLRP(model, cuda_graphs=True)
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(1, 3, 96, 96).to(torch.device("cuda", index))
            expected = plain.attribute(x, target=seed)
            assert distances(recorded.attribute(x, target=seed), expected).max() < 1e-4
