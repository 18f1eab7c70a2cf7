"""Networks that are no image classifiers: video, segmentation, signals, tables, text, recurrence.

Against the oracle where the network can be told to it in a few lines, otherwise against relations
that must hold whatever the network is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet

from captum_rlrp import LayerRelativeLRP, RelativeLRP
from tests.oracle import (
    Value,
    agrees,
    attend,
    cat,
    explain,
    frozen,
    make,
    randomise_norms,
    relative_error,
)
from tests.paths import all_paths

pytestmark = pytest.mark.usefixtures("one_thread")


def against_oracle(model: nn.Module, twin: Callable, x: Tensor, targets: list[Any]) -> None:
    agrees(twin, model, x)
    (expected,) = explain(twin, (x,), targets)
    (attribution,) = all_paths(model, x, targets)
    assert relative_error(attribution, expected) <= 1e-8


def holds(explainer: Any, x: Tensor, targets: list[Any], least_mass: float = 1e-3) -> Tensor:
    """The laws that hold for every network, and: a batch is explained as its samples are."""
    attribution, delta = explainer.attribute(x, targets, return_convergence_delta=True)
    assert attribution.isfinite().all()
    assert delta.max() <= 1e-8
    mass = attribution.abs().flatten(1).sum(1)
    assert ((mass >= least_mass) & (mass <= 1 + 1e-8)).all()
    for i, target in enumerate(targets):
        alone = explainer.attribute(x[i : i + 1], [target])
        assert relative_error(alone, attribution[i : i + 1]) <= 1e-8
    return attribution


# ---- video and segmentation ------------------------------------------------------------------


def test_video() -> None:
    model = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=5)
    model = frozen(randomise_norms(model))
    holds(RelativeLRP(model), torch.randn(2, 3, 4, 16, 16, dtype=torch.float64), [1, 4])


class Segmentation(nn.Module):
    """Atrous pyramid and upsampling, as a dict like torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.head = DeepLabHead(8, 4, (2, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.head(self.body(x))
        return {"out": F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=False)}


def test_segmentation() -> None:
    model = frozen(randomise_norms(Segmentation()))
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    holds(RelativeLRP(model), x, [(1, 3, 5), (3, 0, 15)])


def test_lraspp() -> None:
    model = models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=4
    )
    model = frozen(randomise_norms(model))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    attribution, delta = RelativeLRP(model).attribute(x, (1, 3, 5), return_convergence_delta=True)
    assert attribution.isfinite().all()
    assert delta.max() <= 1e-8
    assert 1e-3 <= attribution.abs().sum() <= 1


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.bottom = nn.Conv2d(6, 6, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(6, 6, 2, 2)
        self.merge1, self.merge2 = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x).relu()
        b = self.down2(F.max_pool2d(a, 2)).relu()
        c = self.bottom(F.max_pool2d(b, 2)).relu()
        b = self.merge1(torch.cat([b, self.up1(c)], 1)).relu()
        c = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=True)
        return self.head(self.merge2(torch.cat([a, c], 1)).relu())

    def twin(self, x: Value) -> Value:
        pool = nn.MaxPool2d(2)
        a = x.spatial(self.down1).act(torch.relu)
        b = a.route(pool).spatial(self.down2).act(torch.relu)
        c = b.route(pool).spatial(self.bottom).act(torch.relu)
        b = cat([b, c.spatial(self.up1)], 1).spatial(self.merge1).act(torch.relu)
        c = b.spatial(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
        return cat([a, c], 1).spatial(self.merge2).act(torch.relu).spatial(self.head)


def test_unet() -> None:
    model = frozen(UNet())
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    against_oracle(model, model.twin, x, [(0, 1, 2), (2, 7, 0)])


def test_one_value_of_several_pixels() -> None:
    """A target mask over pixels is a sum in a wrapper: the relevance of the region's mean score."""

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = UNet()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[:, :, 2:4, 2:4].mean((2, 3))

    model = frozen(Region())
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)

    def twin(v: Value) -> Value:
        return model.net.twin(v).move(lambda t: t[:, :, 2:4, 2:4]).pool(lambda t: t.mean((2, 3)))

    against_oracle(model, twin, x, [0, 2])


