"""The CUDA kernels on the CPU: what they compute, and where they read and write, needs no GPU.

Their sources are compiled as plain C++ against ``emulation/cuda_runtime.h``, and the tests of
kernels and of some whole models run once more, on the emulated ops. Speed, memory models and
streams remain for ``test_gpu.py``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from .common import needs_extension

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).with_name("emulation")
CXX = shlex.split(os.environ.get("CXX", "c++"))

pytestmark = [
    needs_extension,
    pytest.mark.skipif(shutil.which(CXX[0]) is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    [stable_abi] = re.findall(r'STABLE_ABI = "(\w+)"', (ROOT / "setup.py").read_text())
    flags = [
        "-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas",
        f"-DTORCH_TARGET_VERSION={stable_abi}", "-DUSE_CUDA",
        "-DRLRP_MOST=9999",  # launches in parts of so many elements, as else of a billion
        f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", *(f"-isystem{p}" for p in include_paths()),
        f"-include{EMULATION / 'prelude.h'}",
    ]  # fmt: skip
    sources = [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.name}.o")
        run([*CXX, *flags, "-xc++", "-c", str(source), "-o", str(objects[-1])])
    made = folder / "emulated.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    links = [f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    run([*CXX, "-shared", *map(str, objects), *links, "-o", str(made)])
    return made


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, (
        f"{shlex.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    )
    return done.stdout


@pytest.mark.parametrize(
    ("tests", "chosen", "least"),
    [
        ("tests/kernels/test_elementwise.py", "compiled", 850),
        ("tests/kernels/test_pooling.py", "compiled", 600),
        (
            "tests/test_backends.py",
            "float64_reference and resnet18 and dtype0 or test_signals and 6-5",
            3,
        ),
    ],
    ids=["elementwise", "pooling", "models"],
)
def test_emulated_cuda(library: Path, tests: str, chosen: str, least: int) -> None:
    plugin = ["-p", "tests.kernels.emulation.plugin", "-p", "no:cacheprovider"]
    said = run(
        [sys.executable, "-m", "pytest", "-q", *plugin, tests, "-k", chosen],
        CAPTUM_RLRP_EMULATED=str(library),
    )
    [passed] = re.findall(r"(\d+) passed", said)
    assert int(passed) >= least
