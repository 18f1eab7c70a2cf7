"""Relevance of integer inputs: where numbers become vectors, and back to the numbers.

An integer has no relevance of its own. What the model makes of it has: the sum over the vector
that a token or a category is embedded in belongs to that token.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import InputError
from .active import active_values, discrete_values, is_root, nodes_of, source_call
from .captured import CapturedGraph
from .nodes import bind, place_of

aten = torch.ops.aten

Moves = Callable[[Any], bool]

_CASTS = {aten.to, aten._to_copy, aten.type_as, torch.ops.prims.convert_element_type}
_PLACES = ("index", "indices", "condition", "mask")
_UNTAGGED = {  # elementwise, though PyTorch does not say so
    aten.floor_divide, aten.negative, aten.absolute, aten.subtract, aten.multiply, aten.__and__,
    aten.__or__, aten.__xor__, aten.true_divide, aten.divide,
}  # fmt: skip


def embeddings(
    graph: CapturedGraph, explained: Sequence[Node], source: Node
) -> list[tuple[Node, Node]]:
    """Where an integer input becomes floating-point numbers: each value, with its indices."""
    active = active_values(graph, explained)
    discrete = discrete_values(graph, [source])
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node in active and is_root(node, active):
            indices = [n for n in source_call(node).all_input_nodes if n in discrete]
            found += [(node, n) for n in dict.fromkeys(indices)]
    return found


def at_numbers(
    graph: CapturedGraph,
    values: Mapping[Node, Any],
    source: Node,
    parts: Iterable[tuple[Node, Node, Tensor]],
    moves: Moves,
) -> Tensor:
    """Relevance at an integer input, one number for each integer.

    It goes whole to the integers that an index was made of, in equal parts where these are several:
    a hash multiplies the index, not its relevance.

    Args:
        graph: The captured model.
        values: Those of its placeholders.
        source: The input.
        parts: Values it becomes, their indices, and the relevance at the values.
        moves: Whether the results of an op are elements of its operands.
    """
    parts = list(parts)
    like: Tensor = values[source]
    if not parts:
        return torch.zeros(like.shape, device=like.device)
    dtype = parts[0][2].dtype
    with torch.inference_mode(False), torch.enable_grad():
        # A number stands for each integer and moves as it does: a gradient finds the way back.
        numbers = like.to(torch.float64).clone().requires_grad_()
        known = _follow(graph, values, source, numbers, [index for _, index, _ in parts], moves)
        total = torch.zeros(like.shape, dtype=dtype, device=like.device)
        for node, index, relevance in parts:
            moved = known[index]
            if relevance.dim() < moved.dim() or not moved.requires_grad:
                raise _lost(node)
            each = relevance.detach().clone().to(torch.float64)
            if each.dim() > moved.dim():
                each = each.flatten(moved.dim()).sum(-1)
            if each.shape != moved.shape:
                raise _lost(node)
            (back,) = torch.autograd.grad(moved, numbers, each, retain_graph=True)
            total += back.to(dtype)
    return total.detach()


def _follow(
    graph: CapturedGraph,
    values: Mapping[Node, Any],
    source: Node,
    numbers: Tensor,
    ends: Sequence[Node],
    moves: Moves,
) -> dict[Node, Any]:
    """The numbers that stand for integers, from an input to the indices."""
    discrete = discrete_values(graph, [source])
    needed, stack = set(ends), list(ends)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                stack.append(node)
    known: dict[Node, Any] = {**values}
    plain: dict[Node, Any] = {**values}  # the integers themselves, for masks and places
    known[source] = numbers

    for node in graph.nodes:
        if node not in needed or node.op != "call_function":
            continue
        plain[node] = _call(node, plain)
        known[node] = plain[node]
        if node in discrete:
            operands = [n for n in node.all_input_nodes if n in discrete]
            known[node] = _moved(node, operands, known, plain, moves)
    return known


def _call(node: Node, values: Mapping[Node, Any]) -> Any:
    def fill(argument: Any) -> Any:
        return torch.fx.node.map_arg(argument, values.__getitem__)

    return node.target(*fill(node.args), **fill(node.kwargs))  # type: ignore[operator]


def _moved(
    node: Node,
    operands: Sequence[Node],
    known: Mapping[Node, Any],
    plain: Mapping[Node, Any],
    moves: Moves,
) -> Any:
    """The numbers that stand for the result: those of the operands, or their mean."""
    result, packet = plain[node], getattr(node.target, "overloadpacket", None)
    if packet in _CASTS:
        return known[operands[0]]
    if packet is aten.one_hot:  # the entries of a row stand for its number together
        return known[operands[0]].unsqueeze(-1).expand(result.shape)
    if node.target is operator.getitem or moves(node.target):
        places = nodes_of([value for name, value in _named(node) if name in _PLACES])
        if operands == places and known[places[0]].shape == result.shape:  # a table of integers
            return known[places[0]]
        try:
            return _call(node, {**known, **{n: plain[n] for n in places}})
        except (RuntimeError, TypeError, IndexError) as error:
            raise _lost(node) from error
    if packet is aten.sum:
        total = _call(node, {**known, **{operands[0]: known[operands[0]].double()}})
        return total * total.numel() / known[operands[0]].numel()
    if not _is_elementwise(node, result, plain):
        raise _lost(node)
    return sum(known[n].expand(result.shape) for n in operands) / len(operands)


def _named(node: Node) -> Iterable[tuple[str, Any]]:
    return bind(node).items() if node.target is not operator.getitem else ()


def _is_elementwise(node: Node, result: Any, plain: Mapping[Node, Any]) -> bool:
    """Whether each result is made of the elements at its own place."""
    if not isinstance(result, Tensor):
        return False
    packet = getattr(node.target, "overloadpacket", None)
    is_tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if not (is_tagged or packet in _UNTAGGED or node.target.namespace == "prims"):  # type: ignore[union-attr]
        return False
    shapes = [v.shape for n in node.all_input_nodes if isinstance(v := plain[n], Tensor)]
    return torch.broadcast_shapes(*shapes) == result.shape


def _lost(node: Node) -> InputError:
    return InputError(
        f"The relevance of an integer input cannot be followed back from {node.target} in "
        f"{place_of(node)} to the integers. Explain the layer that embeds them: "
        "LayerRelativeLRP(model, layer)."
    )
