"""A small model and a small data set, also by name: ``tests.dataset_samples:build``."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

CLASSES = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.conv(x).relu()).flatten(1))


class Pictures(Dataset):
    """Noise; the samples in `broken` cannot be read."""

    def __init__(self, count: int = 22, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise OSError("image file is truncated")
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 8, 8, generator=generator), index % CLASSES


class Deadly(Pictures):
    """Kills the process that reads sample 13, unless the file KILLED tells that it has."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        mark = Path(os.environ["KILLED"])
        if index == 13 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class Reader(nn.Module):
    """Judges sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.embedding(tokens).relu() * mask[..., None]).sum(1))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def pictures() -> Pictures:
    return Pictures(22, broken=(5,))


def write_pictures(root: Path, per_class: int = 3) -> None:
    """A folder per class of noisy pictures."""
    chance = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = chance.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
