"""Networks small enough to explain by hand, in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from tests.oracle import Attribution, Value
from tests.paths import all_paths


def dense(*rows: list[float], bias: list[float] | None = None) -> nn.Linear:
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias is not None)
    layer.weight.data = torch.tensor(rows, dtype=torch.float64)
    if bias is not None:
        layer.bias.data = torch.tensor(bias, dtype=torch.float64)
    return layer.double()


def explain(model: nn.Module, *inputs: list, target: int | tuple | None = 0) -> list[Tensor]:
    """Explain one sample along every path."""
    xs = tuple(torch.tensor([x], dtype=torch.float64) for x in inputs)
    return [a[0] for a in all_paths(model.eval(), xs, target, tolerance=1e-12, delta=1e-12)]


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


# ---- dense maps --------------------------------------------------------------------------------


def test_two_layers() -> None:
    """h = (3, 0); q = (6, 0) → r_h = (1, 0); c = (1, 2), D = 3 → (1/3, 2/3)."""
    model = nn.Sequential(dense([1, 1], [1, -1]), nn.ReLU(), dense([2, 3]))
    equals(explain(model, [1, 2])[0], "1/3", "2/3")


def test_two_layers_with_an_opponent() -> None:
    """h = (1, 0), r_h = (1, 0); c = (3, −2), D = 5."""
    model = nn.Sequential(dense([3, -1], [1, -1]), nn.ReLU(), dense([2, 3]))
    equals(explain(model, [1, 2])[0], "3/5", "-2/5")


def test_one_layer_with_signs_and_a_bias() -> None:
    """q = (1·2, 2·(−3), 1·4) = (2, −6, 4), |q| = 12; the bias takes nothing."""
    model = dense([2, -3, 4], bias=[100.0])
    equals(explain(model, [1, 2, 1])[0], "1/6", "-1/2", "1/3")


def test_negative_relevance_travels() -> None:
    """Two hidden units with opposite votes: h = (1, 2), q = (1·1, 2·(−1)) → r_h = (1/3, −2/3).

    c₁ = (1, 0), D₁ = 1; c₂ = (1, 1), D₂ = 2: (1/3 − 2/3·1/2, −2/3·1/2) = (0, −1/3).
    """
    model = nn.Sequential(dense([1, 0], [1, 1]), nn.ReLU(), dense([1, -1]))
    equals(explain(model, [1, 1])[0], "0", "-1/3")


def test_each_output_shares_by_its_own_contributions() -> None:
    """h = (3, 2), q = (6, −6) → r_h = (1/2, −1/2); c₁ = (2, 1)/3, c₂ = (1, 1)/2.

    r_x = (1/2·2/3 − 1/2·1/2, 1/2·1/3 − 1/2·1/2) = (1/12, −1/12).
    """
    model = nn.Sequential(dense([2, 1], [1, 1]), nn.ReLU(), dense([2, -3]))
    equals(explain(model, [1, 1])[0], "1/12", "-1/12")


def test_the_scale_of_a_hidden_neuron_changes_nothing() -> None:
    """As above, the second neuron ten times as large and read with a tenth."""
    model = nn.Sequential(dense([2, 1], [10, 10]), nn.ReLU(), dense([2, -0.3]))
    equals(explain(model, [1, 1])[0], "1/12", "-1/12")


def test_what_stands_on_the_bias_alone_is_dropped() -> None:
    """All hidden units are dead; then one that its bias keeps alive, h = (1, 5) and q = (1, 5).

    r_h = (1/6, 5/6); the first has c = (1, 0), the second no contribution at all: its 5/6 go.
    """
    model = nn.Sequential(dense([-1, -1], [-1, -2]), nn.ReLU(), dense([1, 1], bias=[5.0]))
    equals(explain(model, [1, 1])[0], "0", "0")
    model = nn.Sequential(dense([1, 0], [0, 0], bias=[0, 5]), nn.ReLU(), dense([1, 1]))
    equals(explain(model, [1, 1])[0], "1/6", "0")


def test_a_bias_takes_no_part_in_the_shares() -> None:
    """h = 1 + 2 + 7, but c = (1, 2), D = 3."""
    model = nn.Sequential(dense([1, 2], bias=[7.0]), nn.ReLU(), dense([4.0]))
    equals(explain(model, [1, 1])[0], "1/3", "2/3")


def test_zero_input_gives_zeros() -> None:
    equals(explain(dense([1, 2], bias=[1.0]), [0, 0])[0], "0", "0")


def test_one_input_takes_all_whatever_its_weight() -> None:
    """tanh behind W = (−3, 2)ᵀ: h < 0 and > 0; r_h = q/‖q‖ sums up in the one input."""
    model = nn.Sequential(dense([-3], [2]), nn.Hardtanh(-9, 9), dense([1, 1]))
    equals(explain(model, [1])[0], "-1/5")  # r_h = (−3/5, 2/5)


# ---- spatial maps --------------------------------------------------------------------------------


def conv(*kernel: float) -> nn.Conv1d:
    layer = nn.Conv1d(1, 1, len(kernel), bias=False).double()
    layer.weight.data = torch.tensor([[kernel]], dtype=torch.float64)
    return layer


def test_convolution() -> None:
    """x = (1, 2, 5), kernel (−1, 1): h = (1, 3), head (1, 1): r_h = (1/4, 3/4).

    |c| = (1, 2)/3 and (2, 5)/7: (1/12, 1/6 + 3/14, 15/28) = (1/12, 8/21, 15/28).
    """
    model = nn.Sequential(conv(-1, 1), nn.ReLU(), nn.Flatten(), dense([1, 1]))
    equals(explain(model, [[1, 2, 5]])[0], "1/12", "8/21", "15/28")


def test_the_same_map_is_signed_where_it_is_dense() -> None:
    """c = (−1, 2)/3 and (−2, 5)/7: (−1/12, 1/6 − 3/14, 15/28) = (−1/12, −1/21, 15/28)."""
    model = nn.Sequential(dense([-1, 1, 0], [0, -1, 1]), nn.ReLU(), dense([1, 1]))
    equals(explain(model, [1, 2, 5])[0], "-1/12", "-1/21", "15/28")


def test_signs_come_from_the_layers_above() -> None:
    """r_h = (1/4, −3/4): (1/12, 1/6 − 3/14, −15/28)."""
    model = nn.Sequential(conv(-1, 1), nn.ReLU(), nn.Flatten(), dense([1, -1]))
    equals(explain(model, [[1, 2, 5]])[0], "1/12", "-1/21", "-15/28")


def test_batch_norm_folds_into_its_map() -> None:
    """z = x₁ + 2x₂, norm = −3(z − 1) + 70: a scale and a shift of the output change no share."""
    norm = nn.BatchNorm1d(1, eps=0.0).double()
    norm.running_mean.fill_(1)
    norm.weight.data.fill_(-3)
    norm.bias.data.fill_(70)
    model = nn.Sequential(dense([1, 2]), norm, nn.ReLU(), dense([1.0]))
    equals(explain(model, [1, 1])[0], "1/3", "2/3")


def test_average_pool() -> None:
    """Pools of (1, −2) and (3, 0): h = |(−1/2, 3/2)|, head (1, 1): r = (1/4, 3/4).

    |c| = (1, 2)/3 and (3, 0)/3.
    """
    model = nn.Sequential(
        nn.AvgPool1d(2), Net(lambda self, x: x.abs()), nn.Flatten(), dense([1, 1])
    )
    equals(explain(model, [[1, -2, 3, 0]])[0], "1/12", "1/6", "3/4", "0")


def test_global_average_over_a_grid() -> None:
    """One number from four, |c| = (1, 2, 3, 4)/10."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Flatten(), dense([2.0]))
    equals(explain(model, [[[1, -2], [3, 4]]])[0], "1/10", "1/5", "3/10", "2/5")


