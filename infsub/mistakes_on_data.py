"""The rules by which `check` tells a mistake on data: numbers in, findings in words out.

Without simulated pairs q is its own witness. Where it is fitted, E_q[−∇² log p(x, z)] is 1 / scale²,
E_q[∇ log p(x, z)] is 0, and its draws over all datapoints are like the prior's. That shows a mistake,
not always whose it is.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from infsub.mistakes import (
    NUM_ERRORS,
    Finding,
    Seen,
    Statistic,
    at,
    count,
    finite,
    mean,
    ratio,
    wide,
)
from infsub.pairs import OnData, Pair


def finite_rows(xs: Any) -> tuple[np.ndarray, list[Finding]]:
    """The positions of the datapoints without NaN or inf, and what is to be said of the others."""
    whole = finite(xs)
    bad = np.flatnonzero(~whole)
    if not bad.size:
        return np.arange(whole.size), []
    sentence = (
        f"{count(bad.size, 'datapoint')} of xs ({at(bad)}) "
        "contain NaN or infinite values: leave them out, or fill them in."
    )
    return np.flatnonzero(whole), [Finding("error", "nan_input", sentence, bad.size)]


def encoder_outputs(outputs: np.ndarray, scale: np.ndarray, rows: np.ndarray) -> list[Finding]:
    """Of `encode_twice`: outputs [N, 2, M] and scale [N, D] of the datapoints at positions rows [N]."""
    bad = np.flatnonzero(~finite(outputs))
    if bad.size:
        sentence = (
            f"encode gives values that are not finite for {count(bad.size, 'datapoint')} "
            f"({at(rows[bad])}) though x is finite: look for a logarithm of 0, an overflow, or x's "
            "of another scale than in training (pixels 0…255)."
        )
        return [Finding("error", "non_finite", sentence, bad.size)]
    findings = []
    change = np.max(np.abs(outputs[:, 1] - outputs[:, 0]))
    if change > 1e-3 * np.std(outputs):
        sentence = (
            f"encode gives another q when it is called again for the same x (by up to {change:.2g}; "
            "must be 0): switch off its training mode (dropout, random numbers, batch statistics)."
        )
        findings.append(Finding("error", "changing", sentence, float(change)))
    elif len(outputs) > 1 and np.all(outputs == outputs[:1]):
        sentence = (
            "encode gives exactly the same q for every x: it does not use x, or it normalises by "
            "the statistics of a batch of one (batch norm in training mode)."
        )
        findings.append(Finding("warning", "constant_encoder", sentence))
    share = np.mean(~(scale > 0)) if np.isfinite(scale).all() else 0.0
    if share:
        sentence = (
            f"{share:.0%} of q's scales are 0 or negative: they must be standard deviations; give "
            "exp(0.5 * log_variance), or exp(log_scale)."
        )
        findings.append(Finding("error", "scale_sign", sentence, float(share)))
    return findings


def data_values(data: Any, pairs: Pair) -> list[Finding]:
    """Whether data [N, …] have the values that simulated x's have."""
    findings = []
    drawn, varies = _leaves(pairs.x), _leaves(pairs.varies)
    for name, leaf in _leaves(data).items():
        if not np.any(varies[name]):  # a covariate
            continue
        top, reach = np.max(np.abs(drawn[name])), np.max(np.abs(leaf))
        fractions = leaf[leaf != np.round(leaf)]
        if reach > 10 * top:
            advice = "divide them by 255" if _bytes_like(leaf) else "bring them to one scale"
            sentence = (
                f"xs{name} reaches {reach:.4g}, and the x's that sample_x draws only {top:.3g}: "
                f"{advice}."
            )
            findings.append(Finding("error", "pixels", sentence, float(reach)))
        elif fractions.size and np.all(drawn[name] == np.round(drawn[name])):
            sentence = (
                f"xs{name} holds fractions such as {fractions[0]:.3g}, and sample_x draws whole "
                "numbers only: log_likelihood is no density of such data; binarise or round them."
            )
            findings.append(Finding("warning", "grey", sentence, float(fractions[0])))
    return findings


def _bytes_like(leaf: Any) -> bool:
    leaf = wide(leaf)
    return bool(np.all(leaf == np.round(leaf)) and np.min(leaf) >= 0 and 15 < np.max(leaf) <= 255)


def unfinished(on: OnData, rows: np.ndarray) -> tuple[OnData, list[Finding]]:
    """The datapoints whose ELBO and gradients are finite; and which are not."""
    whole = finite(on)
    if whole.all():
        return on, []
    sentence = (
        f"the ELBO, or a gradient of log_likelihood or log_prior in z, is not finite for "
        f"{count(int(np.sum(~whole)), 'datapoint')} of xs ({at(rows[~whole])}): look for a "
        "logarithm of 0 or an overflow."
    )
    finding = Finding("error", "non_finite", sentence, float(np.sum(~whole)))
    return jax.tree.map(lambda leaf: leaf[whole], on), [finding]


