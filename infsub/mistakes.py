"""The rules by which `check` tells a mistake on simulated pairs: numbers in, findings in words out.

A density knows its own moments. On pairs (z, x) ~ p(z) p(x|z), with s = ∇_z log p(x|z), its Hessian
H and g = ∇ log p(z), whatever the networks are:

| statistic                                      | a right model | otherwise |
|------------------------------------------------|-----|--------------------------------------------|
| E[s·s] / E[−tr H] (Bartlett's second identity) | 1   | c for c · log p: 1/X a mean over x, −1 a loss |
| E[s·g] / E[g·g]                                | 0   | 1: the prior is in the likelihood            |
| E[s(x)·s(x')] / E[s·s], x and x' for ONE z     | 0   | the share of a term of z missing or too much |
| E[g·g] / E[−tr ∇² log p(z)]                    | 1   | log_prior is not sample_prior's density      |
| E[(z − mean)² / scale²] of q(z|x)              | 1 if q is calibrated | far off, and             |
| scale² (E[s²] + E[g²]), the median             | near 1 | off to the same side: variance as scale … |
| E[log q(z|x) / p(z)], q's widths refitted      | > 0 | < 0: another decoder's encoder               |

The products are weighted by 1 / (E s_i² + E g_i²), so that no dimension drowns the others. Of a scale
two witnesses must say the same: an encoder whose means are off, for want of training, is overconfident
too, but of the width that the curvature asks for.

A statistic is wrong beyond NUM_ERRORS standard errors AND a practical margin, named where it is used.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infsub import files
from infsub.pairs import NUM_RANKED, NUM_REPLICATES, Pair
from infsub.types import Key

NUM_ERRORS = 5.0


class Statistic(NamedTuple):
    """A number that a right model fixes.

    Attributes:
      value: from a mean over the datapoints.
      standard_error: of `value`.
      expected: of a right model; NaN where it depends on the model.
    """

    value: float
    standard_error: float
    expected: float = float("nan")

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.1g}"

    def beyond_errors(self) -> bool:
        return abs(self.value - self.expected) > NUM_ERRORS * self.standard_error

    def outside(self, low: float, high: float) -> bool:
        """Beyond errors, and beyond the margin [low, high]."""
        return self.beyond_errors() and not low <= self.value <= high


class Finding(NamedTuple):
    """Something wrong, or something that could not be looked at.

    Attributes:
      level: "error" (bounds or gaps are wrong), "warning" (they may be), "note" (for information).
      name: of its kind, as in `check`'s table.
      sentence: what was found, the figure, what it should be, what to do.
      value: the figure; NaN where there is none.
      standard_error: of `value`; NaN where it has none.
    """

    level: str
    name: str
    sentence: str
    value: float = float("nan")
    standard_error: float = float("nan")


class Calibration(NamedTuple):
    """Of the encoder, on simulated pairs: is the true z like a draw of q(z|x)?

    Simulation-based calibration (Talts et al. 2018, arXiv 1804.06788) with log p(x|z) as a test
    quantity beside the coordinates (Modrák et al. 2023, arXiv 2211.02383).

    Attributes:
      coverage_50, coverage_90: the share of coordinates z_i within q's central 50 and 90 %.
      ranks: [N] in (0, 1), of log p(x|z) at the true z among its values at draws of q, ties and
        steps broken at random; uniform for an exact q, near 1 where q's draws explain x worse.
      p_value: of the ranks' uniformity (Kolmogorov and Smirnov).
      coordinate_p_value: of the uniformity of each z_i's ranks, the smallest of them times D.
    """

    coverage_50: Statistic
    coverage_90: Statistic
    ranks: np.ndarray
    p_value: float
    coordinate_p_value: float


Seen = tuple[list[Finding], dict[str, Statistic]]


def wide(values: Any) -> np.ndarray:
    """As float64: what is looked for may be a small difference."""
    return np.asarray(values, np.float64)


def mean(values: np.ndarray, expected: float = float("nan")) -> Statistic:
    """The mean of values [N], with its standard error."""
    return Statistic(
        float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))), expected
    )


def ratio(numerator: np.ndarray, denominator: np.ndarray, expected: float) -> Statistic:
    """mean(numerator) / mean(denominator), each [N], with the delta method's standard error."""
    scale = np.mean(denominator)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.mean(numerator) / scale
        error = mean(numerator - value * denominator).standard_error / abs(scale)
    return Statistic(float(value), float(error), expected)


