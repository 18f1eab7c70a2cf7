"""Networks small enough to explain by hand, in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from tests.oracle import Relevance, Value


def dense(*rows: list[float], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias is not None)
    layer.weight.data = torch.tensor(rows, dtype=torch.float64)
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return layer.double()


def explain(model: nn.Module, *inputs: list, target: int | tuple | None = 0) -> list[Tensor]:
    """Explain one sample and look at the delta on the way."""
    xs = tuple(torch.tensor([x], dtype=torch.float64) for x in inputs)
    attributions, delta = RelativeLRP(model.eval()).attribute(
        xs, target=target, return_convergence_delta=True
    )
    assert delta.shape == (1,)
    assert delta.item() <= 1e-12
    return [a[0] for a in attributions]


def equals(actual: Tensor, *fractions: str) -> None:
    """Compare with fractions such as "3/7", in the tensor's reading order."""
    expected = torch.tensor([float(Fraction(f)) for f in fractions], dtype=torch.float64)
    torch.testing.assert_close(actual.flatten(), expected, rtol=1e-12, atol=1e-14)


class Net(nn.Module):
    """Named layers and a forward function over them."""

    def __init__(self, forward: object, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._forward = forward

    def forward(self, *args: Tensor) -> Tensor:
        return self._forward(self, *args)


# ---- linear sections -----------------------------------------------------------------------------


def test_two_layers() -> None:
    """h = (3, 0); q₂ = (6, 0) → r_h = (1, 0); q₁ = (1·1, 2·1) → (1/3, 2/3)."""
    model = nn.Sequential(dense([1, 1], [1, -1]), nn.ReLU(), dense([2, 3]))
    equals(explain(model, [1, 2])[0], "1/3", "2/3")


def test_one_layer_with_signs_and_a_bias() -> None:
    """q = (1·2, 2·(−3), 1·4) = (2, −6, 4), |q| = 12; the bias takes nothing."""
    model = dense([2, -3, 4], bias=[100.0])
    equals(explain(model, [1, 2, 1])[0], "1/6", "-1/2", "1/3")


def test_negative_relevance_travels() -> None:
    """Two hidden units with opposite votes: h = (1, 2), q₂ = (1·1, 2·(−1)) → r_h = (1/3, −2/3).

    q₁ = x ⊙ W₁ᵀ r_h with W₁ = [[1, 0], [1, 1]], x = (1, 1): (1/3 − 2/3, −2/3) = (−1/3, −2/3).
    """
    model = nn.Sequential(dense([1, 0], [1, 1]), nn.ReLU(), dense([1, -1]))
    equals(explain(model, [1, 1])[0], "-1/3", "-2/3")


def test_mass_is_carried_over_when_terms_cancel() -> None:
    """r_h = (1/2, −1/2) meets W₁ = [[2, 1], [1, 1]]: q = (1·1/2, 1·0) → mass 1 again: (1, 0)."""
    model = nn.Sequential(dense([2, 1], [1, 1]), nn.ReLU(), dense([2, -3]))
    equals(explain(model, [1, 1])[0], "1", "0")


def test_section_without_any_product_gives_zeros() -> None:
    """‖q‖₁ = 0: both hidden units are dead, only the bias speaks."""
    model = nn.Sequential(dense([-1, -1], [-1, -2]), nn.ReLU(), dense([1, 1], bias=[5.0]))
    equals(explain(model, [1, 1])[0], "0", "0")


def test_zero_input_gives_zeros() -> None:
    equals(explain(dense([1, 2], bias=[1.0]), [0, 0])[0], "0", "0")


def test_two_linears_are_one_section() -> None:
    """W₂W₁ = [[1, 2]]·[[1, 1], [1, −1]] = [[3, −1]]; q = (3, −2) → (3/5, −2/5)."""
    model = nn.Sequential(dense([1, 1], [1, -1]), dense([1, 2]))
    equals(explain(model, [1, 2])[0], "3/5", "-2/5")


def test_convolution() -> None:
    """x = (1, 2, 5), kernel (−1, 1): h = (1, 3), head (1, 1): r_h = (1/4, 3/4).

    q = x ⊙ convᵀ r_h = (1·(−1/4), 2·(1/4 − 3/4), 5·3/4) = (−1/4, −1, 15/4), |q| = 5.
    """
    conv = nn.Conv1d(1, 1, 2, bias=False).double()
    conv.weight.data = torch.tensor([[[-1.0, 1.0]]], dtype=torch.float64)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), dense([1, 1]))
    equals(explain(model, [[1, 2, 5]])[0], "-1/20", "-1/5", "3/4")


