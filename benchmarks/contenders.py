"""The models that are explained, and who explains them.

Everybody gets a copy of the model of their own, as a user has it: plain contiguous parameters, in
evaluation mode. Hooks of one method can therefore not slow another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from captum.attr import LRP, InputXGradient
from torch import Tensor, nn
from torchvision import models

from captum_rlrp import RelativeLRP

Explain = Callable[[Tensor, Tensor], Tensor | None]  # images and targets to attributions

aten = torch.ops.aten


# --- models -------------------------------------------------------------------------------------


def cnn_1d() -> nn.Module:
    """Seven convolutions over a signal of 4096 samples."""
    layers: list[nn.Module] = []
    channels = [1, 32, 64, 64, 128, 128, 256, 256]
    for before, after in itertools.pairwise(channels):
        stride = 1 if before == after else 2
        convolution = nn.Conv1d(before, after, 7, stride=stride, padding=3, bias=False)
        layers += [convolution, nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(256, 10))


def tiny_mlp() -> nn.Module:
    """So small that only the fixed cost of a call counts."""
    hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def efficientnet_lite0() -> nn.Module:
    """With static padding: as converted from TensorFlow, zeros in front of strided convolutions."""
    import timm

    model: nn.Module = timm.create_model("efficientnet_lite0")
    for module in list(model.modules()):
        for name, conv in module.named_children():
            if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2):
                before = (conv.kernel_size[0] - 2) // 2
                after = conv.kernel_size[0] - 2 - before
                conv.padding = (0, 0)
                padded = nn.Sequential(nn.ZeroPad2d((before, after, before, after)), conv)
                setattr(module, name, padded)
    return model


def vit() -> nn.Module:
    """Its head is initialised to zeros, of which nothing could be explained."""
    model = models.vit_b_16()
    nn.init.normal_(model.heads.head.weight, std=0.02)
    return model


class Bert(nn.Module):
    """Six layers, on embeddings of 128 tokens."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        self.model = BertForSequenceClassification(BertConfig(vocab_size=1000, num_hidden_layers=6))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=x).logits
        return logits


class Lstm(nn.Module):
    """Two layers, both ways, and a head on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(32, 64, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x)[0][:, -1])
        return y


@dataclass(frozen=True)
class Given:
    """Where and how all methods explain."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    size: int = 224  # height and width of images


@dataclass(frozen=True)
class Subject:
    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one sample
    classes: int

    def model(self, given: Given) -> nn.Module:
        """The same parameters in every process."""
        torch.manual_seed(0)
        model = self.make().eval().to(given.device, given.dtype)
        return model.to(memory_format=torch.channels_last) if given.channels_last else model

    def inputs(self, batch: int, given: Given) -> Inputs:
        shape = [given.size if n == 224 else n for n in self.shape]
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, *shape, generator=generator).to(given.device, given.dtype)
        if given.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, (torch.arange(batch) % self.classes).to(given.device)


Inputs = tuple[Tensor, Tensor]

IMAGE = (3, 224, 224)
SUBJECTS = {
    "resnet50": Subject("ResNet50", models.resnet50, IMAGE, 1000),
    "vgg16": Subject("VGG16", models.vgg16, IMAGE, 1000),
    "mobilenet_v2": Subject("MobileNetV2", models.mobilenet_v2, IMAGE, 1000),
    "densenet121": Subject("DenseNet121", models.densenet121, IMAGE, 1000),
    "efficientnet_lite0": Subject("EfficientNet-Lite0, padded", efficientnet_lite0, IMAGE, 1000),
    "vit_b_16": Subject("ViT-B/16", vit, IMAGE, 1000),
    "swin_t": Subject("Swin-T", models.swin_t, IMAGE, 1000),
    "convnext_tiny": Subject("ConvNeXt-T", models.convnext_tiny, IMAGE, 1000),
    "bert": Subject("BERT, 6 layers, 128 tokens", Bert, (128, 768), 2),
    "lstm": Subject("LSTM, 2 layers both ways, 100 steps", Lstm, (100, 32), 5),
    "cnn_1d": Subject("1-d CNN", cnn_1d, (1, 4096), 10),
    "tiny_mlp": Subject("Tiny MLP", tiny_mlp, (64,), 10),
}


# --- methods ------------------------------------------------------------------------------------


def relative_lrp(model: nn.Module) -> Explain:
    method = RelativeLRP(model)
    return lambda x, target: method.attribute(x, target=target)


def recorded_relative_lrp(model: nn.Module) -> Explain:
    """As a CUDA graph, recorded at the second call of a signature."""
    method = RelativeLRP(model, cuda_graphs=True)
    return lambda x, target: method.attribute(x, target=target)


