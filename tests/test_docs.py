"""What the documents say holds: examples run, commands exist, links lead somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision.models._api import WeightsEnum

from captum_rlrp import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ABOUT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PYTHON = re.compile(r"^```(?:python|\{code-cell\} python)\n(.*?)^```", re.M | re.S)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- examples -----------------------------------------------------------------------------------


def run_page(path: Path) -> None:
    """All blocks of a page one after another, as a reader would; errors name the page's lines."""
    matplotlib.use("Agg")
    text, names = path.read_text("utf-8"), {"__name__": "example"}
    for block in PYTHON.finditer(text):
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], named(path), "exec"), names)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if PYTHON.search(page.read_text("utf-8"))], ids=named
)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the download of weights, in whose place stand random ones."""
    random = models.resnet50().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **options: random)
    run_page(ROOT / "README.md")


@pytest.mark.parametrize(
    "name", ["attribution", "dataset.runner", "dataset.show", "dataset.statistics"]
)
def test_examples_of_docstrings_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    setup = importlib.import_module("example_setup")
    module: ModuleType = importlib.import_module(f"captum_rlrp.{name}")
    setup.enter()
    try:
        result = doctest.testmod(module, extraglobs={n: getattr(setup, n) for n in setup.__all__})
    finally:
        setup.leave()
    assert result.attempted > 0
    assert result.failed == 0


# --- commands -----------------------------------------------------------------------------------

COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*"
    r"(?:captum-rlrp|pip|make|python|pytest|torchrun|git|cibuildwheel|auditwheel|scripts/)"
    r"\S*(?: |$)"
)
# Commands that no test runs, by how they begin, and why.
NOT_RUN = {
    "pip install": "the Makefile installs the same way, and the tests run in what it installed",
    "git ": "works on the reader's own copy",
    "make ": "test_every_target_is_in_the_makefile holds that it exists",
    "torchrun ": "tests/test_dataset.py runs the same command by several processes",
    "python benchmarks/": "takes minutes; measures",
    "pytest benchmarks": "takes minutes; measures",
    "python scripts/evaluate.py": "needs pictures; tests/test_evaluation.py runs its parts",
    "python -m evaluation.gallery": "tests/test_evaluation.py runs its parts",
    "python -m build": "takes minutes; the workflow for wheels does it",
    "cibuildwheel": "needs containers; the workflow for wheels runs it",
    "auditwheel": "wants a wheel, minutes of compiling; the workflow for wheels does it",
    "python docs/figures/": "test_figures_are_drawn",
    "pytest tests": "these are the tests",
    "OMP_NUM_THREADS=1 pytest tests": "these are the tests",
    "scripts/": "takes minutes, a GPU or a download of gigabytes",
}


def commands(path: Path) -> Iterator[str]:
    """Lines of shell: in blocks marked `sh`, and indented ones."""
    text = path.read_text("utf-8")
    shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = re.findall(r"^    (\S.*)$", prose, re.M)
    for line in [*shell.splitlines(), *indented]:
        command = re.sub(r"\s{2,}#.*", "", line).strip()
        if COMMAND.match(command):
            yield command


COMMANDS = sorted({command for page in [*PAGES, *ABOUT] for command in commands(page)})


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_known(command: str) -> None:
    """The options exist; what it does is tested here, in test_cli and test_dataset."""
    if not command.startswith("captum-rlrp "):
        assert any(command.startswith(known) for known in NOT_RUN), f"run {command!r} in a test"
        return
    cli.build_parser().parse_args(shlex.split(command)[1:])


def test_every_target_is_in_the_makefile() -> None:
    named = {word for c in COMMANDS if c.startswith("make ") for word in c.split()[1:]}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert {"demo", "test", "docs"} <= {name for name in named if "=" not in name} <= targets


def test_readme_has_two_commands_of_make() -> None:
    assert [c.split()[:2] for c in commands(ROOT / "README.md") if c.startswith("make")] == [
        ["make", "demo"],
        ["make", "test"],
    ]


def test_explains_files_as_the_documents_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    random = models.resnet50().state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *args, **options: random)
    pixels = np.random.default_rng(0).integers(0, 256, (240, 240, 3), dtype=np.uint8)
    for name in ("cat.jpg", "dog.jpg", "scan.png"):
        Image.fromarray(pixels).save(name)
    torch.save(models.resnet18(num_classes=3).state_dict(), "my_model.pt")
    Path("names.txt").write_text("ant\nbee\ncat\n")
    for command in commands(ROOT / "docs" / "howto-pictures.md"):
        if command.startswith("captum-rlrp"):
            assert cli.main(shlex.split(command)[1:]) == 0
    assert {path.stem for path in Path("heatmaps").glob("*.png")} == {"cat", "dog", "scan"}


def test_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "figures"))
    figure = importlib.import_module("law").draw()
    figure.savefig(tmp_path / "law.png")
    with Image.open(tmp_path / "law.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 100


# --- links and messages -------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """As GitHub and MyST make them of headings."""
    found = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h)) for h in found]
    return {h.strip().lower().replace(" ", "-") for h in plain}


@pytest.mark.parametrize("page", [*PAGES, *ABOUT], ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"(https?|mailto):", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{named(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{named(page)}: {link}"


def test_every_page_is_reachable() -> None:
    trees = [
        line
        for page in PAGES
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text("utf-8"), re.S)
        for line in block.split()
    ]
    assert sorted([*(t for t in trees if not t.startswith(":")), "index"]) == sorted(
        page.relative_to(ROOT / "docs").with_suffix("").as_posix() for page in PAGES
    )


def spoken() -> Iterator[str]:
    """Every string of the package; "…" stands for what is filled in."""
    for path in Path(cli.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                yield " ".join("".join(map(str, parts)).split())
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())


def test_messages_are_those_of_the_package() -> None:
    text = (ROOT / "docs" / "questions.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.M)
    assert len(messages) > 15
    known = list(spoken())
    for message in messages:
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert any(re.search(pattern, said) for said in known), message
