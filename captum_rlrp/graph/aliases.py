"""Which values of a graph share their memory, and the calls that write into it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from .captured import CapturedGraph
from .nodes import dependents, mutates, reads_values

aten = torch.ops.aten


# Ops known to return new memory. (Schemas do not tell: type_as and einsum may return an operand.)
_RETURN_NEW = {
    aten.conv1d, aten.conv2d, aten.conv3d, aten.conv_transpose1d, aten.conv_transpose2d,
    aten.conv_transpose3d, aten.linear, aten.addmm, aten.matmul, aten.mm, aten.bmm,
    aten.batch_norm, aten.layer_norm, aten.group_norm, aten.add, aten.sub, aten.mul, aten.div,
    aten.relu, aten.relu6, aten.hardtanh, aten.leaky_relu, aten.elu, aten.gelu, aten.silu,
    aten.sigmoid, aten.tanh, aten.hardswish, aten.hardsigmoid, aten.softmax, aten.log_softmax,
    aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d,
    aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d,
    aten.cat, aten.mean, aten.sum,
}  # fmt: skip


def unshared(graph: CapturedGraph) -> frozenset[Node]:
    """Results of calls that surely share their memory with no other value."""

    def returns_new(node: Node) -> bool:
        return getattr(node.target, "overloadpacket", None) in _RETURN_NEW

    return frozenset(
        node
        for node in graph.nodes
        if returns_new(node) and all(returns_new(u) for u in node.users if reads_values(u))
    )


def alias_roots(graph: Graph) -> dict[Node, Node]:
    """Value → the value whose storage it may share."""
    root: dict[Node, Node] = {}
    for node in graph.nodes:
        target = node.target
        shares = target is operator.getitem or (
            isinstance(target, torch._ops.OpOverload)
            and (target.is_view or target._schema.is_mutable or target is aten.dropout.default)
        )
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        root[node] = root[source] if shares and source is not None else node
    return root


def _writes(graph: Graph) -> Iterator[tuple[Node, bool]]:
    """The in-place calls, each with whether it writes to a constant that the forward made.

    Such a constant (an attention mask filled slice by slice) is new at every run, so writing to it
    is harmless; all other writes are made functional.
    """
    root = alias_roots(graph)
    # Placeholders count, parameters among them: nothing of the user's may be written to.
    depends = dependents(graph.nodes, [n for n in graph.nodes if n.op != "call_function"])
    # A write of something that depends makes the whole storage depend.
    for node in graph.nodes:
        if mutates(node) and node in depends and isinstance(node.args[0], Node):
            depends.add(root[node.args[0]])
    for node in graph.nodes:
        if mutates(node):
            written = node.args[0] if node.args else None
            base = root.get(written) if isinstance(written, Node) else None
            yield node, base is not None and base not in depends


def has_aliased_write(graph: Graph) -> bool:
    """Whether an in-place call changes a value that is later read under another name."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    root = alias_roots(graph)
    for node, harmless in _writes(graph):
        if harmless:
            continue
        written = node.args[0] if node.args else None
        if not isinstance(written, Node) or _functional_twin(node.target) is None:
            return True
        # Later readings of `written` get the result instead, and so do those of the results of
        # earlier writes to it. Any other name of the storage that is read later is an alias.
        names = {written, node}
        while mutates(written) and isinstance(written.args[0], Node):
            written = written.args[0]
            names.add(written)
        for other in graph.nodes:
            made_before = order[other] < order[node]
            read_after = any(order[user] > order[node] for user in other.users)
            if made_before and read_after and other not in names and root[other] is root[node]:
                return True
    return False


def make_functional(graph: Graph) -> None:
    """Puts calls that return a new value in place of those that write into one."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node, harmless in list(_writes(graph)):
        twin = _functional_twin(node.target)
        if harmless or twin is None:
            continue
        written = node.args[0]
        assert isinstance(written, Node)
        node.target = twin
        written.replace_all_uses_with(
            node,
            delete_user_cb=lambda user, at=order[node]: order[user] > at,  # type: ignore[misc]
        )


def _functional_twin(target: Any) -> Any:
    """``add_.Tensor`` → ``add.Tensor``, or None."""
    name = target._schema.name.split("::")[1]
    if not name.endswith("_") or name.startswith("_assert"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None