def count(number: int, noun: str) -> str:
    """As one says it: 1 datapoint, 2 datapoints."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def at(rows: np.ndarray) -> str:
    """The first of these indices in words: at 3, 5 and 12 more."""
    return f"at {files.first_few(np.sort(rows).tolist(), 5)}"


def finite(tree: Any) -> np.ndarray:
    """[N] of bool: at which datapoints all numbers of a pytree of arrays [N, …] are finite."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    found = np.ones(len(leaves[0]), bool)
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            found &= np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
    return found


def usable(pairs: Pair) -> tuple[Pair | None, list[Finding]]:
    """The pairs that statistics can be made of, None if there are too few; and what is amiss."""
    if not any(np.any(leaf) for leaf in jax.tree.leaves(pairs.varies)):
        sentence = (
            f"sample_x gives the same x for {NUM_REPLICATES} keys and one z: it must draw from "
            "p(x|z), noise included, not return its mean."
        )
        return None, [Finding("error", "fixed_x", sentence)]
    whole = finite(pairs)
    if whole.all():
        return pairs, []
    sentence = (
        f"log_likelihood, log_prior, encode or a gradient of theirs is not finite for "
        f"{count(int(np.sum(~whole)), 'simulated pair')} of {whole.size}: look for a logarithm "
        "of 0 or an overflow."
    )
    finding = Finding("error", "non_finite", sentence, float(np.sum(~whole)))
    kept = jax.tree.map(lambda leaf: leaf[whole], pairs) if np.sum(whole) >= 20 else None
    return kept, [finding]


def likelihood(pairs: Pair, size: int) -> Seen:
    """Is exp(log_likelihood) the density that sample_x draws from, up to a constant? size is X."""
    score, curvature = wide(pairs.score), wide(pairs.curvature)
    g = wide(pairs.prior_score)[:, None]
    if not np.any(score):
        sentence = (
            "log_likelihood does not change with z at any simulated pair: it must depend on z."
        )
        return [Finding("error", "ignores_z", sentence)], {}
    weights = 1 / (np.mean(score**2, axis=(0, 1)) + np.mean(g**2, axis=(0, 1)))

    def inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.mean(np.sum(weights * a * b, axis=-1), axis=-1)

    # E[s·g] is 0 for any multiple of a log likelihood, so this comes first and is then taken out.
    joint = ratio(inner(score, g), inner(g, g), 0.0)
    factor = _factor(inner, score, curvature)
    without = score - joint.value * g
    prior_curvature = wide(pairs.prior_curvature)[:, None]
    factor_without = _factor(inner, without, curvature - joint.value * prior_curvature)
    # A mean's joint holds 1/X of the prior: what counts is the prior's share beside the likelihood's.
    share = joint.value / abs(factor_without.value) if _is_wrong(factor_without) else joint.value
    twice = joint.beyond_errors() and abs(share) > 0.3
    if twice:
        score, factor = without, factor_without
    # Sums over distinct x's of one z: Σ_{a≠b} s_a·s_b / R(R − 1).
    total, replicates = np.sum(score, axis=1), score.shape[1]
    products = np.sum(weights * (total**2 - np.sum(score**2, axis=1)), axis=-1)
    term = ratio(products / (replicates * (replicates - 1)), inner(score, score), 0.0)

    findings = []
    if twice:
        sentence = (
            f"log_likelihood contains log p(z) {joint} times (must be 0): give log p(x|z) alone, "
            "the prior is added to it."
        )
        findings.append(Finding("error", "prior_twice", sentence, *joint[:2]))
    missing = term.outside(-math.inf, 0.03)
    if missing:
        sentence = (
            f"log_likelihood lacks a term that depends on z, or has one too many: {term} of its "
            "score² is the same for all x (must be 0); keep all that depends on z, such as a "
            "Gaussian's -log σ(z), or let sample_x draw from this very density."
        )
        findings.append(Finding("error", "term_of_z", sentence, *term[:2]))
    finding = _factor_finding(factor, size)
    if finding and not (missing and finding.name == "factor"):
        findings.append(finding)
    if not twice and joint.standard_error > 0.2:
        sentence = (
            f"Not checked: whether log_likelihood contains log p(z): these pairs tell its part only "
            f"as {joint} (0 without it, 1 with it); raise num_points."
        )
        findings.append(Finding("note", "unchecked", sentence, *joint[:2]))
    return findings, {
        "score² / curvature of log_likelihood": factor,
        "prior within log_likelihood": joint,
        "share of a term of z in the score²": term,
    }


