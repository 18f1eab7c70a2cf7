"""Composite operations written out, in operations that have rules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils._pytree import tree_flatten

from .composites import WRITTEN_OUT
from .composites.indices import embedding_bag
from .nodes import bind, dependents
from .spectra import has_complex, is_written_out, write_out_complex
from .tracing import Arguments, insert, replace, trace, traced_of

aten = torch.ops.aten

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
    write_out_complex(graph, inputs, traced_of)


def _write_out_known(graph: Graph, inputs: Sequence[Node], nodes: Sequence[Node]) -> None:
    """Writes out those of these nodes that stand in the table of composites."""
    depends = dependents(graph.nodes, inputs)
    for node in nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node not in depends:
            continue
        if packet is aten.embedding_bag:
            rows = _rows_of_bags(node)
            if rows is not None:
                replace(graph, node, _traced(graph, node, embedding_bag, {"indices": rows}))
        elif packet in WRITTEN_OUT:
            replace(graph, node, _traced(graph, node, WRITTEN_OUT[packet]))


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
            traced, nodes = trace(call, {"args": node.args, "kwargs": {**node.kwargs}}, table)
            if _crosses(traced, has_rule):
                replace(graph, node, insert(graph, node, traced, nodes))
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
    return traced_of(
        graph, node, function, {"padding_idx": None, **bind(node), **(overrides or {})}
    )


def _rows_of_bags(node: Node) -> Node | None:
    """The matrix of indices whose rows are the bags; None where the bags have offsets."""
    args = bind(node)
    indices, offsets = args["indices"], args["offsets"]
    rows = indices.args[0] if getattr(indices.target, "overloadpacket", None) in _FLATTENS else None
    is_matrix = isinstance(rows, Node) and rows.meta["val"].dim() == 2
    even = getattr(offsets.target, "overloadpacket", None) is aten.arange
    return rows if is_matrix and even and not args["include_last_offset"] else None


_FLATTENS = {aten.reshape, aten.view, aten.flatten, aten._unsafe_view}
