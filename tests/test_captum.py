"""Captum's conventions, its tools around the method, and what its own LRP gets wrong."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import queue
import threading
import weakref
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LRP, InputXGradient, LayerAttribution, NoiseTunnel
from captum.attr import visualization as viz
from captum.attr._utils.attribution import Attribution
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor, nn

from captum_rlrp import LayerRelativeLRP, RelativeLRP, RelativeLRPError
from captum_rlrp.graph import fingerprint
from tests.oracle import Value, explain, frozen, randomise_norms, relative_error

matplotlib.use("Agg")


class Small(nn.Module):
    """A convolutional network with a functional skip connection and a reused ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.relu(self.norm(self.stem(x))))
        h = self.relu(h + self.block(h))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(h, 1), 1))

    def twin(self, x: Value) -> Value:
        h = x.spatial(self.stem).move(self.norm).act(torch.relu).route(self.pool)
        h = (h + h.spatial(self.block)).act(torch.relu)
        return h.pool(lambda t: t.mean((2, 3))).dense(self.head)


def small() -> Small:
    return randomise_norms(Small()).eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def expected(model: Small, x: Tensor, targets: list) -> Tensor:
    return explain(frozen(model).twin, (x.double(),), targets)[0]


# ---- the face ------------------------------------------------------------------------------------


def test_family_and_signature() -> None:
    rlrp = RelativeLRP(small())
    assert isinstance(rlrp, Attribution)
    ours, theirs = (inspect.signature(c.attribute).parameters for c in (RelativeLRP, LRP))
    assert list(ours) == [*theirs, "internal_batch_size"]
    assert all(ours[name].default == theirs[name].default for name in theirs)
    assert ours["internal_batch_size"].default is None
    assert rlrp.has_convergence_delta() is True
    assert rlrp.multiplies_by_inputs is True
    assert callable(RelativeLRP.attribute.__wrapped__)  # log_usage, which NoiseTunnel looks through
    assert RelativeLRP.attribute.__doc__


def test_positional_arguments() -> None:
    model, x = small(), images()
    attribution, delta = RelativeLRP(model).attribute(x, 1, None, True, False)
    assert attribution.shape == x.shape
    assert delta.shape == (2,)


def test_verbose_prints_nothing_to_stdout(capsys: pytest.CaptureFixture) -> None:
    RelativeLRP(small()).attribute(images(), 1)
    assert capsys.readouterr().out == ""


def test_verbose_changes_no_result() -> None:
    model, x = small(), images()
    assert torch.equal(
        RelativeLRP(model).attribute(x, 1, verbose=True), RelativeLRP(model).attribute(x, 1)
    )


def test_tensor_in_tensor_out_and_tuple_in_tuple_out() -> None:
    model, x = small(), images()
    rlrp = RelativeLRP(model)
    single, pair = rlrp.attribute(x, 1), rlrp.attribute((x,), 1)
    assert isinstance(single, Tensor)
    assert isinstance(pair, tuple)
    assert len(pair) == 1
    assert torch.equal(single, pair[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "requires_grad"])
def test_results_are_detached_contiguous_and_alike(layout: str) -> None:
    model, x = small(), images()
    reference = expected(model, x, [1, 1])
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "requires_grad":
        x = x.requires_grad_()
    before = x.detach().clone()
    attribution = RelativeLRP(model).attribute(x, 1)
    assert attribution.is_contiguous()
    assert not attribution.requires_grad
    assert attribution.grad_fn is None
    assert not attribution.is_inference()
    assert (attribution.dtype, attribution.device) == (x.dtype, x.device)
    assert relative_error(attribution, reference) <= 1e-4
    assert torch.equal(x.detach(), before)
    assert x.grad is None


