"""Recurrent layers, step by step: the calls of the written-out cells.

Export can take them apart too, but traces every step anew, which takes a minute for a hundred of
them. All steps have the same shapes, so here each call is looked at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map

from .nodes import bind

aten = torch.ops.aten

State = tuple[Node, ...]
# Projected input, state, weights of the state → the new state, its output first.
Cell = Callable[["Writer", Node, State, Sequence[Any]], State]


class Writer:
    """Writes calls into a graph in front of a node, in whose name they are made."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self._graph = graph
        self._meta = {k: v for k, v in node.meta.items() if k != "val"}
        self._known: dict[Any, Any] = {}
        self._shapes: dict[int, tuple[Any, str]] = {}

    def __call__(self, target: Any, *args: Any) -> Node:
        key = (target, *map(self._key, args))
        if key not in self._known:
            values = tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, args)
            self._known[key] = target(*values)
        return self._write(target, args, self._known[key])

    def _key(self, value: Any) -> Any:
        """The same for arguments of one shape, whose results are of one shape too."""
        if isinstance(value, Node):
            like = value.meta["val"]
            if id(like) not in self._shapes:  # kept along, for its id must not come again
                self._shapes[id(like)] = (like, f"{tuple(like.shape)} {like.dtype} {like.device}")
            return self._shapes[id(like)][1]
        return tuple(map(self._key, value)) if isinstance(value, (list, tuple)) else value

    def _write(self, target: Any, args: Any, value: Any) -> Node:
        made = self._graph.call_function(target, args)
        made.meta = {**self._meta, "val": value}
        return made

    def part(self, x: Node, index: int, of: int) -> Node:
        """One of the equal parts along the last axis."""
        size = x.meta["val"].shape[-1] // of
        dim = x.meta["val"].dim() - 1
        return self(aten.slice.Tensor, x, dim, index * size, (index + 1) * size)

    def steps(self, x: Node) -> list[Node]:
        """The steps along the first axis, which all are of one shape."""
        first = self(aten.select.int, x, 0, 0)
        later = range(1, x.meta["val"].shape[0])
        return [
            first, *(self._write(aten.select.int, (x, 0, t), first.meta["val"]) for t in later)
        ]  # fmt: skip


@torch.library.custom_op("captum_rlrp::recurrent_layer", mutates_args=())
def recurrent_layer(
    kind: str,
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """A recurrent layer as one call, of which export only needs the shapes."""
    raise NotImplementedError("only stands for a layer in a graph that is being captured")


@recurrent_layer.register_fake
def _(
    kind: str,
    input: Tensor,
    hx: list[Tensor],
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    width = hx[0].shape[-1] * (2 if bidirectional else 1)
    return [input.new_empty(*input.shape[:2], width), *(torch.empty_like(h) for h in hx)]


RECURRENT = torch.ops.captum_rlrp.recurrent_layer.default


def unroll(graph: Graph, node: Node) -> tuple[Node, ...]:
    """Writes a recurrent layer out, in front of the node that calls it.

    Args:
        graph: The graph.
        node: A call of :func:`recurrent_layer`.

    Returns:
        What the layer returns: its outputs, and its states at the end.
    """
    args = bind(node)
    cell, states = _CELLS[args["kind"]]
    hidden = args["hx"]
    directions = 2 if args["bidirectional"] else 1
    per = len(args["params"]) // (args["num_layers"] * directions)
    ended: list[list[Node]] = [[] for _ in range(states)]
    with graph.inserting_before(node):
        write = Writer(graph, node)
        x = args["input"]
        if args["batch_first"]:
            x = write(aten.transpose.int, x, 0, 1)
        for layer in range(args["num_layers"]):
            outputs = []
            for direction in range(directions):
                at = layer * directions + direction
                weights = list(args["params"][at * per : (at + 1) * per])
                state = tuple(write(aten.select.int, h, 0, at) for h in hidden)
                steps, last = _layer(
                    write, cell, x, state, weights, args["has_biases"], direction == 1
                )
                outputs.append(write(aten.stack.default, steps, 0))
                for some, value in zip(ended, last, strict=True):
                    some.append(value)
            x = write(aten.cat.default, outputs, 2) if directions == 2 else outputs[0]
        if args["batch_first"]:
            x = write(aten.transpose.int, x, 0, 1)
        return (x, *(write(aten.stack.default, some, 0) for some in ended))


def _layer(
    write: Writer,
    cell: Cell,
    x: Node,
    state: State,
    weights: list[Any],
    has_biases: bool,
    backward: bool,
) -> tuple[list[Node], State]:
    w, u, *rest = weights
    b, c = rest[:2] if has_biases else (None, None)
    projection = rest[2:] if has_biases else rest
    projected = write(aten.linear.default, x, w, b)
    steps = write.steps(projected)
    outputs: list[Node] = []
    for of_x in reversed(steps) if backward else steps:
        state = cell(write, of_x, state, [u, c, *projection])
        outputs.append(state[0])
    return outputs[::-1] if backward else outputs, state


def _lstm(write: Writer, of_x: Node, state: State, weights: Sequence[Any]) -> State:
    u, c, *projection = weights
    gates = write(aten.add.Tensor, write(aten.linear.default, state[0], u, c), of_x)
    i, f, g, o = (write.part(gates, k, 4) for k in range(4))
    kept = write(aten.mul.Tensor, write(aten.sigmoid.default, f), state[1])
    new = write(aten.mul.Tensor, write(aten.sigmoid.default, i), write(aten.tanh.default, g))
    cells = write(aten.add.Tensor, kept, new)
    hidden = write(aten.mul.Tensor, write(aten.sigmoid.default, o), write(aten.tanh.default, cells))
    if projection:
        hidden = write(aten.linear.default, hidden, projection[0])
    return hidden, cells


def _gru(write: Writer, of_x: Node, state: State, weights: Sequence[Any]) -> State:
    (h,), (u, c) = state, weights
    of_h = write(aten.linear.default, h, u, c)
    reset, keep = (
        write(
            aten.sigmoid.default,
            write(aten.add.Tensor, write.part(of_h, k, 3), write.part(of_x, k, 3)),
        )
        for k in range(2)
    )
    again = write(aten.mul.Tensor, write.part(of_h, 2, 3), reset)
    new = write(aten.tanh.default, write(aten.add.Tensor, write.part(of_x, 2, 3), again))
    kept = write(aten.mul.Tensor, write(aten.sub.Tensor, h, new), keep)
    return (write(aten.add.Tensor, kept, new),)


def _elman(activation: Any) -> Cell:
    def cell(write: Writer, of_x: Node, state: State, weights: Sequence[Any]) -> State:
        u, c = weights
        gates = write(aten.add.Tensor, write(aten.linear.default, state[0], u, c), of_x)
        return (write(activation, gates),)

    return cell


# Kind → its cell, and how many states it carries from step to step.
_CELLS: dict[str, tuple[Cell, int]] = {
    "lstm": (_lstm, 2),
    "gru": (_gru, 1),
    "rnn_tanh": (_elman(aten.tanh.default), 1),
    "rnn_relu": (_elman(aten.relu.default), 1),
}
