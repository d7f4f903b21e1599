"""A run's table, or several runs side by side, as Markdown, CSV and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infsub import files, gaps
from infsub.report.runs import LoadedRun, difference, line_names
from infsub.rows import get, in_order, label

# What a run says of itself in a caption; runs that are joined also say where they differ.
SETTINGS = (
    "data",
    "evaluate",
    "model.imported",
    "model.checkpoint",
    "model.latent_dim",
    "model.posterior",
    "seed",
)
HEAD = ("nats", "mean", "± over datapoints", "± Monte Carlo", "95 % interval")
COLUMNS = (
    "± over datapoints: the standard error, of a gap the paired one; ± Monte Carlo: over random "
    "keys, on these datapoints; 95 % interval: bootstrap over datapoints."
)
ERRORS = (
    "In parentheses, the standard error of the last digits: of a bound over random keys, on these "
    "datapoints; of a gap over datapoints, paired. Bold: better than every other run on the same "
    "data by more than 2 standard errors of the difference."
)

_NUM_UPRIGHT = 3  # columns that a page has room for under their names
_NUM_LISTED = 20  # datapoints to look at of one kind: what is read, not skipped


def in_parentheses(value: float, error: float) -> str:
    """`-88.45(3)`: the error's leading digit (two, if the first is a 1) in units of the last place."""
    if not math.isfinite(error) or error <= 0:
        return f"{value:z.2f}"
    decimals = gaps.decimals(error, fewest=0)
    digits = round(error * 10**decimals)
    return f"{value:z.{decimals}f}({digits})" if digits else f"{value:z.{decimals}f}"


def best_runs(runs: Sequence[LoadedRun]) -> dict[str, set[int]]:
    """For each line, the runs (by position) whose value is to be set in bold.

    A run is the best when its mean is ahead of that of every other run on the same data by more
    than 2 standard errors of the difference: paired on the same datapoints, else added in squares.
    """
    best: dict[str, set[int]] = {}
    for name in [n for n in line_names(runs) if get(n).quantity.kind != "difference"]:
        for i, run in enumerate(runs):
            others = [o for o in runs if o is not run and o.data == run.data]
            others = [o for o in others if name in o.lines]
            if name in run.lines and others and all(_ahead(name, run, o) for o in others):
                best.setdefault(name, set()).add(i)
    return best


def _ahead(name: str, run: LoadedRun, other: LoadedRun) -> bool:
    lead, error = difference(run, name, other, name)
    return (-lead if run.lines[name].kind == "gap" else lead) > gaps.MEAN_ERRORS * error


def markdown(runs: Sequence[LoadedRun]) -> list[str]:
    """The table's rows: all errors of one run, or a column for each of several."""
    if len(runs) == 1:
        head = f"| {' | '.join(HEAD)} |"
        return [
            head,
            "|---|---:|---:|---:|:---:|",
            *(f"| {' | '.join(cells)} |" for cells in text_lines(runs[0].lines)),
        ]
    best = best_runs(runs)
    table = [
        "| nats | " + " | ".join(_cell(run.name) for run in runs) + " |",
        "|---|" + "---:|" * len(runs),
    ]
    for name in line_names(runs):
        cells = []
        for i, run in enumerate(runs):
            line = run.lines.get(name)
            cell = in_parentheses(line.mean.mean, line.error) if line else "–"
            cells.append(f"**{cell}**" if i in best.get(name, ()) else cell)
        table.append(f"| {label(name)} | " + " | ".join(cells) + " |")
    counts = [str(len(run.indices)) for run in runs]
    return [*table, "| datapoints | " + " | ".join(counts) + " |"]


def _cell(text: str) -> str:
    """A name as a cell of a Markdown table."""
    return text.replace("|", r"\|")


def text_lines(lines: Mapping[str, gaps.Line]) -> Iterator[tuple[str, ...]]:
    """Of each line its label and, as COLUMNS says, mean, both errors and the interval, as text."""
    for name in in_order(lines):
        mean = lines[name].mean
        low, high = gaps.bootstrap_interval(lines[name].values)
        digits = gaps.decimals(mean.standard_error)
        yield (
            label(name),
            f"{mean.mean:z.{digits}f}",
            f"{mean.standard_error:.{digits}f}",
            f"{mean.monte_carlo_error:.2g}",
            f"{low:.{digits}f} … {high:.{digits}f}",  # -0.00: 0 is inside
        )