def input_x_gradient(model: nn.Module) -> Explain:
    method = InputXGradient(model)
    return lambda x, target: method.attribute(x.clone().requires_grad_(), target=target)


def captum_lrp(model: nn.Module) -> Explain:
    method = LRP(model)
    return lambda x, target: method.attribute(x.clone().requires_grad_(), target=target)


def zennit_epsilon_plus(model: nn.Module) -> Explain:
    """Hooks and merged batch norm are set up once, outside the time that is measured."""
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    # The VGG canonizer merges each batch norm into the layer before it. That suits the others
    # as well, but DenseNet, which normalizes ahead of its convolutions.
    if isinstance(model, models.ResNet):
        canonizers = [ResNetCanonizer()]
    else:
        canonizers = [] if isinstance(model, models.DenseNet) else [VGGCanonizer()]
    method = Gradient(model, EpsilonPlus(canonizers=canonizers))
    method.__enter__()

    def explain(x: Tensor, target: Tensor) -> Tensor:
        def start(output: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(target, output.shape[1]).to(output)

        return method(x.clone().requires_grad_(), start)[1]

    return explain


def floor(model: nn.Module) -> Explain:
    """The model's convolutions and linear layers, forward and input-gradient, and nothing else.

    Only those that the model calls as modules: attention's own projections are not among them.
    """
    plans: dict[torch.Size, list[Callable[[], None]]] = {}

    @torch.no_grad()
    def run(x: Tensor, target: Tensor) -> None:
        if x.shape not in plans:
            plans.clear()
            plans[x.shape] = _floor_plan(model, x)
        for layer in plans[x.shape]:
            layer()

    return run


METHODS: dict[str, Callable[[nn.Module], Explain]] = {
    "Relative LRP": relative_lrp,
    "Relative LRP, CUDA graph": recorded_relative_lrp,
    "InputXGradient": input_x_gradient,
    "captum LRP": captum_lrp,
    "zennit EpsilonPlus": zennit_epsilon_plus,
    "the floor": floor,
}
OURS, YARDSTICK, FLOOR = "Relative LRP", "InputXGradient", "the floor"
ON_GPU = ("Relative LRP, CUDA graph",)
PEERS = ("captum LRP", "zennit EpsilonPlus")


def contender(subject: Subject, method: str, given: Given) -> Explain:
    return METHODS[method](subject.model(given))


# --- the floor ----------------------------------------------------------------------------------

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _floor_plan(model: nn.Module, x: Tensor) -> list[Callable[[], None]]:
    """One function per layer that the model calls on `x`, in order."""
    calls: list[tuple[nn.Module, torch.Size, torch.Size]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, inputs[0].shape, output.shape))

    layers = [m for m in model.modules() if isinstance(m, (*CONVOLUTIONS, nn.Linear))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    # All layers read the same memory, so that the floor allocates only what convolutions return.
    values = x.new_empty(max(math.prod(before) for _, before, _ in calls)).normal_()
    relevance = x.new_empty(max(math.prod(after) for _, _, after in calls)).normal_()
    return [
        _floor_layer(module, _view(values, before, module), _view(relevance, after, module))
        for module, before, after in calls
    ]


def _floor_layer(module: nn.Module, x: Tensor, r: Tensor) -> Callable[[], None]:
    weight, bias = module.weight.detach(), module.bias
    if isinstance(module, nn.Linear):

        def linear() -> None:
            torch.nn.functional.linear(x, weight, bias)
            torch.nn.functional.linear(x, weight)  # the law's divisor
            torch.matmul(r, weight)

        return linear

    window = [list(v) for v in (module.stride, module.padding, module.dilation)]
    if weight.dim() == 3:  # a signal is fastest as an image of one row
        weight = weight.unsqueeze(2)
        window = [[n, *v] for n, v in zip((1, 0, 1), window, strict=True)]
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    geometry = (*window, False, [0] * len(window[0]), module.groups)

    def convolution() -> None:
        torch.convolution(x, weight, bias, *geometry)
        torch.convolution(x, weight, None, *geometry)  # the law's divisor
        aten.convolution_backward(r, x, weight, None, *geometry, [True, False, False])

    return convolution


def _view(memory: Tensor, shape: torch.Size, module: nn.Module) -> Tensor:
    """The beginning of `memory` as a tensor of that shape; images and signals channels_last."""
    flat = memory[: math.prod(shape)]
    if isinstance(module, nn.Linear) or len(shape) == 5:
        return flat.view(shape)
    n, c, h, w = shape if len(shape) == 4 else (*shape[:2], 1, shape[2])
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
