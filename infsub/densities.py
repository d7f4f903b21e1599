"""Log densities, in nats, constants kept: each a function of one datapoint, summed over its axes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from infsub.types import Array, Gaussian, Key

LOG_2PI = math.log(2 * math.pi)


def standard_normal(z: Array) -> Array:
    """log N(z; 0, I) = −D/2 log 2π − ‖z‖²/2, z [D] -> []."""
    return -0.5 * (jnp.sum(z**2) + z.size * LOG_2PI)


def normal(z: Array, mean: Array, scale: Array) -> Array:
    """log N(z; mean, diag(scale²)), each [D] -> []."""
    return standard_normal((z - mean) / scale) - jnp.sum(
        jnp.log(jnp.broadcast_to(scale, jnp.shape(z)))
    )


def sample_gaussian(key: Key, q: Gaussian) -> tuple[Array, Array]:
    """One draw z [D] of q and log q(z) []; the pathwise gradient flows through both."""
    noise = jax.random.normal(key, q.mean.shape, q.mean.dtype)
    z = q.mean + q.scale * noise
    return z, normal(z, q.mean, q.scale)


@jax.custom_jvp
def _softplus(a: Array) -> Array:
    # log1p costs twice as much on a CPU; exp(−|a|) ≤ 1, so log(1 + ·) loses less than one ulp of the result's scale.
    return jnp.maximum(a, 0) + jnp.log(1 + jnp.exp(-jnp.abs(a)))


@_softplus.defjvp
def _softplus_jvp(primals, tangents):  # pyright: ignore
    (a,), (da,) = primals, tangents
    # The gradient alone needs no softplus: XLA drops the value when nobody reads it.
    return _softplus(a), jax.nn.sigmoid(a) * da


def bernoulli_logits(x: Array, logits: Array) -> Array:
    """log p(x) = Σ x·l − log(1 + eˡ) for independent bits x in {0, 1} (or means in [0, 1]), any shape -> [].

    Its gradient in the logits is x − sigmoid(l), computed without forming the value.
    """
    return jnp.sum(x * logits - _softplus(logits))
