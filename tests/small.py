"""Small models and comparisons for tests about the model around the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_rlrp import RelativeLRP


class Of(nn.Module):
    """A function of some layers and the arguments."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def of(function: Callable[..., Any], **layers: nn.Module) -> Of:
    return Of(function, **layers).eval()


def mlp(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias), nn.ReLU(), nn.Linear(8, 3)).eval()


def rows(count: int = 3, size: int = 4) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(1))


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    scale = b.abs().max().clamp_min(1e-30)
    assert a.shape == b.shape
    assert float((a - b).abs().max() / scale) <= tolerance


def explained(model: nn.Module, x: Any, target: Any = 0, **options: Any) -> Any:
    return RelativeLRP(model).attribute(x, target, **options)