def test_transposed_convolution() -> None:
    """Kernel (1, −1), stride 1: y = (1, 2 − 1, −2) = (1, 1, −2); squared and summed: (1, 1, 4).

    r_y = (1/6, 1/6, 2/3); the middle one has |c| = (1, 2)/3: (1/6 + 1/18, 1/9 + 2/3).
    """
    up = nn.ConvTranspose1d(1, 1, 2, bias=False).double()
    up.weight.data = torch.tensor([[[1.0, -1.0]]], dtype=torch.float64)
    model = nn.Sequential(up, Net(lambda self, x: x**2), nn.Flatten(), dense([1, 1, 1]))
    equals(explain(model, [[1, 2]])[0], "2/9", "7/9")


# ---- the final section ---------------------------------------------------------------------------


def test_two_linears_are_one_section() -> None:
    """W₂W₁ = [[1, 2]]·[[1, 1], [1, −1]] = [[3, −1]]; q = (3, −2) → (3/5, −2/5)."""
    model = nn.Sequential(dense([1, 1], [1, -1]), dense([1, 2]))
    equals(explain(model, [1, 2])[0], "3/5", "-2/5")


def test_pool_and_head() -> None:
    """AvgPool(2) composes with the head: J = (1, 1, −3, −3)/2, x = (1, 2, 3, 0)."""
    model = nn.Sequential(nn.AvgPool1d(2), nn.Flatten(), dense([1, -3]))
    equals(explain(model, [[1, 2, 3, 0]])[0], "1/12", "1/6", "-3/4", "0")


