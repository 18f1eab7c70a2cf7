"""Model and example arguments to a static graph of ATen calls, by ``torch.export``.

The user's module is only read. The graph is brought into the form the rest of the package
relies on: no in-place calls, no sub-graphs, no tuple of slices, recurrent layers opened up.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import operator
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from ..errors import CaptureError, InputError, TrainingModeError

aten = torch.ops.aten

# torch.export patches process-wide state while it traces, so one capture runs at a time. Symbolic
# sizes that another thread compared meanwhile would end up in the trace: who does so holds it too.
CAPTURING = threading.RLock()

# Composite layers whose own decomposition is a graph of operations that have rules.
_OPENED = [
    overload
    for packet in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
    for overload in (packet.input, packet.data)
]


def _gates(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Any = None, c: Any = None) -> Tensor:
    return nn.functional.linear(x, w, b) + nn.functional.linear(h, u, c)


def _lstm_cell(x: Tensor, state: Sequence[Tensor], *weights: Any) -> tuple[Tensor, Tensor]:
    i, f, g, o = _gates(x, state[0], *weights).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(x: Tensor, h: Tensor, w: Tensor, u: Tensor, b: Any = None, c: Any = None) -> Tensor:
    of_x = nn.functional.linear(x, w, b).chunk(3, -1)
    of_h = nn.functional.linear(h, u, c).chunk(3, -1)
    reset, keep = ((p + q).sigmoid() for p, q in zip(of_x[:2], of_h[:2], strict=True))
    new = (of_x[2] + reset * of_h[2]).tanh()
    return (h - new) * keep + new


# One step of a recurrent layer, written out.
_CELLS = {
    aten.lstm_cell.default: _lstm_cell,
    aten.gru_cell.default: _gru_cell,
    aten.rnn_tanh_cell.default: lambda *args: _gates(*args).tanh(),
    aten.rnn_relu_cell.default: lambda *args: _gates(*args).relu(),
}


@dataclass(frozen=True)
class CapturedGraph:
    """A model as a graph.

    Attributes:
        nodes: The calls the output depends on, in execution order.
        inputs: One placeholder per flattened argument; None where the graph does not use it.
        parameters: Placeholder → name of the parameter or buffer, read anew at every run.
        constants: Placeholder → tensor that the forward itself created.
        output: The node whose value the model returns.
        batch: Symbol of the batch size, or None if the capture holds for one batch size only.
        guards: What the batch size must satisfy, where forward asked for it (``if len(x) > 4``).
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    parameters: dict[Node, str]
    constants: dict[Node, Tensor]
    output: Node
    batch: sympy.Symbol | None
    guards: tuple[sympy.Basic, ...]
    graph: Graph = field(repr=False)

    def admits(self, batch_size: int) -> bool:
        """Whether forward takes the way that was captured for a batch of this size."""
        return all(
            guard.subs(dict.fromkeys(guard.free_symbols, batch_size)) == sympy.true
            for guard in self.guards
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself behind ``DataParallel``, its distributed kin and ``torch.compile``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_eval_mode(model: nn.Module) -> None:
    """Refuses modules that behave differently in training (batch statistics, random masks).

    Raises:
        TrainingModeError: Naming each such module.
    """
    # In training these use the batch's statistics or draw random numbers.
    stateful = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    found = [
        (name or "the model itself", type(module).__name__)
        for name, module in model.named_modules()
        if module.training
        and isinstance(module, stateful)
        and not (isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0)
        and not (
            isinstance(module, nn.modules.instancenorm._InstanceNorm)
            and not module.track_running_stats
        )
    ]
    if found:
        listed = ", ".join(f"{name} ({kind})" for name, kind in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise TrainingModeError(
            f"The model is in training mode: {listed}{more} would mix the samples of a batch or "
            "draw random numbers. Call model.eval() before attributing."
        )


def place_of(node: Node) -> str:
    """Where a node comes from: module path and source line."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    module = f"module '{path}'" if path else "the model's forward"
    if kind and path:
        module += f" ({str(kind).rsplit('.', 1)[-1]})"
    return f"{module}, {source_of(node)}"


_NOT_THE_USERS = ("/torch/nn/", str(Path(__file__)))


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


def capture(
    model: nn.Module,
    args: Sequence[Any],
    batch_size: int | None,
    layers: Collection[nn.Module] = (),
) -> CapturedGraph:
    """Captures ``model(*args)``.

    Args:
        model: A module in eval mode; left as it is.
        args: Its positional arguments.
        batch_size: The size of dimension 0 of the tensors that carry the batch. The batch is
            left symbolic where the model allows it. None captures exactly these arguments.
        layers: Modules whose outputs must be values of their own, even where they return what
            they were given (``nn.Identity``).

    Raises:
        CaptureError: If export refuses, with its own text, or if the output is not one tensor.
    """
    check_eval_mode(model)
    example, shapes = _example(args, batch_size)
    with CAPTURING, _quiet(), torch.inference_mode(False), torch.no_grad():
        # The fused encoder kernels hide the layers that need rules.
        fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            program = torch.export.export(
                _shadow(model, layers),
                example,
                dynamic_shapes=(shapes,) if _is_variadic(model) else shapes,
            )
            decompositions = _needed_decompositions(program)
            if decompositions is not None:
                program = program.run_decompositions(decompositions)
        except Exception as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            raise CaptureError(_explain(error, model)) from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)
        return _normalise(program, model)


def _shadow(model: nn.Module, layers: Collection[nn.Module]) -> nn.Module:
    """A second tree of modules that shares every tensor with the user's.

    Export swaps a module's parameters while it traces; the user's own must stay what they are,
    for other threads too. Of `layers`, what they return unchanged becomes a value of its own.
    """
    twins: dict[nn.Module, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if module not in twins:
            copied = twins[module] = module.__class__.__new__(module.__class__)
            copied.__dict__.update(
                (name, copy.copy(value) if isinstance(value, (dict, list, set)) else value)
                for name, value in module.__dict__.items()
            )
            copied.__dict__["_modules"] = {
                name: None if child is None else twin(child)
                for name, child in module._modules.items()
            }
            for name, value in module.__dict__.items():
                if isinstance(value, nn.Module):  # held without being registered
                    copied.__dict__[name] = twin(value)
            if module in layers:
                copied.__dict__["forward"] = _with_outputs_of_its_own(copied.forward)
        return twins[module]

    return twin(model)


def _with_outputs_of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = {id(x): x._version for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}

        def renew(x: Any) -> Any:
            unchanged = isinstance(x, Tensor) and given.get(id(x)) == x._version
            return aten.alias(x) if unchanged else x

        return tree_map(renew, forward(*args, **kwargs))

    return wrapped


def _example(
    args: Sequence[Any], batch_size: int | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Arguments to trace with, and which of their dimensions is dynamic.

    Export takes a size of 0 or 1 for a constant, so it never sees one as the batch.
    """
    dynamic = torch.export.Dim.AUTO

    def example(value: Any) -> tuple[Any, Any]:
        if isinstance(value, Tensor):
            if batch_size is not None and value.dim() and value.shape[0] == batch_size:
                size = (max(batch_size, 2), *value.shape[1:])
                return torch.empty(size, dtype=value.dtype, device=value.device), {0: dynamic}
            return value.detach(), None
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            pairs = [example(item) for item in value]
            return type(value)(p[0] for p in pairs), type(value)(p[1] for p in pairs)
        if isinstance(value, dict):
            named = {key: example(item) for key, item in value.items()}
            return {k: p[0] for k, p in named.items()}, {k: p[1] for k, p in named.items()}
        return value, None

    pairs = [example(value) for value in args]
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


def _is_variadic(model: nn.Module) -> bool:
    """Whether forward takes ``*args``: export then wants the shapes nested once more."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export warns of its own working and logs what it raises anyway: not the user's concern."""
    loggers = [
        logging.getLogger(name) for name in ("torch._subclasses", "torch.export", "torch._export")
    ]
    loggers += [logging.getLogger("torch._subclasses.fake_tensor"), logging.getLogger("torch.fx")]
    disabled = [logger.disabled for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.disabled = True
        try:
            yield
        finally:
            for logger, was in zip(loggers, disabled, strict=True):
                logger.disabled = was


def _explain(error: Exception, model: nn.Module) -> str:
    text = str(error).strip()
    lower = text.lower()
    if "data-dependent" in lower or "guardondatadependent" in lower or "unbacked" in lower:
        cause = (
            "its forward branches or indexes on the values of a tensor, so it is no static graph; "
            "replace the branch by torch.where or move it out of forward"
        )
    elif (
        isinstance(error, (TypeError, RuntimeError)) and "missing" in lower and "argument" in lower
    ):
        cause = "its forward wants other arguments; pass them by additional_forward_args"
    elif "pytree" in lower or "unsupported type" in lower or "unsupported input type" in lower:
        cause = "an argument is of a type that export does not know; pass tensors, numbers or None"
    else:
        cause = "torch.export refused its forward; its own words follow"
    return (
        f"{type(model).__name__} cannot be captured: {cause}.\n"
        f"torch.export said ({type(error).__name__}): {text}"
    )


def _needed_decompositions(program: Any) -> dict[Any, Any] | None:
    """None if the graph is usable as it is; otherwise what to take apart (maybe nothing)."""
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    layers = [op for op in _OPENED if op in targets]
    table: dict[Any, Any] = dict(torch._decomp.get_decompositions(layers))
    table.update((op, cell) for op, cell in _CELLS.items() if op in targets)
    if table:
        return table
    return {} if _has_aliased_write(program.graph) else None


# ---- normal form ------------------------------------------------------------------------------


def _normalise(program: Any, model: nn.Module) -> CapturedGraph:
    graph: Graph = program.graph
    _inline_subgraphs(graph, program.graph_module)
    _make_functional(graph)
    _open_slices(graph)
    for node in graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            # The values are the user's, their memory layout is ours.
            node.target = aten.reshape.default

    parameters: dict[Node, str] = {}
    constants: dict[Node, Tensor] = {}
    inputs: list[Node] = []
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            parameters[node] = spec.target
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[node] = program.constants[spec.target]
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        else:
            raise CaptureError(
                f"{type(model).__name__} cannot be captured: it holds a {spec.kind.name.lower()} "
                f"('{spec.target}'), which is no tensor."
            )
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(node.target, str):
            value = operator.attrgetter(node.target)(program.graph_module)
            if isinstance(value, Tensor):
                constants[node] = value

    output = _only_tensor(graph, program, model)
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


def _only_tensor(graph: Graph, program: Any, model: nn.Module) -> Node:
    (returned,) = next(n for n in graph.nodes if n.op == "output").args
    user = program.graph_signature.user_outputs
    by_name = {node.name: node for node in graph.nodes}
    leaves = [by_name[name] for name in user if isinstance(name, str) and name in by_name]
    if not leaves:
        leaves = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Node)]
    # A name in the signature may be that of a call since replaced: the output node knows best.
    current = {leaf.name for leaf in tree_leaves(returned) if isinstance(leaf, Node)}
    tensors = [n for n in leaves if n.name in current and isinstance(n.meta.get("val"), Tensor)]
    if not tensors:
        tensors = [
            leaf
            for leaf in tree_leaves(returned)
            if isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), Tensor)
        ]
    unique = list(dict.fromkeys(tensors))
    if len(unique) != 1:
        raise InputError(
            f"{type(model).__name__} returns {len(unique)} tensors; an explanation needs one. Wrap "
            "the model in a module whose forward returns the tensor to explain."
        )
    return unique[0]


