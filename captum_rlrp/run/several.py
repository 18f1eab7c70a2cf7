"""Several relevance passes over one forward."""

from __future__ import annotations

import copy

from .program import Run


def fork(run: Run) -> Run:
    """A run over the same values whose relevance pass leaves them as they are."""
    made = copy.copy(run)
    made.program = copy.copy(run.program)
    made.program.spent = [frozenset() for _ in run.program.spent]  # nothing is written over
    made.scratch = dict(run.scratch)
    made._values = dict(run._values)
    made._taps, made._masses, made._delta = {}, [], None
    return made
