"""Small models and comparisons for tests about the model around the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from captum_rlrp.errors import NonFiniteError


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


class Block(nn.Module):
    """A skip connection, pooling, and a gate that may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.after = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        x = self.before(x)
        x = self.pool(torch.relu(x + self.inner(x)))
        y: Tensor = self.after((x if weight is None else x * weight).flatten(1))
        return y


def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


def images(seed: int = 1, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 8, 8, generator=generator, dtype=dtype)


def assert_refuses(rlrp: RelativeLRP, x: Tensor) -> None:
    """A picture with a NaN, and a target that :class:`Block` does not have."""
    bad = x.clone()
    bad[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="Input 0 contains NaN"):
        rlrp.attribute(bad, target=1)
    with pytest.raises(ValueError, match="target 7 does not fit"):
        rlrp.attribute(x, target=7)
