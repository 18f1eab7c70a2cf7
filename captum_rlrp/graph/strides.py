"""``as_strided`` without regard to how its operand lies in memory.

It picks elements by their places in memory, as the model laid them out. A fused forward keeps
values in other memory formats, and rules evaluate the call on operands of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .aliases import alias_roots
from .layout import expression
from .nodes import bind

aten = torch.ops.aten


def free_of_memory(graph: Graph) -> None:
    """Hands each call a contiguous operand, its dimensions in the order of the model's memory."""
    roots = alias_roots(graph)
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in (aten.as_strided, aten.as_strided_copy):
            continue
        args = bind(node)
        # Of a view, places are counted in the memory of the whole.
        view, whole = args["self"], roots[args["self"]]
        order = _order(whole.meta["val"])
        if order is None:
            continue
        offset = args["storage_offset"]
        if offset is None:
            offset = view.meta["val"].storage_offset()
        offset = offset - whole.meta["val"].storage_offset()
        with graph.inserting_before(node):
            moved = _call(graph, node, aten.permute.default, whole, order)
            plain = _call(graph, node, aten.contiguous.default, moved)
        node.args, node.kwargs = (plain, args["size"], args["stride"], offset), {}


def _call(graph: Graph, like: Node, target: Any, operand: Node, *args: Any) -> Node:
    made = graph.call_function(target, (operand, *args))
    made.meta = {**like.meta, "val": target(operand.meta["val"], *args)}
    return made


def _order(value: Any) -> list[int] | None:
    """The dimensions, the one of the widest steps first; None where the memory has gaps."""
    if not isinstance(value, Tensor):
        return None
    strides = [_number(step) for step in value.stride()]
    order = sorted(range(value.dim()), key=lambda d: -strides[d])
    expected: Any = 1
    for d in reversed(order):
        if expression(value.shape[d]) != 1:
            if expression(value.stride(d)) != expected:
                return None
            expected = expected * expression(value.shape[d])
    return order


def _number(size: Any) -> int:
    known: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(known)
