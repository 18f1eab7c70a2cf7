"""Every error the package raises on purpose: each names the cause, the place and the remedy."""

from __future__ import annotations


class RelativeLRPError(ValueError):
    """Base class of the package's errors."""


class InputError(RelativeLRPError, AssertionError):
    """The inputs, the target or the layer do not fit the model.

    Captum's methods raise an ``AssertionError`` for these, so code that catches it goes on working.
    """


class CaptureError(RelativeLRPError):
    """``torch.export`` could not capture the model as a static graph."""


class TrainingModeError(RelativeLRPError):
    """A module is in training mode and would mix samples or draw random numbers."""


class NonFiniteError(RelativeLRPError):
    """A value is infinite or NaN, in the input or where the model produced it."""


class UnsupportedOperationError(RelativeLRPError):
    """Relevance would have to pass through operations that have no rule."""
