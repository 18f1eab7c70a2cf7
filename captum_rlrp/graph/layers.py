"""Which values of a captured graph are a module's outputs or inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.fx import Node

from ..errors import InputError
from .active import active_values
from .captured import CapturedGraph
from .nodes import reads_values


def module_names(model: nn.Module, module: nn.Module) -> list[str]:
    """Every name the module goes by in the model.

    Raises:
        InputError: If it is not part of the model.
    """
    names = [name for name, found in model.named_modules(remove_duplicate=False) if found is module]
    if not names:
        raise InputError(
            f"The layer {type(module).__name__} is not a module of the model: pass a module object "
            "taken from the model itself, such as model.layer4."
        )
    return names


def tied_names(model: nn.Module, module: nn.Module) -> list[str]:
    """Names of the other modules of its kind that share its weight: tied embeddings.

    Of T5's, the one that ``get_input_embeddings`` returns is not the one that forward calls.
    """
    weight = getattr(module, "weight", None)
    return [
        name
        for name, other in model.named_modules(remove_duplicate=False)
        if other is not module
        and weight is not None
        and type(other) is type(module)
        and other.weight is weight
    ]


def _calls(graph: CapturedGraph, names: Sequence[str]) -> list[list[Node]]:
    """The nodes of each call of the module, in order of execution."""
    calls: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if path in names:
                calls.setdefault(key, []).append(node)
    if "" in names and not calls:
        calls[""] = [n for n in graph.nodes if n.op == "call_function"]
    return list(calls.values())


def layer_calls(
    graph: CapturedGraph,
    explained: Sequence[Node],
    names: Sequence[str],
    of_inputs: bool,
    tied: Sequence[str] = (),
) -> list[Node]:
    """The values that leave (or enter) the module, call by call.

    Args:
        graph: The captured model.
        explained: Its explained inputs.
        names: The names of the module.
        of_inputs: Whether the values that enter are meant.
        tied: Names of modules to take in its place, where itself is not called.

    Raises:
        InputError: If the module is not called, or has no operation of its own.
    """
    active = active_values(graph, explained)
    reachable = set(graph.nodes)
    found: list[Node] = []
    for nodes in _calls(graph, names):
        inside = set(nodes)
        if of_inputs:
            values = [s for n in nodes for s in n.all_input_nodes if s not in inside]
        else:
            values = [
                n
                for n in nodes
                if n is graph.output
                or any(u in reachable and u not in inside and reads_values(u) for u in n.users)
            ]
        found += [n for n in dict.fromkeys(values) if n in active]
    if not found and tied:
        return layer_calls(graph, explained, tied, of_inputs)
    if not found:
        where = "reads" if of_inputs else "computes"
        raise InputError(
            f"The layer '{names[0]}' {where} no value that depends on the inputs and leads to the "
            "output. Choose a layer that the explained output goes through."
        )
    return found


def leaf_calls(
    model: nn.Module, graph: CapturedGraph, explained: Sequence[Node]
) -> list[tuple[str, list[Node]]]:
    """Leaf modules that carry relevance, with their outputs, in order of execution."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    leaves: list[tuple[str, list[Node]]] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if any(True for _ in module.children()) or id(module) in seen:
            continue
        seen.add(id(module))
        try:
            nodes = layer_calls(graph, explained, module_names(model, module), of_inputs=False)
        except InputError:
            continue
        leaves.append((name, nodes))
    return sorted(leaves, key=lambda leaf: order[leaf[1][0]])
