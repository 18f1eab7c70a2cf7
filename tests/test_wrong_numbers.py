"""Numbers that were once wrong without an error, each with its whole kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import CaptureError, NonFiniteError, RelativeLRP
from captum_rlrp.run import engine, wide
from tests.oracle import relative_error
from tests.paths import all_paths

from .small import agree, explained, of

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Three linear layers and a function of them."""

    def __init__(self, fn: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        torch.manual_seed(0)
        self.a, self.b, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def net(fn: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return Net(fn).double().eval()


def rows() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64)


def sequences() -> Tensor:
    return torch.randn(2, 4, 4, dtype=torch.float64)


# ---- memory that is still read is never overwritten ----------------------------------------------


def turn(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two layers": lambda s, x: s.o(s.a(x) @ s.b(x)),
    "sigmoid attention": lambda s, x: s.o(torch.sigmoid(s.a(x)) @ torch.relu(s.b(x))),
    "relu attention": lambda s, x: s.o(torch.relu(s.a(x) @ turn(s.b(x))) @ torch.relu(s.b(x))),
    "softmax plus identity": lambda s, x: s.o((s.a(x).softmax(-1) + torch.eye(4).to(x)) @ s.b(x)),
    "softmax, normalised": lambda s, x: s.o(
        F.normalize(s.a(x).softmax(-1), p=1.0, dim=-1) @ torch.relu(s.b(x))
    ),
    "talking heads": lambda s, x: s.o((s.mix @ s.a(x).softmax(-1)) @ torch.relu(s.b(x))),
    "learned adjacency": lambda s, x: s.o(
        torch.relu(torch.tanh(s.a(x)) @ turn(torch.tanh(s.b(x)))) @ torch.relu(x)
    ),
    "similarities": lambda s, x: s.o((lambda h: h @ turn(h))(torch.relu(s.a(x)))),
    "similarities, h used again": lambda s, x: s.o(
        (lambda h: (h @ turn(h)) @ h + torch.relu(h))(torch.relu(s.a(x)))
    ),
    "bmm": lambda s, x: s.o(torch.bmm(torch.relu(s.a(x)), torch.relu(s.b(x)))),
    "einsum": lambda s, x: s.o(
        torch.einsum("bij,bkj->bik", torch.relu(s.a(x)), torch.relu(s.b(x)))
    ),
    "both used again": lambda s, x: s.o(
        (lambda a, b: a @ b + torch.relu(a) * torch.relu(b))(torch.relu(s.a(x)), s.b(x))
    ),
    "a product of products": lambda s, x: s.o(
        (lambda a, b: (a @ b) @ (b @ a))(torch.relu(s.a(x)), torch.relu(s.b(x)))
    ),
    "an operand in place": lambda s, x: s.o(s.a(x).relu_() @ s.b(x).sigmoid_()),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_two_activations(name: str) -> None:
    all_paths(net(lambda s, x: PRODUCTS[name](s, x).mean(1)), sequences(), [1, 0])


# ---- one value in two places ---------------------------------------------------------------------

TWICE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda h, c: h @ c,
    "bmm": lambda h, c: torch.bmm(h, c),
    "einsum": lambda h, c: torch.einsum("bij,bjk->bik", h, c),
    "einsum, transposed": lambda h, c: torch.einsum("bij,bkj->bik", h, c),
    "baddbmm": lambda h, c: torch.baddbmm(torch.eye(4).to(h), h, c),
    "+": lambda h, c: h + c,
    "-": lambda h, c: 2 * h - c,
    "add with alpha": lambda h, c: torch.add(h, c, alpha=3),
    "*": lambda h, c: h * c,
    "/": lambda h, c: h / c,
    "maximum": torch.maximum,
    "clamp": lambda h, c: h.clamp(min=c),
    "cat": lambda h, c: torch.cat([h, c], 1),
    "stack": lambda h, c: torch.stack([h, c], 1).mean(1),
    "where": lambda h, c: torch.where(torch.eye(4).bool(), h, c),
    "attention": lambda h, c: F.scaled_dot_product_attention(h, c, c.clone()),
    "attention, q is v": lambda h, c: F.scaled_dot_product_attention(h, c.clone(), c),
}


@pytest.mark.parametrize("name", TWICE)
def test_one_value_as_both_operands(name: str) -> None:
    """As if the second were a copy."""
    fn, x = TWICE[name], sequences()

    def mean(copy: Callable[[Tensor], Tensor]) -> nn.Module:
        return net(lambda s, x: (lambda h: s.o(fn(h, copy(h))).mean(1))(torch.tanh(s.a(x))))

    (same,) = all_paths(mean(lambda h: h), x, 1)
    (copied,) = all_paths(mean(torch.clone), x, 1)
    assert relative_error(same, copied) <= 1e-9


def test_attention_of_one_value() -> None:
    """As query, key and value: the fused call and the one written out."""
    fused = net(
        lambda s, x: (lambda h: s.o(F.scaled_dot_product_attention(h, h, h)).mean(1))(s.a(x))
    )
    apart = net(lambda s, x: (lambda h: s.o((h @ turn(h) / 2).softmax(-1) @ h).mean(1))(s.a(x)))
    x = sequences()
    assert relative_error(all_paths(fused, x, 1)[0], all_paths(apart, x, 1)[0]) <= 1e-9


# ---- a layer that is dead for one sample ---------------------------------------------------------


def test_a_layer_dead_for_one_sample() -> None:
    """The second layer is −(h₁ + h₂) + 1: off for x = (3, 3), on for (0.1, 0.1)."""
    model = nn.Sequential(
        nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)
    ).double()  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
        model[2].weight.fill_(-1.0)
        model[2].bias.fill_(1.0)
        model[4].weight.fill_(1.0)
    x = torch.tensor([[3.0, 3.0], [0.1, 0.1], [0.0, 0.0]]).double()
    (attribution,) = all_paths(model.eval(), x, 0)
    expected = torch.tensor([[0.0, 0.0], [-0.5, -0.5], [0.0, 0.0]]).double()
    torch.testing.assert_close(attribution, expected)


