"""Models the way people have them: their outputs, their inputs, what carries them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_rlrp import CaptureError, InputError, LayerRelativeLRP, RelativeLRP, RelativeLRPError

from .small import agree, explained, mlp, of, rows

X = rows()
S = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(2))


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "o": nn.Linear(4, 2)}


# ---- outputs -------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", ["task", "aux"])


@dataclasses.dataclass
class Outputs:
    task: Tensor
    aux: Tensor


RETURNS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "dict": (lambda t, a: {"task": t, "loss": None, "aux": a}, "task"),
    "tuple": (lambda t, a: (a, t), 1),
    "from the end": (lambda t, a: [a, t], -1),
    "named tuple": (Pair, "task"),
    "dataclass": (Outputs, "task"),
    "function": (lambda t, a: {"aux": a, "deep": [t]}, lambda out: out["deep"][0]),
    "one tensor": (lambda t, a: {"task": t, "loss": None}, None),
}


@pytest.mark.parametrize("kind", RETURNS)
def test_the_output_that_is_asked_for(kind: str) -> None:
    made, output = RETURNS[kind]
    own = layers()
    model = of(lambda s, x: made(s.o(s.a(x).relu()), s.b(x)), **own)
    plain = of(lambda s, x: s.o(s.a(x).relu()), **own)
    agree(RelativeLRP(model, output=output).attribute(X, 0), explained(plain, X))
    layer = LayerRelativeLRP(model, model.a, output=output)
    agree(layer.attribute(X, 0), LayerRelativeLRP(plain, plain.a).attribute(X, 0))


@pytest.mark.parametrize("output", [None, "wrong", 7, "loss"])
def test_an_ambiguous_output_lists_the_names(output: Any) -> None:
    model = of(lambda s, x: {"task": s.o(x), "loss": None, "aux": s.a(x)}, **layers())
    with pytest.raises(InputError, match=r"'task'(.|\n)*'aux'"):
        RelativeLRP(model, output=output).attribute(X, 0)


# ---- inputs --------------------------------------------------------------------------------------


def table() -> nn.Module:
    torch.manual_seed(0)
    return of(
        lambda s, c, x: s.o(torch.cat([s.e(c[:, 0]), s.g(c[:, 1]), x], 1).relu()),
        e=nn.Embedding(7, 3),
        g=nn.Embedding(5, 3),
        o=nn.Linear(10, 2),
    )


def test_integer_columns_beside_floating_ones() -> None:
    model, columns = table(), torch.tensor([[1, 2], [6, 0], [3, 4]])
    of_columns, of_numbers = explained(model, (columns, X))
    assert of_columns.shape == (3, 2)
    assert of_columns.dtype == torch.float32
    first, second = LayerRelativeLRP(model, [model.e, model.g]).attribute(
        columns, 0, additional_forward_args=X
    )
    agree(of_columns, torch.stack([first.sum(1), second.sum(1)], 1))
    agree(of_numbers, explained(model, (columns, X))[1])
    alone = [explained(model, (columns[i : i + 1], X[i : i + 1]))[0] for i in range(3)]
    agree(torch.cat(alone), of_columns)


def test_one_table_with_offsets_and_a_cast() -> None:
    offsets = torch.tensor([0, 7])
    own = {"e": nn.Embedding(12, 3), "o": nn.Linear(6, 2)}
    model = of(lambda s, c: s.o(s.e(c.long() + offsets).flatten(1).relu()), **own)
    columns = torch.tensor([[1, 2], [6, 0]], dtype=torch.int32)
    each = explained(model, columns)
    agree(each, LayerRelativeLRP(model, model.e).attribute(columns, 0).sum(2))


def test_one_hot_columns() -> None:
    model = of(lambda s, c: s.o(F.one_hot(c, 5).float().flatten(1)), o=nn.Linear(10, 2))
    each = explained(model, torch.tensor([[1, 2], [4, 0]]))
    assert each.shape == (2, 2)
    assert (each != 0).all()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_length(mode: str) -> None:
    own = {"e": nn.EmbeddingBag(9, 4, mode=mode), "o": nn.Linear(4, 2)}
    model = of(lambda s, c: s.o(s.e(c).relu()), **own)
    columns = torch.tensor([[1, 2, 3], [6, 0, 8]])
    bags = LayerRelativeLRP(model, model.e).attribute(columns, 0)
    each = explained(model, columns)
    assert each.shape == (2, 3)
    agree(each.sum(1), bags.sum(1))


def test_bags_with_offsets() -> None:
    own = {"e": nn.EmbeddingBag(9, 4, mode="sum"), "o": nn.Linear(4, 2)}
    model = of(lambda s, i, o, x: s.o(s.e(i, o) + x), **own)
    rest = (torch.tensor([0, 2, 5]), X)
    indices = torch.randint(0, 9, (7,))
    bags = LayerRelativeLRP(model, model.e).attribute(indices, 0, additional_forward_args=rest)
    assert bags.shape == (3, 4)


def test_unused_inputs_get_zeros() -> None:
    model = of(lambda s, x, y, c: s.o(x), o=nn.Linear(4, 3))
    used, unused, integers = explained(model, (X, torch.randn(3, 6), torch.ones(3, 2).long()))
    assert used.abs().sum() > 0
    assert unused.shape == (3, 6)
    assert not unused.any()
    assert not integers.any()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, right: Tensor, left: Tensor | None = None, scale: float = 1.0) -> Tensor:
        assert left is not None
        return (self.a(left) + self.b(right)).relu() * scale


def test_a_dict_of_inputs_goes_by_name() -> None:
    model = Named().eval()
    found = explained(model, {"left": X, "right": X * 2})
    right, left = explained(model, (X * 2, X))
    assert list(found) == ["left", "right"]
    agree(found["left"], left)
    agree(found["right"], right)


def test_a_dict_of_inputs_goes_as_one_where_forward_takes_one() -> None:
    model = of(lambda s, batch: s.o(batch["x"] + batch["y"]), o=nn.Linear(4, 2))
    found = explained(model, {"x": X, "y": X + 1})
    assert set(found) == {"x", "y"}


def test_a_wrapper_that_hands_arguments_on() -> None:
    class Wrapper(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.base(x, *args, **kwargs)

    base = of(lambda s, x, y: s.o(x) + y, o=nn.Linear(4, 3))
    rest = (torch.randn(3, 3),)
    expected = explained(base, X, 1, additional_forward_args=rest)
    agree(explained(Wrapper(base).eval(), X, 1, additional_forward_args=rest), expected)


def test_a_batch_of_one_that_the_model_cuts() -> None:
    model = of(lambda s, x: torch.relu(s.o(x))[0].unsqueeze(0), o=nn.Linear(4, 3))
    living = RelativeLRP(model)
    assert living.attribute(X[:1], 0).abs().sum() > 0
    with pytest.raises(RelativeLRPError):
        living.attribute(X, 0)


@pytest.mark.parametrize(
    "bad",
    [X.double(), X[:, :3], X.to_sparse(), torch.nested.nested_tensor([X[0], X[1]]), X.to("meta")],
    ids=["dtype", "shape", "sparse", "nested", "meta"],
)
def test_inputs_that_do_not_fit(bad: Tensor) -> None:
    with pytest.raises(InputError, match=r"expects 4 features|dense|meta device"):
        explained(mlp(), bad)


@pytest.mark.parametrize("bad", [torch.tensor([[1, 10]]), torch.tensor([[1.0, 2.0]])], ids=str)
def test_tokens_that_do_not_fit(bad: Tensor) -> None:
    model = of(lambda s, t: s.o(s.e(t)).sum(1), e=nn.Embedding(10, 4), o=nn.Linear(4, 2))
    with pytest.raises(InputError, match=r"e \(Embedding\), expects integers from 0 to 9"):
        explained(model, bad)


@pytest.mark.parametrize("size", [0, -1, 1.5, "all"])
def test_a_wrong_internal_batch_size(size: Any) -> None:
    with pytest.raises(InputError, match="internal_batch_size"):
        explained(mlp(), X, internal_batch_size=size)


# ---- samples that are mixed ----------------------------------------------------------------------

MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: h.softmax(0),
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "sort": lambda h: h.sort(0).values,
    "cumsum": lambda h: h.cumsum(0),
    "share": lambda h: h / h.sum(0),
    "products": lambda h: torch.softmax(h @ h.t(), -1) @ h,
    "first": lambda h: h - h[:1],
    "largest": lambda h: h / h.abs().max(),
}


@pytest.mark.parametrize("kind", MIXES)
@pytest.mark.parametrize("first", [3, 1])
def test_mixed_samples_are_an_error(kind: str, first: int) -> None:
    """Whether the model was captured with several samples or with one."""
    model = of(lambda s, x: s.o(MIXES[kind](s.a(x).sigmoid())), **layers())
    living = RelativeLRP(model)
    if first == 1:
        with contextlib.suppress(CaptureError):
            living.attribute(X[:1], 0)
    with pytest.raises(CaptureError, match=r"mix|told apart"):
        living.attribute(X, 0)


def test_weights_as_long_as_the_batch() -> None:
    model = of(lambda s, x, w: s.o((x * w).relu()), o=nn.Linear(3, 2))
    x, weights = torch.randn(3, 3), torch.tensor([1.0, -5.0, 0.2])
    whole = explained(model, x, additional_forward_args=(weights,))
    parts = explained(model, x, additional_forward_args=(weights,), internal_batch_size=1)
    agree(parts, whole)
    for i in range(3):
        alone = explained(model, x[i : i + 1], additional_forward_args=(weights,))
        agree(whole[i : i + 1], alone)


def test_a_forward_that_asks_for_the_length() -> None:
    model = of(lambda s, x: s.a(x) if len(x) > 2 else s.b(x), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    with pytest.raises(CaptureError, match="number of samples"):
        explained(model, torch.cat([X, X]), 1)


def test_batch_norm_without_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with pytest.raises(RelativeLRPError, match=r"1 \(BatchNorm1d\)"):
        explained(model, X)


# ---- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_several_targets_in_one_forward(backend: Any) -> None:
    model = mlp()
    one_by_one = [RelativeLRP(model, backend).attribute(X, t) for t in range(3)]
    explainer = RelativeLRP(model, backend)
    agree(explainer.attribute(X, range(3)), torch.stack(one_by_one, 1))
    own, delta = explainer.attribute(X, [[0, 2], [1, 1], [2, 0]], return_convergence_delta=True)
    assert own.shape == (3, 2, 4)
    assert delta.shape == (3, 2)
    agree(own[1, 0], one_by_one[1][1])
    layer = LayerRelativeLRP(model, model[0]).attribute(X, range(2))
    assert layer.shape == (3, 2, 8)
    with pytest.raises(InputError, match="lists"):
        explainer.attribute(X, [[0], [1, 2], [0]])


def test_several_targets_of_images() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    ).eval()  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    agree(explained(model, x, range(3))[:, 2], explained(model, x, 2))


def test_a_region() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    x, mask = torch.randn(2, 1, 6, 6), torch.zeros(6, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    summed = of(lambda s, x: (s.body(x)[:, 1] * mask).sum((1, 2)), body=body)
    expected = explained(summed, x, None)
    agree(explained(body, x, (1, mask)), expected)
    agree(explained(body, x, (1, mask.expand(2, -1, -1))), expected)


@pytest.mark.parametrize(
    "pick",
    [
        lambda s, x, y: s.o(x).gather(1, y[:, None]),
        lambda s, x, y: s.o(x)[torch.arange(x.shape[0]), y],
    ],
)
def test_the_score_of_a_given_class(pick: Any) -> None:
    own = {"o": nn.Linear(4, 3)}
    classes = torch.tensor([0, 2, 1])
    found = explained(of(pick, **own), X, None, additional_forward_args=(classes,))
    agree(found, explained(own["o"].eval(), X, classes))


# ---- carriers ------------------------------------------------------------------------------------

CARRIERS: dict[str, Callable[[nn.Module], Any]] = {
    "fx": torch.fx.symbolic_trace,
    "exported": lambda m: torch.export.export(m, (X,)).module(),
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_carriers(carrier: str) -> None:
    model = mlp()
    agree(explained(CARRIERS[carrier](model), X), explained(model, X))


NORMS = [
    nn.utils.weight_norm,
    nn.utils.spectral_norm,
    nn.utils.parametrizations.weight_norm,
    nn.utils.parametrizations.spectral_norm,
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("norm", NORMS)
def test_normalised_weights(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)).eval()
    model(X)
    plain = mlp()
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[0].bias.copy_(model[0].bias)
        plain[2].load_state_dict(model[2].state_dict())
    agree(explained(model, X), explained(plain, X))


class Quantised(nn.Module):
    """A linear layer whose weight is kept in 8 bits."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_quantised_weights() -> None:
    model = mlp()
    expected = explained(model, X)
    quantised = nn.Sequential(Quantised(model[0]), nn.ReLU(), Quantised(model[2])).eval()
    agree(explained(quantised, X), expected, 0.05)


