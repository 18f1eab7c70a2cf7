"""Bad input gives an error that says what, where and what to do; the model stays as it was."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_rlrp import (
    CaptureError,
    LayerRelativeLRP,
    NonFiniteError,
    RelativeLRP,
    RelativeLRPError,
    TrainingModeError,
    UnsupportedOperationError,
)

from .small import of


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(x)


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)).eval()


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    "error", [CaptureError, NonFiniteError, TrainingModeError, UnsupportedOperationError]
)
def test_one_family(error: type[Exception]) -> None:
    assert issubclass(error, RelativeLRPError)
    assert issubclass(RelativeLRPError, ValueError)


# ---- unsupported operations ----------------------------------------------------------------------


def test_unsupported_operations_are_all_listed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), Wave(), nn.Linear(4, 4), Bessel())

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(UnsupportedOperationError) as caught:
        RelativeLRP(Model().eval()).attribute(X, target=0)
    message = str(caught.value)
    for word in ("airy_ai", "bessel_j0", "body.1", "body.3", "test_errors.py"):
        assert word in message
    lines = [int(n) for n in re.findall(r"test_errors\.py[^0-9]{1,9}(\d+)", message)]
    source = Path(__file__).read_text().splitlines()
    named = {source[n - 1].strip() for n in lines}
    assert {"return torch.special.airy_ai(x)", "return torch.special.bessel_j0(x)"} <= named


def test_unsupported_operations_are_found_before_anything_is_computed() -> None:
    """The values would overflow, but the operation is reported first."""
    model = nn.Sequential(nn.Linear(4, 4), Bessel()).eval()
    model[0].weight.data.fill_(float("inf"))
    with pytest.raises(UnsupportedOperationError):
        RelativeLRP(model).attribute(X, target=0)


def test_unsupported_operations_on_constants_are_no_matter() -> None:
    """What does not depend on the input carries no relevance."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 3) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.cumprod(self.weight, 1)

    assert RelativeLRP(Model().eval()).attribute(X, target=0).abs().sum(1).allclose(torch.ones(2))


def test_unsupported_operations_that_reach_no_output_are_no_matter() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            torch.cumprod(x, 1)
            return self.layer(x)

    assert RelativeLRP(Model().eval()).attribute(X, target=0).isfinite().all()


def test_never_a_silent_gradient() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(torch.sort(Straight.apply(x), dim=1).values)

    with pytest.raises(RelativeLRPError):
        RelativeLRP(Model().eval()).attribute(X, target=0)


# ---- training mode -------------------------------------------------------------------------------


def test_training_mode_with_batch_norm() -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    model.add_module("head", nn.Linear(4, 3))
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(TrainingModeError, match=r"stem\.1") as caught:
        RelativeLRP(model).attribute(X, target=0)
    assert ".eval()" in str(caught.value)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert RelativeLRP(model.eval()).attribute(X, target=0).shape == X.shape


def test_only_the_batch_norm_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].train()
    with pytest.raises(TrainingModeError, match=r"eval\(\)"):
        RelativeLRP(model).attribute(X, target=0)


def test_batch_norm_set_to_training_mode_between_two_calls() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    rlrp = RelativeLRP(model)
    rlrp.attribute(X, target=0)
    model.train()
    with pytest.raises(TrainingModeError):
        rlrp.attribute(X, target=0)
    model.eval()
    rlrp.attribute(X, target=0)


# ---- inputs --------------------------------------------------------------------------------------


def test_integer_inputs_are_explained_where_they_are_embedded() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)).eval()
    tokens = torch.tensor([[1, 2, 3]])
    each = RelativeLRP(model).attribute(tokens, target=0)
    attribution = LayerRelativeLRP(model, model[0]).attribute(tokens, target=0)
    assert attribution.shape == (1, 3, 4)
    torch.testing.assert_close(each, attribution.sum(2))
    assert attribution.abs().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.complex64])
def test_other_inputs_without_gradients(dtype: torch.dtype) -> None:
    with pytest.raises(RelativeLRPError):
        RelativeLRP(net()).attribute(X.to(dtype), target=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_input(bad: float) -> None:
    x = X.clone()
    x[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"(?i)input"):
        RelativeLRP(net()).attribute(x, target=0)


def test_non_finite_input_names_which_of_several() -> None:
    class Model(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    bad = X.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"(?i)input.*1|input.*b"):
        RelativeLRP(Model().eval()).attribute((X, bad), target=0)


def test_non_finite_values_name_the_first_step() -> None:
    class Explode(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(1000 * x)

    model = nn.Sequential()
    model.add_module("quiet", nn.Linear(4, 4))
    model.add_module("bang", Explode())
    model.add_module("after", nn.Linear(4, 3))
    model.quiet.weight.data.fill_(1)
    with pytest.raises(NonFiniteError, match="bang") as caught:
        RelativeLRP(model.eval()).attribute(X, target=0)
    assert "after" not in str(caught.value)


def test_non_finite_parameter() -> None:
    model = net()
    model[2].weight.data[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="2"):
        RelativeLRP(model).attribute(X, target=0)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Conv2d(3, 3, 3, padding=1)
        self.side = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.branch(x) + self.side(x)).flatten(1))


