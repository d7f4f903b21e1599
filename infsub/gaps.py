"""Where inference loses its nats: the decomposition over datapoints, with paired errors.

    inference gap = log p̂(x) − L[q] = (log p̂(x) − L[q*]) + (L[q*] − L[q])
                                    = approximation gap   + amortization gap

(Cremer, Li & Duvenaud, ICML 2018, arXiv 1801.03558, section 3.) Every bound is an array over the
SAME datapoints and gaps are averaged as differences, so what makes one digit harder than another
cancels. Two errors go with a mean: `standard_error`, what another draw of N datapoints would change
(it contains the Monte Carlo noise), and `monte_carlo_error`, what other random keys would change on
these datapoints. Averages are float64 numpy, for a gap is a small difference of large numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from infsub.types import Array, Estimate, positive_int


class Mean(NamedTuple):
    """A mean over datapoints, in nats.

    Attributes:
      mean: the mean of N values.
      standard_error: std / √N over the datapoints (ddof 1); NaN for one datapoint.
      monte_carlo_error: √(Σ σ_n²) / N with σ_n the estimator's own standard errors; NaN without.
      num_datapoints: N.
    """

    mean: float
    standard_error: float
    monte_carlo_error: float
    num_datapoints: int


class Gaps(NamedTuple):
    """The decomposition of one family Q over one set of datapoints.

    Attributes:
      approximation: log p̂(x) − L[q*].
      amortization: L[q*] − L[q].
      inference: log p̂(x) − L[q], the sum of both.
      excluded: [E], positions of the datapoints left out because a bound is not finite there.
    """

    approximation: Mean
    amortization: Mean
    inference: Mean
    excluded: np.ndarray


def tightest(*estimates: Estimate) -> Estimate:
    """The largest of several lower bounds of ONE datapoint (jit, vmap): log p̂(x) = max_m L_m(x).

    A non-finite bound is never chosen; with none left the result is NaN. The maximum of noisy
    bounds is biased upwards (see `selection_bias`); the maximum of the means, `max_of_means`, is
    not, up to the noise of a mean, but is looser.

    Args:
      estimates: fields [] (or equal leading axes); `log_weights` may differ in length.

    Returns:
      The chosen estimate, without its weights (NaN [1]).

    Raises:
      ValueError: no estimate is given.
    """
    if not estimates:
        raise ValueError("tightest needs at least one estimate; got none")

    def choose(field: str) -> Array:
        stacked = jnp.stack([jnp.asarray(getattr(e, field)) for e in estimates])
        return jnp.where(some, jnp.take_along_axis(stacked, best, axis=0)[0], jnp.nan)

    bounds = jnp.stack([jnp.asarray(e.log_px) for e in estimates])
    finite = jnp.isfinite(bounds)
    some = jnp.any(finite, axis=0)
    best = jnp.argmax(jnp.where(finite, bounds, -jnp.inf), axis=0)[None]
    scalars = {field: choose(field) for field in Estimate._fields if field != "log_weights"}
    return Estimate(**scalars, log_weights=jnp.full((*some.shape, 1), jnp.nan))


def mean_over_datapoints(values: ArrayLike, errors: ArrayLike | None = None) -> Mean:
    """The mean of per-datapoint values [N] with its two errors; `errors` [N] are Monte Carlo ones.

    Raises:
      ValueError: no value, shapes that differ, or a value that is not finite: its position is
        named, for nothing is averaged in silently.
    """
    values = _column("values", values)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(f"values must be finite; they are not at positions {bad.tolist()}")
    n = len(values)
    sigma = np.full(n, np.nan) if errors is None else _column("errors", errors, n)
    return Mean(
        mean=float(np.mean(values)),
        standard_error=float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan"),
        monte_carlo_error=float(np.sqrt(np.sum(sigma**2)) / n),
        num_datapoints=n,
    )


def gap(
    upper: ArrayLike,
    lower: ArrayLike,
    upper_error: ArrayLike | None = None,
    lower_error: ArrayLike | None = None,
) -> Mean:
    """The mean of `upper − lower` over the same datapoints [N], with the paired standard error.

    SE = std_n(upper_n − lower_n) / √N; the Monte Carlo errors of the two add in squares (their keys
    are independent).

    Raises:
      ValueError: as `mean_over_datapoints`.
    """
    upper = _column("upper", upper)
    lower = _column("lower", lower, len(upper))
    errors = None
    if upper_error is not None and lower_error is not None:
        errors = np.hypot(
            _column("upper_error", upper_error, len(upper)),
            _column("lower_error", lower_error, len(upper)),
        )
    return mean_over_datapoints(upper - lower, errors)


def decompose(
    elbo: ArrayLike,
    local: ArrayLike,
    log_px: ArrayLike,
    elbo_error: ArrayLike | None = None,
    local_error: ArrayLike | None = None,
    log_px_error: ArrayLike | None = None,
) -> Gaps:
    """The three gaps of a family from L[q], L[q*] and log p̂(x), each [N] on the same datapoints.

    Datapoints where one of the three is not finite are left out of all three gaps, so that the
    inference gap stays the sum of the others, and named in `excluded`.

    Raises:
      ValueError: shapes differ, or no datapoint is finite in all three.
    """
    elbo = _column("elbo", elbo)
    local, log_px = _column("local", local, len(elbo)), _column("log_px", log_px, len(elbo))
    finite = np.isfinite(elbo) & np.isfinite(local) & np.isfinite(log_px)
    if not finite.any():
        raise ValueError(f"none of the {len(elbo)} datapoints has finite elbo, local and log_px")

    def keep(name: str, errors: ArrayLike | None) -> np.ndarray | None:
        return None if errors is None else _column(name, errors, len(elbo))[finite]

    q = elbo[finite], keep("elbo_error", elbo_error)
    q_star = local[finite], keep("local_error", local_error)
    p = log_px[finite], keep("log_px_error", log_px_error)
    return Gaps(
        approximation=gap(p[0], q_star[0], p[1], q_star[1]),
        amortization=gap(q_star[0], q[0], q_star[1], q[1]),
        inference=gap(p[0], q[0], p[1], q[1]),
        excluded=np.flatnonzero(~finite),
    )


def split_approximation(
    log_px: ArrayLike, local_full: ArrayLike, local_diagonal: ArrayLike
) -> tuple[Mean, Mean]:
    """What the factorised Gaussian's approximation gap consists of, from arrays [N].

    log p̂ − L[q*_FFG] = (L[q*_full] − L[q*_FFG]) + (log p̂ − L[q*_full]): correlations that a
    diagonal covariance cannot have, and a shape that no Gaussian has.

    Returns:
      (covariance part, non-Gaussian part); their means add up to the approximation gap of the FFG.

    Raises:
      ValueError: as `mean_over_datapoints`.
    """
    return gap(local_full, local_diagonal), gap(log_px, local_full)


def max_of_means(bounds: Sequence[ArrayLike]) -> int:
    """The position of the bound [N] with the largest mean: log p̂ = max_m mean_n L_m(x_n).

    The reproduction's choice: one estimator for all datapoints. Never above `tightest`'s mean.

    Raises:
      ValueError: as `mean_over_datapoints`, or no bound.
    """
    if not bounds:
        raise ValueError("max_of_means needs at least one bound; got none")
    return int(np.argmax([mean_over_datapoints(b).mean for b in bounds]))


def selection_bias(error_a: ArrayLike, error_b: ArrayLike) -> float:
    """How far, at most, choosing the larger of two noisy bounds lifts the mean of log p̂, in nats.

    For a ~ N(α, σ_a²), b ~ N(β, σ_b²), independent, with s² = σ_a² + σ_b² and d = |α − β|,
    E max(a, b) − max(α, β) = s φ(d/s) − d Φ(−d/s) ≤ s / √(2π), with equality at d = 0 (Clark,
    Operations Research 9, 1961). Averaged over the datapoints; errors are [N].

    Raises:
      ValueError: shapes differ.
    """
    error_a = _column("error_a", error_a)
    scale = np.hypot(error_a, _column("error_b", error_b, len(error_a)))
    return float(np.mean(scale) / np.sqrt(2 * np.pi))


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean over datapoints (Efron 1979), values [N].

    Datapoints are resampled whole: pass differences (a gap's values) for a paired interval. Gaps
    are skewed, and unlike ± standard error the interval shows it. Of one datapoint: (NaN, NaN).

    Raises:
      ValueError: no value, or level outside (0, 1).
    """
    values = _column("values", values)
    positive_int("num_resamples", num_resamples)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; got {level!r}")
    rng, n = np.random.default_rng(seed), len(values)
    if n == 1:
        return float("nan"), float("nan")
    means = [values[rng.integers(0, n, n)].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _column(name: str, values: ArrayLike, length: int | None = None) -> np.ndarray:
    """`values` as float64 [N], or a ValueError that names the argument."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0 or length not in (None, array.size):
        wanted = "[N] with N >= 1" if length is None else f"[{length}], one value a datapoint"
        raise ValueError(f"{name} must have shape {wanted}; got {list(array.shape)}")
    return array