@pytest.mark.parametrize(
    "target",
    [
        3,
        torch.tensor(3),
        torch.tensor([3]),
        (3,),
        [3, 3],
        torch.tensor([3, 3]),
        torch.tensor([3, 3], dtype=torch.int32),
        [(3,), (3,)],
        np.int64(3),
        np.array([3, 3], dtype=np.int32),
        [np.int64(3), np.int64(3)],
        [torch.tensor(3), torch.tensor(3)],
    ],
    ids=repr,
)
def test_every_form_of_target(target: object) -> None:
    model, x = small(), images()
    attribution = RelativeLRP(model).attribute(x, target=target)
    assert relative_error(attribution, expected(model, x, [3, 3])) <= 1e-4


@pytest.mark.parametrize("target", [[0, 4], torch.tensor([0, 4]), [(0,), (4,)]], ids=repr)
def test_a_target_for_each_sample(target: object) -> None:
    model, x = small(), images()
    attribution = RelativeLRP(model).attribute(x, target=target)
    assert relative_error(attribution, expected(model, x, [0, 4])) <= 1e-4


class Map(nn.Module):
    """An output of four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))

    def twin(self, x: Value) -> Value:
        return x.spatial(self.one).act(torch.relu).spatial(self.two)


def test_outputs_of_more_than_two_dimensions() -> None:
    model, x = Map().eval(), images()
    rlrp = RelativeLRP(model)
    same = rlrp.attribute(x, target=(1, 2, 3))
    each = rlrp.attribute(x, target=[(1, 2, 3), (0, 0, 5)])
    twin = frozen(model).twin
    assert relative_error(same, explain(twin, (x,), [(1, 2, 3)] * 2)[0]) <= 1e-4
    assert relative_error(each, explain(twin, (x,), [(1, 2, 3), (0, 0, 5)])[0]) <= 1e-4


@pytest.mark.parametrize("index", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_indices_as_argmax_and_unravel_index_return_them(index: Callable) -> None:
    model, x = Map().eval(), images()
    rlrp = RelativeLRP(model)
    at = (index(1), index(2), index(0))
    assert torch.equal(rlrp.attribute(x, at), rlrp.attribute(x, (1, 2, 0)))
    assert torch.equal(rlrp.attribute(x, [at, at]), rlrp.attribute(x, (1, 2, 0)))


@pytest.mark.parametrize(
    "target", [[0, 1, 2], "cat", 1.5, (0, 1), np.array(["cat", "dog"]), None], ids=repr
)
def test_a_wrong_target_is_the_error_that_it_is_for_captum(target: object) -> None:
    model, x = small(), images()
    with pytest.raises(AssertionError):
        InputXGradient(model).attribute(x.clone().requires_grad_(), target=target)
    with pytest.raises(AssertionError) as caught:
        RelativeLRP(model).attribute(x, target=target)
    assert isinstance(caught.value, RelativeLRPError)


def test_wrong_inputs_are_the_error_that_they_are_for_captum() -> None:
    model = small()
    for method in (InputXGradient(model), RelativeLRP(model)):
        with pytest.raises(AssertionError):
            method.attribute([images()], target=1)


def test_one_scalar_per_sample_without_target() -> None:
    class Scalar(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 2]

    model, x = randomise_norms(Scalar()).eval(), images()
    attribution = RelativeLRP(model).attribute(x)
    assert relative_error(attribution, expected(model, x, [2, 2])) <= 1e-4


# ---- additional_forward_args ---------------------------------------------------------------------


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        power: float = 1.0,
        repeat: int = 1,
        skip: bool = False,
    ) -> Tensor:
        h = x if scale is None else x * scale
        for _ in range(repeat):
            h = torch.relu(self.one(h)) * power
        return self.two(h + x if skip else h)


@pytest.mark.parametrize(
    "extra",
    [
        None,
        (None,),
        torch.tensor([[1.0, 2, -1, 3], [2.0, 1, 1, 1]]),
        (torch.tensor([[1.0, 2, -1, 3], [2.0, 1, 1, 1]]), 0.5),
        (None, 2.0, 2),
        (None, 1.0, 2, True),
        (torch.tensor([0.5, 1.0, 1.5, 2.0]), 1, 1, True),
    ],
    ids=str,
)
def test_additional_forward_args(extra: object) -> None:
    model, x = Extra().eval(), torch.randn(2, 4)
    args = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
    scale, power, repeat, skip = args + (None, 1.0, 1, False)[len(args) :]
    m = frozen(model)

    def sample(i: int) -> Tensor:
        own = scale
        if own is not None:
            own = (own if own.dim() == 1 else own[i : i + 1]).double()

        def twin(x: Value) -> Value:
            h = x if own is None else x.move(lambda t: t * own)
            for _ in range(repeat):
                h = h.dense(m.one).act(torch.relu).move(lambda t: t * power)
            return (h + x if skip else h).dense(m.two)

        return explain(twin, (x[i : i + 1],), [1])[0]

    rlrp = RelativeLRP(model)
    for _ in range(2):  # the second time from what is kept
        attribution = rlrp.attribute(x, target=1, additional_forward_args=extra)
        assert relative_error(attribution, torch.cat([sample(0), sample(1)])) <= 1e-4


def test_the_value_of_an_extra_argument_is_not_remembered() -> None:
    model, x = Extra().eval(), torch.randn(2, 4)
    rlrp = RelativeLRP(model)
    for extra in [(None, 1.0, 1), (None, 1.0, 2), (None, -3.0, 2), (torch.rand(2, 4), 1.0, 1)]:
        fresh = RelativeLRP(model).attribute(x, 0, additional_forward_args=extra)
        assert torch.equal(rlrp.attribute(x, 0, additional_forward_args=extra), fresh)
    one, two = torch.randn(2, 4), torch.randn(2, 4)
    first, second = (rlrp.attribute(x, 0, additional_forward_args=t) for t in (one, two))
    assert not torch.equal(first, second)


def test_integer_tensors_may_be_additional_arguments() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(x + self.table(tokens)))

    x = torch.randn(2, 4)
    attribution = RelativeLRP(Lookup().eval()).attribute(
        x, target=2, additional_forward_args=torch.tensor([1, 6])
    )
    assert attribution.abs().sum(1).allclose(torch.ones(2))


# ---- around the method ---------------------------------------------------------------------------


def test_noise_tunnel_without_noise_is_the_method_itself() -> None:
    model, x = small(), images()
    rlrp = RelativeLRP(model)
    smooth = NoiseTunnel(rlrp).attribute(
        x, nt_type="smoothgrad", nt_samples=3, stdevs=0.0, target=[1, 2]
    )
    assert relative_error(smooth, rlrp.attribute(x, [1, 2])) <= 1e-5


@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(nt_type: str) -> None:
    model, x = small(), images()
    attribution, delta = NoiseTunnel(RelativeLRP(model)).attribute(
        x,
        nt_type=nt_type,
        nt_samples=4,
        nt_samples_batch_size=2,
        stdevs=0.2,
        target=torch.tensor([1, 2]),
        return_convergence_delta=True,
    )
    assert attribution.shape == x.shape
    assert attribution.isfinite().all()
    assert attribution.abs().sum() > 0
    assert delta.shape == (8,)
    assert delta.max() <= 1e-4


def test_infidelity() -> None:
    model, x = small(), images()
    attribution = RelativeLRP(model).attribute(x, 1)

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    score = infidelity(model, perturb, x, attribution, target=1, n_perturb_samples=3)
    assert score.shape == (2,)
    assert score.isfinite().all()


def test_sensitivity_max() -> None:
    model, x = small(), images()
    score = sensitivity_max(RelativeLRP(model).attribute, x, target=1, n_perturb_samples=3)
    assert score.shape == (2,)
    assert score.isfinite().all()


def test_sensitivity_max_of_a_layer() -> None:
    model, x = small(), images()
    score = sensitivity_max(
        LayerRelativeLRP(model, model.relu).attribute, x, target=1, n_perturb_samples=2
    )
    assert score.isfinite().all()


def test_visualize_image_attr() -> None:
    model, x = small(), images(1)
    attribution = RelativeLRP(model).attribute(x, 1)[0].permute(1, 2, 0).numpy()
    image = x[0].permute(1, 2, 0).sigmoid().numpy()
    figure, _ = viz.visualize_image_attr(
        attribution, image, method="blended_heat_map", sign="all", use_pyplot=False
    )
    image_file = io.BytesIO()
    figure.savefig(image_file, format="png")
    assert len(image_file.getvalue()) > 1000


def test_layer_attribution_interpolate() -> None:
    model, x = small(), images()
    attribution = LayerRelativeLRP(model, model.pool).attribute(x, 1)
    assert attribution.shape == (2, 4, 4, 4)
    assert LayerAttribution.interpolate(attribution, (8, 8)).shape == (2, 4, 8, 8)


# ---- what Captum's LRP gets wrong ----------------------------------------------------------------


def test_functional_skip_and_reused_modules() -> None:
    model, x = small(), images()
    attribution = RelativeLRP(model).attribute(x, [1, 4])
    assert relative_error(attribution, expected(model, x, [1, 4])) <= 1e-4


@pytest.mark.parametrize(
    "leaf", [nn.Linear(4, 3), nn.ReLU(), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Identity()], ids=str
)
def test_a_bare_leaf_module_as_the_model(leaf: nn.Module) -> None:
    x = torch.rand(2, 4) + 0.5
    attribution = RelativeLRP(leaf.eval()).attribute(x, target=1)
    if isinstance(leaf, nn.Linear):
        wanted = x * leaf.weight[1].detach()
        wanted = wanted / wanted.abs().sum(1, keepdim=True)
    else:
        wanted = F.one_hot(torch.tensor([1, 1]), 4).float()
    assert relative_error(attribution, wanted) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_no_nan(dtype: torch.dtype) -> None:
    model, x = small(), images()
    reference = expected(copy.deepcopy(model).to(dtype), x.to(dtype), [1, 4])
    attribution, delta = RelativeLRP(model.to(dtype)).attribute(
        x.to(dtype), [1, 4], return_convergence_delta=True
    )
    # Shares are often less than the least number of float16.
    assert attribution.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert attribution.isfinite().all()
    assert delta.isfinite().all()
    assert attribution.double().abs().sum((1, 2, 3)).max() <= 1.02
    cosine = F.cosine_similarity(attribution.double().flatten(1), reference.flatten(1))
    assert cosine.min() >= 0.98


def test_half_precision_with_tiny_values() -> None:
    """Products of activation, weight and relevance that underflow in float16 by themselves."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = 1e-3 * torch.rand(2, 64)
    for layer in (model[0], model[2]):
        layer.weight.data.mul_(1e-1)
        layer.bias.data.zero_()
    attribution = RelativeLRP(model.half()).attribute(x.half(), target=3)
    assert attribution.isfinite().all()
    exact = RelativeLRP(model.double()).attribute(x.half().double(), target=3)
    assert relative_error(attribution, exact) <= 2e-2


