"""Nothing of the user's is touched, nothing explained is stale, nothing is lost in a copy."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_rlrp import CaptureError, LayerRelativeLRP, RelativeLRP
from captum_rlrp.run import capturing

from .small import agree, explained, mlp, of, rows

X = rows()
KEPT: dict[str, Tensor] = {}


def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * torch.arange(8.0)


class Recorder:
    """Keeps what its hook sees."""

    def __init__(self, model: nn.Sequential) -> None:
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None
        model[1].register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.seen.append(output)
        self.last = output
        return output * 2


# ---- stale ---------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "a bias where there was none": lambda m: setattr(m[0], "bias", nn.Parameter(torch.randn(8))),
    "a hook": lambda m: m[1].register_forward_hook(scale),
    "a hook in front": lambda m: m[0].register_forward_pre_hook(lambda mod, a: (a[0] * 2 + 1,)),
    "another forward": lambda m: setattr(m[1], "forward", torch.sigmoid),
    "another layer": lambda m: m.__setitem__(1, nn.Tanh()),
    "another weight": lambda m: setattr(m[0], "weight", nn.Parameter(torch.randn(8, 4))),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m[0]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    model = mlp(bias=False)
    living = RelativeLRP(model)
    before = living.attribute(X, 1)
    CHANGES[change](model)
    after = living.attribute(X, 1)
    agree(after, explained(model, X, 1))
    assert change == "a parametrization" or not torch.allclose(before, after)


class Unregistered(nn.Module):
    """Layers and a tensor that nothing registers, and an activation that forward keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = [nn.Linear(4, 5).eval(), nn.Linear(5, 3).eval()]
        self.scales = {"first": [torch.ones(4)]}
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layers[0](x * self.scales["first"][0])
        return self.layers[1](torch.relu(self.last))


UNREGISTERED: dict[str, Callable[[Any], Any]] = {
    "another layer": lambda m: m.layers.__setitem__(0, nn.Linear(4, 5).eval()),
    "another weight": lambda m: setattr(m.layers[0], "weight", nn.Parameter(torch.randn(5, 4))),
    "no bias": lambda m: setattr(m.layers[0], "bias", None),
    "other data": lambda m: setattr(m.layers[0].weight, "data", torch.randn(5, 4)),
    "in place": lambda m: m.layers[0].weight.data.mul_(-1),
    "another tensor": lambda m: m.scales["first"].__setitem__(0, torch.randn(4)),
}


@pytest.mark.parametrize("in_a_closure", [False, True])
@pytest.mark.parametrize("change", UNREGISTERED)
def test_a_change_of_what_nothing_registers_is_seen(change: str, in_a_closure: bool) -> None:
    own = Unregistered().eval()
    layers, scales = own.layers, own.scales
    model = (
        of(lambda s, x: layers[1](torch.relu(layers[0](x * scales["first"][0]))))
        if in_a_closure
        else own
    )
    living = RelativeLRP(model)
    before = living.attribute(X, 1)
    UNREGISTERED[change](own)
    after = living.attribute(X, 1)
    agree(after, explained(model, X, 1))
    assert not torch.allclose(before, after)


def test_what_forward_keeps_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model, captures = Unregistered().eval(), []
    living = RelativeLRP(model)
    living.attribute(X, 1)
    capture = capturing.capture
    monkeypatch.setattr(capturing, "capture", lambda *args: captures.append(args) or capture(*args))
    for _ in range(2):
        model(X)
        living.attribute(X, 1)
    assert not captures


def test_a_hook_taken_away_is_seen() -> None:
    model = mlp()
    living = RelativeLRP(model)
    before = living.attribute(X, 1)
    handle = model[1].register_forward_hook(scale)
    assert not torch.allclose(living.attribute(X, 1), before)
    handle.remove()
    agree(living.attribute(X, 1), before)


