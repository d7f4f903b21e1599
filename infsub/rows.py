"""The schema of rows: what every column is called, what it is, and how it is printed.

A row is what is known of one datapoint: a JSON object of named scalars. A quantity has its value in
nats under its NAME, and beside it, under NAME_FIELD, what is known about that value. Rows are built
and read here alone, and these names are spelt nowhere else.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from infsub.posteriors import FAMILIES
from infsub.types import Array, Estimate

INDEX, LABEL = "index", "label"  # of a datapoint in its split, and its class


class Field(NamedTuple):
    """What is known about a quantity's value at one datapoint.

    Attributes:
      meaning: in words.
      unit: "nats" of an error; "" of a diagnostic, which counts or compares.
    """

    meaning: str
    unit: Literal["nats", ""]


FIELDS = {
    "se": Field("Monte Carlo standard error", "nats"),
    "error": Field("difference of half the cells", "nats"),
    "ess": Field("effective sample size", ""),
    "pareto_k": Field("Pareto k", ""),
    "acceptance": Field("mean acceptance", ""),
    "steps": Field("steps taken", ""),
    "converged": Field("converged", ""),
}


class Quantity(NamedTuple):
    """One kind of number in nats, a datapoint each.

    Attributes:
      name: of its column and of its line in a table; {family} stands for a family of posteriors,
        {steps} for a number.
      kind: "bound" on log p(x), the larger the better; "gap", nats lost, the smaller the better and
        not negative; "difference", of which neither holds.
      label: in plain text.
      latex: in a LaTeX table; "" is the label.
      fields: what stands beside it in a row; none: it is made from others, and in no row.
    """

    name: str
    kind: Literal["bound", "gap", "difference"]
    label: str
    latex: str = ""
    fields: tuple[str, ...] = ()

    def of(self, family: str, num_steps: int = 0) -> str:
        """The name for this family, and this number of steps."""
        return self.name.format(family=family, steps=num_steps)


_STAR = r"$\mathcal{L}[q^*_{\mathrm{{family}}}]$"
_LOG_PX = r"$\log\hat p(x)$"

ELBO = Quantity("elbo", "bound", "L[q]", r"$\mathcal{L}[q]$", ("se",))
LOCAL = Quantity("local_{family}", "bound", "L[q*] {family}", _STAR, ("se", "steps", "converged"))
LOCAL_IWAE = Quantity("local_{family}_iwae", "bound", "IWAE of q* {family}", fields=("se",))
IWAE = Quantity("iwae", "bound", "IWAE", fields=("se", "ess", "pareto_k"))
AIS = Quantity("ais", "bound", "AIS", fields=("se", "ess", "acceptance"))
LOG_PX = Quantity("log_px", "bound", "log p̂", _LOG_PX)
# What the paper, and its reproduction, take for log p̂.
PAPER_MAX = Quantity("paper_max", "bound", "max(IWAE, AIS), of each datapoint")
PAPER_MAX_OF_MEANS = Quantity("paper_max_of_means", "bound", "max(IWAE, AIS), of the means")
PAPER_LIFT = Quantity(
    "paper_max_lift",
    "difference",
    "lift of max(IWAE, AIS) over log p̂",
    f"lift of max(IWAE, AIS) over {_LOG_PX}",
)
GRID = Quantity("grid", "bound", "log p(x), grid", r"$\log p(x)$, grid", ("error",))
APPROXIMATION = Quantity(
    "approximation_gap_{family}", "gap", "approximation gap {family}", "approximation gap, {family}"
)
COVARIANCE = Quantity("covariance_gap", "gap", "covariance gap")
AMORTIZATION = Quantity(
    "amortization_gap_{family}", "gap", "amortization gap {family}", "amortization gap, {family}"
)
GAIN = Quantity(
    "gain_{family}", "difference", "L[q*] {family} − L[q]", f"{_STAR[:-1]} - {ELBO.latex[1:]}"
)
INFERENCE = Quantity("inference_gap", "gap", "inference gap")
CERTIFICATE = Quantity("certificate", "difference", "BDMC gap of AIS, simulated data")
# On the way to q*: after so many steps, and where a flow's trained weights were held meanwhile.
AFTER = Quantity(
    "after_{steps}_{family}", "bound", "L[q] {family} after {steps} steps", fields=("se",)
)
AFTER_HELD = Quantity(
    "after_{steps}_{family}_encoded",
    "bound",
    "L[q] {family}, weights held, after {steps} steps",
    fields=("se",),
)
# Of a datapoint that the model simulates.
LOWER = Quantity("lower", "bound", "AIS", fields=("se",))
UPPER = Quantity("upper", "bound", "reverse AIS", fields=("se",))
TWO_SIDED = Quantity("gap", "difference", "upper − lower bound", fields=("se",))

# In the order of a table's lines.
QUANTITIES = (
    *(ELBO, LOCAL, LOCAL_IWAE, IWAE, AIS, LOG_PX, PAPER_MAX, PAPER_MAX_OF_MEANS, PAPER_LIFT),
    *(GRID, APPROXIMATION, COVARIANCE, AMORTIZATION, GAIN, INFERENCE, CERTIFICATE),
    *(AFTER, AFTER_HELD, LOWER, UPPER, TWO_SIDED),
)


class Found(NamedTuple):
    """What a name stands for: of a quantity, or of the field beside it that `field` names."""

    quantity: Quantity
    family: str
    num_steps: int
    field: str


@functools.cache
def find(name: str) -> Found | None:
    """What the column, or the line, called `name` is; None where the schema has none such."""
    for quantity in QUANTITIES:
        pattern = quantity.name.replace("{family}", f"(?P<family>{'|'.join(FAMILIES)})")
        pattern = pattern.replace("{steps}", r"(?P<steps>\d+)")
        if quantity.fields:
            pattern += f"(?:_(?P<field>{'|'.join(quantity.fields)}))?"
        if match := re.fullmatch(pattern, name):
            groups = {"family": "", "steps": "0", "field": ""} | match.groupdict(default="")
            return Found(quantity, groups["family"], int(groups["steps"]), groups["field"])
    return None


def get(name: str) -> Found:
    """As `find`, for a name that must be the schema's.

    Raises:
      KeyError: it is not.
    """
    found = find(name)
    if found is None:
        raise KeyError(f"{name!r} is no quantity of infsub.rows")
    return found


def family_label(family: str) -> str:
    """How tables and figures call a family; one that is not ours, by its own name."""
    return FAMILIES[family].label if family in FAMILIES else family


def label(name: str, latex: bool = False) -> str:
    """How tables and figures call the quantity called `name`."""
    quantity, family, num_steps, _ = get(name)
    text = (quantity.latex if latex else "") or quantity.label
    return text.replace("{family}", family_label(family)).replace("{steps}", str(num_steps))


def in_order(names: Iterable[str]) -> list[str]:
    """Names of quantities in the order of a table's lines, each once; families as in FAMILIES."""
    families = ("", *FAMILIES)

    def place(name: str) -> tuple[int, int]:
        found = get(name)
        return QUANTITIES.index(found.quantity), families.index(found.family)

    return sorted(dict.fromkeys(names), key=place)