# ---- signals and tables ----------------------------------------------------------------------


def test_signal() -> None:
    model = frozen(
        randomise_norms(
            nn.Sequential(
                nn.Conv1d(2, 6, 7, 2, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(3, 2, 1),
                nn.Conv1d(6, 8, 3, dilation=2, padding="same"), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
                nn.Flatten(), nn.Linear(8, 3),
            )
        )
    )  # fmt: skip

    def twin(v: Value) -> Value:
        for layer in model:
            kinds = {
                nn.ReLU: v.act,
                nn.MaxPool1d: v.route,
                nn.Linear: v.dense,
                nn.AdaptiveAvgPool1d: v.pool,
            }
            v = kinds.get(type(layer), v.spatial)(layer)
        return v

    against_oracle(model, twin, torch.randn(2, 2, 32, dtype=torch.float64), [0, 2])


class Table(nn.Module):
    """Numbers and a category, a residual block, one number to predict."""

    def __init__(self) -> None:
        super().__init__()
        self.category = nn.Embedding(5, 3)
        self.first, self.block, self.last = nn.Linear(7, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, numbers: Tensor, category: Tensor) -> Tensor:
        h = torch.cat([numbers, self.category(category)], 1)
        h = self.norm(self.first(h)).relu()
        return self.last((h + self.block(h)).relu()).squeeze(1)


def test_table() -> None:
    model = frozen(randomise_norms(Table()))
    numbers, category = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 4, 2])

    def twin(x: Value, e: Value) -> Value:
        h = cat([x, e], 1).dense(model.first).move(model.norm).act(torch.relu)
        h = (h + h.dense(model.block)).act(torch.relu).dense(model.last)
        return h.move(lambda t: t.squeeze(1))

    expected, of_category = explain(twin, (numbers, model.category(category)), [None] * 3)
    attribution = RelativeLRP(model).attribute(numbers, additional_forward_args=category)
    assert relative_error(attribution, expected) <= 1e-8
    embedded = LayerRelativeLRP(model, model.category).attribute((numbers, category))
    assert relative_error(embedded, of_category) <= 1e-8


# ---- text ------------------------------------------------------------------------------------


class TextCNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.convs = nn.ModuleList(nn.Conv1d(6, 4, k) for k in (2, 3, 4))
        self.head = nn.Linear(12, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(1, 2)
        pooled = [conv(x).relu().max(dim=-1).values for conv in self.convs]
        return self.head(torch.cat(pooled, 1))

    def twin(self, e: Value) -> Value:
        x = e.move(lambda t: t.transpose(1, 2))
        first = lambda t: t.gather(-1, t.argmax(-1, keepdim=True)).squeeze(-1)  # noqa: E731
        pooled = [x.spatial(conv).act(torch.relu).route(first) for conv in self.convs]
        return cat(pooled, 1).dense(self.head)


def test_text_cnn_per_token() -> None:
    model = frozen(TextCNN())
    ids = torch.randint(0, 20, (3, 9))
    (expected,) = explain(model.twin, (model.embedding(ids),), [0, 1, 1])
    attribution = LayerRelativeLRP(model, model.embedding).attribute(ids, [0, 1, 1])
    assert relative_error(attribution, expected) <= 1e-8
    tokens = attribution.sum(-1)
    assert tokens.shape == ids.shape
    assert (tokens.abs().sum(1) <= 1 + 1e-8).all()


class Encoder(nn.Module):
    def __init__(self, norm_first: bool, activation: str = "relu") -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 7, 8))
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, batch_first=True, norm_first=norm_first, activation=activation
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position
        return self.head(self.encoder(x, src_key_padding_mask=ids == 0)[:, 0])