def _factor(inner: Any, score: np.ndarray, curvature: np.ndarray) -> Statistic:
    return ratio(inner(score, score), inner(curvature, np.ones(())), 1.0)


def _is_wrong(factor: Statistic) -> bool:
    return factor.outside(0.75, 1.33)


def _factor_finding(factor: Statistic, size: int) -> Finding | None:
    if not _is_wrong(factor):
        return None
    c, figure = factor.value, f"(score² / curvature is {factor}, must be 1)"
    if abs(c) > 0 and abs(math.log(abs(c) * size)) < math.log(1.5) and size > 1:
        sign = ", and its sign is turned: it is a loss" if c < 0 else ""
        sentence = (
            f"log_likelihood is averaged over the {size} values of x{sign} {figure}: "
            "give the sum of log p over them."
        )
        return Finding("error", "loss" if c < 0 else "mean", sentence, *factor[:2])
    if c < 0:
        sentence = (
            f"log_likelihood has the sign of a loss {figure}: give log p(x|z), which is larger where "
            "z explains x better."
        )
        return Finding("error", "loss", sentence, *factor[:2])
    sentence = (
        f"log_likelihood is about {c:.2g} times a log density {figure}: look for a squared error "
        "without its 1/(2σ²), a mean over some axes, a weight, or a sample_x of another noise."
    )
    return Finding("error", "factor", sentence, *factor[:2])


def outputs(log_likelihood: Any, by_outputs: Any) -> list[Finding]:
    """Do a model's outputs say the same as its log_likelihood? Both [N], at one z each."""
    off = float(np.max(np.abs(wide(by_outputs) - wide(log_likelihood))))
    if off < 0.01 + 1e-3 * np.max(np.abs(wide(log_likelihood))):
        return []
    sentence = (
        f"log_likelihood_of_outputs(outputs(z)) is up to {off:.3g} nats from log_likelihood(z) (must be "
        "0): bounds hold, but AIS and local optimisation start from another posterior's curvature."
    )
    return [Finding("warning", "outputs", sentence, off)]


def prior(pairs: Pair) -> Seen:
    """Is log_prior the density that sample_prior draws from, up to a constant?"""
    g, curvature = wide(pairs.prior_score), wide(pairs.prior_curvature)
    weights = 1 / np.maximum(np.mean(g**2, axis=0), np.finfo(float).tiny)
    factor = ratio(np.sum(weights * g**2, axis=1), np.sum(weights * curvature, axis=1), 1.0)
    numbers = {"score² / curvature of log_prior": factor}
    if not _is_wrong(factor):
        return [], numbers
    sentence = (
        f"log_prior is not the log density of what sample_prior draws (score² / curvature is "
        f"{factor}, must be 1): both must say the same p(z)."
    )
    return [Finding("error", "prior", sentence, *factor[:2])], numbers


_HALF_WIDTH = 0.67449  # of a standard normal's central 50 %
_READINGS = {"variances, so that scale is their square root": np.sqrt}
_SIGNED_READINGS = {
    "log-variances, so that scale is exp(0.5 * log_variance)": lambda s: np.exp(s / 2),
    "log-scales, so that scale is exp(log_scale)": np.exp,
}


