"""The relative rule of a linear section (method.md §2): the heart of the method.

Let x be the section's input, y = Jx + b its output and r_y the relevance at y. Then

    q   = x ⊙ Jᵀ r_y
    r_x = q · ‖r_y‖₁ / ‖q‖₁        (0 if ‖q‖₁ = 0)

with ‖·‖₁ over all elements of a sample. No single pre-activation is ever divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.fx import Node

from .base import Call, LinearRule, Relevance

if TYPE_CHECKING:
    from ..run.program import Run

Links = Sequence[tuple[LinearRule, Call]]


def relative(run: Run, start: Node, links: Links, r: Relevance) -> Relevance:
    """Relevance at the section's start from the relevance at its end.

    Args:
        run: The run the values belong to.
        start: The section's input.
        links: Its linear maps, first to last.
        r: Relevance at the end, one term with its mass.
    """
    v = run.plain(start)
    if v is not None and len(links) == 1 and not run.measures_delta:
        rule, call = links[0]
        product = rule.transpose_product(run, call, v, r, inplace=run.is_spent(start))
        if product is not None:
            return run.carried(*product, r)
    g, part = r.values, None
    for rule, call in reversed(links):
        here = rule.operand(call)
        found = rule.transpose_part(run, call, g) if here is start else None
        g, part = found or (rule.transpose(run, call, g), None)
        if here is not start and run.is_tapped(here):
            run.tap(here, [run.carry(here, g, r)])
    # What a transpose made anew may be overwritten; a view of the relevance itself may not.
    owned = g.untyped_storage().data_ptr() != r.values.untyped_storage().data_ptr()
    result = run.carry(start, g, r, may_overwrite=owned, part=part)
    if run.measures_delta:
        y = run.value(start).to(r.values.dtype)
        for rule, call in links:
            y = rule.linear_part(run, call, y)
        run.record_delta(start, result, links[-1][1].node, y, r)
    return result
