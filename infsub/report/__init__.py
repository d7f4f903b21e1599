"""Tables, figures and a page from the rows of one or several runs; nothing is computed anew.

A run is its `rows.jsonl`, `config.json` and, where there is one, `bdmc.jsonl`. All numbers of a run
are over the same datapoints, those where every bound is finite; the others are named. Two runs are
compared (bold: better by more than 2 standard errors) only on the same data, and paired where they
are on the same datapoints.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from infsub import files, records
from infsub.report import page, tables
from infsub.report.runs import LoadedRun, load_run, read_shown
from infsub.types import UserError

__all__ = ["bars", "draw", "experiment", "join", "report"]

_NO_MATPLOTLIB = "matplotlib is not installed: pip install 'infsub[plots]'"
_NO_GAPS = "it needs L[q], one L[q*] and IWAE or AIS of every run"
_NAMES = {"bars": "gaps", "steps": "curves"}  # of a kind of figure's files


def report(workdir: str | Path, thresholds: Mapping[str, float] = MappingProxyType({})) -> None:
    """Writes table.md, .csv, .tex, gaps.png, .pdf and report.html of one run into its workdir.

    Prints the table. Where evaluate.grid has left densities, posteriors.png and .pdf too.

    Args:
      workdir: of the run.
      thresholds: config.report, for flags; the run's own where there are none.

    Raises:
      UserError: there are no rows, or they cannot be read, or nothing can be written there.
    """
    folder = Path(workdir)
    drawn = ["bars", *(["posteriors"] if (folder / records.POSTERIORS).exists() else [])]
    run = load_run(folder, thresholds=thresholds)
    _write([run], folder, [{"kind": kind} for kind in drawn], {"": folder})


def join(workdirs: Sequence[str], out: str) -> dict[str, str]:
    """The same files for several runs side by side, in the folder `out`; a run is DIR or NAME=DIR.

    Returns:
      {run that was left out: why}.

    Raises:
      UserError: as `report` of all of them, or two runs have one name.
    """
    plain = [Path(run).is_dir() or "=" not in run for run in workdirs]
    pairs = [("", r) if p else r.partition("=")[::2] for r, p in zip(workdirs, plain, strict=True)]
    names = [name or Path(folder).resolve().name for name, folder in pairs]
    if len(set(names)) < len(names):
        raise UserError(
            f"--workdirs has runs of the same name ({', '.join(names)}); write NAME=DIR for each."
        )
    runs, left_out = [], {}
    for name, (_, folder) in zip(names, pairs, strict=True):
        try:
            runs.append(load_run(folder, name))
        except UserError as error:
            left_out[name] = str(error)
    if not runs:
        raise UserError("\n".join(left_out.values()))
    _write(runs, Path(out), [{"kind": "bars"}])
    return left_out


def experiment(
    title: str,
    figure: Mapping[str, Any] | None,
    evaluations: Mapping[str, Path],
    out: Path,
    thresholds: Mapping[str, float] = MappingProxyType({}),
    num_cells: int = 0,
) -> dict[str, str]:
    """The table of an experiment's cells under its question, and the figure that answers it.

    Cells whose rows give no line of it are left out.

    Args:
      title: first line of table.md, which names the cells where they are fewer than num_cells.
      figure: its kind and that kind's arguments, see infsub.experiments.experiment; None: only the
        table, and nothing is printed.
      evaluations: {cell: folder of its rows}.
      out: folder to write into.
      thresholds: as in `report`.

    Returns:
      {cell that was left out: why}.

    Raises:
      UserError: nothing can be written there.
    """
    runs, folders, left_out = [], {}, {}
    for name, folder in evaluations.items():
        try:
            runs.append(load_run(folder, name, thresholds))
            folders[runs[-1].name] = folder
        except UserError as error:
            left_out[name] = str(error)
    if runs:
        if len(runs) < num_cells:
            title += f": {len(runs)} of {num_cells} cells, {', '.join(folders)}"
        _write(runs, out, [figure] if figure else [], folders, title)
    return left_out


def _write(
    runs: list[LoadedRun],
    out: Path,
    figures: Sequence[Mapping[str, Any]],
    folders: Mapping[str, Path] = MappingProxyType({}),
    title: str = "",
) -> None:
    """The tables and figures of runs; prints the table where there is a figure."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        files.write_bytes(out / "table.md", tables.document(runs, title).encode())
        files.write_csv(out / "table.csv", tables.csv_rows(runs))
        files.write_bytes(out / "table.tex", tables.latex(runs, out.resolve().name).encode())
        # Beside the rows of each: of runs that are joined there are no folders here.
        for run, folder in zip(runs, folders.values(), strict=False):
            files.write_csv(folder / "datapoints.csv", tables.datapoint_rows(run))
        if not figures:
            return
        drawn = [_draw(runs, out, dict(figure), folders) for figure in figures]
        if folders.get("") == out:  # of one run, in its own folder
            page.write(out / "report.html", runs[0], read_shown(out, runs[0].measured.indices))
            drawn.append("report.html")
    except OSError as error:
        if files.is_full(error):
            raise
        raise UserError(f"{out} cannot be written to ({error.strerror}).") from error
    print("\n".join(tables.summary(runs)))
    written = ", ".join(["table.md, table.csv, table.tex", *drawn])
    print(f"Wrote {written} in {out}; table.md lists the settings and the datapoints to look at.")


