"""The decomposition: closed forms through to the printed table, errors against many data sets."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import linear_gaussian

from infsub import config as configs
from infsub import files, gaps, report, rows
from infsub.gaps import Line
from infsub.posteriors import FAMILIES
from infsub.types import Estimate, Gaussian

NUM_DATA_SETS = 2000
N = 60


def synthetic(rng, shape):
    """Bounds as real ones are: they spread by 20 nats together, their gaps by 1."""
    log_px = rng.normal(-86.4, 20.0, shape)
    approximation = rng.gamma(4.0, 0.5, shape)  # mean 2, standard deviation 1
    amortization = rng.gamma(4.0, 0.55, shape)  # mean 2.2
    local = log_px - approximation
    return {"elbo": local - amortization, "local_gaussian": local, "ais": log_px}


def rows_of(values, errors=None, **fields):
    """Rows of N datapoints from {name: [N]}, with {name: [N]} errors and {name_field: [N]} fields."""
    columns = {}
    for name, column in values.items():
        column = np.asarray(column, float)
        error = np.full(column.size, np.nan) if errors is None else np.asarray(errors[name])
        beside = {f: v for f in rows.FIELDS if (v := fields.get(f"{name}_{f}")) is not None}
        columns[name] = rows.Column(column, error, beside)
    return rows.Rows(7 * np.arange(column.size), columns)


def estimate(log_px, standard_error=0.1):
    nan = jnp.full(jnp.shape(log_px), jnp.nan)
    error = jnp.broadcast_to(standard_error, jnp.shape(log_px))
    return Estimate(log_px, error, nan, nan, nan[..., None], nan)


def test_mean_and_both_errors_by_hand():
    got = gaps.mean_over_datapoints([1.0, 2.0, 6.0], [0.3, 0.0, 0.4])
    assert got.mean == pytest.approx(3.0)
    assert got.standard_error == pytest.approx(np.sqrt(7 / 3))  # variance (4 + 1 + 9) / 2
    assert got.monte_carlo_error == pytest.approx(0.5 / 3)
    assert got.num_datapoints == 3
    one = gaps.mean_over_datapoints([5.0])
    assert one.mean == 5
    assert np.isnan(one.standard_error)
    assert np.isnan(one.monte_carlo_error)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-85.604, 0.683, "-85.60 ± 0.68"),
        (0.2414, 0.0031, "0.241 ± 0.003"),
        (0.2, 0.00496, "0.200 ± 0.005"),
        (0.2, 0.005001, "0.200 ± 0.005"),
        (0.0305, 0.0146, "0.030 ± 0.015"),
        (2.0756, 0.0243, "2.08 ± 0.02"),
        (0.01234, 0.00012, "0.0123 ± 0.0001"),
        (0.0, 0.0, "0.00 ± 0.00"),
        (1.0, 1e-9, "1.00 ± 0.00"),
        (1.0, np.nan, "1.00"),
        (-0.003, 0.02, "0.00 ± 0.02"),
    ],
)
def test_an_error_is_not_rounded_away(value, error, text):
    assert gaps.with_error(value, error) == text


def test_paired_standard_error_is_the_spread_over_many_data_sets():
    rng = np.random.default_rng(0)
    bounds = synthetic(rng, (NUM_DATA_SETS, N))
    results = [
        gaps.decompose(rows_of({name: values[i] for name, values in bounds.items()})).lines
        for i in range(NUM_DATA_SETS)
    ]
    truths = {
        "approximation_gap_gaussian": 2.0,
        "amortization_gap_gaussian": 2.2,
        "inference_gap": 4.2,
    }
    for name, truth in truths.items():
        means = np.array([lines[name].mean.mean for lines in results])
        errors = np.array([lines[name].mean.standard_error for lines in results])
        assert means.mean() == pytest.approx(truth, abs=4 * means.std() / np.sqrt(NUM_DATA_SETS))
        # The standard deviation of NUM_DATA_SETS means is itself known to 1/sqrt(2 * 2000) = 1.6 %.
        assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.06)
        assert np.mean(np.abs(means - truth) < 2 * errors) == pytest.approx(0.945, abs=0.02)
    apart = np.hypot(bounds["elbo"].std(1, ddof=1), bounds["ais"].std(1, ddof=1))
    # What a difference of means would have claimed.
    assert apart.mean() / np.sqrt(N) > 15 * errors.mean()


def test_monte_carlo_error_is_the_spread_over_keys_on_fixed_datapoints():
    rng = np.random.default_rng(1)
    bounds = synthetic(rng, N)
    sigma = {name: rng.uniform(0.05, 0.5, N) for name in bounds}
    results = []
    for _ in range(NUM_DATA_SETS):
        noisy = {name: v + sigma[name] * rng.normal(size=N) for name, v in bounds.items()}
        results.append(gaps.decompose(rows_of(noisy, sigma)).lines)
    for name in ("approximation_gap_gaussian", "amortization_gap_gaussian", "inference_gap"):
        means = [lines[name].mean.mean for lines in results]
        assert results[0][name].mean.monte_carlo_error == pytest.approx(np.std(means), rel=0.06)


def test_bootstrap_interval_covers_and_follows_the_skew():
    rng = np.random.default_rng(2)
    covered, sides = [], []
    for values in rng.gamma(0.5, 2.0, (300, 40)):  # mean 1, strongly skewed
        low, high = gaps.bootstrap_interval(values, level=0.9, num_resamples=400)
        covered.append(low < 1.0 < high)
        sides.append((high - values.mean()) - (values.mean() - low))
    assert np.mean(covered) == pytest.approx(0.87, abs=0.06)  # percentile intervals are a bit short
    assert np.mean(sides) > 0.02
    values = rng.normal(size=200)
    low, high = gaps.bootstrap_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=0.1)
    assert gaps.bootstrap_interval(values) == (low, high)  # the seed makes it repeatable
    assert np.isnan(gaps.bootstrap_interval([1.0])).all()


WHOLE = st.integers(-1000, 1000).map(float)  # sums are exact, and ties stay ties


@st.composite
def any_bounds(draw):
    """{name: [N]} of L[q], several L[q*], IWAE and AIS, in any order of size; and their errors."""
    families = draw(st.lists(st.sampled_from(sorted(FAMILIES)), min_size=1, unique=True))
    names = ["elbo", *(rows.LOCAL.of(family) for family in families), "iwae", "ais"]
    num, numbers = draw(st.integers(1, 6)), WHOLE
    column = st.lists(numbers, min_size=num, max_size=num).map(np.array)
    values = {name: draw(column) for name in names}
    errors = {name: np.abs(draw(column)) for name in names}
    return values, errors, families


@given(any_bounds())
def test_gaps_add_up_at_every_datapoint(given_bounds):
    values, errors, families = given_bounds
    own = families[-1]
    got = gaps.decompose(rows_of(values, errors), own)
    lines = {name: line.values for name, line in got.lines.items()}
    assert got.families[0] == own
    for family in families:
        over_elbo = rows.AMORTIZATION if family == own else rows.GAIN
        parts = lines[rows.APPROXIMATION.of(family)] + lines[over_elbo.of(family)]
        np.testing.assert_array_equal(parts, lines["inference_gap"])
    if {"gaussian", "full_gaussian"} <= set(families):
        parts = lines["covariance_gap"] + lines["approximation_gap_full_gaussian"]
        np.testing.assert_array_equal(parts, lines["approximation_gap_gaussian"])
    best = np.maximum(values["iwae"], values["ais"])
    np.testing.assert_array_equal(lines["paper_max"], best)
    np.testing.assert_array_equal(lines["log_px"] + lines["paper_max_lift"], best)
    assert np.mean(lines["log_px"]) - 1e-9 <= np.mean(lines["paper_max_of_means"])
    assert np.mean(lines["paper_max_of_means"]) <= np.mean(best) + 1e-9
    for line in got.lines.values():
        assert np.all(line.errors >= 0)


@given(any_bounds(), st.lists(WHOLE, min_size=6, max_size=6))
def test_gaps_are_paired(given_bounds, shifts):
    """What makes one datapoint harder than another, for all bounds alike, changes no gap's error."""
    values, errors, _ = given_bounds
    shift = np.array(shifts[: len(values["elbo"])])
    moved = {name: column + shift for name, column in values.items()}
    before, after = (gaps.decompose(rows_of(v, errors)).lines for v in (values, moved))
    for name, line in before.items():
        if line.kind != "bound":
            np.testing.assert_array_equal(after[name].mean, line.mean)
            np.testing.assert_array_equal(after[name].values, line.values)


