"""Quantities against a setting or against local steps: a panel each, a line for each kind of run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infsub.gaps import Mean
from infsub.report.figures import STYLE, WIDTH, footer, seeds, write_foot
from infsub.report.runs import LoadedRun
from infsub.rows import CERTIFICATE, family_label, label

# Okabe & Ito's colours again, and markers for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv<"


class Drawn(NamedTuple):
    """What is drawn in a panel: its name, x [M] ascending, and what is there [M], in nats."""

    name: str
    x: list[float]
    means: list[Mean]


def curve_figure(
    runs: Sequence[LoadedRun], x: str, y: Sequence[str], lines: Sequence[str]
) -> Figure:
    """A panel for each quantity of `y`, against the setting `x`; a line for each value of `lines`.

    {family} in a quantity's name stands for the encoder's own.
    """
    panels = {_title(runs, name): _lines(runs, x, name, lines) for name in y}
    foot = footer(runs)
    if CERTIFICATE.name in y:  # not of the datapoints that the rows are of
        certified = [r.lines[CERTIFICATE.name] for r in runs if CERTIFICATE.name in r.lines]
        sizes = {line.values.size for line in certified}
        foot = (
            f"Mean ± standard error over {' or '.join(map(str, sorted(sizes)))} datapoints that each "
            f"model simulates; seed {seeds(runs)}."
        )
    return _figure(panels, _AXES.get(x, x), foot, "nats")


def step_figure(runs: Sequence[LoadedRun]) -> Figure:
    """Nats that L[q*] is still ahead after n steps of local optimisation, for every run's curves."""
    drawn = [
        Drawn(
            run.name if len(run.curves) == 1 else f"{run.name}: {curve.label}",
            [float(n) for n, _ in curve.points],
            [line.mean for _, line in curve.points],
        )
        for run in runs
        for curve in run.curves
    ]
    figure = _figure(
        {"": drawn}, "local steps from the encoder's q", footer(runs), "L[q*] − L, nats"
    )
    axes = figure.axes[0]
    steps = sorted({n for line in drawn for n in line.x})
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xticks(steps, [f"{n:g}" for n in steps])
    axes.minorticks_off()
    axes.set_xlim(-0.3, 1.5 * max(steps))
    axes.axhline(0, color="black", lw=0.6)
    return figure


_AXES = {
    "evaluate.checkpoint": "epochs",
    "evaluate.ais.num_temperatures": "temperatures T",
}


def missing(runs: Sequence[LoadedRun], y: Sequence[str]) -> str:
    """The quantities of `y` in words, where no run has one; else ""."""
    there = any(_of_run(run, name) in run.lines for run in runs for name in y)
    return "" if there else " or ".join(_title(runs, name) for name in y)


def _of_run(run: LoadedRun, name: str) -> str:
    """A quantity's name, {family} being the encoder's own."""
    return name.format(family=run.found.own)


def _title(runs: Sequence[LoadedRun], name: str) -> str:
    return ", ".join(dict.fromkeys(label(_of_run(run, name)) for run in runs))


def _lines(runs: Sequence[LoadedRun], x: str, name: str, fields: Sequence[str]) -> list[Drawn]:
    found: dict[str, list[tuple[float, Mean]]] = {}
    for run in runs:
        if _of_run(run, name) in run.lines:
            kind = ", ".join(family_label(str(run.settings[field])) for field in fields)
            place = float(str(run.settings[x]).removeprefix("epoch_"))
            found.setdefault(kind, []).append((place, run.lines[_of_run(run, name)].mean))
    drawn = []
    for kind, points in found.items():
        points.sort(key=lambda point: point[0])
        drawn.append(Drawn(kind, [p for p, _ in points], [m for _, m in points]))
    return drawn


def _figure(panels: dict[str, list[Drawn]], x_label: str, foot: str, y_label: str) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.7 * len(panels) + 0.5))
        figure.set_layout_engine("constrained")
        rows = np.ravel(np.asarray(figure.subplots(len(panels), 1, sharex=True)))
        for axes, (title, lines) in zip(rows, panels.items(), strict=True):
            _draw(axes, lines)
            axes.set_title(title, size=7, loc="left")
            axes.set_ylabel(y_label)
        rows[0].legend()
        rows[-1].set_xlabel(x_label)
        write_foot(figure, foot)
    return figure


def _draw(axes: Axes, lines: list[Drawn]) -> None:
    for i, line in enumerate(lines):
        style = i % len(COLOURS)
        axes.errorbar(
            line.x,
            [mean.mean for mean in line.means],
            [mean.standard_error for mean in line.means],
            label=line.name,
            color=COLOURS[style],
            marker=MARKERS[style],
            markersize=3,
            lw=0.9,
            capsize=1.5,
        )
    places = sorted({x for line in lines for x in line.x})
    if len(places) > 2 and places[0] > 0 and places[-1] / places[0] >= 8:
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.minorticks_off()
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
