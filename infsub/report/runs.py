"""A run's rows, decomposed: what the tables and figures are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infsub import gaps, records
from infsub.config import flatten
from infsub.types import UserError

FAMILIES = {
    "gaussian": "FFG",
    "full_gaussian": "full",
    "planar": "planar",
    "rnvp": "RNVP",
    "auxiliary": "AF",
    "sylvester": "Sylvester",
    "hamiltonian": "HF",
}
# The table's lines in their order, as Markdown and as LaTeX; {} stands for the family.
LINES = {
    "elbo": ("L[q]", r"$\mathcal{L}[q]$"),
    "local_{}": ("L[q*] {}", r"$\mathcal{L}[q^*_{\mathrm{{}}}]$"),
    "iwae": ("IWAE", "IWAE"),
    "ais": ("AIS", "AIS"),
    "log_px": ("log p̂, max of each datapoint", r"$\log\hat p(x)$, max of each datapoint"),
    "log_px_max_of_means": ("log p̂, max of means", r"$\log\hat p(x)$, max of means"),
    "grid": ("log p(x), grid", r"$\log p(x)$, grid"),
    "approximation_gap_{}": ("approximation gap {}", "approximation gap, {}"),
    "covariance_gap": ("covariance gap", "covariance gap"),
    "amortization_gap_{}": ("amortization gap {}", "amortization gap, {}"),
    "gain_{}": ("L[q*] {} − L[q]", r"$\mathcal{L}[q^*_{\mathrm{{}}}] - \mathcal{L}[q]$"),
    "inference_gap": ("inference gap", "inference gap"),
    "certificate": ("BDMC gap of AIS, simulated data", "BDMC gap of AIS, simulated data"),
}
DIAGNOSTICS = ("_ess", "_pareto_k", "_converged", "_error")
MAX_GRID_ERROR = 0.01  # nats
# A bound after so many steps of a family, or of what the encoder gives it alone.
AFTER = re.compile(r"after_(\d+)_(\w+?)(_encoded)?")
MIN_ESS = 4.0  # effective samples of one datapoint, unless config.report.min_ess
MAX_PARETO_K = 0.7  # Vehtari et al. 2024, arXiv 1507.02646, unless config.report.max_pareto_k


class Quantity(NamedTuple):
    """One line of the table: nats a datapoint, `values` [N], and their Monte Carlo `errors` [N].

    A bound is better when larger, a gap when smaller.
    """

    values: np.ndarray
    errors: np.ndarray
    is_gap: bool

    @property
    def mean(self) -> gaps.Mean:
        """Over the datapoints, with both errors."""
        return gaps.mean_over_datapoints(self.values, self.errors)

    @property
    def error(self) -> float:
        """The one to print beside the mean: a gap's is paired, a bound's Monte Carlo."""
        return self.mean.standard_error if self.is_gap else self.mean.monte_carlo_error


class Flag(NamedTuple):
    """Something to know about some datapoints: a sentence, and their dataset indices."""

    text: str
    indices: list[int]


class Run(NamedTuple):
    """What there is to say of one workdir.

    Attributes:
      indices: [N], dataset indices of the datapoints that all numbers are over.
      quantities: the table's lines by name.
      curves: by what was fitted, a family or FAMILY_encoded, its weights held: (n, the nats that
        L[q*] has over the bound after n local steps).
      families: of local inference; the encoder's own first, where it was evaluated. Only the first
        has an amortization gap, for the others L[q*] − L[q] also holds what they gain over it.
      data: what the datapoints are of; only runs on the same data are compared.
      settings: config fields by dotted name.
      flags: datapoints to look at.
      notes: sentences for the caption.
    """

    name: str
    indices: np.ndarray
    quantities: dict[str, Quantity]
    curves: dict[str, list[tuple[int, Quantity]]]
    families: list[str]
    data: str
    settings: dict[str, Any]
    flags: list[Flag]
    notes: list[str]


def load_run(workdir: str, name: str = "") -> Run:
    """The run in `workdir`, its bounds decomposed; `name` is the folder's unless given.

    Raises:
      UserError: a file is missing, empty or torn, or no datapoint is finite in all bounds.
    """
    folder = Path(workdir)
    path = folder / "rows.jsonl"
    by_index = {row["index"]: row for row in _read_rows(path, "index", "elbo")}
    rows = [by_index[i] for i in sorted(by_index)]  # a datapoint evaluated again: the last counts
    document = _read_run(folder)
    config = document["config"]

    keys = dict.fromkeys(key for row in rows for key in row)
    local = [k for k in keys if k.startswith("local_") and f"{k}_se" in keys and "_iwae" not in k]
    wanted = [k for k in ("elbo", *local, "iwae", "ais", "log_px", "grid") if k in keys]
    used = [k for k in keys if k in ("index", *wanted) or k.endswith(("_se", *DIAGNOSTICS))]
    used += [k for k in keys if AFTER.fullmatch(k) and k not in used]
    columns = {key: _column(path, rows, key) for key in used}
    bounds = [k for k in wanted if np.isfinite(columns[k]).any()]
    failed = [k for k in wanted if k not in bounds]
    finite = np.all([np.isfinite(columns[k]) for k in bounds or ["index"]], axis=0)
    if "elbo" not in bounds or not finite.any():
        raise UserError(
            f"{path} has no datapoint whose bounds are all finite; look at the run's samples and "
            "its training curve before its bounds."
        )
    indices = columns["index"].astype(int)
    flags = [Flag(f"{label(key)} is finite nowhere, left out", []) for key in failed]
    for key in bounds:
        bad = ~np.isfinite(columns[key])
        if bad.any():
            text = f"{label(key)} is not finite at {bad.sum()} of {bad.size} datapoints, left out"
            flags.append(Flag(text, indices[bad].tolist()))

    columns = {k: v[finite] for k, v in columns.items() if k not in failed}
    own = config.get("model", {}).get("posterior", {}).get("name", "gaussian")
    families = [k.removeprefix("local_") for k in bounds if k in local]
    families.sort(key=lambda family: family != own)
    quantities, notes = _decompose(columns, families)
    curves, curve_flags = _curves(columns, quantities)
    if families and own not in families:
        notes.append(
            f"The encoder's own family, {FAMILIES.get(own, own)}, was not optimised locally: the "
            f"amortization gap of {FAMILIES.get(families[0], families[0])} compares two families."
        )
    certificate, certificate_notes, certificate_flags = _certificate(folder / "bdmc.jsonl")
    evaluation = records.read_json(folder / "evaluation.json") or {}
    identity = document.get("identified", {}).get("data identity", config.get("data"))
    return Run(
        name=name or folder.resolve().name,
        indices=indices[finite],
        quantities=quantities | certificate,
        curves=curves,
        families=families,
        # Simulated images are themselves what tells them apart.
        data=f"{evaluation.get('images', identity)} {config.get('evaluate', {}).get('split')}",
        settings={k: v for k, v in flatten(config) if not k.startswith(("data.dir", "report"))},
        flags=[
            *flags,
            *_suspects(columns, config.get("report", {})),
            *curve_flags,
            *certificate_flags,
        ],
        notes=notes + certificate_notes,
    )


def line_names(runs: Sequence[Run]) -> list[str]:
    """The names of all runs' quantities, in the order of `LINES`."""
    names = dict.fromkeys(name for run in runs for name in run.quantities)
    return sorted(names, key=lambda name: list(LINES).index(_pattern(name)[0]))


