"""A float64 oracle for Relative LRP: slow, literal, and without a line of the package.

A test writes its network a second time with :class:`Value`. Every value remembers how it was
made; :func:`explain` then walks back from the output, one sample at a time. The matrix of a linear
map is read off its Jacobian, so the oracle knows nothing about strides, paddings or groups::

    def twin(x):                                   # the network, told to the oracle
        h = x.spatial(conv).move(norm).act(torch.relu)
        return (h + x).pool(pool).move(flatten).dense(head)

    (relevance,) = explain(twin, (images,), targets=[3, 1])

The modules given to a twin must be in float64 and in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

Function = Callable[..., Tensor]
Twin = Callable[..., "Value"]

LINEAR = ("dense", "spatial", "pool", "move")
KNOWN = (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d)
LIMIT = 100_000  # entries up to which the matrix of a known layer is formed outright


@dataclass(eq=False)
class Value:
    """One sample of an activation (batch axis of length 1) and how it came about."""

    data: Tensor
    kind: str = "input"
    parents: tuple[Value, ...] = ()
    fn: Function = field(default=lambda x: x)

    def dense(self, fn: Function) -> Value:
        """An affine map of features: contributions keep their signs."""
        return make("dense", fn, self)

    def spatial(self, fn: Function) -> Value:
        """An affine map of positions (a convolution, say): contributions by their size.

        A convolution that pads by anything but zeros is two maps.
        """
        if isinstance(fn, nn.modules.conv._ConvNd) and fn.padding_mode != "zeros":
            sides, conv = fn._reversed_padding_repeated_twice, copy.copy(fn)
            conv.padding_mode, conv.padding = "zeros", (0,) * len(fn.stride)
            padded = self.move(lambda t: nn.functional.pad(t, sides, mode=fn.padding_mode))
            return padded.spatial(conv)
        return make("spatial", fn, self)

    def pool(self, fn: Function) -> Value:
        """A spatial map that is a mean or a sum: in front of weights it ends the final section."""
        return make("pool", fn, self)

    def move(self, fn: Function) -> Value:
        """An affine map whose outputs have one input each at most (batch norm, shape ops)."""
        return make("move", fn, self)

    def act(self, fn: Function) -> Value:
        """A non-linearity or normalisation: relevance passes straight through."""
        return make("act", fn, self)

    def softmax(self, fn: Function) -> Value:
        """The same, and the final section may end in front of it."""
        return make("softmax", fn, self)

    def route(self, fn: Function) -> Value:
        """A choice of elements (max pooling): the Jacobian is 0 or 1."""
        return make("route", fn, self)

    def __add__(self, other: Value) -> Value:
        return make("sum", lambda a, b: a + b, self, other)

    def __sub__(self, other: Value) -> Value:
        return make("sum", lambda a, b: a - b, self, other)

    def __mul__(self, other: Value) -> Value:
        return make("product", lambda a, b: a * b, self, other)

    def __matmul__(self, other: Value) -> Value:
        return make("matmul", lambda a, b: a @ b, self, other)


def make(kind: str, fn: Function, *parents: Value) -> Value:
    """A value of any kind, of any number of operands."""
    with torch.no_grad():
        data = fn(*(p.data.clone() for p in parents))  # clones: fn may work in place
    return Value(data, kind, parents, fn)


def cat(values: Sequence[Value], dim: int) -> Value:
    return make("route", lambda *xs: torch.cat(xs, dim), *values)


def stack(values: Sequence[Value], dim: int) -> Value:
    return make("route", lambda *xs: torch.stack(xs, dim), *values)


def multiply(fn: Function, a: Value, b: Value) -> Value:
    """A product in disguise, such as a quotient."""
    return make("product", fn, a, b)


def attend(fn: Function, weights: Value, values: Value) -> Value:
    """``weights @ values``: the weights are a gate, and the matrix of a dense map."""
    return make("attention", fn, weights, values)


class Attribution:
    """The relevance of every value that the output can be reached from."""

    def __init__(self, output: Value, index: tuple[int, ...]) -> None:
        start = torch.zeros_like(output.data)
        start[(0, *index)] = 1.0
        order = _ancestors(output)
        self._known: dict[Value, Tensor] = {v: torch.zeros_like(v.data) for v in order}
        self._known[output] += start
        final = _final_section(output, order)
        for value in reversed(order):
            if value in final[1:] or value.kind == "input":
                continue
            r = self._known[value]
            if final and value is final[0]:
                self._explain_output(final, r)
            else:
                for parent, share in zip(value.parents, _rule(value, r), strict=True):
                    self._known[parent] += share

    def at(self, value: Value) -> Tensor:
        return self._known[value]

    def _explain_output(self, chain: list[Value], r: Tensor) -> None:
        """``q / ‖q‖₁`` with ``q = x * (J^T r)``, at the section's start and at all inside it."""
        for depth, link in enumerate(chain, start=1):
            x = link.parents[0].data.clone().requires_grad_()
            y = x
            for later in reversed(chain[:depth]):
                y = _PlainGradient.apply(later.fn(y))
            (back,) = torch.autograd.grad(y, x, r)
            q = x.detach() * back
            norm = q.abs().sum()
            self._known[link.parents[0]] += q / norm if norm > 0 else torch.zeros_like(q)


