"""Local response norm as one call of the graph, a normalisation like the others.

PyTorch writes it as a quotient by what it computes of neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@torch.library.custom_op("captum_rlrp::local_response_norm", mutates_args=())
def local_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """See :func:`torch.nn.functional.local_response_norm`."""
    result: Tensor = functional.local_response_norm(input, size, alpha, beta, k)
    return result


@local_response_norm.register_fake
def _(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    return torch.empty_like(input)


class LocalNorms(TorchFunctionMode):
    """The mode in which it is one call."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.local_response_norm:
            return _call(*args, **kwargs)
        return func(*args, **kwargs)


def _call(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    result: Tensor = local_response_norm(input, size, float(alpha), float(beta), float(k))
    return result