def encoder_twin(model: Encoder, ids: Tensor) -> Callable[[Value], Value]:
    def mixed(layer: nn.TransformerEncoderLayer, x: Value) -> Value:
        attention = layer.self_attn
        q, k, v = (
            heads(projected(x, w, b))
            for w, b in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3),
                            strict=True)
        )  # fmt: skip
        padded = ids == 0

        def weights(a: Tensor, b: Tensor) -> Tensor:
            return (a @ b.transpose(-1, -2) / 2).masked_fill(padded, float("-inf")).softmax(-1)

        together = attend(lambda w, u: w @ u, gate(weights, q, k), v)
        return together.move(lambda t: t.transpose(1, 2).flatten(2)).dense(attention.out_proj)

    def fed(layer: nn.TransformerEncoderLayer, x: Value) -> Value:
        return x.dense(layer.linear1).act(layer.activation).dense(layer.linear2)

    def twin(e: Value) -> Value:
        x = e.move(lambda t: t + model.position)
        for layer in model.encoder.layers:
            if layer.norm_first:
                x = x + mixed(layer, x.act(layer.norm1))
                x = x + fed(layer, x.act(layer.norm2))
            else:
                x = (x + mixed(layer, x)).act(layer.norm1)
                x = (x + fed(layer, x)).act(layer.norm2)
        return x.move(lambda t: t[:, 0]).dense(model.head)

    return twin


def projected(x: Value, weight: Tensor, bias: Tensor) -> Value:
    return x.dense(lambda t: F.linear(t, weight, bias))


def heads(x: Value) -> Value:
    return x.move(lambda t: t.unflatten(2, (2, -1)).transpose(1, 2))


def gate(fn: Callable[..., Tensor], *values: Value) -> Value:
    """What feeds nothing but a gate."""
    return make("gate", fn, *values)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_per_token(norm_first: bool) -> None:
    model = frozen(Encoder(norm_first, "gelu" if norm_first else "relu"))
    ids = torch.tensor([[3, 7, 1, 19, 4, 0, 0], [8, 8, 2, 5, 6, 9, 11]])
    for backend in ("reference", "auto"):
        explainer = LayerRelativeLRP(model, model.embedding, backend=backend)
        attribution, delta = explainer.attribute(ids, [0, 2], return_convergence_delta=True)
        assert delta.max() <= 1e-8
        for i, target in enumerate((0, 2)):
            embedded = model.embedding(ids[i : i + 1])
            (expected,) = explain(encoder_twin(model, ids[i : i + 1]), (embedded,), [target])
            assert relative_error(attribution[i : i + 1], expected) <= 1e-8
        assert (attribution[0, 5:] == 0).all()  # nobody looks at padding


# ---- attention -------------------------------------------------------------------------------


