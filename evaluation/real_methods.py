"""Relative LRP and its peers on really trained networks, with their libraries' defaults."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, IntegratedGradients, LayerGradCam, Saliency
from torch import Tensor, nn

from captum_rlrp import RelativeLRP
from evaluation.real import Sentence
from evaluation.visible import visible

Explain = Callable[[Tensor, Tensor], Tensor]  # inputs, targets → attributions
ByToken = Callable[[Sentence], Tensor]  # a value for each token

OURS = "Relative LRP"
STEPS = 20  # of integrated gradients
CAM_LAYERS = {"lite0": "_bn1", "resnet20": "layer3", "resnet32": "layer3", "vgg": "8"}
RANGE = {"lite0": (-1.0, 1.0)}  # smallest and largest input; CIFAR's follow
CIFAR_RANGE = (-2.12, 2.64)


def relative_lrp(name: str, network: nn.Module) -> Explain:
    method = RelativeLRP(network)
    return lambda x, target: method.attribute(x, target=target)


def captum(method: type, **options: int) -> Callable[[str, nn.Module], Explain]:
    def build(name: str, network: nn.Module) -> Explain:
        made = method(network)
        return lambda x, target: made.attribute(x.requires_grad_(), target=target, **options)

    return build


def grad_cam(name: str, network: nn.Module) -> Explain:
    method = LayerGradCam(network, network.get_submodule(CAM_LAYERS[name]))

    def explain(x: Tensor, target: Tensor) -> Tensor:
        coarse = method.attribute(x.requires_grad_(), target=target, relu_attributions=True)
        return F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=False)

    return explain


def zennit(composite: str) -> Callable[[str, nn.Module], Explain]:
    """A composite on the network with its skip connections made visible; from the logit."""

    def build(name: str, network: nn.Module) -> Explain:
        from zennit import composites
        from zennit.attribution import Gradient

        low, high = (torch.tensor(v) for v in RANGE.get(name, CIFAR_RANGE))
        options = {"low": low, "high": high} if composite == "EpsilonGammaBox" else {}
        method = Gradient(visible(network), getattr(composites, composite)(**options))
        method.__enter__()  # for good: the traced network is this method's own

        def explain(x: Tensor, target: Tensor) -> Tensor:
            def start(output: Tensor) -> Tensor:
                return output * F.one_hot(target, output.shape[1])

            return method(x.requires_grad_(), start)[1]

        return explain

    return build


def auto_lrp(name: str, network: nn.Module) -> Explain:
    """autoLRP with its table `BASE`: ε in linear maps."""
    import autolrp

    def explain(x: Tensor, target: Tensor) -> Tensor:
        wrapped = autolrp.tensor(x)
        network(wrapped).gather(1, target[:, None]).sum().lrp()
        return torch.as_tensor(wrapped.relevance)

    return explain


def random_map(name: str, network: nn.Module) -> Explain:
    generator = torch.Generator().manual_seed(0)
    return lambda x, target: torch.rand(x.shape, generator=generator)


METHODS: dict[str, Callable[[str, nn.Module], Explain]] = {
    OURS: relative_lrp,
    "EpsilonPlus": zennit("EpsilonPlus"),
    "EpsilonGammaBox": zennit("EpsilonGammaBox"),
    "α2β1": zennit("EpsilonAlpha2Beta1"),
    "Grad-CAM": grad_cam,
    "integrated gradients": captum(IntegratedGradients, n_steps=STEPS, internal_batch_size=8),
    "input×gradient": captum(InputXGradient),
    "gradient": captum(Saliency),
    "autoLRP": auto_lrp,
    "random": random_map,
}


def prepare(method: str, name: str, network: nn.Module) -> Explain:
    """The method on a copy of the network; inputs are never changed, gradients are on."""
    explain = METHODS[method](name, deepcopy(network))

    def detached(x: Tensor, target: Tensor) -> Tensor:
        with torch.enable_grad():
            return explain(x.detach().clone(), target).detach()

    return detached


# --- sentences ----------------------------------------------------------------------------------


def by_token(method: str) -> ByToken:
    """The method's attribution of each word embedding, summed over the embedding."""
    if method == "random":
        generator = torch.Generator().manual_seed(0)
        return lambda sentence: torch.rand(len(sentence.tokens), generator=generator)

    def explain(sentence: Sentence) -> Tensor:
        with torch.enable_grad():
            made = METHODS[method]("minilm", sentence.network)
            target = torch.zeros(1, dtype=torch.long)
            return made(sentence.embeddings.clone(), target).detach().sum(-1)[0]

    return explain


SENTENCE_METHODS = (
    OURS,
    "integrated gradients",
    "input×gradient",
    "gradient",
    "autoLRP",
    "random",
)
