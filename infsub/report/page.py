"""A run as one page for a browser: the table, the figure, and every datapoint to sort and to filter.

The file holds all that it shows, asks the network for nothing, and runs no script but its own: what
users have named is text in it, never markup (a Content-Security-Policy says so to the browser too).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from infsub import files, gaps, thumbnails
from infsub import rows as schema
from infsub.datapoints import number_of
from infsub.report import svg, tables
from infsub.report.runs import LoadedRun
from infsub.rows import Rows, label

PICTURES = 20_000_000  # characters of pictures in a page: what a phone still loads
_MAX_LABELS = 40  # with a line of their own
_BOUNDS = (schema.ELBO, schema.LOCAL, schema.IWAE, schema.AIS, schema.GRID)
_GAPS = (
    schema.INFERENCE,
    schema.AMORTIZATION,
    schema.APPROXIMATION,
    schema.COVARIANCE,
    schema.GAIN,
)
# A diagnostic's name in a narrow column, and its decimals.
_DIAGNOSTICS = {
    "ess": ("ESS", 1),
    "pareto_k": ("Pareto k", 2),
    "acceptance": ("acceptance", 2),
    "steps": ("steps", 0),
    "converged": ("converged", 0),
}


def write(path: str | Path, run: LoadedRun, xs: Any = None) -> None:
    """Writes the `document` of a run into a file, such as report.html.

    Raises:
      OSError: nothing can be written there.
      ValueError: as `document`.
    """
    files.write_bytes(Path(path), document(run, xs).encode())


def document(run: LoadedRun, xs: Any = None) -> str:
    """The page's HTML.

    Args:
      run: with the rows of all N datapoints, also of those that no mean is over.
      xs: pytree [N, …], the datapoints in the order of the rows; images are drawn, those of the
        largest inference gaps if PICTURES is not enough for all.

    Raises:
      ValueError: xs are not of N datapoints.
    """
    verdict, columns = " ".join(run.verdicts.sentences), _columns(run)
    data = {"columns": columns, "flags": [flag.of_one for flag in run.found.flags]}
    data |= _looks(xs, len(run.measured.indices), _order(columns))
    style, script = _asset("page.css"), _asset("page.js")
    notes, settings = (
        "".join(f"<p>{escape(text)}</p>" for text in texts)
        for texts in (run.notes, tables.settings([run]))
    )
    return Template(_asset("page.html")).substitute(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        title=escape(run.name),
        verdict=f'<p class="verdict">{escape(verdict)}</p>' if verdict else "",
        figure=svg.gap_figure(run.found),
        table=_table(run.lines),
        columns=escape(tables.COLUMNS),
        notes=notes,
        settings=settings,
        flags=_flags(run.found.flags, run.certificate.flags),
        labels=_labels(run.measured, run.found),
        data=_json(data),
    )


def _columns(run: LoadedRun) -> list[dict[str, Any]]:
    """What the page's script shows of every row: {key, name, group, values, …}, column by column."""
    rows, found = run.measured, run.found
    columns = [_column("index", "datapoint", "", rows.indices.tolist())]
    if rows.labels is not None:
        columns.append(_column("label", "label", "", _texts(rows.labels)))
    if run.verdicts.sentences:
        columns.append(_column("verdict", "verdict", "", list(map(str, run.verdicts.points))))
    place = {index: row for row, index in enumerate(rows.indices.tolist())}
    kept = [place[index] for index in found.indices.tolist()]
    by_quantity = sorted(
        (n for n in found.lines if schema.get(n).quantity in _GAPS),
        key=lambda name: _GAPS.index(schema.get(name).quantity),
    )
    for name in by_quantity:
        values, errors = np.full((2, len(rows.indices)), np.nan)
        values[kept], errors[kept] = found.lines[name].values, found.lines[name].errors
        columns.append(_column(name, label(name), "gaps", values, 2, errors))
    flagged = found.flagged
    flags = [flagged.get(index, []) for index in rows.indices.tolist()]
    columns.append(_column("flags", "look at", "", flags))
    measured = [n for n in schema.in_order(rows.columns) if schema.get(n).quantity in _BOUNDS]
    for name in measured:
        column = rows.columns[name]
        columns.append(_column(name, label(name), "bounds", column.values, 2, column.errors))
    for name in measured:
        for field, values in rows.columns[name].fields.items():
            if field in _DIAGNOSTICS:
                short, digits = _DIAGNOSTICS[field]
                text = f"{label(name)} {short}"
                columns.append(_column(f"{name}_{field}", text, "diagnostics", values, digits))
    return columns


def _texts(labels: Iterable[Any]) -> list[str]:
    return ["" if label is None else str(label) for label in labels]