def printed(table):
    """{label: mean} of a Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {label: float(mean) for label, mean, *_ in lines[1:]}


def test_the_table_of_a_linear_gaussian_model_prints_its_kl_divergences(tmp_path):
    """From estimates to the digits on the page: rows, JSON, decomposition, table."""
    model = linear_gaussian(latent_dim=4, data_dim=6)
    xs = jax.vmap(lambda k: model.simulate(k)[1])(jax.random.split(jax.random.key(0), 30))

    def bounds(x):
        best, log_px = model.best_gaussian(x), model.log_px(x)
        amortised = Gaussian(best.mean + 0.3 * jnp.sin(x[:4]), 1.8 * best.scale)
        return log_px - model.kl(x, amortised), log_px - model.kl(x, best), log_px

    elbo, local, log_px = jax.jit(jax.vmap(bounds))(xs)
    stopped = {"steps": jnp.full(30, 100), "converged": jnp.full(30, True)}
    columns = {
        rows.INDEX: np.arange(30),
        **rows.build("elbo", estimate(elbo)),
        **rows.build("local_gaussian", estimate(local), **stopped),
        # The best full-covariance Gaussian is the posterior itself: the whole gap is correlation.
        **rows.build("local_full_gaussian", estimate(log_px), **stopped),
        **rows.build("ais", estimate(log_px)),
        **rows.build("iwae", estimate(log_px - 0.5)),
    }
    files.append_rows(tmp_path / "rows.jsonl", rows.to_json(columns))
    document = {"config": configs.to_json(configs.default())}
    (tmp_path / "config.json").write_text(json.dumps(document))
    report.experiment("", None, {"": tmp_path}, tmp_path)  # the table without a figure
    got = printed((tmp_path / "table.md").read_text())

    precision = np.asarray(model.precision(), np.float64)
    approximation = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    shift = 0.3 * np.sin(np.asarray(xs)[:, :4])
    amortization = 0.5 * np.einsum("ni,ij,nj->n", shift, precision, shift).mean() + 4 * (
        0.5 * (1.8**2 - 1) - np.log(1.8)
    )
    inference, mean = approximation + amortization, float(jnp.mean(log_px))
    want = {
        "L[q]": mean - inference,
        "L[q*] FFG": mean - approximation,
        "L[q*] full": mean,
        "IWAE": mean - 0.5,
        "AIS": mean,
        "log p̂": mean,
        "max(IWAE, AIS), of each datapoint": mean,
        "max(IWAE, AIS), of the means": mean,
        "lift of max(IWAE, AIS) over log p̂": 0,
        "approximation gap FFG": approximation,
        "approximation gap full": 0,
        "covariance gap": approximation,
        "amortization gap FFG": amortization,
        "L[q*] full − L[q]": inference,
        "inference gap": inference,
    }
    assert list(got) == list(want)
    for label, value in want.items():
        assert got[label] == pytest.approx(value, abs=0.0051), label  # two decimals are printed
    assert min(approximation, amortization) > 0.1  # the digits would tell one from another
    assert abs(approximation - amortization) > 0.1


def test_non_finite_datapoints_are_left_out_of_all_lines_and_named():
    bounds = synthetic(np.random.default_rng(3), N)
    keep = np.setdiff1d(np.arange(N), [3, 17, 40])
    want = gaps.decompose(rows_of({name: values[keep] for name, values in bounds.items()}))
    bounds["elbo"][3], bounds["local_gaussian"][17] = -np.inf, np.nan
    bounds["ais"][40] = np.inf
    got = gaps.decompose(rows_of(bounds))
    assert {tuple(flag.indices) for flag in got.flags} == {(21,), (119,), (280,)}
    assert got.indices.tolist() == (7 * keep).tolist()
    for name, line in want.lines.items():
        np.testing.assert_array_equal(got.lines[name].values, line.values)
    with pytest.raises(ValueError, match=r"positions \[17\]"):
        gaps.mean_over_datapoints(bounds["local_gaussian"])
    everywhere = rows_of(bounds | {"elbo": np.full(N, np.nan)})
    with pytest.raises(ValueError, match="no datapoint whose bounds are all finite"):
        gaps.decompose(everywhere)


def test_log_px_is_right_where_the_larger_of_two_noisy_bounds_is_not():
    """Two unbiased estimates of a known log p(x): ours stays within its errors, the paper's lies above."""
    rng = np.random.default_rng(4)
    num, sigma = 1000, {"elbo": 0.1, "local_gaussian": 0.1, "iwae": 0.5, "ais": 0.3}
    bounds = synthetic(rng, num)
    truth = bounds["ais"]
    bounds = {name: bounds.get(name, truth) for name in sigma}
    noisy = {name: v + sigma[name] * rng.normal(size=num) for name, v in bounds.items()}
    lines = gaps.decompose(
        rows_of(noisy, {name: np.full(num, s) for name, s in sigma.items()})
    ).lines
    log_px, paper, lift = (lines[n] for n in ("log_px", "paper_max", "paper_max_lift"))
    assert abs(log_px.mean.mean - truth.mean()) < 3 * log_px.error
    assert paper.mean.mean - truth.mean() > 10 * paper.error
    # E max(a, b) − E a = √(σ_a² + σ_b²) / √(2π) for equal means (Clark 1961).
    want = np.hypot(0.5, 0.3) / np.sqrt(2 * np.pi)
    assert lift.mean.mean == pytest.approx(want, abs=3 * lift.mean.standard_error)
    assert lift.mean.mean == pytest.approx(paper.mean.mean - log_px.mean.mean)
    # The gaps are of ours.
    gap = lines["approximation_gap_gaussian"]
    want = (truth - bounds["local_gaussian"]).mean()
    assert abs(gap.mean.mean - want) < 3 * gap.mean.monte_carlo_error
    assert lines["paper_max_of_means"].mean.mean <= paper.mean.mean


