"""linear_law: the law of a dense layer against float64, and by hand."""

from __future__ import annotations

import pytest
import torch

from captum_rlrp.kernels import compiled, reference
from captum_rlrp.kernels.extension import ops

from .common import DTYPES, agree, assert_same_bits, exact, needs_extension
from .test_ops import bad_tensors, refused

pytestmark = needs_extension


def assert_watches(seen, s):
    """From the largest magnitude to the sum of all."""
    sizes = [0.0, *s.abs().flatten().tolist()]
    assert len(seen) == 1
    assert max(sizes) * 0.9999 <= seen.item() <= sum(sizes) * 1.0001


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (33, 7), (2, 1), (1, 40)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_law(dtype, rows, inputs, outputs, turned):
    x, r = torch.randn(rows, inputs, dtype=dtype), torch.randn(rows, outputs, dtype=dtype)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    if turned:  # the same values, laid out the other way
        x, r, weight = (t.t().contiguous().t() for t in (x, r, weight))
    q, seen = ops.linear_law.default(x, weight, r)
    s = exact(r) / (exact(x).abs() @ exact(weight).abs().t())
    agree(q, exact(x) * (s @ exact(weight)), dtype, scale=4)
    assert seen.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_watches(seen, s)


@pytest.mark.parametrize("rows", [1, 7, 61, 200])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(96, 64), (1024, 40), (8, 2056), (2056, 8), (1112, 1112), (77, 1001)]
)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kept", [0.2, 1])
def test_by_products(rows, inputs, outputs, turned, kept):
    """Enough of them go by panels of vectors, and what is left of one at the end."""
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    r = torch.randn(rows, outputs)
    x *= torch.rand(inputs) <= kept
    r *= torch.rand(outputs) <= kept
    x[0] = 0
    if turned:
        x, r, weight = (t.t().contiguous().t() for t in (x, r, weight))
    q, seen = ops.linear_law.default(x, weight, r)
    d = exact(x).abs() @ exact(weight).abs().t()
    s = torch.where(d > 0, exact(r) / d, 0.0)
    expected = exact(x) * (s @ exact(weight))
    bound = exact(x).abs() * (s.abs() @ exact(weight).abs())  # what is summed
    assert ((exact(q) - expected).abs() <= 3e-6 * bound).all()
    assert_watches(seen, s)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 17])
@pytest.mark.parametrize(("inputs", "outputs"), [(300, 130), (1000, 33), (9000, 5)])
def test_few_rows(rows, inputs, outputs):
    x, weight, r = (
        torch.randn(rows, inputs),
        torch.randn(outputs, inputs),
        torch.randn(rows, outputs),
    )
    r[:, 1:3] = 0
    weight[0] = x[0] = 0
    q, seen = ops.linear_law.default(x, weight, r)
    d = exact(x).abs() @ exact(weight).abs().t()
    s = torch.where(d > 0, exact(r) / d, 0.0)
    bound = exact(x).abs() * (s.abs() @ exact(weight).abs())
    assert ((exact(q) - exact(x) * (s @ exact(weight))).abs() <= 3e-6 * bound).all()
    assert_watches(seen, s)


@pytest.mark.parametrize("rows", [5, 40])
def test_the_same_bits_for_any_number_of_threads(rows):
    x, weight, r = torch.randn(rows, 300), torch.randn(500, 300), torch.randn(rows, 500)
    assert_same_bits(lambda: ops.linear_law.default(x, weight, r))


@pytest.mark.parametrize("rows", [3, 61, 200])
@pytest.mark.parametrize("first", [64, 100, 128])
@pytest.mark.parametrize("kept", [0.2, 1])
def test_outputs_without_relevance_are_as_if_they_were_not(rows, first, kept):
    x, weight, r = torch.randn(rows, 96), torch.randn(192, 96), torch.randn(rows, 192)
    x *= torch.rand(96) <= kept
    r[:, :first] = 0
    weight[5, 0] = 1e30  # whose divisor nobody needs
    q, seen = ops.linear_law.default(x, weight, r)
    weight, r = exact(weight[first:]), exact(r[:, first:])
    d = exact(x).abs() @ weight.abs().t()
    s = torch.where(d > 0, r / d, 0.0)
    agree(q, exact(x) * (s @ weight), torch.float32, scale=4)
    assert_watches(seen, s)


def test_many_axes():
    x, weight, r = torch.randn(2, 3, 5, 96), torch.randn(64, 96), torch.randn(2, 3, 5, 64)
    q, _ = ops.linear_law.default(x, weight, r)
    flat, _ = ops.linear_law.default(x.view(30, 96), weight, r.view(30, 64))
    assert q.shape == x.shape
    assert torch.equal(q.view(30, 96), flat)


def test_by_hand():
    """method.md §8: x = (1, 2) and (1, 0), W = [[3, −1], [1, −1]]; a row of zeros gets nothing."""
    x = torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    weight = torch.tensor([[3.0, -1.0], [1.0, -1.0]])
    r = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    q, _ = ops.linear_law.default(x, weight, r)
    expected = torch.tensor([[3 / 5, -2 / 5], [1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(q, expected)


def test_which_layers_go_by_it(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "linear_law", spy := type("Spy", (), {})())
    spy.default = lambda *arguments: calls.append(arguments) or (arguments[0], arguments[2])
    x, weight, r = torch.randn(2, 8), torch.randn(3, 8), torch.randn(2, 3)
    compiled.linear_relevance(x, weight, r)  # a small one
    compiled.linear_relevance(x.expand(3, 2, 8), weight, r.expand(3, 2, 3))
    assert len(calls) == 2
    many = torch.randn(512, 512)
    compiled.linear_relevance(many, many[:507], many[:, :507])
    assert len(calls) == 3
    wide = many.double()
    compiled.linear_relevance(wide, wide, wide)
    assert len(calls) == 3


@pytest.mark.parametrize("outputs", [32, 3, 801])
@pytest.mark.parametrize("size", [(16,), (3, 16), (2, 3, 16), (2, 50, 2, 16)], ids=str)
def test_every_way_is_the_reference(size, outputs):
    x, weight, r = torch.randn(size), torch.randn(outputs, 16), torch.randn(*size[:-1], outputs)
    q, _ = compiled.linear_relevance(x, weight, r)
    expected, _ = reference.linear_relevance(exact(x), exact(weight), exact(r))
    agree(q, expected, torch.float32, scale=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("outputs", [4, 4096])
def test_what_is_not_finite_shows(value, place, outputs):
    arguments = [torch.randn(3, 8), torch.randn(outputs, 8), torch.randn(3, outputs)]
    arguments[place][1, 2] = value
    _, seen = ops.linear_law.default(*arguments)
    assert not seen.isfinite()


def test_opcheck_and_refusals():
    good = (torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 4))
    torch.library.opcheck(ops.linear_law.default, good, raise_exception=True)
    for position, value in enumerate(good):
        for wrong in bad_tensors(value).values():
            assert refused("linear_law", [*good[:position], wrong, *good[position + 1 :]])
