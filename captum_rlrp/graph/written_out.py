"""Composite operations written out, in operations that have rules."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .nodes import bind, dependents
from .spectra import has_complex, is_written_out, write_out_complex

aten = torch.ops.aten

Arguments = dict[str, Any]
HasRule = Callable[[Any], bool]


def write_out(graph: Graph, inputs: Sequence[Node], has_rule: HasRule) -> None:
    """Writes out every composite operation that the inputs reach.

    Args:
        graph: The graph, changed in place.
        inputs: What the user passed.
        has_rule: Whether relevance can cross calls of an op; what it cannot cross is written out
            as PyTorch itself does, where it does.
    """
    _write_out_known(graph, inputs, list(graph.nodes))
    _write_out_known(graph, inputs, _decompose(graph, inputs, has_rule))
    write_out_complex(graph, inputs, _traced_of)


def _write_out_known(graph: Graph, inputs: Sequence[Node], nodes: Sequence[Node]) -> None:
    """Writes out those of these nodes that stand in the table below."""
    depends = dependents(graph.nodes, inputs)
    for node in nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node not in depends:
            continue
        if packet is aten.embedding_bag:
            rows = _rows_of_bags(node)
            if rows is not None:
                _replace(graph, node, _traced(graph, node, _embedding_bag, {"indices": rows}))
        elif packet in WRITTEN_OUT:
            _replace(graph, node, _traced(graph, node, WRITTEN_OUT[packet]))


def _decompose(graph: Graph, inputs: Sequence[Node], has_rule: HasRule) -> list[Node]:
    """Writes out what has no rule by PyTorch's own decompositions, if these lead to rules.

    Returns:
        The new nodes.
    """
    before = set(graph.nodes)
    depends = dependents(graph.nodes, inputs)
    table = {op: f for op, f in decomposition_table.items() if not has_rule(op)}
    for node in list(graph.nodes):
        target = node.target
        if node not in depends or not isinstance(target, OpOverload) or has_rule(target):
            continue
        if is_written_out(target) or (target not in table and not target._can_decompose()):
            continue

        def call(a: Arguments, target: OpOverload = target) -> Any:
            return target(*a["args"], **a["kwargs"])

        with contextlib.suppress(Exception):  # not every decomposition takes symbolic sizes
            traced, nodes = _trace(call, {"args": node.args, "kwargs": {**node.kwargs}}, table)
            if _crosses(traced, has_rule):
                _replace(graph, node, _insert(graph, node, traced, nodes))
    return [node for node in graph.nodes if node not in before]


def _crosses(traced: Graph, has_rule: HasRule) -> bool:
    """Whether relevance can cross what was written out."""
    slots = [node for node in traced.nodes if node.op == "placeholder"]
    depends = dependents(traced.nodes, slots).difference(slots)
    return all(
        has_rule(node.target) or getattr(node.target, "overloadpacket", None) in WRITTEN_OUT
        for node in depends
        if isinstance(node.target, OpOverload)
        and _carries(node.meta.get("val"))
        and not any(has_complex(n.meta.get("val")) for n in (node, *node.all_input_nodes))
    )


def _carries(value: Any) -> bool:
    leaves = [v for v in tree_flatten(value)[0] if isinstance(v, Tensor)]
    return any(v.is_floating_point() for v in leaves)


def _traced(
    graph: Graph,
    node: Node,
    function: Callable[[Arguments], Any],
    overrides: Arguments | None = None,
) -> Any:
    """The calls that a function makes in place of a node."""
    return _traced_of(
        graph, node, function, {"padding_idx": None, **bind(node), **(overrides or {})}
    )


def _traced_of(
    graph: Graph, node: Node, function: Callable[[Arguments], Any], arguments: Arguments
) -> Any:
    traced, nodes = _trace(function, arguments)
    return _insert(graph, node, traced, nodes)


def _trace(
    function: Callable[[Arguments], Any], arguments: Arguments, table: Any = None
) -> tuple[Graph, list[Node]]:
    """The calls that a function makes, and the values that they begin with.

    With a table of decompositions they are those of PyTorch's own kernels.
    """
    leaves, spec = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]
    nodes = [leaves[i] for i in places]

    def written(*values: Any) -> Any:
        filled = list(leaves)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return function(tree_unflatten(filled, spec))

    traced = make_fx(written, table, pre_dispatch=table is None)(*(n.meta["val"] for n in nodes))
    return traced.graph, nodes


def _insert(graph: Graph, node: Node, traced: Graph, nodes: Sequence[Node]) -> Any:
    """Copies calls into the graph in front of a node, and returns what they result in."""
    slots = [n for n in traced.nodes if n.op == "placeholder"]
    copied = dict(zip(slots, nodes, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(traced, val_map=copied)  # notes what it copied
    notes = {key: value for key, value in node.meta.items() if key != "val"}
    for original, made in copied.items():
        if original not in slots:
            made.meta = {"val": original.meta.get("val"), **notes}
    return result


def _replace(graph: Graph, node: Node, result: Any) -> None:
    if isinstance(result, (tuple, list)):
        for user in list(node.users):
            if user.target is operator.getitem:
                index: Any = user.args[1]
                user.replace_all_uses_with(result[index])
                graph.erase_node(user)
    else:
        node.replace_all_uses_with(result)
    if not node.users:
        graph.erase_node(node)


# ---- recurrent cells --------------------------------------------------------------------------


def _gates(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Any = None, c: Any = None) -> Tensor:
    return nn.functional.linear(x, w, b) + nn.functional.linear(h, u, c)


def _weights(a: Arguments) -> Sequence[Any]:
    return a["w_ih"], a["w_hh"], a["b_ih"], a["b_hh"]


def _lstm_cell(a: Arguments) -> tuple[Tensor, Tensor]:
    i, f, g, o = _gates(a["input"], a["hx"][0], *_weights(a)).chunk(4, -1)
    c = f.sigmoid() * a["hx"][1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(a: Arguments) -> Tensor:
    w, u, b, c = _weights(a)
    of_x = nn.functional.linear(a["input"], w, b).chunk(3, -1)
    of_h = nn.functional.linear(a["hx"], u, c).chunk(3, -1)
    reset, keep = ((p + q).sigmoid() for p, q in zip(of_x[:2], of_h[:2], strict=True))
    new = (of_x[2] + reset * of_h[2]).tanh()
    return (a["hx"] - new) * keep + new


# ---- statistics and norms ---------------------------------------------------------------------


def _dims(a: Arguments) -> list[int]:
    x, dim = a["self"], a.get("dim")
    if dim is None or dim == []:
        return list(range(x.dim()))
    return [dim] if isinstance(dim, int) else list(dim)


def _variance(a: Arguments) -> Tensor:
    x, dims = a["self"], _dims(a)
    correction = a.get("correction", 1.0 if a.get("unbiased", True) else 0.0)
    correction = 1.0 if correction is None else correction
    count = 1
    for d in dims:
        count = count * x.shape[d]
    square = (x - x.mean(dims, keepdim=True)).square()
    return square.sum(dims, keepdim=bool(a.get("keepdim"))) / (count - correction)


def _mean(a: Arguments) -> Tensor:
    return a["self"].mean(_dims(a), keepdim=bool(a.get("keepdim")))


def _norm(a: Arguments) -> Tensor:
    x, dims, keep = a["self"], _dims(a), bool(a.get("keepdim"))
    p = a.get("ord", a.get("p", 2))
    p = 2.0 if p is None else float(p)
    if a.get("dtype") is not None:
        x = x.to(a["dtype"])
    if p == 2:
        return x.square().sum(dims, keepdim=keep).sqrt()
    if p == 1:
        return x.abs().sum(dims, keepdim=keep)
    if p == float("inf"):
        return x.abs().amax(dims, keepdim=keep)
    if p == float("-inf"):
        return x.abs().amin(dims, keepdim=keep)
    return x.abs().pow(p).sum(dims, keepdim=keep).pow(1 / p)


def _log_sum_exp(a: Arguments) -> Tensor:
    """Σ softmax(x) · logsumexp(x): exact, and shared as the exponentials are.

    The second factor is broadcast, so it is a gate.
    """
    x, dims = a["self"], _dims(a)
    total = torch.logsumexp(x, dims, keepdim=True)
    share = (x - total).exp() if len(dims) > 1 else x.softmax(dims[0])
    return (share * total).sum(dims, keepdim=bool(a.get("keepdim")))


def _running_log_sum_exp(a: Arguments) -> Tensor:
    """The same for every beginning of the axis."""
    x = a["self"].movedim(a["dim"], -1)
    size = x.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=x.device).triu(1)
    share = x.unsqueeze(-2).expand(*x.shape, size).masked_fill(later, float("-inf")).softmax(-1)
    return (share * x.logcumsumexp(-1).unsqueeze(-1)).sum(-1).movedim(-1, a["dim"])


def _broadcast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(x.shape, y.shape)
    return (x if x.shape == shape else x.expand(shape)), (
        y if y.shape == shape else y.expand(shape)
    )


def _cosine(a: Arguments) -> Tensor:
    """The norms are gates, as the statistics of a normalisation are."""
    dim, eps = a["dim"], a["eps"]
    x, y = _broadcast(a["x1"], a["x2"])

    def unit(v: Tensor) -> Tensor:
        return v * v.square().sum(dim, keepdim=True).sqrt().clamp_min(eps).reciprocal()

    return (unit(x) * unit(y)).sum(dim)


def _distances(a: Arguments) -> Tensor:
    difference = a["x1"].unsqueeze(-2) - a["x2"].unsqueeze(-3)
    return _norm({"self": difference, "p": a["p"], "dim": [-1]})


def _pair_distance(a: Arguments) -> Tensor:
    difference = a["x1"] - a["x2"] + a["eps"]
    return _norm({"self": difference, "p": a["p"], "dim": [-1], "keepdim": a["keepdim"]})


# ---- products ---------------------------------------------------------------------------------


def _product(a: Arguments) -> Tensor:
    """Equal factors take equal parts: the product, spread evenly over a sum.

    x⁰ is 1 whatever x is; the product is broadcast, so it is a gate.
    """
    x, dims = a["self"], _dims(a)
    if a.get("dim") is None:
        x, dims = x.flatten(), [0]
    whole = x.prod(dims[0], keepdim=True)
    return (x.pow(0) * whole).mean(dims, keepdim=bool(a.get("keepdim")))


def _running_product(a: Arguments) -> Tensor:
    """As the product, for every beginning of the axis."""
    dim = a["dim"] % a["self"].dim()
    x = a["self"].movedim(dim, -1)
    size = x.shape[-1]
    ones = torch.ones(size, size, dtype=x.dtype, device=x.device)
    part = ones.tril() / torch.arange(1, size + 1, dtype=x.dtype, device=x.device)[:, None]
    each = x.pow(0).unsqueeze(-2) * part
    return (each * x.cumprod(-1).unsqueeze(-1)).sum(-1).movedim(-1, dim)


def _interpolated(a: Arguments) -> Tensor:
    weight = a["weight"]
    return a["self"] * (1 - weight) + a["end"] * weight


def _plus_product(a: Arguments) -> Tensor:
    product = a["tensor1"] * a["tensor2"]
    return a["self"] + (product if a["value"] == 1 else product * a["value"])


def _plus_quotient(a: Arguments) -> Tensor:
    quotient = a["tensor1"] / a["tensor2"]
    return a["self"] + (quotient if a["value"] == 1 else quotient * a["value"])


def _bilinear(a: Arguments) -> Tensor:
    x, y, weight = a["input1"], a["input2"], a["weight"]
    outputs, first, second = weight.shape
    matrix = weight.permute(1, 0, 2).reshape(first, outputs * second)
    rows = (x @ matrix).unflatten(-1, (outputs, second))
    result = (rows @ y.unsqueeze(-1)).squeeze(-1)
    return result if a["bias"] is None else result + a["bias"]


def _repeated(a: Arguments) -> Tensor:
    """Every element so many times, as an expansion that keeps the order."""
    x, times, dim = a["self"], a["repeats"], a["dim"]
    if not isinstance(times, int):
        return torch.repeat_interleave(x, times, dim)
    if dim is None:
        x, dim = x.flatten(), 0
    dim = dim % x.dim()
    shape = (*x.shape[: dim + 1], times, *x.shape[dim + 1 :])
    return x.unsqueeze(dim + 1).expand(shape).flatten(dim, dim + 1)


def _unpacked(a: Arguments) -> Tensor:
    """A product with packed weights: what they make of unit vectors is the matrix."""
    x, weight, *more = (a[name] for name in ("self", "mat2", "qGroupSize", "qScaleAndZeros"))
    product = torch.ops.aten._weight_int4pack_mm
    if weight.dtype == torch.uint8:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return x @ product(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), weight, *more)


def _outer(a: Arguments) -> Tensor:
    other = a.get("vec2", a.get("other"))
    return a["self"].unsqueeze(-1) @ other.unsqueeze(-2)  # type: ignore[union-attr]


# ---- what adds up at indices ------------------------------------------------------------------


def _scatter_add(a: Arguments) -> Tensor:
    zeros = torch.zeros_like(a["self"])
    return a["self"] + zeros.scatter_add(a["dim"], a["index"], a["src"])


def _index_add(a: Arguments) -> Tensor:
    """Adds whole slices: the same as adding their elements one by one."""
    source = a["source"] if a["alpha"] == 1 else a["source"] * a["alpha"]
    dim = a["dim"] % a["self"].dim()
    shape = [1] * source.dim()
    shape[dim] = -1
    index = a["index"].view(shape).expand(source.shape)
    return _scatter_add({"self": a["self"], "dim": dim, "index": index, "src": source})


def _index_reduce(a: Arguments) -> Tensor:
    source, dim = a["source"], a["dim"] % a["self"].dim()
    shape = [1] * source.dim()
    shape[dim] = -1
    index = a["index"].view(shape).expand(source.shape)
    return _scatter_reduce({**a, "dim": dim, "index": index, "src": source})


def _scatter(a: Arguments) -> Any:
    """Overwrites elements: what is written there, and the rest of what was there."""
    x, dim, index = a["self"], a["dim"], a["index"]
    ones = torch.ones_like(index, dtype=x.dtype)
    reached = torch.zeros_like(x).scatter_add(dim, index, ones) > 0
    if "src" not in a:
        return x.masked_fill(reached, a["value"])
    return torch.where(reached, torch.zeros_like(x).scatter_add(dim, index, a["src"]), x)


def _index_fill(a: Arguments) -> Tensor:
    x, dim = a["self"], a["dim"] % a["self"].dim()
    at = torch.arange(x.shape[dim], device=x.device)
    filled = (at[:, None] == a["index"]).any(1).view(-1, *[1] * (x.dim() - dim - 1))
    return torch.where(filled, a["value"], x)


def _quantile(a: Arguments) -> Tensor:
    """Between two neighbours in the order of size."""
    x, q, dim, kind = a["self"], a["q"], a["dim"], a["interpolation"]
    if dim is None:
        x, dim = x.flatten(), 0
    q = q if isinstance(q, Tensor) else torch.full((), q, dtype=x.dtype, device=x.device)
    rank = q.reshape(-1) * (x.shape[dim] - 1)
    low, high = (rank.round(), rank.round()) if kind == "nearest" else (rank.floor(), rank.ceil())
    weight = {"lower": 0.0, "nearest": 0.0, "higher": 1.0, "midpoint": 0.5}.get(kind, rank - low)
    ordered = x.sort(dim)[0].movedim(dim, -1)
    below, above = (ordered.index_select(-1, side.long()) for side in (low, high))
    result = below * (1 - weight) + above * weight
    result = result.movedim(-1, 0) if q.dim() else result.squeeze(-1)
    return result.unsqueeze(dim % x.dim() + q.dim()) if a["keepdim"] else result


def _embedding_bag(a: Arguments) -> Any:
    """Bags of one length: the sum, or mean, or largest, of their embeddings."""
    rows: Tensor = torch.nn.functional.embedding(a["indices"], a["weight"])
    kept = torch.ones_like(rows[..., :1])
    if a["padding_idx"] is not None:
        kept = (a["indices"] != a["padding_idx"]).to(rows.dtype).unsqueeze(-1)
    if a["per_sample_weights"] is not None:
        rows = rows * a["per_sample_weights"].reshape(a["indices"].shape).unsqueeze(-1)
    if a["mode"] == 2:
        return rows.masked_fill(kept == 0, float("-inf")).amax(1), None, None, None
    total = (rows * kept).sum(1)
    if a["mode"] == 1:
        total = total / kept.sum(1).clamp_min(1)
    return total, None, None, None


def _rows_of_bags(node: Node) -> Node | None:
    """The matrix of indices whose rows are the bags; None where the bags have offsets."""
    args = bind(node)
    indices, offsets = args["indices"], args["offsets"]
    rows = indices.args[0] if getattr(indices.target, "overloadpacket", None) in _FLATTENS else None
    is_matrix = isinstance(rows, Node) and rows.meta["val"].dim() == 2
    even = getattr(offsets.target, "overloadpacket", None) is aten.arange
    return rows if is_matrix and even and not args["include_last_offset"] else None


_FLATTENS = {aten.reshape, aten.view, aten.flatten, aten._unsafe_view}


def _scatter_reduce(a: Arguments) -> Tensor:
    x, dim, index, source = a["self"], a["dim"], a["index"], a["src"]
    includes, kind = a["include_self"], a["reduce"]
    base = x if includes else torch.zeros_like(x)
    if kind == "sum" and includes:
        return _scatter_add(a)
    count = torch.zeros_like(x).scatter_add(dim, index, torch.ones_like(source))
    reached = count > 0
    total = base + torch.zeros_like(x).scatter_add(dim, index, source)
    if kind == "sum":
        return torch.where(reached, total, x)
    if kind == "mean":
        mean = total / (count + 1 if includes else count.clamp_min(1))
        return mean if includes else torch.where(reached, mean, x)
    if kind in ("amax", "amin"):
        # Each winner gives its value, ties share it.
        best = torch.scatter_reduce(x, dim, index, source, kind, include_self=includes)
        wins = (source == best.gather(dim, index)).to(source.dtype)
        shares = torch.zeros_like(x).scatter_add(dim, index, wins)
        won = torch.zeros_like(x).scatter_add(dim, index, source * wins) / shares.clamp_min(1)
        return torch.where(shares > 0, won, x)
    return torch.scatter_reduce(x, dim, index, source, kind, include_self=includes)


WRITTEN_OUT: dict[Any, Callable[[Arguments], Any]] = {
    aten.lstm_cell: _lstm_cell,
    aten.gru_cell: _gru_cell,
    aten.rnn_tanh_cell: lambda a: _gates(a["input"], a["hx"], *_weights(a)).tanh(),
    aten.rnn_relu_cell: lambda a: _gates(a["input"], a["hx"], *_weights(a)).relu(),
    aten.var: _variance,
    aten.std: lambda a: _variance(a).sqrt(),
    aten.var_mean: lambda a: (_variance(a), _mean(a)),
    aten.std_mean: lambda a: (_variance(a).sqrt(), _mean(a)),
    aten.norm: _norm,
    aten.linalg_vector_norm: _norm,
    aten.logsumexp: _log_sum_exp,
    aten.logcumsumexp: _running_log_sum_exp,
    aten.cosine_similarity: _cosine,
    aten.cdist: _distances,
    aten._cdist_forward: _distances,
    aten.pairwise_distance: _pair_distance,
    aten.prod: _product,
    aten.cumprod: _running_product,
    aten.lerp: _interpolated,
    aten.addcmul: _plus_product,
    aten.addcdiv: _plus_quotient,
    aten.bilinear: _bilinear,
    aten.repeat_interleave: _repeated,
    aten.outer: _outer,
    aten.ger: _outer,
    aten.scatter_add: _scatter_add,
    aten.index_add: _index_add,
    aten.scatter_reduce: _scatter_reduce,
    aten.scatter: _scatter,
    aten.index_reduce: _index_reduce,
    aten.index_fill: _index_fill,
    aten.quantile: _quantile,
    aten.xlogy: lambda a: a["self"] * a["other"].log(),
    aten.special_xlogy: lambda a: a["self"] * a["other"].log(),
    aten._weight_int8pack_mm: lambda a: (
        a["self"] @ (a["mat2"].to(a["self"].dtype) * a["scales"][:, None]).t()
    ),
    aten._weight_int4pack_mm: _unpacked,
    aten._weight_int4pack_mm_for_cpu: _unpacked,
    aten.logaddexp: lambda a: _log_sum_exp(
        {"self": torch.stack(_broadcast(a["self"], a["other"]), -1), "dim": -1}
    ),
    aten.hypot: lambda a: (a["self"].square() + a["other"].square()).sqrt(),
}