class Attention(nn.Module):
    """One attention, written in several ways that compute the same."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.attention = nn.MultiheadAttention(8, 2, batch_first=way != "sequence first")
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(x).mean(1))

    def mix(self, x: Tensor) -> Tensor:
        m = self.attention
        if self.way == "module":
            return m(x, x, x, need_weights=False)[0]
        if self.way == "module with weights":
            return m(x, x, x)[0]
        if self.way == "sequence first":
            y = x.transpose(0, 1)
            return m(y, y, y)[0].transpose(0, 1)
        if self.way == "separate":
            weights, biases = m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3)
            parts = [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        else:
            parts = list(F.linear(x, m.in_proj_weight, m.in_proj_bias).chunk(3, -1))
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in parts)
        if self.way == "einsum":
            weights = (torch.einsum("bhid,bhjd->bhij", q, k) / 2).softmax(-1)
            y = torch.einsum("bhij,bhjd->bhid", weights, v)
        elif self.way == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).div(2).softmax(-1), v).unflatten(
                0, (-1, 2)
            )
        elif self.way == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) * 0.5).softmax(-1) @ v
        return m.out_proj(y.transpose(1, 2).flatten(2))


WAYS = [
    "module",
    "module with weights",
    "sequence first",
    "separate",
    "einsum",
    "bmm",
    "fused",
    "@",
]


def test_attention_is_the_same_however_it_is_written() -> None:
    models_ = {}
    torch.manual_seed(0)
    first = frozen(Attention("separate"))
    with torch.no_grad():
        first.attention.in_proj_bias.normal_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def twin(v: Value) -> Value:
        m = first.attention
        parts = zip(m.in_proj_weight.chunk(3), m.in_proj_bias.chunk(3), strict=True)
        q, k, u = (heads(projected(v, w, b)) for w, b in parts)
        made = gate(lambda a, b: (a @ b.transpose(-1, -2) / 2).softmax(-1), q, k)
        y = attend(lambda w, t: w @ t, made, u).move(lambda t: t.transpose(1, 2).flatten(2))
        return y.dense(m.out_proj).pool(lambda t: t.mean(1)).dense(first.head)

    agrees(twin, first, x)
    (expected,) = explain(twin, (x,), [0, 2])
    for way in WAYS:
        models_[way] = frozen(Attention(way))
        models_[way].load_state_dict(first.state_dict())
        torch.testing.assert_close(models_[way](x), first(x))
        (attribution,) = all_paths(models_[way], x, [0, 2])
        assert relative_error(attribution, expected) <= 1e-8, way


def test_value_path_by_hand() -> None:
    """Weights (1/2, 1/2) over two tokens of x: c = (1·1/2, −3·1/2) in the chosen feature."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            weights = (x @ x.transpose(1, 2) * 0).softmax(-1)
            return (weights @ x)[:, 0]

    x = torch.tensor([[[1.0, 5.0], [-3.0, 7.0]]])
    expected = torch.tensor([[[0.25, 0.0], [-0.75, 0.0]]])
    torch.testing.assert_close(RelativeLRP(Mean()).attribute(x, 0), expected)


# ---- recurrent networks ----------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        width = layer.hidden_size * (2 if layer.bidirectional else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Cells(nn.Module):
    """The same with a cell in a loop."""

    def __init__(self, cell: nn.RNNCellBase, head: nn.Linear) -> None:
        super().__init__()
        self.cell, self.head = cell, head

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(x.shape[0], self.cell.hidden_size, dtype=x.dtype)
        state: Any = (zeros, zeros) if isinstance(self.cell, nn.LSTMCell) else zeros
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


RECURRENT = {
    "LSTM": (nn.LSTM, nn.LSTMCell),
    "GRU": (nn.GRU, nn.GRUCell),
    "RNN": (nn.RNN, nn.RNNCell),
}


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
def test_recurrent_layer(kind: str, layers: int, bidirectional: bool) -> None:
    layer = RECURRENT[kind][0](4, 5, layers, batch_first=True, bidirectional=bidirectional)
    model = frozen(Recurrent(layer))
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    attribution = holds(RelativeLRP(model), x, [0, 2])
    assert (attribution[:, -1] != 0).any()
    reference = RelativeLRP(model, backend="reference").attribute(x, [0, 2])
    assert relative_error(attribution, reference) <= 1e-8


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_cells(kind: str) -> None:
    cell = RECURRENT[kind][1](4, 5)
    model = frozen(Cells(cell, nn.Linear(5, 3)))
    holds(RelativeLRP(model), torch.randn(2, 4, 4, dtype=torch.float64), [0, 2])


def test_elman_cell_against_the_oracle() -> None:
    """h' = tanh(W x + b + U h + c), three steps, a sum in each."""
    model = frozen(Cells(nn.RNNCell(4, 5), nn.Linear(5, 3)))
    cell, x = model.cell, torch.randn(2, 3, 4, dtype=torch.float64)

    def twin(v: Value) -> Value:
        h: Value | None = None
        for t in range(3):
            own = v.move(lambda u, t=t: u[:, t]).dense(
                lambda u: F.linear(u, cell.weight_ih, cell.bias_ih)
            )
            if h is None:  # the zeros at the start are no activation
                s = own.move(lambda u: u + cell.bias_hh)
            else:
                s = own + h.dense(lambda u: F.linear(u, cell.weight_hh, cell.bias_hh))
            h = s.act(torch.tanh)
        return h.dense(model.head)

    against_oracle(model, twin, x, [0, 2])
