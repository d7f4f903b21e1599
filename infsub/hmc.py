"""Hamiltonian Monte Carlo on a geometric path π_β(z) ∝ base(z) · ratio(z)^β: one chain, one step.

The state keeps log base, log ratio and their gradients SEPARATELY, so a change of β costs nothing
and never meets a stale value. Neal 2011, "MCMC using Hamiltonian dynamics".
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from infsub.types import Array, Key, Number, Scalar, Vector


class Path(NamedTuple):
    """π_β(z) ∝ exp(log_base(z) + β log_ratio(z)).

    Attributes:
      log_base: z [D] -> [], normalised; the prior or any q.
      log_ratio: z [D] -> [], log p(x, z) − log_base(z); the log likelihood where the base is the prior.
    """

    log_base: Partial
    log_ratio: Partial


class HMCState(NamedTuple):
    """A chain at z, with all that any β needs to know of it.

    Attributes:
      z: [D].
      log_base: [].
      log_ratio: [].
      grad_base: [D], ∇ log_base(z).
      grad_ratio: [D], ∇ log_ratio(z).
    """

    z: Array
    log_base: Array
    log_ratio: Array
    grad_base: Array
    grad_ratio: Array

    def log_density(self, beta: Number) -> Scalar:
        """log π_β(z) up to its normaliser, []."""
        return self.log_base + beta * self.log_ratio


class HMCInfo(NamedTuple):
    """What one may look at of a step.

    Attributes:
      acceptance: [], min(1, exp(−energy error)), the probability the proposal had.
      accepted: [], bool.
      energy_error: [], H(proposal) − H(start) in nats; +inf where the proposal is not finite.
    """

    acceptance: Array
    accepted: Array
    energy_error: Array


def init(path: Path, z: Vector) -> HMCState:
    """The state of a chain that stands at z [D]."""
    log_base, grad_base = jax.value_and_grad(path.log_base)(z)
    log_ratio, grad_ratio = jax.value_and_grad(path.log_ratio)(z)
    return HMCState(z, log_base, log_ratio, grad_base, grad_ratio)


def trajectory(
    state: HMCState,
    momentum: Vector,
    path: Path,
    beta: Number,
    step_size: Number,
    scale: Vector,
    num_leapfrog: int,
) -> tuple[HMCState, Vector]:
    """`num_leapfrog` leapfrog steps of H(z, v) = −log π_β(z) + ‖v‖²/2 with mass diag(scale⁻²).

    v ← v + ε/2 s∘∇log π_β(z);  z ← z + ε s∘v;  v ← v + ε/2 s∘∇log π_β(z), whitened by s = scale.
    The first half kick uses the gradient the state carries, so L steps take L evaluations; only
    the last one needs the densities' values.

    Args:
      state: at the trajectory's start.
      momentum: v [D].
      path: the densities.
      beta: [].
      step_size: ε [], in units of `scale`.
      scale: s [D].
      num_leapfrog: L ≥ 1.

    Returns:
      The state and the momentum [D] at the trajectory's end.
    """

    def force(z):
        return jax.grad(lambda z: path.log_base(z) + beta * path.log_ratio(z))(z)

    def drift_and_kick(_, carry):
        z, v = carry
        z = z + step * v
        return z, v + step * force(z)

    step = step_size * scale
    v = momentum + 0.5 * step * (state.grad_base + beta * state.grad_ratio)
    z, v = jax.lax.fori_loop(0, num_leapfrog - 1, drift_and_kick, (state.z, v))
    end = init(path, z + step * v)
    return end, v + 0.5 * step * (end.grad_base + beta * end.grad_ratio)


def step(
    key: Key,
    state: HMCState,
    path: Path,
    beta: Number,
    step_size: Number,
    scale: Vector,
    num_leapfrog: int,
) -> tuple[HMCState, HMCInfo]:
    """One HMC transition that leaves π_β invariant and is reversible with respect to it.

    A proposal whose energy or gradient is not finite is rejected; one from where the density is 0 to
    where it is not is accepted. Arguments as in `trajectory`.
    """
    key_momentum, key_accept = jax.random.split(key)
    momentum = jax.random.normal(key_momentum, state.z.shape, state.z.dtype)
    end, end_momentum = trajectory(state, momentum, path, beta, step_size, scale, num_leapfrog)
    kinetic = 0.5 * (jnp.sum(end_momentum**2) - jnp.sum(momentum**2))
    log_density = end.log_density(beta)
    energy_error = kinetic - (log_density - state.log_density(beta))
    finite = jnp.isfinite(log_density) & jnp.all(jnp.isfinite(end_momentum))
    energy_error = jnp.where(finite & (energy_error < jnp.inf), energy_error, jnp.inf)
    uniform = jax.random.uniform(key_accept, dtype=state.z.dtype)
    accepted = jnp.log(uniform) < -energy_error
    # A select, never a product: NaN · 0 is NaN.
    state = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), end, state)
    return state, HMCInfo(jnp.exp(-jnp.maximum(energy_error, 0)), accepted, energy_error)
