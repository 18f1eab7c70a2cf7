"""The graph that export yields, brought into the form that the rest of the package relies on.

No in-place calls, no sub-graphs, no tuple of slices.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from ..errors import CaptureError, InputError
from .aliases import alias_roots, make_functional
from .captured import CapturedGraph
from .nodes import bind, mutates, place_of
from .strides import free_of_memory
from .twins import ROOT
from .written_out import HasRule, write_out

aten = torch.ops.aten


def normalise(program: Any, model: nn.Module, has_rule: HasRule) -> CapturedGraph:
    """The normal form of an exported program.

    Args:
        program: What :func:`captum_rlrp.graph.export.export` returned.
        model: The model, to be named in errors.
        has_rule: Whether relevance can cross calls of an op.
    """
    graph: Graph = program.graph
    inline_subgraphs(graph, program.graph_module)
    make_functional(graph)
    for node in graph.nodes:
        _clean(node)

    parameters: dict[Node, str] = {}
    constants: dict[Node, Tensor] = {}
    inputs: list[Node] = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            parameters[node] = spec.target.removeprefix(f"{ROOT}.")
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[node] = program.constants[spec.target]
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        else:
            raise CaptureError(
                f"{type(model).__name__} cannot be captured: its forward uses an object that is no "
                f"tensor (a torch.Generator or packed quantised weights, perhaps), which export "
                f"calls '{spec.target}'. Keep what it makes in a buffer, or explain the model as "
                "it was before it was packed."
            )
    _open_slices(graph)  # whose decompositions go by how the value lies in memory
    write_out(graph, inputs, has_rule)
    free_of_memory(graph)
    _open_slices(graph)
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # The values are the user's, their memory layout is ours.
            node.target = aten.reshape.default
        if node.op == "get_attr" and isinstance(node.target, str):
            value = operator.attrgetter(node.target)(program.graph_module)
            if isinstance(value, Tensor):
                constants[node] = value
            elif node.users:
                user = next(iter(node.users))
                raise CaptureError(
                    f"{type(model).__name__} cannot be captured: {user.target} in {place_of(user)} "
                    "chooses or repeats calls by the values of a tensor, so it is no static graph. "
                    "Replace it by torch.where or a loop over sizes, or move it out of forward."
                )

    output = _output(graph, model)
    nodes = tuple(_reachable(graph, output))
    size = _batch_size(inputs)
    return CapturedGraph(
        nodes=nodes,
        inputs=tuple(inputs),
        parameters={n: name for n, name in parameters.items() if n in set(nodes)},
        constants={n: value for n, value in constants.items() if n in set(nodes)},
        output=output,
        batch=None if size is None else size.node.expr,
        guards=() if size is None else _guards_on(size),
        graph=graph,
    )


def _clean(node: Node) -> None:
    """Keeps what is needed of a node's notes, without the root that called the model."""
    stack = node.meta.get("nn_module_stack") or {}
    inside = {
        key: (path.removeprefix(ROOT).removeprefix("."), kind)
        for key, (path, kind) in stack.items()
        if path
    }
    kept: dict[str, Any] = {
        key: node.meta[key] for key in ("val", "stack_trace") if key in node.meta
    }
    node.meta = {**kept, "nn_module_stack": inside}


def _output(graph: Graph, model: nn.Module) -> Node:
    (returned,) = next(n for n in graph.nodes if n.op == "output").args
    leaves = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Node)]
    # What forward writes to its buffers comes first, the one output last.
    if not leaves or not isinstance(leaves[-1].meta.get("val"), Tensor):
        raise InputError(
            f"{type(model).__name__} returns a tensor that depends on nothing; there is nothing to "
            "explain."
        )
    return leaves[-1]


def _reachable(graph: Graph, output: Node) -> Iterator[Node]:
    seen = {output}
    stack = [output]
    root = alias_roots(graph)
    writes: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if mutates(node):
            writes.setdefault(root[node], []).append(node)
    while stack:
        node = stack.pop()
        for source in (*node.all_input_nodes, *writes.get(root[node], ())):
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return (node for node in graph.nodes if node in seen)


def _batch_size(inputs: Sequence[Node]) -> Any:
    """The symbolic size of the batch; None where it is a number."""
    for node in inputs:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim():
            size: Any = value.shape[0]
            if isinstance(getattr(getattr(size, "node", None), "expr", None), sympy.Symbol):
                return size
    return None


def _guards_on(size: Any) -> tuple[sympy.Basic, ...]:
    return tuple(guard.expr for guard in size.node.shape_env.get_pruned_guards([size]))


def inline_subgraphs(graph: Graph, module: Any) -> None:
    """Writes out what export wrapped (``with torch.no_grad():`` and autocast regions)."""
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if node.target.name() not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        attribute = next(a for a in node.args if isinstance(a, Node) and a.op == "get_attr")
        inner = operator.attrgetter(str(attribute.target))(module)
        inline_subgraphs(inner.graph, inner)
        operands = node.args[node.args.index(attribute) + 1 :]
        slots = [n for n in inner.graph.nodes if n.op == "placeholder"]
        values: dict[Node, Any] = dict(zip(slots, operands, strict=True))
        with graph.inserting_before(node):
            result = graph.graph_copy(inner.graph, val_map=values)
        if isinstance(result, tuple) and isinstance(result[0], (tuple, list)):
            result = result[0]
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(results[0])
        graph.erase_node(node)


def _open_slices(graph: Graph) -> None:
    """``split``, ``chunk``, ``unbind`` and their parts become slices of the value itself."""
    packets = {
        aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unbind,
        aten.unsafe_split, aten.unsafe_chunk, aten.split_copy, aten.unbind_copy,
        aten.split_with_sizes_copy, aten.hsplit, aten.vsplit, aten.dsplit,
    }  # fmt: skip
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in packets:
            continue
        source: Any = node.args[0]
        parts = node.meta["val"]
        dim = _slice_dim(node, packet)
        starts = [0]
        for part in parts:
            starts.append(
                starts[-1] + (1 if part.dim() < source.meta["val"].dim() else part.shape[dim])
            )
        if not all(isinstance(start, int) for start in starts):
            continue  # along the batch: left as it is, and refused later
        for user in list(node.users):
            if user.target is not operator.getitem:
                continue
            index = user.args[1]
            with graph.inserting_before(user):
                if packet in (aten.unbind, aten.unbind_copy):
                    new = graph.call_function(aten.select.int, (source, dim, index))
                else:
                    new = graph.call_function(
                        aten.slice.Tensor, (source, dim, starts[index], starts[index + 1])
                    )
            new.meta = {**node.meta, **user.meta}
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        if not node.users:
            graph.erase_node(node)


def _slice_dim(node: Node, packet: Any) -> int:
    dims = node.all_input_nodes[0].meta["val"].dim()
    if packet is aten.hsplit:
        return 0 if dims == 1 else 1
    if packet in (aten.vsplit, aten.dsplit):
        return 0 if packet is aten.vsplit else 2
    return int(bind(node).get("dim", 0)) % dims
