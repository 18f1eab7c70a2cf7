"""A capture that leaves sizes open, closed for those at hand.

Rules and plans read numbers off shapes. So the exported program keeps the sizes of pictures and
sequences as symbols, and a copy of its graph has numbers in their place: export, which takes
nearly all of the time of a capture, runs once for all sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.utils._pytree import tree_map


class Numbers(dict[sympy.Symbol, int]):
    """Symbol → number, with the expressions that were worked out by them."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, Any] = {}

    def put(self, expression: Any) -> Any:
        """An expression with numbers for symbols."""
        if expression not in self._known:
            found = sympy.sympify(sympy.sympify(expression).xreplace(self))
            self._known[expression] = found
        return self._known[expression]


@dataclass(frozen=True)
class Closed:
    """An exported program with numbers for sizes; the batch may still be a symbol.

    Attributes:
        graph: A copy of the program's graph.
        guards: What the batch size must satisfy besides.
    """

    graph: Graph
    graph_module: Any
    graph_signature: Any
    constants: Any
    guards: tuple[sympy.Basic, ...]


def close(program: Any, leaves: Sequence[Any], batched: Sequence[bool]) -> Closed | None:
    """The program for the sizes of these arguments.

    Args:
        program: What export returned, its sub-graphs inlined.
        leaves: The arguments, flattened.
        batched: Of each, whether its dimension 0 is the batch, which stays as it is.

    Returns:
        None where forward takes another way for these sizes.
    """
    numbers = _numbers(program, leaves, batched)
    if numbers is None:
        return None
    environment = _environment(program.graph)
    guards = []
    for guard in environment.guards if environment is not None else ():
        if not numbers.keys() & guard.expr.free_symbols:
            continue  # on the batch alone
        holds = numbers.put(guard.expr)
        if holds.free_symbols:
            static = environment._maybe_evaluate_static(holds)
            holds = holds if static is None else static
        if holds == sympy.false:
            return None
        if holds != sympy.true:
            guards.append(holds)
    graph = Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in list(graph.nodes):
        if "val" not in node.meta:
            continue
        value = tree_map(lambda v: _closed(v, numbers), node.meta["val"])
        if isinstance(value, (bool, int, float)) and node.op == "call_function":
            node.replace_all_uses_with(value)
            graph.erase_node(node)
        else:
            node.meta["val"] = value
    return Closed(
        graph, program.graph_module, program.graph_signature, program.constants, tuple(guards)
    )


def _inputs(program: Any) -> Iterator[Node]:
    placeholders = (node for node in program.graph.nodes if node.op == "placeholder")
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            yield node


def _numbers(program: Any, leaves: Sequence[Any], batched: Sequence[bool]) -> Numbers | None:
    """The numbers of the open sizes; None where another size was taken for a constant."""
    numbers = Numbers()
    for node, leaf, has_batch in zip(_inputs(program), leaves, batched, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        first = 1 if has_batch else 0
        size: Any
        for size, number in zip(value.shape[first:], leaf.shape[first:], strict=True):
            symbol = sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)
            if isinstance(symbol, sympy.Symbol):
                known = size.node.shape_env.var_to_range[symbol]
                if number < 2 or number not in known or numbers.get(symbol, number) != number:
                    return None
                numbers[symbol] = number
            elif symbol.xreplace(numbers) != number:
                return None
    return numbers


def _environment(graph: Graph) -> Any:
    """Where the symbols and what forward asked of them are kept."""
    for node in graph.nodes:
        value = node.meta.get("val")
        sizes: Sequence[Any] = value.shape if isinstance(value, Tensor) else ()
        for size in sizes:
            if isinstance(size, torch.SymInt):
                return size.node.shape_env
    return None


def _closed(value: Any, numbers: Numbers) -> Any:
    if isinstance(value, torch.SymInt):
        expression = sympy.sympify(value.node.expr)
        if not numbers.keys() & expression.free_symbols:
            return value if expression.free_symbols else int(expression)
        closed = numbers.put(expression)
        if not closed.free_symbols:
            return int(closed)
        environment: Any = value.node.shape_env
        hint = int(environment.size_hint(closed))
        return environment.create_symintnode(closed, hint=hint)
    if isinstance(value, (torch.SymBool, torch.SymFloat)):
        closed = numbers.put(value.node.expr)
        kind = bool if isinstance(value, torch.SymBool) else float
        return value if closed.free_symbols else kind(closed)
    if isinstance(value, Tensor):
        shape, stride = (
            [_closed(n, numbers) for n in one] for one in (value.shape, value.stride())
        )
        with value.fake_mode:  # type: ignore[attr-defined]
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return value
