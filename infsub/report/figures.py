"""Pictures of the gaps, at the width of a paper's column."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from infsub import files, gaps
from infsub.report.runs import LoadedRun
from infsub.rows import APPROXIMATION, ELBO, INFERENCE, LOCAL, LOG_PX, label

# Okabe & Ito's colours (jfly.uni-koeln.de/color): told apart with any colour vision, and in grey.
COLORS = {"amortization": "#0072B2", "approximation": "#F0B430", "inference": "#999999"}
STYLE: Any = {
    "font.size": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1,
    "legend.handleheight": 1,
    "legend.borderpad": 0.2,
    "legend.borderaxespad": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # text stays text
}
FARTHEST = 2.0  # left of log p̂ an axis goes for a family, in inference gaps of the widest bar
# Inches: a paper's column, a bar, a line of text; points: of the text, of the small text, of the foot.
WIDTH, BAR, LINE = 3.4, 0.28, 0.11
TEXT, SMALL, FOOT = 7, 6, 5


class GapFigure(Figure):
    """A Figure that a notebook shows by itself, whether or not pyplot was ever imported there."""

    def _repr_png_(self) -> bytes:
        return encode(self, "png")


class _Bars(NamedTuple):
    """The bars of runs on one data set, which share an axis.

    Attributes:
      limits: of the axis, in nats.
      marks, places: of each run, as `_marks` and `_place` give them.
      beyond: of each run, what lies left of the axis, as `_marks` gives it.
      heights: of each run, in inches.
    """

    runs: list[LoadedRun]
    limits: tuple[float, float]
    marks: list[list[tuple[float, str]]]
    beyond: list[list[str]]
    places: list[list[tuple[int, str]]]
    heights: list[float]


def gap_figure(runs: Sequence[LoadedRun]) -> Figure:
    """A bar for each run from L[q] over L[q*] to log p̂, and an axis for each data set.

    Of a run without L[q*] of the encoder's own family the bar is the inference gap, which is not split.

    Marks under a bar show how far the other families get; beside it an arrow points to those that lie
    too far off to leave the bars their room. One run also shows its datapoints.
    """
    name = LINE if len(runs) > 1 else 0.0  # the height of a run's name
    on: dict[str, list[LoadedRun]] = {}
    for run in runs:
        on.setdefault(str(run.settings.get("data.name", "other data")), []).append(run)
    groups = {data: _bars(those, name) for data, those in on.items()}
    heights = [sum(bars.heights) for bars in groups.values()] + [1.0] * (len(runs) == 1)
    with mpl.rc_context(STYLE):
        figure = GapFigure(figsize=(WIDTH, sum(heights) + 0.6 + 0.35 * len(heights)))
        figure.set_layout_engine("constrained")
        rows = np.ravel(np.asarray(figure.subplots(len(heights), 1, height_ratios=heights)))
        for axes, (data, bars) in zip(rows, groups.items(), strict=False):
            _draw_bars(axes, bars, name)
            axes.set_xlabel(f"nats relative to log p̂(x){f', {data}' if len(groups) > 1 else ''}")
        kinds = [kind for kind in COLORS if any(kind in run.found.parts for run in runs)]
        rows[0].legend(
            [Patch(color=COLORS[kind]) for kind in kinds],
            [f"{kind} gap" for kind in kinds],
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(kinds),
        )
        if len(runs) == 1:
            _draw_datapoints(rows[1], runs[0])
        write_foot(figure, footer(runs))
    return figure


def write(figure: Figure, path: Path) -> str:
    """Writes a figure as path.png and path.pdf; the files' names."""
    paths = [Path(f"{path}.{suffix}") for suffix in ("png", "pdf")]
    for file in paths:
        files.write_bytes(file, encode(figure, file.suffix[1:]))
    return ", ".join(file.name for file in paths)


