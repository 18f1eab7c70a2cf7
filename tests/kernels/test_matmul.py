"""matmul: small products of matrices against float64."""

from __future__ import annotations

import pytest
import torch

from captum_rlrp.kernels import compiled
from captum_rlrp.kernels.extension import ops

from .common import assert_same_bits, exact, needs_extension
from .test_ops import bad_tensors, refused

pytestmark = needs_extension

SIZES = [
    (197, 64, 197),
    (49, 49, 32),
    (12, 1, 33),
    (1, 70, 1),
    (5, 16, 17),
    (13, 3, 48),
    (64, 300, 8),
]


def check(y, a, b):
    bound = exact(a).abs() @ exact(b).abs()
    assert ((exact(y) - exact(a) @ exact(b)).abs() <= 3e-6 * bound).all()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("count", [(1,), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("turned", ["neither", "first", "second", "both"])
def test_as_they_lie(size, count, turned):
    n, k, m = size
    a, b = torch.randn(*count, n, k), torch.randn(*count, k, m)
    a = a.mT.contiguous().mT if turned in ("first", "both") else a
    b = b.mT.contiguous().mT if turned in ("second", "both") else b
    y = ops.matmul.default(a, b)
    assert y.is_contiguous()
    check(y, a, b)


def test_heads_of_one_tensor():
    """Queries, keys and values as a vision transformer's first layer yields them."""
    q, k, v = torch.randn(2, 50, 3, 4, 16).permute(2, 0, 3, 1, 4)
    scores = ops.matmul.default(q, k.mT)
    check(scores, q, k.mT)
    check(ops.matmul.default(scores, v), scores, v)
    check(ops.matmul.default(scores.mT, v), scores.mT, v)
    shared = k[:, :1].expand(2, 4, 50, 16)  # by all heads
    check(ops.matmul.default(q, shared.mT), q, shared.mT)


def test_nothing_is_read_or_written_beside_them():
    around = torch.full((3, 20, 40), float("nan"))
    a, b = around[:, :7, :9], around[:, 7:16, 9:28]
    a.copy_(torch.randn(3, 7, 9))
    b.copy_(torch.randn(3, 9, 19))
    for first, second in ((a, b), (a.mT.contiguous().mT, b), (a, b.mT.contiguous().mT)):
        y = ops.matmul.default(first, second)
        assert y.isfinite().all()
        check(y, a, b)


def test_a_nan_stays_where_it_is():
    a, b = torch.randn(2, 30, 20), torch.randn(2, 20, 50)
    a[1, 3, 4] = float("nan")
    y = ops.matmul.default(a, b)
    assert y[1, 3].isnan().all()
    assert y.isnan().sum() == 50


def test_the_same_bits_for_any_number_of_threads():
    a, b = torch.randn(1, 131, 40), torch.randn(1, 40, 70)
    assert_same_bits(lambda: [ops.matmul.default(a, b)])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.randn(3, 4), torch.randn(4, 5)),
        (torch.randn(2, 3, 4), torch.randn(4, 5)),
        (torch.randn(1, 3, 4), torch.randn(2, 4, 5)),
        (torch.randn(2, 3, 4).double(), torch.randn(2, 4, 5).double()),
        (torch.randn(2, 3, 8)[..., ::2], torch.randn(2, 4, 5)),
        (torch.randn(2, 0, 4), torch.randn(2, 4, 5)),
        (torch.randn(2, 3, 0), torch.randn(2, 0, 5)),
        (torch.randn(2, 3, 4), torch.randn(2, 4, 0)),
        (torch.randn(2, 3, 4), torch.randn(2, 4)),
    ],
)
def test_what_else_there_is_goes_to_pytorch(a, b):
    if b.dim() == 2 and len(b) == 2:
        b = b[..., None]
    torch.testing.assert_close(compiled.matmul(a, b), a @ b)


def test_opcheck_and_refusals():
    good = (torch.randn(2, 3, 8), torch.randn(2, 8, 4))
    torch.library.opcheck(ops.matmul.default, good, raise_exception=True)
    for position, value in enumerate(good):
        for name, wrong in bad_tensors(value).items():
            if (position, name) not in ((0, "one column"), (1, "one column")):
                assert refused("matmul", [*good[:position], wrong, *good[position + 1 :]]), name
    assert refused("matmul", [torch.randn(2, 3, 16)[..., ::2], good[1]])
    assert ops.matmul.default(good[0], good[1][..., :1]).shape == (2, 3, 1)