def test_a_pool_in_front_of_weights_keeps_its_own_law() -> None:
    """x = ((3, −1), (2, 4)) pooled to (1, 3), head (1, −1): r = (1/4, −3/4).

    |c| = (3, 1)/4 and (2, 4)/6. As one map with the head −1 would have spoken for the other side.
    """
    model = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), dense([1, -1]))
    equals(explain(model, [[3, -1], [2, 4]])[0], "3/16", "1/16", "-1/4", "-1/2")


@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(1)])
def test_convolution_pool_and_head_are_signed(last: nn.Module) -> None:
    """conv (−1, 2), mean over both windows, two classes by (1) and (−2): one weight each.

    J = (−1, 2 − 1, 2)/2, x = (2, 1, 3): q ∝ (−2, 1, 6); the second class turns all signs round.
    """
    model = nn.Sequential(
        conv(-1, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), dense([1], [-2]), last
    )
    equals(explain(model, [[2, 1, 3]])[0], "-2/9", "1/9", "2/3")
    equals(explain(model, [[2, 1, 3]], target=1)[0], "2/9", "-1/9", "-2/3")


def test_the_final_section_begins_behind_the_last_activation() -> None:
    """ReLU of (2, −1, 3) = (2, 0, 3) is its input: q ∝ (−2, 0, 6) → (−1/4, 0, 3/4)."""
    model = nn.Sequential(
        nn.ReLU(), conv(-1, 2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), dense([1.0])
    )
    equals(explain(model, [[2, -1, 3]])[0], "-1/4", "0", "3/4")


def test_without_a_linear_map_at_the_end_the_law_holds_everywhere() -> None:
    """The output is a ReLU: the convolution's window (−1·2, 2·3) shares by size."""
    model = nn.Sequential(conv(-1, 2), nn.Flatten(), nn.ReLU())
    equals(explain(model, [[2, 3]])[0], "1/4", "3/4")


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

    r_s = (4/5, 1/5). Shares of the skip: 1/4 and 2/3 → (1/5, 2/15); of f: (3/5, 1/15).
    f: c₁ = (1, 2)/3, c₂ = (−1, 0)/1 → (3/5·1/3 − 1/15, 3/5·2/3) = (2/15, 2/5).
    Sum: (1/5 + 2/15, 2/15 + 2/5) = (1/3, 8/15).
    """
    model = Net(
        lambda self, x: self.head(torch.relu(x + self.f(x))),
        f=dense([1, 1], [-1, 0]),
        head=dense([1, 1]),
    )
    equals(explain(model, [1, 2])[0], "1/3", "8/15")


def test_branches_may_cancel_where_they_meet() -> None:
    """y = x₁ + (−x₁ + x₂): the two votes for x₁ meet with opposite signs.

    x = (2, 4): branches 2 and 2, half each. Branch one: c = (2, 0)/2 → (1/2, 0).
    Branch two: c = (−2, 4)/6 → (−1/6, 1/3). Sum (1/3, 1/3): a third is lost, as it cancelled.
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


def test_maximum_of_two() -> None:
    """The larger one takes all, in a tie each takes half."""
    model = Net(lambda self, a, b: self.head(torch.maximum(a, b)), head=dense([1, 1, 2]))
    a, b = explain(model, [1, 4, 2], [3, 2, 2])  # maximum (3, 4, 2), q = (3, 4, 4)
    equals(a, "0", "4/11", "2/11")
    equals(b, "3/11", "0", "2/11")


# ---- attention and products --------------------------------------------------------------------