def encode(figure: Figure, suffix: str, dpi: int = 300) -> bytes:
    """A figure as the content of a "png" or "pdf" file; the same figure gives the same bytes."""
    file = io.BytesIO()
    with mpl.rc_context(STYLE):
        metadata = {"CreationDate": None} if suffix == "pdf" else None
        figure.savefig(file, format=suffix, dpi=dpi, metadata=metadata)
    return file.getvalue()


def _bars(runs: list[LoadedRun], name: float) -> _Bars:
    """Where all that is drawn of these runs has room, under names of this height."""
    farthest = -FARTHEST * max(0.1, *(run.lines[INFERENCE.name].mean.mean for run in runs))
    found = [_marks(run, farthest) for run in runs]
    marks, beyond = [near for near, _ in found], [far for _, far in found]
    xs = [x for near in marks for x, _ in near] + [farthest] * any(beyond)
    margin = 0.12 * max(max(xs) - min(xs), 0.1)
    limits = min(xs) - margin, max(xs) + margin
    places = [_place(run_marks, limits) for run_marks in marks]
    heights = [name + BAR + LINE * (max(line for line, _ in place) + 2) for place in places]
    return _Bars(runs, limits, marks, beyond, places, heights)


def _draw_bars(axes: Axes, bars: _Bars, name: float) -> None:
    axes.set_xlim(*bars.limits)
    tops = np.cumsum([0.0, *bars.heights[:-1]])
    for run, marks, beyond, places, top in zip(
        bars.runs, bars.marks, bars.beyond, bars.places, tops, strict=True
    ):
        if name:
            axes.text(bars.limits[0], top + 0.8 * name, run.name, weight="bold", va="bottom")
        _draw_bar(axes, run, top + name, marks, places)
        axes.text(bars.limits[0], top + name, "\n".join(beyond), va="top", size=SMALL)
    axes.set_ylim(sum(bars.heights), -0.3 * LINE)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _draw_bar(
    axes: Axes,
    run: LoadedRun,
    top: float,
    marks: list[tuple[float, str]],
    places: list[tuple[int, str]],
) -> None:
    """Nats relative to log p̂(x): what the encoder loses, then what its family cannot reach."""
    inference, parts = run.lines[INFERENCE.name].mean, run.found.parts
    left, per_nat = -inference.mean, _per_nat(axes.get_xlim())
    for kind, line in parts.items():
        gap, ink = line.mean, "white" if kind == "amortization" else "black"
        # Of a number for which the bar has no room.
        x, align = (left - 2 / per_nat, "right") if ink == "white" else (2 / per_nat, "left")
        axes.barh(top, gap.mean, left=left, height=BAR, align="edge", color=COLORS[kind])
        room = per_nat * abs(gap.mean)
        number = gaps.with_error(gap.mean, gap.standard_error).replace("-", "−")
        mean = number.partition(" ")[0]
        text, size = (number, TEXT) if _points(number, TEXT) < room else (mean, SMALL)
        if _points(text, size) < room:
            x, align = left + gap.mean / 2, "center"
        else:
            ink = "black"
        axes.text(x, top + 0.4 * BAR, text, color=ink, size=size, ha=align, va="center")
        left += gap.mean
    for gap in (inference, *(line.mean for line in [*parts.values()][1:])):
        axes.errorbar(
            -gap.mean, top + 0.8 * BAR, xerr=gap.standard_error, color="black", lw=0.8, capsize=1.5
        )
    for (x, text), (line, align) in zip(marks, places, strict=True):
        bottom = top + BAR + LINE * (line + 0.3)
        axes.plot([x, x], [top + BAR, bottom], color="black", lw=0.6)
        axes.text(x, bottom, text, ha=align, va="top", size=SMALL)