def _draw(
    runs: list[LoadedRun], out: Path, figure: Mapping[str, Any], folders: Mapping[str, Path]
) -> str:
    """Writes a figure as PNG and PDF; the names of the files, or a sentence why there are none."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"no figure ({_NO_MATPLOTLIB})"
    from infsub.report import figures  # matplotlib takes a second to import

    drawn = draw(runs, figure, folders)
    if isinstance(drawn, str):
        return drawn
    kind = str(figure["kind"])
    return figures.write(drawn, out / _NAMES.get(kind, kind))


def draw(runs: Sequence[LoadedRun], figure: Mapping[str, Any], folders: Mapping[str, Path]) -> Any:
    """A figure of runs, as matplotlib's Figure; or a sentence why there is none.

    Args:
      runs: what is drawn.
      figure: its kind and that kind's arguments, see infsub.experiments.experiment.
      folders: {run: folder of its rows}.
    """
    from infsub.report import curves, figures, pictures

    options = dict(figure)
    match options.pop("kind"):
        case "bars" if not all(run.found.has_gaps for run in runs):
            return f"no figure ({_NO_GAPS})"
        case "bars":
            return figures.gap_figure(runs)
        case "steps" if not any(run.curves for run in runs):
            return "no figure (it needs config.evaluate.local.curve, and L[q*] of the same family)"
        case "steps":
            return curves.step_figure(runs)
        case "posteriors":
            densities = {
                cell: files.read_npz(
                    folder / records.POSTERIORS, records.DENSITIES, records.BARE_DENSITIES
                )
                for cell, folder in folders.items()
            }
            densities = {cell: arrays for cell, arrays in densities.items() if arrays}
            if not densities:
                return "no figure (it needs config.evaluate.grid, and points with finite bounds)"
            return pictures.picture_figure(densities, figures.seeds(runs))
        case _ if missing := curves.missing(runs, options["y"]):
            return f"no figure (no run has {missing})"
        case _:
            return curves.curve_figure(runs, **options)


def bars(runs: Sequence[LoadedRun]) -> Any:
    """The figure of the gaps, a matplotlib Figure.

    Raises:
      ValueError: a run has no gaps.
      ImportError: matplotlib is not installed.
    """
    if not all(run.found.has_gaps for run in runs):
        raise ValueError(f"no figure: {_NO_GAPS}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(_NO_MATPLOTLIB)
    from infsub.report import figures

    return figures.gap_figure(runs)
