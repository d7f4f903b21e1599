"""Annealed importance sampling with HMC transitions (Neal 2001; Wu et al. 2017).

A pilot run, with a key of its own, finds the step sizes (and, if asked, the schedule); the
measuring run keeps them frozen. So its kernels leave π_β invariant and E[w] = p(x) exactly.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from infsub import densities, hmc, linalg
from infsub.bounds import as_wide_as, log_joint, log_likelihood, log_mean_exp
from infsub.samplers import as_sampler
from infsub.schedules import equal_distances, schedule_betas, smooth
from infsub.types import Array, Estimate, Gaussian, Key, Target, positive_int

ADAPTATIONS = ("pilot", "authors")

TARGET_ACCEPTANCE = 0.8  # of the pilot
# Each transition draws its step size from [0.3, 1] times the frozen one. A trajectory of fixed
# length comes back to its start wherever it is a period of the (near Gaussian) target: on a trained
# decoder, T = 100, the BDMC gap falls from 0.09 ± 0.04 to 0.00 ± 0.02 nats.
JITTER = 0.3
_PILOT_CHAINS, _PILOT_TEMPERATURES, _PILOT_SHARE = 8, 25, 1 / 8
_FIRST_STEP_SIZE = 0.3  # whitened, so O(1) in every model


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["betas", "step_size"],
    meta_fields=["num_chains", "num_leapfrog", "adaptation", "adaptive_schedule"],
)
@dataclass(frozen=True)
class Plan:
    """How a run is made, all arguments of `ais` but key, target and q; what is no array is static.

    Attributes:
      betas: [T+1].
      step_size: [] or [T].
      num_chains: K.
      num_leapfrog: L.
      adaptation: "pilot", "authors", or "none" where the step sizes were given.
      adaptive_schedule: whether the pilot chooses the betas too.
    """

    betas: Array
    step_size: Array
    num_chains: int
    num_leapfrog: int
    adaptation: str
    adaptive_schedule: bool


class Annealing(NamedTuple):
    """All that is frozen before a measuring run: nothing in it depends on that run's chains.

    Attributes:
      path: from base to p(x, z), in the coordinates that the chains move in.
      base: the factorised Gaussian that the forward chains start from, in those coordinates.
      frame: where q is of full covariance the chains move in its noise u, z = mean + scale · u,
        which is HMC with the mass matrix (scale scaleᵀ)⁻¹; None where they move in z itself.
      betas: [T+1].
      step_sizes: [T], of the transition at β_1 … β_T, in units of base.scale.
    """

    path: hmc.Path
    base: Gaussian
    frame: Gaussian | None
    betas: Array
    step_sizes: Array


class AISInfo(NamedTuple):
    """What one may look at of a run.

    Attributes:
      acceptance: [T], mean over chains, by temperature.
      step_sizes: [T], mean over chains.
      betas: [T+1].
      non_finite: [], proposals rejected because their energy was not finite, of K·T.
      z: [K, D], where the chains ended.
    """

    acceptance: Array
    step_sizes: Array
    betas: Array
    non_finite: Array
    z: Array


def _log_ratio(target: Target, log_base: Partial, z: Array) -> Array:
    return log_joint(target, z) - log_base(z)


def _framed_log_ratio(target: Target, frame: Gaussian, u: Array) -> Array:
    log_joint_of_u = log_joint(target, to_z(frame, u)) + densities.log_volume(frame)
    return log_joint_of_u - densities.standard_normal(u)


def to_z(frame: Gaussian | None, u: Array) -> Array:
    """z [D] of a chain at u [D] in the frame."""
    return u if frame is None else frame.mean + frame.scale @ u


def from_z(frame: Gaussian | None, z: Array) -> Array:
    """u [D] in the frame of z [D]."""
    return z if frame is None else linalg.solve(frame.scale, z - frame.mean)


def geometric_path(
    target: Target, q: Gaussian | None
) -> tuple[hmc.Path, Gaussian, Gaussian | None]:
    """π_β ∝ q^{1−β} p(x, z)^β, its base and its frame, as in `Annealing`; None starts at N(0, I).

    They are of q's type, or of log p(x, z)'s where that is wider.

    Raises:
      ValueError: q is None but the target has a prior of its own, or the shapes don't match.
    """
    dim = target.latent_dim
    standard = Gaussian(jnp.zeros(dim), jnp.ones(dim))
    if q is None:
        if target.log_prior is not None:
            raise ValueError(
                "q=None starts at N(0, I), but this target has its own log_prior: give q, a "
                "Gaussian to start from"
            )
        log_likelihood_of_z = Partial(log_likelihood, target)
        return hmc.Path(Partial(densities.standard_normal), log_likelihood_of_z), standard, None
    q = Gaussian(jnp.asarray(q.mean), jnp.asarray(q.scale))
    mean, scale = q.mean.shape, q.scale.shape
    if mean != (dim,) or scale not in (mean, mean * 2):
        raise ValueError(
            f"q must have mean and scale of shape [{dim}], the target's latent_dim (a Cholesky "
            f"factor is [{dim}, {dim}]); got {mean} and {scale}"
        )
    q = as_wide_as(target, q)
    if len(scale) == 1:
        log_base = Partial(densities.normal, mean=q.mean, scale=q.scale)
        return hmc.Path(log_base, Partial(_log_ratio, target, log_base)), q, None
    frame = q._replace(scale=jnp.tril(q.scale))
    log_ratio = Partial(_framed_log_ratio, target, frame)
    standard = jax.tree.map(lambda a: a.astype(q.mean.dtype), standard)
    return hmc.Path(Partial(densities.standard_normal), log_ratio), standard, frame


class Tuner(NamedTuple):
    """How a run finds its step sizes.

    Attributes:
      state: any pytree.
      step_size: (state, t) -> [] or [K].
      update: (state, info, t) -> state.
    """

    state: Any
    step_size: Callable[[Any, Array], Array]
    update: Callable[[Any, hmc.HMCInfo, Array], Any]


def frozen(step_sizes: Array) -> Tuner:
    """The measuring run's: step sizes [T] given beforehand, which nothing changes."""
    return Tuner((), lambda _, t: step_sizes[t], lambda state, info, t: state)