def test_batch_norm_folds_into_its_convolution() -> None:
    """conv = x₁ + x₂, norm = 3(z − 1) + 7: q ∝ (1, 2)·3, the shift takes nothing."""
    norm = nn.BatchNorm1d(1, eps=0.0).double()
    norm.running_mean.fill_(1)
    norm.weight.data.fill_(3)
    norm.bias.data.fill_(7)
    model = nn.Sequential(dense([1, 1]), norm, nn.ReLU())
    equals(explain(model, [1, 2])[0], "1/3", "2/3")


def test_average_pool() -> None:
    """AvgPool(2) composes with the head: J = (1, 1, −3, −3)/2, x = (1, 2, 3, 0)."""
    model = nn.Sequential(nn.AvgPool1d(2), nn.Flatten(), dense([1, -3]))
    equals(explain(model, [[1, 2, 3, 0]])[0], "1/12", "1/6", "-3/4", "0")


def test_average_pool_between_activations_is_a_section_of_its_own() -> None:
    """r = (1/2, 1/2) at the pool (h = (3/2, 3/2), equal weights); q = x/4 → x/Σx."""
    model = nn.Sequential(nn.AvgPool1d(2), nn.ReLU(), nn.Flatten(), dense([1, 1]))
    equals(explain(model, [[1, 2, 3, 0]])[0], "1/6", "1/3", "1/2", "0")


# ---- start ---------------------------------------------------------------------------------------


def test_start_is_one_not_the_logit() -> None:
    equals(explain(dense([200, 300]), [1, 1])[0], "2/5", "3/5")


def test_negative_logit_starts_at_one_too() -> None:
    equals(explain(dense([-2, -3]), [1, 1])[0], "-2/5", "-3/5")


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(-1)])
def test_start_after_softmax(last: nn.Module) -> None:
    """The softmax is passed through: the same as for the logit."""
    model = nn.Sequential(dense([1, 3], [2, 2]), last)
    equals(explain(model, [1, 1])[0], "1/4", "3/4")
    equals(explain(model, [1, 1], target=1)[0], "1/2", "1/2")


def test_one_scalar_per_sample_needs_no_target() -> None:
    model = Net(lambda self, x: self.layer(x).squeeze(1), layer=dense([1, 3]))
    equals(explain(model, [1, 1], target=None)[0], "1/4", "3/4")
    equals(explain(dense([1, 3]), [1, 1], target=None)[0], "1/4", "3/4")


# ---- pass-through --------------------------------------------------------------------------------


def test_batch_norm_alone_passes_relevance_through() -> None:
    """s = x + x' is a boundary, so the norm is alone: r passes whatever its scale, sign and shift.

    r at the ReLU is (1/5, 4/5) for h = ReLU(2·1 − 1, −1·(−2) + 0) = (1, 2) and head (1, 2);
    then half of each to the two equal operands.
    """
    norm = nn.BatchNorm1d(2, eps=0.0).double()
    norm.weight.data = torch.tensor([2.0, -1.0], dtype=torch.float64)
    norm.bias.data = torch.tensor([-1.0, 0.0], dtype=torch.float64)
    model = Net(
        lambda self, a, b: self.head(torch.relu(self.norm(a + b))), norm=norm, head=dense([1, 2])
    )
    a, b = explain(model, [0.5, -1], [0.5, -1])
    equals(a, "1/10", "2/5")
    equals(b, "1/10", "2/5")


def test_layer_norm_passes_relevance_through() -> None:
    """LayerNorm of (1, 3) is (−1, 1); head (1, 2): q = (−1, 2) → (−1/3, 2/3), untouched."""
    norm = nn.LayerNorm(2, eps=0.0).double()
    model = nn.Sequential(norm, dense([1, 2]))
    equals(explain(model, [1, 3])[0], "-1/3", "2/3")


def test_leaky_relu_and_shift() -> None:
    """LeakyReLU of (−2, 4) with slope 1/2 is (−1, 4), and shifted (0, 5).

    The shift belongs to the head's section, whose input is (−1, 4): q = (−1, 4) → (−1/5, 4/5).
    """
    model = Net(
        lambda self, x: self.head(nn.functional.leaky_relu(x, 0.5) + 1.0), head=dense([1, 1])
    )
    equals(explain(model, [-2, 4])[0], "-1/5", "4/5")


# ---- sums ----------------------------------------------------------------------------------------


def test_sum_of_opposite_signs() -> None:
    """a = 1, f = −3, s = −2: 1/4 and 3/4, where the signed rule would give −1/2 and 3/2."""
    model = Net(lambda self, a, f: a + f)
    a, f = explain(model, [1], [-3])
    equals(a, "1/4")
    equals(f, "3/4")


def test_difference() -> None:
    a, b = explain(Net(lambda self, a, b: a - b), [1], [3])
    equals(a, "1/4")
    equals(b, "3/4")


