"""What is to blame for the nats that inference loses, of a model and of each datapoint, by rule.

Let g be the inference gap, a the amortization gap of the encoder's own family and p its approximation
gap, g = a + p. The first rule that holds decides. "Beyond" is by more than 2 standard errors, and 0.01
nats: of a model's mean the paired error over datapoints, of a datapoint the Monte Carlo one.

1. inconclusive (log p̂): it is in doubt. A bound is not finite; it has too few effective samples, or its
   HMC too low an acceptance; it is IWAE, and Pareto k is too large; another start's bound lies beyond it;
   or g is negative beyond.
2. inconclusive (the certificate): upper − lower bound of simulated data, with 2 errors, exceeds g, and
   TIGHT nats.
3. tight: g, with 2 errors, is below TIGHT nats. Without an L[q*] of the own family no more can be said.
4. optimiser: a is negative beyond, L[q*] is worse than L[q]; or p exceeds a beyond and L[q*] has not
   converged, so that p may be the optimiser's. Where a exceeds p, a longer run can only make it larger.
5. amortization: a exceeds p beyond.
6. inconclusive (which is larger): neither exceeds the other beyond.
7. family: p exceeds a beyond. Of a Gaussian: (covariance) where the covariance gap exceeds the
   approximation gap of the full Gaussian beyond, (shape) where it falls short of it.

Of a model rules 1 and 4 hold where they do at more than SHARE of its datapoints, 1 also where another
start's bound lies beyond log p̂ on average, by more than TIGHT nats. Without log p̂ or a family nothing can
be said. The model's verdict is on the means: `count` says how many datapoints have which.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from infsub import gaps
from infsub import rows as schema
from infsub.gaps import MEAN_ERRORS, MIN_DIFFERENCE, Certificate, Decomposition, Line
from infsub.rows import Rows

TIGHT = 0.05  # nats
SHARE = 0.1  # of datapoints

_NEXT = {
    "tight": "Inference loses next to nothing: what is left to gain is the model's.",
    "optimiser": "Optimise longer: more max_steps, or the thorough preset.",
    "amortization": "Train the encoder longer or widen it, or fit q at each datapoint.",
    "covariance": "Let q have correlations: a full_gaussian, or a flow.",
    "shape": "No Gaussian will do: try a flow, such as rnvp or auxiliary.",
    "family": "Try a richer q, such as rnvp or auxiliary.",
    "split": "Add full_gaussian to the families: it tells covariance from shape.",
    "log_px": "Take more AIS temperatures or chains, or another start of AIS.",
    "certificate": "Take more AIS temperatures, until the certificate is narrower than the gap.",
    "finite": "Look at this x and at what the model makes of it: a bound is not finite.",
    "errors": "Both gaps are equal within 2 errors: take more samples, for the mean more datapoints.",
    "nothing": "Measure log p̂ and L[q*] of the encoder's own family: name it in `families`, and as `own` or "
    "model.posterior.name where q is a sampler.",
}


class Verdict(NamedTuple):
    """What is to blame, and what to try.

    Attributes:
      name: amortization, family, optimiser, tight or inconclusive.
      of: of a family "covariance", "shape" or ""; of inconclusive, what is in doubt.
      advice: the next thing to try, a sentence.
    """

    name: str
    of: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name} ({self.of})" if self.of else self.name


_UNSPLIT = Verdict("inconclusive", "the gap is not split", _NEXT["nothing"])


class Verdicts(NamedTuple):
    """Of a model and its datapoints.

    Attributes:
      model: on the means.
      points: [N], in the order of the rows, those included that have no gap.
      sentences: the model's with its numbers, and how many datapoints have which; none where no gap
        was measured.
    """

    model: Verdict
    points: list[Verdict]
    sentences: list[str]


class _Side(NamedTuple):
    """A number and the limit that is beyond it, of each datapoint [N] or of the mean [1]."""

    value: np.ndarray
    limit: np.ndarray

    @property
    def above(self) -> np.ndarray:
        return self.value > self.limit

    @property
    def below(self) -> np.ndarray:
        return self.value < -self.limit


def judge(rows: Rows, found: Decomposition, certificate: Certificate | None = None) -> Verdicts:
    """The verdicts on what `gaps.decompose` found in `rows`, by the rules above.

    certificate: of the same model, from `gaps.certify`.
    """
    lines, families = found.lines, found.families
    if not found.has_gaps:
        return Verdicts(_UNSPLIT, [_UNSPLIT] * len(rows.indices), [])
    width, masks = _width(certificate), [_marked(found, names) for names in _doubts(found)]
    elbo, log_px, own = schema.ELBO.name, schema.LOG_PX.name, schema.LOCAL.of(families[0])
    negative, worse = (_side(lines, {n: 1, elbo: -1}, of_mean=False).below for n in (log_px, own))
    masks = [masks[0] | negative, worse, *masks[1:]]
    kept = _decide(found, masks, width, of_mean=False)
    most = [np.array([np.mean(mask) > SHARE]) for mask in masks]
    lost = 1 - len(found.indices) / len(rows.indices)  # a bound is not finite
    most[0] |= lost > SHARE or _contested(rows.at(np.isin(rows.indices, found.indices)), lines)
    (model,) = _decide(found, most, width, of_mean=True)
    by_index = dict(zip(found.indices.tolist(), kept, strict=True))
    unfinished = Verdict("inconclusive", "not finite", _NEXT["finite"])
    points = [by_index.get(index, unfinished) for index in rows.indices.tolist()]
    counts = ", ".join(f"{n} {name}" for name, n in count(points).items())
    told = [_sentence(model, found), f"Of {len(points)} datapoints: {counts}."]
    return Verdicts(model, points, told)


def count(points: list[Verdict]) -> dict[str, int]:
    """How many datapoints have each verdict, the most frequent first."""
    return dict(Counter(map(str, points)).most_common())


def _width(certificate: Certificate | None) -> float:
    """Nats by which log p̂ may be short of log p(x); 0 where nobody has looked."""
    if certificate is None or certificate.line is None:
        return 0.0
    mean = certificate.line.mean
    return mean.mean + MEAN_ERRORS * float(np.nan_to_num(mean.error))


def _doubts(found: Decomposition) -> tuple[set[str], set[str], set[str]]:
    """The quantities whose flags put in doubt: log p̂, the own family's optimum, the full Gaussian's."""
    source = gaps.source(found.lines).name
    own, full = (schema.LOCAL.of(name) for name in (found.families[0], "full_gaussian"))
    return {schema.LOG_PX.name, source}, {own}, {full}


def _marked(found: Decomposition, names: set[str]) -> np.ndarray:
    """[N] of bool: the datapoints with a flag about one of these quantities."""
    indices = [i for flag in found.flags if flag.about in names for i in flag.indices]
    return np.isin(found.indices, indices)


def _contested(rows: Rows, lines: dict[str, Line]) -> bool:
    """Whether the mean of another start's bound lies beyond that of log p̂, which then misses mass."""
    source, log_px = gaps.source(lines), schema.LOG_PX.name
    for name, (values, errors, _) in rows.columns.items():
        other = schema.get(name).quantity
        witness = other in (schema.IWAE, schema.LOCAL_IWAE) and other != source
        if witness and np.isfinite(values).any():
            both = {name: Line(values, errors, "bound"), log_px: lines[log_px]}
            excess = _side(both, {name: 1, log_px: -1}, of_mean=True)
            if excess.above[0] and excess.value[0] > TIGHT:
                return True
    return False


