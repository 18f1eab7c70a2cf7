"""A float64 oracle for Relative LRP: slow, literal, and without a line of the package.

A test writes its network a second time with :class:`Value`. Every value remembers how it was
made; :func:`explain` then walks back from the output, one sample at a time. The matrix of a linear
section is read off the Jacobian of the composed function, so the oracle knows nothing about
convolutions, paddings or batch norms::

    def twin(x):                                   # the network, told to the oracle
        h = x.linear(conv).linear(bn).act(torch.relu)
        return (h + x).linear(head)

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

DENSE_LIMIT = 4_000_000  # entries up to which a section's matrix is formed outright


@dataclass(eq=False)
class Value:
    """One sample of an activation (batch axis of length 1) and how it came about."""

    data: Tensor
    kind: str = "input"
    parents: tuple[Value, ...] = ()
    fn: Function = field(default=lambda x: x)

    def linear(self, fn: Function) -> Value:
        """An affine map: one link of a linear section."""
        return _make("linear", fn, self)

    def act(self, fn: Function) -> Value:
        """A non-linearity or normalisation: relevance passes straight through."""
        return _make("act", fn, self)

    def route(self, fn: Function) -> Value:
        """A choice of elements (max pooling): the Jacobian is 0 or 1."""
        return _make("route", fn, self)

    def __add__(self, other: Value) -> Value:
        return _make("sum", lambda a, b: a + b, self, other)

    def __sub__(self, other: Value) -> Value:
        return _make("sum", lambda a, b: a - b, self, other)

    def __mul__(self, other: Value) -> Value:
        return _make("product", lambda a, b: a * b, self, other)


def cat(values: Sequence[Value], dim: int) -> Value:
    return _make("route", lambda *xs: torch.cat(xs, dim), *values)


def stack(values: Sequence[Value], dim: int) -> Value:
    return _make("route", lambda *xs: torch.stack(xs, dim), *values)


def multiply(fn: Function, a: Value, b: Value) -> Value:
    """A product in disguise, such as a quotient."""
    return _make("product", fn, a, b)


def attend(fn: Function, weights: Value, values: Value) -> Value:
    """``weights @ values``: the weights are a gate, the values start a section of their own."""
    return _make("attention", fn, weights, values)


def _make(kind: str, fn: Function, *parents: Value) -> Value:
    with torch.no_grad():
        data = fn(*(p.data.clone() for p in parents))  # clones: fn may work in place
    return Value(data, kind, parents, fn)


class Relevance:
    """The relevance of every value that the output can be reached from."""

    def __init__(self, output: Value, index: tuple[int, ...]) -> None:
        start = torch.zeros_like(output.data)
        start[(0, *index)] = 1.0
        order = _ancestors(output)
        consumers: dict[Value, int] = dict.fromkeys(order, 0)
        for value in order:
            for parent in value.parents:
                consumers[parent] += 1

        self._known: dict[Value, Tensor] = {v: torch.zeros_like(v.data) for v in order}
        self._known[output] += start
        self._inner: dict[Value, Tensor] = {}  # values inside a section

        for value in reversed(order):
            if value in self._inner or value.kind == "input":
                continue
            r = self._known[value]
            if value.kind == "linear":
                self._section(value, r, consumers)
            else:
                for parent, share in zip(value.parents, _rule(value, r), strict=True):
                    self._known[parent] += share

    def at(self, value: Value) -> Tensor:
        return self._inner.get(value, self._known[value])

    def _section(self, end: Value, r: Tensor, consumers: dict[Value, int]) -> None:
        chain = [end]
        while chain[-1].parents[0].kind == "linear" and consumers[chain[-1].parents[0]] == 1:
            chain.append(chain[-1].parents[0])
        start = chain[-1].parents[0]
        fns = [value.fn for value in reversed(chain)]
        relevance, passed = _linear(fns, start.data, r)
        self._known[start] += relevance
        for depth, value in enumerate(chain[1:], start=1):  # what lies inside the section
            self._inner[value] = _inside(fns[-depth:], value.data, r, passed)


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


def _compose(fns: Sequence[Function]) -> Function:
    def run(x: Tensor) -> Tensor:
        for fn in fns:
            x = _PlainGradient.apply(fn(x))
        return x

    return run


def _matrix(fn: Function, x: Tensor) -> np.ndarray:
    jacobian = torch.autograd.functional.jacobian(fn, x, vectorize=True)
    return jacobian.reshape(-1, x.numel()).numpy()


def _linear(fns: Sequence[Function], x: Tensor, r: Tensor) -> tuple[Tensor, bool]:
    """q = x * (J^T r), carried to the absolute mass of r; and whether relevance just passed.

    It does where every output depends on exactly one input. (No section here that is too large for
    a dense matrix is of that kind.)
    """
    fn = _compose(fns)
    if x.numel() * r.numel() <= DENSE_LIMIT:
        jac = _matrix(fn, x)
        if ((jac != 0).sum(axis=1) == 1).all():
            return torch.from_numpy((jac != 0).T @ r.reshape(-1).numpy()).reshape(x.shape), True
        back = jac.T @ r.reshape(-1).numpy()
    else:
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(fn(leaf), leaf, r)
        back = grad.reshape(-1).numpy()
    return _carried(x, torch.from_numpy(back).reshape(x.shape), r), False


def _inside(rest: Sequence[Function], x: Tensor, r: Tensor, passed: bool) -> Tensor:
    """The same at a value inside a section, over the rest of it."""
    if passed:
        return _linear(rest, x, r)[0]
    leaf = x.clone().requires_grad_()
    (back,) = torch.autograd.grad(_compose(rest)(leaf), leaf, r)
    return _carried(x, back, r)


def _carried(x: Tensor, back: Tensor, r: Tensor) -> Tensor:
    q = x * back
    mass = q.abs().sum().item()
    return torch.zeros_like(q) if mass == 0 else q * (r.abs().sum().item() / mass)


def _reduce_to(r: Tensor, shape: torch.Size) -> Tensor:
    """Sum over the axes along which a tensor of this shape was broadcast."""
    r = r.sum(dim=tuple(range(r.dim() - len(shape)))) if r.dim() > len(shape) else r
    for axis, size in enumerate(shape):
        if size == 1 and r.shape[axis] != 1:
            r = r.sum(dim=axis, keepdim=True)
    return r


def _rule(value: Value, r: Tensor) -> list[Tensor]:
    data = [p.data for p in value.parents]
    if value.kind == "act":
        return [r]
    if value.kind == "sum":
        a, b = data
        total = a.abs() + b.abs()
        half = torch.full_like(total, 0.5)
        share = torch.where(total == 0, half, a.abs() / torch.where(total == 0, 1.0, total))
        return [_reduce_to(r * share, a.shape), _reduce_to(r * (1 - share), b.shape)]
    if value.kind == "product":
        if data[0].shape == data[1].shape:
            return [r / 2, r / 2]
        return [r if d.shape == r.shape else torch.zeros_like(d) for d in data]
    if value.kind == "attention":
        weights, values = data
        carried, _ = _linear([lambda v: value.fn(weights, v)], values, r)
        return [torch.zeros_like(weights), carried]
    if value.kind == "gate":  # what feeds nothing but a gate
        return [torch.zeros_like(d) for d in data]
    if value.kind == "route":
        leaves = tuple(d.clone().requires_grad_() for d in data)
        return list(torch.autograd.grad(value.fn(*leaves), leaves, r))
    raise AssertionError(value.kind)


Index = int | tuple[int, ...] | None


def explain(twin: Twin, inputs: Sequence[Tensor], targets: Sequence[Index]) -> tuple[Tensor, ...]:
    """Relevance of every input, sample by sample; ``targets`` holds one index per sample."""
    rows = [explain_sample(twin, [x[i : i + 1] for x in inputs], t) for i, t in enumerate(targets)]
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def explain_sample(twin: Twin, sample: Sequence[Tensor], target: Index) -> tuple[Tensor, ...]:
    values = [Value(x.detach().double()) for x in sample]
    output = twin(*values)
    index = () if target is None else (target,) if isinstance(target, int) else tuple(target)
    relevance = Relevance(output, index)
    return tuple(relevance.at(value) for value in values)


# ---- helpers for tests ---------------------------------------------------------------------------


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
