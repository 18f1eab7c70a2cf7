"""Layers that pick places by other values: those are gates, or constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import LayerRelativeLRP, RelativeLRP
from tests.paths import all_paths

from .small import agree, explained, of

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_deformable_convolution_that_moves_nothing() -> None:
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    offset, conv = nn.Conv2d(3, 18, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
    nn.init.zeros_(offset.weight)
    nn.init.zeros_(offset.bias)
    own = {"o": offset, "c": conv, "h": nn.Linear(144, 3)}

    def deformed(s: Any, x: Tensor) -> Tensor:
        x = x.sigmoid()
        y = ops.deform_conv2d(x, s.o(x), s.c.weight, s.c.bias, padding=1)
        return s.h(y.relu().flatten(1))

    (found,) = all_paths(of(deformed, **own), X, 1)
    plain = of(lambda s, x: s.h(s.c(x.sigmoid()).relu().flatten(1)), **own)
    agree(found, explained(plain, X, 1))


def test_a_deformable_convolution_moved_by_one() -> None:
    """Behind a mask of halves, which cancel in the shares."""
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    own = {"c": nn.Conv2d(3, 4, 3, padding=1), "h": nn.Linear(144, 3)}

    def deformed(s: Any, x: Tensor) -> Tensor:
        offset = x.new_zeros(len(x), 9, 2, 6, 6)
        offset[:, :, 1] = 1
        mask = torch.full((len(x), 9, 6, 6), 0.5)
        y = ops.deform_conv2d(x, offset.flatten(1, 2), s.c.weight, s.c.bias, padding=1, mask=mask)
        return s.h(y.relu().flatten(1))

    def moved(s: Any, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 2, 1, 1))  # in place of 1 on each side
        return s.h(F.conv2d(x, s.c.weight * 0.5, s.c.bias).relu().flatten(1))

    (found,) = all_paths(of(deformed, **own), X, 1)
    agree(found, explained(of(moved, **own), X, 1))


@pytest.mark.parametrize("axes", [2, 3])
def test_fractional_max_pooling_of_given_numbers(axes: int) -> None:
    """Windows that do not overlap pool as a max pool does."""
    x = (
        X
        if axes == 2
        else X[:, :, None].expand(-1, -1, 4, -1, -1) + torch.arange(4.0)[:, None, None]
    )
    pool = F.fractional_max_pool2d if axes == 2 else F.fractional_max_pool3d
    plain_pool = F.max_pool2d if axes == 2 else F.max_pool3d
    half = [size // 2 for size in x.shape[2:]]

    def pooled(s: Any, v: Tensor) -> Tensor:
        numbers = torch.zeros(len(v), 3, axes)
        return s.h(pool(v.tanh(), 2, half, _random_samples=numbers).flatten(1))

    torch.manual_seed(0)
    head = nn.Linear(plain_pool(x, 2).flatten(1).shape[1], 3)
    (found,) = all_paths(of(pooled, h=head), x, 1)
    agree(found, explained(of(lambda s, v: s.h(plain_pool(v.tanh(), 2).flatten(1)), h=head), x, 1))


def test_fractional_max_pooling_of_random_numbers() -> None:
    model = nn.Sequential(nn.FractionalMaxPool2d(2, 3), nn.Flatten(), nn.Linear(27, 3)).eval()
    relevance = RelativeLRP(model, allow_random=True).attribute(X, 1)
    torch.testing.assert_close(relevance.abs().sum((1, 2, 3)), torch.ones(2))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_embeddings_of_a_largest_norm(kind: Any, norm: float) -> None:
    """Vectors are shortened where they are looked up, and never in the user's table."""
    torch.manual_seed(0)
    layer, head = kind(9, 4, max_norm=0.8, norm_type=norm), nn.Linear(4, 3)
    before = layer.weight.detach().clone()
    columns = torch.tensor([[1, 2, 3], [6, 0, 8]])

    def forward(s: Any, c: Tensor) -> Tensor:
        y = s.e(c)
        return s.h((y if y.dim() == 2 else y.mean(1)).tanh())

    model = of(forward, e=layer, h=head)
    found = explained(model, columns)
    assert torch.equal(layer.weight, before)
    model(columns)
    assert not torch.equal(layer.weight, before)  # as PyTorch does it
    plain = kind.from_pretrained(layer.weight.detach().clone())
    agree(found, explained(of(forward, e=plain, h=head), columns))


def test_a_spatial_transformer_s_grid_is_a_gate() -> None:
    torch.manual_seed(0)
    own = {"q": nn.Linear(3, 6), "h": nn.Linear(48, 2)}

    def grid(s: Any, x: Tensor) -> Tensor:
        theta = s.q(x.sigmoid().mean((2, 3))).tanh().view(-1, 2, 3)
        return F.affine_grid(theta, [len(x), 3, 4, 4], align_corners=False)

    def sampled(s: Any, x: Tensor, places: Tensor) -> Tensor:
        y = F.grid_sample(x.sigmoid(), places, align_corners=False)
        return s.h(y.tanh().flatten(1))

    moving = of(lambda s, x: sampled(s, x, grid(s, x)), **own)
    (found,) = all_paths(moving, X, 1)
    places = grid(moving, X).detach()
    agree(found, explained(of(sampled, **own), X, 1, additional_forward_args=(places,)))


def test_statistics_of_local_response_norm_are_constants() -> None:
    """A unit at one place of the norm's output is a unit at that place of its input."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.LocalResponseNorm(3, 1.0), nn.Flatten(), nn.Linear(96, 3)
    ).eval()
    all_paths(net, X, 1)
    behind, before = LayerRelativeLRP(net, [net[2], net[1]]).attribute(X, 1)
    agree(before, behind)
    assert (behind.abs().sum((1, 2, 3)) > 0.1).all()
    agree(explained(torch.fx.symbolic_trace(net), X, 1), explained(net, X, 1))


def test_regions_of_interest() -> None:
    """Samples half-way between pixels are means of four."""
    ops = pytest.importorskip("torchvision").ops
    torch.manual_seed(0)
    head, x = nn.Linear(12, 2), X[:1]
    boxes = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])

    def aligned(s: Any, x: Tensor, boxes: Tensor) -> Tensor:
        return s.h(ops.roi_align(x.sigmoid(), boxes, 2, sampling_ratio=1).tanh().flatten(1))

    def averaged(s: Any, x: Tensor) -> Tensor:
        return s.h(F.avg_pool2d(x.sigmoid()[..., :3, :3], 2, stride=1).tanh().flatten(1))

    (found,) = all_paths(of(aligned, h=head), x, 1, boxes)
    agree(found, explained(of(averaged, h=head), x, 1))
