"""The model's own forward on the arguments at hand, before it is captured.

It fails where the model would, with the model's reason. It fills what the model caches outside
itself, so that capture leaves nothing of its own there. And it tells whether the samples are
explained apart: each by itself must come out as it does among the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError, InputError, RelativeLRPError
from ..graph.form import Form
from ..graph.plain import plain_layers
from ..graph.twins import twin
from .arguments import Batched, shapes_of, take

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


class Trial:
    """Forwards of a model's twin, which has its own buffers.

    Args:
        model: The model, left as it is.
        form: How it is called.
        args: Its arguments.
    """

    def __init__(self, model: nn.Module, form: Form, args: Sequence[Any]) -> None:
        self.model = model
        self.args = args
        self.root = twin(model, form, own_buffers=True)
        self.output = self._run(args)

    def _run(self, args: Sequence[Any], seed: int = 0) -> Tensor:
        tensors = [a for a in args if isinstance(a, Tensor)] if torch.cuda.is_available() else []
        devices = {a.device for a in tensors if a.is_cuda}
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                # Of the forked generators: the user's numbers stay in order.
                torch.default_generator.manual_seed(seed)
                for device in devices:
                    with torch.cuda.device(device):
                        torch.cuda.manual_seed(seed)
                with plain_layers():
                    output: Tensor = self.root(*args)
        except (RelativeLRPError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(
                f"{type(self.model).__name__} fails on these arguments ({shapes_of(args)}), with "
                f"or without an explanation: {type(error).__name__}: {error}{self._expects()}"
            ) from error
        return output.detach()

    def _expects(self) -> str:
        """What the first layer with weights takes."""
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or any(True for _ in module.children()):
                continue
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                wanted = f"integers from 0 to {module.num_embeddings - 1}"
            elif hasattr(module, "in_channels"):
                wanted = f"{module.in_channels} channels (dimension 1) of {_short(weight.dtype)}"
            elif hasattr(module, "in_features"):
                wanted = f"{module.in_features} features (last) of {_short(weight.dtype)}"
            else:
                continue
            return (
                f"\nIts first layer, {name or 'the model itself'} ({type(module).__name__}), "
                f"expects {wanted} on {weight.device}."
            )
        return ""

    def tells_apart(self, batch: int, batched: Batched, among_equals: bool = False) -> bool:
        """Whether the first and the last sample, each by itself, come out as in the batch.

        True where the model does not run on one sample.

        Args:
            batch: Number of samples.
            batched: Which arguments belong to them.
            among_equals: Instead of by itself, each goes through with copies of itself.
        """
        whole = self.output
        if not whole.dim() or whole.shape[0] != batch or not whole.isfinite().all():
            return True
        for row in dict.fromkeys((0, batch - 1)):
            rows: Any = [row] * batch if among_equals else slice(row, row + 1)
            some = [take(arg, rows, b) for arg, b in zip(self.args, batched, strict=True)]
            try:
                alone = self._run(some)
            except InputError:
                return True
            expected = whole[[row] * len(alone)] if alone.dim() else whole[row]
            if not self._agree(alone, expected):
                return False
        return True

    def is_random(self) -> bool:
        """Whether the same arguments give another output."""
        return not self._agree(self._run(self.args, seed=1), self.output)

    def check(self, output: Tensor) -> None:
        """Compares what the captured graph makes of the same arguments.

        Raises:
            CaptureError: If it is something else.
        """
        if not (self.output.isfinite().all() and output.isfinite().all()):
            return  # reported later, with the place
        if not self._agree(output, self.output):
            raise CaptureError(
                f"What was captured of {type(self.model).__name__} does not compute what its "
                "forward does: something in it cannot be captured, such as padding that depends "
                "on the values, or state that forward changes. Move it out of forward."
            )

    def _agree(self, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point() or not a.numel():
            return True
        tolerance = _TOLERANCE.get(a.dtype, 0.1)
        scale = self.output.double().abs().max()
        return bool((a.double() - b.double()).abs().max() <= tolerance * scale)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
