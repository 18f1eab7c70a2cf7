"""Seeds and settings that every test shares."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from captum_rlrp.graph.capture import CapturedGraph, capture
from captum_rlrp.run import capturing

settings.register_profile(
    "captum_rlrp",
    deadline=None,
    derandomize=True,
    max_examples=8,  # every example captures a new network
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("captum_rlrp")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names of tests are the same in every process, or they could not be shared out to several."""
    if isinstance(val, torch.Tensor):
        return f"{val.dtype}{list(val.shape)}".removeprefix("torch.")
    if " at 0x" in repr(val):
        return str(getattr(val, "__name__", type(val).__name__))
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of the GPU exist only where there is one: they are left out, not skipped."""
    if not torch.cuda.is_available():
        on_gpu = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in set(on_gpu)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """Where a GPU is: by default its convolutions round their operands to TF32, of 10 bits."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    yield
    cudnn.allow_tf32, matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors that are too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def captured_once(monkeypatch: pytest.MonkeyPatch) -> list[CapturedGraph]:
    """For tests of one model: capture takes most of the time, and both backends can share it.

    The list holds the graph; a test that clears it has the model captured anew.
    """
    known: list[CapturedGraph] = []

    def once(*args: Any) -> CapturedGraph:
        if not known:
            known.append(capture(*args))
        return known[0]

    monkeypatch.setattr(capturing, "capture", once)
    return known
