"""What is read off single nodes of a captured graph."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


def bind(node: Node) -> dict[str, Any]:
    """A call's arguments by the names of its schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def place_of(node: Node) -> str:
    """Where a node comes from: module path and source line."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    module = f"module '{path}'" if path else "the model's forward"
    if kind and path:
        module += f" ({str(kind).rsplit('.', 1)[-1]})"
    return f"{module}, {source_of(node)}"


_NOT_THE_USERS = ("/torch/nn/", str(Path(__file__).parent))


def source_of(node: Node) -> str:
    """The user's line of source that made the call."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [i for i, line in enumerate(frames) if line.startswith("File ")]
    if not places:
        return "source line unknown"
    # torch's own frames (a module calling its functional form) say little: prefer the user's.
    user = [i for i in places if not any(p in frames[i] for p in _NOT_THE_USERS)] or places
    last = user[-1]
    file, line = frames[last].split(", ")[:2]
    code = frames[last + 1] if last + 1 < len(frames) else ""
    return f"{file[5:].strip(chr(34))}:{line.removeprefix('line ')}: {code}"


_READ_SIZES_ONLY = {
    aten.sym_size, aten.sym_stride, aten.sym_numel, aten.new_zeros, aten.new_ones, aten.new_full,
    aten.new_empty, aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like,
    aten.rand_like, aten.randn_like, aten.fill,
}  # fmt: skip


def reads_values(node: Node) -> bool:
    """Whether a call's result depends on its operands' values, not on their sizes alone."""
    return getattr(node.target, "overloadpacket", None) not in _READ_SIZES_ONLY


def dependents(nodes: Iterable[Node], sources: Iterable[Node]) -> set[Node]:
    """The nodes whose values depend on those of the sources, these among them."""
    depends = set(sources)
    for node in nodes:
        if reads_values(node) and any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    return depends


def mutates(node: Node) -> bool:
    """Whether the call writes into an operand."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