def _snapshot(model: nn.Module) -> dict[str, object]:
    """All that can be seen of a model from outside."""
    seen: dict[str, object] = {}
    for name, module in model.named_modules():
        seen[f"{name}.keys"] = sorted(module.__dict__)
        seen[f"{name}.training"] = module.training
        seen[f"{name}.class"] = type(module)
        for key, value in module.__dict__.items():
            if "hooks" in key:
                seen[f"{name}.{key}"] = len(value) if hasattr(value, "__len__") else value
    for name, parameter in model.named_parameters():
        seen[f"{name}.requires_grad"] = parameter.requires_grad
        seen[f"{name}.grad"] = parameter.grad
        seen[f"{name}.version"] = parameter._version
        seen[f"{name}.id"] = id(parameter)
    for name, tensor in model.state_dict().items():
        seen[f"{name}.pointer"] = tensor.data_ptr()
        seen[f"{name}.value"] = tensor.clone().tolist()
    return seen


def test_nothing_is_left_on_the_model() -> None:
    model, x = small(), images()
    model.stem.weight.requires_grad_(False)
    model.head.register_forward_hook(lambda *_: None)
    before = _snapshot(model)
    rlrp, layer = RelativeLRP(model), LayerRelativeLRP(model, [model.relu, model.block])
    rlrp.attribute(x, 1)
    layer.attribute(x, 1)
    assert _snapshot(model) == before
    for bad in (x * float("nan"), x[:, :2], x.long()):
        with pytest.raises((RelativeLRPError, RuntimeError)):
            rlrp.attribute(bad, 1)
    with pytest.raises(RelativeLRPError):
        rlrp.attribute(x, 99)
    assert _snapshot(model) == before
    assert torch.is_grad_enabled()
    del rlrp, layer
    gc.collect()
    assert _snapshot(model) == before


