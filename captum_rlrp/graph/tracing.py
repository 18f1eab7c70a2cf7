"""The calls that a function makes, traced and put into a graph in the place of a node."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

Arguments = dict[str, Any]


def traced_of(
    graph: Graph, node: Node, function: Callable[[Arguments], Any], arguments: Arguments
) -> Any:
    """The calls that a function of arguments makes, in front of a node; what they result in."""
    traced, nodes = trace(function, arguments)
    return insert(graph, node, traced, nodes)


def trace(
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


def insert(graph: Graph, node: Node, traced: Graph, nodes: Sequence[Node]) -> Any:
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


def replace(graph: Graph, node: Node, result: Any) -> None:
    """Puts a result, or several, in the place of a node's."""
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
