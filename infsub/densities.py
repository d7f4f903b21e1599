"""Log densities, in nats, constants kept: each a function of one datapoint, summed over its axes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from infsub import linalg
from infsub.types import Array, Gaussian, Key, Number, Pixels, Scalar, Vector

LOG_2PI = math.log(2 * math.pi)


def standard_normal(z: Vector) -> Scalar:
    """log N(z; 0, I) = −D/2 log 2π − ‖z‖²/2, z [D] -> []."""
    return -0.5 * (jnp.sum(z**2) + z.size * LOG_2PI)


def normal(z: Vector, mean: Vector | Number, scale: Vector | Number) -> Scalar:
    """log N(z; mean, diag(scale²)), each [D], or one for all, -> []."""
    mean, scale = (_like(jnp.shape(z), a) for a in (mean, scale))
    return standard_normal((z - mean) / scale) - jnp.sum(jnp.log(scale))


def _like(shape: tuple[int, ...], value: Pixels | Number) -> Array:
    """`value` where it has this shape, or one for all; [D] against [D, 1] would be [D, D], and summed."""
    if jnp.size(value) == 1:  # such as a learnt scale
        value = jnp.reshape(value, ())
    if jnp.shape(value) not in (shape, ()):
        raise ValueError(
            f"a density of values of shape {shape} needs parameters of that shape, or one number; got "
            f"shape {jnp.shape(value)}: reshape them"
        )
    return jnp.broadcast_to(value, shape)


def gaussian(z: Vector, q: Gaussian) -> Scalar:
    """log q(z) = log N(z; mean, S Sᵀ), S = diag(scale) or the Cholesky factor, z [D] -> []."""
    if jnp.ndim(q.scale) < 2:
        return normal(z, q.mean, q.scale)
    return standard_normal(linalg.solve(q.scale, z - q.mean)) - log_volume(q)


def log_volume(q: Gaussian) -> Scalar:
    """log |det S| = ½ log det of q's covariance, [D] or [D, D] -> []."""
    diagonal = q.scale if jnp.ndim(q.scale) < 2 else jnp.diagonal(q.scale)
    return jnp.sum(jnp.log(diagonal))


def sample_gaussian(key: Key, q: Gaussian) -> tuple[Vector, Scalar]:
    """One draw z [D] of q and log q(z) []; the pathwise gradient flows through both."""
    noise = jax.random.normal(key, q.mean.shape, q.mean.dtype)
    if jnp.ndim(q.scale) < 2:
        z = q.mean + q.scale * noise
        return z, normal(z, q.mean, q.scale)
    # From the noise: to solve for it would cost a pass more, and digits.
    z = q.mean + jnp.tril(q.scale) @ noise
    return z, standard_normal(noise) - log_volume(q)


def check_gaussian(q: Gaussian) -> Gaussian:
    """q of arrays, or a ValueError: mean [D] with scale [D] or a Cholesky factor [D, D]."""
    q = Gaussian(jnp.asarray(q.mean), jnp.asarray(q.scale))
    mean, scale = q.mean.shape, q.scale.shape
    if len(mean) != 1 or scale not in (mean, mean * 2):
        raise ValueError(
            "q must have a mean [D] and a scale [D], or [D, D] for a lower Cholesky factor; got "
            f"shapes {mean} and {scale}"
        )
    return q


@jax.custom_jvp
def softplus(a: Pixels) -> Pixels:
    """log(1 + eᵃ), any shape: for likelihoods, whose gradients it makes cheap.

    The gradient of `jax.nn.softplus` takes its value, so that a log and an exp more of every pixel stay
    in every leapfrog step. Here it is σ(a). The value errs by 10⁻⁷, an ulp of 1, which is nothing in a
    sum of log densities; where tiny values are to be told apart, as in scales, take jax's.
    """
    # log1p costs twice as much on a CPU, and as exp(−|a|) ≤ 1 the plain log errs by an ulp of 1. With
    # a maximum for the where, XLA fuses all of it into the last matrix product: on one thread twice as long.
    return jnp.where(a < 0, 0, a) + jnp.log(1 + jnp.exp(-jnp.abs(a)))


@softplus.defjvp
def _softplus_jvp(primals, tangents):  # pyright: ignore
    (a,), (da,) = primals, tangents
    # The gradient alone needs no softplus: XLA drops the value when nobody reads it.
    return softplus(a), jax.nn.sigmoid(a) * da


def _flat(x: Any, *parameters: Pixels) -> list[Array]:
    """x and its parameters as [X], these of x's size in any shape, or one number for all."""
    x = jnp.ravel(x)
    return [x, *(_like(x.shape, jnp.ravel(a)) for a in parameters)]


def bernoulli_logits(x: Any, logits: Pixels) -> Scalar:
    """log p(x) = Σ x·l − log(1 + eˡ) for independent bits x in {0, 1} (or means in [0, 1]), any shape -> [].

    Its gradient in the logits is x − sigmoid(l), computed without forming the value.
    """
    # Flat: XLA vectorises no exp over a trailing axis of one channel, which costs a factor of 10.
    x, logits = _flat(x, logits)
    return jnp.sum(x * logits - softplus(logits))


def _bounded(log_scale: Pixels) -> Pixels:
    # e⁻⁷ is 1/4 of the narrowest bin (256 levels) and e⁷ is flat: no image needs more, and beyond
    # them float32's bin widths vanish and gradients explode (Salimans et al. 2017, PixelCNN++).
    return jnp.clip(log_scale, -7.0, 7.0)


def discretized_logistic(x: Any, mean: Pixels, log_scale: Pixels, num_levels: int) -> Scalar:
    """log P(x) of independent levels, a logistic in bins, any shape -> [] (PixelCNN++, §2.1).

    Level k of L lies at v = 2k/(L−1) − 1 and its bin is v ± 1/(L−1), open at k = 0 and k = L − 1:
    P(k) = σ(a) − σ(b), a, b = (v ± 1/(L−1) − mean) / s, s = exp(log_scale kept in [−7, 7]), as
    log P = log σ(a) + log σ(−b) + log(1 − exp(b − a)), in which nothing cancels.

    Args:
      x: levels 0 … L − 1.
      mean: of x's shape, on a scale where the levels run from −1 to 1.
      log_scale: of x's shape.
      num_levels: L, at least 2.
    """
    x, mean, log_scale = _flat(x, mean, log_scale)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))  # 2x + 1 of an image's bytes is none
    log_scale = _bounded(log_scale)
    inverse_scale = jnp.exp(-log_scale)
    # One formula of an integer, so a bin's upper edge is bit for bit the next one's lower.
    upper = ((2 * x + 1) / (num_levels - 1) - 1 - mean) * inverse_scale
    lower = ((2 * x - 1) / (num_levels - 1) - 1 - mean) * inverse_scale
    first, last = x <= 0, x >= num_levels - 1
    log_width = jnp.log(-jnp.expm1(-2 / (num_levels - 1) * inverse_scale))
    return jnp.sum(
        jnp.where(first | last, 0.0, log_width)
        - jnp.where(last, 0.0, softplus(-upper))
        - jnp.where(first, 0.0, softplus(lower))
    )


def sample_discretized_logistic(
    key: Key, mean: Pixels, log_scale: Pixels, num_levels: int
) -> Pixels:
    """A draw x of `discretized_logistic`: a logistic variate, rounded to the nearest level."""
    v = mean + jnp.exp(_bounded(log_scale)) * jax.random.logistic(key, mean.shape, mean.dtype)
    return jnp.clip(jnp.round((v + 1) / 2 * (num_levels - 1)), 0, num_levels - 1)
