"""Variants of the method, each with one choice of docs/method.md changed, to test that choice.

Notation as there: a section has the input x, the output y = Jx + b and the relevance r at y. All
variants but the default put other steps into the plan; everything else is the package's own.

A *stage* is the shortest piece of a section in which relevance has a choice: one linear operation
and the one-to-one maps behind it (a convolution with its batch norm, a scale and a reshape).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from captum_rlrp.graph.capture import unwrap
from captum_rlrp.kernels import get_backend
from captum_rlrp.plan.sections import Plan, Section, Single, Step
from captum_rlrp.rules import Call, Relevance, Rule
from captum_rlrp.rules.attention import MatrixProduct, _Operand
from captum_rlrp.rules.normalization import BatchNorm
from captum_rlrp.rules.section import Links
from captum_rlrp.rules.skip import Shift, Sum
from captum_rlrp.run.engine import Engine
from captum_rlrp.run.program import Run

Node = torch.fx.Node
Explain = Callable[[Any, Any], Any]  # inputs (or a tuple of them), target → attributions
Exchange = Callable[[Step], Iterable[Step]]


class Variant(RelativeLRP):
    """Relative LRP with some of the plan's steps exchanged."""

    def __init__(self, model: nn.Module, exchange: Exchange) -> None:
        super().__init__(model)
        revise = partial(_revise, exchange)
        self._engine = Engine(unwrap(model), get_backend(), revise=revise)


def _revise(exchange: Exchange, plan: Plan) -> Plan:
    steps = tuple(new for step in plan.steps for new in exchange(step))
    return replace(plan, steps=steps, kept=frozenset(n for step in steps for n in step.needs))


# ---- sums (§4) ---------------------------------------------------------------------------------


