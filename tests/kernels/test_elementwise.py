"""divide, multiply, split, add, finish_, sums: compiled against float64, and by hand."""

from __future__ import annotations

import pytest
import torch

from captum_rlrp.kernels import compiled, reference

from .common import (
    LAYOUTS,
    agree,
    assert_same_bits,
    compare,
    every_case,
    every_device,
    every_dtype,
    exact,
    laid_out,
    needs_extension,
    rand,
)

SHAPES = [(2, 3, 5, 7), (3, 17), (4,), (2, 3, 2, 4, 5), (2, 40, 33, 31)]


def operands(count, shape, dtype, device, layout):
    """The first laid out as named, the others contiguous."""
    first = rand(*shape, dtype=dtype, device=device, layout=layout)
    return [first, *(rand(*shape, dtype=dtype, device=device) for _ in range(count - 1))]


@every_case
@every_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_divide(backend, device, dtype, layout, shape):
    d, r = operands(2, shape, dtype, device, layout)
    d = d.abs()
    s, seen = backend.divide(r, d)
    expected, largest = reference.divide(exact(r), exact(d))
    assert s.dtype == dtype
    assert (seen.shape, seen.dtype) == ((1,), reference.accumulation_dtype(dtype))
    agree(s, expected, dtype)
    agree(seen, largest, dtype)


@compare
@every_dtype
def test_divide_by_hand(backend, dtype):
    r = torch.tensor([[1, -3, 5, 0, 7]], dtype=dtype)
    d = torch.tensor([[2, 4, 0, 0, 8]], dtype=dtype)
    s, seen = backend.divide(r, d)
    assert s.tolist() == [[0.5, -0.75, 0, 0, 0.875]]
    assert seen.tolist() == [0.875]


@compare
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["r", "d"])
def test_what_is_not_finite_shows(backend, bad, of):
    r, d = torch.randn(2, 3, 4000), torch.rand(2, 3, 4000) + 1
    (r if of == "r" else d)[1, 1, 3998] = bad
    assert not backend.divide(r, d)[1].isfinite()


@every_case
@every_device
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_multiply(backend, device, dtype, layout, absolute, shape):
    x, g = operands(2, shape, dtype, device, layout)
    q = backend.multiply(x, g, absolute=absolute)
    assert q.dtype == dtype
    agree(q, (exact(x).abs() if absolute else exact(x)) * exact(g), dtype)


@compare
@pytest.mark.parametrize("of", LAYOUTS)
@pytest.mark.parametrize("by", LAYOUTS)
def test_multiply_of_different_layouts(backend, of, by):
    x = rand(2, 6, 5, 7, dtype=torch.float32, layout=of)
    g = rand(2, 6, 5, 7, dtype=torch.float32, layout=by)
    agree(backend.multiply(x, g), exact(x) * exact(g), torch.float32)


@every_case
@every_device
@pytest.mark.parametrize(
    "narrow", [(2, 6, 1, 1), (1, 6, 5, 7), (2, 1, 5, 7), (2, 6, 5, 1)], ids=str
)
def test_multiply_broadcasts(backend, device, dtype, layout, narrow):
    x = rand(2, 6, 5, 7, dtype=dtype, device=device, layout=layout)
    g = rand(*narrow, dtype=dtype, device=device)
    for given in (g, g.expand_as(x)):
        agree(backend.multiply(x, given), exact(x) * exact(g), dtype)


@every_case
@every_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split(backend, device, dtype, layout, shape):
    a, b, r = operands(3, shape, dtype, device, layout)
    before = [t.clone() for t in (a, b, r)]
    results = backend.split(a, b, r)
    for actual, right in zip(results, reference.split(*map(exact, (a, b, r))), strict=True):
        agree(actual, right, dtype)
    agree(exact(results[0]) + exact(results[1]), exact(r), dtype)
    assert all(map(torch.equal, before, (a, b, r)))


@compare
@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_split_recovers_a_summand_from_the_sum(backend, device, dtype):
    a, b, r = operands(3, (2, 6, 5, 7), dtype, device, "contiguous")
    total = torch.relu(a + b)
    r = r * (total > 0)
    results = backend.split(total, b, r, from_sum=True)
    for actual, right in zip(results, reference.split(*map(exact, (a, b, r))), strict=True):
        agree(actual, right, dtype, scale=8)


