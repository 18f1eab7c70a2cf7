"""Recurrent layers (method.md §2 to §6), as a loop over the steps.

A step is made of dense maps of its input and of the output of the step before, of sums and products
of what these yield, and of activations. Each has its rule:

    LSTM     c' = σ(f) c + σ(i) tanh(g),   h' = σ(o) tanh(c')   (times W_hr)
    GRU      h' = (h − n) σ(z) + n,   n = tanh(W_n x + σ(r) U_n h)
    Elman    h' = tanh(W x + U h)  or  relu(W x + U h)             i, f, g, o, z, r = W x + U h

All shares follow from the values, so they are worked out for all steps at once, and the dense maps
of all steps are one product. The loop only carries relevance from step to step:

    r_h = h ⊙ Uᵀ(r' ⊙ share of U h / |U||h|)  +  what reaches h by other ways

Tensors of the steps have the shape (directions, steps, batch, …), steps in the order in which the
direction takes them. Gates have an axis of their own, in front of the features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional as F

from .base import Call, Rule
from .linear import note_violation

if TYPE_CHECKING:
    from .pass_ import Pass


class Recurrent(Rule):
    """One layer of ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, in one direction or both."""

    def needs(self, call: Call) -> tuple[Node, ...]:
        operands = tuple(call.nodes())
        return operands if call.args["cells"] else (*operands, call.node)

    def propagate(self, run: Pass, call: Call, r: Tensor) -> Sequence[Tensor]:
        steps = _Steps(run, call, r.dtype)
        cell = _CELLS[call.args["kind"]](steps)
        arrived = steps.in_order(r) if not call.args["cells"] else torch.zeros_like(steps.h)
        if call.args["cells"]:
            cell.memory = r
        at_gates, at_h = _back_through(steps, cell, arrived)
        at_start = (at_h, cell.memory)
        return [
            _at_input(steps, cell.to_x * at_gates) if name == "input" else at_start[index or 0]
            for name, index in call.slots
        ]


class _Steps:
    """The values of all steps.

    Attributes:
        x: The input, as it came.
        w: W of each direction.
        u: U of each direction.
        last: An LSTM's W_hr of each direction; none where it has none.
        h: The h that each step had from the one before.
        c: An LSTM's cell state at the start.
        of_x: W x + b, gate by gate.
        of_h: U h + c, gate by gate.
        x_on, h_on, c_on: Whether the input, and the states at the start, carry relevance. Later
            states do in any case.
    """

    def __init__(self, run: Pass, call: Call, dtype: torch.dtype) -> None:
        self.run, self.call = run, call
        self.x_on, self.h_on, self.c_on = (
            slot in call.slots for slot in (("input", None), ("hx", 0), ("hx", 1))
        )
        starts, params = ([run.value(v).to(dtype) for v in call.args[n]] for n in ("hx", "params"))
        outputs: Tensor = (
            run.evaluate(call, {}, overrides={"cells": False})
            if call.args["cells"]
            else run.value(call.node)
        )
        self.directions, size = len(starts[0]), len(params) // len(starts[0])
        own = [params[d * size : (d + 1) * size] for d in range(self.directions)]
        has_biases = call.args["has_biases"]
        self.w, self.u = [p[0] for p in own], [p[1] for p in own]
        self.last = [p[-1] for p in own] if size % 2 else []
        self.x: Tensor = run.value(call.args["input"]).to(dtype)
        self.c: Tensor = starts[-1]
        before = self.in_order(outputs.to(dtype))[:, :-1]
        self.h = torch.cat([starts[0].unsqueeze(1), before], 1)
        gates = len(self.u[0]) // self.c.shape[-1]

        def gate_by_gate(values: Iterable[Tensor], weights: list[Tensor], at: int) -> Tensor:
            biases = [p[at] if has_biases else None for p in own]
            made = torch.stack([*map(F.linear, values, weights, biases)])
            return made.unflatten(-1, (gates, -1))

        self.of_x = self.turned(gate_by_gate([self.x] * self.directions, self.w, 2))
        self.of_h = gate_by_gate(self.h, self.u, 3)

    def in_order(self, outputs: Tensor) -> Tensor:
        """What lies as the layer's outputs do → in the order in which the directions go."""
        return self.turned(outputs.unflatten(-1, (self.directions, -1)).permute(2, 0, 1, 3))

    def turned(self, value: Tensor) -> Tensor:
        """From the order of the sequence to that of the directions, and back."""
        return value if self.directions == 1 else torch.stack([value[0], value[1].flip(0)])

    def gates(self) -> Tensor:
        """W x + b + U h + c, watched: a sigmoid hides an infinity."""
        gates = self.of_x + self.of_h
        self.run.watch(gates)
        return gates

    def split(self, a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance at a + b → at a and at b."""
        to_a, to_b = self.run.kernels.split(a, b, r)
        return to_a, to_b

    def split_gates(self, of_h: Tensor, of_x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The same for sums of what comes from h and from x, of which one may be a constant."""
        if not self.x_on:
            return r, torch.zeros_like(r)
        to_h, to_x = self.split(of_h, of_x, r)
        if not self.h_on:
            to_h[:, 0], to_x[:, 0] = 0, r[:, 0]
        return to_h, to_x

    def divided(self, r: Tensor, x: Tensor, weights: list[Tensor]) -> Tensor:
        """The law's r / D for the maps of x by the weights of each direction."""
        d = torch.stack([F.linear(v.abs(), w.abs()) for v, w in zip(x, weights, strict=True)])
        s, seen = self.run.kernels.divide(r, d)
        self.run.check(seen)
        result: Tensor = s
        return result

    def measure(
        self, r: Tensor, x: Tensor, weights: list[Tensor], result: Tensor, operand: Node
    ) -> None:
        """Notes how far such maps are from the law, as :meth:`.LinearRule.measure` does."""
        for v, w, r_y, r_x in zip(x.double(), weights, r, result, strict=True):
            d = F.linear(v.abs(), w.double().abs())
            kept = torch.where(d > 0, F.linear(v, w.double()) / d, 0.0)
            note_violation(self.run, self.call, operand, r_y, kept, r_x)


# ---- the cells ---------------------------------------------------------------------------------


class _Cell:
    """What becomes of the relevance of a step's result, as factors of it.

    Attributes:
        to_h: What reaches U h + c, of each gate.
        to_x: What reaches W x + b, of each gate.
        memory: Relevance at an LSTM's c, behind the step that the loop is at.
    """

    to_h: Tensor
    to_x: Tensor
    memory: Tensor

    def __init__(self, steps: _Steps) -> None:
        """Works out the factors."""

    def back(self, t: int, r: Tensor) -> tuple[Tensor, Tensor | None]:
        """From relevance at h': what the factors of the gates are to be multiplied by, and what
        reaches h by other ways."""
        raise NotImplementedError


class _Elman(_Cell):
    def __init__(self, steps: _Steps) -> None:
        ones = torch.ones_like(steps.gates())
        self.memory = steps.c
        self.to_h, self.to_x = steps.split_gates(steps.of_h, steps.of_x, ones)

    def back(self, t: int, r: Tensor) -> tuple[Tensor, Tensor | None]:
        return r.unsqueeze(2), None


class _Gru(_Cell):
    def __init__(self, steps: _Steps) -> None:
        reset, keep = steps.gates()[:, :, :, :2].sigmoid().unbind(3)
        h, h_to_new, x_to_new = steps.h, steps.of_h[:, :, :, 2], steps.of_x[:, :, :, 2]
        again = reset * h_to_new
        new = (again + x_to_new).tanh()
        at_kept, at_new = steps.split((h - new) * keep, new, torch.ones_like(new))
        at_keep = at_kept * 0.5  # and as much at h − n
        at_h, more = steps.split(h, new, at_keep)
        if not steps.h_on:
            at_h[:, 0], more[:, 0] = 0, at_keep[:, 0]
        at_new = at_new + more
        at_again, of_x = at_new, torch.zeros_like(at_new)
        if steps.x_on:
            at_again, of_x = steps.split(again, x_to_new, at_new)
        of_h = at_again * 0.5
        at_reset = of_h.clone()
        if not steps.h_on:
            of_h[:, 0], at_reset[:, 0] = 0, at_again[:, 0]
        two = torch.stack([at_reset, at_keep], 3)
        to_h, to_x = steps.split_gates(steps.of_h[:, :, :, :2], steps.of_x[:, :, :, :2], two)
        self.memory = steps.c
        self.to_h = torch.cat([to_h, of_h.unsqueeze(3)], 3)
        self.to_x = torch.cat([to_x, of_x.unsqueeze(3)], 3)
        self._at_h = at_h.unbind(1)

    def back(self, t: int, r: Tensor) -> tuple[Tensor, Tensor | None]:
        return r.unsqueeze(2), r * self._at_h[t]


class _Lstm(_Cell):
    """The factors are of the relevance of c', half of that of h' in it; the last gate's of h'."""

    def __init__(self, steps: _Steps) -> None:
        i, f, g, o = steps.gates().unbind(3)
        keep, new = f.sigmoid(), i.sigmoid() * g.tanh()
        cells = torch.cat([steps.c.unsqueeze(1), torch.empty_like(new)], 1)
        each = cells.unbind(1)
        for t, (k, n) in enumerate(zip(keep.unbind(1), new.unbind(1), strict=True)):
            torch.addcmul(n, k, each[t], out=each[t + 1])
        half = torch.full_like(new, 0.5)  # to either factor of a product
        at_old, at_new = steps.split(keep * cells[:, :-1], new, half)
        gates = torch.stack([at_new, at_old, at_new, half], 3)
        if not steps.c_on:
            gates[:, 0, :, 1] *= 2
        self._first = 0.5
        if not steps.x_on and not steps.h_on:  # the gates of the first step are constants
            gates[:, 0], at_old[:, 0], self._first = 0, 1, 1.0
        self.memory = torch.zeros_like(steps.c)
        self.to_h, self.to_x = steps.split_gates(steps.of_h, steps.of_x, gates)
        self._at_c = at_old.unbind(1)
        self._projection = None
        if steps.last:
            self._projection = _Projection(steps, o.sigmoid() * cells[:, 1:].tanh())

    def back(self, t: int, r: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._projection is not None:
            r = self._projection.back(t, r)
        at_c = torch.add(self.memory, r, alpha=0.5 if t else self._first)
        self.memory = at_c * self._at_c[t]
        return torch.stack([at_c, at_c, at_c, r], 2), None


_CELLS: dict[str, type[_Cell]] = {
    "lstm": _Lstm, "gru": _Gru, "rnn_tanh": _Elman, "rnn_relu": _Elman,
}  # fmt: skip


class _Projection:
    """W_hr: a dense map of σ(o) tanh(c'), step by step."""

    def __init__(self, steps: _Steps, hidden: Tensor) -> None:
        self._steps, self._weight = steps, torch.stack(steps.last)
        self._hidden = hidden.unbind(1)
        self._shares = steps.divided(torch.ones_like(steps.h), hidden, steps.last).unbind(1)

    def back(self, t: int, r: Tensor) -> Tensor:
        result = self._hidden[t] * torch.bmm(r * self._shares[t], self._weight)
        steps = self._steps
        if steps.run.violation is not None:
            y, x, part = (v.unsqueeze(1) for v in (r, self._hidden[t], result))
            steps.measure(y, x, steps.last, part, steps.call.node)
        return result


# ---- the way back ------------------------------------------------------------------------------


def _back_through(steps: _Steps, cell: _Cell, arrived: Tensor) -> tuple[Tensor, Tensor]:
    """What the factors of all gates are to be multiplied by, and relevance at the first h.

    Args:
        steps: The values.
        cell: The factors.
        arrived: Relevance at each h' from outside the layer.
    """
    h, u, s = steps.h, torch.stack(steps.u), cell.to_h
    shares = h.shape[-1] > 1  # else each output has one input: relevance passes
    if shares:
        s = steps.divided(s.flatten(3), h, steps.u).view_as(s)
    else:
        h, u = torch.ones_like(h), torch.ones_like(u)
    before = torch.cat([torch.zeros_like(h[:, :1]), arrived], 1).unbind(1)
    r, found, by_u = before[-1], [], []
    h_of, s_of = h.unbind(1), s.unbind(1)
    for t in reversed(range(len(h_of))):
        at_gates, directly = cell.back(t, r)
        product = torch.bmm((s_of[t] * at_gates).flatten(2), u)
        r = torch.addcmul(before[t], h_of[t], product)
        r = r if directly is None else r + directly
        found.append(at_gates)
        if steps.run.violation is not None:
            by_u.append(h_of[t] * product)
    at_gates = torch.stack(found[::-1], 1)
    if by_u and shares:
        at_u = (cell.to_h * at_gates).flatten(3)
        steps.measure(at_u, h, steps.u, torch.stack(by_u[::-1], 1), steps.call.node)
    return at_gates, r


def _at_input(steps: _Steps, at_gates: Tensor) -> Tensor:
    """Relevance at x, from that at W x + b of all steps."""
    r, run = steps.turned(at_gates.flatten(3)), steps.run
    if steps.x.shape[-1] == 1:
        return r.sum((0, -1)).unsqueeze(-1)
    parts = []
    for w, r_y in zip(steps.w, r, strict=True):
        part, seen = run.kernels.linear_relevance(steps.x, w, r_y)
        run.check(seen)
        parts.append(part)
    if run.violation is not None:
        x = steps.x.expand(len(parts), *steps.x.shape)
        steps.measure(r, x, steps.w, torch.stack(parts), steps.call.args["input"])
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
