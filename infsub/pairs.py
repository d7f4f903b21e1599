"""What one datapoint says of a model: scores, curvatures and ranks, on simulated pairs and on data.

Pure functions of ONE datapoint; `check` averages what they return over datapoints.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from infsub import bounds, densities
from infsub.samplers import as_sampler, draw
from infsub.types import Array, Gaussian, Key, LogDensity, Model, Params, Target

NUM_REPLICATES = 16  # R, x's for one z
NUM_RANKED = 50  # draws of q that the true z is ranked among
NUM_DRAWS = 16  # draws of q on data


class Marginals(NamedTuple):
    """Means [D] and standard deviations [D] of q's coordinates, of its draws if q is a sampler."""

    mean: Array
    scale: Array


class Pair(NamedTuple):
    """One z ~ p(z), R draws x ~ p(x|z), and q(z|x) of the first of them.

    Attributes:
      z: [D].
      x: the first of the R.
      varies: like x, each leaf []: whether the R differ there.
      score: [R, D], ∇_z log p(x|z).
      curvature: [R, D], unbiased estimates of the diagonal of −∇²_z log p(x|z).
      prior_score: [D], ∇ log p(z).
      prior_curvature: [D], as curvature, of log p(z).
      q: Marginals of q(z|x).
      below: [D], how many of q's K draws lie below z.
      log_likelihood: [], log p(x|z).
      log_likelihoods: [K], the same at q's draws.
      by_outputs: [], log p(x|z) by the model's outputs, where it says them.
    """

    z: Array
    x: Any
    varies: Any
    score: Array
    curvature: Array
    prior_score: Array
    prior_curvature: Array
    q: Marginals
    below: Array
    log_likelihood: Array
    log_likelihoods: Array
    by_outputs: Array


class OnData(NamedTuple):
    """One datapoint x, seen from K draws of q(z|x).

    Attributes:
      elbo: [], L[q].
      gradient: [D], E_q[∇ log p(x, z)].
      curvature: [D], E_q of the diagonal of −∇² log p(x|z), without bias.
      prior_curvature: [D], the same of log p(z).
      prior_square: [D], E_q[(∇ log p(z))²].
      q: Marginals of q(z|x).
      log_likelihood: [], log p(x|z) at a draw of q.
      by_outputs: [], the same by the model's outputs, where it says them.
    """

    elbo: Array
    gradient: Array
    curvature: Array
    prior_curvature: Array
    prior_square: Array
    q: Marginals
    log_likelihood: Array
    by_outputs: Array


def pair(key: Key, row: tuple[Any, Any], model: Model, params: Params) -> Pair:
    """A simulated pair; row is (index, x), the x that covariates are taken from, or None."""
    _, x_given = row
    key_z, key_x, key_probe, key_q = jax.random.split(key, 4)
    z = draw_prior(key_z, model, params, x_given)

    def replicate(key: Key) -> Any:
        return model.sample_x(key, params, z, x_given)  # pyright: ignore[reportOptionalCall]

    def likelihood(x: Any) -> LogDensity:
        target = model.target(params, x)
        return lambda z: bounds.log_likelihood(target, z)

    xs = jax.vmap(replicate)(jax.random.split(key_x, NUM_REPLICATES))
    x = jax.tree.map(lambda leaf: leaf[0], xs)
    probes = jax.random.rademacher(key_probe, (NUM_REPLICATES, z.size), z.dtype)
    score, curvature = jax.vmap(lambda x, v: derivatives(likelihood(x), z, v))(xs, probes)
    target = model.target(params, x)
    prior = derivatives(lambda z: bounds.log_prior(target, z), z, probes[0])
    q = model.encode(params, x)
    draws, _ = draws_of(key_q, q, model.latent_dim, NUM_RANKED)
    return Pair(
        z,
        x,
        jax.tree.map(lambda leaf: jnp.any(leaf != leaf[0]), xs),
        score,
        curvature,
        *prior,
        marginals(q, draws),
        jnp.sum(draws < z, axis=0),
        likelihood(x)(z),
        jax.vmap(likelihood(x))(draws),
        likelihood_by_outputs(target, z),
    )


