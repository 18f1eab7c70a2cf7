"""The memory that results of compiled kernels take from one explanation to the next."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from torch import Tensor, nn

from captum_rlrp import LayerRelativeLRP, RelativeLRP
from captum_rlrp.kernels import compiled

from .common import needs_extension

pytestmark = needs_extension
MEBIBYTE = 2**20


def filled(size: int, number: float) -> Tensor:
    """A result of so many bytes."""
    ones = torch.ones(1, size // 4)
    return compiled.multiply(ones, torch.full_like(ones, number))


def is_lent(value: Tensor) -> bool:
    """Whether the memory is not PyTorch's own, which may be made larger."""
    return not value.untyped_storage().resizable()


def test_a_result_takes_the_place_of_one_that_is_gone() -> None:
    with compiled.working_memory():
        first = filled(MEBIBYTE, 1)
        place = first.data_ptr()
        assert is_lent(first)
        other = filled(MEBIBYTE, 2)
        del first
        again = filled(MEBIBYTE, 3)
        assert again.data_ptr() == place
        assert (other == 2).all()
        assert (again == 3).all()


def test_results_never_overlap() -> None:
    dice = random.Random(0)
    alive: list[tuple[float, Tensor]] = []
    with compiled.working_memory() as memory:
        for number in range(400):
            if len(alive) > 12 or (alive and dice.random() < 0.4):
                expected, value = alive.pop(dice.randrange(len(alive)))
                assert (value == expected).all()
                del value
            alive.append((number, filled(4 * dice.randrange(1, 3 * MEBIBYTE), number)))
        assert all((value == expected).all() for expected, value in alive)
        del alive[:]
        # All of it is one again: what is larger than any fits.
        taken = memory.size()
        largest = filled(64 * MEBIBYTE, 1)
        assert memory.size() == taken
        assert (largest == 1).all()


def test_more_than_a_block_at_once() -> None:
    with compiled.working_memory() as memory:
        values = [filled(70 * MEBIBYTE, i) for i in range(3)]
        assert memory.size() >= 210 * MEBIBYTE
        assert all((value == i).all() for i, value in enumerate(values))


def test_a_result_outlives_its_memory() -> None:
    with compiled.working_memory():
        value = filled(MEBIBYTE, 7)
    filled(MEBIBYTE, 8)
    assert (value == 7).all()


def test_what_is_not_used_any_more_is_given_back() -> None:
    kept = compiled.working_memory()
    with kept as memory:
        values = [filled(60 * MEBIBYTE, i) for i in range(3)]
        del values
    assert memory.size() >= 180 * MEBIBYTE  # for the next time
    with kept:
        filled(MEBIBYTE, 1)
    assert memory.size() <= 64 * MEBIBYTE
    with kept:
        pass
    assert memory.size() == 0


def test_the_last_to_leave_gives_back() -> None:
    kept = compiled.working_memory()
    with kept as memory:
        filled(MEBIBYTE, 1)
        with kept:
            pass
        with kept:
            pass
        assert memory.size() > 0
    assert memory.size() > 0
    with kept:
        pass
    assert memory.size() == 0


def test_little_is_left_to_pytorch() -> None:
    with compiled.working_memory() as memory:
        assert not is_lent(filled(4096, 1))
        assert memory.size() == 0


def test_outside_it_and_in_another_thread_there_is_none() -> None:
    found: list[bool] = []

    def look() -> None:
        found.append(is_lent(filled(MEBIBYTE, 1)))

    outer, inner = compiled.working_memory(), compiled.working_memory()
    with outer as memory:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        with inner:
            filled(MEBIBYTE, 1)
        assert memory.size() == 0
        look()
        with pytest.raises(KeyError), inner:
            raise KeyError
        filled(MEBIBYTE, 1)
        assert memory.size() > 0
    look()
    assert found == [False, True, False]


def test_explanations_are_the_users_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    x = torch.randn(4, 32, 64, 64)
    method, layer = RelativeLRP(model), LayerRelativeLRP(model, model[0])
    for explain in (method.attribute, layer.attribute):
        for batch in (x, x[:1]):
            found = explain(batch, (1, 5, 7))
            assert not is_lent(found)
    taken = method._engine._memory.size()
    for size in (3, 1):  # the last portion is smaller
        method.attribute(x, (1, 5, 7), internal_batch_size=size)
        assert method._engine._memory.size() == taken > 0

    first = method.attribute(x, (1, 5, 7))
    before = first.clone()
    method.attribute(torch.randn_like(x), (2, 5, 7))
    assert torch.equal(first, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_pytorch_computes_goes_there_too(dtype: torch.dtype, layout: torch.memory_format):
    x, y = (torch.randn(2, 64, 40, 40).to(dtype, memory_format=layout) for _ in range(2))
    with compiled.working_memory():
        size, total = compiled.magnitude(x), compiled.add([x, y, x])
        assert is_lent(size)
        assert is_lent(total)
        assert size.stride() == total.stride() == x.stride()
        torch.testing.assert_close(size, x.abs(), rtol=0, atol=0)
        torch.testing.assert_close(total, x + y + x, rtol=0, atol=0)
        assert not is_lent(compiled.magnitude(x[:1, :1]))  # small
        turned = compiled.add([x.mT[:, ::2], y.mT[:, ::2]])
        torch.testing.assert_close(turned, (x + y).mT[:, ::2], rtol=0, atol=0)


class Elementwise(nn.Module):
    """What the forward computes by itself: an activation in front of a batch norm, sums, gates."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm, self.bare = nn.BatchNorm2d(16), nn.BatchNorm2d(16, affine=False)
        self.head = nn.Linear(16, 4)
        for norm in (self.norm, self.bare):
            norm.running_mean, norm.running_var = torch.randn(16), torch.rand(16) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = self.bare(self.norm(nn.functional.gelu(self.conv(x))))
        h = torch.add(h, nn.functional.silu(h), alpha=0.5) - h * h.sigmoid()
        return self.head((h / 2 + h.tanh()).mean((2, 3)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_forward_is_the_same(layout: torch.memory_format) -> None:
    model = Elementwise().eval()
    x = torch.randn(4, 3, 40, 40).to(memory_format=layout)
    result = RelativeLRP(model, backend="compiled").attribute(x, target=1)
    wide = RelativeLRP(model.double(), backend="reference").attribute(x.double(), target=1)
    torch.testing.assert_close(result, wide.float(), rtol=1e-4, atol=1e-4 * wide.abs().max().item())
