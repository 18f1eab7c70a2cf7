"""Imports go one way: from what a user calls down to the arithmetic."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import captum_rlrp

ROOT = Path(captum_rlrp.__file__).parent
# What stands further down may be imported, and what stands in the same line.
ORDER = ["errors", "kernels", "graph", "rules", "plan", "run", "", "dataset", "cli"]
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def stage(parts: tuple[str, ...]) -> str:
    """The package of a module; "" stands for the modules beside the packages."""
    name = parts[0] if parts else ""
    if name in ("cli", "errors", "cli_files", "__main__"):
        return "errors" if name == "errors" else "cli"
    return name if (ROOT / name).is_dir() and name else ""


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of the package that a file imports at its top level."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif names[:1] == ("captum_rlrp",):
                base, names = (), names[1:]
            else:
                continue
            if base + names:
                yield base + names
            else:
                yield from ((alias.name,) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = ORDER.index(stage(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        found = ORDER.index(stage(module))
        assert found <= own, f"{path.relative_to(ROOT)} imports {'.'.join(module)}"


def test_it_sees_imports() -> None:
    assert ("graph", "capture") in set(imports(ROOT / "run" / "capturing.py"))