def test_a_convolution_dead_for_one_sample() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )
    x = torch.rand(3, 1, 5, 5)
    x[1] = -x[1]
    model(x)
    with torch.no_grad():
        model[0].weight.abs_()
        model[0].bias.zero_()
        model[2].bias.zero_()
        model[2].weight.abs_()
    (attribution,) = all_paths(model.eval(), x, 1)
    assert not attribution[1].any()
    mass = attribution.abs().flatten(1).sum(1)
    assert (mass[[0, 2]] > 0.1).all()


@pytest.mark.parametrize("target", [1, [[1, 0], [2, 1], [0, 2], [1, 1]]])
def test_only_a_dead_sample_runs_in_float64(target, monkeypatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    x = torch.rand(4, 2, 6, 6)
    x[2] = 0
    batches = []
    monkeypatch.setattr(
        engine, "run_wide", lambda task: (batches.append(task.batch), wide.run_wide(task))[1]
    )
    for measured in (False, True):
        batches.clear()
        result = RelativeLRP(model).attribute(x, target, return_convergence_delta=measured)
        found, delta = result if measured else (result, torch.zeros(1))
        assert set(batches) == {1}
        assert float(delta.max()) < 1e-5
        assert found.dtype == torch.float32
        expected = RelativeLRP(model.double()).attribute(x.double(), target)
        model.float()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
        assert (found[2] == 0).all()


# ---- numbers near the ends of the range ----------------------------------------------------------


def nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "dense": (
            nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)),
            (4,),
        ),
        "convolutional": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
                nn.Linear(4, 3, bias=False),
            ),
            (2, 8, 8),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e15, 1e20])
def test_scale_of_the_inputs_and_of_the_weights(kind: str, scale: float) -> None:
    """Without biases neither changes anything; and the delta is finite."""
    model, shape = nets()[kind]
    x = torch.randn(3, *shape)
    (expected,) = all_paths(model.eval(), x, 1)
    bound = 1e-4 if scale > 1e-37 else 0.1  # numbers below 1.2e-38 hold fewer digits
    (scaled,) = all_paths(model, x * scale, 1, tolerance=1e-3)
    assert relative_error(scaled, expected) <= bound
    with torch.no_grad():
        model[0].weight.mul_(scale)
    (scaled,) = all_paths(model, x, 1, tolerance=1e-3)
    assert relative_error(scaled, expected) <= bound


@pytest.mark.parametrize("small", [1e-20, 1e-38, 1e-44])
def test_one_small_value_among_large_ones(small: float) -> None:
    """A skip of 1 and a branch of next to nothing, and the other way round."""

    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    a, b = torch.tensor([[1.0, small]]), torch.tensor([[small, small]])
    left, right = all_paths(Sum().eval(), (a, b), 0)
    assert left[0, 0] == 1
    assert right[0, 0] <= 2 * small
    left, right = all_paths(Sum().eval(), (a, b), 1)
    assert left[0, 1] == right[0, 1] == 0.5