def test_train_mode_statistics_are_untouched() -> None:
    model, x = small().train(), images()
    before = _snapshot(model)
    with pytest.raises(RelativeLRPError):
        RelativeLRP(model).attribute(x, 1)
    assert _snapshot(model) == before


def test_the_model_still_trains_afterwards() -> None:
    model, x = small(), images()
    RelativeLRP(model).attribute(x, 1)
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_memory_is_released_between_calls() -> None:
    model = small()
    rlrp = RelativeLRP(model)
    rlrp.attribute(images(), 1)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    x = images()
    result = rlrp.attribute(x, 1)
    gone = [weakref.ref(x), weakref.ref(result)]
    del x, result
    gc.collect()
    assert [ref() for ref in gone] == [None, None]

    before = tensors()
    for _ in range(3):
        rlrp.attribute(images(4), 1)
    assert tensors() <= before


def test_memory_is_released_after_an_error() -> None:
    rlrp = RelativeLRP(small())
    x = images()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(RelativeLRPError):
        rlrp.attribute(x, 1)
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


# ---- captured once, never stale ------------------------------------------------------------------


def test_the_batch_size_is_dynamic(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = []
    export = torch.export.export

    def counting(*args: object, **kwargs: object) -> object:
        captures.append(1)
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counting)
    model = small()
    rlrp = RelativeLRP(model)
    x = images(6)
    for batch in (2, 3, 1, 6, 2):
        attribution = rlrp.attribute(x[:batch], 1)
        assert relative_error(attribution, expected(model, x[:batch], [1] * batch)) <= 1e-4
    assert len(captures) in (1, 2)  # once, or once more for the special size of 1
    many = len(captures)
    rlrp.attribute(x[:5], [0, 1, 2, 3, 4])
    rlrp.attribute(x[:2], 3)
    assert len(captures) == many


