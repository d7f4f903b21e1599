"""Convolutions of kernel 4 and stride 2 as matrix products, and their transposes.

Kernel and stride are both even, so an image is a grid of 2×2 blocks, a pixel's place [2 h + r, 2 w + s],
and a kernel is 2×2 of them, [2 p + r, 2 q + s]: what reaches from block to block is p, q ∈ {0, 1}. XLA's
own convolutions take several times as long in the loops of a CPU, as tests/benchmarks/convolutions.py
shows (Chellapilla, Puri & Simard 2006, "High performance convolutional neural networks for document
processing").
"""

from __future__ import annotations

import functools
import itertools

import jax.numpy as jnp
from jax import lax

from infsub.types import Array

KERNEL, STRIDE = 4, 2
_NEIGHBOURS = tuple(itertools.product((0, 1), repeat=2))  # (p, q)


def conv(x: Array, kernel: Array) -> Array:
    """y[h, w] = Σ_{a,b} x[2h + a, 2w + b] · kernel[a, b], without padding.

    Args:
      x: [H, W, C] of at least 4×4; a last row or column that no kernel reaches is left out.
      kernel: [4, 4, C, F].

    Returns:
      [(H − 4) // 2 + 1, (W − 4) // 2 + 1, F].
    """
    (height, width), (channels, features) = map(conv_size, x.shape[:2]), kernel.shape[2:]
    x = x[: 2 * height + 2, : 2 * width + 2]
    blocks = x.reshape(height + 1, 2, width + 1, 2, channels)
    blocks = blocks.transpose(0, 2, 1, 3, 4).reshape(height + 1, width + 1, 4 * channels)
    patches = [blocks[p : p + height, q : q + width] for p, q in _NEIGHBOURS]
    by_block = _by_block(kernel).transpose(0, 2, 1, 3, 4, 5)
    return jnp.concatenate(patches, -1) @ by_block.reshape(16 * channels, features)


def conv_transpose(x: Array, kernel: Array, size: tuple[int, int]) -> Array:
    """y[2h + a, 2w + b] = Σ x[h, w] · kernel[3 − a, 3 − b], flipped as `lax.conv_transpose` has it.

    Args:
      x: [H, W, C].
      kernel: [4, 4, C, F].
      size: height and width of the result, of which [2 H + 2, 2 W + 2] are reached; the others are 0.

    Returns:
      [*size, F].
    """
    height, width, features = *x.shape[:2], kernel.shape[3]
    patches = jnp.einsum("hwc,prqscf->hwprqsf", x, _by_block(kernel[::-1, ::-1]))
    rest = ((0, 0),) * 3
    blocks = functools.reduce(
        jnp.add,
        [jnp.pad(patches[:, :, p, :, q], ((p, 1 - p), (q, 1 - q), *rest)) for p, q in _NEIGHBOURS],
    )
    y = blocks.transpose(0, 2, 1, 3, 4).reshape(2 * height + 2, 2 * width + 2, features)
    missing = [(0, wanted - given, 0) for wanted, given in zip(size, y.shape, strict=False)]
    return lax.pad(y, jnp.zeros((), y.dtype), (*missing, (0, 0, 0)))  # where negative, it is cut


def _by_block(kernel: Array) -> Array:
    """[4, 4, C, F] as [p, r, q, s, C, F]."""
    return kernel.reshape(2, 2, 2, 2, *kernel.shape[2:])


def conv_size(size: int) -> int:
    """An image side after `conv`."""
    return (size - KERNEL) // STRIDE + 1
