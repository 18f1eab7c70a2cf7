"""Which values of a captured graph depend on the explained inputs: relevance may reach those."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .captured import CapturedGraph
from .nodes import dependents, reads_values


def active_values(graph: CapturedGraph, explained: Collection[Node]) -> set[Node]:
    """The values that relevance may reach: those that depend on the explained inputs smoothly.

    What depends on them by comparisons or integers only (a mask) counts as a constant. An embedding
    of integer inputs is active, though no gradient would reach the integers.
    """
    discrete = discrete_values(graph, [n for n in explained if not is_number(n)])
    depends = dependents(graph.nodes, explained)
    active = {node for node in explained if is_number(node)}
    for node in graph.nodes:
        node.meta["depends"] = node in depends
        if node.op != "call_function" or not reads_values(node) or not is_number(node):
            continue
        operands = source_call(node).all_input_nodes
        if any(n in active for n in operands) or any(n in discrete for n in operands):
            active.add(node)
    return active


def discrete_values(graph: CapturedGraph, sources: Collection[Node]) -> set[Node]:
    """Integers made of explained integers. Those made of comparisons (positions) are none."""
    found = set(sources)
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and (is_number(node) or value.dtype == torch.bool):
            continue
        if reads_values(node) and any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def is_number(node: Node) -> bool:
    """Whether a value holds floating-point numbers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def source_call(node: Node) -> Node:
    """The call behind a node, which may be one item of what the call returns."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, Node)
    return source


def is_root(node: Node, active: Collection[Node]) -> bool:
    """Whether relevance goes no further: an input, or an embedding of integers."""
    operands = [] if node.op == "placeholder" else source_call(node).all_input_nodes
    return not any(n in active for n in operands)


def nodes_of(value: Any) -> list[Node]:
    """All nodes in a nested argument."""
    if isinstance(value, Node):
        return [value]
    if isinstance(value, (list, tuple)):
        return [node for item in value for node in nodes_of(item)]
    return []
