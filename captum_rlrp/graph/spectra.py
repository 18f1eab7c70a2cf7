"""Complex numbers written out as pairs of real ones, and Fourier transforms as what they are.

A transform is a linear map of positions whose coefficients are cosines and sines: a convolution
with them, as wide as the axis. Its law is that of convolutions, then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves, tree_map

from .nodes import bind, dependents

aten = torch.ops.aten

Arguments = dict[str, Any]
Insert = Callable[[Graph, Node, Callable[[Arguments], Any], Arguments], Any]


class Pair(NamedTuple):
    """A complex number: tensors, or the nodes that stand for them."""

    real: Any
    imag: Any


def write_out_complex(graph: Graph, inputs: Sequence[Node], insert: Insert) -> None:
    """Writes out the complex numbers that the inputs reach.

    Args:
        graph: The graph, changed in place.
        inputs: What the user passed.
        insert: Puts what a function of arguments does in front of a node.
    """
    depends = dependents(graph.nodes, inputs)
    pairs: dict[Node, Pair] = {}

    def parts(node: Any) -> Any:
        if not (isinstance(node, Node) and _is_complex(node)):
            return node
        if node not in pairs:  # a constant
            pairs[node] = Pair(*insert(graph, node.next, _split, {"x": node}))
        return pairs[node]

    for node in list(graph.nodes):
        target = node.target
        if node not in depends or not isinstance(target, OpOverload):
            continue
        if not any(map(_is_complex, (node, *node.all_input_nodes))):
            continue
        arguments = bind(node)
        function = _WRITTEN_OUT.get(target.overloadpacket)
        if target.overloadpacket in _OF_EACH_PART:
            arguments, function = {"args": node.args, "kwargs": {**node.kwargs}}, _of_each(target)
        if function is None or any(
            n in depends and _is_complex(n) and n not in pairs for n in node.all_input_nodes
        ):
            continue  # refused later, by name
        result = insert(graph, node, _plain(function), tree_map(parts, arguments))
        if isinstance(result, tuple):
            pairs[node] = Pair(*result)
        else:
            node.replace_all_uses_with(result)


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def _split(a: Arguments) -> tuple[Tensor, Tensor]:
    return a["x"].real.clone(), a["x"].imag.clone()


def _plain(function: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
    """Returns pairs as what a graph can hold."""

    def run(a: Arguments) -> Any:
        result = function(a)
        return tuple(result) if _is_pair(result) else result

    return run


def _is_pair(value: Any) -> bool:
    return isinstance(value, Pair)


def _of_each(target: OpOverload) -> Callable[[Arguments], Pair]:
    """An op that treats the real and the imaginary part alike."""

    def run(a: Arguments) -> Pair:
        def of(part: str) -> Any:
            chosen = tree_map(lambda v: getattr(v, part) if _is_pair(v) else v, a, is_leaf=_is_pair)
            return target(*chosen["args"], **chosen["kwargs"])

        return Pair(of("real"), of("imag"))

    return run


def _pair(value: Any) -> Pair:
    if isinstance(value, Pair):
        return value
    return Pair(value.real, value.imag) if isinstance(value, complex) else Pair(value, None)


def _bilinear(f: Callable[[Any, Any], Tensor], x: Any, y: Any) -> Pair:
    """(a + ib)(c + id) for any product."""
    (a, b), (c, d) = _pair(x), _pair(y)
    if b is None:
        return Pair(f(a, c), f(a, d))
    if d is None:
        return Pair(f(a, c), f(b, c))
    return Pair(f(a, c) - f(b, d), f(a, d) + f(b, c))


def _einsum(a: Arguments) -> Pair:
    x, y = a["tensors"]
    return _bilinear(lambda u, v: torch.einsum(a["equation"], u, v), x, y)


def _sum(a: Arguments, sign: int = 1) -> Pair:
    (x, ix), (y, iy) = _pair(a["self"]), _pair(a["other"])
    y, iy = (None if v is None else v * (sign * a["alpha"]) for v in (y, iy))
    x, y = (x + y), (iy if ix is None else ix if iy is None else ix + iy)
    return Pair(x, y)


def _quotient(a: Arguments) -> Pair:
    return Pair(a["self"].real / a["other"], a["self"].imag / a["other"])


# ---- transforms -------------------------------------------------------------------------------


def _scale(size: int, normalization: int) -> float:
    return {0: 1.0, 1: 1 / math.sqrt(size), 2: 1 / size}[normalization]


def _waves(rows: int, columns: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π·row·column / size."""
    row, column = (torch.arange(n, device=like.device) for n in (rows, columns))
    angle = (row[:, None] * column).remainder(size).double() * (2 * math.pi / size)
    return angle.cos(), angle.sin()