def _marks(run: LoadedRun, farthest: float) -> tuple[list[tuple[float, str]], list[str]]:
    """(nats relative to log p̂, what lies there), from the left; and what lies left of `farthest`."""
    mean = {name: line.mean.mean for name, line in run.lines.items()}
    marks = [
        (-mean[INFERENCE.name], f"{ELBO.label} {mean[ELBO.name]:.1f}"),
        (0.0, f"{LOG_PX.label} {mean[LOG_PX.name]:.1f}"),
    ]
    beyond = []
    for family in run.families:
        x, text = -mean[APPROXIMATION.of(family)], label(LOCAL.of(family))
        value = f" {mean[LOCAL.of(family)]:.1f}"
        if x < farthest:
            beyond.append(f"← {text}{value}".replace("-", "−"))
        else:
            marks.append((x, text + value * (family == run.families[0])))
    return sorted((x, text.replace("-", "−")) for x, text in marks), beyond


def _place(marks: list[tuple[float, str]], limits: tuple[float, float]) -> list[tuple[int, str]]:
    """Each mark's line under the bar and its text's alignment: no text meets another, or a mark.

    A text stands under its mark, or left of it where the next mark is too near.
    """
    ends: list[float] = []  # where each line is free from, in points
    places: list[tuple[int, str]] = []
    xs = [x * _per_nat(limits) for x, _ in marks]
    for n, (x, (_, text)) in enumerate(zip(xs, marks, strict=True)):
        width = _points(text, SMALL)
        aside = n + 1 < len(xs) and xs[n + 1] < x + width / 2 + 2
        left = x - (width if aside else width / 2)
        # Not above a mark that would run through the text.
        lowest = max(
            (place[0] for place, k in zip(places, xs, strict=False) if k > left), default=0
        )
        line = next((i for i, end in enumerate(ends) if i >= lowest and end < left), len(ends))
        ends[line : line + 1] = [left + width + 3]
        places.append((line, "right" if aside else "center"))
    return places


def _per_nat(limits: tuple[float, float]) -> float:
    """Points for each nat of an x axis with these limits; 0.92 of the width is inside the axes."""
    return 0.92 * 72 * WIDTH / (limits[1] - limits[0])


def _points(text: str, size: float) -> float:
    """The width of a text, roughly."""
    return 0.55 * size * len(text)


def _draw_datapoints(axes: Axes, run: LoadedRun) -> None:
    """Every datapoint's gaps stacked, in the order of their sum."""
    inference = run.lines[INFERENCE.name].values
    order = np.argsort(-inference)
    edges, bottom = np.arange(len(order) + 1), np.zeros_like(inference)
    for kind, line in run.found.parts.items():
        top = bottom + line.values
        axes.stairs(top[order], edges, baseline=bottom[order], fill=True, color=COLORS[kind])
        bottom = top
    axes.axhline(0, color="black", lw=0.6)
    axes.set_xlim(0, len(order))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"each of the {len(order)} datapoints, largest inference gap first")
    axes.set_ylabel("nats lost")


def seeds(runs: Sequence[LoadedRun]) -> str:
    """The seeds of all runs, as a figure names them; "" where none is known."""
    return ", ".join(sorted({str(r.settings["seed"]) for r in runs if "seed" in r.settings}))


def write_foot(figure: Figure, text: str) -> None:
    """A small text at the foot of a figure, in as many lines as its width asks for."""
    lines = textwrap.wrap(text, int(figure.get_figwidth() * 72 / _points("m", FOOT)))
    figure.supxlabel("\n".join(lines), fontsize=FOOT, color="0.35", x=0.01, ha="left")


def footer(runs: Sequence[LoadedRun]) -> str:
    """What every figure says of its numbers."""
    counts = " or ".join(map(str, sorted({len(run.indices) for run in runs})))
    known = [run.settings for run in runs if "data.name" in run.settings]
    on = {f"{s['data.name']} {s.get('evaluate.split', '')}".strip() for s in known}
    of, by = f" of {', '.join(sorted(on))}" if on else "", seeds(runs)
    return f"Mean ± paired standard error over {counts} datapoints{of}{by and f'; seed {by}'}."
