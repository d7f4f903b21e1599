"""Structured latents as a flat z."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infsub
from infsub import densities

PARTS = {"top": jnp.zeros(2), "bottom": jnp.zeros((2, 2))}


def test_there_and_back():
    latent = infsub.flat_latent(PARTS)
    parts = {"top": jnp.arange(2.0), "bottom": jnp.arange(4.0).reshape(2, 2)}
    z = latent.ravel(parts)
    assert (latent.latent_dim, z.shape) == (6, (6,))
    back = latent.unravel(z)
    jax.tree.map(np.testing.assert_array_equal, back, parts)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), PARTS)
    np.testing.assert_array_equal(infsub.flat_latent(shapes).ravel(parts), z)


def test_a_hierarchical_model_through_its_noise():
    """z_2 = 2 z_1 + ε: through (z_1, ε) of N(0, I) log p(x) is the closed form's."""
    latent = infsub.flat_latent({"z_1": jnp.zeros(1), "noise": jnp.zeros(1)})

    def log_likelihood(x, z):
        parts = latent.unravel(z)
        return densities.normal(x, 2 * parts["z_1"] + parts["noise"], jnp.asarray(0.5))

    x = jnp.array([1.3])
    target = infsub.Target(None, jax.tree_util.Partial(log_likelihood, x), latent.latent_dim)
    found = infsub.iwae(jax.random.key(0), target, infsub.laplace(target), 500)
    want = densities.normal(x, jnp.zeros(1), jnp.sqrt(jnp.asarray(4 + 1 + 0.25)))
    np.testing.assert_allclose(found.log_px, want, atol=1e-3)


def test_mistakes_are_named():
    with pytest.raises(
        TypeError, match="z must be continuous; a part of the latent is of type int32"
    ):
        infsub.flat_latent({"digit": jnp.zeros(3, jnp.int32)})
    with pytest.raises(ValueError, match=r"parts must have the shapes .*\(2,\).*got .*\(3,\)"):
        infsub.flat_latent(PARTS).ravel(PARTS | {"top": jnp.zeros(3)})
