"""Rules for operators of one's own, as docs/adding-a-rule.md tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import (
    LayerRelativeLRP,
    RelativeLRP,
    UnsupportedOperationError,
    register_rule,
    rules,
)
from captum_rlrp.rules import Call, LinearRule, Rule
from captum_rlrp.rules.passthrough import PassThrough
from tests.oracle import Value, agrees, explain, frozen, make, relative_error
from tests.paths import all_paths

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Registrations hold for the process: every test starts without."""
    before = dict(rules._CUSTOM)
    yield
    rules._CUSTOM.clear()
    rules._CUSTOM.update(before)


# ---- three operators -------------------------------------------------------------------------


@torch.library.custom_op("rlrp_tests::bent", mutates_args=())
def bent(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, x, slope * x)


@bent.register_fake
def _(x: Tensor, slope: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("rlrp_tests::smooth", mutates_args=())
def smooth(x: Tensor, kernel: Tensor, offset: float) -> Tensor:
    """A filter along the last axis, plus a constant."""
    return F.conv1d(x, kernel.expand(x.shape[1], 1, -1), padding=1, groups=x.shape[1]) + offset


@smooth.register_fake
def _(x: Tensor, kernel: Tensor, offset: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("rlrp_tests::larger_row", mutates_args=())
def larger_row(a: Tensor, b: Tensor) -> Tensor:
    """Of two samples' rows the one of larger norm."""
    norms = a.norm(dim=-1, keepdim=True) > b.norm(dim=-1, keepdim=True)
    return torch.where(norms, a, b)


@larger_row.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(a)


class Smooth(LinearRule):
    """y = k ∗ x + c, a spatial map: the kernel mirrored is the transpose."""

    constants = ("kernel",)
    shift: ClassVar = {"offset": 0.0}

    def transpose(self, run, call, g, *, absolute=False):
        kernel = run.value(call.args["kernel"]).to(g.dtype).flip(-1)
        return smooth(g, kernel.abs() if absolute else kernel, 0.0)


class LargerRow(Rule):
    """Relevance follows the row that was chosen."""

    def needs(self, call):
        return call.active

    def propagate(self, run, call, r):
        a, b = (run.value(node) for node in call.active)
        chosen = a.norm(dim=-1, keepdim=True) > b.norm(dim=-1, keepdim=True)
        return r * chosen, r * ~chosen


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 3), nn.Conv1d(2, 4, 3)
        self.kernel = nn.Parameter(torch.tensor([0.2, -0.5, 0.4]))
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = bent(smooth(self.first(x), self.kernel, 0.3), 0.1)
        return self.last(larger_row(a, torch.tanh(self.second(x))).flatten(1))

    def twin(self, x: Value) -> Value:
        filtered = lambda t: F.conv1d(  # noqa: E731
            t, self.kernel.expand(4, 1, -1), padding=1, groups=4
        ) + 0.3  # fmt: skip
        a = x.spatial(self.first).spatial(filtered).act(lambda t: torch.where(t > 0, t, 0.1 * t))
        b = x.spatial(self.second).act(torch.tanh)

        def larger(s: Tensor, t: Tensor) -> Tensor:
            norms = s.detach().norm(dim=-1, keepdim=True) > t.detach().norm(dim=-1, keepdim=True)
            return torch.where(norms, s, t)

        return make("route", larger, a, b).move(lambda t: t.flatten(1)).dense(self.last)


def test_three_kinds_of_rules_against_the_oracle() -> None:
    register_rule(bent, PassThrough("x"))
    register_rule(torch.ops.rlrp_tests.smooth, Smooth())  # all overloads
    register_rule(torch.ops.rlrp_tests.larger_row.default, LargerRow())  # one of them
    model = frozen(Net())
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    agrees(model.twin, model, x)
    (expected,) = explain(model.twin, (x,), [0, 2, 1])
    (attribution,) = all_paths(model, x, [0, 2, 1])
    assert relative_error(attribution, expected) <= 1e-10


def test_without_rules_all_are_listed() -> None:
    with pytest.raises(UnsupportedOperationError) as caught:
        RelativeLRP(frozen(Net())).attribute(torch.randn(1, 2, 8, dtype=torch.float64), 0)
    for name in ("bent", "smooth", "larger_row", "register_rule"):
        assert name in str(caught.value)


def test_registering_after_the_error() -> None:
    explainer = RelativeLRP(frozen(Net()))
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedOperationError):
        explainer.attribute(x, 0)
    register_rule(bent, PassThrough("x"))
    register_rule(smooth, Smooth())
    register_rule(larger_row, LargerRow())
    assert explainer.attribute(x, 0).abs().sum() > 0


def test_a_rule_in_place_of_a_built_in_one() -> None:
    class Blocked(PassThrough):
        """Nothing goes through."""

        def propagate(self, run, call, r):
            return (r * 0,)

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).eval()
    x = torch.randn(2, 4)
    assert RelativeLRP(model).attribute(x, 0).abs().sum() > 0
    register_rule(torch.ops.aten.tanh, Blocked("self"))
    assert RelativeLRP(model).attribute(x, 0).abs().sum() == 0


def test_a_rule_may_decline() -> None:
    class Sometimes(PassThrough):
        def select(self, call: Call) -> Rule | None:
            return super().select(call) if call.args["slope"] == 0 else None

    class One(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x: Tensor) -> Tensor:
            return bent(x, self.slope)

    register_rule(bent, Sometimes("x"))
    x = torch.randn(2, 4)
    one = torch.tensor([[0.0, 1, 0, 0]] * 2)
    torch.testing.assert_close(RelativeLRP(One(0.0)).attribute(x, 1), one)
    with pytest.raises(UnsupportedOperationError, match="bent"):
        RelativeLRP(One(0.1)).attribute(x, 1)


def test_relevance_at_a_layer_before_a_custom_op() -> None:
    register_rule(bent, PassThrough("x"))
    register_rule(smooth, Smooth())
    register_rule(larger_row, LargerRow())
    model = frozen(Net())
    attribution = LayerRelativeLRP(model, model.first).attribute(
        torch.randn(2, 2, 8, dtype=torch.float64), 1
    )
    assert attribution.shape == (2, 4, 6)
    assert attribution.abs().sum() > 0


@pytest.mark.parametrize(
    ("op", "rule"), [(torch.relu, PassThrough()), (bent, PassThrough), ("bent", PassThrough())]
)
def test_registering_what_is_none(op: object, rule: Callable) -> None:
    with pytest.raises(TypeError):
        register_rule(op, rule)
