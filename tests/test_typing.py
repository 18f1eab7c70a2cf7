"""py.typed is a promise: a user's program is checked against the package's types."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CLIENT = Path(__file__).with_name("typed_client.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def check(program: Path, cache: Path) -> tuple[int, str]:
    """What mypy says of the program, without the project's own settings.

    It is silent about what is imported, as it is about packages that are installed.
    """
    silent = ["--config-file=", "--follow-imports=silent", f"--cache-dir={cache}"]
    arguments = ["--strict", *silent, str(program)]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments],
        cwd=CLIENT.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("", "Success"),
        ('RelativeLRP(model, backend="fast")\n', "arg-type"),
        ("number: int = RelativeLRP(model).attribute(x, target=1)\n", "assignment"),
    ],
    ids=["right", "a backend that is not there", "a tensor as a number"],
)
def test_a_client(wrong: str, said: str, cache: Path, tmp_path: Path) -> None:
    program = tmp_path / "client.py"
    program.write_text(CLIENT.read_text("utf-8") + wrong)
    code, printed = check(program, cache)
    assert (code == 0) == (not wrong), printed
    assert said in printed