class Switched(nn.Module):
    """A module with a flag, a list of names and a counter, as adapters have."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.extra, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.active: list[str] = ["extra"]
        self.off = False
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.base(x)
        if self.active and not self.off:
            h = h + self.extra(x)
        return self.head(h.relu())


def test_settings_of_the_users_own_modules_are_seen_and_counters_are_not() -> None:
    model = Switched().eval()
    living = RelativeLRP(model)
    living.attribute(X, 0)
    assert model.calls == 0  # the user's module never ran
    captured = living._engine.captured((X,), 1, 3)
    model(X)
    assert living._engine.captured((X,), 1, 3) is captured
    model.off = True
    agree(living.attribute(X, 0), explained(model, X))
    model.off = False
    model.active.clear()  # in place
    agree(living.attribute(X, 0), explained(model, X))
    assert living._engine.captured((X,), 1, 3) is not captured


class KeepsMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.way = self.first
        self.later = functools.partial(self.first, shift=0.0)

    def first(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.head(torch.relu(self.layer(x))) + shift

    def second(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.layer(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x) + self.later(x)


def test_bound_methods_kept_by_the_module() -> None:
    model = KeepsMethod().eval()
    living = RelativeLRP(model)
    living.attribute(X, 0)
    model.layer.weight = nn.Parameter(torch.randn(8, 4))
    agree(living.attribute(X, 0), explained(model, X))
    model.way = model.second
    agree(living.attribute(X, 0), explained(model, X))
    layer = LayerRelativeLRP(model, model.layer).attribute(X, 0)
    assert isinstance(layer, tuple)  # called twice, by two ways


def test_patched_forwards_keep_their_layers() -> None:
    """As accelerate's ``device_map`` patches them: a partial function of the module itself."""
    model = mlp()
    expected = LayerRelativeLRP(model, model[0]).attribute(X, 0)
    for module in model:
        old = module.forward

        def new(module: nn.Module, *args: Any, old: Any = old) -> Any:
            return module._old_forward(*args)

        module._old_forward = old
        module.forward = functools.update_wrapper(functools.partial(new, module), old)
    agree(LayerRelativeLRP(model, model[0]).attribute(X, 0), expected)


# ---- touched -------------------------------------------------------------------------------------


def hooked_by_closure(model: nn.Sequential) -> Callable[[], Any]:
    kept: dict[str, Any] = {}
    model[1].register_forward_hook(lambda m, a, o: kept.__setitem__("h", o))
    return lambda: kept.get("h")


def hooked_by_global(model: nn.Sequential) -> Callable[[], Any]:
    KEPT.clear()

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        KEPT["h"] = output
        return output + 1

    model[1].register_forward_hook(hook)
    return lambda: KEPT.get("h")


def hooked_by_list(model: nn.Sequential) -> Callable[[], Any]:
    kept: list[Tensor] = []
    model[1].register_forward_hook(lambda m, a, o: kept.append(o))
    return lambda: kept[-1] if kept else None


def hooked_by_object(model: nn.Sequential) -> Callable[[], Any]:
    recorder = Recorder(model)
    return lambda: recorder.seen[-1] if recorder.seen else recorder.last


@pytest.mark.parametrize(
    "hooked", [hooked_by_closure, hooked_by_global, hooked_by_list, hooked_by_object]
)
def test_hooks_never_see_the_captures_tensors(hooked: Any) -> None:
    model = mlp()
    kept = hooked(model)
    explained(model, X)
    assert kept() is None
    model(X)
    explained(model, X)
    assert type(kept()) is torch.Tensor


def test_a_cache_outside_the_module_keeps_real_tensors() -> None:
    @functools.lru_cache
    def table(size: int) -> Tensor:
        return torch.arange(size).float()

    model = of(lambda s, x: s.o(x + table(x.shape[1])), o=nn.Linear(4, 2))
    first = explained(model, X)
    assert type(table(4)) is torch.Tensor
    assert type(model(X)) is torch.Tensor
    agree(explained(model, X), first)


