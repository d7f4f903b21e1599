"""Bounds on log p(x) from above: reverse AIS and bidirectional Monte Carlo (Grosse et al. 2015).

Simulated data come with an exact posterior sample: the z they were made from. Running the annealing
backwards from it gives a stochastic upper bound, and with AIS a certificate of how far off AIS is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from infsub.ais import (
    Annealing,
    Plan,
    anneal,
    checked_plan,
    forward,
    from_z,
    frozen,
    prepare,
)
from infsub.bounds import log_mean_exp
from infsub.samplers import promoted
from infsub.types import Array, Estimate, Gaussian, Key, Target


class BDMC(NamedTuple):
    """A two-sided bound on log p(x) of one simulated datapoint.

    Attributes:
      lower: Estimate from forward AIS.
      upper: Estimate from reverse AIS; its chains share one exact start, so its standard error is
        conditional on that start: average over datapoints for one that is not.
      gap: [], upper − lower in nats; its mean over datapoints bounds the bias of AIS.
      standard_error: [], of the gap.
    """

    lower: Estimate
    upper: Estimate
    gap: Array
    standard_error: Array


def reverse(key: Key, annealing: Annealing, z: Array, plan: Plan) -> Estimate:
    """The kernels of `ais.forward` from p(x, z) down to the base, chains starting at z [D]."""
    z = promoted(z, annealing.base)
    z = jnp.broadcast_to(from_z(annealing.frame, z), (plan.num_chains, *z.shape))
    tuner = frozen(annealing.step_sizes)
    log_weights, info, _ = anneal(key, annealing, z, tuner, plan.num_leapfrog, reverse=True)
    inverse = log_mean_exp(-log_weights)._replace(acceptance=jnp.mean(info.acceptance))
    return inverse._replace(log_px=-inverse.log_px, log_weights=log_weights)


@jax.jit
def _reverse_ais(key: Key, target: Target, z: Array, q: Gaussian | None, plan: Plan) -> Estimate:
    key_pilot, key_run = jax.random.split(key)
    return reverse(key_run, prepare(key_pilot, target, q, plan), z, plan)


def reverse_ais(
    key: Key,
    target: Target,
    z: Array,
    q: Gaussian | None = None,
    num_chains: int = 16,
    num_temperatures: int = 100,
    num_leapfrog: int = 10,
    schedule: str | Array = "linear",
    *,
    step_size: float | Array | None = None,
) -> Estimate:
    """Stochastic UPPER bound on log p(x) from an exact posterior sample z; E[exp −log_weights] = 1/p(x).

    The exact reversal of `ais`: the same frozen kernels from β = 1 down to q (Grosse et al. 2015).
    Simulated data come with such a z: draw z ~ p(z), then x ~ p(x|z).

    Args:
      key: of this datapoint.
      target: p(z) p(x|z) for one x.
      z: [D], an exact sample of p(z|x).
      q, num_chains, num_temperatures, num_leapfrog, schedule, step_size: as in `ais`.

    Returns:
      Estimate in nats: log_px = −log mean exp(−log_weights).

    Raises:
      ValueError, TypeError: an argument that cannot be; the message names it.

    Example:
      >>> z, noise = jax.random.normal(jax.random.key(1), (2, 1))
      >>> target = infsub.Target(None, lambda z_: norm.logpdf(x, z_).sum(), latent_dim=1)
      >>> x = z + noise  # simulated, so that z is a sample of p(z|x)
      >>> upper = infsub.reverse_ais(jax.random.key(0), target, z).log_px
      >>> print(bool(abs(upper - norm.logpdf(x, 0, 2**0.5).sum()) < 0.1))
      True
    """
    _check_sample(z, target)
    plan = checked_plan(q, num_chains, num_temperatures, num_leapfrog, schedule, step_size)
    return _reverse_ais(key, target, z, q, plan)


def _check_sample(z: Array, target: Target) -> None:
    if jnp.shape(z) != (target.latent_dim,):
        raise ValueError(
            f"z must be an exact posterior sample [D={target.latent_dim}]; got shape {jnp.shape(z)}"
        )


@jax.jit
def _bdmc(key: Key, target: Target, z: Array, q: Gaussian | None, plan: Plan) -> BDMC:
    key_pilot, key_forward, key_reverse = jax.random.split(key, 3)
    annealing = prepare(key_pilot, target, q, plan)
    lower, _ = forward(key_forward, annealing, plan)
    upper = reverse(key_reverse, annealing, z, plan)
    error = jnp.hypot(lower.standard_error, upper.standard_error)
    return BDMC(lower, upper, upper.log_px - lower.log_px, error)


def bdmc(
    key: Key,
    simulate: Callable[[Key], tuple[Array, Target, Gaussian | None]],
    num_chains: int = 16,
    num_temperatures: int = 100,
    num_leapfrog: int = 10,
    schedule: str | Array = "linear",
    *,
    step_size: float | Array | None = None,
) -> BDMC:
    """Bidirectional Monte Carlo on one datapoint that the model itself simulates (Grosse et al. 2015).

    Both directions share the frozen step sizes of one pilot. On simulated data the true log p(x) lies
    between the means of lower and upper, so the mean gap bounds how far off AIS is.

    Args:
      key: of this datapoint.
      simulate: key -> (z [D], Target, q): draws z ~ p(z) and x ~ p(x|z), and gives the target of that x
        and the Gaussian to start from (None: the prior).
      num_chains, num_temperatures, num_leapfrog, schedule, step_size: as in `ais`.

    Returns:
      BDMC(lower, upper, gap [], standard_error []) in nats.

    Raises:
      ValueError, TypeError: an argument that cannot be; the message names it.

    Example:
      >>> def simulate(key):
      ...     z, noise = jax.random.normal(key, (2, 1))
      ...     log_likelihood = jax.tree_util.Partial(lambda x, z: norm.logpdf(x, z).sum(), z + noise)
      ...     return z, infsub.Target(None, log_likelihood, latent_dim=1), None
      >>> print(bool(abs(infsub.bdmc(jax.random.key(0), simulate).gap) < 0.2))
      True
    """
    if not callable(simulate):
        raise TypeError(
            "simulate must be a function key -> (z [D], Target, q), which simulates a datapoint; got "
            f"{type(simulate).__name__}: infsub.measure(…, num_certified=N) certifies a Model"
        )
    key_model, key = jax.random.split(key)
    z, target, q = simulate(key_model)
    _check_sample(z, target)
    plan = checked_plan(q, num_chains, num_temperatures, num_leapfrog, schedule, step_size)
    return _bdmc(key, target, z, q, plan)
