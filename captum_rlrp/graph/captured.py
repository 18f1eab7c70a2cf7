"""What a capture yields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._pytree import tree_flatten


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
        return not self.guards or all(
            guard.subs(dict.fromkeys(guard.free_symbols, batch_size)) == sympy.true
            for guard in self.guards
        )


def flatten_arguments(args: Sequence[Any]) -> list[Any]:
    """The arguments in the order of the graph's placeholders."""
    if all(isinstance(arg, Tensor) for arg in args):
        return list(args)
    return tree_flatten(tuple(args))[0]