def saturating(first: nn.Module, *then: nn.Module) -> nn.Sequential:
    width = 48 if isinstance(first, nn.Conv2d) else 5
    return nn.Sequential(first, *then, nn.Flatten(), nn.Linear(width, 2)).eval()


HIDING = {
    "linear-sigmoid": (lambda: saturating(nn.Linear(4, 5), nn.Sigmoid()), "0.weight", "'0'"),
    "linear-relu": (lambda: saturating(nn.Linear(4, 5), nn.ReLU()), "0.weight", "'0'"),
    "linear-clamp": (lambda: saturating(nn.Linear(4, 5), nn.Hardtanh()), "0.weight", "'0'"),
    "conv-relu": (lambda: saturating(nn.Conv2d(3, 3, 1), nn.ReLU()), "0.weight", "'0'"),
    "conv-relu6": (lambda: saturating(nn.Conv2d(3, 3, 1), nn.ReLU6()), "0.weight", "'0'"),
    "conv-sigmoid": (lambda: saturating(nn.Conv2d(3, 3, 1), nn.Sigmoid()), "0.bias", "'0'"),
    "conv-bn-relu": (
        lambda: saturating(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()),
        "1.running_mean",
        "'1'",
    ),
    "skip": (Skip, "branch.weight", "'branch'"),
    "skip-side": (Skip, "side.weight", "'side'"),
}


@pytest.mark.parametrize("value", [float("nan"), -1e38, 1e38])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", HIDING)
def test_non_finite_values_that_an_activation_hides(case: str, backend: str, value: float) -> None:
    make, parameter, place = HIDING[case]
    model = make().eval()
    tensor = model.state_dict()[parameter]
    tensor[0] = value * math.inf if tensor.dim() == 1 else value
    x = torch.full((2, 4), 100.0) if case.startswith("linear") else torch.full((2, 3, 4, 4), 100.0)
    with pytest.raises(NonFiniteError, match=place):
        RelativeLRP(model, backend=backend).attribute(x, target=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_huge_but_finite_values_are_explained(backend: str) -> None:
    model = saturating(nn.Conv2d(3, 3, 1), nn.ReLU6())
    model[0].weight.data[0] = 1e19  # Σw² overflows, no value does
    attributions = RelativeLRP(model, backend=backend).attribute(torch.ones(2, 3, 4, 4), target=0)
    exact = RelativeLRP(model.double()).attribute(torch.ones(2, 3, 4, 4).double(), target=0)
    torch.testing.assert_close(attributions, exact.float())


def test_a_mask_of_infinities_is_no_error() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            forbidden = torch.tensor([False, True, False])
            return self.head(x).masked_fill(forbidden, float("-inf")).softmax(-1)

    attributions = RelativeLRP(Masked().eval()).attribute(X, target=0)
    torch.testing.assert_close(attributions.abs().sum(1), torch.ones(len(X)))


def test_a_mask_in_front_of_an_exponential() -> None:
    """As the decay of a state-space model has it: places that are not to be seen weigh nothing."""
    head = nn.Linear(4, 4)
    mask = torch.ones(4, 4).triu(1).bool()

    def decay(s: Any, x: Tensor, least: float) -> Tensor:
        steps = x[:, None].expand(-1, 4, 4).masked_fill(mask, least)
        return (s.h(x)[:, None] * steps.exp()).sum(2)

    models = [of(lambda s, x, m=m: decay(s, x, m), h=head) for m in (float("-inf"), -200.0)]
    first, second = (RelativeLRP(model).attribute(X, target=1) for model in models)
    torch.testing.assert_close(first, second)


def test_half_precision_overflow_is_named() -> None:
    model = net().half()
    model[0].weight.data.fill_(30000)
    with pytest.raises(NonFiniteError):
        RelativeLRP(model).attribute(X.half() * 100, target=0)


def test_wrong_input_shape() -> None:
    with pytest.raises((RelativeLRPError, RuntimeError), match=r"\S"):
        RelativeLRP(net()).attribute(torch.ones(2, 7), target=0)


def test_wrong_number_of_inputs() -> None:
    with pytest.raises((RelativeLRPError, TypeError), match=r"\S"):
        RelativeLRP(net()).attribute((X, X), target=0)


@pytest.mark.parametrize("bad", [None, "image", 3, [X]])
def test_inputs_that_are_no_tensors(bad: object) -> None:
    with pytest.raises((RelativeLRPError, AssertionError, TypeError)):
        RelativeLRP(net()).attribute(bad, target=0)


# ---- targets -------------------------------------------------------------------------------------

SHAPE = r"2, 5"  # (2, 5) or [2, 5]


@pytest.mark.parametrize(
    "target",
    [
        5,
        -6,
        99,
        [0, 5],
        torch.tensor(5),
        torch.tensor([0, 7]),
        (5,),
        [(0,), (9,)],
        [0, 1, 2],
        [0],
        torch.tensor([0, 1, 2]),
        (0, 0),
        [(0, 0), (0, 1)],
        [(0,)],
        None,
    ],
    ids=str,
)
def test_bad_target_names_the_shape_of_the_output(target: object) -> None:
    with pytest.raises(RelativeLRPError, match=SHAPE):
        RelativeLRP(net()).attribute(X, target=target)


@pytest.mark.parametrize("target", ["cat", 1.5, torch.tensor([0.5, 1.5])], ids=str)
def test_target_of_the_wrong_type(target: object) -> None:
    with pytest.raises((RelativeLRPError, TypeError, AssertionError)):
        RelativeLRP(net()).attribute(X, target=target)


def test_missing_index_for_an_output_of_three_dimensions() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))).eval()
    with pytest.raises(RelativeLRPError, match=r"2, 2, 3"):
        RelativeLRP(model).attribute(X, target=1)
    assert RelativeLRP(model).attribute(X, target=(1, 2)).shape == X.shape


