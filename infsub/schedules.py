"""Temperature schedules 0 = β_0 < … < β_T = 1 of annealing, [T+1]."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from infsub.types import Array, positive_int

SCHEDULES = ("linear", "sigmoid", "power", "geometric", "adaptive")
_SIGMOID_WIDTH, _POWER, _FIRST_BETA = 4.0, 3.0, 1e-4


def schedule_betas(schedule: str | ArrayLike, num_temperatures: int = 100) -> Array:
    """Inverse temperatures 0 = β_0 < … < β_T = 1, [T+1].

    linear: t/T; sigmoid: the logistic function on [−4, 4], rescaled (Grosse et al. 2015, sec. 5);
    power: (t/T)³ (Friel & Pettitt 2008); geometric: β_1 = 1e-4 to 1 by a constant factor; adaptive: as
    power, where a pilot looks, before `equal_distances` chooses. An explicit array [T+1] is checked and
    kept, and T is its length − 1.

    Raises:
      ValueError: an unknown name, num_temperatures < 1, or an array not increasing from 0 to 1.
    """
    if not isinstance(schedule, str):
        # Inside the caller's jit the values are not known; there the array is taken as it is.
        with contextlib.suppress(jax.errors.TracerArrayConversionError):
            _check_betas(np.asarray(schedule))
        return jnp.asarray(schedule)
    num_temperatures = positive_int("num_temperatures", num_temperatures)
    # By numpy: XLA multiplies by the reciprocal, which takes 159/159 to 0.99999994.
    u = jnp.asarray(np.arange(num_temperatures + 1) / num_temperatures)
    match schedule:
        case "linear":
            return u
        case "sigmoid":
            betas = jax.nn.sigmoid(_SIGMOID_WIDTH * (2 * u - 1))
            return (betas - betas[0]) / (betas[-1] - betas[0])
        case "power" | "adaptive":  # adaptive: where the pilot looks
            return u**_POWER
        case "geometric":
            betas = (
                jnp.geomspace(_FIRST_BETA, 1, num_temperatures) if num_temperatures > 1 else u[1:]
            )
            return jnp.concatenate([u[:1], betas]).at[-1].set(1)
        case _:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, or an array; got {schedule!r}"
            )


def _check_betas(betas: np.ndarray) -> None:
    increasing = betas.ndim == 1 and betas.size > 1 and bool(np.all(np.diff(betas) > 0))
    if not increasing or betas[0] != 0 or betas[-1] != 1:
        raise ValueError(
            "schedule must be an array [T+1] that increases strictly from 0 to 1; got "
            f"{np.array2string(betas, threshold=6, edgeitems=2)}"
        )


def equal_distances(
    betas: Float[Array, " P1"], deviations: Float[Array, " P"], num_temperatures: int
) -> Float[Array, " {num_temperatures}+1"]:
    """T temperatures at equal distances ∫ sd_β(log_ratio) dβ, [T+1].

    They lose, to second order, equal conditional effective sample size at each step (Zhou, Johansen
    & Aston 2016, sec. 3.3.1).

    Args:
      betas: [P+1], where a pilot looked.
      deviations: [P], sd of log_ratio over its chains at betas[1:]; one that is not finite, of a chain
        at zero density, says nothing.
      num_temperatures: T.
    """
    deviations = jnp.where(jnp.isfinite(deviations), deviations, 0)
    largest = jnp.max(deviations)
    # Where the chains never differed any temperatures do.
    deviations = jnp.where(largest > 0, jnp.maximum(smooth(deviations), 1e-6 * largest), 1)
    lengths = jnp.cumsum(deviations * jnp.diff(betas))
    lengths = jnp.concatenate([jnp.zeros(1, betas.dtype), lengths])
    equal = jnp.linspace(0, 1, num_temperatures + 1, dtype=betas.dtype) * lengths[-1]
    return jnp.interp(equal, lengths, betas).at[-1].set(1)


def smooth(values: Float[Array, " T"]) -> Float[Array, " T"]:
    """Mean of each value and its two neighbours, [T] -> [T]: a pilot's curves are noisy."""
    padded = jnp.pad(values, 1, mode="edge")
    return (padded[:-2] + values + padded[2:]) / 3
