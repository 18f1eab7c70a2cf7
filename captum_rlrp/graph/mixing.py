"""Calls that mix the samples of a batch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import Node

from ..errors import CaptureError
from .captured import CapturedGraph
from .layout import Layout
from .nodes import bind, place_of, reads_values

# These treat the samples alike, unless they run along the batch's axis.
_ALONG = {
    "softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod",
    "logcumsumexp", "cummax", "cummin", "sort", "argsort", "topk", "flip", "roll",
}  # fmt: skip


def check_apart(graph: CapturedGraph, layouts: Mapping[Node, Layout]) -> None:
    """Refuses a graph in which samples influence each other, as far as the calls tell.

    Raises:
        CaptureError: Naming the call.
    """
    if graph.batch is None:
        return
    for node in graph.nodes:
        if node.op == "call_function" and _mixes(node, layouts):
            raise mixed(node)


def mixed(node: Node) -> CaptureError:
    """The error for a call behind which samples cannot be told apart."""
    return CaptureError(
        f"The samples of a batch cannot be told apart behind {node.target} in {place_of(node)}: "
        "the model mixes them there, so there is no explanation per sample. Explain the samples "
        "one by one, or rewrite the operation. Of a graph network with a row for each node, "
        "choose one: output=lambda y: y[node:node + 1]."
    )


def _mixes(node: Node, layouts: Mapping[Node, Layout]) -> bool:
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    if name not in _ALONG or not reads_values(node):
        return False
    operand = node.all_input_nodes[0]
    value = operand.meta.get("val")
    if operand not in layouts or not isinstance(value, Tensor):
        return False
    args = bind(node)
    along = args.get("dims", args.get("dim"))
    along = along if isinstance(along, (list, tuple)) else [along]
    layout = layouts[operand]
    axes = [axis % value.dim() for axis in along if isinstance(axis, int)]
    if name == "roll" and not axes:
        axes = list(range(value.dim()))
    return layout.dim in axes