def test_sum_that_cancels_exactly() -> None:
    a, b = explain(Net(lambda self, a, b: a + b), [2], [-2])
    equals(a, "1/2")
    equals(b, "1/2")


def test_sum_of_zeros_is_shared_in_half() -> None:
    """0/0 is 1/2. The sum is the output, so the start is the 1 to be shared."""
    a, b = explain(Net(lambda self, a, b: a + b), [0, 3], [0, 1], target=0)
    equals(a, "1/2", "0")
    equals(b, "1/2", "0")
    a, b = explain(Net(lambda self, a, b: a + b), [0, 3], [0, 1], target=1)
    equals(a, "0", "3/4")
    equals(b, "0", "1/4")


def test_sum_of_three_is_two_sums() -> None:
    """(1 + 1) + 2: the last operand takes half, the first two share the rest."""
    a, b, c = explain(Net(lambda self, a, b, c: a + b + c), [1], [1], [2])
    equals(a, "1/4")
    equals(b, "1/4")
    equals(c, "1/2")


def test_broadcast_operand_receives_the_sum() -> None:
    """a = (1, 3) + b = (1): s = (2, 4), head (1, 1): r = (1/3, 2/3).

    r_a = (1/3·1/2, 2/3·3/4) = (1/6, 1/2), r_b = 1/6 + 1/6 = 1/3.
    """
    model = Net(lambda self, a, b: self.head(a + b), head=dense([1, 1]))
    a, b = explain(model, [1, 3], [1])
    equals(a, "1/6", "1/2")
    equals(b, "1/3")


def test_residual_block() -> None:
    """y = ReLU(x + f(x)), f(x) = (x₁ + x₂, −x₁), x = (1, 2): f = (3, −1), s = (4, 1), head (1, 1).

    r_s = (4/5, 1/5). Shares of the skip: 1/4 and 2/3 → (1/5, 2/15); of f: (3/5, 1/15), mass 2/3.
    f's section: q = x ⊙ Wᵀ r_f = (1·(3/5 − 1/15), 2·3/5) = (8/15, 18/15), |q| = 26/15
    → r = (8/26, 18/26)·2/3 = (8/39, 18/39). Sum: (1/5 + 8/39, 2/15 + 18/39) = (79/195, 116/195).
    """
    model = Net(
        lambda self, x: self.head(torch.relu(x + self.f(x))),
        f=dense([1, 1], [-1, 0]),
        head=dense([1, 1]),
    )
    equals(explain(model, [1, 2])[0], "79/195", "116/195")


def test_branches_may_cancel_where_they_meet() -> None:
    """y = x₁ + (−x₁ + x₂): the two votes for x₁ meet with opposite signs.

    x = (2, 4): branches 2 and 2, half each. Branch one: q = (2, 0) → (1/2, 0).
    Branch two: q = (−2, 4) → (−1/6, 1/3). Sum (1/3, 1/3): a third is lost, as it cancelled.
    """
    model = Net(lambda self, x: self.one(x) + self.two(x), one=dense([1, 0]), two=dense([-1, 1]))
    equals(explain(model, [2, 4])[0], "1/3", "1/3")


# ---- choices -------------------------------------------------------------------------------------


def test_max_pool() -> None:
    """Pools of (1, 4) and (3, 2), head (1, 1): r = (4/7, 3/7) to the winners."""
    model = nn.Sequential(nn.MaxPool1d(2), nn.Flatten(), dense([1, 1]))
    equals(explain(model, [[1, 4, 3, 2]])[0], "0", "4/7", "3/7", "0")


def test_max_pool_tie_goes_to_the_first() -> None:
    model = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), dense([1.0]))
    equals(explain(model, [[[5, 5], [5, 5]]])[0], "1", "0", "0", "0")
    equals(explain(model, [[[1, 5], [5, 5]]])[0], "0", "1", "0", "0")


def test_overlapping_max_pools_add_up() -> None:
    model = nn.Sequential(nn.MaxPool1d(2, stride=1), nn.Flatten(), dense([1, 1]))
    equals(explain(model, [[1, 4, 2]])[0], "0", "1", "0")


# ---- the rest ------------------------------------------------------------------------------------


def test_shared_value_adds_up() -> None:
    """h = ReLU(x) read by a and b; a = h₁ + h₂, b = h₂, x = (1, 2): s = 3 + 2.

    r_a = 3/5 → (1/5, 2/5); r_b = 2/5 → (0, 2/5).
    """

    def forward(self: Net, x: Tensor) -> Tensor:
        h = torch.relu(x)
        return self.a(h) + self.b(h)

    model = Net(forward, a=dense([1, 1]), b=dense([0, 1]))
    equals(explain(model, [1, 2])[0], "1/5", "4/5")


