"""Explanations that show themselves in a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .charts import AGAINST, FOR
from .pictures import uri
from .store import Array

_STYLE = "display:inline-block;margin:4px;text-align:center;font:13px system-ui,sans-serif"


class Html:
    """HTML that a notebook displays; ``save`` writes it to a file."""

    def __init__(self, parts: Sequence[str]) -> None:
        legend = (
            f'<div style="font:13px system-ui,sans-serif"><span style="color:{FOR}">■</span> '
            f'speaks for the class <span style="color:{AGAINST}">■</span> against it</div>'
        )
        self.html = "".join(parts) + legend

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | Path) -> None:
        """Write a page that needs nothing else."""
        page = f'<!doctype html><meta charset="utf-8"><title>Relative LRP</title>{self.html}\n'
        Path(path).write_text(page, encoding="utf-8")


def show(
    attributions: Tensor,
    images: Tensor | None = None,
    *,
    tokens: Sequence[Sequence[str]] | None = None,
    titles: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    opacity: float = 0.8,
    size: int = 224,
) -> Html:
    r"""
    Shows explanations of images or of text; as the last line of a notebook's cell, in its output.

    Args:

        attributions (Tensor): Of images, shape ``(N, C, H, W)`` or ``(C, H, W)``; of
                text, one number per token, ``(N, T)`` or ``(T,)``, or one per feature of its
                embedding, ``(N, T, E)``.
        images (Tensor, optional): What was explained; drawn in grey under the relevance.
        tokens (list[list[str]], optional): The words of each text.
        titles (list[str], optional): One for each sample.
        mean, std (list[float], optional): By which the images were normalised.
        opacity (float): Of the relevance, from 0 to 1.
        size (int): Width of an image on the page, in pixels.

    Returns:

        :class:`Html`: What a notebook displays.

    Raises:

        InputError: If the shapes do not fit each other.

    Examples::

        >>> page = show(rlrp.attribute(images, target=labels), images)
        >>> page = show(relevance.sum(-1), tokens=words)
    """
    values = attributions.detach().float().cpu()
    if tokens is not None:
        if values.dim() == 3:
            values = values.sum(2)
        rows = values[None] if values.dim() == 1 else values
        is_one = bool(tokens) and isinstance(tokens[0], str)
        words: list[Any] = [tokens] if is_one else list(tokens)
        if len(words) != len(rows):
            raise InputError(f"There are {len(rows)} explanations and {len(words)} texts.")
        names = _titles(titles, len(rows))
        return Html([_text(*entry) for entry in zip(rows, words, names, strict=True)])
    if values.dim() == 3:
        values = values[None]
        images = None if images is None else images[None]
    if values.dim() != 4:
        raise InputError(
            f"attributions have shape {tuple(attributions.shape)}: images have (N, C, H, W); of "
            "text, pass tokens too."
        )
    if images is not None and (images.shape[:1], images.shape[2:]) != (
        values.shape[:1],
        values.shape[2:],
    ):
        raise InputError(
            f"attributions of shape {tuple(values.shape)} do not fit images of shape "
            f"{tuple(images.shape)}."
        )
    names = _titles(titles, len(values))
    pictures = [None] * len(values) if images is None else list(_in_range(images, mean, std))
    return Html(
        [
            _image(heat.sum(0).numpy(), picture, name, opacity, size)
            for heat, picture, name in zip(values, pictures, names, strict=True)
        ]
    )


def _in_range(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """From 0 to 1, the normalisation taken back; if unknown, from the least value to the most."""
    x = images.detach().float().cpu()
    if mean is not None and std is not None:
        return (x * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)).clamp(
            0, 1
        )
    if bool((x < 0).any() or (x > 1).any()):
        least, most = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        x = (x - least) / (most - least).clamp_min(1e-12)
    return x


def overlay(heat: Array, picture: Tensor | None, opacity: float = 1.0) -> Array:
    """Relevance (height, width) in colour over a grey picture: height, width, 3, in 8 bits."""
    saturated = float(np.quantile(np.abs(heat), 0.99)) or float(np.abs(heat).max()) or 1.0
    ground = np.full(heat.shape, 0.97)
    if picture is not None:
        weights = torch.tensor([0.3, 0.59, 0.11]) if len(picture) == 3 else torch.ones(len(picture))
        ground = (picture * (weights / weights.sum()).view(-1, 1, 1)).sum(0).numpy()
    share = (np.minimum(np.abs(heat) / saturated, 1) * opacity)[..., None]
    colours = np.where((heat > 0)[..., None], _rgb(FOR), _rgb(AGAINST))
    mixed = ground[..., None] * (1 - share) + colours * share
    return np.round(mixed * 255).clip(0, 255).astype(np.uint8)


def _image(heat: Array, picture: Tensor | None, title: str, opacity: float, size: int) -> str:
    from PIL import Image

    source = uri(
        Image.fromarray(overlay(heat, picture, opacity if picture is not None else 1)), "PNG"
    )
    sharp = "image-rendering:pixelated;" if heat.shape[1] <= 64 else ""
    name = html.escape(title)
    return (
        f'<figure style="{_STYLE}"><img src="{source}" width="{size}" style="{sharp}" '
        f'alt="relevance {name}"><figcaption>{name}</figcaption></figure>'
    )


def _text(values: Tensor, words: Sequence[str], title: str) -> str:
    if len(words) > len(values):
        raise InputError(f"A text has {len(words)} tokens and {len(values)} relevances.")
    largest = float(values.abs().max()) or 1.0
    spans = []
    for word, value in zip(words, values.tolist(), strict=False):
        colour = ",".join(str(round(255 * c)) for c in _rgb(FOR if value > 0 else AGAINST))
        share = abs(value) / largest
        line = ("solid" if value > 0 else "dotted") if share > 0.05 else "none"
        spans.append(
            f'<span title="{value:.3g}" style="background:rgba({colour},{0.55 * share:.3f});'
            f'border-bottom:3px {line} rgb({colour});padding:1px 3px">{html.escape(word)}</span>'
        )
    name = f"<b>{html.escape(title)}</b> " if title else ""
    return f'<p style="font:15px/2 system-ui,sans-serif">{name}{" ".join(spans)}</p>'


def _titles(titles: Sequence[str] | None, count: int) -> list[str]:
    if titles is None:
        return [""] * count
    if len(titles) != count:
        raise InputError(f"There are {count} explanations and {len(titles)} titles.")
    return list(titles)


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
