"""Random networks, each told twice: as an ``nn.Module`` and to the float64 oracle.

A graph is a list of calls. Every call names its kind for the oracle ("dense", "spatial", …) and the
function or layer that computes it; the module runs the functions, the oracle reads the kinds. A
seed gives the same graph every time::

    graph = random_graph(seed=7)
    graph.model                    # nn.Module, float64, eval mode
    explain(graph.twin, (graph.inputs,), graph.targets)
    print(graph)                   # what it consists of
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Value, attend, cat, frozen, make, multiply, randomise_norms, stack

Shape = tuple[int, ...]


@dataclass
class Call:
    """One operation: ``run`` on tensors, ``tell`` on the oracle's values."""

    name: str
    run: Callable[..., Tensor]
    tell: Callable[..., Value]
    sources: tuple[int, ...]
    shape: Shape
    layer: int | None = None


class Weighted(nn.Module):
    """A function with a parameter of its own."""

    def __init__(self, fn: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.fn, self.weight = fn, nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, *values: Tensor) -> Tensor:
        return self.fn(*values, self.weight)


class Net(nn.Module):
    def __init__(self, calls: Sequence[Call], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.calls, self.layers = calls, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for call in self.calls:
            run = call.run if call.layer is None else self.layers[call.layer]
            values.append(run(*(values[i] for i in call.sources)))
        return values[-1]


@dataclass
class Graph:
    seed: int
    model: nn.Module
    calls: list[Call]
    inputs: Tensor
    targets: list[Any]

    def twin(self, x: Value) -> Value:
        values = [x]
        for call in self.calls:
            values.append(call.tell(*(values[i] for i in call.sources)))
        return values[-1]

    def __str__(self) -> str:
        lines = [f"random_graph({self.seed}), input {tuple(self.inputs.shape[1:])}"]
        for i, call in enumerate(self.calls, start=1):
            operands = ", ".join(f"v{source}" for source in call.sources)
            lines.append(f"  v{i} = {call.name}({operands})  {call.shape}")
        return "\n".join(lines)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "elu": F.elu,
    "clamp": lambda x: x.clamp(-1.0, 1.5),
    "abs": torch.abs,
    "square": lambda x: x**2,
}


