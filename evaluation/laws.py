"""The law of docs/method.md written a second time, to check the package and to try other laws.

Shares no code with the package. While the model runs under `Tracer`, each operation on a tensor
that depends on the input gets a backward of its own: what autograd carries back as the gradient is
the relevance. `Law()` is the method as defined; every field is a choice that could be another one.

A law has no parameter to tune: `negative` weights only name what is kept of c < 0 in the share
f(c) / D of a contribution c: |c| (+1), nothing (0), its sign (−1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

Map = Callable[[Tensor, Tensor], Tensor]  # inputs, weights → outputs, linear in either


@dataclass(frozen=True)
class Law:
    """Every choice; the defaults are the method."""

    spatial: float = 1.0  # what is kept of negative contributions in spatial maps
    dense: float = -1.0  # in dense maps
    pointwise: float | None = None  # in 1×1 convolutions; None: as in spatial maps
    depthwise: float | None = None  # in convolutions with one input channel for each group
    pool: float | None = None  # in average pooling, means and sums
    relative: bool = False  # signs are those of c to the output y: c supports y if both agree
    divisor: str = "absolute"  # Σ|c|; "positive": Σc⁺; "bias": Σ|c| + |b|; "squares": Σc²
    first: str = "x"  # the first map's contributions; "flat", "|w|", "w²": without x
    winner: bool = True  # max pooling: all to the winner; otherwise shares of the window
    sums: str = "absolute"  # sums of activations; "half"; "signed": a over the sum, relative;
    #                         "norm": Σ|a| over features against Σ|b|
    final: str = "section"  # signed after the last non-linearity, or the mean or sum behind it;
    #                         "composed": that mean is part of it; "layer": no section at all;
    #                         "dense": signed product from the last map that is not dense on
    unit: str = "one"  # relevance starts with one; "contrast": less softmax of the others


def divide(r: Tensor, by: Tensor) -> Tensor:
    return torch.where(by == 0, 0, r / by)


class Shares(Function):
    """A linear map; r_i = Σ_j r_j f(c_ji) / D_j."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(x, w, b, y)
        ctx.how = how
        return y.clone()

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:
        x, w, b, y = ctx.saved_tensors
        apply, negative, law, is_first = ctx.how
        if is_first and law.first != "x":
            x = torch.ones_like(x)
            w = {"flat": torch.ones_like(w), "|w|": w.abs(), "w²": w * w}[law.first]
        if law.divisor == "squares":
            x, w = x * x, w * w
            by = apply(x, w)
            return x * transpose(apply, x, w, divide(r, by)), *[None] * 7
        by = apply(x.abs(), w.abs())
        if law.divisor.startswith("root") and (negative == -1 or law.divisor == "root"):
            by = apply(x * x, w * w).sqrt()
        if law.divisor == "positive" and negative == 0:  # Σc⁺; what rounding leaves of it is 0
            positive = (by + apply(x, w)) / 2
            by = torch.where(positive < 1e-6 * by, 0, positive)
        if law.divisor == "bias" and b is not None:
            by = by + b.abs().view(-1, *[1] * (w.dim() - 2))
        s = divide(r, by)
        out = torch.zeros_like(x)
        if negative != -1:
            out = out + (1 + negative) / 2 * x.abs() * transpose(apply, x, w.abs(), s)
        if negative != 1:
            signed = s * y.sign() if law.relative else s
            out = out + (1 - negative) / 2 * x * transpose(apply, x, w, signed)
        return out, *[None] * 7


