"""Several explanations of one forward: the model runs once, relevance goes back several times."""

from __future__ import annotations

from dataclasses import replace

from ..rules import Pass


def fork(run: Pass) -> Pass:
    """The forward of a run, for a pass back of its own."""
    return replace(
        run,
        values=dict(run.values),
        scratch=dict(run.scratch),
        checked=list(run.checked),
        violation=None,
    )