def test_without_ais_log_px_is_iwae_and_there_is_no_choice():
    bounds = synthetic(np.random.default_rng(5), N)
    bounds["iwae"] = bounds.pop("ais")
    got = gaps.decompose(rows_of(bounds))
    np.testing.assert_array_equal(got.lines["log_px"].values, bounds["iwae"])
    assert "paper_max" not in got.lines
    assert got.notes[0] == "log p̂ is IWAE, the same estimator at all datapoints."
    del bounds["iwae"]
    assert list(gaps.decompose(rows_of(bounds)).lines) == [
        *("elbo", "local_gaussian", "amortization_gap_gaussian")
    ]


def test_a_witness_that_finds_more_than_ais_says_so():
    bounds = synthetic(np.random.default_rng(6), N)
    bounds |= {"iwae": bounds["ais"] - 0.05, "local_gaussian_iwae": bounds["ais"] - 0.05}
    sigma = {name: np.full(N, 0.1) for name in bounds}
    k = np.where(np.arange(N) % 2, 0.5, 0.9)

    def told(edit):
        edited = {name: values.copy() for name, values in bounds.items()}
        edit(edited)
        got = gaps.decompose(rows_of(edited, sigma, iwae_pareto_k=k), max_pareto_k=1.0)
        notes = [note for note in got.notes if "has not converged" in note]
        return notes, {flag.text: flag.indices for flag in got.flags}

    assert told(lambda bounds: None) == ([], {})

    def at_three(bounds):
        bounds["iwae"][3] += 1  # 0.95 nats above, of 0.14 standard error
        bounds["local_gaussian_iwae"][4] = np.nan

    notes, flags = told(at_three)
    assert notes == []
    assert flags == {
        "IWAE above log p̂ by more than 4 standard errors at 1 of 60 datapoints, "
        "where AIS misses mass": [21]
    }

    def everywhere(bounds):
        bounds["local_gaussian_iwae"] += 0.2  # at each within its errors

    notes, flags = told(everywhere)
    assert len(notes) == 1
    assert notes[0].startswith("IWAE of q* FFG exceeds log p̂ by 0.15 ± 0.00 nats, a sign that AIS")
    assert flags == {}

    def below(bounds):
        bounds["iwae"][[6, 7]] -= 2  # k 0.9 and 0.5

    k = np.where(np.arange(N) % 2, 0.5, 1.2)
    notes, flags = told(below)
    assert notes == []
    (text,) = [text for text in flags if "below log p̂" in text]
    assert flags[text] == [49]