def test_attention_weights_are_a_gate() -> None:
    """Weights (1/4, 3/4) and (1, 0); V = (2, −2): y = (−1, 2), head (1, 1): r = (−1/3, 2/3).

    c₁ = (1/2, −3/2), D = 2: (1/4, −3/4); c₂ = (2, 0): (1, 0).
    r_V = (−1/12 + 2/3, 1/4) = (7/12, 1/4).
    """
    scores = torch.tensor([[[0.0, 3.0], [0.0, float("-inf")]]], dtype=torch.float64)
    scores[0, 0, 1] = torch.tensor(3.0, dtype=torch.float64).log()
    model = Net(
        lambda self, q, v: self.head(((q + scores).softmax(-1) @ v).flatten(1)), head=dense([1, 1])
    )
    q, v = explain(model, [[0, 0], [0, 0]], [[2], [-2]])
    equals(q, "0", "0", "0", "0")
    equals(v, "7/12", "1/4")


def test_fused_attention() -> None:
    """q = k = 0: weights 1/2 each, V = (1, 3): c = (1/2, 3/2) for both outputs."""
    model = Net(
        lambda self, q, k, v: self.head(
            nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)
        ),
        head=dense([1, 1]),
    )
    q, k, v = explain(model, [[0], [0]], [[0], [0]], [[1], [3]])
    equals(q, "0", "0")
    equals(k, "0", "0")
    equals(v, "1/4", "3/4")


def test_matrix_product_of_two_activations() -> None:
    """A = (1, −2), B = (3, 1)ᵀ: y = 1, half each, and both have c = (3, −2), D = 5."""
    model = Net(lambda self, a, b: (a @ b).flatten(1))
    a, b = explain(model, [[1, -2]], [[3], [1]])
    equals(a, "3/10", "-1/5")
    equals(b, "3/10", "-1/5")


def test_square_of_a_matrix() -> None:
    """h = [[1, 2], [0, 1]] twice: of h² only element (0, 1) = 1·2 + 2·1 is asked for.

    Left: r/2·(2, 2)/4 to the first row; right: r/2·(2, 2)/4 to the second column.
    """
    model = Net(lambda self, h: (h @ h).flatten(1))
    equals(explain(model, [[1, 2], [0, 1]], target=1)[0], "1/4", "1/2", "0", "1/4")


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
    # h = (3, 1): q = (3, −1) → (3/4, −1/4); c = (2, 1)/3 and (2, −1)/3 → (1/3, 1/3)
    equals(attribution[1], "1/3", "1/3")
    equals(attribution[2], "0", "0")


# ---- and the oracle itself -----------------------------------------------------------------------


def row(*numbers: float) -> Value:
    return Value(torch.tensor([numbers], dtype=torch.float64))


def test_the_oracle_knows_the_two_layers() -> None:
    x = row(1, 2)
    h = x.dense(dense([3, -1], [1, -1]))
    y = h.act(torch.relu).dense(dense([2, 3]))
    relevance = Attribution(y, (0,))
    equals(relevance.at(x), "3/5", "-2/5")
    equals(relevance.at(h), "1", "0")


def test_the_oracle_knows_spatial_maps() -> None:
    x = Value(torch.tensor([[[1.0, 2, 5]]], dtype=torch.float64))
    y = x.spatial(conv(-1, 1)).act(torch.relu).move(lambda t: t.flatten(1)).dense(dense([1, -1]))
    equals(Attribution(y, (0,)).at(x), "1/12", "-1/21", "-15/28")


def test_the_oracle_knows_the_inside_of_the_final_section() -> None:
    """h = (3, −1) inside [[1, 2]]·[[1, 1], [1, −1]]: h ⊙ (1, 2) = (3, −2)."""
    x = row(1, 2)
    h = x.dense(dense([1, 1], [1, -1]))
    relevance = Attribution(h.dense(dense([1, 2])), (0,))
    equals(relevance.at(x), "3/5", "-2/5")
    equals(relevance.at(h), "3/5", "-2/5")


def test_the_oracle_knows_the_residual_block() -> None:
    x = row(1, 2)
    s = x + x.dense(dense([1, 1], [-1, 0]))
    y = s.act(torch.relu).dense(dense([1, 1]))
    relevance = Attribution(y, (0,))
    equals(relevance.at(s), "4/5", "1/5")
    equals(relevance.at(x), "1/3", "8/15")


def test_the_oracle_knows_gates_pools_and_lone_norms() -> None:
    v, g = row(1, 4, 3, 2), row(5)
    scaled = v.move(lambda t: -2 * t).act(lambda t: -t)
    y = (scaled * g).route(lambda t: torch.nn.functional.max_pool1d(t, 2))
    relevance = Attribution(y.dense(dense([1, 1])), (0,))
    equals(relevance.at(v), "0", "4/7", "3/7", "0")
    equals(relevance.at(g), "0")