def document(runs: Sequence[LoadedRun], title: str = "") -> str:
    """All that Markdown has to say of runs: the content of table.md."""
    text = [f"# {title}", ""] if title else []
    text += [*markdown(runs), *difference_tables(runs), "", *footer(runs), ""]
    return "\n".join(text)


def table(runs: Sequence[LoadedRun], format: str) -> str:
    """The table as "markdown", "latex" or "csv". Raises ValueError for another format."""
    match format:
        case "markdown":
            return "\n".join(markdown(runs))
        case "latex":
            return latex(runs)
        case "csv":
            return files.csv_text(csv_rows(runs))
    raise ValueError(f"format must be markdown, latex or csv; got {format!r}")


def summary(runs: Sequence[LoadedRun]) -> list[str]:
    """The Markdown table, and under it what a terminal has room for of notes and flags."""
    text = markdown(runs)
    for run in runs:
        for sentence in (*run.verdicts.sentences, *run.notes, *(flag.text for flag in run.flags)):
            text.append(f"{f'{run.name}: ' * (len(runs) > 1)}{sentence}")
    return text


def differences(runs: Sequence[LoadedRun]) -> dict[str, dict[str, gaps.Line]]:
    """{name: {line: run − first run}} of the runs on the first one's very datapoints: paired."""
    first, *others = runs
    found = {}
    for run in others:
        if run.is_paired(first):
            common = [name for name in line_names([first]) if name in run.found.lines]
            found[run.name] = {
                name: gaps.difference(run.lines[name], first.lines[name], first.lines[name].kind)
                for name in common
            }
    return found


def difference_tables(runs: Sequence[LoadedRun]) -> list[str]:
    """`differences` as Markdown, a table each, with both errors of a difference's mean."""
    text = []
    for name, lines in differences(runs).items():
        head = [_cell(f"{name} − {runs[0].name}, paired"), *HEAD[1:]]
        text += ["", f"| {' | '.join(head)} |", "|---|---:|---:|---:|:---:|"]
        text += [f"| {' | '.join(cells)} |" for cells in text_lines(lines)]
    return text


def footer(runs: Sequence[LoadedRun]) -> list[str]:
    """What a reader of the Markdown table must know, and the datapoints to look at."""
    several = len(runs) > 1
    text = [f"Nats a datapoint. {ERRORS if several else COLUMNS}", *settings(runs)]
    told = [(run.name, note) for run in runs for note in (*run.verdicts.sentences, *run.notes)]
    text += [f"{name}: {note}" if several else note for name, note in told]
    flagged = [(run, flag) for run in runs for flag in run.flags]
    if flagged:
        text.append(
            "Datapoints to look at, by index into the data set's split; a run's datapoints.csv says it of "
            "each of them:"
        )
    paragraphs = "\n\n".join(text).splitlines()
    for run, flag in flagged:
        indices = f": {files.first_few(flag.indices, _NUM_LISTED)}" if flag.indices else ""
        paragraphs.append(f"- {f'{run.name}: ' * several}{flag.text}{indices}")
    return paragraphs


def settings(runs: Sequence[LoadedRun]) -> list[str]:
    """Number of points, seed and settings: where each run differs, then what they share."""

    def phrase(run: LoadedRun, shared: bool) -> str:
        fields = {
            name: value
            for name, value in run.settings.items()
            if all(other.settings.get(name) == value for other in runs) == shared
            and (name.startswith(SETTINGS) or not shared)
        }
        return ", ".join(f"{name}={_compact(v)}" for name, v in fields.items() if v != "")

    text = []
    for run in runs:
        differences = phrase(run, shared=False)
        head = f"{run.name}: " if len(runs) > 1 else ""
        text.append(f"{head}{len(run.indices)} datapoints{differences and ', ' + differences}.")
    return [*text, f"Settings: {phrase(runs[0], shared=True)}."]