@pytest.mark.parametrize("first", [1, 3])
def test_any_batch_size_may_come_first(first: int) -> None:
    model, x = small(), images(3)
    rlrp = RelativeLRP(model)
    rlrp.attribute(x[:first], 1)
    for batch in (1, 2, 3):
        reference = expected(model, x[:batch], [1] * batch)
        assert relative_error(rlrp.attribute(x[:batch], 1), reference) <= 1e-4


def test_a_model_that_fixes_its_batch_size() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.stack([x[i] for i in range(len(x))]))

    model, x = Fixed().eval(), torch.randn(4, 4)
    rlrp = RelativeLRP(model)
    for batch in (2, 4, 1):
        attribution = rlrp.attribute(x[:batch], target=0)
        assert attribution.abs().sum(1).allclose(torch.ones(batch))


def test_the_size_of_the_image_may_change() -> None:
    model = small()
    rlrp = RelativeLRP(model)
    for size in (8, 10, 8):
        x = torch.randn(2, 3, size, size)
        assert relative_error(rlrp.attribute(x, 1), expected(model, x, [1, 1])) <= 1e-4


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_batch(first: bool) -> None:
    rlrp = RelativeLRP(small())
    if not first:
        rlrp.attribute(images(), 1)
    attribution, delta = rlrp.attribute(images(0), 1, return_convergence_delta=True)
    assert attribution.shape == (0, 3, 8, 8)
    assert delta.shape == (0,)
    (attribution,) = rlrp.attribute((images(0),), [])
    assert attribution.shape == (0, 3, 8, 8)


