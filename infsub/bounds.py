"""Bounds on log p(x) from independent samples of q: ELBO and IWAE."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from infsub import densities
from infsub.samplers import T, as_sampler, check_digits, draw, promoted
from infsub.types import (
    Estimate,
    Gaussian,
    Key,
    Sampler,
    Samples,
    Scalar,
    Target,
    Vector,
    positive_int,
)

_MAX_TAIL = 512
_FLOAT_SPAN = 80.0  # nats that weights in float32 span
_MAX_SPAN = 1e3  # nats that a tail is taken to span at most: weights may be 0


def checked(name: str, log_density: Callable[[Any], Scalar], z: Any) -> Scalar:
    """log_density(z), or a TypeError when it is no scalar of float32's digits; z [D], or outputs of it."""
    value = log_density(z)
    if jnp.shape(value) != ():
        raise TypeError(
            f"{name} must return a scalar, the log density of one z; it returned "
            f"shape {jnp.shape(value)}: sum over the axes of x"
        )
    check_digits(name, value)
    return value


def log_prior(target: Target, z: Vector) -> Scalar:
    """log p(z), z [D] -> []."""
    density = target.log_prior or densities.standard_normal
    return checked("log_prior", density, z)


def log_likelihood(target: Target, z: Vector) -> Scalar:
    """log p(x|z), z [D] -> []."""
    return checked("log_likelihood", target.log_likelihood, z)


def log_likelihood_of_outputs(target: Target, outputs: Any) -> Scalar:
    """log p(x|z) by what the target's `outputs` make of z; log_likelihood itself of z, without them."""
    if target.log_likelihood_of_outputs is None:
        return log_likelihood(target, outputs)
    return checked("log_likelihood_of_outputs", target.log_likelihood_of_outputs, outputs)


def log_joint(target: Target, z: Vector) -> Scalar:
    """log p(x, z) = log p(z) + log p(x|z), z [D] -> []."""
    return log_prior(target, z) + log_likelihood(target, z)


def as_wide_as(target: Target, values: T) -> T:
    """`values`, a z or a Gaussian, of the type that log p(x, z) has at them; float32 at least."""
    values = promoted(values)
    z = jax.ShapeDtypeStruct((target.latent_dim,), jax.tree.leaves(values)[0].dtype)
    return promoted(values, jax.eval_shape(log_joint, target, z))


def log_weight(key: Key, target: Target, q: Sampler) -> Scalar:
    """log w = log p(x, z) − log q(z) at one draw z of q, key -> []; E[w] = p(x)."""
    z, log_q = draw(q, key, target.latent_dim)
    return log_joint(target, z) - log_q


def elbo(key: Key, target: Target, q: Gaussian | Sampler | Any, num_samples: int = 100) -> Estimate:
    """Evidence lower bound L[q] = E_q[log p(x, z) − log q(z)] (Kingma & Welling 2014, eq. 3).

    Args:
      key: of this datapoint.
      target: p(z) p(x|z) for one x.
      q: Gaussian(mean [D], scale [D] or [D, D]), a sampler key -> (z [D], log_q []), or a distribution.
      num_samples: K.

    Returns:
      Estimate of L[q] in nats; its standard error is the samples' standard deviation / √K.

    Raises:
      ValueError: num_samples < 1, or q's shape is not the target's.
      TypeError: q is none of these, or a density returns no scalar of float32's digits.

    Example:
      >>> target = infsub.Target(None, lambda z: norm.logpdf(1.0, z).sum(), latent_dim=1)  # x = 1
      >>> q = infsub.Gaussian(jnp.full(1, 0.5), jnp.full(1, 0.5**0.5))  # the posterior itself
      >>> print(f"{infsub.elbo(jax.random.key(0), target, q).log_px:.2f}")  # log N(1; 0, 2)
      -1.52
    """
    return _elbo(key, target, as_sampler(q), positive_int("num_samples", num_samples))