def _convolved(x: Any, dim: int, weight: Tensor) -> Tensor:
    """A map along one axis, of the real part or of both: (outputs, parts, inputs) coefficients."""
    x = torch.stack([*x], -1) if isinstance(x, Pair) else x.unsqueeze(-1)
    x = x.movedim(dim, -1)
    outputs, parts, size = weight.shape
    y = torch.nn.functional.conv1d(x.reshape(-1, parts, size), weight.to(x.dtype))
    return y.reshape(*x.shape[:-2], outputs)


def _transformed(x: Any, dim: int, outputs: int, sign: int, scale: float) -> Pair:
    """The transform along one axis, of a real or a complex value."""
    like = _pair(x).real
    dim, size = dim % like.dim(), like.shape[dim]
    cos, sin = _waves(outputs, size, size, like)
    sin = sin * sign
    both = torch.cat([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)])
    weight = both[:, : 2 if isinstance(x, Pair) else 1] * scale
    y = _convolved(x, dim, weight).unflatten(-1, (2, outputs))
    return Pair(*(y.select(-2, part).movedim(-1, dim) for part in (0, 1)))


def _size(x: Any, dims: Sequence[int]) -> int:
    return math.prod(_pair(x).real.shape[d] for d in dims)


def _complex_to_complex(a: Arguments) -> Pair:
    x, scale = a["self"], _scale(_size(a["self"], a["dim"]), a["normalization"])
    for dim in a["dim"]:
        size = x.real.shape[dim]
        x = _transformed(x, dim, size, -1 if a["forward"] else 1, scale)
        scale = 1.0
    return Pair(*x)


def _real_to_complex(a: Arguments) -> Pair:
    x, (*dims, last) = a["self"], a["dim"]
    size = x.shape[last]
    outputs = size // 2 + 1 if a["onesided"] else size
    x = _transformed(x, last, outputs, -1, _scale(_size(x, a["dim"]), a["normalization"]))
    for dim in dims:
        x = _transformed(x, dim, x.real.shape[dim], -1, 1.0)
    return Pair(*x)


def _complex_to_real(a: Arguments) -> Tensor:
    x, (*dims, last), size = a["self"], a["dim"], a["last_dim_size"]
    scale = _scale(_size(x, dims) * size, a["normalization"])
    for dim in dims:
        x = _transformed(x, dim, x.real.shape[dim], 1, 1.0)
    last = last % x.real.dim()
    kept = size // 2 + 1
    x = Pair(*(part.narrow(last, 0, kept) for part in x))
    cos, sin = _waves(size, kept, size, x.real)
    # The other half mirrors this one, but for what is its own mirror image.
    place = torch.arange(kept, device=cos.device)
    alone = (place == 0) | (2 * place == size)
    weight = torch.stack([cos, -sin], 1) * (2 - alone.double()) * scale
    return _convolved(x, last, weight).movedim(-1, last)