@compare
@every_dtype
def test_split_by_hand(backend, dtype):
    tiny, huge = torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max
    a = torch.tensor([[1, 0, 0, tiny, huge, -huge, 3]], dtype=dtype)
    b = torch.tensor([[-3, 0, 5, tiny, huge, huge, -1]], dtype=dtype)
    r = torch.tensor([[1, 1, 1, 1, 1, 1, -8]], dtype=dtype)
    r_a, r_b = backend.split(a, b, r)
    assert r_a.tolist() == [[0.25, 0.5, 0, 0.5, 0.5, 0.5, -6]]
    assert r_b.tolist() == [[0.75, 0.5, 1, 0.5, 0.5, 0.5, -2]]


@compare
@pytest.mark.parametrize("count", [1, 2, 3])
def test_add(backend, count):
    terms = [torch.randn(2, 3, 4) for _ in range(count)]
    before = [t.clone() for t in terms]
    total = backend.add(terms)
    agree(total, sum(map(exact, terms)), torch.float32)
    assert all(map(torch.equal, before, terms))
    assert all(total.data_ptr() != t.data_ptr() for t in terms)


@compare
@every_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0,), (2, 0), (2, 3, 0, 4)], ids=str)
def test_empty(backend, dtype, shape):
    x = torch.empty(shape, dtype=dtype)
    s, seen = backend.divide(x, x)
    assert seen.tolist() == [0.0]
    for t in (s, backend.multiply(x, x), *backend.split(x, x, x)):
        assert t.shape == shape


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_the_thread_count(layout):
    x = rand(3, 33, 41, 37, dtype=torch.float32, layout=layout)
    g = rand(3, 33, 41, 37, dtype=torch.float32)

    def results():
        checks = compiled.sums([x, x[0]]), compiled.finish_(x.clone(), other=x, relu=True)
        shares = (*compiled.divide(x, g.abs()), compiled.multiply(x, g), *compiled.split(x, g, g))
        return (*shares, *checks)

    assert_same_bits(results)


@needs_extension
def test_mixed_arguments_run_on_the_reference():
    x, g = torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float64)
    agree(compiled.multiply(x, g), exact(x) * g, torch.float32)
    agree(compiled.divide(x, g.abs())[0], exact(x) / g.abs(), torch.float32)


@needs_extension
def test_every_half_survives_and_floats_round_as_in_torch():
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        q = compiled.multiply(every, torch.ones_like(every))
        assert torch.equal(q.isnan(), every.isnan())
        assert torch.equal(q[~every.isnan()], every[~every.isnan()])
        # One value per channel, made by the scale: 1 · float, rounded to 16 bits.
        bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
        floats = torch.cat([bits.view(torch.float32), torch.randn(200_000) * 2e-5])
        floats = floats[floats.isfinite()]
        y = torch.ones(1, len(floats), dtype=dtype)
        compiled.finish_(y, floats)
        assert torch.equal(y[0], floats.to(dtype))


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_relevance(layout):
    r = torch.randn(2, 6, 1, 1).expand(2, 6, 4, 4)
    a = rand(2, 6, 4, 4, dtype=torch.float32, layout=layout)
    given = (a, laid_out(a + 1, layout), r)
    for actual, right in zip(
        compiled.split(*given), reference.split(*map(exact, given)), strict=True
    ):
        agree(actual, right, torch.float32)


# ---- finish_ and sums: is everything finite? ----------------------------------------------------