def _side(lines: dict[str, Line], signs: dict[str, int], of_mean: bool) -> _Side:
    """A sum of bounds with these factors, beyond which it is not 0.

    Each bound has random keys of its own, so their Monte Carlo errors add in squares once each; gaps
    that share a bound would count it twice.
    """
    values = np.sum([sign * lines[name].values for name, sign in signs.items()], axis=0)
    errors = np.linalg.norm([sign * lines[name].errors for name, sign in signs.items()], axis=0)
    errors = np.nan_to_num(errors)  # of rows that have none
    if not of_mean:
        return _Side(values, np.maximum(MEAN_ERRORS * errors, MIN_DIFFERENCE))
    finite = np.isfinite(values)
    mean = gaps.mean_over_datapoints(values[finite], errors[finite])
    return _Side(np.array([mean.mean]), np.array([max(MEAN_ERRORS * mean.error, MIN_DIFFERENCE)]))


def _decide(
    found: Decomposition, masks: list[np.ndarray], width: float, of_mean: bool
) -> list[Verdict]:
    """The rules at each datapoint, or at the mean.

    masks: where log p̂ is in doubt; L[q*] is worse than L[q]; the own family's optimum is in doubt; and
    the full Gaussian's.
    """
    lines, families = found.lines, found.families
    doubted, worse, unconverged, full_unconverged = masks
    elbo, log_px, own = schema.ELBO.name, schema.LOG_PX.name, schema.LOCAL.of(families[0])
    gap = _side(lines, {log_px: 1, elbo: -1}, of_mean)
    amortization = _side(lines, {own: 1, elbo: -1}, of_mean)
    lead = _side(lines, {own: 2, elbo: -1, log_px: -1}, of_mean)  # a − p
    covariance = None
    if schema.COVARIANCE.name in lines and families[0] == "gaussian":
        full = schema.LOCAL.of("full_gaussian")
        covariance = _side(lines, {full: 2, own: -1, log_px: -1}, of_mean)

    def verdict(n: int) -> Verdict:
        if doubted[n] or gap.below[n]:
            return Verdict("inconclusive", "log p̂", _NEXT["log_px"])
        if width > max(gap.value[n], TIGHT):
            return Verdict("inconclusive", "the certificate", _NEXT["certificate"])
        if gap.value[n] + gap.limit[n] < TIGHT:
            return Verdict("tight", "", _NEXT["tight"])
        if not found.is_split:
            return _UNSPLIT
        if worse[n] or amortization.below[n] or (lead.below[n] and unconverged[n]):
            return Verdict("optimiser", "", _NEXT["optimiser"])
        if lead.above[n]:
            return Verdict("amortization", "", _NEXT["amortization"])
        if not lead.below[n]:
            return Verdict("inconclusive", "which is larger", _NEXT["errors"])
        if families[0] == "full_gaussian":
            return Verdict("family", "shape", _NEXT["shape"])
        if covariance is None:
            return Verdict("family", "", _NEXT["split" if families[0] == "gaussian" else "family"])
        if covariance.above[n]:
            return Verdict("family", "covariance", _NEXT["covariance"])
        if covariance.below[n] and not full_unconverged[n]:
            return Verdict("family", "shape", _NEXT["shape"])
        return Verdict("family", "", _NEXT["family"])

    return [verdict(n) for n in range(len(gap.value))]


def _sentence(model: Verdict, found: Decomposition) -> str:
    """The verdict on the model in words, with what it rests on."""
    lines, own = found.lines, found.families[0]
    names = (schema.INFERENCE.name, schema.AMORTIZATION.of(own), schema.APPROXIMATION.of(own))
    gap, amortization, approximation = (
        gaps.with_error(lines[name].mean.mean, lines[name].error) for name in names
    )
    if not found.is_split:
        return f"Verdict: {model}. The inference gap is {gap} nats. {model.advice}"
    return (
        f"Verdict: {model}. Of an inference gap of {gap} nats, amortization costs {amortization} and "
        f"the family {schema.family_label(own)} {approximation}. {model.advice}"
    )
