"""The schema: what is built is what is read, every name is one quantity's, mistakes are named."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infsub import files, posteriors, rows
from infsub.types import Estimate

MEASURED = [quantity for quantity in rows.QUANTITIES if quantity.fields]
FAMILIES = st.sampled_from(sorted(posteriors.FAMILIES))
NUMBERS = st.floats(width=64) | st.none()  # NaN and infinities too


@st.composite
def names(draw, quantities=rows.QUANTITIES):
    """(a quantity, a name of it, its family, its number of steps)."""
    quantity = draw(st.sampled_from(quantities))
    family = draw(FAMILIES) if "{family}" in quantity.name else ""
    num_steps = draw(st.integers(0, 10**6)) if "{steps}" in quantity.name else 0
    return quantity, quantity.of(family, num_steps), family, num_steps


@given(names())
def test_every_name_is_found_as_what_it_is_of(given_name):
    quantity, name, family, num_steps = given_name
    assert rows.find(name) == (quantity, family, num_steps, "")
    for field in quantity.fields:
        assert rows.find(f"{name}_{field}") == (quantity, family, num_steps, field)
    for other in rows.FIELDS.keys() - set(quantity.fields):
        assert rows.find(f"{name}_{other}") is None
    for latex in (False, True):
        assert "{family}" not in rows.label(name, latex)
        assert "{steps}" not in rows.label(name, latex)
        assert rows.family_label(family) in rows.label(name, latex)


@given(
    st.lists(names(MEASURED), min_size=1, max_size=6),
    st.sets(st.integers(0, 10**9), min_size=1, max_size=8),
    st.data(),
)
def test_what_is_built_comes_back_through_json(tmp_path_factory, given_names, indices, data):
    """In any order of the rows; what is not finite comes back as NaN."""
    indices = data.draw(st.permutations(sorted(indices)))
    column = st.lists(NUMBERS, min_size=len(indices), max_size=len(indices)).map(
        lambda numbers: np.array([math.nan if n is None else n for n in numbers])
    )
    built, given_columns = {rows.INDEX: np.array(indices)}, {}
    for quantity, name, _, _ in given_names:
        columns = {field: data.draw(column) for field in ("", *quantity.fields)}
        given_columns[name] = columns
        fields = {field: values for field, values in columns.items() if field}
        built |= rows.build(name, columns[""], **fields)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    files.append_rows(path, rows.to_json(built))
    got = rows.parse(files.read_rows(path), *(q for q, n, *_ in given_names if n == q.name))
    order = np.argsort(indices)
    assert got.indices.tolist() == sorted(indices)
    assert got.columns.keys() == given_columns.keys()
    for name, columns in given_columns.items():
        found = {"": got.columns[name].values, **got.columns[name].fields}
        assert found.keys() == columns.keys()
        for field, values in columns.items():
            want = np.where(np.isfinite(values), values, np.nan)[order]
            np.testing.assert_array_equal(found[field], want)
        errors = found.get("se", np.full(len(indices), np.nan))
        np.testing.assert_array_equal(got.columns[name].errors, errors)
        assert got.finite([name]).tolist() == np.isfinite(columns[""])[order].tolist()


@given(st.lists(names(), max_size=12))
def test_lines_stand_in_the_order_of_the_schema(given_names):
    ordered = rows.in_order(name for _, name, _, _ in given_names)
    assert set(ordered) == {name for _, name, _, _ in given_names}
    found = [rows.get(name) for name in ordered]
    families = ["", *posteriors.FAMILIES]
    places = [(rows.QUANTITIES.index(f.quantity), families.index(f.family)) for f in found]
    assert places == sorted(places)


def test_an_estimate_brings_its_fields():
    values = {field: jnp.asarray(float(i)) for i, field in enumerate(Estimate._fields)}
    estimate = Estimate(**values)
    assert rows.build("iwae", estimate) == {
        "iwae": estimate.log_px,
        "iwae_se": estimate.standard_error,
        "iwae_ess": estimate.ess,
        "iwae_pareto_k": estimate.pareto_k,
    }
    local = rows.build("local_rnvp", estimate, steps=jnp.asarray(7), converged=jnp.asarray(True))
    assert json.loads(json.dumps(rows.to_json({k: v[None] for k, v in local.items()}))) == [
        {"local_rnvp": 0, "local_rnvp_se": 1, "local_rnvp_steps": 7, "local_rnvp_converged": True}
    ]


@pytest.mark.parametrize(
    ("name", "fields", "error", "said"),
    [
        ("elbow", {"se": 0.1}, KeyError, "'elbow' is no quantity"),
        ("elbo", {}, ValueError, "elbo has the fields se; got "),
        ("elbo", {"se": 0.1, "ess": 3.0}, ValueError, "elbo has the fields se; got se, ess"),
        ("log_px", {}, ValueError, "log_px has the fields of no row"),
    ],
)
def test_what_is_no_column_is_not_built(name, fields, error, said):
    with pytest.raises(error, match=said):
        rows.build(name, np.zeros(3), **fields)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([{"index": 0, "elbo": 1.0}, 3], "line 2 must be a JSON object with index and elbo"),
        ([{"index": 0}], "line 1 must be a JSON object with index and elbo"),
        ([{"elbo": 1.0}], "line 1 must be"),
        ([{"index": None, "elbo": 1.0}], "line 1 must be"),
        ([{"index": 0, "elbo": "low"}], "elbo must be a number in every row"),
        ([{"index": 0, "elbo": 1.0, "elbo_se": [1]}], "elbo_se must be a number in every row"),
    ],
)
def test_a_row_that_is_none_is_named(found, said):
    with pytest.raises(ValueError, match=said):
        rows.parse(found, rows.ELBO)


def test_a_column_that_some_rows_lack_and_one_of_no_quantity():
    got = rows.parse([{"index": 1, "elbo": -2, "log_px": 3, "elbow": 1}, {"index": 0, "ais": -1}])
    assert got.columns.keys() == {"elbo", "ais"}
    np.testing.assert_array_equal(got.columns["elbo"].values, [np.nan, -2])
    np.testing.assert_array_equal(got.columns["ais"].values, [-1, np.nan])
    again = rows.parse([{"index": 1, "elbo": -2}, {"index": 1, "elbo": -3}])
    assert again.columns["elbo"].values.tolist() == [-3]