def label(name: str, latex: bool = False) -> str:
    """How a quantity is called in the tables."""
    pattern, family = _pattern(name)
    if not pattern:  # a diagnostic may be of something that is no line of the table
        return name
    return LINES[pattern][latex].replace("{}", FAMILIES.get(family, family))


def _pattern(name: str) -> tuple[str, str]:
    """The key of `LINES` that a quantity's name fits, and its family."""
    for pattern in LINES:
        head, has_family, _ = pattern.partition("{}")
        if name == pattern or (has_family and name.startswith(head)):
            return pattern, name.removeprefix(head)
    return "", name


def _decompose(
    columns: dict[str, np.ndarray], families: list[str]
) -> tuple[dict[str, Quantity], list[str]]:
    """The table's lines from finite columns [N], and what must be said about them."""
    unknown = np.full_like(columns["elbo"], np.nan)
    quantities: dict[str, Quantity] = {}
    notes = []

    def add_gap(name: str, upper: str, lower: str) -> None:
        a, b = quantities[upper], quantities[lower]
        quantities[name] = Quantity(a.values - b.values, np.hypot(a.errors, b.errors), is_gap=True)

    for key in ("elbo", *(f"local_{family}" for family in families), "iwae", "ais"):
        if key in columns:
            quantities[key] = Quantity(columns[key], columns.get(f"{key}_se", unknown), False)
    tight = [quantities[k] for k in ("iwae", "ais") if k in columns]
    if tight:
        first = tight[0].values >= tight[-1].values  # of IWAE and AIS, or of the only one
        quantities["log_px"] = Quantity(
            columns.get("log_px", np.where(first, tight[0].values, tight[-1].values)),
            columns.get("log_px_se", np.where(first, tight[0].errors, tight[-1].errors)),
            is_gap=False,
        )
        quantities["log_px_max_of_means"] = tight[gaps.max_of_means([t.values for t in tight])]
        add_gap("inference_gap", "log_px", "elbo")
        if len(tight) == 2:
            bias = gaps.selection_bias(tight[0].errors, tight[1].errors)
            lift = f"by at most {bias:.2g} nats" if np.isfinite(bias) else "by an unknown amount"
            notes.append(
                "log p̂ is the larger of IWAE and AIS of each datapoint "
                f"(IWAE of {np.sum(first)}, AIS of {np.sum(~first)}); "
                f"choosing between noisy bounds lifts its mean {lift}."
            )
    if "grid" in columns:  # no sample is drawn: no Monte Carlo error
        quantities["grid"] = Quantity(columns["grid"], np.zeros_like(unknown), is_gap=False)
    for family in families:
        name = "amortization_gap" if family == families[0] else "gain"
        add_gap(f"{name}_{family}", f"local_{family}", "elbo")
        if tight:
            add_gap(f"approximation_gap_{family}", "log_px", f"local_{family}")
    if {"gaussian", "full_gaussian"} <= set(families):
        add_gap("covariance_gap", "local_full_gaussian", "local_gaussian")
        notes.append(
            "The approximation gap of FFG is the covariance gap (what a diagonal covariance "
            "misses) plus the approximation gap of full (what no Gaussian has)."
        )
    negative = [
        label(name)
        for name, quantity in quantities.items()
        if quantity.is_gap
        and not name.startswith("gain")
        and quantity.mean.mean < -2 * quantity.mean.standard_error
    ]
    if negative:
        notes.append(
            f"Negative by more than 2 standard errors: {', '.join(negative)}. A bound is looser than "
            "the one below it: optimise longer, take more samples or temperatures, or start AIS "
            "from q* (config.evaluate.ais.start=local)."
        )
    return quantities, notes