def _reachable(graph: Graph, output: Node) -> Iterator[Node]:
    seen = {output}
    stack = [output]
    root = _alias_roots(graph)
    writes: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if _mutates(node):
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


def _inline_subgraphs(graph: Graph, module: Any) -> None:
    """Writes out what export wrapped (``with torch.no_grad():`` and autocast regions)."""
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if node.target.name() not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            continue
        attribute = next(a for a in node.args if isinstance(a, Node) and a.op == "get_attr")
        inner = operator.attrgetter(str(attribute.target))(module)
        _inline_subgraphs(inner.graph, inner)
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


def _mutates(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _functional_twin(target: Any) -> Any:
    """``add_.Tensor`` → ``add.Tensor``, or None."""
    name = target._schema.name.split("::")[1]
    if not name.endswith("_") or name.startswith("_assert"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


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


def _alias_roots(graph: Graph) -> dict[Node, Node]:
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
    root = _alias_roots(graph)
    # Placeholders count, parameters among them: nothing of the user's may be written to.
    depends = dependents(graph.nodes, [n for n in graph.nodes if n.op != "call_function"])
    # A write of something that depends makes the whole storage depend.
    for node in graph.nodes:
        if _mutates(node) and node in depends and isinstance(node.args[0], Node):
            depends.add(root[node.args[0]])
    for node in graph.nodes:
        if _mutates(node):
            written = node.args[0] if node.args else None
            base = root.get(written) if isinstance(written, Node) else None
            yield node, base is not None and base not in depends


def _has_aliased_write(graph: Graph) -> bool:
    """Whether an in-place call changes a value that is later read under another name."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    root = _alias_roots(graph)
    for node, harmless in _writes(graph):
        if harmless:
            continue
        written = node.args[0] if node.args else None
        if not isinstance(written, Node) or _functional_twin(node.target) is None:
            return True
        # Later readings of `written` get the result instead, and so do those of the results of
        # earlier writes to it. Any other name of the storage that is read later is an alias.
        names = {written, node}
        while _mutates(written) and isinstance(written.args[0], Node):
            written = written.args[0]
            names.add(written)
        for other in graph.nodes:
            made_before = order[other] < order[node]
            read_after = any(order[user] > order[node] for user in other.users)
            if made_before and read_after and other not in names and root[other] is root[node]:
                return True
    return False


def _make_functional(graph: Graph) -> None:
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


def flatten_arguments(args: Sequence[Any]) -> list[Any]:
    """The arguments in the order of the graph's placeholders."""
    if all(isinstance(arg, Tensor) for arg in args):
        return list(args)
    return tree_flatten(tuple(args))[0]