def fit(on: OnData, data: Any, size: int) -> Seen:
    """Whether q and p(x, z) agree on the data that q was trained on."""
    scale = wide(on.q.scale)

    def factor(scale: np.ndarray) -> Statistic:
        # Weights scale²: a dimension that x determines counts 1, one left to the prior nothing.
        found = np.sum(scale**2 * on.curvature, axis=1)
        return ratio(found, np.sum(1 - scale**2 * on.prior_curvature, axis=1), 1.0)

    agreement = factor(scale)
    shift = mean(np.mean((scale * on.gradient) ** 2, axis=1))
    reach = ratio(np.sum(on.prior_square, axis=1), np.sum(on.prior_curvature, axis=1), 1.0)
    numbers = {
        "score² / curvature of log p(z) at q, on xs": reach,
        "curvature of log_likelihood by that of q, on xs": agreement,
        "(scale · E_q[∇ log p(x, z)])², on xs": shift,
    }
    whole = any(_bytes_like(leaf) for leaf in jax.tree.leaves(data))
    is_far = reach.value - NUM_ERRORS * reach.standard_error > 4
    is_off = shift.value - NUM_ERRORS * shift.standard_error > 2
    causes = {
        f"log_likelihood is averaged over the {size} values of x": agreement.value * size,
        "scale is a variance": factor(np.sqrt(np.abs(scale))).value,
        "log_likelihood is a loss, its sign is turned": -agreement.value,
    }
    cause, value = min(causes.items(), key=lambda c: abs(math.log(c[1])) if c[1] > 0 else np.inf)
    # Counts, for which q is fitted: what explains its curvature so closely is no chance.
    if agreement.outside(0.25, 4) and 0.8 < value < 1.25 and not (is_far or is_off):
        whole = False
    if whole and np.mean(on.elbo) > 0:
        statistic, what = mean(wide(on.elbo)), "the ELBO, of whole numbers, above 0,"
    elif is_far:
        statistic, what = reach, "score² / curvature of log p(z) at q's draws"
        cause = "the encoder sees x on another scale than in its training, or is not trained"
    elif is_off:
        statistic, what = shift, "(scale · gradient)² at q, below 1 as a rule,"
        cause = "the encoder is not for this decoder, sees x on another scale, or is not trained"
    elif agreement.outside(0.25, 4):
        statistic, what = agreement, "curvature / (1/scale² − the prior's)"
        if not 0.4 < value < 2.5:
            cause = "log_likelihood is a multiple of a log density, or scale no standard deviation"
    else:
        return [], numbers
    level, name = "error" if statistic is agreement else "warning", "fit"
    if whole:
        level, name, cause = "error", "pixels", "xs holds 0…255 and is to be divided by 255"
    right = f" ({statistic.expected:g} is right)" if np.isfinite(statistic.expected) else ""
    sentence = (
        f"q(z|x) and p(x, z) contradict each other on xs: {what} is {statistic}{right}; most likely "
        f"{cause}. With sample_x, check could tell."
    )
    return [Finding(level, name, sentence, *statistic[:2])], numbers


def elbo(on: OnData, training_elbo: float | None, size: int) -> Seen:
    """L[q] on xs, and whether training saw the same number."""
    measured = mean(wide(on.elbo))
    numbers = {"ELBO on xs": measured}
    if training_elbo is None:
        return [], numbers
    latent_dim = on.gradient.shape[1]
    tolerance = max(NUM_ERRORS * measured.standard_error, 0.002 * abs(measured.value))

    def agrees(value: float) -> bool:
        return abs(value - measured.value) < tolerance

    if agrees(training_elbo):
        return [], numbers
    half_log_2pi = 0.5 * math.log(2 * math.pi)
    guesses = {
        "its sign turned, a loss": -training_elbo,
        f"a mean over the {size} values of x": training_elbo * size,
        f"a loss averaged over the {size} values of x": -training_elbo * size,
        "bits per value of x": -training_elbo * size * math.log(2),
        "without a Gaussian's -X/2 log 2π": training_elbo - size * half_log_2pi,
        "with an X/2 log 2π that is missing here": training_elbo + size * half_log_2pi,
        "with a D/2 log 2π too much": training_elbo - latent_dim * half_log_2pi,
    }
    named = [words for words, value in guesses.items() if agrees(value)]
    cause = f"; it would fit as {named[0]}" if named else ""
    sentence = (
        f"the ELBO seen in training, {training_elbo:.6g}, is not the {measured.value:.6g} ± "
        f"{measured.standard_error:.2g} nats measured on xs{cause}: look for other data, a KL weight, "
        "dropped constants, or weights of another step."
    )
    difference = training_elbo - measured.value
    return [
        Finding("warning", "training_elbo", sentence, difference, measured.standard_error)
    ], numbers


def _leaves(tree: Any) -> dict[str, np.ndarray]:
    """Path -> leaf, as numpy."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {keystr(path): wide(leaf) for path, leaf in leaves}
