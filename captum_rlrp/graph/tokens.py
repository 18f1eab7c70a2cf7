"""Relevance of integer inputs: where numbers become vectors, and back to the numbers.

An integer has no relevance of its own. What the model makes of it has: the sum over the vector
that a token or a category is embedded in belongs to that token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..errors import InputError
from .active import active_values, discrete_values, is_root, source_call
from .captured import CapturedGraph
from .nodes import place_of

aten = torch.ops.aten

_CASTS = {aten.to, aten._to_copy, aten.type_as}


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
) -> Tensor:
    """Relevance at an integer input, one number for each integer.

    Args:
        graph: The captured model.
        values: Those of its placeholders.
        source: The input.
        parts: Values it becomes, their indices, and the relevance at the values.
    """
    parts = list(parts)
    like: Tensor = values[source]
    if not parts:
        return torch.zeros(like.shape, device=like.device)
    dtype = parts[0][2].dtype
    with torch.inference_mode(False), torch.enable_grad():
        # The indices move as the numbers do, so a gradient finds the way back.
        numbers = like.to(torch.float64).clone().requires_grad_()
        known = _follow(graph, values, source, numbers, [index for _, index, _ in parts])
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
) -> dict[Node, Any]:
    """What the calls between an input and the indices make of floating-point numbers."""
    discrete = discrete_values(graph, [source])
    needed, stack = set(ends), list(ends)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                stack.append(node)
    known: dict[Node, Any] = {**values}
    plain: dict[Node, Any] = {**values}  # the integers themselves, for masks
    known[source] = numbers

    for node in graph.nodes:
        if node not in needed or node.op != "call_function":
            continue
        plain[node] = _call(node, plain)
        known[node] = plain[node]
        if node in discrete:
            known[node] = _moved(node, known, plain)
    return known


def _call(node: Node, values: Mapping[Node, Any]) -> Any:
    def fill(argument: Any) -> Any:
        return torch.fx.node.map_arg(argument, values.__getitem__)

    return node.target(*fill(node.args), **fill(node.kwargs))  # type: ignore[operator]


def _moved(node: Node, known: Mapping[Node, Any], plain: Mapping[Node, Any]) -> Any:
    if getattr(node.target, "overloadpacket", None) in _CASTS:
        return known[node.all_input_nodes[0]]
    if getattr(node.target, "overloadpacket", None) is aten.one_hot:
        # Each number becomes a row; the row's entries stand for it together.
        count = plain[node].shape[-1]
        return known[node.all_input_nodes[0]].unsqueeze(-1).expand(plain[node].shape) / count
    try:
        return _call(node, known)
    except (RuntimeError, TypeError) as error:
        raise _lost(node) from error


def _lost(node: Node) -> InputError:
    return InputError(
        f"The relevance of an integer input cannot be followed back from {node.target} in "
        f"{place_of(node)} to the integers. Explain the layer that embeds them: "
        "LayerRelativeLRP(model, layer)."
    )