def _pooled(num_temperatures: int, dtype: jnp.dtype) -> Tuner:
    """The pilot's: one step size for all chains of a datapoint, towards the target acceptance."""
    # A short pilot must move faster, up to Newton's factor: energy errors grow as ε², so the
    # acceptance 2Φ(−c ε²) has the slope −0.4 in log ε where it is 0.8.
    factor = min(math.sqrt(_PILOT_TEMPERATURES / num_temperatures), 2.5)

    def update(log_step, info, _):
        return log_step + factor * (jnp.mean(info.acceptance) - TARGET_ACCEPTANCE)

    log_step = jnp.log(jnp.asarray(_FIRST_STEP_SIZE, dtype))
    return Tuner(log_step, lambda log_step, _: jnp.exp(log_step), update)


def _authors(num_chains: int, dtype: jnp.dtype) -> Tuner:
    """The paper's code: a chain's step size grows by 1.02 while its acceptance is above 0.65."""

    def update(state, info, t):
        step_size, accepted = state
        accepted = accepted + info.accepted
        factor = jnp.where(accepted / (t + 1) > 0.65, 1.02, 0.98).astype(dtype)
        return jnp.clip(step_size * factor, 1e-4, 0.5), accepted

    state = jnp.full(num_chains, 0.01, dtype), jnp.zeros(num_chains, dtype)
    return Tuner(state, lambda state, _: state[0], update)


def anneal(
    key: Key,
    annealing: Annealing,
    z: Array,
    tuner: Tuner,
    num_leapfrog: int,
    *,
    reverse: bool = False,
    jitter: float = JITTER,
) -> tuple[Array, AISInfo, Array]:
    """T transitions of K chains that start at z [K, D], in the annealing's coordinates.

    Forward, z_t ~ K_{β_t}(· | z_{t−1}) and log w = Σ (β_t − β_{t−1}) log_ratio(z_{t−1}) (Neal 2001,
    eq. 11); reverse runs the same kernels from β_T down to β_1 and sums the same terms.

    Returns:
      log_weights [K], the AISInfo, and the chains' standard deviation of log_ratio [T].
    """
    path, base, betas = annealing.path, annealing.base, annealing.betas

    def transition(key, state, beta, step_size):
        key_jitter, key_step = jax.random.split(key)
        low = jnp.asarray(jitter, step_size.dtype)
        step_size = step_size * jax.random.uniform(key_jitter, (), step_size.dtype, low, 1)
        return hmc.step(key_step, state, path, beta, step_size, base.scale, num_leapfrog)

    def body(carry, t):
        states, log_weights, tuning = carry
        step_size = jnp.broadcast_to(tuner.step_size(tuning, t), log_weights.shape)
        keys = jax.random.split(jax.random.fold_in(key, t), log_weights.size)
        next_states, infos = jax.vmap(transition, (0, 0, None, 0))(
            keys, states, betas[t + 1], step_size
        )
        at = next_states if reverse else states
        log_weights = log_weights + (betas[t + 1] - betas[t]) * at.log_ratio
        at_this_temperature = (
            jnp.mean(infos.acceptance),
            jnp.mean(step_size),
            jnp.sum(infos.energy_error == jnp.inf),
            jnp.std(next_states.log_ratio),
        )
        return (next_states, log_weights, tuner.update(tuning, infos, t)), at_this_temperature

    states = jax.vmap(partial(hmc.init, path))(z)
    carry = states, jnp.zeros(z.shape[0], z.dtype), tuner.state
    temperatures = jnp.arange(betas.size - 1)
    carry, by_temperature = jax.lax.scan(body, carry, temperatures, reverse=reverse)
    states, log_weights, _ = carry
    acceptance, step_sizes, non_finite, deviations = by_temperature
    info = AISInfo(acceptance, step_sizes, betas, jnp.sum(non_finite), states.z)
    return log_weights, info, deviations


