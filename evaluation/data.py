"""The data sets. None needs a download; in scenes it is known which pixels are which object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

POOL = 4096  # training scenes for each seed
MIDDLE, SPREAD = 0.5, 0.25  # pictures are fed to networks as (rgb - MIDDLE) / SPREAD


@dataclass
class Samples:
    """What is tested: `labels` are explained; `others` are the classes to tell them from."""

    inputs: Tensor
    labels: Tensor
    others: Tensor
    present: Tensor  # (N, classes): each sample's classes, in equal parts that sum to 1
    masks: Tensor | None = None  # (N, 1, H, W), True on the object of class `labels`
    other_masks: Tensor | None = None  # the same for `others`

    def first(self, count: int) -> Samples:
        """The first `count` of them."""
        parts = (value if value is None else value[:count] for value in vars(self).values())
        return Samples(*parts)


@dataclass(frozen=True)
class Data:
    """A data set: test samples, and as many training batches as one asks for."""

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    low: float  # smallest and largest value that an input element can have
    high: float
    batch: Callable[[int, Generator], tuple[Tensor, Tensor]]  # inputs and soft labels
    test: Callable[[int], Samples]


def load(name: str, size: int) -> Data:
    """The data set of that name; `size` is the side of generated pictures."""
    if name in ("digits", "breast_cancer"):
        return table(name)
    return scenes(name, size)


# --- scikit-learn's tables ----------------------------------------------------------------------


@cache
def table(name: str) -> Data:
    """Digits of 8×8, scaled to [0, 1], or the 30 standardised figures of a breast tissue sample."""
    from sklearn import datasets

    loaded = getattr(datasets, f"load_{name}")()
    inputs = torch.tensor(loaded.data, dtype=torch.float32)
    labels = torch.tensor(loaded.target)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    train, test = order[: int(0.8 * len(order))], order[int(0.8 * len(order)) :]
    if name == "digits":
        inputs = inputs.view(-1, 1, 8, 8) / 16
    else:
        inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)
    count = len(loaded.target_names)
    present = F.one_hot(labels, count).float()

    def batch(number: int, generator: Generator) -> tuple[Tensor, Tensor]:
        chosen = train[torch.randint(len(train), (number,), generator=generator)]
        return inputs[chosen], present[chosen]

    def samples(number: int) -> Samples:
        chosen = test[:number]
        shift = torch.randint(1, count, (len(chosen),), generator=Generator().manual_seed(1))
        others = (labels[chosen] + shift) % count
        return Samples(inputs[chosen], labels[chosen], others, present[chosen])

    names = tuple(str(target) for target in loaded.target_names)
    low, high = float(inputs.min()), float(inputs.max())
    return Data(names, tuple(inputs.shape[1:]), low, high, batch, samples)


# --- scenes -------------------------------------------------------------------------------------

Stamp = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
Background = Callable[[int, int, Generator, bool], Tensor]


def scenes(name: str, size: int) -> Data:
    """Pictures of several objects, each of another class, before a busy background."""
    if name == "shapes":
        classes = tuple(SHAPES)
        stamp, background = stamp_shape, clutter
    elif name == "cutouts":
        classes = tuple(PHOTOS)
        stamp, background = stamp_photo, texture
    else:
        raise ValueError(f"there is no data set {name!r}")

    def drawn(number: int, generator: Generator, training: bool) -> Samples:
        # In blocks: the first samples are the same however many are asked for.
        # Half of the training scenes hold one object: what it is called is learnt sooner.
        blocks = [
            compose(
                64,
                size,
                len(classes),
                2 - training * (index % 2),
                stamp,
                background,
                generator,
                training,
            )
            for index in range(-(-number // 64))
        ]
        parts = zip(*(vars(block).values() for block in blocks), strict=True)
        return Samples(*(torch.cat(part) for part in parts)).first(number)

    pool: list[Samples] = []

    def batch(number: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Scenes from a pool that the generator's first call fills, mirrored at random."""
        if not pool:
            pool.append(drawn(POOL, generator, True))
        chosen = torch.randint(POOL, (number,), generator=generator)
        mirrored = [axis for axis in (2, 3) if torch.rand((), generator=generator) < 0.5]
        return pool[0].inputs[chosen].flip(mirrored), pool[0].present[chosen]

    def samples(number: int) -> Samples:
        return drawn(number, Generator().manual_seed(12345), False)

    low, high = (0 - MIDDLE) / SPREAD, (1 - MIDDLE) / SPREAD
    return Data(classes, (3, size, size), low, high, batch, samples)


