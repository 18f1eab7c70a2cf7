"""The methods: each takes a network and returns a function from inputs and targets to a map.

Every method gets a copy of the network of its own, so that hooks of one cannot disturb another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from captum.attr import (
    LRP,
    InputXGradient,
    IntegratedGradients,
    LayerGradCam,
    NoiseTunnel,
    Saliency,
)
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from evaluation.data import Data
from evaluation.networks import cam_layers
from evaluation.protocol import Protocol

Explain = Callable[[Tensor, "Tensor | int"], Tensor]

OURS = "Relative LRP"


@dataclass(frozen=True)
class Method:
    """How a method is built, and what is promised about the sum of a map."""

    build: Callable[[nn.Module, Data, Protocol], Explain]
    source: str
    law: str = ""  # "mass": Σ|R| ≤ 1; "logit": ΣR = f(x); "rise": f(x) − f(0)
    convolutions_only: bool = False  # in a dense network it is another one of these methods
    live: bool = False  # reads the network's weights anew at every call


def relative_lrp(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
    method = RelativeLRP(network)
    return lambda x, target: method.attribute(x, target=target)


def captum_lrp(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
    # Captum has no rule for nn.Flatten, nor for containers below it: the flat input comes first.
    if isinstance(network, nn.Sequential) and isinstance(network[0], nn.Flatten):
        inner = network[1:]

        def flat(x: Tensor, target: Tensor | int) -> Tensor:
            start = x.flatten(1).requires_grad_()
            return LRP(inner).attribute(start, target=target).view_as(x)

        return flat
    return lambda x, target: LRP(network).attribute(x.requires_grad_(), target=target)


def gradient(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
    method = Saliency(network)
    return lambda x, target: method.attribute(x.requires_grad_(), target=target)


def input_x_gradient(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
    method = InputXGradient(network)
    return lambda x, target: method.attribute(x.requires_grad_(), target=target)


def integrated_gradients(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
    method = IntegratedGradients(network)
    steps = protocol.integration_steps
    return lambda x, target: method.attribute(x, target=target, n_steps=steps)


def smooth_grad(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
    method = NoiseTunnel(Saliency(network))
    noise = protocol.smooth_noise * (data.high - data.low)

    def explain(x: Tensor, target: Tensor | int) -> Tensor:
        torch.manual_seed(0)
        return method.attribute(
            x.requires_grad_(),
            target=target,
            nt_type="smoothgrad",
            nt_samples=protocol.smooth_samples,
            stdevs=noise,
        )

    return explain


def grad_cam(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
    example = torch.zeros(1, *data.shape).to(next(network.parameters()))
    layer = _cam_layer(network, example, protocol.cam_side)
    method = LayerGradCam(network, layer)

    def explain(x: Tensor, target: Tensor | int) -> Tensor:
        coarse = method.attribute(x.requires_grad_(), target=target, relu_attributions=True)
        fine = F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=False)
        return fine.expand_as(x) / x.shape[1]

    return explain


def _cam_layer(network: nn.Module, example: Tensor, side: int) -> nn.Module:
    """The last layer on offer whose maps have at least `side` rows."""
    found: list[nn.Module] = []

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        if output.shape[-1] >= side:
            found.append(module)

    hooks = [layer.register_forward_hook(note) for layer in cam_layers(network)]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    if not found:
        raise ValueError("no layer for Grad-CAM")
    return found[-1]


def random_map(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
    weights = sum(float(p.detach().double().sum()) for p in network.parameters())
    generator = torch.Generator().manual_seed(hash(weights) % 2**32)  # another network, other noise
    return lambda x, target: torch.rand(x.shape, generator=generator).to(x)


def zennit(composite: str) -> Callable[[nn.Module, Data, Protocol], Explain]:
    """A composite of zennit, batch norms merged and skip connections made visible as it advises."""

    def build(network: nn.Module, data: Data, protocol: Protocol) -> Explain:
        from torchvision.models import ResNet
        from zennit import composites, rules, types
        from zennit.attribution import Gradient
        from zennit.torchvision import ResNetCanonizer, VGGCanonizer

        canonizers = [ResNetCanonizer() if isinstance(network, ResNet) else VGGCanonizer()]
        rest = composites.layer_map_base()
        dense = not any(isinstance(m, nn.Conv2d) for m in network.modules())
        if composite == "Epsilon":
            maps = [*rest, (types.Linear, rules.Epsilon()), (types.Convolution, rules.Epsilon())]
            made = composites.LayerMapComposite(maps, canonizers=canonizers)
        elif composite == "EpsilonAlpha2Beta1" and dense:
            maps = [*rest, (types.Linear, rules.AlphaBeta(2, 1))]
            made = composites.LayerMapComposite(maps, canonizers=canonizers)
        elif composite == "EpsilonGammaBox":
            one = torch.ones(1, *data.shape).to(next(network.parameters()))
            made = composites.EpsilonGammaBox(
                low=data.low * one, high=data.high * one, canonizers=canonizers
            )
        else:
            made = getattr(composites, composite)(canonizers=canonizers)
        method = Gradient(network, made)
        method.__enter__()  # for good: the network is this method's own

        def explain(x: Tensor, target: Tensor | int) -> Tensor:
            def start(output: Tensor) -> Tensor:
                # From the logit, as Captum does: from 1, ε would turn the map's sign around
                # wherever the logit is negative.
                wanted = torch.as_tensor(target, device=output.device).expand(len(output))
                return output * F.one_hot(wanted, output.shape[1])

            return method(x.requires_grad_(), start)[1]

        return explain

    return build


METHODS: dict[str, Method] = {
    OURS: Method(relative_lrp, "this package", "mass", live=True),
    "Captum LRP": Method(captum_lrp, "captum LRP, its default ε rule", "logit"),
    "zennit ε": Method(zennit("Epsilon"), "zennit Epsilon in every layer", "logit"),
    "EpsilonPlus": Method(zennit("EpsilonPlus"), "zennit EpsilonPlus", "logit", True),
    "EpsilonGammaBox": Method(zennit("EpsilonGammaBox"), "zennit EpsilonGammaBox", "logit", True),
    "α2β1": Method(
        zennit("EpsilonAlpha2Beta1"),
        "zennit EpsilonAlpha2Beta1; AlphaBeta(2, 1) in every layer of dense networks",
        "logit",
    ),
    "gradient": Method(gradient, "captum Saliency"),
    "input×gradient": Method(input_x_gradient, "captum InputXGradient"),
    "integrated gradients": Method(
        integrated_gradients, "captum IntegratedGradients, baseline 0", "rise"
    ),
    "SmoothGrad": Method(smooth_grad, "captum NoiseTunnel over Saliency"),
    "Grad-CAM": Method(grad_cam, "captum LayerGradCam, upsampled", "", True),
    "random": Method(random_map, "uniform noise, the control"),
}


def applicable(methods: dict[str, Method], network: nn.Module) -> Iterator[tuple[str, Method]]:
    """The methods that say something of their own about this network."""
    dense = not any(isinstance(module, nn.Conv2d) for module in network.modules())
    for name, method in methods.items():
        if not (dense and method.convolutions_only):
            yield name, method


@dataclass
class Prepared:
    """A method on a copy of a network; its maps are detached, its inputs never changed."""

    method: Method
    network: nn.Module
    data: Data
    protocol: Protocol

    def __post_init__(self) -> None:
        self.explain = self.method.build(self.network, self.data, self.protocol)

    @torch.enable_grad()  # Captum's metrics call it without
    def __call__(self, x: Tensor, target: Tensor | int) -> Tensor:
        return self.explain(x.detach().clone(), target).detach()

    def on(self, network: nn.Module) -> Prepared:
        """The method on a network of the same structure; this one may be spent."""
        if not self.method.live:
            return prepare(self.method, network, self.data, self.protocol)
        self.network.load_state_dict(network.state_dict())
        return self


def prepare(method: Method, network: nn.Module, data: Data, protocol: Protocol) -> Prepared:
    """The method on a copy of the network."""
    return Prepared(method, copy.deepcopy(network), data, protocol)
