"""What the examples in docstrings find there: small stand-ins for a user's model and data."""

from __future__ import annotations

import os
import tempfile

import h5py
import torch
import torchvision
from captum.attr import LayerAttribution
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_rlrp import (
    LayerRelativeLRP,
    RelativeLRP,
    RelevanceStatistics,
    explain_dataset,
    show,
)

__all__ = [
    "DataLoader", "LayerAttribution", "LayerRelativeLRP", "RelativeLRP", "RelevanceStatistics",
    "enter", "explain_dataset", "h5py", "ids", "images", "labels", "leave", "loader", "model",
    "photos", "reader", "relevance", "rlrp", "show", "torch", "torchvision", "words",
]  # fmt: skip

torch.manual_seed(0)
images, labels = torch.rand(6, 3, 32, 32), torch.tensor([3, 5, 3, 5, 3, 5])
photos = TensorDataset(images, labels)
loader = DataLoader(photos, batch_size=3)
model = torchvision.models.resnet18(num_classes=10).eval()
rlrp = RelativeLRP(model)


class Reader(nn.Module):
    """A classifier of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens).mean(1))


reader = Reader().eval()
ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
words = [["a", "good", "film"], ["a", "bad", "film"]]
relevance = torch.rand(2, 3, 8)

_before: list[str] = []


def enter() -> None:
    """Go to an empty folder: examples may write."""
    _before.append(os.getcwd())
    os.chdir(tempfile.mkdtemp())


def leave() -> None:
    """Come back."""
    os.chdir(_before.pop())