def compose(
    count: int,
    size: int,
    classes: int,
    objects: int,
    stamp: Stamp,
    background: Background,
    generator: Generator,
    training: bool,
) -> Samples:
    """Put objects of different classes into different quarters of each picture."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (H, W, 2): x, y
    chosen = torch.rand(count, classes, generator=generator).argsort(1)[:, :objects]
    quarters = torch.rand(count, 4, generator=generator).argsort(1)
    pictures = background(count, size, generator, training)
    masks = torch.zeros(2, count, size, size, dtype=torch.bool)
    for index in range(objects):
        quarter = quarters[:, index]
        home = torch.stack([quarter % 2, quarter // 2], dim=1) - 0.5
        centre = home + uniform(-0.06, 0.06, 2)
        scale, angle = uniform(0.36, 0.46), uniform(-0.4, 0.4)
        cos, sin = angle.cos(), angle.sin()
        turn = torch.stack([cos, sin, -sin, cos], dim=1).view(count, 2, 2)
        local = torch.einsum("nij,nhwj->nhwi", turn, points - centre[:, None, None])
        colours, inside = stamp(chosen[:, index], local / scale[:, None, None, None], size)
        tint = uniform(0.8, 1.2, 3, 1, 1)
        if stamp is stamp_shape:  # bright or dark in each colour, never the background's grey
            tint = (uniform(0.0, 1.0, 3, 1, 1).round() - uniform(0.0, 0.2, 3, 1, 1)).abs()
        opacity = (inside * scale[:, None, None] * size / 2 + 0.5).clamp(0, 1)[:, None]
        pictures = pictures * (1 - opacity) + (colours * tint).clamp(0, 1) * opacity
        masks[:, :, :, :] &= opacity[:, 0] < 0.5  # what covers an object takes its pixels
        masks[index] = opacity[:, 0] >= 0.5
    grey = (torch.rand(count, 1, 1, 1, generator=generator) < 0.3).float()  # colour tells little
    pictures = pictures * (1 - grey) + pictures.mean(1, keepdim=True) * grey
    pictures = pictures + 0.03 * torch.randn(pictures.shape, generator=generator)
    inputs = (pictures.clamp(0, 1) - MIDDLE) / SPREAD
    present = torch.zeros(count, classes).scatter_(1, chosen, 1 / objects)
    return Samples(
        inputs, chosen[:, 0], chosen[:, -1], present, masks[0][:, None], masks[1][:, None]
    )


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = 0.866
    return 0.5 - torch.stack([y, slope * x - 0.5 * y, -slope * x - 0.5 * y]).amax(0)


def _plus(x: Tensor, y: Tensor) -> Tensor:
    upright = torch.minimum(0.3 - x.abs(), 1 - y.abs())
    return torch.maximum(upright, torch.minimum(0.3 - y.abs(), 1 - x.abs()))


# Signed distance to the border, positive inside, for a shape of about unit radius.
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disk": lambda x, y: 0.85 - torch.hypot(x, y),
    "ring": lambda x, y: 0.22 - (torch.hypot(x, y) - 0.75).abs(),
    "square": lambda x, y: 0.75 - torch.maximum(x.abs(), y.abs()),
    "triangle": _triangle,
    "plus": _plus,
}


def stamp_shape(classes: Tensor, local: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """White shapes, to be tinted."""
    x, y = local.unbind(-1)
    distances = torch.empty_like(x)
    for index, shape in enumerate(SHAPES.values()):
        chosen = classes == index
        distances[chosen] = shape(x[chosen], y[chosen])
    return torch.ones(len(x), 3, *x.shape[1:]), distances


def clutter(count: int, size: int, generator: Generator, training: bool) -> Tensor:
    """Smooth random colours under a dozen short bars, which belong to no class."""
    base = 0.3 + 0.4 * torch.rand(count, 3, 4, 4, generator=generator)
    pictures = F.interpolate(base, size=(size, size), mode="bilinear", align_corners=False)
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for _ in range(12):
        centre = torch.rand(count, 2, 1, 1, generator=generator) * 2 - 1
        angle = torch.rand(count, 1, 1, generator=generator) * 3.1416
        cos, sin = angle.cos(), angle.sin()
        dx, dy = x - centre[:, 0], y - centre[:, 1]
        along, across = (dx * cos + dy * sin).abs(), (dy * cos - dx * sin).abs()
        bar = ((along < 0.16) & (across < 0.04))[:, None]
        colour = torch.rand(count, 3, 1, 1, generator=generator)
        pictures = torch.where(bar, colour, pictures)
    return pictures


# Photographs that ship with scikit-image: centre (x, y) and radius of the disk that is cut out.
PHOTOS = {
    "astronaut": (220, 110, 95),
    "camera": (240, 150, 125),
    "chelsea": (200, 152, 145),
    "coffee": (290, 195, 190),
    "stereo_motorcycle": (400, 300, 195),
}
TEXTURES = ("brick", "grass", "gravel", "immunohistochemistry", "hubble_deep_field")


def photograph(name: str) -> Tensor:
    """One of scikit-image's photographs, (3, H, W) in [0, 1]."""
    from skimage import data

    loaded = getattr(data, name)()
    image = torch.tensor(loaded[0] if isinstance(loaded, tuple) else loaded)
    if image.dim() == 2:
        image = image[:, :, None].expand(-1, -1, 3)
    return image[:, :, :3].permute(2, 0, 1).float() / 255