def build(name: str, value: Estimate | Array, **fields: Any) -> dict[str, Array]:
    """The columns of one quantity, for one datapoint [] or with any leading axes.

    Args:
      name: of a quantity that rows have, such as `LOCAL.of("planar")`.
      value: in nats, or an Estimate, which has the fields se, ess, pareto_k, acceptance too.
      **fields: the others that the quantity has.

    Raises:
      ValueError: a field is missing or is not the quantity's.
      KeyError: an unknown name.
    """
    wanted = get(name).quantity.fields
    if isinstance(value, Estimate):
        known = value._asdict() | {"se": value.standard_error}
        fields = {field: known[field] for field in wanted if field in known} | fields
        value = value.log_px
    if not wanted or fields.keys() != set(wanted):
        raise ValueError(
            f"{name} has the fields {', '.join(wanted) or 'of no row'}; got {', '.join(fields)}"
        )
    return {name: value} | {f"{name}_{field}": fields[field] for field in wanted}


def to_json(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns [N] as N rows of plain numbers."""
    lists = [np.asarray(column).tolist() for column in columns.values()]
    return [dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True)]


class Column(NamedTuple):
    """One quantity at N datapoints.

    Attributes:
      values: [N], in nats; NaN where the estimate was not finite.
      errors: [N], Monte Carlo standard errors in nats; NaN where they are not known.
      fields: {name: [N]}, all that stands beside it in the rows.
    """

    values: np.ndarray
    errors: np.ndarray
    fields: Mapping[str, np.ndarray] = MappingProxyType({})

    def at(self, chosen: np.ndarray) -> Column:
        """The column at some of the datapoints, [N] of bool or their positions."""
        fields = {name: values[chosen] for name, values in self.fields.items()}
        return Column(self.values[chosen], self.errors[chosen], fields)


class Rows(NamedTuple):
    """The rows of N datapoints, in the order of their index.

    Attributes:
      indices: [N], of the datapoints in their split.
      columns: by the name of the quantity.
      labels: [N], their classes, of any type; None where none is known.
    """

    indices: np.ndarray
    columns: dict[str, Column]
    labels: np.ndarray | None = None

    def at(self, chosen: np.ndarray) -> Rows:
        """The rows of some of the datapoints, [N] of bool or their positions."""
        columns = {name: column.at(chosen) for name, column in self.columns.items()}
        labels = None if self.labels is None else self.labels[chosen]
        return Rows(self.indices[chosen], columns, labels)

    def finite(self, names: Iterable[str]) -> np.ndarray:
        """Where all of these quantities are finite, [N] of bool."""
        finite = np.ones(len(self.indices), bool)
        for name in names:
            finite &= np.isfinite(self.columns[name].values)
        return finite


def checked_labels(labels: Any, num_points: int) -> np.ndarray:
    """Labels [N] as rows of JSON can hold them: of any type, bytes as text.

    Raises:
      ValueError: they are not N.
    """
    found = np.asarray(labels)
    if found.shape != (num_points,):
        raise ValueError(f"labels must have shape [N={num_points}]; got {found.shape}")
    texts = [
        each.decode(errors="replace") if isinstance(each, bytes) else each
        for each in found.tolist()
    ]
    return np.asarray(texts, object if found.dtype == object else None)


def parse(rows: Sequence[Any], *required: Quantity) -> Rows:
    """Rows of JSON as columns. What is missing or null is NaN; what is no quantity is left out.

    Of two rows with one index the last counts: that datapoint was evaluated again.

    Raises:
      ValueError: a row is no object, or has no index or no required quantity; a value is no number.
    """
    wanted = [INDEX, *(quantity.name for quantity in required)]
    for number, row in enumerate(rows, 1):
        known = isinstance(row, dict) and all(name in row for name in wanted)
        if not known or not isinstance(row[INDEX], int):
            raise ValueError(f"line {number} must be a JSON object with {' and '.join(wanted)}")
    by_index = {row[INDEX]: row for row in rows}
    ordered = [by_index[index] for index in sorted(by_index)]
    names = dict.fromkeys(name for row in ordered for name in row)
    measured = [n for n in names if (found := find(n)) and not found.field and found[0].fields]
    columns = {}
    for name in measured:
        fields = {
            field: _numbers(ordered, f"{name}_{field}")
            for field in get(name).quantity.fields
            if f"{name}_{field}" in names
        }
        values = _numbers(ordered, name)
        columns[name] = Column(values, fields.get("se", np.full_like(values, np.nan)), fields)
    labels = np.empty(len(ordered), object)
    labels[:] = [row.get(LABEL) for row in ordered]
    known = labels if any(label is not None for label in labels) else None
    return Rows(np.array(sorted(by_index), dtype=int), columns, known)


def _numbers(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    try:
        return np.array([np.nan if row.get(name) is None else float(row[name]) for row in rows])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number in every row ({error})") from error