@partial(jax.jit, static_argnames="num_samples")
def _elbo(key: Key, target: Target, q: Partial, num_samples: int) -> Estimate:
    weight = partial(log_weight, target=target, q=q)
    log_weights = jax.vmap(weight)(jax.random.split(key, num_samples))
    nan = jnp.full((), jnp.nan, log_weights.dtype)
    error = jnp.std(log_weights, ddof=1) / math.sqrt(num_samples) if num_samples > 1 else nan
    return Estimate(jnp.mean(log_weights), error, nan, nan, log_weights, nan)


def log_sum_exp(log_weights: Samples) -> Scalar:
    """log Σ exp, [K] -> [], NaN if any of them is: XLA's vectorised exp on a CPU loses NaN."""
    total = jax.nn.logsumexp(log_weights)
    return jnp.where(jnp.any(jnp.isnan(log_weights)), jnp.nan, total)


def log_mean_exp(log_weights: Samples) -> Estimate:
    """log of the mean weight, log (1/K) Σ w, log_weights [K] -> Estimate.

    The standard error is the delta method's, sd(w) / (√K mean(w)), which is a function of the
    effective sample size (Σw)² / Σw²; NaN for K = 1.
    """
    (num_samples,) = log_weights.shape
    # Relative to the largest, so that the error of alike weights is not that of rounding log p(x).
    largest = jax.lax.stop_gradient(jnp.max(log_weights))
    shift = jnp.where(jnp.isfinite(largest), largest, 0)
    relative = log_weights - shift
    total, total_squares = log_sum_exp(relative), log_sum_exp(2 * relative)
    estimate = _estimate(total, total_squares, num_samples, log_weights)
    return estimate._replace(log_px=estimate.log_px + shift)


def _estimate(
    total: Scalar, total_squares: Scalar, num_samples: int, log_weights: Samples
) -> Estimate:
    ess = jnp.exp(2 * total - total_squares)
    nan = jnp.full((), jnp.nan, total.dtype)
    error = nan
    if num_samples > 1:
        relative_variance = (
            jnp.maximum(1 / ess - 1 / num_samples, 0) * num_samples / (num_samples - 1)
        )
        error = jnp.sqrt(relative_variance)
    return Estimate(total - math.log(num_samples), error, ess, nan, log_weights, nan)


def iwae(
    key: Key,
    target: Target,
    q: Gaussian | Sampler | Any,
    num_samples: int = 5000,
    *,
    chunk_size: int = 500,
) -> Estimate:
    """Importance-weighted bound log (1/K) Σ_k p(x, z_k) / q(z_k) (Burda et al. 2016, eq. 8).

    Samples are drawn and forgotten chunk by chunk, so memory does not grow with K; sample k uses
    fold_in(key, k), so the chunks do not change the draws.

    Args:
      key: of this datapoint.
      target: p(z) p(x|z) for one x.
      q: Gaussian(mean [D], scale [D] or [D, D]), a sampler key -> (z [D], log_q []), or a distribution.
      num_samples: K.
      chunk_size: samples at a time.

    Returns:
      Estimate in nats, `log_weights` not kept. `pareto_k` above 0.7 says that the largest weights
      have a tail too heavy for the estimate and its standard error to be believed.

    Raises:
      ValueError: num_samples or chunk_size < 1, or q's shape is not the target's.
      TypeError: q is none of these, or a density returns no scalar of float32's digits.

    Example:
      >>> target = infsub.Target(None, lambda z: norm.logpdf(1.0, z).sum(), latent_dim=1)  # x = 1
      >>> q = infsub.Gaussian(jnp.zeros(1), jnp.ones(1))
      >>> estimate = infsub.iwae(jax.random.key(0), target, q)
      >>> print(f"{estimate.log_px:.1f}", bool(estimate.pareto_k < 0.7))  # log N(1; 0, 2)
      -1.5 True
    """
    num_samples = positive_int("num_samples", num_samples)
    return _iwae(key, target, as_sampler(q), num_samples, positive_int("chunk_size", chunk_size))


