"""What a rule is: how the relevance of one call's result reaches the call's operands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

if TYPE_CHECKING:
    from ..run.program import Run


Part = tuple[slice, ...]
"""An index for each axis."""


class Relevance(NamedTuple):
    """Relevance at a value, ``r = factor · values``.

    The factor, one number per sample, is pending: the next kernel that reads the values applies
    it anyway, so no pass is spent on rescaling alone.

    Attributes:
        values: Shaped like the value it explains.
        factor: Shape ``(batch,)``; None means 1.
        mass: ``‖r‖₁`` per sample, shape ``(batch,)``; None where it was not measured.
        owned: Nobody else reads the values' memory, so they may be written over.
        part: Where the values lie in the value, if they are all that is not 0.
    """

    values: Tensor
    factor: Tensor | None = None
    mass: Tensor | None = None
    owned: bool = False
    part: Part | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the graph, its arguments by name.

    Attributes:
        node: The node whose value the call yields (the first item, for an op that returns several).
        target: The ATen overload.
        args: Arguments by the names of the op's schema; values of the graph are nodes.
        active: The floating-point operands that depend on the explained inputs.
    """

    node: Node
    target: Any
    args: dict[str, Any]
    active: tuple[Node, ...]
    item: int | None = field(default=None)

    def is_active(self, name: str) -> bool:
        """Whether the argument of that name depends on the inputs."""
        return self.args.get(name) in self.active

    def nodes(self) -> Iterable[Node]:
        """All nodes among the arguments."""
        for value in self.args.values():
            yield from nodes_in(value)

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

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        """Relevance at each carrier, from the terms that arrived at the result (to be summed)."""
        raise NotImplementedError


class LinearRule(Rule):
    """A linear map, a link of a section (method.md §2). One operand is active.

    The default transposes by automatic differentiation, which for a linear map is its exact
    adjoint and depends on no value of the operand.
    """

    def operand(self, call: Call) -> Node:
        """The operand the map is linear in."""
        return call.active[0]

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return (self.operand(call),)

    def needs(self, call: Call) -> tuple[Node, ...]:
        operand = self.operand(call)
        return tuple(node for node in call.nodes() if node is not operand)

    def transpose(self, run: Run, call: Call, g: Tensor) -> Tensor:
        """``Jᵀ g``, shaped like the operand."""
        return adjoint(run, call, self.operand(call), g)

    def transpose_product(
        self, run: Run, call: Call, v: Tensor, r: Relevance, inplace: bool
    ) -> tuple[Tensor, Tensor] | None:
        """``q = v ⊙ Jᵀ r`` at the operand v, over v if asked, and ``‖q‖₁``; None if not at once."""
        return None

    def transpose_part(self, run: Run, call: Call, g: Tensor) -> tuple[Tensor, Part] | None:
        """``Jᵀ g`` at the part of the operand that the map reads; None if it is to be whole."""
        return None

    def linear_part(self, run: Run, call: Call, x: Tensor) -> Tensor:
        """``J x``: the map without its constant."""
        return run.evaluate(call, {self.operand(call): x})

    def one_to_one(self, call: Call) -> bool:
        """Whether every output depends on exactly one input."""
        return False

    def route(self, run: Run, call: Call, r: Tensor) -> Tensor:
        """For a one-to-one map: relevance follows the elements, whatever the coefficients."""
        return self.transpose(run, call, r)


def adjoint(
    run: Run, call: Call, operand: Node, g: Tensor, overrides: Mapping[str, Any] | None = None
) -> Tensor:
    """``Jᵀ g`` of a call that is linear in one operand, by automatic differentiation."""
    with torch.inference_mode(False), torch.enable_grad():
        like = run.like(operand)
        # Linear: the adjoint depends on the operand's shape alone, so no memory is spent on it.
        x = torch.zeros((), dtype=g.dtype, device=g.device).expand(like.shape)
        if any(stride == 0 for stride in x.stride()) and not _is_view(call):
            x = torch.zeros(like.shape, dtype=g.dtype, device=g.device)
        x = x.detach().requires_grad_()
        y = run.evaluate(call, {operand: x}, dtype=g.dtype, overrides=overrides)
        (result,) = torch.autograd.grad(y, x, _plain(g), allow_unused=True)
    return x.detach().new_zeros(x.shape) if result is None else result.detach()


def _is_view(call: Call) -> bool:
    return bool(getattr(call.target, "is_view", False))


def _plain(value: Tensor) -> Tensor:
    """A tensor autograd may save: values made in inference mode are copied."""
    return value.clone() if value.is_inference() else value


def sum_to(value: Tensor, shape: Sequence[int]) -> Tensor:
    """The transpose of broadcasting."""
    return value if value.shape == torch.Size(shape) else value.sum_to_size(list(shape))