def _ancestors(output: Value) -> list[Value]:
    """The output and everything it was made from, parents first."""
    order: list[Value] = []
    seen: set[int] = set()
    pending = [(output, False)]
    while pending:
        value, expanded = pending.pop()
        if expanded:
            order.append(value)
        elif id(value) not in seen:
            seen.add(id(value))
            pending.append((value, True))
            pending += [(parent, False) for parent in value.parents]
    return order


def _final_section(output: Value, order: list[Value]) -> list[Value]:
    """The linear maps that lead to the output alone, last to first."""
    readers = dict.fromkeys(order, 0)
    for value in order:
        for parent in value.parents:
            readers[parent] += 1
    value = output
    while value.kind == "softmax":
        value = value.parents[0]
    chain: list[Value] = []
    weighs = False
    while value.kind in LINEAR and (not chain or readers[value] == 1):
        if weighs and value.kind == "pool" and not _one_to_one(value):
            break
        chain.append(value)
        has_weights = value.kind == "dense" or isinstance(value.fn, nn.modules.conv._ConvNd)
        weighs = weighs or (has_weights and not _one_to_one(value))
        value = value.parents[0]
    return [] if all(_one_to_one(link) for link in chain) else chain


# ---- the law of linear maps ------------------------------------------------------------------


def _rule(value: Value, r: Tensor) -> list[Tensor]:
    """Relevance at each parent."""
    data = [p.data for p in value.parents]
    if value.kind in LINEAR:
        if _one_to_one(value):
            return [_follow(value.fn, data[0], r)]
        return [_law(value.fn, data[0], r, signed=value.kind == "dense")]
    if value.kind in ("act", "softmax"):
        return [r]
    if value.kind == "sum":
        a, b = data
        total = a.abs() + b.abs()
        half = torch.full_like(total, 0.5)
        share = torch.where(total == 0, half, a.abs() / torch.where(total == 0, 1.0, total))
        return [_reduce_to(r * share, a.shape), _reduce_to(r * (1 - share), b.shape)]
    if value.kind == "product":
        whole = [d.shape == r.shape for d in data]
        if whole[0] == whole[1]:
            return [_reduce_to(r / 2, d.shape) for d in data]
        return [r if full else torch.zeros_like(d) for full, d in zip(whole, data, strict=True)]
    if value.kind == "attention":
        weights, values = data
        return [torch.zeros_like(weights), _product(lambda v: value.fn(weights, v), values, r)]
    if value.kind == "matmul":
        a, b = data
        return [
            _product(lambda t: value.fn(t, b), a, r / 2),
            _product(lambda t: value.fn(a, t), b, r / 2),
        ]
    if value.kind == "gate":  # what feeds nothing but a gate
        return [torch.zeros_like(d) for d in data]
    if value.kind == "route":
        leaves = tuple(d.clone().requires_grad_() for d in data)
        return list(torch.autograd.grad(value.fn(*leaves), leaves, r))
    raise AssertionError(value.kind)


def _law(fn: Function, x: Tensor, r: Tensor, signed: bool) -> Tensor:
    """``r_i = Σ_j r_j c_ji / Σ_k |c_jk|``, or ``|c_ji|`` in the numerator; 0/0 = 0."""
    if isinstance(fn, KNOWN) and x.numel() * r.numel() > LIMIT:
        return _large(fn, x, r, signed)
    c = _matrix(fn, x) * x.reshape(-1).numpy()
    s = _divide(r, torch.from_numpy(np.abs(c).sum(1)).reshape(r.shape)).reshape(-1).numpy()
    back = (c if signed else np.abs(c)).T @ s
    return torch.from_numpy(back).reshape(x.shape)


def _large(module: Function, x: Tensor, r: Tensor, signed: bool) -> Tensor:
    """The same for a layer whose matrix would be too large: |A| has the absolute weights."""
    absolute = copy.deepcopy(module)
    if not isinstance(absolute, nn.AdaptiveAvgPool2d):
        absolute.weight.data.abs_()
        absolute.bias = None
    s = _divide(r, absolute(x.abs()))
    if signed:
        return x * _transpose(module, x, s)
    return x.abs() * _transpose(absolute, x, s)