def on_data(key: Key, x: Any, model: Model, params: Params) -> OnData:
    """What q(z|x) and p(x, z) say of each other at one datapoint."""
    key_q, key_probe = jax.random.split(key)
    target, q = model.target(params, x), model.encode(params, x)
    draws, log_q = draws_of(key_q, q, model.latent_dim, NUM_DRAWS)
    probes = jax.random.rademacher(key_probe, draws.shape, draws.dtype)

    def at_draws(density: LogDensity) -> tuple[Array, Array, Array]:
        score, curvature = jax.vmap(lambda z, v: derivatives(density, z, v))(draws, probes)
        return jax.vmap(density)(draws), score, jnp.mean(curvature, axis=0)

    log_prior, prior_score, prior_curvature = at_draws(lambda z: bounds.log_prior(target, z))
    log_px_given, score, curvature = at_draws(lambda z: bounds.log_likelihood(target, z))
    return OnData(
        jnp.mean(log_px_given + log_prior - log_q),
        jnp.mean(score + prior_score, axis=0),
        curvature,
        prior_curvature,
        jnp.mean(prior_score**2, axis=0),
        marginals(q, draws),
        log_px_given[0],
        likelihood_by_outputs(target, draws[0]),
    )


def likelihood_by_outputs(target: Target, z: Array) -> Array:
    """log p(x|z) by what `laplace` takes the curvature of, z [D] -> []."""
    outputs = z if target.outputs is None else target.outputs(z)
    return bounds.log_likelihood_of_outputs(target, outputs)


def encode_twice(key: Key, x: Any, model: Model, params: Params) -> tuple[Array, Array]:
    """encode(params, x), flat, as two calls give it: [2, M]; and what must be positive in it, [D].

    A generator of random numbers that lives in Python moves on between the calls, for jit traces the
    one after the other. Of a sampler: its draw and log_q, and NaN for a scale.
    """

    def encoded() -> tuple[Array, Array]:
        q = model.encode(params, x)
        if isinstance(q, Gaussian):
            q = densities.check_gaussian(q)
            scale = q.scale if q.scale.ndim < 2 else jnp.diagonal(q.scale)
            return ravel_pytree(q)[0], scale
        return ravel_pytree(as_sampler(q)(key))[0], jnp.full(model.latent_dim, jnp.nan)

    (first, scale), (second, _) = encoded(), encoded()
    return jnp.stack([first, second]), scale


def simulation_lacks(model: Model) -> str:
    """What keeps the model from simulating pairs, in words; "" if nothing does."""
    if model.sample_x is None:
        return "without sample_x"
    if model.log_prior is not None and model.sample_prior is None:
        return "with a log_prior but without sample_prior"
    return ""


def draw_prior(key: Key, model: Model, params: Params, x: Any) -> Array:
    """z ~ p(z), [D]."""
    if model.sample_prior is None:
        return jax.random.normal(key, (model.latent_dim,))
    return model.sample_prior(key, params, x)


def derivatives(density: LogDensity, z: Array, probe: Array) -> tuple[Array, Array]:
    """∇ log p [D], and v ∘ (−∇² log p) v [D]: for signs v at random the mean is the diagonal.

    (Bekas, Kokiopoulou & Saad 2007, Applied Numerical Mathematics 57.)
    """
    score, product = jax.jvp(jax.grad(density), (z,), (probe,))
    return score, -probe * product


def draws_of(key: Key, q: Any, latent_dim: int, num_draws: int) -> tuple[Array, Array]:
    """K draws of q and their log q, ([K, D], [K]); a ValueError where z has another shape."""
    sampler = as_sampler(q)
    return jax.vmap(lambda key: draw(sampler, key, latent_dim))(jax.random.split(key, num_draws))


def marginals(q: Any, draws: Array) -> Marginals:
    """Means and standard deviations of q's coordinates, [D] each."""
    if not isinstance(q, Gaussian):
        return Marginals(jnp.mean(draws, axis=0), jnp.std(draws, axis=0, ddof=1))
    q = densities.check_gaussian(q)
    if q.scale.ndim < 2:
        return Marginals(q.mean, q.scale)
    return Marginals(q.mean, jnp.linalg.norm(jnp.tril(q.scale), axis=1))
