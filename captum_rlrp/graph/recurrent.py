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

    def __call__(self, target: Any, *args: Any) -> Node:
        made = self._graph.call_function(target, args)
        made.meta = {**self._meta, "val": self._value(target, args)}
        return made

    def _value(self, target: Any, args: Any) -> Any:
        values = tree_map(lambda a: a.meta["val"] if isinstance(a, Node) else a, args)
        key = (target, str(tree_map(_named, values)))
        if key not in self._known:
            # The values are kept, for their ids are in the key.
            self._known[key] = (target(*values), values)
        return self._known[key][0]

    def part(self, x: Node, index: int, of: int) -> Node:
        """One of the equal parts along the last axis."""
        size = x.meta["val"].shape[-1] // of
        dim = x.meta["val"].dim() - 1
        return self(aten.slice.Tensor, x, dim, index * size, (index + 1) * size)


def _named(value: Any) -> Any:
    return f"#{id(value)}" if isinstance(value, Tensor) else value


def unroll(graph: Graph, node: Node) -> tuple[Node, ...]:
    """Writes a recurrent layer out, in front of the node that calls it.

    Args:
        graph: The graph.
        node: A call of ``aten.lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.

    Returns:
        What the layer returns: its outputs, and its states at the end.
    """
    args = bind(node)
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    cell, states = _CELLS[packet]
    hidden = args["hx"] if isinstance(args["hx"], (list, tuple)) else [args["hx"]]
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
    steps = range(x.meta["val"].shape[0])
    outputs: list[Node] = []
    for step in reversed(steps) if backward else steps:
        of_x = write(aten.select.int, projected, 0, step)
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


# Op → its cell, and how many states it carries from step to step.
_CELLS: dict[Any, tuple[Cell, int]] = {
    aten.lstm: (_lstm, 2),
    aten.gru: (_gru, 1),
    aten.rnn_tanh: (_elman(aten.tanh.default), 1),
    aten.rnn_relu: (_elman(aten.relu.default), 1),
}
LAYERS = tuple(packet.input for packet in _CELLS)
