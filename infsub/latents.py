"""A latent of several parts as the flat z [D] that everything here takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from infsub.types import Array


class FlatLatent(NamedTuple):
    """A structured latent and its flat z.

    Attributes:
      latent_dim: D, of all parts together.
      ravel: parts -> z [D]; of their means, or of their standard deviations too.
      unravel: z [D] -> parts.
    """

    latent_dim: int
    ravel: Callable[[Any], Array]
    unravel: Callable[[Array], Any]


def flat_latent(parts: Any) -> FlatLatent:
    """How to ravel a latent of these parts: arrays, or shapes of them, in any pytree.

    Of a hierarchical model, z_1 and z_2 given z_1, take the noise of both for z: its prior is N(0, I).
    Otherwise say log_prior, and sample_prior too.

    >>> latent = infsub.flat_latent({"digit": jnp.zeros(10), "style": jnp.zeros((2, 3))})
    >>> latent.latent_dim
    16
    >>> latent.unravel(jnp.arange(16.0))["style"].shape
    (2, 3)

    Raises:
      TypeError: a part is no array of floating point numbers.
    """
    shapes = jax.eval_shape(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), parts))
    for shape in jax.tree.leaves(shapes):
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            raise TypeError(f"z must be continuous; a part of the latent is of type {shape.dtype}")
    example = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    flat, unravel = ravel_pytree(example)

    def ravel(parts: Any) -> Array:
        if (found := jax.tree.map(jnp.shape, parts)) != (want := jax.tree.map(jnp.shape, example)):
            raise ValueError(f"the latent's parts must have the shapes {want}; got {found}")
        return ravel_pytree(parts)[0]

    return FlatLatent(flat.size, ravel, unravel)
