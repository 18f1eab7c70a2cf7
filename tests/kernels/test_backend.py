"""Which kernels run, and what is said about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from captum_rlrp import kernels
from captum_rlrp.kernels import compiled, extension, get_backend, reference

from .common import needs_extension

FUNCTIONS = [
    "add",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "adaptive_max_unpool",
    "avg_pool",
    "conv",
    "linear",
    "linear_rows",
    "max_pool",
    "max_unpool",
    "multiply",
    "divide",
    "conv_relevance",
    "linear_relevance",
    "split",
]


@pytest.fixture
def no_variable(monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)


@pytest.fixture
def no_extension(monkeypatch, no_variable):
    monkeypatch.setattr(extension, "_cpu", None)
    monkeypatch.setattr(extension, "_cpu_error", ImportError("no such file"))
    monkeypatch.setattr(kernels, "_warned", False)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_backends_have_every_kernel(name):
    assert callable(getattr(reference, name))
    assert callable(getattr(compiled, name))


@needs_extension
def test_auto_is_compiled(no_variable):
    assert get_backend() is get_backend("compiled") is compiled


def test_the_reference_can_be_asked_for(no_variable):
    assert get_backend("reference") is reference


def test_the_variable_decides_for_auto_only(monkeypatch, no_extension):
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    assert get_backend() is reference
    assert kernels.show_config()["backend"] == "reference"
    with pytest.raises(RuntimeError, match="did not load"):
        get_backend("compiled")


@pytest.mark.parametrize("source", ["argument", "variable"])
def test_an_unknown_name_is_refused(monkeypatch, no_variable, source):
    if source == "variable":
        monkeypatch.setenv(kernels.VARIABLE, "fast")
    with pytest.raises(ValueError, match="'fast'"):
        get_backend("fast" if source == "argument" else "auto")


def test_a_missing_extension_is_said_once(no_extension):
    with pytest.warns(RuntimeWarning, match="no such file"):
        assert get_backend() is reference
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_backend() is reference
    assert "no such file" in str(kernels.show_config()["reason"])


@needs_extension
def test_build_info_names_compiler_flags_and_instructions():
    info = kernels.show_config()["build"]
    assert {"compiler", "flags"} <= set(info)
    words = {"AVX512": "AVX-512", "AVX2": "AVX2"}
    capability = torch.backends.cpu.get_cpu_capability()
    assert words.get(capability, "vectors of 4 floats") in str(info["instructions"])


@needs_extension
@pytest.mark.parametrize("name", ["reference", "compiled"])
def test_the_variable_in_a_fresh_process(name):
    code = "from captum_rlrp.kernels import get_backend; print(get_backend().__name__)"
    environment = {**os.environ, kernels.VARIABLE: name}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == f"captum_rlrp.kernels.{name}"


@pytest.mark.skipif(
    torch.version.cuda is None or shutil.which("nvcc") is None,
    reason="CUDA kernels are built where torch has CUDA and nvcc is found",
)
@needs_extension
def test_cuda_kernels_are_compiled_linked_and_loaded():
    assert extension.cuda_available(), extension.cuda_load_error()
