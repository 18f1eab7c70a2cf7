"""The C++ and CUDA extension: whether it loads, and how it was built."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from types import ModuleType

import torch


def _load(name: str) -> tuple[ModuleType | None, Exception | None]:
    """Load one part of the extension; its ops then appear under ``torch.ops.captum_rlrp``."""
    try:
        return importlib.import_module(f"captum_rlrp.{name}"), None
    except Exception as error:  # ImportError, OSError, a symbol that this torch lacks: keep any
        return None, error


_cpu, _cpu_error = _load("_C")
_cuda, _cuda_error = (None, _cpu_error) if _cpu is None else _load("_C_cuda")
ops = torch.ops.captum_rlrp


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