@every_case
@every_device
@pytest.mark.parametrize("given", ["shift", "scale shift", "other", "scale shift other", "scale"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 17), (2, 16, 6), (2, 40, 33, 31)], ids=str)
def test_finish(backend, device, dtype, layout, shape, given):
    y, other = (rand(*shape, dtype=dtype, device=device, layout=layout) for _ in range(2))
    wide = reference.accumulation_dtype(dtype)
    channels = {
        name: torch.randn(shape[1], dtype=wide, device=device)
        for name in given.split()
        if name != "other"
    }
    expected, place, strides = exact(y), y.data_ptr(), y.stride()
    for name, value in channels.items():
        value = exact(value).view([-1] + [1] * (len(shape) - 2))
        expected = expected * value if name == "scale" else expected + value
    if "other" in given:
        channels["other"] = other
        expected = expected + exact(other)
    for relu in (False, True):
        z = y.as_strided(y.shape, y.stride())
        before = y.clone()
        s = backend.finish_(z, **channels, relu=relu)
        agree(z, expected.relu() if relu else expected, dtype)
        agree(s, reference.largest(expected), dtype)
        assert (z.data_ptr(), z.stride()) == (place, strides)
        assert s.dtype == wide
        y.copy_(before)


@needs_extension
@every_device
def test_finish_takes_numbers_of_any_layout_and_dtype(device):
    y = torch.randn(2, 4, 6, 5, device=device)
    scale = torch.randn(8, dtype=torch.float64, device=device)[::2]
    shift = torch.randn(4, device=device).bfloat16()
    expected = exact(y) * exact(scale).view(-1, 1, 1) + exact(shift).view(-1, 1, 1)
    compiled.finish_(y, scale, shift)
    agree(y, expected, torch.float32)


@compare
def test_what_overflows_in_front_of_the_relu_shows(backend):
    y = torch.full((2, 3, 4), -6e4, dtype=torch.float16)
    y[0] = 1
    assert not backend.finish_(y, other=y.clone(), relu=True).isfinite()


@every_case
@every_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_in_place(backend, device, dtype, layout, shape):
    x = rand(*shape, dtype=dtype, device=device, layout=layout)
    before, place, strides = exact(x).clone(), x.data_ptr(), x.stride()
    s = backend.finish_(x, relu=True)
    assert torch.equal(exact(x), before.clamp_min(0))
    assert (x.data_ptr(), x.stride()) == (place, strides)
    assert s.dtype == reference.accumulation_dtype(dtype)
    agree(s, reference.largest(before), dtype)


@compare
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_relu_hides_shows(backend, bad):
    x = torch.randn(2, 3, 4000)
    x[1, 1, 3998] = bad
    s = backend.finish_(x, relu=True)
    assert not s.isfinite()
    assert torch.equal(x[1, 1, 3998], torch.tensor(bad).relu()) or (bad != bad and x.isnan().any())


@compare
def test_relu_of_a_view_leaves_the_rest(backend):
    x = torch.randn(2, 6, 40)
    before = x.clone()
    s = backend.finish_(x[:, ::2, 1::3], relu=True)
    expected = before.clone()
    expected[:, ::2, 1::3] = before[:, ::2, 1::3].clamp_min(0)
    assert torch.equal(x, expected)
    agree(s, reference.largest(exact(before[:, ::2, 1::3])), torch.float32)


@compare
@every_device
def test_sums(backend, device):
    image = torch.randn(2, 3, 50, 60, device=device)
    values = [
        image,
        image.to(memory_format=torch.channels_last),
        image[:, 1:, ::2],
        image[:, :1].expand(2, 7, 50, 60),
        image.double(),
        torch.full((3, 400), 3e38, device=device),  # too much for a float32
        torch.full((70_000,), 6e4, dtype=torch.float16, device=device),
        torch.randn(9, device=device).bfloat16(),
        torch.tensor(2.5, device=device),
        torch.zeros(0, 4, device=device),
    ]
    result = backend.sums(values)
    assert result.dtype == torch.float64
    expected = torch.stack([v.double().sum() for v in values])
    assert torch.allclose(result, expected, rtol=1e-6, atol=1e-4)
    assert torch.equal(result[[0, 4]].isfinite(), torch.ones(2, dtype=torch.bool, device=device))


@compare
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_sums_show_what_is_not_finite(backend, dtype, bad):
    x = torch.ones(3, 40_000, dtype=dtype)
    for at in (0, 16_383, 16_384, 119_999):
        y = x.clone()
        y.view(-1)[at] = bad
        finite = backend.sums([x, y, x]).isfinite()
        assert finite.tolist() == [True, False, True]


@needs_extension
def test_integers_are_summed_by_the_reference():
    assert compiled.sums([torch.arange(5), torch.ones(2)]).tolist() == [10.0, 2.0]
