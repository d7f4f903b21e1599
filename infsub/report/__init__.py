"""Tables and figures from the rows of one or several runs; nothing else is read.

A run is its `rows.jsonl`, `config.json` and, where there is one, `bdmc.jsonl`. All numbers of a run
are over the same datapoints, those where every bound is finite; the others are named. Two runs are
compared (bold: better by more than 2 standard errors) only on the same data, and paired where they
are on the same datapoints.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from infsub import records
from infsub.report import tables
from infsub.report.runs import Run, load_run
from infsub.types import UserError

__all__ = ["join", "report"]


def report(workdir: str) -> None:
    """Writes table.md, .csv, .tex and gaps.png, .pdf of one run into its workdir; prints the table.

    Raises:
      UserError: there are no rows, or they cannot be read, or nothing can be written there.
    """
    _write([load_run(workdir)], Path(workdir))


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


def _write(runs: list[Run], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write_files(runs, out)
    except OSError as error:
        raise UserError(f"{out} cannot be written to ({error.strerror}).") from error


def _write_files(runs: list[Run], out: Path) -> None:
    table = tables.markdown(runs)
    page = "\n".join([*table, "", *tables.footer(runs), ""])
    records.write_bytes(out / "table.md", page.encode())
    records.write_csv(out / "table.csv", tables.csv_rows(runs))
    records.write_bytes(out / "table.tex", tables.latex(runs).encode())
    print("\n".join(table))
    for run in runs:
        for text in (*run.notes, *(flag.text for flag in run.flags)):
            print(f"{f'{run.name}: ' * (len(runs) > 1)}{text}")
    written = "table.md, table.csv, table.tex"
    if importlib.util.find_spec("matplotlib") is None:
        print("No figure: matplotlib is not installed; pip install 'infsub[plots]' and run again.")
    elif any("inference_gap" not in r.quantities or not r.families for r in runs):
        print("No figure: it needs L[q], one L[q*] and IWAE or AIS of every run.")
    else:
        from infsub.report import figures  # matplotlib takes a second to import

        figure = figures.gap_figure(runs)
        for suffix in ("png", "pdf"):
            records.write_bytes(out / f"gaps.{suffix}", figures.encode(figure, suffix))
        written += ", gaps.png, gaps.pdf"
    print(f"Wrote {written} in {out}; table.md lists the settings and the datapoints to look at.")
