"""Convolutions as matrix products against the sums that define them."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from infsub import convolutions

PIXELS = list(itertools.product(range(4), repeat=2))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (7, 10), (11, 8)])
def test_a_convolution_is_its_sum(height, width):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(height, width, 3)), rng.normal(size=(4, 4, 3, 2))
    size = [(side - 4) // 2 + 1 for side in x.shape[:2]]
    want = np.zeros((*size, 2))
    for h, w in np.ndindex(*size):
        for a, b in PIXELS:
            want[h, w] += x[2 * h + a, 2 * w + b] @ kernel[a, b]
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(convolutions.conv)(x, kernel), want, rtol=1e-10)


@pytest.mark.parametrize("size", [(6, 10), (7, 11), (5, 9)])
def test_a_transposed_convolution_is_its_sum(size):
    """To a size that is reached exactly, with a row and a column more, with those that are too many."""
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 4, 3)), rng.normal(size=(4, 4, 3, 2))
    want = np.zeros((7, 11, 2))
    for h, w in np.ndindex(2, 4):
        for a, b in PIXELS:
            want[2 * h + a, 2 * w + b] += x[h, w] @ kernel[3 - a, 3 - b]
    with jax.enable_x64(True):
        y = jax.jit(convolutions.conv_transpose, static_argnums=2)(x, kernel, size)
        np.testing.assert_allclose(y, want[: size[0], : size[1]], rtol=1e-10, atol=1e-12)