def start_chains(key: Key, base: Gaussian, num_chains: int) -> Array:
    """K independent draws of the base, z [K, D]."""
    keys = jax.random.split(key, num_chains)
    return jax.vmap(lambda key: densities.sample_gaussian(key, base)[0])(keys)


def pilot_size(num_chains: int, num_temperatures: int) -> tuple[int, int]:
    """Chains and temperatures of the pilot: an eighth of the run's transitions, at most 8 × 25.

    At least two chains over half the temperatures, which in a run of few chains is more.
    """
    temperatures = min(_PILOT_TEMPERATURES, math.ceil(num_temperatures / 2))
    chains = int(_PILOT_SHARE * num_chains * num_temperatures / temperatures)
    return min(max(chains, 2), _PILOT_CHAINS), temperatures


def _pilot(key: Key, annealing: Annealing, plan: Plan) -> Annealing:
    """Freezes the step sizes, and the adaptive schedule, by a coarse run of a few chains."""
    betas, dtype = annealing.betas, annealing.betas.dtype
    num_temperatures = betas.size - 1
    num_chains, num_coarse = pilot_size(plan.num_chains, num_temperatures)
    key_start, key_run = jax.random.split(key)
    u = jnp.linspace(0, num_temperatures, num_coarse + 1, dtype=dtype)
    coarse = annealing._replace(betas=jnp.interp(u, jnp.arange(betas.size, dtype=dtype), betas))
    z = start_chains(key_start, annealing.base, num_chains)
    tuner = _pooled(num_coarse, dtype)
    _, info, deviations = anneal(key_run, coarse, z, tuner, plan.num_leapfrog)
    if plan.adaptive_schedule:
        betas = equal_distances(coarse.betas, deviations, num_temperatures)
    log_steps = jnp.interp(betas[1:], coarse.betas[1:], smooth(jnp.log(info.step_sizes)))
    return annealing._replace(betas=betas, step_sizes=jnp.exp(log_steps))


def prepare(key: Key, target: Target, q: Gaussian | None, plan: Plan) -> Annealing:
    """Freezes what the measuring run needs."""
    path, base, frame = geometric_path(target, q)
    betas = plan.betas.astype(base.mean.dtype)
    step_sizes = jnp.broadcast_to(plan.step_size.astype(betas.dtype), (betas.size - 1,))
    annealing = Annealing(path, base, frame, betas, step_sizes)
    if plan.adaptation != "pilot":
        return annealing
    return _pilot(key, annealing, plan)


def forward(key: Key, annealing: Annealing, plan: Plan) -> tuple[Estimate, AISInfo]:
    """The measuring run from the base to p(x, z)."""
    num_chains, dtype = plan.num_chains, annealing.betas.dtype
    key_start, key_run = jax.random.split(key)
    z = start_chains(key_start, annealing.base, num_chains)
    if plan.adaptation == "authors":
        tuner, jitter = _authors(num_chains, dtype), 1.0
    else:
        tuner, jitter = frozen(annealing.step_sizes), JITTER
    log_weights, info, _ = anneal(key_run, annealing, z, tuner, plan.num_leapfrog, jitter=jitter)
    info = info._replace(z=jax.vmap(partial(to_z, annealing.frame))(info.z))
    return log_mean_exp(log_weights)._replace(acceptance=jnp.mean(info.acceptance)), info


@jax.jit
def _ais(key: Key, target: Target, q: Gaussian | None, plan: Plan) -> tuple[Estimate, AISInfo]:
    key_pilot, key_run = jax.random.split(key)
    return forward(key_run, prepare(key_pilot, target, q, plan), plan)