class Shares(Sum):
    """s = a + b (or a − b, with b for −b): r_a = r·f, r_b = r·(1 − f).

    Args:
        share: f as a function of the two summands, elementwise.
    """

    def __init__(self, share: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.share = share

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        r = run.merge(call.node, terms)
        a, b = (run.value(n).to(r.values.dtype) for n in call.active)
        name, alpha = call.target.overloadpacket.__name__, call.args.get("alpha", 1)
        a, b = (-alpha * a, b) if name == "rsub" else (a, (alpha if name == "add" else -alpha) * b)
        share = self.share(*torch.broadcast_tensors(a, b))
        return [
            [Relevance((r.values * part).sum_to_size(run.like(node).shape), r.factor)]
            for node, part in zip(call.active, (share, 1 - share), strict=True)
        ]


def half(a: Tensor, b: Tensor) -> Tensor:
    """Half to each, whatever the summands are."""
    return torch.full_like(a, 0.5)


def signed(a: Tensor, b: Tensor) -> Tensor:
    """a/(a + b), as LRP-0 has it, and half where a = b = 0.

    It has no bound where a + b is close to 0. Where a + b is 0 and a is not, there is no share, and
    the summands get half each too.
    """
    return torch.where(a + b == 0, 0.5, a / (a + b))


# ---- sections (§2) -----------------------------------------------------------------------------


class Mass(Section):
    """What the sections below share: q need not be x ⊙ Jᵀr, nor its mass that of r."""

    def propagate(self, run: Run, terms: list[Relevance]) -> list[list[Relevance]]:
        if self.passes_through:
            return super().propagate(run, terms)
        x = run.value(self.start).to(terms[0].values.dtype)
        return [[self.relevance(run, x, run.merge(self.output, terms))]]

    def relevance(self, run: Run, x: Tensor, r: Relevance) -> Relevance:
        """Relevance at the input x."""
        raise NotImplementedError


class NotCarried(Mass):
    """r_x = q: no division at all."""

    def relevance(self, run: Run, x: Tensor, r: Relevance) -> Relevance:
        _, transpose = torch.func.vjp(lambda v: linear(run, self.links, v), x)
        return Relevance(x * transpose(r.values)[0], r.factor)


class BiasShared(Mass):
    """Each b_j is one more input, of product b_j r_j, and what it receives is lost:

    r_x = q · ‖r‖₁ / (‖q‖₁ + Σ_j |b_j r_j|).

    b holds all constants of the section: biases, shifts of batch norms, padding. One-to-one
    sections pass relevance through as ever.
    """

    @property
    def needs(self) -> tuple[Node, ...]:
        inner = {call.node for _, call in self.links}
        constants = tuple(n for _, call in self.links for n in call.nodes() if n not in inner)
        return (*super().needs, *constants)

    def relevance(self, run: Run, x: Tensor, r: Relevance) -> Relevance:
        _, transpose = torch.func.vjp(lambda v: linear(run, self.links, v), x)
        b = torch.zeros_like(x)
        for rule, call in self.links:
            b = run.evaluate(call, {rule.operand(call): b})
        lost = run.merge(self.output, [Relevance(b * r.values, r.factor)]).mass
        assert lost is not None
        return scaled(
            run, self.start, Relevance(x * transpose(r.values)[0], r.factor), r.mass, lost
        )


class PositiveProducts(Mass):
    """q_i = Σ_j max(x_i J_ji, 0) r_j, carried to the mass of r: z⁺ in the relative way.

    As max(p, 0) = (p + |p|)/2, q = (x ⊙ Jᵀr + |x| ⊙ |J|ᵀr) / 2.
    """

    def relevance(self, run: Run, x: Tensor, r: Relevance) -> Relevance:
        _, transpose = torch.func.vjp(lambda v: linear(run, self.links, v), x)
        _, absolute_transpose = torch.func.vjp(lambda v: absolute(run, self.links, v), x.abs())
        q = x * transpose(r.values)[0] + x.abs() * absolute_transpose(r.values)[0]
        return scaled(run, self.start, Relevance(q / 2, r.factor), r.mass)


class AbsoluteSum(Mass):
    """r_x,i = Σ_j r_j · x_i J_ji / Σ_k |x_k J_jk|, and 0 for an output whose products are all 0.

    ‖r_x‖₁ ≤ ‖r‖₁: what is missing cancelled within inputs. Deep networks lose most of it, so only
    the ratios mean something.
    """

    def relevance(self, run: Run, x: Tensor, r: Relevance) -> Relevance:
        _, transpose = torch.func.vjp(lambda v: linear(run, self.links, v), x)
        size = absolute(run, self.links, x.abs())
        shares = torch.where(size == 0, 0.0, r.values / torch.where(size == 0, 1.0, size))
        return Relevance(x * transpose(shares)[0], r.factor)


class AbsoluteSumCarried(AbsoluteSum):
    """The same, then brought to the mass of r."""

    def relevance(self, run: Run, x: Tensor, r: Relevance) -> Relevance:
        return scaled(run, self.start, super().relevance(run, x, r), r.mass)


def scaled(
    run: Run, node: Node, q: Relevance, mass: Tensor | None, more: Tensor | float = 0.0
) -> Relevance:
    """q · mass / (‖q‖₁ + more), 0 where the divisor is 0."""
    q = run.merge(node, [Relevance(q.values, q.factor)])
    assert mass is not None
    assert q.mass is not None
    divisor = q.mass + more
    return Relevance(q.values, mass / divisor.clamp_min(torch.finfo(divisor.dtype).tiny))


def linear(run: Run, links: Links, x: Tensor) -> Tensor:
    """J x."""
    for rule, call in links:
        x = rule.linear_part(run, call, x)
    return x


def absolute(run: Run, links: Links, x: Tensor) -> Tensor:
    """|J| x of one stage, for x ≥ 0: every operation run with the absolute values of its constants.

    Exact where an operation's coefficients are those constants (dense layers, convolutions, batch
    norms, products with a constant) or not negative (averages, reshapes, padding by 0); that is
    everything but bicubic interpolation.
    """
    for rule, call in links:
        operand = rule.operand(call)
        if isinstance(rule, BatchNorm):
            x = x * rule.scale(run, call, x.dim()).to(x.dtype).abs()
        elif isinstance(rule, Shift):
            x = rule.linear_part(run, call, x).abs()
        else:
            constants = {
                node: value.abs()
                for node in rule.needs(call)
                if isinstance(value := run.value(node), Tensor) and value.is_floating_point()
            }
            bias = getattr(rule, "bias", None) if "bias" not in call.args else "bias"
            overrides = {bias: None} if bias == "bias" else {}
            if bias not in (None, "bias"):  # addmm and its kin require one
                constants[call.args[bias]] = torch.zeros_like(run.value(call.args[bias]))
            x = run.evaluate(call, {**constants, operand: x}, dtype=x.dtype, overrides=overrides)
            x = x.abs()  # a negative number as factor
    return x


def stages(links: Links) -> Iterator[Links]:
    """The links cut before each operation that is not one-to-one."""
    piece: list[Any] = []
    for rule, call in links:
        if piece and not rule.one_to_one(call):
            yield tuple(piece)
            piece = []
        piece.append((rule, call))
    yield tuple(piece)


def single_links(links: Links) -> Iterator[Links]:
    return (((rule, call),) for rule, call in links)


class Products(Rule):
    """Matrix products of activations, whose operands start sections of the given kind."""

    def __init__(self, of: Rule, kind: type[Section]) -> None:
        self.of = of
        self.kind = kind

    def carriers(self, call: Call) -> tuple[Node, ...]:
        return self.of.carriers(call)

    def needs(self, call: Call) -> tuple[Node, ...]:
        return self.of.needs(call)

    def propagate(self, run: Run, call: Call, terms: list[Relevance]) -> list[list[Relevance]]:
        carriers = self.carriers(call)
        part = 1 / len(carriers)
        terms = [Relevance(t.values * part, t.factor) for t in terms]
        sections = [self.kind(node, ((_Operand(node), call),), False) for node in carriers]
        return [section.propagate(run, terms)[0] for section in sections]


# ---- which steps are exchanged -----------------------------------------------------------------


def sums(share: Callable[[Tensor, Tensor], Tensor]) -> Exchange:
    """Every sum of two activations."""

    def exchange(step: Step) -> Iterable[Step]:
        found = isinstance(step, Single) and isinstance(step.rule, Sum)
        return [replace(step, rule=Shares(share)) if found else step]  # type: ignore[arg-type]

    return exchange


def sections(
    kind: type[Section], cut: Callable[[Links], Iterable[Links]] = lambda links: [links]
) -> Exchange:
    """Every section, cut into pieces maybe, and every matrix product."""

    def exchange(step: Step) -> Iterable[Step]:
        if isinstance(step, Single) and isinstance(step.rule, MatrixProduct):
            return [replace(step, rule=Products(step.rule, kind))]
        if isinstance(step, Section):
            return [_section(kind, links) for links in cut(step.links)]
        return [step]

    return exchange


def _section(kind: type[Section], links: Links) -> Section:
    rule, call = links[0]
    return kind(rule.operand(call), links, all(rule.one_to_one(call) for rule, call in links))


# ---- the variants ------------------------------------------------------------------------------


def _default(model: nn.Module) -> Explain:
    method = RelativeLRP(model)
    return lambda inputs, target: method.attribute(inputs, target=target)


def _variant(exchange: Exchange, model: nn.Module) -> Explain:
    method = Variant(model, exchange)
    return lambda inputs, target: method.attribute(inputs, target=target)


def _unit(explain: Callable[[nn.Module], Explain], model: nn.Module) -> Explain:
    """Scaled in the end, sample by sample, to Σ|R| = 1; 0 stays 0."""
    made = explain(model)

    def attribute(inputs: Any, target: Any) -> Any:
        result = made(inputs, target)
        parts = result if isinstance(result, tuple) else (result,)
        total = sum(q.abs().flatten(1).sum(1) for q in parts)
        factor = torch.where(total == 0, 0.0, 1 / total)
        scaled = tuple(q * factor.view([-1] + [1] * (q.dim() - 1)) for q in parts)
        return scaled if isinstance(result, tuple) else scaled[0]

    return attribute


VARIANTS: dict[str, Callable[[nn.Module], Explain]] = {
    "default": _default,
    "skip: half": partial(_variant, sums(half)),
    "skip: signed": partial(_variant, sums(signed)),
    "mass not carried": partial(_unit, partial(_variant, sections(NotCarried))),
    "layer by layer": partial(_variant, sections(Section, single_links)),
    "bias shared": partial(_variant, sections(BiasShared)),
    "positive products": partial(_variant, sections(PositiveProducts, stages)),
    "absolute sum": partial(_variant, sections(AbsoluteSum, stages)),
    "absolute sum, mass carried": partial(_variant, sections(AbsoluteSumCarried, stages)),
}
"""Name → model → (inputs, target) → attributions, shaped like the inputs.

* ``default``: :class:`captum_rlrp.RelativeLRP`.
* ``skip: half``, ``skip: signed``: the share of a summand is 1/2, or a/(a + b). The latter
  has no bound: that is what it is here to show. Overflow is a :class:`captum_rlrp.NonFiniteError`.
* ``mass not carried``: r_x = q at every section; only the result is scaled, to Σ|R| = 1 a sample.
* ``layer by layer``: every linear operation is a section of its own; a batch norm passes through.
* ``bias shared``: biases receive as inputs do, and what they receive is lost (`BiasShared`).
* ``positive products``: products x_i J_ji below 0 count as 0 (`PositiveProducts`), stage by stage.
* ``absolute sum``: each output's products are divided by their absolute sum (`AbsoluteSum`), stage
  by stage; with ``mass carried``, each stage is then scaled to the mass it received.
"""