def test_torchscript_says_what_to_do() -> None:
    with pytest.raises(CaptureError, match="Python module"):
        RelativeLRP(torch.jit.trace(mlp(), X))


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_say_what_to_do() -> None:
    packed = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, torch.qint8)
    with pytest.raises(CaptureError, match="as it was before"):
        explained(packed, X[:1])


def test_sharded_parameters_say_what_to_do() -> None:
    class FSDPModule(nn.Module):
        pass

    with pytest.raises(CaptureError, match="full state dict"):
        RelativeLRP(nn.Sequential(FSDPModule()))


# ---- sequences -----------------------------------------------------------------------------------

LENGTHS = torch.tensor([5, 3, 2])
T = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(("number", "both"), [(1, False), (2, True)])
def test_packed_sequences(kind: Any, number: int, both: bool) -> None:
    """Each is explained as it is by itself, without its padding."""

    def packed(s: Any, x: Tensor, n: Tensor) -> Tensor:
        sequence = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        output, state = s.l(sequence)
        output, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        state = state[0] if isinstance(state, tuple) else state
        return s.o(output.sum(1) + torch.cat([*state[-2 if both else -1 :]], 1))

    def plain(s: Any, x: Tensor) -> Tensor:
        output, state = s.l(x)
        state = state[0] if isinstance(state, tuple) else state
        return s.o(output.sum(1) + torch.cat([*state[-2 if both else -1 :]], 1))

    torch.manual_seed(0)
    own = {
        "l": kind(4, 6, number, batch_first=True, bidirectional=both),
        "o": nn.Linear(12 if both else 6, 2),
    }
    found = explained(of(packed, **own), T, additional_forward_args=(LENGTHS,))
    alone = of(plain, **own)
    for i, length in enumerate(LENGTHS.tolist()):
        assert not found[i, length:].any()
        agree(found[i : i + 1, :length], explained(alone, T[i : i + 1, :length]), 1e-3)