def _step(model: Small) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    model(images()).square().sum().backward()
    optimiser.step()


def _load(model: Small) -> None:
    model.load_state_dict(randomise_norms(Small()).state_dict())


def _data(model: Small) -> None:
    model.block[0].weight.data.mul_(-1.5)
    model.norm.weight.data[0] = 3.0


def _replace_data(model: Small) -> None:
    model.stem.weight.data = torch.randn_like(model.stem.weight)


def _statistics(model: Small) -> None:
    model.norm.running_var.mul_(torch.tensor([1.0, 4, 9, 16]))


def _replace_parameter(model: Small) -> None:
    model.head.weight = nn.Parameter(torch.randn(5, 4))


def _replace_module(model: Small) -> None:
    model.head = nn.Linear(4, 5)


def _set(model: Small) -> None:
    model.norm.eps = 0.5
    model.block[0].padding = model.block[0].dilation = (2, 2)


@pytest.mark.parametrize(
    "change",
    [_step, _load, _data, _replace_data, _statistics, _replace_parameter, _replace_module, _set],
    ids=lambda f: f.__name__.strip("_"),
)
def test_a_changed_parameter_shows_in_the_next_call(change: object) -> None:
    model, x = small(), images()
    rlrp = RelativeLRP(model)
    layer = LayerRelativeLRP(model, model.pool)
    before = rlrp.attribute(x, 1)
    layer.attribute(x, 1)
    change(model)
    after = rlrp.attribute(x, 1)
    assert not torch.equal(before, after)
    assert relative_error(after, expected(model, x, [1, 1])) <= 1e-4
    fresh = LayerRelativeLRP(model, model.pool).attribute(x, 1)
    assert relative_error(layer.attribute(x, 1), fresh) <= 1e-6


def test_a_module_in_the_memory_of_one_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python gives its id to the next; the parameters look alike, the stride does not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten()).eval()
    x = images()
    rlrp = RelativeLRP(model)
    rlrp.attribute(x, 1)
    address = id(model[0])
    model[0] = nn.Conv2d(3, 4, 3, stride=2).eval()
    same = lambda m: address if m is model[0] else id(m)  # noqa: E731
    monkeypatch.setattr(fingerprint, "id", same, raising=False)
    assert torch.equal(rlrp.attribute(x, 1), RelativeLRP(model).attribute(x, 1))


def test_the_dtype_of_the_model_may_change() -> None:
    model, x = small(), images()
    rlrp = RelativeLRP(model)
    reference = expected(model, x, [1, 1])
    assert relative_error(rlrp.attribute(x, 1), reference) <= 1e-4
    model.double()
    attribution = rlrp.attribute(x.double(), 1)
    assert attribution.dtype == torch.float64
    assert relative_error(attribution, reference) <= 1e-9


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(guard: type) -> None:
    model, x = small(), images()
    rlrp = RelativeLRP(model)
    with guard():
        attribution = rlrp.attribute(x, 1)
        own = rlrp.attribute(x + 0.0, 1)  # an inference tensor under inference_mode
    reference = expected(model, x, [1, 1])
    assert relative_error(attribution, reference) <= 1e-4
    assert relative_error(own, reference) <= 1e-4
    assert relative_error(rlrp.attribute(x, 1), reference) <= 1e-4  # and outside again


