"""linear_law: the law of a small dense layer against float64, and by hand."""

from __future__ import annotations

import pytest
import torch

from captum_rlrp.kernels import compiled, reference
from captum_rlrp.kernels.extension import ops

from .common import DTYPES, agree, exact, needs_extension
from .test_ops import bad_tensors, refused

pytestmark = needs_extension


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
    largest = s.abs().max() if rows else torch.zeros(())
    assert seen.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(seen[0].double(), largest.double(), rtol=1e-4, atol=0)


def test_by_hand():
    """method.md §8: x = (1, 2) and (1, 0), W = [[3, −1], [1, −1]]; a row of zeros gets nothing."""
    x = torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    weight = torch.tensor([[3.0, -1.0], [1.0, -1.0]])
    r = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    q, _ = ops.linear_law.default(x, weight, r)
    expected = torch.tensor([[3 / 5, -2 / 5], [1.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(q, expected)


def test_small_layers_go_by_it(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "linear_law", spy := type("Spy", (), {})())
    spy.default = lambda *arguments: calls.append(arguments) or (arguments[0], arguments[2])
    x, weight, r = torch.randn(2, 8), torch.randn(4, 8), torch.randn(2, 4)
    compiled.linear_relevance(x, weight, r)
    assert len(calls) == 1
    compiled.linear_relevance(x.expand(3, 2, 8), weight, r.expand(3, 2, 4))
    compiled.linear_relevance(torch.randn(512, 512), torch.randn(512, 512), torch.randn(512, 512))
    assert len(calls) == 1


@pytest.mark.parametrize("size", [(3, 16), (2, 3, 16)], ids=str)
def test_every_way_is_the_reference(size):
    x, weight, r = torch.randn(size), torch.randn(32, 16), torch.randn(*size[:-1], 32)
    q, _ = compiled.linear_relevance(x, weight, r)
    expected, _ = reference.linear_relevance(exact(x), exact(weight), exact(r))
    agree(q, expected, torch.float32, scale=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_shows(value, place):
    arguments = [torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 4)]
    arguments[place][1, 2] = value
    _, seen = ops.linear_law.default(*arguments)
    assert not seen.isfinite()


def test_opcheck_and_refusals():
    good = (torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 4))
    torch.library.opcheck(ops.linear_law.default, good, raise_exception=True)
    for position, value in enumerate(good):
        for wrong in bad_tensors(value).values():
            assert refused("linear_law", [*good[:position], wrong, *good[position + 1 :]])