@cache
def cutouts(side: int) -> Tensor:
    """The squares around the disks of `PHOTOS`."""
    squares = []
    for name, (x, y, radius) in PHOTOS.items():
        square = photograph(name)[:, y - radius : y + radius, x - radius : x + radius]
        shrunk = F.interpolate(square[None], size=(side, side), mode="bilinear", antialias=True)
        squares.append(shrunk)
    return torch.cat(squares)


def stamp_photo(classes: Tensor, local: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Disks cut out of photographs."""
    squares = cutouts(max(16, size // 2))[classes]
    colours = F.grid_sample(squares, local, padding_mode="border", align_corners=False)
    return colours, 0.97 - torch.hypot(*local.unbind(-1))


@cache
def textures() -> Tensor:
    squares = []
    for name in TEXTURES:
        image = photograph(name)
        side = min(image.shape[1:])
        square = image[None, :, :side, :side]
        squares.append(F.interpolate(square, size=(384, 384), mode="bilinear", antialias=True))
    return torch.cat(squares)


def texture(count: int, size: int, generator: Generator, training: bool) -> Tensor:
    """A piece of a texture: from the left half for training, from the right half for testing."""
    chosen = torch.randint(len(TEXTURES), (count,), generator=generator).tolist()
    tops = torch.randint(384 - 128, (count,), generator=generator).tolist()
    lefts = (
        torch.randint(192 - 128, (count,), generator=generator) + (not training) * 192
    ).tolist()
    whole = textures()
    pieces = [
        whole[index, :, top : top + 128, left : left + 128]
        for index, top, left in zip(chosen, tops, lefts, strict=True)
    ]
    return F.interpolate(torch.stack(pieces), size=(size, size), mode="bilinear", antialias=True)


# --- pictures of one's own ----------------------------------------------------------------------


def folder(path: Path, size: int, outputs: int) -> Data:
    """An ImageFolder (one sub-folder per class), prepared as torchvision's weights expect it.

    Where there are as many folders as the network has outputs, they are its classes, in
    alphabetical order; otherwise labels are -1 and what the network predicts is explained.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    steps = [
        v2.ToImage(),
        v2.Resize(size * 8 // 7, antialias=True),
        v2.CenterCrop(size),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
    ]
    images = ImageFolder(str(path), transform=v2.Compose(steps))
    known = len(images.classes) == outputs
    order = torch.randperm(len(images), generator=Generator().manual_seed(0)).tolist()

    def samples(number: int) -> Samples:
        loaded = [images[index] for index in order[:number]]
        inputs = torch.stack([image for image, _ in loaded])
        labels = torch.tensor([label if known else -1 for _, label in loaded])
        present = F.one_hot(labels.clamp(min=0), outputs).float()
        return Samples(inputs, labels, labels, present)

    def batch(number: int, generator: Generator) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("networks are not trained on pictures of one's own")

    return Data(tuple(images.classes), (3, size, size), -2.2, 2.7, batch, samples)
