"""product, accumulate, split, finish_, sums: compiled against float64, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_rlrp.kernels import compiled, reference

from .common import (
    LAYOUTS,
    agree,
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


def factor(n: int, dtype: torch.dtype, device: str) -> Tensor:
    return (torch.rand(n, dtype=reference.accumulation_dtype(dtype)) + 0.5).to(device)


def terms_of(shape, count, dtype, device, layout):
    n = shape[0]
    return [
        (
            rand(*shape, dtype=dtype, device=device, layout=layout),
            None if i else factor(n, dtype, device),
        )
        for i in range(count)
    ]


def widened(terms):
    return [(exact(t), None if f is None else exact(f)) for t, f in terms]


@every_case
@every_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(backend, device, dtype, layout, shape):
    x = rand(*shape, dtype=dtype, device=device, layout=layout)
    g = rand(*shape, dtype=dtype, device=device, layout=layout)
    q, s = backend.product(x, g)
    expected, mass = reference.product(exact(x), exact(g))
    assert q.dtype == dtype
    assert s.dtype == reference.accumulation_dtype(dtype)
    assert q.stride() == torch.empty_like(x).stride()
    agree(q, expected, dtype)
    agree(s, mass, dtype)


@compare
@pytest.mark.parametrize("of", LAYOUTS)
@pytest.mark.parametrize("by", LAYOUTS)
def test_product_of_different_layouts(backend, of, by):
    dtype = torch.float32
    x = rand(2, 6, 5, 7, dtype=dtype, layout=of)
    g = rand(2, 6, 5, 7, dtype=dtype, layout=by)
    q, s = backend.product(x, g)
    expected, mass = reference.product(exact(x), exact(g))
    agree(q, expected, dtype)
    agree(s, mass, dtype)


@every_case
@every_device
@pytest.mark.parametrize(
    "narrow", [(2, 6, 1, 1), (1, 6, 5, 7), (2, 1, 5, 7), (2, 6, 5, 1)], ids=str
)
def test_product_broadcasts(backend, device, dtype, layout, narrow):
    x = rand(2, 6, 5, 7, dtype=dtype, device=device, layout=layout)
    g = rand(*narrow, dtype=dtype, device=device)
    expected, mass = reference.product(exact(x), exact(g))
    for given in (g, g.expand_as(x)):
        q, s = backend.product(x, given, inplace=True)
        agree(q, expected, dtype)
        agree(s, mass, dtype)


@compare
@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_product_in_place_writes_to_g(backend, dtype, layout):
    x, g = (rand(2, 6, 5, 7, dtype=dtype, layout=layout) for _ in range(2))
    expected, mass = reference.product(exact(x), exact(g))
    q, s = backend.product(x, g, inplace=True)
    assert q.data_ptr() == g.data_ptr()
    agree(q, expected, dtype)
    agree(s, mass, dtype)


@every_case
@every_device
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulate(backend, device, dtype, layout, count, shape):
    terms = terms_of(shape, count, dtype, device, layout)
    r, s = backend.accumulate(terms)
    expected, mass = reference.accumulate(widened(terms))
    assert r.dtype == dtype
    agree(r, expected, dtype)
    agree(s, mass, dtype)


@every_case
@every_device
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("place", ["elsewhere", "first", "last"])
def test_accumulate_into_memory_that_is_there(backend, device, dtype, layout, count, place):
    shape = (3, 6, 5, 7)
    terms = terms_of(shape, count, dtype, device, layout)
    expected, mass = reference.accumulate([(t.clone(), f) for t, f in widened(terms)])
    out = {"first": terms[0][0], "last": terms[-1][0]}.get(place)
    if out is None:
        out = rand(*shape, dtype=dtype, device=device, layout="channels_last")
    r, s = backend.accumulate(terms, out=out)
    assert r.data_ptr() == out.data_ptr()
    assert r.stride() == out.stride()
    agree(r, expected, dtype)
    agree(s, mass, dtype)


@every_case
@every_device
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_split(backend, device, dtype, layout, count, shape):
    a = rand(*shape, dtype=dtype, device=device, layout=layout)
    b = rand(*shape, dtype=dtype, device=device)
    terms = terms_of(shape, count, dtype, device, layout)
    results = backend.split(a, b, terms)
    expected = reference.split(exact(a), exact(b), widened(terms))
    for actual, right in zip(results, expected, strict=True):
        agree(actual, right, dtype)
    r, _ = reference.accumulate(widened(terms))
    agree(exact(results[0]) + exact(results[2]), r, dtype)


@every_case
@every_device
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("from_sum", [False, True])
def test_split_in_place(backend, device, dtype, layout, count, from_sum):
    shape = (3, 6, 5, 7)
    a = rand(*shape, dtype=dtype, device=device, layout=layout)
    b = rand(*shape, dtype=dtype, device=device)
    terms = terms_of(shape, count, dtype, device, layout)
    given = [(exact(t), f) for t, f in widened(terms)]
    expected = reference.split(exact(a).clone(), exact(b), [(t.clone(), f) for t, f in given],
                               from_sum=from_sum)  # fmt: skip
    before = b.clone()
    results = backend.split(a, b, terms, from_sum=from_sum, inplace=True)
    for actual, right in zip(results, expected, strict=True):
        agree(actual, right, dtype, scale=8)
    assert torch.equal(b, before)
    if reference.same_layout(a, terms[0][0]):
        assert (results[0].data_ptr(), results[2].data_ptr()) == (
            a.data_ptr(),
            terms[0][0].data_ptr(),
        )


@compare
@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_split_recovers_a_summand_from_the_sum(backend, device, dtype):
    a = rand(2, 6, 5, 7, dtype=dtype, device=device)
    b = rand(2, 6, 5, 7, dtype=dtype, device=device)
    total = torch.relu(a + b)
    r = rand(2, 6, 5, 7, dtype=dtype, device=device) * (total > 0)
    results = backend.split(total, b, [(r, None)], from_sum=True)
    expected = reference.split(exact(a), exact(b), [(exact(r), None)])
    for actual, right in zip(results, expected, strict=True):
        agree(actual, right, dtype, scale=8)


@compare
@every_dtype
def test_split_by_hand(backend, dtype):
    tiny, huge = torch.finfo(dtype).smallest_normal / 2, torch.finfo(dtype).max
    a = torch.tensor([[1, 0, 0, tiny, huge, -huge, 3]], dtype=dtype)
    b = torch.tensor([[-3, 0, 5, tiny, huge, huge, -1]], dtype=dtype)
    r = torch.tensor([[1, 1, 1, 1, 1, 1, -8]], dtype=dtype)
    r_a, s_a, r_b, s_b = backend.split(a, b, [(r, None)])
    assert r_a.tolist() == [[0.25, 0.5, 0, 0.5, 0.5, 0.5, -6]]
    assert r_b.tolist() == [[0.75, 0.5, 1, 0.5, 0.5, 0.5, -2]]
    assert (s_a.item(), s_b.item()) == (8.25, 5.75)


@compare
def test_product_by_hand(backend):
    x = torch.tensor([[1.0, -2], [0, 3]])
    g = torch.tensor([[5.0, 7], [11, -13]])
    q, s = backend.product(x, g)
    assert q.tolist() == [[5, -14], [0, -39]]
    assert s.tolist() == [19, 39]


@compare
@every_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0,), (2, 0), (2, 3, 0, 4)], ids=str)
def test_empty(backend, dtype, shape):
    x = torch.empty(shape, dtype=dtype)
    for t, s in (
        backend.product(x, x),
        backend.accumulate([(x, None), (x, None)]),
        backend.split(x, x, [(x, None)])[:2],
    ):
        assert t.shape == shape
        assert s.tolist() == [0.0] * shape[0]


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_the_thread_count(layout):
    x = rand(3, 33, 41, 37, dtype=torch.float32, layout=layout)
    g = rand(3, 33, 41, 37, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        seen = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            q, s = compiled.product(x, g)
            checks = compiled.sums([x, x[0]]), compiled.finish_(x.clone(), other=x, relu=True)
            seen.append((q, s, *compiled.split(x, g, [(g, s)]), *checks))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        assert all(torch.equal(u, v) for u, v in zip(seen[0], other, strict=True))


@needs_extension
def test_long_sums_stay_accurate():
    x = torch.full((1, 3_000_001), 0.1)
    _, s = compiled.accumulate([(x, None)])
    assert s.item() == pytest.approx(float(x[0, 0].double()) * 3_000_001, rel=1e-6)


@needs_extension
def test_mixed_arguments_run_on_the_reference():
    x, g = torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float64)
    q, _ = compiled.product(x, g)
    assert q.dtype == torch.float32
    agree(q, exact(x) * g, torch.float32)


@needs_extension
def test_every_half_survives_and_floats_round_as_in_torch():
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
        q, _ = compiled.product(every, torch.ones_like(every))
        assert torch.equal(q.isnan(), every.isnan())
        assert torch.equal(q[~every.isnan()], every[~every.isnan()])
        bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
        floats = torch.cat([bits.view(torch.float32), torch.randn(200_000) * 2e-5])
        floats = floats[floats.isfinite()]
        # One value per sample, made by the factor: 1 · float, rounded to 16 bits.
        r, _ = compiled.accumulate([(torch.ones(len(floats), 1, dtype=dtype), floats)])
        assert torch.equal(r[:, 0], floats.to(dtype))


@needs_extension
@pytest.mark.parametrize("layout", LAYOUTS)
def test_expanded_relevance(layout):
    r = torch.randn(2, 6, 1, 1).expand(2, 6, 4, 4)
    a = rand(2, 6, 4, 4, dtype=torch.float32, layout=layout)
    for actual, right in zip(
        compiled.split(a, laid_out(a + 1, layout), [(r, None)]),
        reference.split(exact(a), exact(a) + 1, [(exact(r), None)]),
        strict=True,
    ):
        agree(actual, right, torch.float32)


@every_device
@pytest.mark.parametrize("backend", [reference, compiled], ids=["reference", "compiled"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_product_applies_the_pending_factor(device, backend, dtype, inplace):
    x, g = (rand(3, 5, 7, dtype=dtype, device=device) for _ in range(2))
    factor = torch.tensor([2.0, 0.0, 0.125], dtype=torch.float32, device=device)
    factor = factor.to(torch.float64 if dtype == torch.float64 else torch.float32)
    expected = exact(x) * exact(g) * exact(factor).view(3, 1, 1)
    q, s = backend.product(x, g.clone(), factor, inplace=inplace)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(exact(q), expected, rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(exact(s), exact(q).abs().sum((1, 2)), rtol=1e-5, atol=1e-7)


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
        agree(s, expected.abs().flatten(1).sum(1), dtype)
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
def test_what_overflows_in_front_of_the_relu_shows_in_the_mass(backend):
    y = torch.full((2, 3, 4), -6e4, dtype=torch.float16)
    y[0] = 1
    s = backend.finish_(y, other=y.clone(), relu=True)
    assert s.isfinite().tolist() == [True, False]


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
    agree(s, reference.mass(before), dtype)


@compare
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_relu_hides_shows_in_the_mass(backend, bad):
    x = torch.randn(2, 3, 4000)
    x[1, 1, 3998] = bad
    s = backend.finish_(x, relu=True)
    assert s[0].isfinite()
    assert not s[1].isfinite()
    assert torch.equal(x[1, 1, 3998], torch.tensor(bad).relu()) or (bad != bad and x.isnan().any())


@compare
def test_relu_of_a_view_leaves_the_rest(backend):
    x = torch.randn(2, 6, 40)
    before = x.clone()
    s = backend.finish_(x[:, ::2, 1::3], relu=True)
    expected = before.clone()
    expected[:, ::2, 1::3] = before[:, ::2, 1::3].clamp_min(0)
    assert torch.equal(x, expected)
    agree(s, reference.mass(exact(before[:, ::2, 1::3])), torch.float32)


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
