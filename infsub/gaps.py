"""Where inference loses its nats: from the bounds of N datapoints to the gaps between them.

    inference gap = log p̂(x) − L[q] = (log p̂(x) − L[q*]) + (L[q*] − L[q])
                                    = approximation gap   + amortization gap

(Cremer, Li & Duvenaud, ICML 2018, arXiv 1801.03558, section 3.) Every bound is an array over the
SAME datapoints and gaps are averaged as differences, so what makes one digit harder than another
cancels. Two errors go with a mean: `standard_error`, what another draw of N datapoints would change
(it contains the Monte Carlo noise), and `monte_carlo_error`, what other random keys would change on
these datapoints. Averages are float64 numpy, for a gap is a small difference of large numbers.

log p̂ is AIS, and IWAE only where AIS was not run. The paper takes the larger of the two, datapoint
by datapoint; but the luckier of two noisy bounds is no bound: its mean lies above both of theirs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from infsub import rows as schema
from infsub.rows import Column, Rows, label
from infsub.types import positive_int

MIN_ESS = 4.0  # effective samples of one datapoint
MAX_PARETO_K = 0.7  # Vehtari et al. 2024, arXiv 1507.02646
MIN_ACCEPTANCE = 0.2  # of HMC; the pilot aims at four times as much
MAX_GRID_ERROR = 0.01  # nats
# Standard errors of a difference: beyond which a mean is said to be off, and beyond which one
# datapoint of many is.
MEAN_ERRORS, POINT_ERRORS = 2.0, 4.0
MIN_DIFFERENCE = 0.01  # nats; of less at one datapoint nothing is said, for some of it is rounding
CHANCE = 0.05  # that one of the datapoints is flagged for an estimate that was merely lucky


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

    @property
    def error(self) -> float:
        """Over datapoints; of one, where there is none, the Monte Carlo error."""
        return self.standard_error if self.num_datapoints > 1 else self.monte_carlo_error


class Line(NamedTuple):
    """One line of the table.

    Attributes:
      values: [N], nats.
      errors: [N], their Monte Carlo standard errors.
      kind: "bound", "gap" or "difference", see `rows.Quantity`.
    """

    values: np.ndarray
    errors: np.ndarray
    kind: str

    @property
    def mean(self) -> Mean:
        """Over the datapoints, with both errors."""
        return mean_over_datapoints(self.values, self.errors)

    @property
    def error(self) -> float:
        """The one to print beside the mean: a bound's Monte Carlo, of all others the paired one."""
        return self.mean.monte_carlo_error if self.kind == "bound" else self.mean.standard_error


def decimals(error: float, fewest: int = 2) -> int:
    """Of a number with this standard error: to its leading digit, of a 1 to the next; `fewest` to 4."""
    if not 5e-5 <= error < math.inf:
        return 2
    exponent = math.floor(math.log10(error))
    return min(max(fewest, -exponent + (error < 1.95 * 10.0**exponent)), 4)


def with_error(value: float, error: float) -> str:
    """`12.34 ± 0.05`, `0.241 ± 0.003`: a number and its standard error; `12.34` where there is none."""
    digits = decimals(error)
    return f"{value:z.{digits}f}{f' ± {error:.{digits}f}' if np.isfinite(error) else ''}"


class Flag(NamedTuple):
    """Something to know about some datapoints.

    Attributes:
      text: in a sentence, which says how many they are.
      indices: of the datapoints.
      what: the same of one of them.
      about: name of the quantity that it puts in doubt.
    """

    text: str
    indices: list[int]
    what: str = ""
    about: str = ""

    @property
    def of_one(self) -> str:
        """The words for it beside one of the datapoints."""
        return self.what or self.text


class Curve(NamedTuple):
    """How soon local steps buy back what the encoder lost.

    Attributes:
      family: that was fitted.
      held: whether a flow's trained weights stayed as they were.
      points: (n, the nats that L[q*] has over the bound after n steps), n ascending.
    """

    family: str
    held: bool
    points: list[tuple[int, Line]]

    @property
    def label(self) -> str:
        """The words for it in a figure."""
        return f"{schema.family_label(self.family)}{', weights held' if self.held else ''}"