def curve_label(fitted: str) -> str:
    """The words for a key of `Run.curves`."""
    family = fitted.removesuffix("_encoded")
    held = "" if fitted == family else ", weights held"
    return f"{FAMILIES.get(family, family)}{held}"


def _curves(
    columns: dict[str, np.ndarray], quantities: dict[str, Quantity]
) -> tuple[dict[str, list[tuple[int, Quantity]]], list[Flag]]:
    """`Run.curves` from the `after_<n>_<family>` columns [N]; a bound has to be finite everywhere."""
    curves: dict[str, list[tuple[int, Quantity]]] = {}
    flags = []
    for key, after in columns.items():
        match = AFTER.fullmatch(key)
        if not match or f"local_{match[2]}" not in quantities:
            continue
        num_steps, family, fitted = int(match[1]), match[2], f"{match[2]}{match[3] or ''}"
        bad = ~np.isfinite(after)
        if bad.any():
            text = f"L[q] {curve_label(fitted)} after {num_steps} steps is not finite at "
            text += f"{bad.sum()} of {bad.size} datapoints, no point of its curve"
            flags.append(Flag(text, columns["index"][bad].astype(int).tolist()))
            continue
        local, error = quantities[f"local_{family}"], columns.get(f"{key}_se", np.nan)
        left = Quantity(local.values - after, np.hypot(local.errors, error), is_gap=True)
        curves.setdefault(fitted, []).append((num_steps, left))
    return {f: sorted(curve, key=lambda point: point[0]) for f, curve in curves.items()}, flags


