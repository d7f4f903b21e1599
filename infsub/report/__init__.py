"""Tables and figures from the rows of one or several runs; nothing else is read.

A run is its `rows.jsonl`, `config.json` and, where there is one, `bdmc.jsonl`. All numbers of a run
are over the same datapoints, those where every bound is finite; the others are named. Two runs are
compared (bold: better by more than 2 standard errors) only on the same data, and paired where they
are on the same datapoints.
"""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from infsub import records
from infsub.report import tables
from infsub.report.runs import Run, load_run
from infsub.types import UserError

__all__ = ["experiment", "join", "report"]


def report(workdir: str) -> None:
    """Writes table.md, .csv, .tex and gaps.png, .pdf of one run into its workdir; prints the table.

    Where evaluate.grid has left densities, posteriors.png and .pdf too.

    Raises:
      UserError: there are no rows, or they cannot be read, or nothing can be written there.
    """
    folder = Path(workdir)
    _write([load_run(workdir)], folder, densities={"posteriors": folder})


def join(workdirs: Sequence[str], out: str) -> None:
    """The same files for several runs side by side, in the folder `out`; a run is DIR or NAME=DIR.

    Raises:
      UserError: as `report`, or two runs have one name.
    """
    plain = [Path(run).is_dir() or "=" not in run for run in workdirs]
    pairs = [("", r) if p else r.partition("=")[::2] for r, p in zip(workdirs, plain, strict=True)]
    names = [name or Path(folder).resolve().name for name, folder in pairs]
    if len(set(names)) < len(names):
        raise UserError(
            f"--workdirs has runs of the same name ({', '.join(names)}); write NAME=DIR for each."
        )
    runs = [load_run(folder, name) for name, (_, folder) in zip(names, pairs, strict=True)]
    _write(runs, Path(out))


def experiment(
    title: str, figure: Mapping[str, Any] | None, evaluations: Mapping[str, Path], out: Path
) -> None:
    """The table of an experiment's cells under its question, and the figure that answers it.

    Where evaluate.grid has left densities, posteriors_CELL.png and .pdf too.

    Args:
      title: first line of table.md.
      figure: its kind and that kind's arguments, see infsub.experiments.experiment; None: only the
        table, and nothing is printed.
      evaluations: {cell: folder of its rows}.
      out: folder to write into.

    Raises:
      UserError: as `report`.
    """
    runs = [load_run(str(folder), name) for name, folder in evaluations.items()]
    densities = {f"posteriors_{name}": folder for name, folder in evaluations.items()}
    _write(runs, out, title, figure, densities)


def _write(
    runs: list[Run],
    out: Path,
    title: str = "",
    figure: Mapping[str, Any] | None = MappingProxyType({"kind": "bars"}),
    densities: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    table = tables.markdown(runs)
    page = [f"# {title}", ""] if title else []
    page += [*table, "", *tables.footer(runs), ""]
    try:
        out.mkdir(parents=True, exist_ok=True)
        records.write_bytes(out / "table.md", "\n".join(page).encode())
        records.write_csv(out / "table.csv", tables.csv_rows(runs))
        records.write_bytes(out / "table.tex", tables.latex(runs).encode())
        if figure is None:
            return
        drawn = [_draw(runs, out, dict(figure))]
        drawn += [_draw_posteriors(folder, out / name) for name, folder in densities.items()]
    except OSError as error:
        raise UserError(f"{out} cannot be written to ({error.strerror}).") from error
    print("\n".join(table))
    for run in runs:
        for text in (*run.notes, *(flag.text for flag in run.flags)):
            print(f"{f'{run.name}: ' * (len(runs) > 1)}{text}")
    written = ", ".join(["table.md, table.csv, table.tex", *filter(None, drawn)])
    print(f"Wrote {written} in {out}; table.md lists the settings and the datapoints to look at.")


def _draw(runs: list[Run], out: Path, figure: dict[str, Any]) -> str:
    """Writes a figure as PNG and PDF; the names of the files, or a sentence why there are none."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no figure (matplotlib is not installed: pip install 'infsub[plots]')"
    from infsub.report import curves, figures  # matplotlib takes a second to import

    name = "gaps"
    match figure.pop("kind"):
        case "bars" if any("inference_gap" not in r.quantities or not r.families for r in runs):
            return "no figure (it needs L[q], one L[q*] and IWAE or AIS of every run)"
        case "bars":
            drawn = figures.gap_figure(runs)
        case "steps" if not any(run.curves for run in runs):
            return "no figure (it needs config.evaluate.local.curve, and L[q*] of the same family)"
        case "steps":
            name, drawn = "curves", curves.step_figure(runs)
        case _:
            name, drawn = "curves", curves.curve_figure(runs, **figure)
    return figures.write(drawn, out / name)


def _draw_posteriors(folder: Path, out: Path) -> str:
    """Draws a folder's densities, where there are some, as out.png and .pdf; the files' names."""
    path = folder / "posteriors.npz"
    if importlib.util.find_spec("matplotlib") is None or not path.exists():
        return ""
    from infsub.report import figures, pictures

    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            drawn = pictures.picture_figure(dict(arrays))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is torn ({error}): remove it and evaluate the run again."
        ) from error
    return figures.write(drawn, out)
