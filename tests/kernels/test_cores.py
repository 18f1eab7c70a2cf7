"""The torch-free C++ of csrc/core, compiled on its own: what the GPU runs, checked on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_cores(tmp_path):
    program = tmp_path / "cores"
    flags = ["-std=c++20", "-O2", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/csrc"]
    source = str(ROOT / "tests/kernels/cores.cpp")
    subprocess.run([COMPILER, *flags, source, "-o", str(program), "-lpthread"], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
