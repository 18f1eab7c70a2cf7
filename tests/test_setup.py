"""setup.py where the compiler is there and fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The part of an installation that compiles, into ``folder``."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(folder), "-t", str(folder)],
        cwd=ROOT,
        env={**os.environ, "CXX": "/bin/false", "CAPTUM_RLRP_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_compiler_that_fails_does_not_stop_an_installation(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("captum-rlrp: ")]
    assert "captum_rlrp._C does not build" in said
    assert "install a C++20 compiler" in said
    assert not list(tmp_path.rglob("*.so"))


def test_unless_the_extension_is_demanded(tmp_path: Path) -> None:
    done = build(tmp_path, CAPTUM_RLRP_EXTENSION="1")
    assert done.returncode != 0
    assert "/bin/false" in done.stderr
