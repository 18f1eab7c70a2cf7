"""The final section (method.md §2): all linear maps between the last non-linearity and the output.

They count as one map, y = J x + b, and the one unit r that starts at the output gives

    q = x ⊙ Jᵀ r,    r_x = q / ‖q‖₁        (0 if ‖q‖₁ = 0)

the dense law for one output, with its signs, whatever the maps are. A mean or sum over positions in
front of the last weights is not among them (``plan/steps.py``): it keeps the law of spatial maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from .base import Call, cast
from .linear import LinearRule, note_violation

if TYPE_CHECKING:
    from .pass_ import Pass

Links = Sequence[tuple[LinearRule, Call]]


def explain_output(run: Pass, links: Links, r: Tensor, asked: Sequence[Node]) -> list[Tensor]:
    """Relevance at the section's start, and at values inside it.

    Args:
        run: The run.
        links: The linear maps, first to last.
        r: Relevance at the last one's output.
        asked: Operands of links; the first link's among them.

    Returns:
        Relevance at each value asked for.
    """
    g = r
    found: dict[Node, Tensor] = {}
    for rule, call in reversed(links):
        g = rule.transpose(run, call, g)
        operand = rule.operand(call)
        if operand in asked:
            found[operand] = _normalised(run, operand, cast(run.values[operand], g.dtype) * g)
    if run.violation is not None:
        _measure(run, links, r, g, found)
    return [found[node] for node in asked]


def _normalised(run: Pass, node: Node, q: Tensor) -> Tensor:
    """q / ‖q‖₁."""
    norm = _norm(run, node, q)
    inverse, seen = run.kernels.divide(torch.ones_like(norm), norm)
    run.check(seen)
    return q * run.per_sample(node, inverse, q.shape)


def _norm(run: Pass, node: Node, q: Tensor) -> Tensor:
    return run.samples_first(node, q).reshape(run.batch, -1).abs().sum(1)


def _measure(run: Pass, links: Links, r: Tensor, g: Tensor, found: dict[Node, Tensor]) -> None:
    rule, call = links[0]
    start, end = rule.operand(call), links[-1][1]
    x = run.value(start).to(r.dtype)
    y = x
    for rule, call in links:
        y = rule.apply(run, call, y)
    norm = _norm(run, start, x * g).double()
    inverse = torch.where(norm > 0, 1 / norm, 0.0)
    kept = y.double() * run.per_sample(end.node, inverse, y.shape)
    note_violation(run, end, start, r, kept, found[start])