def test_gate_receives_nothing() -> None:
    """y = head(v · g) with g broadcast: v = (1, 2), head (1, 1) → (1/3, 2/3), g gets 0."""
    model = Net(lambda self, v, g: self.head(v * g), head=dense([1, 1]))
    v, g = explain(model, [1, 2], [7])
    equals(v, "1/3", "2/3")
    equals(g, "0")
    g, v = explain(Net(lambda self, g, v: self.head(g * v), head=dense([1, 1])), [7], [1, 2])
    equals(v, "1/3", "2/3")
    equals(g, "0")


def test_product_of_equal_shapes_is_halved() -> None:
    """v·w = (3, 2): r = (3/5, 2/5), half to each operand."""
    model = Net(lambda self, v, w: self.head(v * w), head=dense([1, 1]))
    v, w = explain(model, [1, 2], [3, 1])
    equals(v, "3/10", "1/5")
    equals(w, "3/10", "1/5")


def test_concatenation_follows_the_elements() -> None:
    model = Net(lambda self, a, b: self.head(torch.cat([a, b], 1)), head=dense([1, 1, -2]))
    a, b = explain(model, [1, 2], [3])
    equals(a, "1/9", "2/9")
    equals(b, "-2/3")


def test_slices_follow_the_elements() -> None:
    """h = (1, 2, 3) cut in h₁,₂ and h₃ and put together the other way round."""
    model = Net(
        lambda self, x: self.head(torch.cat([x[:, 2:], torch.relu(x[:, :2])], 1)),
        head=dense([1, -1, 1]),
    )
    equals(explain(model, [1, 2, 3])[0], "-1/6", "1/3", "1/2")


def test_constants_receive_nothing() -> None:
    """2x + c is a section with its head: J = (2·1, 2·3), x = (1, 1)."""
    model = Net(
        lambda self, x: self.head(2 * x + torch.tensor([5.0, -5.0]).double()), head=dense([1, 3])
    )
    equals(explain(model, [1, 1])[0], "1/4", "3/4")


def test_samples_do_not_influence_each_other() -> None:
    model = nn.Sequential(dense([1, 1], [1, -1]), nn.ReLU(), dense([2, 3], [1, -1]))
    x = torch.tensor([[1.0, 2], [2, 1], [0, 0]], dtype=torch.float64)
    attribution = RelativeLRP(model.eval()).attribute(x, target=[0, 1, 0])
    equals(attribution[0], "1/3", "2/3")
    # h = (3, 1): q = (3, −1) → (3/4, −1/4); q = (2·1/2, 1·1) → (1/2, 1/2)
    equals(attribution[1], "1/2", "1/2")
    equals(attribution[2], "0", "0")


# ---- and the oracle itself -----------------------------------------------------------------------


def row(*numbers: float) -> Value:
    return Value(torch.tensor([numbers], dtype=torch.float64))


def test_the_oracle_knows_the_two_layers() -> None:
    x = row(1, 2)
    h = x.linear(dense([1, 1], [1, -1]))
    y = h.act(torch.relu).linear(dense([2, 3]))
    relevance = Relevance(y, (0,))
    equals(relevance.at(x), "1/3", "2/3")
    equals(relevance.at(h), "1", "0")


def test_the_oracle_knows_the_inside_of_a_section() -> None:
    """h = (3, −1) inside [[1, 2]]·[[1, 1], [1, −1]]: h ⊙ (1, 2) = (3, −2)."""
    x = row(1, 2)
    h = x.linear(dense([1, 1], [1, -1]))
    relevance = Relevance(h.linear(dense([1, 2])), (0,))
    equals(relevance.at(x), "3/5", "-2/5")
    equals(relevance.at(h), "3/5", "-2/5")


def test_the_oracle_knows_the_residual_block() -> None:
    x = row(1, 2)
    s = x + x.linear(dense([1, 1], [-1, 0]))
    y = s.act(torch.relu).linear(dense([1, 1]))
    relevance = Relevance(y, (0,))
    equals(relevance.at(s), "4/5", "1/5")
    equals(relevance.at(x), "79/195", "116/195")


def test_the_oracle_knows_gates_pools_and_lone_norms() -> None:
    v, g = row(1, 4, 3, 2), row(5)
    scaled = v.linear(lambda t: -2 * t).act(lambda t: -t)
    y = (scaled * g).route(lambda t: torch.nn.functional.max_pool1d(t, 2))
    relevance = Relevance(y.linear(dense([1, 1])), (0,))
    equals(relevance.at(v), "0", "4/7", "3/7", "0")
    equals(relevance.at(g), "0")
