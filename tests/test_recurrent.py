"""Recurrent layers: the float64 oracle, and the same layers written out in plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import LayerRelativeLRP, NonFiniteError, RelativeLRP
from captum_rlrp.graph.capture import CapturedGraph
from captum_rlrp.graph.recurrent import RECURRENT
from tests.oracle import Value, agrees, explain, frozen, relative_error
from tests.paths import all_paths
from tests.small import of

pytestmark = pytest.mark.usefixtures("one_thread")


def elman(nonlinearity: str) -> Callable[..., nn.RNN]:
    return lambda *args, **options: nn.RNN(*args, nonlinearity=nonlinearity, **options)


KINDS: dict[str, Callable[..., Any]] = {
    "LSTM": nn.LSTM, "GRU": nn.GRU, "tanh": elman("tanh"), "relu": elman("relu"),
}  # fmt: skip


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- the oracle --------------------------------------------------------------------------------


def steps_of_values(layer: nn.RNNBase, kind: str, x: Value, h: Value, c: Value | None) -> Value:
    """One layer, in one direction, as the oracle knows it; the last output."""
    size = layer.hidden_size

    def dense(v: Value, weight: Tensor, bias: Tensor) -> Value:
        return v.dense(lambda u: F.linear(u, weight, bias))

    for t in range(x.data.shape[1]):
        step = x.move(lambda u, t=t: u[:, t])
        of_x = dense(step, layer.weight_ih_l0, layer.bias_ih_l0)
        of_h = dense(h, layer.weight_hh_l0, layer.bias_hh_l0)

        def part(v: Value, k: int) -> Value:
            return v.move(lambda u: u[:, k * size : (k + 1) * size])

        if kind == "LSTM":
            i, f, g, o = (part(of_h + of_x, k) for k in range(4))
            c = f.act(torch.sigmoid) * c + i.act(torch.sigmoid) * g.act(torch.tanh)
            h = o.act(torch.sigmoid) * c.act(torch.tanh)
        elif kind == "GRU":
            reset, keep = ((part(of_h, k) + part(of_x, k)).act(torch.sigmoid) for k in range(2))
            new = (part(of_x, 2) + reset * part(of_h, 2)).act(torch.tanh)
            h = (h - new) * keep + new
        else:
            h = (of_h + of_x).act(getattr(torch, kind))
    return h


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_oracle(kind: str) -> None:
    """The input and the states at the start, all explained."""

    def last(s: Any, x: Tensor, h: Tensor, *c: Tensor) -> Tensor:
        state = (h[None], c[0][None]) if c else h[None]
        return s.o(s.l(x, state)[0][:, -1])

    model = frozen(of(last, l=KINDS[kind](3, 4, batch_first=True), o=nn.Linear(4, 3)))
    inputs = (draw(2, 3, 3), draw(2, 4), *([draw(2, 4)] if kind == "LSTM" else []))

    def twin(x: Value, h: Value, c: Value | None = None) -> Value:
        return steps_of_values(model.l, kind, x, h, c).dense(model.o)

    agrees(twin, model, *inputs)
    expected = explain(twin, inputs, [0, 2])
    for mine, theirs in zip(all_paths(model, inputs, [0, 2]), expected, strict=True):
        assert relative_error(mine, theirs) <= 1e-8


# ---- written out -------------------------------------------------------------------------------


class WrittenOut(nn.Module):
    """A stack of recurrent layers, step by step in operations that have rules of their own."""

    def __init__(self, layers: nn.RNNBase) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        own = self.layers
        x = x.transpose(0, 1) if own.batch_first else x
        directions = 2 if own.bidirectional else 1
        size = own.proj_size or own.hidden_size
        if state is None:
            zeros = [x.new_zeros(own.num_layers * directions, x.shape[1], n)
                     for n in (size, own.hidden_size)]  # fmt: skip
            state = tuple(zeros) if isinstance(own, nn.LSTM) else zeros[0]
        states = state if isinstance(state, tuple) else (state,)
        ended: list[tuple[Tensor, ...]] = []
        for layer in range(own.num_layers):
            outputs = []
            for direction in range(directions):
                start = [s[layer * directions + direction] for s in states]
                found, end = self.one(x, start, f"l{layer}" + "_reverse" * direction)
                outputs.append(found)
                ended.append(end)
            x = torch.cat(outputs, -1)
        ends = tuple(torch.stack(some) for some in zip(*ended, strict=True))
        x = x.transpose(0, 1) if own.batch_first else x
        return x, ends if isinstance(own, nn.LSTM) else ends[0]

    def one(
        self, x: Tensor, state: Sequence[Tensor], name: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        def weight(kind: str) -> Any:
            return getattr(self.layers, f"{kind}_{name}", None)

        order = range(len(x))
        outputs: list[Any] = [None] * len(x)
        for t in reversed(order) if name.endswith("reverse") else order:
            of_x = F.linear(x[t], weight("weight_ih"), weight("bias_ih"))
            of_h = F.linear(state[0], weight("weight_hh"), weight("bias_hh"))
            state = self.step(of_x, of_h, state, weight("weight_hr"))
            outputs[t] = state[0]
        return torch.stack(outputs), tuple(state)

    def step(
        self, of_x: Tensor, of_h: Tensor, state: Sequence[Tensor], last: Any
    ) -> tuple[Tensor, ...]:
        if isinstance(self.layers, nn.LSTM):
            i, f, g, o = (of_h + of_x).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (h if last is None else F.linear(h, last), c)
        if isinstance(self.layers, nn.GRU):
            (a, b, d), (p, q, s) = of_x.chunk(3, -1), of_h.chunk(3, -1)
            reset, keep = (p + a).sigmoid(), (q + b).sigmoid()
            new = (d + reset * s).tanh()
            return ((state[0] - new) * keep + new,)
        return (getattr(of_h + of_x, self.layers.nonlinearity)(),)


def compared(
    forward: Callable[..., Tensor], layers: nn.RNNBase, head: nn.Linear, inputs: Any, more: Any = ()
) -> None:
    """The same by the layer and written out."""
    whole = frozen(of(forward, l=layers, o=head))
    written = frozen(of(forward, l=WrittenOut(layers), o=head))
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if more:  # of the samples too
        found, delta = RelativeLRP(whole).attribute(inputs, [0, 2], more, True)
        assert delta.max() <= 1e-10
    else:
        found = all_paths(whole, inputs, [0, 2])
    expected = RelativeLRP(written).attribute(inputs, [0, 2], more or None)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.any()
        assert relative_error(mine, theirs) <= 1e-9


STACKS: dict[str, dict[str, Any]] = {
    "two, both ways": {"num_layers": 2, "bidirectional": True},
    "without biases": {"bias": False},
    "steps first": {"batch_first": False, "bidirectional": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", STACKS)
def test_written_out(kind: str, stack: str) -> None:
    options = {"batch_first": True, **STACKS[stack]}
    layers = KINDS[kind](3, 4, **options)
    head = nn.Linear(8 if layers.bidirectional else 4, 3)
    first = options["batch_first"]

    def forward(s: Any, x: Tensor) -> Tensor:
        found = s.l(x if first else x.transpose(0, 1))[0]
        return s.o(found[:, 2] if first else found[2])

    compared(forward, layers, head, draw(2, 4, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("features", "hidden"), [(1, 4), (3, 1)])
def test_one_feature_passes_relevance(kind: str, features: int, hidden: int) -> None:
    """Dense maps of one input share nothing (§2)."""
    layers = KINDS[kind](features, hidden, 2, bidirectional=True, batch_first=True)
    compared(
        lambda s, x: s.o(s.l(x)[0].flatten(1)),
        layers, nn.Linear(8 * hidden, 3), draw(2, 4, features),
    )  # fmt: skip


@pytest.mark.parametrize("proj_size", [1, 2])
def test_projected_states(proj_size: int) -> None:
    layers = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, proj_size=proj_size)
    compared(lambda s, x: s.o(s.l(x)[0][:, 1]), layers, nn.Linear(2 * proj_size, 3), draw(2, 4, 3))


def states_of(s: Any, x: Tensor) -> Tensor:
    found = s.l(x)[1]
    found = torch.cat(found, -1) if isinstance(found, tuple) else found
    return s.o(found.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("kind", KINDS)
def test_states_at_the_end(kind: str) -> None:
    layers = KINDS[kind](3, 4, 2, batch_first=True, bidirectional=True)
    compared(states_of, layers, nn.Linear(32 if kind == "LSTM" else 16, 3), draw(2, 4, 3))


@pytest.mark.parametrize(
    ("kind", "explained"),
    [("LSTM", e) for e in ("xhc", "xh", "xc", "hc", "x", "h", "c")]
    + [(kind, e) for kind in ("GRU", "tanh") for e in ("xh", "x", "h")],
)
def test_states_at_the_start(kind: str, explained: str) -> None:
    """Whichever of them are explained; the others are constants."""
    given = {"x": draw(2, 3, 3), "h": draw(2, 4, 4), "c": draw(2, 4, 4)}
    names = [*explained, *(n for n in given if n not in explained)]

    def forward(s: Any, *args: Tensor) -> Tensor:
        named = dict(zip(names, args, strict=True))
        h, c = (named[n].transpose(0, 1).contiguous() for n in "hc")
        return s.o(s.l(named["x"], (h, c) if kind == "LSTM" else h)[0][:, 1])

    layers = KINDS[kind](3, 4, 2, batch_first=True, bidirectional=True)
    inputs = tuple(given[n] for n in explained)
    more = tuple(given[n] for n in names[len(explained) :])
    compared(forward, layers, nn.Linear(8, 3), inputs, more)


def test_encoder_and_decoder() -> None:
    """States at the end of one are those at the start of the other."""

    def forward(s: Any, x: Tensor) -> Tensor:
        _, state = s.l(x)
        return s.o(s.l(x.flip(1), state)[0][:, -1])

    compared(forward, nn.LSTM(3, 4, 2, batch_first=True), nn.Linear(4, 3), draw(2, 4, 3))


# ---- what is around them -----------------------------------------------------------------------


def last_step(s: Any, x: Tensor) -> Tensor:
    return s.o(s.l(x)[0][:, -1])


def test_a_layer_is_one_call(captured_once: list[CapturedGraph]) -> None:
    layers = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
    model = of(last_step, l=layers, o=nn.Linear(8, 3))
    RelativeLRP(model).attribute(torch.randn(2, 200, 3), 0)
    (graph,) = captured_once
    assert sum(node.target is RECURRENT for node in graph.nodes) == 2
    assert len(graph.nodes) < 60


def test_relevance_of_the_layer() -> None:
    """It arrives at the outputs, before it goes through the steps."""
    model = frozen(of(last_step, l=nn.GRU(3, 4, batch_first=True), o=nn.Linear(4, 3)))
    x = draw(2, 5, 3)
    relevance = LayerRelativeLRP(model, model.o).attribute(x, 0, attribute_to_layer_input=True)
    expected = model.l(x)[0][:, -1] * model.o.weight[0]
    expected = expected / expected.abs().sum(1, keepdim=True)
    torch.testing.assert_close(relevance, expected)


def test_gates_beyond_float32() -> None:
    """They are worked out in float64: a saturated gate is no error."""
    model = of(last_step, l=nn.LSTM(3, 4, batch_first=True), o=nn.Linear(4, 3))
    with torch.no_grad():
        model.l.weight_ih_l0[:4] *= 1e38
    x = 10 * torch.randn(2, 3, 3)
    found = RelativeLRP(model).attribute(x, 0)
    expected = RelativeLRP(model.double()).attribute(x.double(), 0)
    assert relative_error(found, expected) <= 1e-4


def test_weights_that_are_not_finite() -> None:
    model = of(last_step, l=nn.LSTM(3, 4, batch_first=True), o=nn.Linear(4, 3))
    with torch.no_grad():
        model.l.weight_hh_l0[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="module 'l'"):
        RelativeLRP(model).attribute(torch.randn(2, 3, 3), 0)