def _short_time(a: Arguments) -> Any:
    """The transform of every frame under a window."""
    x, size, window = a["self"], a["n_fft"], a["window"]
    hop = a["hop_length"] or size // 4
    width = a["win_length"] or size
    if a.get("center"):
        sides, mode = [size // 2] * 2, a["pad_mode"]
        x = torch.nn.functional.pad(x.unsqueeze(-2), sides, mode).squeeze(-2)
    frames = x.unfold(-1, size, hop)
    if window is None:
        window = torch.ones(width, dtype=x.dtype, device=x.device)
    before = (size - width) // 2
    window = torch.nn.functional.pad(window, [before, size - width - before])
    one_sided = a["onesided"] is not False
    scale = 1 / math.sqrt(size) if a["normalized"] else 1.0
    outputs = size // 2 + 1 if one_sided else size
    result = _transformed(frames * window, -1, outputs, -1, scale)
    parts = Pair(*(part.transpose(-1, -2) for part in result))
    return parts if a["return_complex"] else torch.stack([*parts], -1)


def _inverse_short_time(a: Arguments) -> Any:
    """Every frame transformed back and put under the window; what overlaps is added."""
    x, size, window = a["self"], a["n_fft"], a["window"]
    hop, width = a["hop_length"] or size // 4, a["win_length"] or size
    x = Pair(*(part.transpose(-1, -2) for part in x))
    count = x.real.shape[-2]
    how = {"self": x, "dim": [-1], "normalization": 1 if a["normalized"] else 2, "forward": False}
    if a["return_complex"]:
        parts = [*_complex_to_complex(how)]
    else:  # of two sides it reads one
        parts = [_complex_to_real({**how, "last_dim_size": size})]
    if window is None:
        window = torch.ones(width, dtype=x.real.dtype, device=x.real.device)
    before = (size - width) // 2
    window = torch.nn.functional.pad(window, [before, size - width - before])
    length = size + hop * (count - 1)

    def added(frames: Tensor) -> Tensor:
        columns = frames.reshape(-1, count, size).transpose(1, 2)
        whole = torch.nn.functional.fold(columns, (1, length), (1, size), stride=(1, hop))
        return whole.reshape(*frames.shape[:-2], length)

    weight = added(window.square().expand(count, size))
    start = size // 2 if a["center"] else 0
    end = length - start if a["length"] is None else min(start + a["length"], length)
    tail = 0 if a["length"] is None else a["length"] - (end - start)
    parts = [added(part * window)[..., start:end] / weight[start:end] for part in parts]
    parts = [torch.nn.functional.pad(part, [0, tail]) if tail else part for part in parts]
    return Pair(*parts) if a["return_complex"] else parts[0]


def _cast(a: Arguments) -> Any:
    x, dtype = a["self"], a.get("dtype")
    if dtype is None:
        return x
    real = _REAL.get(dtype, dtype)
    if dtype is real:
        return _pair(x).real.to(real)
    return Pair(x.real.to(real), x.imag.to(real)) if _is_pair(x) else Pair(x.to(real), x * 0)


_REAL = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}

_WRITTEN_OUT: dict[Any, Callable[[Arguments], Any]] = {
    aten._fft_r2c: _real_to_complex,
    aten._fft_c2c: _complex_to_complex,
    aten._fft_c2r: _complex_to_real,
    aten.stft: _short_time,
    aten.istft: _inverse_short_time,
    aten._to_copy: _cast,
    aten.to: _cast,
    aten.real: lambda a: a["self"].real,
    aten.imag: lambda a: a["self"].imag,
    aten.abs: lambda a: (a["self"].real.square() + a["self"].imag.square()).sqrt(),
    aten.angle: lambda a: torch.atan2(a["self"].imag, a["self"].real),
    aten.view_as_real: lambda a: torch.stack([*a["self"]], -1),
    aten.view_as_complex: lambda a: Pair(a["self"].select(-1, 0), a["self"].select(-1, 1)),
    aten.complex: lambda a: Pair(a["real"], a["imag"]),
    aten.polar: lambda a: Pair(a["abs"] * a["angle"].cos(), a["abs"] * a["angle"].sin()),
    aten._conj: lambda a: Pair(a["self"].real, -a["self"].imag),
    aten.conj: lambda a: Pair(a["self"].real, -a["self"].imag),
    aten.conj_physical: lambda a: Pair(a["self"].real, -a["self"].imag),
    aten.add: _sum,
    aten.sub: lambda a: _sum(a, -1),
    aten.mul: lambda a: _bilinear(lambda u, v: u * v, a["self"], a["other"]),
    aten.matmul: lambda a: _bilinear(torch.matmul, a["self"], a["other"]),
    aten.mm: lambda a: _bilinear(torch.mm, a["self"], a["mat2"]),
    aten.bmm: lambda a: _bilinear(torch.bmm, a["self"], a["mat2"]),
    aten.einsum: _einsum,
    aten.div: _quotient,
}

_OF_EACH_PART = {
    aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze,
    aten.permute, aten.transpose, aten.t, aten.movedim, aten.swapaxes, aten.expand, aten.repeat,
    aten.slice, aten.select, aten.narrow, aten.index, aten.index_select, aten.gather, aten.flip,
    aten.roll, aten.constant_pad_nd, aten.pad, aten.cat, aten.stack, aten.clone, aten.contiguous,
    aten.alias, aten.detach, aten.resolve_conj, aten.resolve_neg, aten.neg, aten.sum, aten.mean,
    aten.slice_scatter, aten.select_scatter, aten.index_put, aten.copy, aten.split, aten.chunk,
    aten._unsafe_view,
}  # fmt: skip


def is_written_out(target: Any) -> bool:
    """Whether a call is written out here, if it meets complex numbers."""
    packet = getattr(target, "overloadpacket", None)
    return packet in _WRITTEN_OUT or packet in _OF_EACH_PART


def has_complex(value: Any) -> bool:
    """Whether there is a complex tensor among some values."""
    return any(isinstance(v, Tensor) and v.is_complex() for v in tree_leaves(value))
