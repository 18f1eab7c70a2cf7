"""Every way an explanation may take gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from captum_rlrp.graph.capture import CapturedGraph
from captum_rlrp.run import capturing
from tests.oracle import relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
DELTA = {torch.float64: 1e-10, torch.float32: 1e-3}


@contextmanager
def one_capture() -> Iterator[None]:
    """Capture takes most of the time; the backends share it."""
    capture = capturing.capture  # what a fixture may have replaced
    known: dict[Any, CapturedGraph] = {}

    def once(model: nn.Module, args: Sequence[Any], batch: int | None, *more: Any) -> Any:
        if batch not in known:
            known[batch] = capture(model, args, batch, *more)
        return known[batch]

    with mock.patch.object(capturing, "capture", once):
        yield


def all_paths(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    target: Any,
    additional: Any = None,
    *,
    tolerance: float | None = None,
    delta: float | None = None,
) -> tuple[Tensor, ...]:
    """The attributions of the default path, once these agree with it: traced, from the trace, with
    delta, by the reference kernels, and each sample alone. Σ|R| ≤ 1 of every sample.

    Args:
        model: The model, in eval mode.
        inputs: What to explain, samples first.
        target: One for all, or one for each sample.
        additional: ``additional_forward_args``.
        tolerance: Largest relative difference.
        delta: Largest convergence delta.
    """
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    dtype = inputs[0].dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    delta = DELTA[dtype] if delta is None else delta
    with one_capture():
        rlrp = RelativeLRP(model)
        found = rlrp.attribute(inputs, target, additional)
        traced, replayed = (rlrp.attribute(inputs, target, additional) for _ in range(2))
        measured, deltas = rlrp.attribute(inputs, target, additional, return_convergence_delta=True)
        reference = RelativeLRP(model, backend="reference").attribute(inputs, target, additional)
        alone = [
            rlrp.attribute(tuple(x[i : i + 1] for x in inputs), _of(target, i), additional)
            for i in range(len(inputs[0]))
        ]
    others = {
        "traced": traced,
        "from the trace": replayed,
        "with delta": measured,
        "by the reference": reference,
        "alone": tuple(map(torch.cat, zip(*alone, strict=True))),
    }
    for name, other in others.items():
        for i, (a, b) in enumerate(zip(found, other, strict=True)):
            assert a.dtype == (torch.float32 if dtype == torch.float16 else dtype)
            error = relative_error(b, a)
            assert error <= tolerance, f"{name}, input {i}: differs by {error:.1e}"
    assert deltas.shape == (len(inputs[0]),)
    assert deltas.max() <= delta, f"delta {deltas.max():.1e}"
    mass = sum(a.double().abs().flatten(1).sum(1) for a in found)
    assert (mass <= 1 + 10 * tolerance).all(), f"Σ|R| = {mass}"
    return found


def _of(target: Any, sample: int) -> Any:
    """The target of one sample."""
    return target[sample : sample + 1] if isinstance(target, (list, Tensor)) else target
