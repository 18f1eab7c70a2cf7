"""What a rule is: how the relevance of one call's result reaches the call's operands."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Node

if TYPE_CHECKING:
    from .pass_ import Part, Pass

Slot = tuple[str, int | None]
"""Place of an operand: its argument's name, and its index where that is a list."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the graph, its arguments by name.

    Attributes:
        node: The node whose value the call yields (the first item, for an op that returns several).
        target: The ATen overload.
        args: Arguments by the names of the op's schema; values of the graph are nodes.
        active: The floating-point operands that depend on the explained inputs.
        item: Which item of the op's results the value is, if it returns several.
        slots: Where each active operand stands. One value may stand in two places.
        known: What :func:`once` notes.
    """

    node: Node
    target: Any
    args: dict[str, Any]
    active: tuple[Node, ...]
    item: int | None = None
    slots: tuple[Slot, ...] = field(default=())
    known: dict[Any, Any] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        """The op's name without its overload."""
        name: str = self.target.overloadpacket.__name__
        return name

    def is_active(self, name: str) -> bool:
        """Whether the argument of that name depends on the inputs."""
        return any(slot[0] == name for slot in self.slots)

    def nodes(self) -> Iterable[Node]:
        """All nodes among the arguments."""
        for value in self.args.values():
            yield from nodes_in(value)

    def at(self, slot: Slot) -> Node:
        """The operand at a place."""
        name, index = slot
        node: Node = self.args[name] if index is None else self.args[name][index]
        return node

    def shape(self, name: str | Node) -> Sequence[Any]:
        """Shape of an argument at capture; the batch size in it may be symbolic."""
        node = name if isinstance(name, Node) else self.args[name]
        return node.meta["val"].shape


def nodes_in(value: Any) -> Iterable[Node]:
    """All nodes in a nested argument."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nodes_in(item)


F = TypeVar("F", bound=Callable[..., Any])


def once(function: F) -> F:
    """Notes the result at the call, which is the last argument: every run asks again."""

    @functools.wraps(function)
    def noted(*args: Any) -> Any:
        key, known = (function, *args[:-1]), args[-1].known
        if key not in known:
            known[key] = function(*args)
        return known[key]

    return noted  # type: ignore[return-value]


class Rule:
    """How one kind of call passes relevance on. Rules hold no state and are shared."""

    def select(self, call: Call) -> Rule | None:
        """The rule for this very call; None if relevance cannot pass through it."""
        return self

    def carriers(self, call: Call) -> tuple[Node, ...]:
        """The operands that receive relevance."""
        return call.active

    def needs(self, call: Call) -> tuple[Node, ...]:
        """The values that :meth:`propagate` reads: they are kept from the forward."""
        return ()

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor | Part]:
        """Relevance at each carrier, from that at the result, which may not be written over."""
        raise NotImplementedError


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """As :meth:`Tensor.to`, at no cost where there is nothing to do."""
    return value if value.dtype == dtype else value.to(dtype)


def sum_to(value: Tensor, shape: Sequence[int]) -> Tensor:
    """The transpose of broadcasting."""
    return value if value.shape == shape else value.sum_to_size(list(shape))