@partial(jax.jit, static_argnames=("num_samples", "chunk_size"))
def _iwae(key: Key, target: Target, q: Partial, num_samples: int, chunk_size: int) -> Estimate:
    num_chunks = -(-num_samples // chunk_size)
    chunk_size = -(-num_samples // num_chunks)
    tail_size = _tail_size(num_samples)
    weight = partial(log_weight, target=target, q=q)

    def chunk(carry, start):
        total, total_squares, tail = carry
        index = start + jnp.arange(chunk_size)
        log_weights = jax.vmap(lambda k: weight(jax.random.fold_in(key, k)))(index)
        log_weights = jnp.where(index < num_samples, log_weights, -jnp.inf)
        total = jnp.logaddexp(total, log_sum_exp(log_weights))
        total_squares = jnp.logaddexp(total_squares, log_sum_exp(2 * log_weights))
        tail, _ = jax.lax.top_k(jnp.concatenate([tail, log_weights]), tail_size + 1)
        return (total, total_squares, tail), None

    dtype = jax.eval_shape(weight, key).dtype
    nothing = jnp.full((), -jnp.inf, dtype)
    carry = (nothing, nothing, jnp.full(tail_size + 1, -jnp.inf, dtype))
    starts = chunk_size * jnp.arange(num_chunks)
    (total, total_squares, tail), _ = jax.lax.scan(chunk, carry, starts)
    estimate = _estimate(total, total_squares, num_samples, jnp.full(1, jnp.nan, dtype))
    return estimate._replace(pareto_k=pareto_k(tail) if tail_size >= 5 else estimate.pareto_k)


def _tail_size(num_samples: int) -> int:
    return min(math.ceil(min(0.2 * num_samples, 3 * math.sqrt(num_samples))), _MAX_TAIL)


def pareto_k(tail: Samples) -> Scalar:
    """Shape k of a generalised Pareto fitted to the largest weights, tail [M+1] descending -> [].

    The smallest of the tail is the threshold the M others exceed. Where a quarter equals it nothing can be
    fitted: k is at least 1 where the others together outweigh a tail of such, and so rule, else −inf.
    Zhang & Stephens' (2009) estimator with the prior of Vehtari et al. 2024, arXiv 1507.02646, app. G;
    where the tail spans more than float32 does, Hill's (1975), the mean of log weight/threshold.
    """
    size = tail.size - 1
    weights = jnp.exp(tail - tail[0])[::-1]
    excess = weights[1:] - weights[0]  # ascending, [M]
    num_grid = 30 + math.isqrt(size)
    rank = math.floor(size / 4 + 0.5) - 1
    quartile = excess[rank]
    grid = jnp.arange(1, num_grid + 1) - 0.5
    theta = 1 / excess[-1] + (1 - jnp.sqrt(num_grid / grid)) / (3 * quartile)
    shape = jnp.mean(jnp.log1p(-theta[:, None] * excess), axis=1)
    profile = size * (jnp.log(-theta / shape) - shape - 1)
    theta = jnp.sum(jax.nn.softmax(profile) * theta)
    shape = jnp.mean(jnp.log1p(-theta * excess))
    k = (shape * size + 0.5 * 10) / (size + 10)
    spans = tail[0] - jnp.maximum(tail, tail[0] - _MAX_SPAN)  # a weight of 0 spans as much
    hill = spans[-1] - jnp.mean(spans[:-1])
    wide = spans[size - 1 - rank] > _FLOAT_SPAN
    k = jnp.where(wide, hill, k)
    tied = jnp.where(wide, tail[size - 1 - rank] == tail[-1], quartile == 0)  # to rounding
    few_rule = jnp.sum(excess) > size * weights[0]
    return jnp.where(tied, jnp.where(few_rule, jnp.maximum(hill, 1), -jnp.inf), k)
