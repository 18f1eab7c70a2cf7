"""The C++ and CUDA extension: whether it loads, and how it was built."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import ModuleType

import torch

OPS = (
    "divide", "multiply", "linear_law", "matmul", "split", "finish_", "sums", "empty_like",
    "max_pool", "max_unpool", "adaptive_max_pool", "adaptive_max_unpool", "avg_pool",
    "adaptive_avg_pool", "conv_few", "convolution", "convolution_divide", "convolution_product",
)  # fmt: skip


def _load(name: str) -> tuple[ModuleType | None, Exception | None]:
    """Load one part of the extension; its ops then appear under ``torch.ops.captum_rlrp``."""
    try:
        return importlib.import_module(f"captum_rlrp.{name}"), None
    except Exception as error:  # ImportError, OSError, a symbol that this torch lacks: keep any
        return None, error


def _stale(names: Iterable[str]) -> Exception | None:
    """What to say where the extension is from another version of the package."""
    missing = [name for name in names if not hasattr(ops, name)]
    if not missing:
        return None
    return ImportError(
        f"the extension was built for another version of this package, for it has no "
        f"{', '.join(missing)}; build it again: pip install --force-reinstall captum-rlrp, or in "
        "the sources python setup.py build_ext --inplace"
    )


ops = torch.ops.captum_rlrp
_cpu, _cpu_error = _load("_C")
if _cpu is not None and (_cpu_error := _stale(OPS)):
    _cpu = None
_cuda, _cuda_error = (None, _cpu_error) if _cpu is None else _load("_C_cuda")


def available() -> bool:
    """Whether the extension is loaded."""
    return _cpu is not None


def load_error() -> Exception | None:
    """Why the extension is not loaded."""
    return _cpu_error


def cuda_available() -> bool:
    """Whether the CUDA part of the extension is loaded (a GPU need not be there)."""
    return _cuda is not None


def cuda_load_error() -> Exception | None:
    """Why the CUDA part is not loaded."""
    return _cuda_error


class WorkingMemory(AbstractContextManager["WorkingMemory"]):
    """See :func:`captum_rlrp.kernels.reference.working_memory`."""

    def __init__(self) -> None:
        assert _cpu is not None
        self._part, self._memory = _cpu, _cpu.memory_new()

    def __enter__(self) -> WorkingMemory:
        self._part.memory_enter(self._memory)
        return self

    def __exit__(self, *raised: object) -> None:
        self._part.memory_leave(self._memory)

    def size(self) -> int:
        """Bytes taken from the system."""
        return int(self._part.memory_size(self._memory))


def build_info() -> dict[str, object]:
    """Compiler, flags, CUDA version and architectures of the loaded extension."""
    info: dict[str, object] = {}
    for part in (_cpu, _cuda):
        if part is not None:
            info.update(part.build_info())
    return info