def transpose(apply: Map, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return torch.func.vjp(lambda v: apply(v, w), x)[1](s)[0]


class Through(Function):
    """Relevance passes unchanged; a broadcast operand receives the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.shape = x.shape
        return y.clone()

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor, None]:
        return r.sum_to_size(ctx.shape), None


class Sum(Function):
    """Relevance in proportion to |a| and |b|, or as the law has it."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, y: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(a, b, y)
        ctx.how = how
        return y.clone()

    @staticmethod
    def backward(ctx: Any, r: Tensor) -> tuple[Tensor | None, ...]:
        a, b, y = ctx.saved_tensors
        size_a, size_b = a.abs(), b.abs()
        if ctx.how == "half":
            size_a, size_b = torch.ones_like(a), torch.ones_like(b)
        elif ctx.how == "norm":
            axes = 1 if a.dim() == 4 else -1
            size_a, size_b = size_a.sum(axes, keepdim=True), size_b.sum(axes, keepdim=True)
        both = size_a + size_b
        share_a = torch.where(both == 0, 0.5, size_a / both)
        share_b = 1 - share_a
        if ctx.how == "signed":
            share_a, share_b = share_a * a.sign() * y.sign(), share_b * b.sign() * y.sign()
        return (r * share_a).sum_to_size(a.shape), (r * share_b).sum_to_size(b.shape), None, None


class Start(Function):
    """Where the final section begins: the gradient g comes in, x ⊙ g over its sum goes on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        q = ctx.saved_tensors[0] * g
        mass = q.abs().flatten(1).sum(1).view(-1, *[1] * (q.dim() - 1))
        return divide(q, mass)


NEVER = 10**9  # an operation that does not come

ACTIVATIONS = {"relu", "relu_", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardtanh",
               "relu6", "leaky_relu", "elu", "clamp", "layer_norm", "group_norm",
               "instance_norm"}  # fmt: skip
ONE_TO_ONE = {"batch_norm", "dropout", "softmax", "log_softmax", "sigmoid_"}
ADDITIONS = {"add", "add_", "sub", "sub_", "rsub", "__radd__", "__rsub__", "__add__"}
FACTORS = {"mul", "mul_", "div", "div_", "__rmul__", "__mul__", "neg"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
POOLS = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
         "mean", "sum", "interpolate"}  # fmt: skip
WEIGHTS = CONVOLUTIONS | {"linear", "matmul"}
PLAIN = {"reshape", "view", "flatten", "permute", "transpose", "__getitem__", "cat", "stack", "pad",
         "squeeze", "unsqueeze", "expand", "contiguous", "chunk", "split", "max_pool1d",
         "max_pool2d", "adaptive_max_pool2d", "to", "float", "double", "type_as", "amax", "clone",
         "detach"}  # fmt: skip


class Tracer(TorchFunctionMode):
    """Exchanges the backward of all that depends on the input.

    Args:
        law: What to apply.
        last: The number of the operation behind which the final section begins. −1: all are in it.
    """

    def __init__(self, law: Law, last: int) -> None:
        super().__init__()
        self.law, self.last = law, last
        self.count = 0  # operations so far
        self.end = -1  # the last one after which a section begins
        self.mean = -1  # the last mean or sum: one in front of the last weights ends a section too
        self.maps = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(is_active(a) for a in (*flat(args), *kwargs.values())):
            return func(*args, **kwargs)
        name = func.__name__
        if name.startswith("__get__") or name in {"size", "dim", "is_floating_point", "numel"}:
            return func(*args, **kwargs)
        number, self.count = self.count, self.count + 1
        if name in POOLS:
            self.mean = number
        if self.is_break(name, args):
            self.end = number
        elif name in WEIGHTS and self.law.final == "section":
            self.end = max(self.end, self.mean)
        if number > self.last:
            return self.plain(func, name, args, kwargs)
        y = self.record(func, name, args, kwargs)
        return Start.apply(y) if number == self.last else y

    def is_break(self, name: str, args: Any) -> bool:
        """Whether a section of linear maps ends here."""
        if self.law.final == "dense":
            if name in CONVOLUTIONS | POOLS:
                return True
            if name in ACTIVATIONS:
                return False
        if name in ADDITIONS | FACTORS | {"matmul"}:
            return sum(map(is_active, args[:2])) == 2
        return name in ACTIVATIONS or name in {"scaled_dot_product_attention", "max_pool2d"}

    def plain(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """In the final section, autograd's own gradient; of softmax, none."""
        if name in {"softmax", "log_softmax"}:
            return Through.apply(args[0], value(func, args, kwargs))
        return func(*args, **kwargs)

    def record(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """The operation's outputs, with the law as their backward."""
        if name in CONVOLUTIONS:
            return self.convolution(func, *args, **kwargs)
        if name == "linear":
            return self.linear(*args, **kwargs)
        if name == "matmul" and not is_active(args[1]):
            return self.linear(args[0], args[1].mT)
        if name == "scaled_dot_product_attention":
            return self.attention(*args, **kwargs)
        if name in POOLS:
            return self.pool(func, args, kwargs)
        if name == "max_pool2d" and not self.law.winner:
            return self.shared_max_pool(func, args, kwargs)
        if name in ACTIVATIONS | ONE_TO_ONE:
            return Through.apply(args[0], value(func, args, kwargs))
        if name in ADDITIONS | FACTORS:
            return self.pair(func, name, args, kwargs)
        if name in PLAIN:
            return func(*args, **kwargs)
        raise NotImplementedError(f"no law for {name}")

    def shares(
        self, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, apply: Map, negative: float
    ) -> Tensor:
        self.maps += 1
        return Shares.apply(x, w, b, y, apply, negative, self.law, self.maps == 1)

    def convolution(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any,
        **named: Any,
    ) -> Tensor:  # fmt: skip
        law, negative = self.law, self.law.spatial
        if law.pointwise is not None and weight[0, 0].numel() == 1:
            negative = law.pointwise
        if law.depthwise is not None and weight.shape[1] == 1 and weight.shape[0] > 1:
            negative = law.depthwise

        def apply(v: Tensor, w: Tensor) -> Tensor:
            return func(v, w, None, *rest, **named)

        y = value(func, (input, weight, bias, *rest), named)
        return self.shares(input, weight, bias, y, apply, negative)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        def apply(v: Tensor, w: Tensor) -> Tensor:
            return F.linear(v, w)

        y = value(F.linear, (input, weight, bias), {})
        return self.shares(input, weight, bias, y, apply, self.law.dense)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *rest: Any,
        **named: Any,
    ) -> Tensor:  # fmt: skip
        """Weights are a gate: the values' map is dense, its matrix the weights."""
        eye = torch.eye(k.shape[-2], dtype=q.dtype).expand(*k.shape[:-1], -1)
        weights = value(F.scaled_dot_product_attention, (q, k, eye, attn_mask, *rest), named)

        def apply(x: Tensor, w: Tensor) -> Tensor:
            return w @ x

        with torch.no_grad():
            y = weights @ v
        return self.shares(v, weights, None, y, apply, self.law.dense)

    def pool(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A mean or a sum: all weights are equal and positive."""
        law = self.law
        x, rest = args[0], args[1:]

        def apply(v: Tensor, w: Tensor) -> Tensor:
            return func(v, *rest, **kwargs)

        negative = law.spatial if law.pool is None else law.pool
        return self.shares(x, torch.ones(()), None, value(func, args, kwargs), apply, negative)

    def shared_max_pool(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        x = args[0]
        names = ("kernel_size", "stride", "padding")
        how = dict(zip(names, args[1:], strict=False)) | kwargs
        how = {n: how[n] for n in names if how.get(n) is not None}

        def apply(v: Tensor, w: Tensor) -> Tensor:
            return F.avg_pool2d(v, **how)

        return self.shares(x, torch.ones(()), None, value(func, args, kwargs), apply, 1.0)

    def pair(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        """Sums and products, of two activations or of one and a constant."""
        y = value(func, args, kwargs)
        active = [a for a in args[:2] if is_active(a)]
        if len(active) == 1:
            return Through.apply(active[0], y)
        a, b = active
        if name in ADDITIONS:
            return Sum.apply(a, b, y, self.law.sums)
        if a.shape == b.shape and name not in {"div", "div_"}:
            return Sum.apply(a, b, y, "half")
        return Through.apply(a if a.numel() >= b.numel() else b, y)  # the other one is a gate


def is_active(a: Any) -> bool:
    return isinstance(a, Tensor) and a.requires_grad


def flat(args: Any) -> list[Any]:
    return [v for a in args for v in (a if isinstance(a, (list, tuple)) else (a,))]


def value(func: Any, args: Any, kwargs: Any) -> Tensor:
    """The operation's value alone; nothing is changed in place."""
    kwargs = {k: False if k == "inplace" else v for k, v in kwargs.items()}
    args = [a.detach().clone() if i == 0 and isinstance(a, Tensor) else a
            for i, a in enumerate(args)]  # fmt: skip
    with torch.no_grad():
        return func(*args, **kwargs)


def attribute(
    model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, target: Tensor | int, law: Law = Law()
) -> Tensor:
    """Relevance of `x` for the outputs `target`; the model is in evaluation mode.

    The parameters must not require gradients. The final section may start in one tensor only.
    """
    whole = law.final == "layer"  # no section: every layer has its own law
    count = Tracer(law, NEVER)
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        with count:
            model(leaf)
        start = leaf if whole or count.end >= 0 else Start.apply(leaf)
        with Tracer(law, NEVER if whole else count.end):
            y = model(start)
        wanted = torch.as_tensor(target).expand(len(y))
        r = F.one_hot(wanted, y.shape[1]).to(y)
        if law.unit == "contrast":
            r = r - y.detach().masked_fill(r > 0, -torch.inf).softmax(1)
        return torch.autograd.grad(y, leaf, r)[0]
