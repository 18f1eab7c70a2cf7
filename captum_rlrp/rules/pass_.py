"""What rules read of a run: values, shapes and kernels, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.layout import Layout
from ..graph.sign import is_nonnegative
from .base import Call, Slot


class Like(NamedTuple):
    """What is remembered of a value that was not kept."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """A value like it, of zeros, whose elements lie in the same order."""
        order = sorted(range(len(self.shape)), key=self.stride.__getitem__, reverse=True)
        zeros = torch.zeros([self.shape[d] for d in order], dtype=dtype, device=self.device)
        return zeros.permute([order.index(d) for d in range(len(order))])


class Part(NamedTuple):
    """Relevance of some elements along an axis of a value, and none of the others."""

    relevance: Tensor
    dim: int
    start: int

    def add_to(self, whole: Tensor) -> None:
        """Adds it in its place."""
        whole.narrow(self.dim, self.start, self.relevance.shape[self.dim]).add_(self.relevance)


@dataclass
class Pass:
    """One forward of the model and the propagation of relevance over it.

    Attributes:
        kernels: The backend that does the arithmetic.
        values: The values at hand; those that no rule needs are gone.
        likes: Shape and the like of every value that relevance may reach.
        layouts: Where the batch lies in them.
        output: The node of the model's output.
        batch: Number of samples.
        column: Where relevance starts as one unit in each row of a matrix: its column.
        magnitudes: Absolute values that were worked out together, ahead of their steps.
        scratch: What the forward leaves for the rules.
        checked: Numbers that tell whether all was finite, and no divisor too small.
        arrived: Relevance that has arrived at values whose turn has not come: what is to be added.
        violation: Largest violation of the local law so far, if it is measured: a float64 vector
            of one number per sample.
    """

    kernels: ModuleType
    values: dict[Node, Any]
    likes: dict[Node, Like]
    layouts: Mapping[Node, Layout]
    output: Node
    batch: int = 1
    column: Tensor | None = None
    magnitudes: dict[Node, Tensor] = field(default_factory=dict)
    scratch: dict[Any, Any] = field(default_factory=dict)
    checked: list[Tensor] = field(default_factory=list)
    arrived: dict[Node, list[Tensor | Part]] = field(default_factory=dict)
    violation: Tensor | None = None

    def value(self, argument: Any) -> Any:
        """The value of a node, or of an argument made of nodes."""
        if isinstance(argument, Node):
            return self.values[argument]
        if isinstance(argument, (list, tuple)):
            return type(argument)([self.value(item) for item in argument])
        if isinstance(argument, dict):
            return {key: self.value(item) for key, item in argument.items()}
        if isinstance(argument, slice):
            return slice(*map(self.value, (argument.start, argument.stop, argument.step)))
        return argument

    def magnitude(self, node: Node, dtype: torch.dtype) -> Tensor:
        """The absolute value of a node's value."""
        found = self.magnitudes.get(node)
        value: Tensor = self.values[node].abs() if found is None else found
        return value.to(dtype)

    def like(self, node: Node) -> Like:
        """Shape, dtype and device of a value, kept or not."""
        return self.likes[node]

    def samples_first(self, node: Node, value: Tensor) -> Tensor:
        """A tensor laid out as the value of a node, with the samples as dimension 0 (a view)."""
        return self.layouts[node].samples_first(value, self.batch)

    def per_sample(self, node: Node, numbers: Tensor, shape: torch.Size) -> Tensor:
        """One number for each sample, shaped to broadcast against the value of a node."""
        return self.layouts[node].spread(numbers, shape)

    def check(self, total: Tensor) -> None:
        """Notes numbers that have to be finite, and moderate (:attr:`checked`)."""
        self.checked.append(total if total.dim() else total.reshape(1))

    def watch(self, value: Tensor) -> None:
        """Notes the sum of a value that has to be finite, and moderate."""
        self.check(self.kernels.sums([value]))

    def take(self, node: Node) -> Tensor | None:
        """Relevance that has arrived at a value, for a rule that adds it to its own part.

        None where there is none, or where each rule's own part is measured.
        """
        terms = self.arrived.get(node)
        if not terms or self.violation is not None or isinstance(terms[-1], Part):
            return None
        term = terms.pop()
        assert isinstance(term, Tensor)
        return term

    def total(self, node: Node, terms: Sequence[Tensor | Part]) -> Tensor:
        """The sum of what has arrived at a value."""
        parts = sorted((t for t in terms if isinstance(t, Part)), key=lambda part: part.start)
        wholes = [t for t in terms if isinstance(t, Tensor)]
        if not parts:
            return wholes[0] if len(wholes) == 1 else self.kernels.add(wholes)
        like = self.like(node)
        if not wholes and _tile(parts, like.shape):
            return torch.cat([part.relevance for part in parts], parts[0].dim)
        total = self.kernels.add(wholes) if wholes else like.zeros(parts[0].relevance.dtype)
        for part in parts:
            part.add_to(total)
        return total

    def evaluate(
        self,
        call: Call,
        given: Mapping[Slot, Tensor],
        *,
        absolute: tuple[str, ...] = (),
        overrides: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Calls the op again with other values for some operands.

        Args:
            call: The call.
            given: Place of an operand → value to use there; floating-point operands are cast to its
                dtype.
            absolute: Names of arguments whose absolute value is taken.
            overrides: Argument name → value to use in its place.
        """
        dtype = next(iter(given.values())).dtype if given else None

        def fill(argument: Any, slot: Slot) -> Any:
            if slot in given:
                return given[slot]
            if isinstance(argument, (list, tuple)):
                filled = [fill(item, (slot[0], i)) for i, item in enumerate(argument)]
                return type(argument)(filled)
            if not isinstance(argument, Node):
                return argument
            if argument in self.values:
                value = self.values[argument]
            else:  # an operand that the result does not depend on but by its shape
                like = self.likes[argument]
                value = torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
            if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
                if slot[0] in absolute and not is_nonnegative(argument):
                    value = self.magnitude(argument, dtype)
                else:
                    value = value.to(dtype)
                return value.clone() if value.is_inference() else value
            return value

        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in call.target._schema.arguments:
            name = parameter.name
            value = call.args[name]
            if overrides and name in overrides:
                value = overrides[name]
            elif name == "dtype" and isinstance(value, torch.dtype) and dtype is not None:
                value = dtype
            else:
                value = fill(value, (name, None))
            if parameter.kwarg_only:
                kwargs[name] = value
            else:
                args.append(value)
        result = call.target(*args, **kwargs)
        return result[call.item] if call.item is not None else result


def _tile(parts: Sequence[Part], shape: Sequence[int]) -> bool:
    """Whether the parts, in order, lie side by side and are all of the value."""
    end, dim = 0, parts[0].dim
    for part in parts:
        if part.dim != dim or part.start != end:
            return False
        end += part.relevance.shape[dim]
    return end == shape[dim]
