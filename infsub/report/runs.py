"""A run's files, decomposed: what the tables and figures are made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infsub import files, gaps, records, rows, shards
from infsub.config import flatten
from infsub.types import UserError

_THRESHOLDS = ("min_ess", "max_pareto_k")  # of config.report, for flags


class LoadedRun(NamedTuple):
    """What there is to say of one workdir.

    Attributes:
      indices: [N], dataset indices of the datapoints that all lines are over.
      lines: of the table, by name; with the certificate's, which is over simulated datapoints.
      curves: what local steps leave to gain.
      families: of local inference; the encoder's own first, where it was evaluated.
      data: what the datapoints are of; only runs on the same data are compared.
      settings: config fields by dotted name.
      flags: datapoints to look at.
      notes: sentences for the caption.
    """

    name: str
    indices: np.ndarray
    lines: dict[str, gaps.Line]
    curves: list[gaps.Curve]
    families: list[str]
    data: str
    settings: dict[str, Any]
    flags: list[gaps.Flag]
    notes: list[str]


def load_run(workdir: str, name: str = "") -> LoadedRun:
    """The run in `workdir`, its bounds decomposed; `name` is the folder's unless given.

    Raises:
      UserError: a file is missing, empty or torn, or no datapoint is finite in all bounds.
    """
    folder = Path(workdir)
    measured = _read_rows(folder, "rows", rows.ELBO)
    document = records.read_run(folder, needed=("config",))
    config = document["config"]
    own = config.get("model", {}).get("posterior", {}).get("name", "gaussian")
    thresholds = {k: v for k, v in config.get("report", {}).items() if k in _THRESHOLDS}
    try:
        found = gaps.decompose(measured, own, **thresholds)
    except ValueError as error:
        raise UserError(
            f"{folder / 'rows.jsonl'} has {error}; look at the run's samples and its training curve "
            "before its bounds."
        ) from error
    certificate = gaps.Certificate(None, [], [])
    if shards.paths(folder, "bdmc"):
        certificate = gaps.certify(_read_rows(folder, "bdmc", rows.LOWER, rows.UPPER))
    lines = found.lines
    if certificate.line is not None:
        lines = lines | {rows.CERTIFICATE.name: certificate.line}
    evaluation = files.read_json(folder / "evaluation.json") or {}
    identity = document.get("identified", {}).get("data identity", config.get("data"))
    missing = records.missing(folder)
    lacking = [f"Not all is evaluated: {missing}."] if missing else []
    return LoadedRun(
        name=name or folder.resolve().name,
        indices=found.indices,
        lines=lines,
        curves=found.curves,
        families=found.families,
        # Simulated images are themselves what tells them apart.
        data=f"{evaluation.get('images', identity)} {config.get('evaluate', {}).get('split')}",
        settings={k: v for k, v in flatten(config) if not k.startswith(("data.dir", "report"))},
        flags=found.flags + certificate.flags,
        notes=found.notes + certificate.notes + lacking,
    )


def line_names(runs: Sequence[LoadedRun]) -> list[str]:
    """The names of all runs' lines, in the table's order."""
    return rows.in_order(name for run in runs for name in run.lines)


def _read_rows(folder: Path, stem: str, *required: rows.Quantity) -> rows.Rows:
    """The rows of all shards of an evaluation, all of them but last ones torn by a kill."""
    found, path = shards.read(folder, stem), folder / f"{stem}.jsonl"
    if not found:
        raise UserError(f"{path} is missing or has no complete row; evaluate the run first.")
    try:
        return rows.parse(found, *required)
    except ValueError as error:
        raise UserError(f"{path}: {error}.") from error