def checked_plan(
    q: Gaussian | None,
    num_chains: int,
    num_temperatures: int,
    num_leapfrog: int,
    schedule: str | Array,
    step_size: float | Array | None,
    adaptation: str = "pilot",
) -> Plan:
    """The arguments of `ais` as a Plan, or an error that names the one that cannot be."""
    if q is not None and not isinstance(q, Gaussian):
        as_sampler(q)  # what is no q at all is told so
        raise TypeError(
            "q must be a Gaussian(mean, scale), whose density AIS can anneal, or None for the "
            f"prior; got {type(q).__name__}: take posteriors.moment_matched(key, q)"
        )
    if adaptation not in ADAPTATIONS:
        raise ValueError(f"adaptation must be one of {', '.join(ADAPTATIONS)}; got {adaptation!r}")
    if step_size is not None:
        if adaptation == "authors":
            raise ValueError(
                'adaptation="authors" finds the step sizes while it measures, and needs step_size=None'
            )
        adaptation = "none"
    betas = schedule_betas(schedule, num_temperatures)
    adaptive = isinstance(schedule, str) and schedule == "adaptive"
    if adaptive and adaptation != "pilot":
        raise ValueError(
            'schedule="adaptive" is chosen by the pilot run, which needs adaptation="pilot" and '
            "step_size=None"
        )
    given = _FIRST_STEP_SIZE if step_size is None else step_size
    step_size = jnp.asarray(given)
    if step_size.shape not in ((), (betas.size - 1,)):
        raise ValueError(
            f"step_size must be a number or an array [T={betas.size - 1}]; got shape {step_size.shape}"
        )
    # As of a schedule, the values are not known inside the caller's jit.
    with contextlib.suppress(jax.errors.TracerArrayConversionError):
        values = np.asarray(given)
        if not np.all((values > 0) & (values < np.inf)):
            shown = np.array2string(values, threshold=6, edgeitems=2)
            raise ValueError(f"step_size must be positive and finite; got {shown}")
    return Plan(
        betas,
        step_size,
        positive_int("num_chains", num_chains),
        positive_int("num_leapfrog", num_leapfrog),
        adaptation,
        adaptive,
    )


def ais_with_info(
    key: Key,
    target: Target,
    q: Gaussian | None = None,
    num_chains: int = 16,
    num_temperatures: int = 100,
    num_leapfrog: int = 10,
    schedule: str | Array = "linear",
    *,
    adaptation: str = "pilot",
    step_size: float | Array | None = None,
) -> tuple[Estimate, AISInfo]:
    """`ais`, and what one may look at of its run: acceptance by temperature, non-finite counts."""
    plan = checked_plan(
        q, num_chains, num_temperatures, num_leapfrog, schedule, step_size, adaptation
    )
    return _ais(key, target, q, plan)


def ais(
    key: Key,
    target: Target,
    q: Gaussian | None = None,
    num_chains: int = 16,
    num_temperatures: int = 100,
    num_leapfrog: int = 10,
    schedule: str | Array = "linear",
    *,
    adaptation: str = "pilot",
    step_size: float | Array | None = None,
) -> Estimate:
    """Lower bound on log p(x) by annealing from q to the posterior; E[exp log_weights] = p(x).

    π_β(z) ∝ q(z)^{1−β} p(x, z)^β with HMC transitions (Neal 2001; Wu et al. 2017).

    Args:
      key: of this datapoint.
      target: p(z) p(x|z) for one x.
      q: Gaussian(mean [D], scale [D] or [D, D]) the chains start from, whose scale is also HMC's
        mass; None starts at the prior N(0, I).
      num_chains: K.
      num_temperatures: T transitions.
      num_leapfrog: L gradient evaluations a transition.
      schedule: linear, sigmoid, power, geometric, adaptive, or an array [T+1] that also sets T (see
        `infsub.schedules`).
      adaptation: "pilot" freezes step sizes found by a pilot run, which costs an eighth of the run on
        top (at most 8 chains over 25 temperatures); "authors" adapts each chain's while it measures,
        as the paper's code does, for comparison: its weights are not exactly unbiased.
      step_size: [] or [T], in units of q's scale: frozen as given, no pilot; a transition takes its
        own share of it, drawn from 0.3 to 1, as of the pilot's. Not for adaptation="authors".

    Returns:
      Estimate in nats with log_weights [K] and the mean acceptance.

    Raises:
      ValueError, TypeError: an argument that cannot be; the message names it.

    Example:
      >>> target = infsub.Target(None, lambda z: norm.logpdf(1.0, z).sum(), latent_dim=1)  # x = 1
      >>> estimate = infsub.ais(jax.random.key(0), target, infsub.laplace(target), 16, 25, 5)
      >>> print(f"{estimate.log_px:.2f}")  # log N(1; 0, 2)
      -1.52
    """
    return ais_with_info(
        key,
        target,
        q,
        num_chains,
        num_temperatures,
        num_leapfrog,
        schedule,
        adaptation=adaptation,
        step_size=step_size,
    )[0]