@pytest.mark.parametrize("depth", [30, 100, 400])
def test_deep_signed_chains(depth: int) -> None:
    """Contributions cancel in every layer: right, or an error that says what to do; never 0."""
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(64, 2)).eval()
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=64**-0.5)
    x = torch.randn(2, 64)
    exact = RelativeLRP(model.double()).attribute(x.double(), 1)
    assert (exact.abs().flatten(1).sum(1) > 0).all()
    model.float()
    for backend in ("auto", "reference"):
        rlrp = RelativeLRP(model, backend=backend)
        if exact.abs().amax(1).min() < 1e-37:
            with pytest.raises(NonFiniteError, match="float64"):
                rlrp.attribute(x, 1)
        else:
            assert relative_error(rlrp.attribute(x, 1), exact) <= 1e-2


# ---- the rest ------------------------------------------------------------------------------------


def test_unfold_is_one_to_one() -> None:
    """im2col and views by strides move elements."""

    class Patches(nn.Module):
        def __init__(self, unfold: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.unfold, self.head = unfold, nn.Linear(16, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.unfold(x).sigmoid().flatten(1))

    x = torch.rand(2, 1, 3, 3, dtype=torch.float64)

    def views(t: Tensor) -> Tensor:
        return t.unfold(2, 2, 1).unfold(3, 2, 1).flatten(1, 3).flatten(2).transpose(1, 2)

    (one,) = all_paths(Patches(nn.Unfold(2)).eval(), x, 0)
    (two,) = all_paths(Patches(views).eval(), x, 0)
    assert relative_error(one, two) <= 1e-9
    assert one.sum() != 0


@pytest.mark.parametrize("side", ["min", "max"])
def test_clamp_to_another_activation(side: str) -> None:
    other = torch.maximum if side == "min" else torch.minimum
    clamped = net(lambda s, x: s.o(torch.clamp(s.a(x), **{side: s.b(x)})))
    chosen = net(lambda s, x: s.o(other(s.a(x), s.b(x))))
    x = rows()
    assert relative_error(all_paths(clamped, x, 0)[0], all_paths(chosen, x, 0)[0]) <= 1e-9


APART: dict[str, Any] = {
    "the diagonal of a product": (
        lambda s, x: (s.a(x) @ s.b(x).relu().t()).diagonal(),
        lambda s, x: (s.a(x) * s.b(x).relu()).sum(1),
        None,
    ),
    "experts one behind the other": (
        lambda s, x: s.o(s.a(x).relu().repeat(2, 1).view(2, -1, 4).sum(0)),
        lambda s, x: s.o(s.a(x).relu().expand(2, -1, -1).sum(0)),
        1,
    ),
}


@pytest.mark.parametrize("name", APART)
def test_samples_that_only_the_model_tells_apart(name: str) -> None:
    torch.manual_seed(0)
    own = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "o": nn.Linear(4, 2)}
    mixing, plain, target = APART[name]
    x = torch.randn(3, 4)
    (found,) = all_paths(of(mixing, **own), x, target)
    alone = [explained(of(mixing, **own), x[i : i + 1], target) for i in range(3)]
    agree(found, torch.cat(alone))
    if target is not None:
        agree(found, explained(of(plain, **own), x, target))


def test_a_row_for_each_node_is_an_error_with_a_remedy() -> None:
    torch.manual_seed(0)
    own = {"a": nn.Linear(4, 4), "o": nn.Linear(4, 2)}
    model = of(
        lambda s, x, e: s.o(torch.zeros_like(x).index_add(0, e[1], s.a(x)[e[0]]).relu()), **own
    )
    x, edges = torch.randn(3, 4), torch.tensor([[0, 1, 2, 0], [1, 2, 0, 0]])
    with pytest.raises(CaptureError, match="choose one: output=lambda"):
        RelativeLRP(model).attribute(x, 1, additional_forward_args=edges)
    one = RelativeLRP(model, output=lambda y: y[1:2])
    found = one.attribute(x, 1, additional_forward_args=edges)
    assert found[0].abs().sum() > 0  # what the edge brings
    assert found[1:].abs().sum() == 0