@dataclass
class Builder:
    """Grows a graph; value 0 is the input. Shapes leave out the batch."""

    seed: int
    shape: Shape
    calls: list[Call] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    spent: set[int] = field(default_factory=set)  # overwritten in place: not to be read again
    reusable: list[tuple[str, Shape, nn.Module]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.shapes.append(self.shape)
        self.samples = [torch.randn(2, *self.shape, dtype=torch.float64)]

    # ---- emitting ---------------------------------------------------------------------------

    def emit(
        self,
        name: str,
        run: Callable[..., Tensor],
        tell: Callable[..., Value],
        *sources: int,
    ) -> int:
        with torch.no_grad():
            value = run(*(self.samples[i].clone() for i in sources))
        self.samples.append(value)
        shape = tuple(value.shape[1:])
        self.shapes.append(shape)
        layer = self.layers.index(run) if run in self.layers else None
        self.calls.append(Call(name, run, tell, sources, shape, layer))
        return len(self.calls)

    def unary(self, kind: str, name: str, fn: Callable[[Tensor], Tensor], source: int) -> int:
        return self.emit(name, fn, lambda v: getattr(v, kind)(fn), source)

    def layer(self, kind: str, module: nn.Module, source: int) -> int:
        module = frozen(randomise_norms(module))
        for parameter in module.parameters():
            if parameter.dim() == 1 and isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            parameter.data.copy_(torch.randn_like(parameter) * 0.5 + 0.1)
        self.layers.append(module)
        self.reusable.append((kind, self.shapes[source], module))
        return self.unary(kind, repr(module), module, source)

    def weighted(self, fn: Callable[..., Tensor], *shape: int) -> nn.Module:
        self.layers.append(Weighted(fn, *shape).requires_grad_(False))
        return self.layers[-1]

    # ---- choosing ---------------------------------------------------------------------------

    def pick(self, rank: int | None = None) -> int | None:
        found = [
            i
            for i, shape in enumerate(self.shapes)
            if i not in self.spent and (rank is None or len(shape) == rank)
        ]
        if not found:
            return None
        # Mostly the newest: depth; now and then an older one: branches and dead ends.
        return found[-1] if self.rng.random() < 0.7 else self.rng.choice(found[-5:])

    def partner(self, source: int) -> int | None:
        """Another value of the same shape."""
        same = [
            i
            for i, shape in enumerate(self.shapes)
            if shape == self.shapes[source] and i not in self.spent and i != source
        ]
        return self.rng.choice(same) if same else None

    def unread(self, source: int) -> bool:
        return source > 0 and all(source not in call.sources for call in self.calls)

    # ---- steps that fit any shape -----------------------------------------------------------

    def act(self, x: int) -> int:
        name = self.rng.choice([*["relu"] * 6, *ACTS])
        return self.unary("act", name, ACTS[name], x)

    def act_in_place(self, x: int) -> int | None:
        fresh = isinstance(self.fresh(x), str)
        if not fresh or not self.unread(x):
            return None
        self.spent.add(x)
        run = self.rng.choice([nn.ReLU(inplace=True), nn.Hardtanh(inplace=True), F.silu])
        return self.unary("act", f"in place {run}", run, x)

    def fresh(self, x: int) -> str | None:
        """A value in memory of its own, so that nothing else is overwritten with it."""
        if x == 0:
            return None
        name = self.calls[x - 1].name
        fresh = ("Conv", "Linear", "BatchNorm", "add", "sub", "multiply")
        return name if name.startswith(fresh) and "in place" not in name else None

    def scale(self, x: int) -> int:
        shape = (self.shapes[x][0], *[1] * (len(self.shapes[x]) - 1))
        return self.unary("move", "scale", self.weighted(lambda t, w: t * w, *shape), x)

    def shift(self, x: int) -> int:
        kind = self.rng.choice(["+", "-", "r-"])
        fn = {"+": lambda t, w: t + w, "-": lambda t, w: t - w, "r-": lambda t, w: w - t}[kind]
        return self.unary("move", f"shift {kind}", self.weighted(fn, *self.shapes[x]), x)

    def number(self, x: int) -> int:
        kind = self.rng.choice(["x2", "/3", "-x", "+1", "1-x"])
        fns = {
            "x2": lambda t: t * 2, "/3": lambda t: t / 3, "-x": lambda t: -t,
            "+1": lambda t: t + 1, "1-x": lambda t: 1 - t,
        }  # fmt: skip
        return self.unary("move", f"number {kind}", fns[kind], x)

    def masked(self, x: int) -> int:
        fill = self.rng.choice([0.0, 0.5])
        fn = self.weighted(lambda t, w: t.masked_fill(w > 0.5, fill), *self.shapes[x])
        return self.unary("move", f"masked_fill {fill}", fn, x)

    def dropout(self, x: int) -> int:
        return self.layer("move", nn.Dropout(0.3), x)

    def flip(self, x: int) -> int:
        return self.unary("move", "flip", lambda t: t.flip(1), x)

    def roll(self, x: int) -> int:
        return self.unary("move", "roll", lambda t: t.roll(1, -1), x)

    def slices(self, x: int) -> int | None:
        dim = self.rng.randrange(len(self.shapes[x]))
        size = self.shapes[x][dim]
        if size < 4:
            return None
        start, stop = self.rng.randrange(0, size // 2), self.rng.randrange(size // 2 + 1, size + 1)
        return self.unary("move", f"slice {start}:{stop} of axis {dim + 1}",
                          lambda t: t.narrow(dim + 1, start, stop - start), x)  # fmt: skip

    def chunks(self, x: int) -> int | None:
        if self.shapes[x][0] % 2:
            return None
        for part in range(2):
            last = self.unary("move", f"chunk {part}",
                              lambda t, part=part: t.chunk(2, 1)[part], x)  # fmt: skip
        return last

    def add(self, x: int) -> int | None:
        y = self.partner(x)
        if y is None:
            return None
        pair = (x, y) if self.rng.random() < 0.5 else (y, x)
        return self.emit("add", lambda a, b: a + b, lambda a, b: a + b, *pair)

    def add_in_place(self, x: int) -> int | None:
        y = self.partner(x)
        if y is None or not self.unread(x) or self.fresh(x) is None:
            return None
        self.spent.add(x)
        return self.emit("add in place", lambda a, b: a.add_(b), lambda a, b: a + b, x, y)

    def subtract(self, x: int) -> int | None:
        y = self.partner(x)
        return None if y is None else self.emit("sub", lambda a, b: a - b, lambda a, b: a - b, x, y)

    def double(self, x: int) -> int:
        return self.emit("add itself", lambda a: a + a, lambda a: a + a, x)

    def multiply(self, x: int) -> int | None:
        y = self.partner(x)
        return (
            None
            if y is None
            else self.emit("multiply", lambda a, b: a * b, lambda a, b: a * b, x, y)
        )

    def maximum(self, x: int) -> int | None:
        y = self.partner(x)
        if y is None or torch.equal(self.samples[x], self.samples[y]):
            return None
        if (self.samples[x] == self.samples[y]).any():
            return None  # ties go half and half, which the oracle's Jacobian cannot know
        fn = self.rng.choice([torch.maximum, torch.minimum])
        return self.emit(fn.__name__, fn, lambda a, b: make("route", fn, a, b), x, y)

    def where(self, x: int) -> int | None:
        y = self.partner(x)
        if y is None:
            return None
        fn = self.weighted(lambda a, b, w: torch.where(w > 0, a, b), *self.shapes[x])
        return self.emit("where", fn, lambda a, b: make("route", fn, a, b), x, y)

    def join(self, x: int) -> int | None:
        y = self.partner(x)
        if y is None or self.shapes[x][0] > 12:
            return None
        if self.rng.random() < 0.3:
            return self.emit("cat with itself", lambda a, b: torch.cat([a, b, a], 1),
                             lambda a, b: cat([a, b, a], 1), x, y)  # fmt: skip
        return self.emit("cat", lambda a, b: torch.cat([a, b], 1), lambda a, b: cat([a, b], 1),
                         x, y)  # fmt: skip

    def stacked(self, x: int) -> int | None:
        y = self.partner(x)
        if y is None:
            return None
        last = self.emit("stack", lambda a, b: torch.stack([a, b], 1),
                         lambda a, b: stack([a, b], 1), x, y)  # fmt: skip
        self.spent.add(last)
        flat = self.unary("move", "flatten", lambda t: t.flatten(1, 2), last)
        return flat if self.rng.random() < 0.5 else self.unary("pool", "mean of stack",
                                                             lambda t: t.mean(1), last)  # fmt: skip

    def gate(self, x: int) -> int | None:
        """Squeeze and excitation: one number per channel times the channel."""
        if len(self.shapes[x]) < 2:
            return None
        axes = tuple(range(2, len(self.shapes[x]) + 1))
        squeezed = self.unary("pool", "squeeze", lambda t: t.mean(axes, keepdim=True), x)
        gate = self.unary("act", "sigmoid", torch.sigmoid, squeezed)
        self.spent.update((squeezed, gate))
        pair = (x, gate) if self.rng.random() < 0.5 else (gate, x)
        return self.emit("gate", lambda a, b: a * b, lambda a, b: a * b, *pair)

    def broadcast_sum(self, x: int) -> int | None:
        if len(self.shapes[x]) < 2:
            return None
        axes = tuple(range(2, len(self.shapes[x]) + 1))
        pooled = self.unary("pool", "pooled", lambda t: t.mean(axes, keepdim=True), x)
        self.spent.add(pooled)
        if self.rng.random() < 0.5:
            return self.emit("add broadcast", lambda a, b: a + b, lambda a, b: a + b, x, pooled)
        return self.emit("sub broadcast", lambda a, b: b - a, lambda a, b: b - a, x, pooled)

    def reuse(self, x: int) -> int | None:
        fitting = [(k, m) for k, shape, m in self.reusable if shape == self.shapes[x]]
        if not fitting:
            return None
        kind, module = self.rng.choice(fitting)
        return self.unary(kind, f"reused {module}", module, x)

    def norm_over_all(self, x: int) -> int:
        return self.layer("act", nn.LayerNorm(self.shapes[x]), x)

    def quotient(self, x: int) -> int | None:
        y = self.partner(x)
        if y is None:
            return None
        below = self.unary("act", "positive", lambda t: F.softplus(t) + 0.5, y)
        self.spent.add(below)
        fn = lambda a, b: a / b  # noqa: E731
        return self.emit("quotient", fn, lambda a, b: multiply(fn, a, b), x, below)

    # ---- images -----------------------------------------------------------------------------

    def conv(self, x: int) -> int | None:
        shape = self.shapes[x]
        axes = len(shape) - 1
        inside, size = shape[0], min(shape[1:])
        kernel = self.rng.choice([1, 2, 3])
        groups = self.rng.choice([g for g in (1, 1, 1, 2, inside) if inside % g == 0])
        outside = groups * self.rng.choice([1, 2]) if groups > 1 else self.rng.choice([2, 4, 5])
        mode = self.rng.choice(["zeros"] * 4 + ["reflect", "circular", "replicate"])
        dilation = self.rng.choice([1, 1, 2])
        padding: Any = self.rng.choice([0, 1, kernel // 2])
        stride = self.rng.choice([1, 1, 2])
        if stride == 1 and mode == "zeros" and self.rng.random() < 0.2:
            padding = "same"
        if size + (0 if padding in ("same",) else 2 * padding) <= dilation * (kernel - 1) + 1:
            return None
        if mode != "zeros" and padding != "same" and padding >= size:
            return None
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        module = make(inside, outside, kernel, stride, padding, dilation, groups,
                      self.rng.random() < 0.7, mode)  # fmt: skip
        last = self.layer("spatial", module, x)
        return self.after_conv(last) if self.rng.random() < 0.6 else last

    def after_conv(self, x: int) -> int:
        """The patterns that the fused forward looks for."""
        shape = self.shapes[x]
        last = x
        if self.rng.random() < 0.7:
            norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
            last = self.layer("move", norm(shape[0], affine=self.rng.random() < 0.8), last)
        if self.rng.random() < 0.5:
            last = self.add(last) or last
        if self.rng.random() < 0.7:
            last = (self.act_in_place(last) if self.rng.random() < 0.3 else None) or self.act(last)
        return last

    def residual(self, x: int) -> int | None:
        """A block of two convolutions and a skip, the ReLU behind the sum."""
        shape = self.shapes[x]
        axes = len(shape) - 1
        if shape[0] > 8:
            return None
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        h = self.layer("spatial", make(shape[0], shape[0], 3, padding=1, bias=False), x)
        h = self.layer("move", norm(shape[0]), h)
        h = self.unary("act", "relu", torch.relu, h)
        h = self.layer("spatial", make(shape[0], shape[0], 1), h)
        if self.rng.random() < 0.7:
            h = self.layer("move", norm(shape[0]), h)
        skip = x
        if self.rng.random() < 0.4:
            skip = self.layer("spatial", make(shape[0], shape[0], 1, bias=False), x)
            skip = self.layer("move", norm(shape[0]), skip)
        pair = (h, skip) if self.rng.random() < 0.7 else (skip, h)
        last = self.emit("add", lambda a, b: a + b, lambda a, b: a + b, *pair)
        return self.unary("act", "relu", torch.relu, last) if self.rng.random() < 0.8 else last

    def transposed(self, x: int) -> int | None:
        shape = self.shapes[x]
        if max(shape[1:]) > 8:
            return None
        stride, kernel = self.rng.choice([1, 2]), self.rng.choice([2, 3])
        groups = self.rng.choice([g for g in (1, 2) if shape[0] % g == 0])
        make = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[len(shape) - 2]
        module = make(shape[0], 2 * groups, kernel, stride, self.rng.choice([0, 1]),
                      output_padding=stride - 1, groups=groups)  # fmt: skip
        return self.layer("spatial", module, x)

    def batch_norm(self, x: int) -> int:
        shape = self.shapes[x]
        make = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 1]
        return self.layer("move", make(shape[0]), x)

    def pool(self, x: int) -> int | None:
        shape = self.shapes[x]
        axes = len(shape) - 1
        if min(shape[1:]) < 3:
            return None
        kernel, stride = self.rng.choice([(2, 2), (3, 2), (3, 1)])
        padding, ceil = self.rng.choice([0, 1]), self.rng.random() < 0.3
        if self.rng.random() < 0.5:
            dilation = self.rng.choice([1, 1, 2]) if min(shape[1:]) > 4 else 1
            make = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1]
            return self.layer("route", make(kernel, stride, padding, dilation, False, ceil), x)
        average = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[axes - 1]
        return self.layer("pool", average(kernel, stride, padding, ceil,
                                            self.rng.random() < 0.5), x)  # fmt: skip

    def adaptive_pool(self, x: int) -> int | None:
        shape = self.shapes[x]
        axes, size = len(shape) - 1, self.rng.choice([1, 2, 3])
        if min(shape[1:]) < size:
            return None
        if self.rng.random() < 0.4:
            make = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)[axes - 1]
            return self.layer("route", make(size), x)
        make = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[axes - 1]
        return self.layer("pool", make(size), x)

    def upsample(self, x: int) -> int | None:
        shape = self.shapes[x]
        if max(shape[1:]) > 6:
            return None
        smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape) - 1]
        mode = self.rng.choice(["nearest", smooth])
        return self.layer("spatial", nn.Upsample(scale_factor=2, mode=mode), x)

    def pad(self, x: int) -> int:
        sides = [1, 2] * (len(self.shapes[x]) - 1)
        mode = self.rng.choice(["constant", "constant", "replicate"])
        value = self.rng.choice([0.0, 0.7]) if mode == "constant" else None
        return self.unary("move", f"pad {mode} {value}",
                          lambda t: F.pad(t, sides, mode, value), x)  # fmt: skip

    def shuffle(self, x: int) -> int | None:
        channels, *rest = self.shapes[x]
        if channels % 2 or channels < 4:
            return None
        return self.unary(
            "move", "channel shuffle",
            lambda t: t.view(-1, 2, channels // 2, *rest).transpose(1, 2).reshape(t.shape), x,
        )  # fmt: skip

    def pixel_shuffle(self, x: int) -> int | None:
        shape = self.shapes[x]
        if len(shape) != 3:
            return None
        if shape[0] % 4 == 0 and shape[0] > 4:
            return self.layer("move", nn.PixelShuffle(2), x)
        if shape[1] % 2 == 0 and shape[2] % 2 == 0 and shape[0] < 4:
            return self.layer("move", nn.PixelUnshuffle(2), x)
        return None

    def group_norm(self, x: int) -> int | None:
        channels = self.shapes[x][0]
        if self.samples[x][0].numel() < 2 * channels:  # torch refuses one value a group
            return None
        return self.layer("act", nn.GroupNorm(2 if channels % 2 == 0 else 1, channels), x)

    def instance_norm(self, x: int) -> int | None:
        if min(self.shapes[x][1:]) < 2:
            return None
        axes = len(self.shapes[x]) - 1
        make = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes - 1]
        return self.layer("act", make(self.shapes[x][0], affine=True), x)

    def channel_norm(self, x: int) -> int | None:
        """LayerNorm over the channels, as in ConvNeXt."""
        if self.shapes[x][0] < 3:  # of two numbers it makes ±1, and ties for the next max pooling
            return None
        rank = len(self.shapes[x]) + 1
        forth, back = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        last = self.unary("move", "channels last", lambda t: t.permute(forth), x)
        last = self.layer("act", nn.LayerNorm(self.shapes[x][0]), last)
        return self.unary("move", "channels first", lambda t: t.permute(back), last)

    def amax(self, x: int) -> int:
        # In a tie the gradient of amax goes to each maximum, relevance to the first.
        fn = lambda t: t.gather(-1, t.argmax(-1, keepdim=True))  # noqa: E731
        return self.emit("amax", lambda t: t.amax(-1, keepdim=True), lambda v: v.route(fn), x)

    def tokens(self, x: int) -> int | None:
        if len(self.shapes[x]) != 3 or self.shapes[x][1] * self.shapes[x][2] > 40:
            return None
        return self.unary("move", "tokens", lambda t: t.flatten(2).transpose(1, 2), x)

    # ---- sequences (tokens, features) -----------------------------------------------------------

    def linear(self, x: int) -> int:
        outside = self.rng.choice([4, 4, 6])
        return self.layer("dense", nn.Linear(self.shapes[x][-1], outside,
                                              self.rng.random() < 0.7), x)  # fmt: skip

    def norm(self, x: int) -> int:
        return self.layer("act", nn.LayerNorm(self.shapes[x][-1]), x)

    def swap(self, x: int) -> int:
        return self.unary("move", "transpose", lambda t: t.transpose(1, 2), x)

    def accumulate(self, x: int) -> int:
        return self.unary("spatial", "cumsum", lambda t: t.cumsum(1), x)

    def matrix(self, x: int) -> int:
        fn = self.weighted(lambda t, w: w @ t, 5, self.shapes[x][0])
        return self.unary("dense", "matmul", fn, x)

    def softmax(self, x: int) -> int:
        return self.unary("act", "softmax", lambda t: t.softmax(-1), x)

    def class_token(self, x: int) -> int | None:
        if self.shapes[x][0] > 12:
            return None

        def run(t: Tensor, token: Tensor) -> Tensor:
            return torch.cat([token.expand(t.shape[0], -1, -1), t], 1)

        fn = self.weighted(run, 1, 1, self.shapes[x][1])
        return self.unary("route", "class token", fn, x)

    def attention(self, x: int) -> int:
        """Softmax of similarities, written out; the value path is a section."""
        features = self.shapes[x][1]
        q, k, v = (self.layer("dense", nn.Linear(features, 4), x) for _ in range(3))
        self.spent.update((q, k))
        product = self.rng.choice(["@", "bmm", "einsum"])
        weigh = {
            "@": lambda a, b: a @ b,
            "bmm": torch.bmm,
            "einsum": lambda a, b: torch.einsum("bij,bjd->bid", a, b),
        }[product]

        def weights(a: Tensor, b: Tensor) -> Tensor:
            return (a @ b.transpose(1, 2) / 2).softmax(-1)

        made = self.emit("weights", weights, lambda a, b: make("gate", weights, a, b), q, k)
        self.spent.add(made)
        return self.emit(f"attend {product}", weigh, lambda w, u: attend(weigh, w, u), made, v)

    def fused_attention(self, x: int) -> int:
        features = self.shapes[x][1]
        q, k, v = (self.layer("dense", nn.Linear(features, 4), x) for _ in range(3))
        self.spent.update((q, k))

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(2, (2, 2)).transpose(1, 2)

        q, k, v = (self.unary("move", "heads", heads, t) for t in (q, k, v))

        def weights(a: Tensor, b: Tensor) -> Tensor:
            return (a @ b.transpose(-1, -2) / 2**0.5).softmax(-1)

        def tell(a: Value, b: Value, c: Value) -> Value:
            return attend(lambda w, u: w @ u, make("gate", weights, a, b), c)

        last = self.emit("scaled_dot_product_attention", F.scaled_dot_product_attention, tell,
                         q, k, v)  # fmt: skip
        self.spent.update((q, k, v, last))
        return self.unary("move", "merge heads", lambda t: t.transpose(1, 2).flatten(2), last)

    # ---- rows -----------------------------------------------------------------------------------

    def glu(self, x: int) -> int | None:
        if self.shapes[x][0] % 2:
            return None
        half = self.shapes[x][0] // 2

        def tell(v: Value) -> Value:
            a = v.move(lambda t: t[:, :half])
            b = v.move(lambda t: t[:, half:]).act(torch.sigmoid)
            return a * b

        return self.emit("glu", lambda t: F.glu(t, 1), tell, x)

    # ---- the whole ------------------------------------------------------------------------------

    # How often each step is tried.
    ANY: ClassVar = dict(  # noqa: C408
        act=3, act_in_place=2, scale=1, shift=1, number=1, masked=1, dropout=1, flip=1, roll=1,
        slices=1, chunks=1, add=3, add_in_place=1, subtract=1, double=1, multiply=1, maximum=1,
        where=1, join=1, stacked=1, gate=2, broadcast_sum=1, reuse=2, norm_over_all=1, quotient=1,
    )  # fmt: skip
    GRID: ClassVar = dict(  # noqa: C408
        conv=6, residual=2, transposed=1, batch_norm=1, pool=2, adaptive_pool=1, upsample=1, pad=1,
        shuffle=1, pixel_shuffle=1, group_norm=1, instance_norm=1, channel_norm=1, amax=1, tokens=1,
    )  # fmt: skip
    SEQUENCE: ClassVar = dict(  # noqa: C408
        linear=3, norm=2, swap=1, accumulate=1, matrix=1, softmax=1, class_token=1, attention=1,
        fused_attention=1, conv=1, batch_norm=1, pool=1,
    )  # fmt: skip
    ROW: ClassVar = dict(linear=3, batch_norm=1, norm=1, softmax=1, glu=2)  # noqa: C408

    def step(self) -> None:
        x = self.pick()
        assert x is not None
        rank = len(self.shapes[x])
        own = {1: self.ROW, 2: self.SEQUENCE, 3: self.GRID, 4: self.GRID}[rank]
        steps = self.ANY if self.rng.random() < 0.45 else own
        (name,) = self.rng.choices(list(steps), list(steps.values()))
        getattr(self, name)(x)

    def finish(self) -> list[Any]:
        last = next(i for i in reversed(range(len(self.shapes))) if i not in self.spent)
        shape = self.shapes[last]
        if self.rng.random() < 0.15:  # explain one element of what is there
            last = last if last == len(self.calls) else self.scale(last)
        else:
            if len(shape) > 1 and self.rng.random() < 0.5:
                axes = tuple(range(2, len(shape) + 1))
                last = self.unary("pool", "mean", lambda t: t.mean(axes), last)
            else:
                last = self.unary("move", "flatten", lambda t: t.flatten(1), last)
            last = self.layer("dense", nn.Linear(self.shapes[last][0], 3), last)
            if self.rng.random() < 0.2:
                last = self.unary("softmax", "softmax", lambda t: t.softmax(-1), last)
        shape = self.shapes[-1]
        index = [tuple(self.rng.randrange(size) for size in shape) for _ in range(2)]
        return [i[0] for i in index] if len(shape) == 1 else index


INPUTS: list[Shape] = [(3, 8, 8), (2, 7, 6), (3, 8, 8), (2, 4, 4, 4), (5, 6), (4, 12), (7,)]


def random_graph(seed: int) -> Graph:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    builder = Builder(seed, rng.choice(INPUTS))
    wanted = rng.randrange(4, 13)
    for _ in range(4 * wanted):
        if len(builder.calls) >= wanted or max(s.numel() for s in builder.samples) > 1200:
            break
        builder.step()
    targets = builder.finish()
    model = Net(builder.calls, builder.layers).double().eval().requires_grad_(False)
    return Graph(seed, model, builder.calls, builder.samples[0], targets)
