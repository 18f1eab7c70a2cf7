"""What the CUDA kernels became: 16-byte loads and stores, counted in the machine code of a module.

    python scripts/sass.py [captum_rlrp/_C_cuda.abi3.so]

Exits non-zero where a kernel for several elements at a time moves its largest operands in smaller
pieces: a struct's assignment may fall apart into its members. Needs ``cuobjdump`` and ``c++filt``.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", re.MULTILINE)


def find_cuobjdump() -> str | None:
    """On the PATH, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return found


def kernels(module: Path, cuobjdump: str) -> dict[str, Counter[str]]:
    """Name → how often it has each instruction, and each width of its loads and stores."""
    said = subprocess.run([cuobjdump, "-sass", module], capture_output=True, text=True, check=True)
    _, *parts = said.stdout.split("Function : ")
    names = "\n".join(part.split(maxsplit=1)[0] for part in parts)
    readable = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
    found: dict[str, Counter[str]] = {}
    for name, part in zip(readable.stdout.splitlines(), parts, strict=True):
        counts = found.setdefault(short(name), Counter())
        for instruction in INSTRUCTION.findall(part):
            counts["all"] += 1
            kind, *options = instruction.split(".")
            if kind in ("LDG", "STG"):
                width = next((o for o in options if o in ("64", "128", "U8", "U16")), "32")
                counts[f"{kind}.{width}"] += 1
            elif kind in ("LDL", "STL"):
                counts["local"] += 1
    return found


def short(name: str) -> str:
    """A kernel's name with its template's arguments."""
    name = name.replace("(anonymous namespace)::", "").replace("rlrp::", "")
    return name.removeprefix("void ").split("(")[0]


def at_once(name: str) -> int:
    """How many elements a thread takes at once, by the kernel's template."""
    found = re.search(r"sweep_kernel<\w+, (\d+)|Layout<\w+, (\d+)>", name)
    return int(next(n for n in found.groups() if n)) if found else 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "module", type=Path, nargs="?", default=ROOT / "captum_rlrp/_C_cuda.abi3.so"
    )
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        sys.exit("cuobjdump was not found: it comes with CUDA's toolkit, and with Triton.")
    wrong = []
    for name, counts in sorted(kernels(args.module, cuobjdump).items()):
        print(name, *(f"{key}={count}" for key, count in sorted(counts.items())))
        if at_once(name) > 1 and not (counts["LDG.128"] and counts["STG.128"]):
            wrong.append(name)
    if wrong:
        sys.exit("moves less than 16 bytes at once:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
