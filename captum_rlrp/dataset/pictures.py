"""Pictures and heat maps as data URIs, small enough for ten thousand of them."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from .store import Array


def picture_uri(data: Array, pixels: int, quality: int = 80) -> str:
    """A JPEG of a picture (channels, height, width) in 8 bits, at most so large.

    Small ones are kept as they are, as PNG: the browser enlarges them.
    """
    image = Image.fromarray(shown_channels(data))
    small = max(image.size) <= 64
    image.thumbnail((pixels, pixels))
    return uri(image, "PNG" if small else "JPEG", quality)


def shown_channels(data: Array) -> Array:
    """Height, width, and 3 channels or none."""
    if len(data) == 3:
        return np.ascontiguousarray(data.transpose(1, 2, 0))
    return np.ascontiguousarray(data[0] if len(data) == 1 else data.mean(0).astype(np.uint8))


def heat_uri(relevance: Array, pixels: int) -> tuple[str, float, float]:
    """A signed heat map (height, width) as an 8-bit PNG.

    Values are q = 128 + 127 · sign(r) · √(|r| / largest), so that small ones keep their digits.

    Returns:
        The URI, the largest |r|, and the 99th percentile of |r|, at which colours saturate.
    """
    relevance = reduced(relevance, pixels)
    largest = float(np.abs(relevance).max()) or 1.0
    saturated = float(np.quantile(np.abs(relevance), 0.99)) or largest
    level = np.sign(relevance) * np.sqrt(np.abs(relevance) / largest)
    image = Image.fromarray(np.round(128 + 127 * level).astype(np.uint8))
    return uri(image, "PNG"), largest, saturated


def saturation(relevance: Array, pixels: int) -> float:
    """Where colours saturate, per unit of the whole picture's area: it fits maps of any size."""
    small = reduced(relevance, pixels)
    return float(np.quantile(np.abs(small), 0.99)) * small.size


def reduced(relevance: Array, pixels: int) -> Array:
    """At most so large."""
    longest = max(relevance.shape)
    return block_sums(relevance, -(-longest // pixels)) if longest > pixels else relevance


def block_sums(values: Array, side: int) -> Array:
    """Sums over squares of so many pixels: relevance is shares, which add up."""
    height, width = values.shape
    padded = np.pad(values, ((0, -height % side), (0, -width % side)))
    rows, columns = padded.shape[0] // side, padded.shape[1] // side
    return padded.reshape(rows, side, columns, side).sum((1, 3))


def uri(image: Image.Image, kind: str, quality: int = 80) -> str:
    """The image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality, optimize=kind == "PNG")
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
