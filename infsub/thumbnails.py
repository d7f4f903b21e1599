"""What a datapoint looks like, small: a picture where it is an image, else a few words."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import jax
import numpy as np
from PIL import Image

_LARGEST = 64  # pixels a side of a picture
_SMALLEST = 8  # pixels a side, of a vector that is taken for a square image


def pictures(xs: Any) -> list[np.ndarray] | None:
    """uint8 [H, W] or [H, W, 3] of each datapoint, from the first leaf of the pytree `xs` that is images.

    [N, H, W], [N, H, W, C] and [N, C, H, W] are, of 1 or 3 channels C, and [N, D] where D is a
    square and all values lie in 0 … 1 or are bytes. None where no leaf is.
    """
    for leaf in jax.tree.leaves(xs):
        values = np.asarray(leaf)
        if (images := _images(values)) is not None:
            return list(_bytes(images))
    return None


def words(xs: Any, num_datapoints: int) -> list[str]:
    """Of each datapoint, how many values each leaf of `xs` has, their mean and range."""
    texts = [_words(np.asarray(leaf)) for leaf in jax.tree.leaves(xs)]
    return ["; ".join(parts) for parts in zip(*texts, strict=True)] or [""] * num_datapoints


def arrays(xs: Any) -> dict[str, np.ndarray]:
    """What is shown of the datapoints, as arrays to be saved: "images" uint8 [N, …], or "words" [N]."""
    images = pictures(xs)
    if images is not None:
        return {"images": np.stack(images)}
    return {"words": np.array(words(xs, len(jax.tree.leaves(xs)[0])), str)}


def png(picture: np.ndarray) -> str:
    """A picture as the base64 text of a PNG file, a bit a pixel where it is black and white."""
    image = Image.fromarray(picture)
    image.thumbnail((_LARGEST, _LARGEST))
    if picture.ndim == 2 and np.isin(picture, (0, 255)).all() and image.size == picture.T.shape:
        image = image.convert("1", dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _images(values: np.ndarray) -> np.ndarray | None:
    if values.dtype == object or values.size == 0:
        return None
    match values.shape:
        case (_, height, width) if min(height, width) > 1:
            return values
        case (_, height, width, channels) if channels in (1, 3) and min(height, width) > 1:
            return values[..., 0] if channels == 1 else values
        case (_, channels, height, width) if channels in (1, 3) and min(height, width) > 1:
            return values[:, 0] if channels == 1 else np.moveaxis(values, 1, -1)
        case (num_datapoints, size) if size >= _SMALLEST**2 and math.isqrt(size) ** 2 == size:
            if values.dtype in (np.uint8, np.bool_) or (values.min() >= 0 and values.max() <= 1):
                return values.reshape(num_datapoints, math.isqrt(size), -1)
    return None


def _bytes(images: np.ndarray) -> np.ndarray:
    """Intensities as 0 … 255: bytes are, but levels of few; others by the range of them all."""
    if images.dtype == np.uint8 and images.max() > 16:
        return images
    finite = np.nan_to_num(images.astype(np.float32))
    low, high = (
        min(finite.min(), 0.0),
        max(finite.max(), 1.0) if finite.min() >= 0 else finite.max(),
    )
    return (255 * (finite - low) / (high - low or 1)).astype(np.uint8)


def _words(values: np.ndarray) -> list[str]:
    if values.dtype == object or values.dtype.kind not in "biuf":
        return [str(value) for value in values]
    if values.ndim == 1:
        return [f"{value:.4g}" for value in values.astype(float)]
    flat = values.reshape(len(values), -1).astype(float)
    return [
        f"{row.size} values, mean {row.mean():.3g}, {row.min():.3g} … {row.max():.3g}"
        for row in flat
    ]