def test_a_bad_target_does_no_harm() -> None:
    rlrp = RelativeLRP(net())
    before = rlrp.attribute(X, target=1)
    with pytest.raises(RelativeLRPError):
        rlrp.attribute(X, target=17)
    assert torch.equal(rlrp.attribute(X, target=1), before)


# ---- models that cannot be captured --------------------------------------------------------------


class Undecided(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return -self.layer(x)


def test_data_dependent_control_flow() -> None:
    model = Undecided().eval()
    keys = set(model.__dict__)
    with pytest.raises(CaptureError) as caught:
        RelativeLRP(model).attribute(X, target=0)
    first, *rest = str(caught.value).splitlines()
    assert "Undecided" in first
    assert "branch" in first
    assert rest or caught.value.__cause__ is not None
    assert set(model.__dict__) == keys


@pytest.mark.parametrize("by", ["the input", "a constant"])
def test_torch_cond(by: str) -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        asked = x if by == "the input" else s.layer.bias
        y: Tensor = torch.cond(asked.sum() > 0, lambda z: z * 2, lambda z: z * 3, (s.layer(x),))
        return y

    with pytest.raises(CaptureError, match=r"cond in .*no static graph"):
        RelativeLRP(of(forward, layer=nn.Linear(4, 3))).attribute(X, target=0)


def test_model_that_raises() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("the model's own words")

    with pytest.raises(RelativeLRPError, match="Broken") as caught:
        RelativeLRP(Broken().eval()).attribute(X, target=0)
    text = str(caught.value) + str(caught.value.__cause__)
    assert "the model's own words" in text


def test_several_outputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, 2 * x

    with pytest.raises(RelativeLRPError, match="2 tensors"):
        RelativeLRP(Two().eval()).attribute(X, target=0)


OPS: dict[str, Any] = {
    "linalg_det": lambda h: torch.linalg.det(h.view(-1, 2, 2)).unsqueeze(1).expand(-1, 4),
    "linalg_inv": lambda h: torch.linalg.inv(h.view(-1, 2, 2)).flatten(1),
    "pinverse": lambda h: torch.pinverse(h.view(-1, 2, 2)).flatten(1),
    "linalg_cholesky": lambda h: torch.linalg.cholesky(h.view(-1, 2, 2)).flatten(1),
}


@pytest.mark.parametrize("name", OPS)
def test_what_has_no_rule_is_one_clear_error(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.eye(2).flatten())
    model = of(lambda s, x: s.h(OPS[name](s.a(x))), a=layer, h=nn.Linear(4, 3))
    with pytest.raises(UnsupportedOperationError) as caught:
        RelativeLRP(model).attribute(X, target=0)
    assert re.search(
        rf"aten\.{name}(.|\n)*model.s forward, .*\.py:\d+(.|\n)*register_rule", str(caught.value)
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model", [None, torch.relu, lambda x: x, "resnet"])
def test_a_model_must_be_a_module(model: object) -> None:
    with pytest.raises((RelativeLRPError, TypeError), match=r"(?i)module"):
        RelativeLRP(model)


def test_unknown_backend() -> None:
    with pytest.raises((RelativeLRPError, ValueError), match="backend"):
        RelativeLRP(net(), backend="abacus").attribute(X, target=0)


def test_output_that_does_not_depend_on_the_input() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.bias.expand(x.shape[0], 3)

    with pytest.raises(RelativeLRPError, match="does not depend on the inputs"):
        RelativeLRP(Constant().eval()).attribute(X, target=0)


# ---- layers --------------------------------------------------------------------------------------


def test_layer_of_another_model() -> None:
    with pytest.raises(RelativeLRPError, match=r"(?i)layer|module"):
        LayerRelativeLRP(net(), nn.Linear(4, 6)).attribute(X, target=0)


def test_layer_that_is_never_called() -> None:
    model = net()
    model[1].unused = nn.Linear(2, 2)
    with pytest.raises(RelativeLRPError, match="unused"):
        LayerRelativeLRP(model, model[1].unused).attribute(X, target=0)


def test_layer_that_is_no_module() -> None:
    with pytest.raises((RelativeLRPError, TypeError), match=r"(?i)layer|module"):
        LayerRelativeLRP(net(), "0").attribute(X, target=0)