def _column(
    key: str,
    name: str,
    group: str,
    values: Any,
    digits: int | None = None,
    errors: np.ndarray | None = None,
) -> dict[str, Any]:
    found = schema.find(key)
    kind = found.quantity.name.removesuffix("_{family}") if found else key
    column = {"key": key, "name": name, "group": group, "digits": digits, "kind": kind}
    column["values"] = values if digits is None else _numbers(values)
    if errors is not None and np.isfinite(errors).any():
        column["errors"] = _numbers(errors)
    return column


def _numbers(values: np.ndarray) -> list[float | None]:
    """With the digits that can be seen; None where not finite."""
    return [round(v, 4) if np.isfinite(v) else None for v in np.asarray(values, float).tolist()]


def _order(columns: list[dict[str, Any]]) -> np.ndarray:
    """Rows, those with the largest gap first; before them those that have none."""
    gap = next((c for c in columns if c["group"] == "gaps"), None)
    if gap is None:
        return np.arange(len(columns[0]["values"]))
    return np.argsort([-np.inf if v is None else -v for v in gap["values"]], kind="stable")


def _looks(xs: Any, count: int, order: np.ndarray) -> dict[str, Any]:
    """The picture of each datapoint, or words for it, as far as they go."""
    if xs is None:
        return {}
    try:
        number, shown = number_of(xs), thumbnails.pictures(xs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"xs must be a pytree of arrays [{count}, …] ({error})") from error
    if number != count:
        raise ValueError(f"xs must be of {count} datapoints, as the rows; got {number}")
    if shown is None:
        return {"words": thumbnails.words(xs, count)}
    pictures: list[str | None] = [None] * count
    left = PICTURES
    for row in order:
        text = thumbnails.png(shown[row])
        left -= len(text)
        if left < 0:
            break
        pictures[row] = text
    return {"pictures": pictures}


def _table(lines: dict[str, gaps.Line]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in tables.HEAD)
    body = []
    for name, (first, *cells) in zip(schema.in_order(lines), tables.text_lines(lines), strict=True):
        numbers = "".join(f"<td>{escape(text.replace('-', '−'))}</td>" for text in cells)
        kind = schema.get(name).quantity.kind
        body.append(f'<tr class="{kind}"><th scope="row">{escape(first)}</th>{numbers}</tr>')
    return f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"


def _flags(flags: Sequence[gaps.Flag], of_simulated: Sequence[gaps.Flag]) -> str:
    """Sentences; those on datapoints of the page are buttons which show these."""
    items = [
        f'<li><button type="button" class="link" data-flag="{number}">{escape(flag.text)}</button></li>'
        if flag.indices
        else f"<li>{escape(flag.text)}</li>"
        for number, flag in enumerate(flags)
    ]
    items += [f"<li>{escape(flag.text)}</li>" for flag in of_simulated]
    return f"<h2>Datapoints to look at</h2><ul>{''.join(items)}</ul>" if items else ""


def _labels(rows: Rows, found: gaps.Decomposition) -> str:
    """The gaps of each label, the largest first; "" where there are no labels, or too many."""
    if rows.labels is None or not found.has_gaps:
        return ""
    at = dict(zip(rows.indices.tolist(), _texts(rows.labels), strict=True))
    of = np.array([at[index] for index in found.indices.tolist()])
    names = np.unique(of[of != ""])
    if not 1 < len(names) <= _MAX_LABELS:
        return ""
    total = found.lines[schema.INFERENCE.name]
    means = {
        name: gaps.mean_over_datapoints(total.values[of == name], total.errors[of == name])
        for name in names
    }
    widest = max(mean.mean for mean in means.values())
    body = []
    for name, mean in sorted(means.items(), key=lambda item: -item[1].mean):
        shares = {kind: float(line.values[of == name].mean()) for kind, line in found.parts.items()}
        text = gaps.with_error(mean.mean, mean.standard_error).replace("-", "−")
        value, _, error = text.partition(" ")
        small = "" if np.isnan(mean.standard_error) else f" <small>{error}</small>"
        body.append(
            f'<tr><th scope="row"><button type="button" class="link" data-label="{escape(name)}">'
            f"{escape(name)}</button> <small>× {mean.num_datapoints}</small></th>"
            f"<td>{value}{small}</td><td>{svg.bar(shares, widest)}</td></tr>"
        )
    return f"""<section aria-labelledby="by-label"><h2 id="by-label">By label</h2><div class="scroll">
<table class="labels"><thead><tr><th scope="col">label</th>
<th scope="col">{label(schema.INFERENCE.name)}</th><td></td></tr></thead>
<tbody>{"".join(body)}</tbody></table></div></section>"""


def _json(value: Any) -> str:
    """JSON that no HTML parser takes for markup, wherever a name has <, > or &."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return resources.files("infsub.report").joinpath(name).read_text("utf-8")


def _hash(text: str) -> str:
    """How a Content-Security-Policy names an inline style or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
