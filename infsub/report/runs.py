"""A run's files, decomposed: what the tables and figures are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from infsub import files, gaps, records, rows, shards
from infsub.config import flatten
from infsub.types import UserError
from infsub.verdicts import Verdicts, judge

_THRESHOLDS = ("min_ess", "max_pareto_k")  # of config.report, for flags


class LoadedRun(NamedTuple):
    """What there is to say of one evaluation of a model.

    Attributes:
      measured: the rows of all datapoints.
      found: what the rows say, of the N datapoints where every bound is finite.
      certificate: what simulated datapoints say.
      data: what the datapoints are of; only runs on the same data are compared.
      verdicts: what is to blame for the gaps, of the model and of every datapoint.
      settings: config fields by dotted name.
      missing: what of the evaluation is not done yet; "" of a whole one.
    """

    name: str
    measured: rows.Rows
    found: gaps.Decomposition
    certificate: gaps.Certificate
    verdicts: Verdicts
    data: str
    settings: dict[str, Any]
    missing: str = ""

    @property
    def indices(self) -> np.ndarray:
        """[N], dataset indices of the datapoints that all lines are over."""
        return self.found.indices

    @property
    def lines(self) -> dict[str, gaps.Line]:
        """Of the table, by name; with the certificate's, which is over simulated datapoints."""
        line = self.certificate.line
        return self.found.lines | ({} if line is None else {rows.CERTIFICATE.name: line})

    @property
    def curves(self) -> list[gaps.Curve]:
        """What local steps leave to gain."""
        return self.found.curves

    @property
    def families(self) -> list[str]:
        """Of local inference; the encoder's own first, where it was evaluated."""
        return self.found.families

    @property
    def flags(self) -> list[gaps.Flag]:
        """Datapoints to look at."""
        return self.found.flags + self.certificate.flags

    @property
    def notes(self) -> list[str]:
        """Sentences for the caption, below the verdict's."""
        lacking = [f"Not all is evaluated: {self.missing}."] if self.missing else []
        return self.found.notes + self.certificate.notes + lacking

    def is_paired(self, other: LoadedRun) -> bool:
        """Whether the lines of both are over the very same datapoints, in one order."""
        return self.data == other.data and np.array_equal(self.indices, other.indices)


def difference(a: LoadedRun, name_a: str, b: LoadedRun, name_b: str) -> tuple[float, float]:
    """The mean of the line `name_a` of one run − that of `name_b` of another, and its standard error.

    The error over datapoints: paired where they are the same, else the errors add in squares.
    """
    first, second = a.lines[name_a], b.lines[name_b]
    if a.is_paired(b):
        mean = gaps.difference(first, second).mean
        return mean.mean, mean.standard_error
    error = math.hypot(first.mean.standard_error, second.mean.standard_error)
    return first.mean.mean - second.mean.mean, error


def decomposed(
    name: str,
    measured: Sequence[Mapping[str, Any]],
    certified: Sequence[Mapping[str, Any]],
    document: Mapping[str, Any],
) -> LoadedRun:
    """The gaps of JSON rows of bounds, and of simulated datapoints where there are any.

    document: the "config", what the rows are "data" of, and what is "missing" of them.

    Raises:
      ValueError: rows that are none of infsub's, or no datapoint is finite in all bounds.
    """
    parsed, config = rows.parse(measured, rows.ELBO), document["config"]
    own = config.get("model", {}).get("posterior", {}).get("name", "gaussian")
    thresholds = {k: v for k, v in config.get("report", {}).items() if k in _THRESHOLDS}
    certificate = gaps.Certificate(None, [], [])
    if certified:
        certificate = gaps.certify(rows.parse(certified, rows.LOWER, rows.UPPER))
    settings = {k: v for k, v in flatten(config) if not k.startswith(("data.dir", "report"))}
    found = gaps.decompose(parsed, own, **thresholds)
    judged = judge(parsed, found, certificate)
    data, missing = document["data"], document["missing"]
    return LoadedRun(name, parsed, found, certificate, judged, data, settings, missing)