def test_two_threads_share_one_method() -> None:
    model = small()
    rlrp = RelativeLRP(model)
    xs = [images(b) for b in (1, 2, 3, 4)]
    serial = [RelativeLRP(model).attribute(x, 2) for x in xs]
    failures: list[str] = []
    barrier = threading.Barrier(len(xs))

    def work(i: int) -> None:
        try:
            barrier.wait()
            for _ in range(5):
                error = relative_error(rlrp.attribute(xs[i], 2), serial[i])
                if error > 1e-5:
                    failures.append(f"thread {i}: {error}")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class Gated(nn.Module):
    """A product of two activations; ``here`` is called while forward is traced."""

    def __init__(self, here: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.here = here

    def forward(self, x: Tensor) -> Tensor:
        self.here()
        return self.last(self.left(x) * self.right(x).sigmoid() + self.left(x) * self.right(x))


class GatedSignal(Gated):
    """The same, whose batch has another symbol: it is named after the argument."""

    def forward(self, signal: Tensor) -> Tensor:
        return super().forward(signal)


def test_threads_explain_while_another_captures() -> None:
    """What a thread works out about symbolic sizes must not end up in another's trace."""
    torch.manual_seed(0)
    x, inside, go = torch.randn(5, 4), queue.SimpleQueue[bool](), queue.SimpleQueue[bool]()
    model, slow = Gated().eval(), GatedSignal().eval()
    known = RelativeLRP(model)
    serial = known.attribute(x, 1)
    reference = RelativeLRP(slow).attribute(x, 1)
    fresh: dict[nn.Module, Tensor] = {}  # either thread may be the first to end

    def capture(model: nn.Module) -> None:
        fresh[model] = RelativeLRP(model).attribute(x, 1)

    def pause() -> None:
        inside.put(True)
        go.get()

    def capture_slowly() -> None:
        capture(slow)
        inside.put(False)

    slow.here = pause
    threads = [
        threading.Thread(target=capture_slowly),
        threading.Thread(target=capture, args=(model,)),
    ]
    threads[0].start()
    pauses = 0
    while inside.get(timeout=60):  # in several passes
        if pauses == 0:
            threads[1].start()
        pauses += 1
        try:
            assert torch.equal(known.attribute(x, 1), serial)
        finally:
            go.put(True)
    for thread in threads:
        thread.join()
    assert pauses > 0
    assert torch.equal(fresh[slow], reference)
    assert torch.equal(fresh[model], serial)


# ---- wrappers and copies -------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_wrapped_models(wrap: object) -> None:
    model, x = small(), images()
    wrapped = wrap(model)
    reference = expected(model, x, [1, 1])
    assert relative_error(RelativeLRP(wrapped).attribute(x, 1), reference) <= 1e-4
    plain = LayerRelativeLRP(model, model.pool).attribute(x, 1)
    assert torch.equal(LayerRelativeLRP(wrapped, model.pool).attribute(x, 1), plain)


def test_a_compiled_part_of_a_model() -> None:
    model, x = small(), images()
    reference = expected(model, x, [1, 1])
    model.block = torch.compile(model.block)
    assert relative_error(RelativeLRP(model).attribute(x, 1), reference) <= 1e-4


def test_repeated_calls_agree_exactly() -> None:
    rlrp, x = RelativeLRP(small()), images()
    assert torch.equal(rlrp.attribute(x, 1), rlrp.attribute(x, 1))


def test_a_result_is_not_overwritten_by_the_next_call() -> None:
    rlrp, x = RelativeLRP(small()), images()
    first = rlrp.attribute(x, 1)
    kept = first.clone()
    rlrp.attribute(images(), 2)
    assert torch.equal(first, kept)


def test_internal_batch_size_changes_no_result() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    x, scale = torch.randn(7, 2, 6, 6), torch.arange(7)
    method = RelativeLRP(model)
    whole, delta = method.attribute(x, target=scale % 5, return_convergence_delta=True)
    for size in (1, 3, 7, 100):
        parts, deltas = method.attribute(
            x, target=scale % 5, return_convergence_delta=True, internal_batch_size=size
        )
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
        assert deltas.shape == delta.shape == (7,)
    with pytest.raises(RelativeLRPError, match="at least 1"):
        method.attribute(x, target=0, internal_batch_size=0)
    with pytest.raises(RelativeLRPError, match="3 entries for a batch of 7"):
        method.attribute(x, target=[0, 1, 2], internal_batch_size=2)