class Decomposition(NamedTuple):
    """What the rows of N datapoints say.

    Attributes:
      indices: [N], the datapoints that all numbers are over: those where every bound is finite.
      lines: of the table, in its order, by name.
      curves: where there are bounds along the way to q*.
      families: of local inference; the encoder's own first, where it was evaluated. Only the first
        has an amortization gap, for the others L[q*] − L[q] also holds what they gain over it.
      own: the encoder's family; "" where it is not known.
      notes: sentences.
      flags: datapoints to look at, and those left out.
    """

    indices: np.ndarray
    lines: dict[str, Line]
    curves: list[Curve]
    families: list[str]
    own: str
    notes: list[str]
    flags: list[Flag]

    @property
    def is_split(self) -> bool:
        """Whether the first family is the encoder's own, so that its gaps split the inference gap."""
        return self.families[:1] == [self.own]

    @property
    def has_gaps(self) -> bool:
        """Whether there are gaps: L[q], L[q*] and log p̂ are all known."""
        return bool(self.families) and schema.INFERENCE.name in self.lines

    @property
    def parts(self) -> dict[str, Line]:
        """The gaps that make up the inference gap, from L[q] on, or it alone where it is not split."""
        if not self.is_split:
            return {"inference": self.lines[schema.INFERENCE.name]}
        quantities = {"amortization": schema.AMORTIZATION, "approximation": schema.APPROXIMATION}
        return {kind: self.lines[q.of(self.own)] for kind, q in quantities.items()}

    @property
    def flagged(self) -> dict[int, list[int]]:
        """{index of a datapoint: the flags that name it, by their place in `flags`}."""
        found: dict[int, list[int]] = {}
        for number, flag in enumerate(self.flags):
            for index in flag.indices:
                found.setdefault(index, []).append(number)
        return found


class Certificate(NamedTuple):
    """What bidirectional AIS says of N datapoints that the model simulates.

    Attributes:
      line: upper − lower bound; None where it is finite nowhere.
      notes: a sentence.
      flags: points that are not finite.
    """

    line: Line | None
    notes: list[str]
    flags: list[Flag]


def decompose(
    rows: Rows,
    own: str = "gaussian",
    *,
    min_ess: float = MIN_ESS,
    max_pareto_k: float = MAX_PARETO_K,
) -> Decomposition:
    """Bounds, gaps and notes from the rows of one model, in nats.

    Args:
      rows: of the datapoints; L[q] at least.
      own: the encoder's family.
      min_ess: an AIS of fewer effective chains is flagged, and an IWAE of fewer samples.
      max_pareto_k: an IWAE of a heavier tail is flagged.

    Raises:
      ValueError: there is no L[q], or no datapoint where all bounds are finite.
    """
    measured = _named(rows, schema.ELBO, schema.LOCAL, schema.IWAE, schema.AIS, schema.GRID)
    bounds = [name for name in measured if np.isfinite(rows.columns[name].values).any()]
    finite = rows.finite(bounds)
    if schema.ELBO.name not in bounds or not finite.any():
        raise ValueError("no datapoint whose bounds are all finite")
    flags = [
        Flag(f"{label(name)} is finite nowhere, left out", [])
        for name in measured
        if name not in bounds
    ]
    for name in bounds:
        text = f"{label(name)} is not finite"
        flags += _flag(text, ~rows.finite([name]), rows.indices, ", left out", name)

    rows = rows.at(finite)
    found = {name: rows.columns[name] for name in bounds}
    families = [schema.get(name).family for name in _named(rows, schema.LOCAL) if name in found]
    families.sort(key=lambda family: family != own)
    lines = {name: _bound(column) for name, column in found.items()}
    if schema.GRID.name in lines:  # no sample is drawn: no Monte Carlo error
        grid = found[schema.GRID.name].values
        lines[schema.GRID.name] = Line(grid, np.zeros_like(grid), "bound")
    lines |= _log_px(lines)
    lines |= _gaps(lines, families)
    curves, curve_flags = _curves(rows, lines)
    lines = {name: lines[name] for name in schema.in_order(lines)}
    notes, disagreements = _witnesses(rows, lines, min_ess, max_pareto_k)
    suspects = _suspects(rows, min_ess, max_pareto_k)
    everywhere = [flag for flag in suspects if _is_of_iwae(flag, lines)]
    return Decomposition(
        rows.indices,
        lines,
        curves,
        families,
        own,
        [*_on_log_px(lines), *map(_on_iwae, everywhere), *notes, *_on_gaps(lines, families, own)],
        [*flags, *(f for f in suspects if f not in everywhere), *disagreements, *curve_flags],
    )


