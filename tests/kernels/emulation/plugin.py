"""pytest plugin: the CUDA kernels, emulated, in the place of the CPU's."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from captum_rlrp.kernels import compiled, convolution, extension, onednn
from captum_rlrp.plan import instructions

SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"

torch.ops.load_library(os.environ["CAPTUM_RLRP_EMULATED"])


class Emulated:
    """As ``torch.ops.captum_rlrp``, with the ops that CUDA has from the emulation."""

    names = frozenset(
        name
        for source in SOURCES.glob("*.cu")
        for name in re.findall(r'm\.impl\("(\w+)"', source.read_text())
    )

    def __getattr__(self, name: str) -> Any:
        emulated = torch.ops.captum_rlrp_emulated
        return getattr(emulated if name in self.names else extension.ops, name)


compiled.ops = Emulated()

# Whole models then take the ways that they take on a GPU, too.
instructions._adds_bias = lambda x: False
convolution._IS_FAST = False
onednn.covers = onednn.multiplies = onednn.dwarfs = lambda *args: False