class Counting(nn.Module):
    """Changes a buffer and a dictionary at every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.cache: dict[str, Any] = {"nested": {}}

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        self.cache["nested"]["x"] = x
        return self.layer(x)


def test_buffers_and_dictionaries_stay_as_they_are() -> None:
    model = Counting().eval()
    explained(model, X)
    assert model.steps == 0
    assert model.cache == {"nested": {}}


class Store:
    """An object that keeps what it is handed, and more of its kind."""

    def __init__(self) -> None:
        self.last: Any = None
        self.all: list[Any] = []
        self.inner: Store | None = None


def test_objects_that_the_model_keeps_stay_as_they_are() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        s.store.last = x
        s.store.inner.all.append(x)
        return s.o(x)

    model = of(forward, o=nn.Linear(4, 2))
    model.store = Store()
    model.store.inner = Store()
    explained(model, X)
    assert model.store.last is None
    assert not model.store.inner.all


def test_activations_kept_by_an_object_carry_relevance() -> None:
    """As networks built with hooks keep their skip connections."""
    store = Store()

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.o(torch.cat([s.b(s.a(x)).relu(), s.store.last], 1))

    model = of(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), o=nn.Linear(8, 2))
    model.store = store
    model.a.register_forward_hook(lambda m, a, o: setattr(store, "last", o))
    plain = of(
        lambda s, x: (lambda h: s.o(torch.cat([s.b(h).relu(), h], 1)))(s.a(x)),
        a=model.a,
        b=model.b,
        o=model.o,
    )
    found = explained(model, X)
    model.a._forward_hooks.clear()
    agree(found, explained(plain, X))
    assert store.last is None


def test_random_numbers_of_the_user_stay_in_order() -> None:
    model = of(lambda s, x: s.o(x * torch.bernoulli(torch.full((4,), 0.5))), o=nn.Linear(4, 2))
    torch.manual_seed(5)
    with pytest.raises(CaptureError):
        explained(model, X)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


# ---- random --------------------------------------------------------------------------------------

RANDOM: dict[str, Callable[[], nn.Module]] = {
    "bernoulli": lambda: of(
        lambda s, x: s.o(x * torch.bernoulli(torch.full((4,), 0.5))), o=nn.Linear(4, 2)
    ),
    "rand_like": lambda: of(lambda s, x: s.o(x + torch.rand_like(x)), o=nn.Linear(4, 2)),
    "rrelu": lambda: nn.Sequential(nn.Linear(4, 4), nn.RReLU().train(), nn.Linear(4, 2)),
    "lstm": lambda: of(
        lambda s, x: s.o(s.l(x[:, None])[0][:, 0]),
        l=nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True),
        o=nn.Linear(4, 2),
    ),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_random_numbers_are_refused_by_name(kind: str) -> None:
    model = RANDOM[kind]().eval()
    for module in model.modules():
        if isinstance(module, (nn.RReLU, nn.LSTM)):
            module.train()
    with pytest.raises(CaptureError, match=r"random numbers(.|\n)*(rand|bern|rrelu|lstm)"):
        explained(model, X)


def test_random_numbers_may_be_constants() -> None:
    model = RANDOM["bernoulli"]().eval()
    relevance = RelativeLRP(model, allow_random=True).attribute(X, 0)
    assert relevance.abs().sum() > 0


def test_dropout_in_eval_mode_is_not_random() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.RReLU(), nn.Linear(4, 2)).eval()
    explained(model, X)


# ---- copies and Captum's interface ---------------------------------------------------------------


@pytest.mark.parametrize("make", [RelativeLRP, lambda m: LayerRelativeLRP(m, m[0])])
def test_copies(make: Any, tmp_path: Path) -> None:
    explainer = make(mlp())
    expected = explainer.attribute(X, 0)
    copies = [copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))]
    torch.save(explainer, tmp_path / "explainer.pt")
    copies.append(torch.load(tmp_path / "explainer.pt", weights_only=False))
    for copied in copies:
        agree(copied.attribute(X, 0), expected)
        assert copied.model is not explainer.model


def test_a_layer_may_be_assigned() -> None:
    model = mlp()
    layers = LayerRelativeLRP(model, model[0])
    first = layers.attribute(X, 0)
    layers.layer = model[2]
    agree(layers.attribute(X, 0), LayerRelativeLRP(model, model[2]).attribute(X, 0))
    layers.layer = [model[0]]
    agree(layers.attribute(X, 0)[0], first)


def test_captums_interface() -> None:
    explainer = RelativeLRP(mlp())
    relevance = explainer.attribute(X, 0)
    assert explainer.compute_convergence_delta(relevance, torch.ones(3)).shape == (3,)
    with pytest.raises(NotImplementedError):
        explainer.attribute_future()


def test_nothing_grows_from_call_to_call() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x @ x.transpose(1, 2))
            return (y @ x).flatten(1)

    rlrp, x = RelativeLRP(Products()), torch.rand(2, 3, 3)
    sizes = []
    for _ in range(3):
        rlrp.attribute(x, target=0)
        steps = rlrp._engine.captured((x,), 1, 2).program.plan.steps
        sizes.append(sum(len(step.call.known) for step in steps if hasattr(step, "call")))
    assert sizes[0] == sizes[2] > 0