def encoder(pairs: Pair) -> Seen:
    """Does q(z|x) tell z, and is its scale a standard deviation?"""
    z, scale = wide(pairs.z), wide(pairs.q.scale)
    if np.any(scale == 0):  # an error of `encoder_outputs`
        return [], {}
    shift = z - wide(pairs.q.mean)

    def squares(scale: np.ndarray) -> Statistic:
        return mean(np.mean((shift / scale) ** 2, axis=1), 1.0)

    residual = squares(scale)
    numbers = {"(z - mean)² / scale² of q": residual}
    findings = []
    # Coverage is bounded: a few wild z's hide no error in it, as they can in a mean of squares.
    inside = mean(np.mean(np.abs(shift / scale) < _HALF_WIDTH, axis=1), 0.5)
    off = inside.beyond_errors() and not 1 / 3 < residual.value < 3
    # Where the means are off the squares are large, and the scales may be right.
    curvature = _log_curvature(pairs, np.abs(scale))
    off &= abs(curvature) > math.log(2) and (curvature < 0) == (residual.value > 1)
    read = _reading(pairs, shift, scale) if off or np.any(scale < 0) else None
    if read is not None:
        words, scale = read
        sentence = (
            f"q's scales look like {words}: (z - mean)² / scale² is {residual} as given and "
            f"{squares(scale)} so read (1 is right)."
        )
        findings.append(Finding("error", "scale_power", sentence, *residual[:2]))
    elif off:
        word, root = "narrow" if residual.value > 1 else "wide", np.sqrt(np.abs(scale))
        sentence = (
            f"q(z|x) is far too {word}: on simulated pairs (z - mean)² / scale² is {residual} and scale² "
            f"· curvature {math.exp(curvature):.2g}; were the scales variances, they would be "
            f"{squares(root)} and {math.exp(_log_curvature(pairs, root)):.2g} (1 is right). Is scale a "
            "standard deviation, and was the encoder trained, with this likelihood?"
        )
        findings.append(Finding("warning", "width", sentence, *residual[:2]))
    # q against the best Gaussian that does not see x, the widths of both fitted in each dimension, so
    # that only what q's means know of z is left.
    fitted = np.abs(scale) * np.sqrt(np.mean((shift / scale) ** 2, axis=0))
    blind = np.std(z, axis=0)
    log_q = -0.5 * (shift / fitted) ** 2 - np.log(fitted)
    log_p = -0.5 * ((z - np.mean(z, axis=0)) / blind) ** 2 - np.log(blind)
    nats = log_q - log_p
    told = mean(np.sum(nats, axis=1))
    numbers["nats by which q tells z better than p(z)"] = told
    worse = sum(mean(column, 0.0).outside(-0.1, math.inf) for column in nats.T)
    if worse:
        sentence = (
            f"q(z|x) tells {worse} of the {z.shape[1]} z_i of simulated x's worse than p(z) does (over "
            f"all it gains {told} nats; must be above 0 for each): the encoder is not for this decoder, "
            "sees x on another scale, or is not trained; load two that were trained together."
        )
        findings.append(Finding("warning", "encoder", sentence, *told[:2]))
    return findings, numbers


def _curvatures(pairs: Pair, scale: np.ndarray) -> np.ndarray:
    """−∇² log p(z|x) in units of 1 / scale², [N, D] as scale: 1 is right, below 1 too narrow.

    A factorised q is right to be narrow where z's posterior is correlated: 1 / scale² is the
    curvature then, but not the inverse of z's variance. The squares of scores stand for the
    curvature, and are never negative.
    """
    squares = np.mean(wide(pairs.score) ** 2, axis=1) + np.mean(
        wide(pairs.prior_score) ** 2, axis=0
    )
    return scale**2 * squares