@pytest.mark.parametrize(("share", "said"), [(0.3, "flag"), (0.9, "note")])
def test_what_is_wrong_with_iwae_nearly_everywhere_is_a_note_and_no_datapoint_to_look_at(
    share, said
):
    k = np.where(np.arange(10) < 10 * share, 0.9, 0.1)
    values = {"elbo": np.zeros(10), "iwae": np.ones(10), "ais": np.ones(10)}
    text = f"IWAE: Pareto k above 0.7 at {10 * share:.0f} of 10 datapoints"
    found = gaps.decompose(rows_of(values, iwae_pareto_k=k))
    notes = [note for note in found.notes if note.startswith(f"{text}, so that it is a bound")]
    assert (text in [flag.text for flag in found.flags], len(notes)) == (
        said == "flag",
        said == "note",
    )
    del values["ais"]  # log p̂ is IWAE then, and each is to be looked at
    assert text in [flag.text for flag in gaps.decompose(rows_of(values, iwae_pareto_k=k)).flags]


@pytest.mark.parametrize(
    ("nats", "min_ess", "is_said"),
    [(4.6, gaps.MIN_ESS, False), (9.0, gaps.MIN_ESS, True), (4.6, 0.0, True)],
)
def test_one_lucky_weight_is_no_witness_but_a_miracle_is(nats, min_ess, is_said):
    """As seen: all that an IWAE of 5000 weights had was one of them, 4.6 nats above every other bound.

    Of 60 datapoints one may be so lucky; e^−9 · 60 is under a hundredth. A threshold of 0 asks for no luck.
    """
    bounds = synthetic(np.random.default_rng(9), N)
    bounds["local_gaussian_iwae"] = bounds["ais"] - 0.5
    bounds["local_gaussian_iwae"][7] += 0.5 + nats
    sigma = {name: np.full(N, 0.1) for name in bounds}
    sigma["local_gaussian_iwae"][7] = 0.99
    flags = gaps.decompose(rows_of(bounds, sigma), min_ess=min_ess).flags
    assert [flag.indices for flag in flags] == [[49]] * is_said


