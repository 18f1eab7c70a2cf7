"""Build of the compiled kernels; everything else is in pyproject.toml.

The CPU kernels (``captum_rlrp._C``) and the CUDA kernels (``captum_rlrp._C_cuda``) are two modules,
so that one built next to a CUDA torch still loads under a CPU-only torch.

Environment:
    CAPTUM_RLRP_EXTENSION=0/1 build no extension (the reference kernels run instead) / fail if it
                              does not build; default: a module that does not build is left out
    CAPTUM_RLRP_CUDA=0/1      without / with CUDA; default: if torch has CUDA and nvcc is found
    CAPTUM_RLRP_SANITIZE=...  a list for -fsanitize=, e.g. address,undefined
    TORCH_CUDA_ARCH_LIST      default 8.0;9.0+PTX
    MAX_JOBS                  number of compiler processes
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# The oldest torch that a build runs under: 2.11, as (major << 56 | minor << 48).
STABLE_ABI = "0x020b000000000000"
# The oldest Python that a build runs under, by its limited API: one wheel serves all later ones.
PYTHON_ABI = "cp310"
WITHOUT = (
    "installing without compiled kernels, plain PyTorch will compute the same, slower; "
    "for the kernels install a C++20 compiler (CXX names one) and install again"
)


def say(message: str) -> None:
    print(f"captum-rlrp: {message}", file=sys.stderr)


def find_cuda_home() -> str | None:
    """Ask nvcc where its toolkit is: the nvcc on PATH may be a wrapper in another folder."""
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home or nvcc is None:
        return home
    try:
        said = subprocess.run(
            [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    found = re.search(r"^#\$ TOP=(.*)$", said.stdout + said.stderr, re.MULTILINE)
    return os.path.normpath(found.group(1)) if found else None


def sources(*folders: str) -> list[str]:
    """The C++ and CUDA files of the named folders, relative to the project."""
    return sorted(
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).glob("*.c*")
        if path.suffix in (".cpp", ".cu")
    )


def extension_arguments() -> dict:
    """What to hand to ``setup`` so that the extension is built; {} where it cannot be."""
    if os.environ.get("CAPTUM_RLRP_EXTENSION", "1") == "0":
        say("CAPTUM_RLRP_EXTENSION=0, so no compiled kernels: the reference kernels will run")
        return {}
    demanded = os.environ.get("CAPTUM_RLRP_EXTENSION") == "1"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        if demanded:
            raise SystemExit(f"captum-rlrp: CAPTUM_RLRP_EXTENSION=1, but {compiler} was not found")
        say(f"{compiler} was not found: {WITHOUT}")
        return {}
    cuda_home = find_cuda_home()
    if cuda_home:
        os.environ["CUDA_HOME"] = cuda_home
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if demanded:
            raise
        say(f"{error}: {WITHOUT}")
        return {}

    sanitize = os.environ.get("CAPTUM_RLRP_SANITIZE", "")
    sanitize_flags = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else []
    optimise = ["-O1", "-g"] if sanitize else ["-O3", "-g0"]
    common = ["-std=c++20", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    cxx = [
        *optimise,
        *common,
        "-fvisibility=hidden",
        f"-ffile-prefix-map={ROOT.resolve()}/=",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
        *sanitize_flags,
    ]
    flags = " ".join(flag for flag in cxx if "prefix-map" not in flag)
    include = [str(ROOT / "csrc")]
    extensions = [
        CppExtension(
            "captum_rlrp._C",
            sources("csrc", "csrc/cpu"),
            include_dirs=list(include),
            extra_compile_args={"cxx": [*cxx, f'-DRLRP_FLAGS="{flags}"']},
            extra_link_args=list(sanitize_flags),
            py_limited_api=True,
        )
    ]

    wanted = os.environ.get("CAPTUM_RLRP_CUDA", "auto")
    possible = torch.version.cuda is not None and cuda_home is not None
    if wanted == "1" and not possible:
        raise SystemExit(
            "captum-rlrp: CAPTUM_RLRP_CUDA=1, but "
            + ("nvcc was not found" if torch.version.cuda else "this torch is built without CUDA")
        )
    cuda_sources = sources("csrc/cuda")
    if wanted != "0" and possible and cuda_sources:
        arches = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        extensions.append(
            CUDAExtension(
                "captum_rlrp._C_cuda",
                cuda_sources,
                include_dirs=list(include),
                extra_compile_args={
                    "cxx": [*cxx, "-DUSE_CUDA", f'-DRLRP_ARCHES="{arches}"'],
                    "nvcc": [
                        "-O3",
                        *common,
                        "-DUSE_CUDA",
                        "--expt-relaxed-constexpr",
                        "-Xcompiler=-fvisibility=hidden",
                        "--Werror=all-warnings",
                    ],
                },
                py_limited_api=True,
            )
        )
    elif wanted != "0":
        say("no CUDA kernels: " + ("nvcc not found" if torch.version.cuda else "torch has no CUDA"))

    class BuildWhatBuilds(BuildExtension):
        """Where a compiler fails, its module is left out, unless that was demanded."""

        def build_extensions(self) -> None:
            every, built = self.extensions, []
            for one in every:
                self.extensions = [one]
                try:
                    super().build_extensions()
                except Exception as error:  # each compiler and build tool has its own
                    if demanded or wanted == "1":
                        raise
                    say(f"{one.name} does not build ({error}): {WITHOUT}")
                    break  # the CUDA kernels are the second, and of no use without the first
                built.append(one)
            self.extensions = built

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildWhatBuilds},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_ABI}},
    }


setup(**(extension_arguments() if sources("csrc") else {}))