def _product(fn: Function, x: Tensor, r: Tensor) -> Tensor:
    """A product of two activations, as a map of one of them."""
    value = Value(fn(x), "dense", (Value(x),), fn)
    return _rule(value, r)[0]


def _divide(r: Tensor, d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, r / torch.where(d == 0, 1.0, d))


def _one_to_one(link: Value) -> bool:
    """Whether every output depends on one input at most."""
    x = link.parents[0].data
    if x.numel() * link.data.numel() > LIMIT and (
        link.kind == "move" or isinstance(link.fn, KNOWN)
    ):
        return link.kind == "move"
    found = bool(((_matrix(link.fn, x) != 0).sum(axis=1) <= 1).all())
    assert found or link.kind != "move", "an output of this map has several inputs"
    return found


def _matrix(fn: Function, x: Tensor) -> np.ndarray:
    def plain(t: Tensor) -> Tensor:
        return _PlainGradient.apply(fn(t.clone()))

    jacobian = torch.autograd.functional.jacobian(plain, x, vectorize=True)
    return jacobian.reshape(-1, x.numel()).numpy()


def _follow(fn: Function, x: Tensor, r: Tensor) -> Tensor:
    """Through a one-to-one map: ``J^T r`` with 1 in place of the coefficients."""
    if isinstance(fn, nn.modules.batchnorm._BatchNorm):
        return r
    if x.numel() * r.numel() > 40 * LIMIT:  # elements that only move
        return _transpose(fn, x, r)
    ones = (_matrix(fn, x) != 0).astype(float)
    return torch.from_numpy(ones.T @ r.reshape(-1).numpy()).reshape(x.shape)


def _transpose(fn: Function, x: Tensor, r: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (back,) = torch.autograd.grad(_PlainGradient.apply(fn(leaf)), leaf, r)
    return back


class _PlainGradient(torch.autograd.Function):
    """The identity, its gradient contiguous.

    torch's batch norm in eval mode permutes a gradient that comes in another memory layout (2.15,
    float64, behind flatten and transpose).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g.clone(memory_format=torch.contiguous_format)


def _reduce_to(r: Tensor, shape: torch.Size) -> Tensor:
    """Sum over the axes along which a tensor of this shape was broadcast."""
    r = r.sum(dim=tuple(range(r.dim() - len(shape)))) if r.dim() > len(shape) else r
    for axis, size in enumerate(shape):
        if size == 1 and r.shape[axis] != 1:
            r = r.sum(dim=axis, keepdim=True)
    return r


# ---- explaining ------------------------------------------------------------------------------

Index = int | tuple[int, ...] | None


def explain(twin: Twin, inputs: Sequence[Tensor], targets: Sequence[Index]) -> tuple[Tensor, ...]:
    """Relevance of every input, sample by sample; ``targets`` holds one index per sample."""
    rows = [explain_sample(twin, [x[i : i + 1] for x in inputs], t) for i, t in enumerate(targets)]
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def explain_sample(twin: Twin, sample: Sequence[Tensor], target: Index) -> tuple[Tensor, ...]:
    values = [Value(x.detach().double()) for x in sample]
    output = twin(*values)
    index = () if target is None else (target,) if isinstance(target, int) else tuple(target)
    relevance = Attribution(output, index)
    return tuple(relevance.at(value) for value in values)


# ---- helpers for tests -----------------------------------------------------------------------


def chain(links: Sequence[tuple[str, Function]]) -> Twin:
    """The twin of a sequence: the oracle's word for each function."""

    def twin(x: Value) -> Value:
        for kind, fn in links:
            x = getattr(x, kind)(fn)
        return x

    return twin


def frozen(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy of the model in eval mode and in the given dtype."""
    return copy.deepcopy(model).to(dtype).eval().requires_grad_(False)


def agrees(twin: Twin, model: nn.Module, *inputs: Tensor) -> None:
    """The twin must compute what the model computes; otherwise the test itself is wrong."""
    sample = [x[:1].clone() for x in inputs]
    with torch.no_grad():
        torch.testing.assert_close(twin(*(Value(x) for x in sample)).data, model(*sample))


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and affine parameters that are far from the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 1.5)
                if module.affine:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.3)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation in a sample over the largest relevance in that sample, worst sample."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double().flatten(1), expected.double().flatten(1)
    scale = expected.abs().amax(1)
    worst = (actual - expected).abs().amax(1) / torch.where(scale == 0, 1.0, scale)
    return float("inf") if bool(worst.isnan().any()) else worst.max().item()
