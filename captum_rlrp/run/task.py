"""One explanation: what is explained, and its two halves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..rules.pass_ import Pass
from .program import Program, Result, totals

# Relevance at the output and, where it is one-hot along dimension 1, the column of each sample.
Start = tuple[Tensor, Tensor | None]
Begin = Callable[[Tensor], Start]
Outcome = tuple[Result, Tensor]


@dataclass
class Task:
    """What is explained.

    Attributes:
        program: The program.
        values: The values of its placeholders.
        explained: Those whose relevance is asked for.
        begin: The model's output → relevance there, and the column where it starts.
        batch: Number of samples.
        measure_delta: Whether to measure the violation of the local law.
    """

    program: Program
    values: Mapping[Node, Any]
    explained: Sequence[Node]
    begin: Begin
    batch: int
    measure_delta: bool

    @property
    def inputs(self) -> dict[Node, Tensor]:
        """Tensors that every call passes anew."""
        values = {node: self.values[node] for node in self.program.graph.inputs}
        return {node: value for node, value in values.items() if isinstance(value, Tensor)}

    def run(self) -> Outcome:
        """The relevance, and what tells whether it can be trusted (:func:`totals`)."""
        run = self.forward()
        return self.back(run, *self.begin(run.values[run.output]))

    def forward(self) -> Pass:
        """The first half of :meth:`run`."""
        return self.program.forward(self.values)

    def back(self, run: Pass, start: Tensor, column: Tensor | None) -> Outcome:
        """The second half, from that start."""
        output = run.values[run.output]
        result = self.program.propagate(run, start, column, self.batch, self.measure_delta)
        return result, totals(run, [*self.floating, output], result)

    @property
    def floating(self) -> list[Tensor]:
        """The explained inputs that are floating-point numbers."""
        values = [self.values[node] for node in self.explained]
        return [x for x in values if x.is_floating_point()]

    @property
    def device(self) -> torch.device | None:
        """Where all tensors lie; None if they lie in several places."""
        devices = {v.device for v in self.values.values() if isinstance(v, Tensor)}
        return devices.pop() if len(devices) == 1 else None