def certify(rows: Rows) -> Certificate:
    """What the two-sided bounds of simulated datapoints say of AIS, in nats."""
    lower, upper = (rows.columns[q.name].values for q in (schema.LOWER, schema.UPPER))
    gap = upper - lower
    finite = np.isfinite(gap)
    flags = _flag("the certificate is not finite", ~finite, rows.indices, " that are simulated")
    if not finite.any():
        return Certificate(None, [], flags)
    two_sided = rows.columns.get(schema.TWO_SIDED.name)
    errors = np.full_like(gap, np.nan) if two_sided is None else two_sided.errors
    line = Line(gap[finite], errors[finite], schema.CERTIFICATE.kind)
    mean = line.mean
    note = (
        f"On simulated data the AIS bound is within {with_error(mean.mean, mean.error)} nats "
        f"(bidirectional AIS, upper − lower bound, {mean.num_datapoints} datapoints). Of data that the "
        "model does not simulate this is evidence and no proof: their posteriors may be harder."
    )
    return Certificate(line, [note], flags)


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


def difference(upper: Line, lower: Line, kind: str = "gap") -> Line:
    """`upper − lower` of the same datapoints, whose mean has the paired standard error.

    SE = std_n(upper_n − lower_n) / √N; the Monte Carlo errors of the two add in squares (their keys
    are independent).

    Raises:
      ValueError: they are not of the same number of datapoints.
    """
    below = _column("lower", lower.values, len(upper.values))
    return Line(upper.values - below, np.hypot(upper.errors, lower.errors), kind)


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, num_resamples: int = 2000
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
    rng, n = np.random.default_rng(0), len(values)
    if n == 1:
        return float("nan"), float("nan")
    at_once = max(1, 1_000_000 // n)  # not all: of many datapoints they would fill the memory
    counts = [min(at_once, num_resamples - i) for i in range(0, num_resamples, at_once)]
    means = [values[rng.integers(0, n, (count, n))].mean(axis=1) for count in counts]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _named(rows: Rows, *quantities: schema.Quantity) -> list[str]:
    """The columns of these quantities that the rows have, in the order of a table's lines."""
    return schema.in_order(n for n in rows.columns if schema.get(n).quantity in quantities)


def _bound(column: Column) -> Line:
    return Line(column.values, column.errors, "bound")


def _flag(
    text: str, bad: np.ndarray, indices: np.ndarray, then: str = "", about: str = ""
) -> list[Flag]:
    """The flag of the datapoints where `bad` [N], which says how many; none where there are none."""
    if not bad.any():
        return []
    counted = f"{text} at {bad.sum()} of {bad.size} datapoints{then}"
    return [Flag(counted, indices[bad].tolist(), text + then, about)]


def _log_px(lines: dict[str, Line]) -> dict[str, Line]:
    """log p̂, and beside it what the paper takes for it."""
    iwae, ais = lines.get(schema.IWAE.name), lines.get(schema.AIS.name)
    if iwae is None and ais is None:
        return {}
    found = {schema.LOG_PX.name: lines[source(lines).name]}
    if iwae is not None and ais is not None:
        larger = iwae.values > ais.values
        lift = np.where(larger, iwae.values - ais.values, 0)
        # Where AIS is the larger the lift is 0, whatever the keys, but for a change of sides.
        lift_errors = np.where(larger, np.hypot(iwae.errors, ais.errors), 0)
        errors = np.where(larger, iwae.errors, ais.errors)
        best = max((ais, iwae), key=lambda line: line.mean.mean)
        found |= {
            schema.PAPER_MAX.name: Line(ais.values + lift, errors, "bound"),
            schema.PAPER_MAX_OF_MEANS.name: best,
            schema.PAPER_LIFT.name: Line(lift, lift_errors, schema.PAPER_LIFT.kind),
        }
    return found


def source(lines: dict[str, Line]) -> schema.Quantity:
    """What log p̂ is: AIS, or IWAE where AIS was not run."""
    return schema.AIS if schema.AIS.name in lines else schema.IWAE


def _gaps(lines: dict[str, Line], families: list[str]) -> dict[str, Line]:
    elbo, log_px = lines[schema.ELBO.name], lines.get(schema.LOG_PX.name)
    found = {}
    for family in families:
        local = lines[schema.LOCAL.of(family)]
        over_elbo = schema.AMORTIZATION if family == families[0] else schema.GAIN
        found[over_elbo.of(family)] = difference(local, elbo, over_elbo.kind)
        if log_px is not None:
            found[schema.APPROXIMATION.of(family)] = difference(log_px, local)
    if log_px is not None:
        found[schema.INFERENCE.name] = difference(log_px, elbo)
    if {"gaussian", "full_gaussian"} <= set(families):
        full, diagonal = (lines[schema.LOCAL.of(f)] for f in ("full_gaussian", "gaussian"))
        found[schema.COVARIANCE.name] = difference(full, diagonal)
    return found


def _on_log_px(lines: dict[str, Line]) -> list[str]:
    """What log p̂ is, and how far the paper's lies above it."""
    notes = []
    if schema.LOG_PX.name in lines:
        notes.append(f"log p̂ is {source(lines).label}, the same estimator at all datapoints.")
    if schema.PAPER_LIFT.name in lines:
        lift, log_px = lines[schema.PAPER_LIFT.name], lines[schema.LOG_PX.name]
        means = lines[schema.PAPER_MAX_OF_MEANS.name].mean.mean - log_px.mean.mean
        notes.append(
            "Cremer et al. 2018 take max(IWAE, AIS) for log p(x). Of each datapoint it lies "
            f"{with_error(lift.mean.mean, lift.error)} nats above log p̂, for IWAE is the larger at "
            f"{np.sum(lift.values > 0)} of {lift.values.size} and the luckier of two noisy bounds is "
            f"no bound; of the means, {means:.2f}."
        )
    return notes


def _is_of_iwae(flag: Flag, lines: dict[str, Line]) -> bool:
    """Whether a flag says of IWAE itself, which log p̂ is not, and of most datapoints: of none to look at."""
    name = schema.IWAE.name
    of_most = 2 * len(flag.indices) > len(lines[schema.ELBO.name].values)
    return flag.about == name and source(lines).name != name and of_most


def _on_iwae(flag: Flag) -> str:
    return (
        f"{flag.text}, so that it is a bound and no estimate of log p(x); log p̂ is not made of it. From "
        "q(z|x) that is no surprise: from Laplace's Gaussian it lies nearer (config.evaluate.iwae_start)."
    )


def _on_gaps(lines: dict[str, Line], families: list[str], own: str) -> list[str]:
    notes = []
    if families and own not in families:
        name = f", {schema.family_label(own)}," if own else ""
        notes.append(
            f"The encoder's own family{name} was not optimised locally: the amortization gap of "
            f"{schema.family_label(families[0])} compares two families."
        )
    if schema.COVARIANCE.name in lines:
        notes.append(
            "The approximation gap of FFG is the covariance gap (what a diagonal covariance "
            "misses) plus the approximation gap of full (what no Gaussian has)."
        )
    # Of another family's q* less than L[q] is no news.
    others = [schema.AMORTIZATION.of(family) for family in families if own != family]
    negative = [
        label(name)
        for name, line in lines.items()
        if line.kind == "gap" and line.mean.mean < -MEAN_ERRORS * line.mean.standard_error
        if name not in others
    ]
    if negative:
        notes.append(
            f"Negative by more than 2 standard errors: {', '.join(negative)}. A bound is looser than "
            "the one below it: optimise longer, take more samples or temperatures, or start AIS "
            "from q* (config.evaluate.ais.start=local)."
        )
    return notes


def _witnesses(
    rows: Rows, lines: dict[str, Line], min_ess: float, max_pareto_k: float
) -> tuple[list[str], list[Flag]]:
    """What the other estimators of log p(x) say of log p̂: notes on its mean, flags of datapoints.

    An IWAE bounds log p(x) from below as AIS does, from another start: well above AIS it says that
    AIS has missed mass. Below it says so of its own q, which is no news where its tail is heavy.

    Of few effective samples the standard error, √(1/ESS), says little; but E[ŵ] = p(x), so whatever
    its tail log ŵ lies t nats too high with a probability of e^−t at most (Markov).
    """
    if schema.LOG_PX.name not in lines:
        return [], []
    estimator, log_px = source(lines), lines[schema.LOG_PX.name]
    beyond = f"by more than {POINT_ERRORS:g} standard errors"
    notes, flags = [], []
    for name in _named(rows, schema.IWAE, schema.LOCAL_IWAE):
        keep = rows.finite([name])
        if name == estimator.name or not keep.any():
            continue
        some = rows.at(keep)
        witness = some.columns[name]
        above = difference(_bound(witness), _bound(Column(*log_px[:2]).at(keep)))
        if above.mean.mean > MEAN_ERRORS * above.mean.standard_error:
            notes.append(
                f"{label(name)} exceeds log p̂ by {with_error(above.mean.mean, above.error)} nats, a "
                f"sign that {estimator.label} has not converged: take more temperatures, or another start "
                "(config.evaluate.ais.start)."
            )
        limit = np.maximum(POINT_ERRORS * above.errors, MIN_DIFFERENCE)
        few = witness.errors**2 * min_ess > 1
        lucky = np.where(few, np.log(above.values.size / CHANCE), 0)
        then = f", where {estimator.label} misses mass"
        bad = above.values > np.maximum(limit, lucky)
        flags += _flag(
            f"{label(name)} above log p̂ {beyond}", bad, some.indices, then, schema.LOG_PX.name
        )
        if "pareto_k" in witness.fields:
            bad = (above.values < -limit) & (witness.fields["pareto_k"] <= max_pareto_k)
            then = ", where its q misses mass, though Pareto k raises no doubt"
            flags += _flag(f"{label(name)} below log p̂ {beyond}", bad, some.indices, then, name)
    if schema.GRID.name in lines:
        truth = rows.columns[schema.GRID.name]
        errors = np.hypot(log_px.errors, truth.fields.get("error", 0))
        limit = np.maximum(POINT_ERRORS * errors, MIN_DIFFERENCE)
        bad = np.abs(log_px.values - truth.values) > limit
        text = f"log p̂ off log p(x) of the grid {beyond}"
        flags += _flag(text, bad, rows.indices, about=schema.LOG_PX.name)
    return notes, flags


def _curves(rows: Rows, lines: dict[str, Line]) -> tuple[list[Curve], list[Flag]]:
    """Curves of the families that have an L[q*]; a bound has to be finite everywhere."""
    points: dict[tuple[str, bool], list[tuple[int, Line]]] = {}
    flags = []
    for name in _named(rows, schema.AFTER, schema.AFTER_HELD):
        quantity, family, num_steps, _ = schema.get(name)
        local, after = lines.get(schema.LOCAL.of(family)), rows.columns[name]
        if local is None:
            continue
        text = f"{label(name)} is not finite"
        if bad := _flag(text, ~rows.finite([name]), rows.indices, ", no point of its curve"):
            flags += bad
            continue
        left = num_steps, difference(local, _bound(after))
        points.setdefault((family, quantity is schema.AFTER_HELD), []).append(left)
    curves = [Curve(*key, sorted(found, key=lambda p: p[0])) for key, found in points.items()]
    return curves, flags


def _suspects(rows: Rows, min_ess: float, max_pareto_k: float) -> list[Flag]:
    """Datapoints whose bounds need a second look, by what stands beside them."""
    fields = ("ess", "pareto_k", "acceptance", "error")
    ess, pareto_k, moves, cells = (schema.FIELDS[f].meaning for f in fields)
    unit = schema.FIELDS["error"].unit
    tests: dict[str, tuple[Any, str]] = {
        "ess": (lambda v: v < min_ess, f"{ess} below {min_ess:g}"),
        "pareto_k": (lambda v: v > max_pareto_k, f"{pareto_k} above {max_pareto_k:g}"),
        "converged": (lambda v: v == 0, "local optimisation not converged"),
        "acceptance": (lambda v: v < MIN_ACCEPTANCE, f"{moves} below {MIN_ACCEPTANCE:g}"),
        # Not finite where the grid cannot tell.
        "error": (lambda v: ~(v <= MAX_GRID_ERROR), f"{cells} above {MAX_GRID_ERROR:g} {unit}"),
    }
    flags = []
    for name in schema.in_order(rows.columns):
        for field, values in rows.columns[name].fields.items():
            if field in tests:
                test, text = tests[field]
                flags += _flag(f"{label(name)}: {text}", test(values), rows.indices, about=name)
    return flags


def _column(name: str, values: ArrayLike, length: int | None = None) -> np.ndarray:
    """`values` as float64 [N], or a ValueError that names the argument."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size == 0 or length not in (None, array.size):
        wanted = "[N] with N >= 1" if length is None else f"[{length}], one value a datapoint"
        raise ValueError(f"{name} must have shape {wanted}; got {list(array.shape)}")
    return array
