"""Shapes, layouts and tolerances shared by the kernel tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_rlrp.kernels import compiled, extension, reference

needs_extension = pytest.mark.skipif(
    not extension.available(), reason=f"extension not loaded: {extension.load_error()}"
)

# Tests that need a GPU exist only where there is one.
HAVE_GPU = torch.cuda.is_available() and extension.cuda_available()
DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if HAVE_GPU else [])]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "permuted"]

# Compiled kernels meet every dtype in every layout; the reference each of them once.
DIAGONAL = list(zip(DTYPES, LAYOUTS, strict=True))
BACKENDS = [reference, pytest.param(compiled, marks=needs_extension)]
IDS = ["reference", "compiled"]
compare = pytest.mark.parametrize("backend", BACKENDS, ids=IDS)
every_case = pytest.mark.parametrize(
    ("backend", "dtype", "layout"),
    [
        *((reference, *pair) for pair in DIAGONAL),
        *(
            pytest.param(compiled, dtype, layout, marks=needs_extension)
            for dtype in DTYPES
            for layout in LAYOUTS
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
every_device = pytest.mark.parametrize("device", DEVICES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

# Relative to the largest value of the expected tensor.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of t in another memory layout."""
    if layout == "channels_last" and t.dim() in (4, 5):
        four = t.dim() == 4
        return t.contiguous(memory_format=torch.channels_last if four else torch.channels_last_3d)
    if layout == "channels_last" and t.dim() == 3:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # every second element of a larger tensor, with an offset
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), 99.0)
        view = wide[..., 1::2]
        view.copy_(t)
        return view
    if layout == "permuted":  # strides in the opposite order
        order = list(range(t.dim()))[::-1]
        return t.permute(order).contiguous().permute(order)
    return t.contiguous()


def rand(
    *shape: int, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous"
) -> Tensor:
    """Normal values, rounded to dtype, with some exact zeros."""
    t = torch.randn(shape, dtype=torch.float64)
    t[torch.rand(shape) < 0.1] = 0
    return laid_out(t.to(dtype).to(device), layout)


def agree(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Compare with a float64 expectation, within the rounding of ``dtype``."""
    assert actual.shape == expected.shape
    actual = actual.detach().cpu().double()
    if expected.numel() == 0:
        return
    bound = scale * TOLERANCE[dtype] * max(float(expected.abs().max()), 1e-30)
    assert torch.isfinite(actual).all(), "an element was not written or is not finite"
    error = float((actual - expected).abs().max())
    assert error <= bound, f"off by {error:.3g}, allowed {bound:.3g}"


def exact(t: Tensor) -> Tensor:
    """The same values in float64 on the CPU."""
    return t.detach().cpu().double()


def assert_same_bits(results, counts=(1, 2, 3)):
    """The tensors that a function returns are the same for any number of threads."""
    before, seen = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            seen.append(results())
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(u, v) for u, v in zip(seen[0], other, strict=True))