def load_run(
    workdir: str | Path, name: str = "", thresholds: Mapping[str, float] = MappingProxyType({})
) -> LoadedRun:
    """The run in `workdir`, its bounds decomposed; `name` and config.report are its own unless given.

    Raises:
      UserError: a file is missing, empty or torn, or no datapoint is finite in all bounds.
    """
    folder = Path(workdir)
    measured, certified, document = read_folder(folder)
    own = document["config"].get("report", {})
    document["config"] |= {"report": {**own, **thresholds}}
    name = name or folder.resolve().name
    try:
        return decomposed(name, measured, certified, document)
    except ValueError as error:
        raise UserError(
            f"{folder / 'rows.jsonl'} has {error}; look at the run's samples and its training curve "
            "before its bounds."
        ) from error


def read_folder(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The rows in a run's folder, those of simulated datapoints, and its config.json.

    In the last is what the rows are "data" of, and what of an evaluation is "missing".

    Raises:
      UserError: a file is missing, empty or torn.
    """
    measured = _read_rows(folder, "rows", rows.ELBO)
    document = records.read_run(folder, "config")
    certified = []
    if shards.paths(folder, "bdmc"):
        certified = _read_rows(folder, "bdmc", rows.LOWER, rows.UPPER)
    evaluation = files.read_json(folder / "evaluation.json") or {}
    settings = dict(flatten(document["config"]))
    own = settings.get("model.posterior.name", "gaussian")
    thresholds = {k: v for k, v in settings.items() if k.startswith("report.")}
    if not isinstance(own, str) or files.wrong_fields(thresholds, dict.fromkeys(thresholds, float)):
        raise UserError(
            f"{folder / 'config.json'} has model.posterior.name={own!r} and {thresholds}: mend it."
        )
    identified = document.get("identified")
    known = identified if isinstance(identified, dict) else {}
    identity = known.get("data identity", document["config"].get("data"))
    # Simulated images and a user's own data are themselves what tells them apart.
    split = "" if _has_own_data(document) else f" {settings.get('evaluate.split')}"
    data = f"{evaluation.get(records.DATA, identity)}{split}"
    document["config"] = _told(document, evaluation)
    return measured, certified, {"data": data, "missing": records.missing(folder)} | document


def _has_own_data(document: dict[str, Any]) -> bool:
    """Whether the rows are of data that an imported model brought."""
    return document.get("image_shape") == [0, 0, 0]


def _told(document: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The config, of an imported model as it was found to be: its encoder's family, and whose data."""
    config = document["config"]
    if records.OWN in evaluation:
        config = config | {
            "model": config["model"] | {"posterior": {"name": evaluation[records.OWN]}}
        }
    if _has_own_data(document):
        evaluate = {name: v for name, v in config["evaluate"].items() if name != "split"}
        config = {name: v for name, v in config.items() if name != "data"} | {"evaluate": evaluate}
    return config


def read_shown(folder: Path, indices: np.ndarray) -> np.ndarray | None:
    """What there is to show of the datapoints `indices`: images uint8 or words [N]; None of them all.

    Raises:
      UserError: the file is torn.
    """
    kept = files.read_npz(folder / records.IMAGES, records.SHOWN, records.WORDS)
    order = np.argsort(kept.get("indices", []))
    if not np.array_equal(np.asarray(kept.get("indices", []))[order], np.sort(indices)):
        return None
    shown = kept["images"] if "images" in kept else kept["words"]
    return shown[order][np.argsort(np.argsort(indices))]


def line_names(runs: Sequence[LoadedRun]) -> list[str]:
    """The names of all runs' lines, in the table's order."""
    return rows.in_order(name for run in runs for name in run.lines)


def _read_rows(folder: Path, stem: str, *required: rows.Quantity) -> list[dict[str, Any]]:
    """The rows of all shards of an evaluation, all of them but last ones torn by a kill."""
    found, path = shards.read(folder, stem), folder / f"{stem}.jsonl"
    if not found:
        raise UserError(f"{path} is missing or has no complete row; evaluate the run first.")
    try:
        rows.parse(found, *required)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
    return found