def _compact(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def csv_rows(runs: Sequence[LoadedRun]) -> list[dict[str, Any]]:
    """A row for each run and line, in nats."""
    rows = []
    for run in runs:
        for name in line_names([run]):
            line = run.lines[name]
            low, high = gaps.bootstrap_interval(line.values)
            rows.append(
                {"run": run.name, "quantity": name, **line.mean._asdict()}
                | {"low_95": low, "high_95": high, "seed": run.settings.get("seed")}
                | {k: run.settings.get(k) for k in ("data.name", "evaluate.split")}
            )
    return rows


def datapoint_rows(run: LoadedRun) -> list[dict[str, Any]]:
    """A row for each datapoint: verdict, what to try and to look at; gaps and bounds with their errors."""
    measured, found = run.measured, run.found
    place = {index: n for n, index in enumerate(found.indices.tolist())}
    gap_names = [n for n in found.lines if get(n).quantity.kind != "bound"]
    labels = measured.labels if measured.labels is not None else [None] * len(measured.indices)
    flagged = found.flagged
    rows = []
    for n, (index, verdict) in enumerate(
        zip(measured.indices.tolist(), run.verdicts.points, strict=True)
    ):
        row = {"index": index, "label": labels[n], "verdict": verdict, "next": verdict.advice}
        row["look_at"] = "; ".join(found.flags[number].of_one for number in flagged.get(index, ()))
        lines = {name: found.lines[name] for name in gap_names} if index in place else {}
        for name in gap_names:
            row[name] = lines[name].values[place[index]] if lines else None
            row[f"{name}_se"] = lines[name].errors[place[index]] if lines else None
        for name in in_order(measured.columns):
            column = measured.columns[name]
            row[name] = column.values[n]
            row |= {f"{name}_{f}": values[n] for f, values in column.fields.items()}
        rows.append(row)
    return rows


def latex(runs: Sequence[LoadedRun], key: str = "gaps") -> str:
    """A booktabs table labelled tab:key, a column a run; no wider than the text, where they are many."""
    best = best_runs(runs)
    body, wide = [], len(runs) > _NUM_UPRIGHT
    heads = [_escape(run.name) for run in runs]
    if wide:
        heads = [rf"\rotatebox{{90}}{{{head}}}" for head in heads]
    for name in line_names(runs):
        cells = [label(name, latex=True)]
        for i, run in enumerate(runs):
            line = run.lines.get(name)
            cell = in_parentheses(line.mean.mean, line.error) if line else "--"
            bold = i in best.get(name, ())
            cells.append(rf"$\mathbf{{{cell}}}$" if bold else f"${cell}$" if line else cell)
        if get(name).quantity.kind == "gap" and r"\midrule" not in body:
            body.append(r"\midrule")
        body.append(" & ".join(cells) + r" \\")
    counts = [str(len(run.indices)) for run in runs]
    caption = f"Where inference loses its nats, averages a datapoint. {ERRORS}"
    beside = [
        *settings(runs),
        *(note for run in runs for note in (*run.verdicts.sentences, *run.notes)),
    ]
    text = "\n".join(
        [
            r"% \usepackage{booktabs,adjustbox}" if wide else r"% \usepackage{booktabs}",
            *(f"% {_escape(line)}" for line in beside),
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escape(caption)}}}",
            rf"\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', key)}}}",
            *([r"\begin{adjustbox}{max width=\textwidth}"] if wide else []),
            rf"\begin{{tabular}}{{l{'r' * len(runs)}}}",
            r"\toprule",
            " & ".join(["nats", *heads]) + r" \\",
            r"\midrule",
            *body,
            r"\midrule",
            " & ".join(["datapoints", *counts]) + r" \\",
            r"\bottomrule",
            r"\end{tabular}",
            *([r"\end{adjustbox}"] if wide else []),
            r"\end{table}",
            "",
        ]
    )
    return text if text.isascii() else f"% for xelatex or lualatex: it has other letters\n{text}"


def _escape(text: str) -> str:
    """Plain text as LaTeX."""
    special = {c: "\\" + c for c in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"}
    special |= {"±": r"$\pm$", "−": "$-$", "\0": r"$\hat p$"}
    return "".join(special.get(c, c) for c in text.replace("p̂", "\0"))  # p̂ is two characters