@pytest.mark.parametrize("by", ["gather", "index"])
def test_the_last_valid_step(by: str) -> None:
    def last(s: Any, x: Tensor, n: Tensor) -> Tensor:
        output = s.l(x)[0]
        if by == "index":
            return s.o(output[torch.arange(x.shape[0]), n - 1])
        return s.o(output.gather(1, (n - 1)[:, None, None].expand(-1, 1, 6)).squeeze(1))

    model = of(last, l=nn.LSTM(4, 6, batch_first=True), o=nn.Linear(6, 2))
    found = explained(model, T, additional_forward_args=(LENGTHS,))
    for i, length in enumerate(LENGTHS.tolist()):
        assert found[i].abs().sum() > 0
        assert not found[i, length:].any()


# ---- operations written out ----------------------------------------------------------------------

WRITTEN_OUT: dict[str, Callable[..., Tensor]] = {
    "var": lambda s, x: s.a(x).var(1, keepdim=True),
    "std": lambda s, x: torch.cat([s.a(x), s.a(x).std(1, keepdim=True, correction=0)], 1),
    "norm": lambda s, x: s.a(x).norm(dim=1, keepdim=True),
    "norm 1": lambda s, x: s.a(x).norm(p=1, dim=1, keepdim=True),
    "norm 3": lambda s, x: s.a(x).norm(p=3, dim=1, keepdim=True),
    "norm inf": lambda s, x: torch.linalg.vector_norm(s.a(x), float("inf"), dim=1, keepdim=True),
    "logsumexp": lambda s, x: s.a(x).logsumexp(1, keepdim=True),
    "logaddexp": lambda s, x: torch.logaddexp(s.a(x), s.b(x)),
    "cosine": lambda s, x: F.cosine_similarity(s.a(x), s.b(x)).unsqueeze(1),
    "pairs": lambda s, x: F.pairwise_distance(s.a(x), s.b(x), keepdim=True),
    "cdist": lambda s, x: -torch.cdist(s.a(x), s.o.weight),
    "lerp": lambda s, x: torch.lerp(s.a(x), s.b(x), 0.3),
    "addcmul": lambda s, x: torch.addcmul(s.a(x), s.b(x), s.b(x), value=2),
    "addcdiv": lambda s, x: torch.addcdiv(s.a(x), s.b(x), s.b(x).exp()),
    "bilinear": lambda s, x: F.bilinear(s.a(x), s.b(x), torch.ones(2, 4, 4)),
    "prod": lambda s, x: s.a(x).sigmoid().prod(1, keepdim=True),
    "cumprod": lambda s, x: s.a(x).sigmoid().cumprod(1),
    "scatter_add": lambda s, x: x.new_zeros(x.shape[0], 2).scatter_add(
        1, torch.tensor([0, 1, 1, 0]).expand(x.shape[0], 4), s.a(x)
    ),
    "index_add": lambda s, x: s.b(x)[:, :2].index_add(1, torch.tensor([0, 1, 1, 0]), s.a(x)),
    **{
        f"scatter {kind}": lambda s, x, kind=kind: x.new_zeros(x.shape[0], 2).scatter_reduce(
            1, torch.tensor([0, 1, 1, 0]).expand(x.shape[0], 4), s.a(x), kind, include_self=False
        )
        for kind in ("sum", "mean", "amax")
    },
    "repeat_interleave": lambda s, x: s.a(x).repeat_interleave(3, 0).view(-1, 12)[:, :3],
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_operations_written_out(name: str) -> None:
    """They compute what the operation does, and every sample is explained as it is alone."""
    model = of(WRITTEN_OUT[name], **layers())
    whole, delta = explained(model, X, return_convergence_delta=True)
    assert whole.abs().sum() > 0
    assert delta.max() < 1e-4
    agree(RelativeLRP(model, backend="reference").attribute(X, 0), whole)
    agree(explained(model, X[1:2]), whole[1:2], 1e-3)


def test_equal_factors_take_equal_parts() -> None:
    model = of(lambda s, x: x.prod(1, keepdim=True))
    agree(explained(model, X).abs(), torch.full((3, 4), 0.25))


# ---- graph networks ------------------------------------------------------------------------------


class GraphNetwork(nn.Module):
    """Two rounds of messages, and the mean of each graph's nodes, as graph libraries write them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def spread(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        messages = x.index_select(0, source)
        index = target[:, None].expand_as(messages)
        return torch.zeros_like(x).scatter_add(0, index, messages)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor, count: int) -> Tensor:
        x = self.spread(self.first(x), edges).relu()
        x = self.spread(self.second(x), edges).relu()
        zeros = x.new_zeros(count, x.shape[1])
        index = graph[:, None].expand_as(x)
        return self.head(zeros.scatter_reduce(0, index, x, "mean", include_self=False))


def test_graphs_with_a_batch_vector() -> None:
    torch.manual_seed(0)
    model = GraphNetwork().eval()
    a = (torch.randn(4, 4), torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]]))
    b = (torch.randn(3, 4), torch.tensor([[0, 1, 2], [1, 0, 0]]))
    alone = [
        explained(model, x, 1, additional_forward_args=(edges, torch.zeros(len(x)).long(), 1))
        for x, edges in (a, b)
    ]
    edges = torch.cat([a[1], b[1] + 4], 1)
    graph = torch.tensor([0] * 4 + [1] * 3)
    both, delta = explained(
        model,
        torch.cat([a[0], b[0]]),
        1,
        additional_forward_args=(edges, graph, 2),
        return_convergence_delta=True,
    )
    assert all(part.abs().sum() > 0 for part in alone)
    assert delta.shape == (2,)
    agree(both, torch.cat(alone))


def test_a_sparse_matrix_says_what_to_do() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(4).to_sparse())
            self.head = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.adjacency, self.head(x)).relu()

    with pytest.raises(CaptureError, match=r"adjacency is sparse; keep it dense, by to_dense\(\)"):
        RelativeLRP(Graph().eval()).attribute(torch.rand(4, 5), target=0)