def _log_curvature(pairs: Pair, scale: np.ndarray) -> float:
    """log of the median of `_curvatures`: 0 is right.

    Weighted by how many nats a scale says that x tells of z_i, for those of wide scales may be wild.
    """
    curvatures = _curvatures(pairs, scale).ravel()
    nats = np.maximum(np.log(np.std(wide(pairs.z), axis=0) / scale), 1e-6)
    order = np.argsort(curvatures)
    below = np.cumsum(nats.ravel()[order])
    return float(np.log(curvatures[order[np.searchsorted(below, below[-1] / 2)]]))


def _reading(pairs: Pair, shift: np.ndarray, scale: np.ndarray) -> tuple[str, np.ndarray] | None:
    """What the numbers given as scale [N, D] are if not one, by which the curvature goes up and down.

    A reading must be calibrated as it is, while a scale is forgiven a constant factor: an encoder
    that is too narrow everywhere has no other reading. Nor has one of the curvature's own width.
    """

    def spread(scale: np.ndarray) -> float:
        return float(np.var(np.log(_curvatures(pairs, scale))))

    signed = np.any(scale < 0)
    best, found = np.inf if signed else spread(scale), None
    for words, transform in (_SIGNED_READINGS if signed else _READINGS).items():
        read = transform(np.clip(scale, -100, 100))
        if 0.4 < np.mean((shift / read) ** 2) < 2.5 and spread(read) < best:
            best, found = spread(read), (words, read)
    if found and not signed:
        given, read = (abs(_log_curvature(pairs, s)) for s in (scale, found[1]))
        return None if given < read else found
    return found


def calibration(key: Key, pairs: Pair) -> tuple[Calibration, list[Finding]]:
    """How the true z ranks among draws of q; and a note where q is not calibrated."""
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), "uint32")))

    def spread(below: np.ndarray, equal: np.ndarray) -> np.ndarray:
        return (below + rng.uniform(size=below.shape) * (equal + 1)) / (NUM_RANKED + 1)

    at_draws, at_z = pairs.log_likelihoods, pairs.log_likelihood[:, None]
    ranks = spread(np.sum(at_draws < at_z, axis=1), np.sum(at_draws == at_z, axis=1))
    below = np.asarray(pairs.below)
    coordinates = spread(below, np.zeros_like(below))

    def coverage(level: float) -> Statistic:
        return mean(np.mean(np.abs(coordinates - 0.5) < level / 2, axis=1), level)

    smallest = min(uniformity(column) for column in coordinates.T)
    result = Calibration(
        coverage(0.5),
        coverage(0.9),
        ranks,
        uniformity(ranks),
        min(1.0, smallest * coordinates.shape[1]),
    )
    p_value = min(result.p_value, result.coordinate_p_value)
    if p_value > 1e-4:
        return result, []
    sentence = (
        f"q(z|x) is not calibrated: its central 50 % hold {result.coverage_50.value:.0%} of the true "
        f"z_i and its central 90 % {result.coverage_90.value:.0%}, and the true z's log p(x|z) ranks "
        f"at {np.mean(ranks):.2f} of 1 on average (0.5 is right); the gaps say what that costs, and it is no "
        "mistake in the model."
    )
    return result, [Finding("note", "calibration", sentence, p_value)]


def uniformity(values: np.ndarray) -> float:
    """P of Kolmogorov and Smirnov's test that values [N] are uniform on (0, 1).

    Stephens' (1970) correction for N: λ = (√N + 0.12 + 0.11/√N) D, p = 2 Σ_k (−1)^(k−1) e^(−2k²λ²).
    """
    size = len(values)
    ordered, steps = np.sort(values), np.arange(size + 1) / size
    distance = max(np.max(steps[1:] - ordered), np.max(ordered - steps[:-1]))
    scaled = (math.sqrt(size) + 0.12 + 0.11 / math.sqrt(size)) * distance
    k = np.arange(1, 101)
    p = 2 * np.sum((-1.0) ** (k - 1) * np.exp(-2 * (k * scaled) ** 2))
    return float(np.clip(p, 0, 1)) if scaled > 0.2 else 1.0  # below, the series is slow, and p is 1