def test_a_grid_convicts_ais():
    bounds = synthetic(np.random.default_rng(7), N)
    sigma = {name: np.full(N, 0.1) for name in bounds} | {"grid": np.full(N, np.nan)}
    bounds["grid"] = bounds["ais"] + 0.3
    bounds["grid"][5] += 0.3
    got = gaps.decompose(rows_of(bounds, sigma, grid_error=np.full(N, 1e-4)))
    assert [(flag.text, flag.indices) for flag in got.flags] == [
        (
            "log p̂ off log p(x) of the grid by more than 4 standard errors at 1 of 60 datapoints",
            [35],
        )
    ]
    assert got.lines["grid"].mean.monte_carlo_error == 0


def test_bounds_without_an_error_are_no_witness_against_a_datapoint():
    bounds = synthetic(np.random.default_rng(8), N)
    bounds["iwae"] = bounds["ais"] - 0.1
    bounds["iwae"][0] += 5
    assert gaps.decompose(rows_of(bounds)).flags == []


def test_certificate_is_of_simulated_points_and_says_so():
    lower, upper = np.full(4, -90.0), np.array([-89.98, -89.9, -89.94, np.nan])
    two_sided = rows_of({"lower": lower, "upper": upper, "gap": upper - lower})
    got = gaps.certify(two_sided)
    assert got.line is not None
    assert got.line.mean.mean == pytest.approx(0.06)
    assert "On simulated data the AIS bound is within 0.06 ± 0.02 nats" in got.notes[0]
    assert "evidence and no proof" in got.notes[0]
    assert [flag.indices for flag in got.flags] == [[21]]
    nowhere = gaps.certify(rows_of({"lower": lower, "upper": np.full(4, np.nan)}))
    assert nowhere.line is None
    assert nowhere.notes == []


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: gaps.mean_over_datapoints([]), "values"),
        (lambda: gaps.mean_over_datapoints([[1.0]]), "values"),
        (lambda: gaps.mean_over_datapoints([1.0], [0.1, 0.1]), "errors"),
        (
            lambda: gaps.difference(
                Line(np.ones(2), np.ones(2), "bound"), Line(np.ones(1), np.ones(1), "bound")
            ),
            "lower",
        ),
        (lambda: gaps.bootstrap_interval([1.0], level=95), "level"),
        (lambda: gaps.bootstrap_interval([1.0], num_resamples=0), "num_resamples"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