def _suspects(columns: dict[str, np.ndarray], thresholds: dict[str, Any]) -> list[Flag]:
    """Datapoints whose bounds need a second look, from the diagnostics [N] beside them."""
    min_ess = thresholds.get("min_ess", MIN_ESS)
    max_k = thresholds.get("max_pareto_k", MAX_PARETO_K)
    tests = (
        (lambda v: v < min_ess, f"effective sample size below {min_ess:g}"),
        (lambda v: v > max_k, f"Pareto k above {max_k:g}"),
        (lambda v: v == 0, "local optimisation not converged"),
        (lambda v: v > MAX_GRID_ERROR, f"half the cells differ by over {MAX_GRID_ERROR:g} nats"),
    )
    flags = []
    for key, values in columns.items():
        for suffix, (test, text) in zip(DIAGNOSTICS, tests, strict=True):
            bad = test(values)
            if not key.endswith(suffix) or not bad.any():
                continue
            stem = key.removesuffix(suffix)
            text = f"{label(stem)}: {text} at {bad.sum()} of {bad.size} datapoints"
            if stem in ("iwae", "ais") and "log_px" in columns:
                rests = np.sum(bad & (columns[stem] >= columns["log_px"]))
                text += f" (log p̂ rests on it at {rests} of them)"
            flags.append(Flag(text, columns["index"][bad].astype(int).tolist()))
    return flags


def _certificate(path: Path) -> tuple[dict[str, Quantity], list[str], list[Flag]]:
    """The bidirectional AIS rows, where there are any: a line of the table, a sentence, flags."""
    if not path.exists():
        return {}, [], []
    rows = _read_rows(path, "lower", "upper")
    gap = _column(path, rows, "upper") - _column(path, rows, "lower")
    finite = np.isfinite(gap)
    text = f"the certificate is not finite at {np.sum(~finite)} of {gap.size} simulated datapoints"
    flags = [] if finite.all() else [Flag(text, np.flatnonzero(~finite).tolist())]
    if not finite.any():
        return {}, [], flags
    errors = _column(path, rows, "gap_se")
    certificate = Quantity(gap[finite], errors[finite], is_gap=True)
    mean = certificate.mean
    note = (
        f"On simulated data the AIS bound is within {mean.mean:.2f} ± {mean.standard_error:.2f} "
        f"nats (bidirectional AIS, upper − lower bound, {mean.num_datapoints} datapoints)."
    )
    return {"certificate": certificate}, [note], flags


def _column(path: Path, rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """One key of all rows as [N]; what is missing or null is NaN, and so is reported."""
    try:
        return np.array([np.nan if row.get(key) is None else float(row[key]) for row in rows])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {key} must be a number in every row ({error}).") from error


def _read_rows(path: Path, *required: str) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, all of them but a last one torn by a kill."""
    try:
        rows = records.read_rows(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    if not rows:
        raise UserError(f"{path} is missing or has no complete row; evaluate the run first.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or any(key not in row for key in required):
            wanted = " and ".join(required)
            raise UserError(f"{path}, line {number} must be a JSON object with {wanted}.")
    return rows


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        run = records.read_run(folder)
        return {**run, "config": dict(run["config"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder / 'config.json'}, the run's settings, cannot be read ({error!r}); "
            "give the workdir of a run."
        ) from error
