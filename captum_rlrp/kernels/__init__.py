"""The arithmetic of the rules, in two versions with the same functions.

:mod:`captum_rlrp.kernels.reference` is plain PyTorch and the definition;
:mod:`captum_rlrp.kernels.compiled` runs the C++ and CUDA extension where it covers the call. This
module chooses between them and can say what it chose and why.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType

from captum_rlrp.kernels import compiled, extension, reference

__all__ = [
    "BACKENDS",
    "VARIABLE",
    "compiled",
    "get_backend",
    "is_reference_forced",
    "reference",
    "show_config",
]

BACKENDS = ("auto", "compiled", "reference")
VARIABLE = "CAPTUM_RLRP_BACKEND"

_warned = False


def get_backend(name: str = "auto") -> ModuleType:
    """Return the module that holds the kernels.

    Args:
        name: ``"compiled"``, ``"reference"`` or ``"auto"``: compiled where the extension loads,
            else reference with one warning. The environment variable ``CAPTUM_RLRP_BACKEND``
            decides in place of ``"auto"``.

    Raises:
        ValueError: The name is none of these.
        RuntimeError: ``"compiled"`` was asked for and the extension does not load.
    """
    global _warned
    source = "backend"
    if name == "auto":
        name, source = os.environ.get(VARIABLE) or "auto", VARIABLE
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, not {name!r}")
    if name == "reference":
        return reference
    if extension.available():
        return compiled
    if name == "compiled":
        raise RuntimeError("the compiled kernels did not load") from extension.load_error()
    if not _warned:
        _warned = True
        warnings.warn(
            "captum_rlrp runs on its reference kernels, which are slower: the compiled ones "
            f"did not load ({extension.load_error()}). Install the package again with a C++20 "
            "compiler, or ask for them: backend='reference'",
            RuntimeWarning,
            stacklevel=2,
        )
    return reference


def is_reference_forced(name: str) -> bool:
    """Whether the reference was asked for, by name or by the environment."""
    return (os.environ.get(VARIABLE) if name == "auto" else name) == "reference"


def show_config() -> dict[str, object]:
    """What runs here and why, for ``captum_rlrp.show_config()`` and ``captum-rlrp doctor``."""
    import torch

    forced = os.environ.get(VARIABLE)
    ready = extension.available()
    return {
        "torch": torch.__version__,
        "backend": forced or ("compiled" if ready else "reference"),
        "reason": (
            f"{VARIABLE}={forced}"
            if forced
            else "the extension is loaded"
            if ready
            else f"the extension did not load: {extension.load_error()}"
        ),
        "cuda kernels": (
            "loaded" if extension.cuda_available() else f"not loaded: {extension.cuda_load_error()}"
        ),
        "cuda devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "threads": torch.get_num_threads(),
        "build": extension.build_info(),
    }
