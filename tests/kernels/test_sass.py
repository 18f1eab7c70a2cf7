"""What nvcc made of the kernels, where the CUDA module is built and can be read."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import captum_rlrp
from captum_rlrp.kernels import extension

SCRIPT = Path(__file__).parents[2] / "scripts" / "sass.py"
MODULE = next(Path(captum_rlrp.__file__).parent.glob("_C_cuda.*"), None)
HAVE_TOOLS = shutil.which("c++filt") and (
    shutil.which("cuobjdump") or importlib.util.find_spec("triton")
)


@pytest.mark.skipif(
    not (extension.cuda_available() and HAVE_TOOLS), reason="needs the CUDA module and cuobjdump"
)
def test_packs_move_in_16_bytes() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(MODULE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for kind in ("sweep_kernel", "max_kernel", "unpool_kernel", "average_kernel"):
        assert f"\n{kind}<" in "\n" + done.stdout
