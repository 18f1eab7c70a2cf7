"""Calls of the forward that are not PyTorch's: small products, sums over axes, elementwise ones.

Results of elementwise ones go to working memory: where memory comes fresh from the system, finding
its pages takes longer than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels import compiled

aten = torch.ops.aten

_ELEMENTWISE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.gelu.default,
    aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.hardswish.default,
    aten.hardsigmoid.default, aten.leaky_relu.default, aten.hardtanh.default, aten.elu.default,
    aten.mish.default, aten.softplus.default,
}  # fmt: skip


def own_call(node: Node) -> Callable[..., Tensor] | None:
    """What runs in place of a node's call; None where PyTorch's own does."""
    if node.target is aten.batch_norm.default:
        return _batch_norm
    if node.target is aten.sum.dim_IntList:
        return _sum
    if node.target in (aten.matmul.default, aten.bmm.default):
        return compiled.matmul
    if node.target not in _ELEMENTWISE:
        return None
    operand = node.args[0]
    if not isinstance(operand, Node):
        return None
    first, result = operand.meta["val"], node.meta["val"]
    others = [n.meta["val"] for n in node.all_input_nodes]
    if first.shape != result.shape or any(t.dtype != result.dtype for t in others):
        return None
    target: Any = node.target
    out = target.overloadpacket.out

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = out(x, *args, **kwargs, out=compiled.empty_like(x))
        return result

    return call


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    if training or not x.is_cpu or mean is None or x.dtype != mean.dtype:
        normalised: Tensor = aten.batch_norm.default(
            x, weight, bias, mean, variance, training, momentum, eps, cudnn
        )
        return normalised
    none = [mean.new_empty(0) for _ in range(2)]  # statistics of a batch
    y, *_ = aten.native_batch_norm.out(
        x, weight, bias, mean, variance, False, momentum, eps,
        out=compiled.empty_like(x), save_mean=none[0], save_invstd=none[1],
    )  # fmt: skip
    result: Tensor = y
    return result


def _sum(
    x: Tensor, dim: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The result lies as x does: PyTorch's own is slow where it has to lie otherwise."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if not dim or order == list(range(x.dim())):
        return x.sum(dim, keepdim, dtype=dtype)
    axes = sorted({d % x.dim() for d in dim}, reverse=True)
    y = x.permute(order).sum([order.index(d) for d in axes], keepdim=True, dtype=dtype)
    y = y.permute([order.index(d) for d in range(x.dim())])
    for d in () if keepdim else axes:
        y = y.squeeze(d)
    return y
