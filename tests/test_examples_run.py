"""The tutorials run and show what they say they show."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients"),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks"),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pictures(folder: Path) -> set[str]:
    """Names of the pictures that were written and are not empty."""
    return {path.name for path in folder.glob("*.png") if path.stat().st_size > 10_000}


def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = load("images").main(["--out", str(tmp_path)])
    assert results["accuracy"] > 0.97
    assert results["on stamp"] > 0.4  # circles are named by their stamp,
    assert results["on stamp, others"] < 0.15
    assert results["kept"] < 0.2  # and only by it
    assert results["fooled"] > 0.8
    assert pictures(tmp_path) == {"examples.png", "classes.png", "flow.png"}
    assert "Without the stamp" in capsys.readouterr().out


def test_tabular_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = load("tabular_and_text").main(["--out", str(tmp_path)])
    assert results["tumours"] > 0.93
    assert results["known features"] >= 4  # among the first 8
    assert results["significant"] > 10
    assert results["reviews"] > 0.97
    assert results["verdict words"] > 0.75
    assert pictures(tmp_path) == {"features.png", "words.png"}
    assert "worst concave points" in capsys.readouterr().out


def test_comparing_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = load("comparing_methods").main(["--out", str(tmp_path)])
    assert results.pop("network")["accuracy"] > 0.94
    chance, brightness = results.pop("chance"), results.pop("the brightest pixel")
    for result in results.values():
        assert result["flipping"] < brightness["flipping"]
        assert result["flipping"] < 0.5 * chance["flipping"]
    # On a shallow network gradients are good explanations; the page says so.
    assert results["input × gradient"]["flipping"] < results["Relative LRP"]["flipping"]
    assert results["Relative LRP"]["sensitivity"] < results["input × gradient"]["sensitivity"]
    assert pictures(tmp_path) == {"methods.png"}
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)
