"""The budget of ``scripts/gpu_check.sh``, on fake parts: no GPU is needed to spend time well."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"
PARTS = ["device", "load", "agree", "kernels", "speed", "breakdown", "models", "peers"]
PARTS += ["memcheck", "racecheck"]
HANGS = "echo begun; trap '' TERM; sleep 60 & sleep 60; sleep 60"

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


class Check:
    def __init__(self, folder: Path) -> None:
        self.out, self.fakes = folder / "out", folder / "fakes"
        self.fakes.mkdir()
        for name in [*PARTS, "build"]:
            self.fake(name, f"echo {name} ran")

    def fake(self, name: str, does: str) -> None:
        path = self.fakes / name
        path.write_text(f"#!/bin/bash\n{does}\n")
        path.chmod(0o755)

    def run(self, *arguments: str) -> int:
        environment = {"OUT": str(self.out), "FAKES": str(self.fakes), "PYTHON": sys.executable}
        command = ["bash", str(SCRIPT), *arguments]
        started = time.perf_counter()
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True
        )
        self.seconds = time.perf_counter() - started
        lines = (self.out / "results.jsonl").read_text().splitlines()
        self.results = [(line["part"], line["result"]) for line in map(json.loads, lines)]
        self.report = (self.out / "report.txt").read_text()
        assert self.report == done.stdout
        return done.returncode


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path)


def test_all_parts_in_order(check: Check) -> None:
    assert check.run() == 0
    assert check.results == [(name, "passed") for name in PARTS]
    assert check.report.endswith("all parts passed\n")


def test_parts_by_name(check: Check) -> None:
    assert check.run("100", "speed", "agree") == 0
    assert check.results == [("agree", "passed"), ("speed", "passed")]


@pytest.mark.parametrize("name", [name for name in PARTS if name != "load"])
def test_a_part_that_fails_takes_nothing_from_others(check: Check, name: str) -> None:
    check.fake(name, "echo found; exit 3")
    assert check.run() == 1
    assert check.results == [(n, "failed (3)" if n == name else "passed") for n in PARTS]
    assert "found\n" in check.report
    assert check.report.endswith(f"FAILED: {name}\n")


def test_a_part_that_hangs_is_stopped_at_its_share(check: Check) -> None:
    check.fake("agree", HANGS)
    assert check.run("15") == 1
    assert check.results == [
        (n, "stopped at its limit" if n == "agree" else "passed") for n in PARTS
    ]
    assert "begun\n" in check.report
    assert check.seconds < 30  # not 60, however busy the machine is


def test_when_all_hang_all_get_their_share(check: Check) -> None:
    for name in ("speed", "models", "peers"):
        check.fake(name, "sleep 60")
    assert check.run("8", "speed", "models", "peers") == 1
    assert [result for _, result in check.results] == ["stopped at its limit"] * 3
    assert check.seconds < 30  # not 60, however busy the machine is


def test_without_time_nothing_runs(check: Check) -> None:
    assert check.run("0") == 1
    assert {result for _, result in check.results} == {"not run, no time left"}


def test_modules_that_do_not_load_are_built(check: Check) -> None:
    check.fake("load", f"[ -e {check.out}/built ]")
    check.fake("build", f"touch {check.out}/built")
    assert check.run() == 0
    first = [("load", "failed (1)"), ("build", "passed"), ("load", "passed")]
    assert check.results == [("device", "passed"), *first, *((n, "passed") for n in PARTS[2:])]


def test_nothing_is_built_because_loading_takes_long(check: Check) -> None:
    check.fake("load", HANGS)
    assert check.run("10") == 1
    assert check.results == [
        (n, "stopped at its limit" if n == "load" else "passed") for n in PARTS
    ]


def test_modules_that_cannot_be_built(check: Check) -> None:
    check.fake("device", "exit 1")
    check.fake("load", "exit 1")
    check.fake("build", "exit 2")
    assert check.run("100", "device", "load", "agree") == 1
    assert check.report.endswith("FAILED: device build load\n")
    assert check.results[-1] == ("agree", "passed")
