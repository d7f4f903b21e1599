"""From a model of one's own to a table: `measure`, `compare`, `load`."""

from __future__ import annotations

import csv
import functools
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import LinearGaussian, linear_gaussian, own_model

import infsub
from infsub.report.runs import load_run
from infsub.rows import label
from infsub.types import UserError

N, B = 12, 4
SETTINGS = infsub.Settings(
    elbo_samples=500,
    iwae_samples=500,
    ais=infsub.AIS(num_chains=8, num_temperatures=20, num_leapfrog=3),
    max_steps=500,
)
KEY = jax.random.key(1)


class Params(NamedTuple):
    """How far the encoder is off is a parameter, so that all that are measured share a program."""

    known: LinearGaussian
    shift: float = 0.3


def encode(params, x):
    return own_model(params.known, params.shift).encode(params.known, x)


def log_likelihood(params, x, z):
    return params.known.log_likelihood(x, z)


def sample_x(key, params, z, x):
    return own_model(params.known).sample_x(key, params.known, z, x)


KNOWN = linear_gaussian(latent_dim=3, data_dim=5)
MODEL, PARAMS = infsub.Model(3, encode, log_likelihood, sample_x), Params(KNOWN)


@pytest.fixture(scope="module")
def xs():
    return np.asarray(jax.vmap(KNOWN.simulate)(jax.random.split(jax.random.key(0), N))[1])


@pytest.fixture(scope="module")
def measured(xs):
    return infsub.measure(
        KEY,
        MODEL,
        PARAMS,
        xs,
        num_certified=B,
        settings=SETTINGS,
        block_size=B,
        labels=np.arange(N) % 3,
        progress=False,
        name="own",
    )


def test_gaps_of_a_users_model_are_those_of_the_closed_form(measured, xs):
    kl = jax.vmap(lambda x: KNOWN.kl(x, MODEL.encode(PARAMS, x)))(xs)
    best = jax.vmap(lambda x: KNOWN.kl(x, KNOWN.best_gaussian(x)))(xs)
    want = {
        "approximation_gap_gaussian": best,
        "amortization_gap_gaussian": kl - best,
        "inference_gap": kl,
    }
    for name, values in want.items():
        line = measured.gaps.lines[name]
        error = 4 * line.mean.monte_carlo_error + 0.01
        assert line.mean.mean == pytest.approx(float(np.mean(values)), abs=error), name
        np.testing.assert_array_less(
            abs(line.values - values), 4 * line.errors + 0.01, err_msg=name
        )
    assert measured.gaps.families == ["gaussian"]  # encode's own, by the shape of its scale
    assert measured.certificate.line.mean.num_datapoints == B
    assert measured.columns["label"].tolist() == (np.arange(N) % 3).tolist()


def test_a_model_that_says_its_outputs_has_the_same_bounds_for_a_cheaper_fit(measured, xs):
    """Gauss-Newton's curvature is the Hessian where outputs are linear in z."""
    model = MODEL._replace(
        outputs=lambda params, x, z: params.known.weight @ z + params.known.bias,
        log_likelihood_of_outputs=lambda params, x, mean: infsub.densities.normal(
            x, mean, params.known.noise
        ),
    )
    again = infsub.measure(KEY, model, PARAMS, xs, settings=SETTINGS, block_size=B, progress=False)
    for bound in ("elbo", "local_gaussian", "iwae", "ais"):
        error = 0.01 + measured.columns[f"{bound}_se"]
        np.testing.assert_array_less(
            abs(again.columns[bound] - measured.columns[bound]), error, err_msg=bound
        )
    gauss_newton, hessian = (
        infsub.laplace_with_info(m.target(PARAMS, xs[0]), jnp.zeros(3))[1] for m in (model, MODEL)
    )
    assert gauss_newton.log_px == pytest.approx(float(hessian.log_px), abs=1e-3)
    assert gauss_newton.num_gradients < hessian.num_gradients
    torn = model._replace(outputs=None)
    with pytest.raises(ValueError, match="outputs and log_likelihood_of_outputs go together"):
        torn.target(PARAMS, xs[0])


def test_a_datapoint_has_its_numbers_whatever_is_measured_beside_it(measured, xs):
    some = [7, 2, 11, 0]
    again = infsub.measure(
        KEY,
        MODEL,
        PARAMS,
        xs[some],
        indices=some,
        settings=SETTINGS,
        block_size=B,
        progress=False,
    )
    for name in ("elbo", "iwae", "ais", "local_gaussian"):
        np.testing.assert_allclose(again.columns[name], measured.columns[name][some], atol=1e-4)


def test_the_table_in_its_forms(measured):
    lines = measured.table("csv").splitlines()
    gap = {row["quantity"]: row for row in csv.DictReader(io.StringIO("\n".join(lines)))}
    mean = measured.gaps.lines["inference_gap"].mean
    assert float(gap["inference_gap"]["mean"]) == mean.mean
    assert r"\begin{tabular}" in measured.table("latex")
    assert measured.table().splitlines() == str(measured).splitlines()[: len(lines) + 1]
    assert f"| inference gap | {mean.mean:.2f} |" in measured._repr_markdown_()
    assert "On simulated data the AIS bound is within" in str(measured)
    assert "evaluate.ais.num_chains=8" in measured._repr_markdown_()
    with pytest.raises(ValueError, match="markdown, latex or csv; got 'html'"):
        measured.table("html")
    assert len(measured.figure().axes) == 2
    assert measured.figure()._repr_png_().startswith(b"\x89PNG")  # what a notebook shows


def test_what_is_saved_is_a_runs_folder(measured, tmp_path):
    folder = measured.save(tmp_path / "own")
    again = infsub.load(folder)
    assert str(again) == str(measured)
    assert load_run(folder).data == measured.data
    np.testing.assert_array_equal(again.columns["label"], measured.columns["label"])
    assert again.xs.tolist()[0].startswith("5 values, mean ")
    page = measured.page(tmp_path / "page.html").read_text()
    assert again.page(tmp_path / "again.html").read_text() == page
    assert again.xs.tolist()[3] in page
    measured.save(folder)  # the same again is no mistake
    (run := tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="is a run of the command: give another folder"):
        measured.save(run.parent)
    other = infsub.Measurement(measured.rows[:3], config=measured.config)
    with pytest.raises(UserError, match="another measurement's: give another folder"):
        other.save(folder)
    with pytest.raises(UserError, match=r"rows\.jsonl is missing"):
        infsub.load(tmp_path)


def test_what_is_finite_nowhere_is_said_and_kept(measured, tmp_path):
    lost = [row | {"elbo": float("nan")} for row in measured.rows]
    found = infsub.Measurement(lost, config=measured.config, name="lost", xs=measured.xs)
    for text in (str(found), found._repr_markdown_()):
        assert text == "lost: no datapoint whose bounds are all finite"
    again = infsub.load(found.save(tmp_path / "lost"))
    assert str(again) == str(found)
    assert len(again.xs) == N
    beside = infsub.compare({"A": measured, "B": found})
    for text in (str(beside), beside._repr_markdown_()):
        assert text == f"A:\n{measured}\n\nB:\n{found}"


def test_a_datapoint_may_have_no_label(measured, tmp_path):
    first = {name: value for name, value in measured.rows[0].items() if name != "label"}
    labelled = [row | {"label": "a"} for row in measured.rows[1:]]
    found = infsub.Measurement([first, *labelled], config=measured.config)
    assert found.columns["label"].tolist() == [None, *["a"] * (N - 1)]
    assert ">None<" not in found.page(tmp_path / "page.html").read_text()


def test_models_side_by_side(measured, xs):
    near = PARAMS._replace(shift=0.0)
    better = infsub.measure(KEY, MODEL, near, xs, settings=SETTINGS, block_size=B, progress=False)
    both = infsub.compare({"off": measured, "near": better})
    table = both.table()
    assert "| nats | off | near |" in table
    (gap,) = [line for line in table.splitlines() if line.startswith("| inference gap ")]
    assert gap.split(" | ")[2].startswith("**")  # the smaller one, paired
    assert f"| {label('elbo')} |" in table
    assert "off: log p̂ is AIS" in str(both)
    line = both.differences["near"]["inference_gap"]
    values = better.gaps.lines["inference_gap"].values - measured.gaps.lines["inference_gap"].values
    np.testing.assert_array_equal(line.values, values)
    assert line.mean.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(N))
    for text in (str(both), both._repr_markdown_()):
        assert "| near − off, paired | mean |" in text
        assert f"| inference gap | {values.mean():.2f} | {line.mean.standard_error:.2f} |" in text
    some = infsub.Measurement(better.rows[1:], config=better.config, data=better.data)
    assert infsub.compare({"off": measured, "some": some}).differences == {}  # other datapoints
    assert len(both.figure().axes) == 1
    with pytest.raises(TypeError, match=r"\{name: Measurement"):
        infsub.compare([measured])  # pyright: ignore
    with pytest.raises(ValueError, match="at least one"):
        infsub.compare({})


class Module(NamedTuple):
    """As Equinox's: arrays, a function, a size and a truth value are leaves of one pytree."""

    weight: jax.Array
    activation: Any
    repeats: int
    training: bool

    def __call__(self, params, x):
        assert not self.training
        for _ in range(self.repeats):
            x = self.activation(self.weight @ x)
        return infsub.Gaussian(x, jnp.full(3, 0.5))


def test_a_models_parameters_may_be_modules_and_its_functions_partials(measured, xs):
    """Equal ones, made anew, are one program; what is measured is what plain functions give."""
    traces = []

    def log_likelihood(known, params, x, z):
        traces.append(1)
        return known.log_likelihood(x, z)

    def encode(params, x):
        return params(None, x)

    found = []
    for as_params in (True, True, False):
        module = Module(0.3 * jnp.eye(3, 5), jnp.tanh, 1, False)
        model = infsub.Model(
            3, encode if as_params else module, functools.partial(log_likelihood, KNOWN)
        )
        before = len(traces)
        params = module if as_params else None
        measurement = infsub.measure(
            KEY,
            model,
            params,
            xs,
            families=(),
            settings=SETTINGS,
            block_size=B,
            progress=False,
        )
        found.append((measurement.columns, len(traces) - before))
    assert found[0][1] > 0
    assert found[1][1] == 0
    for name in ("elbo", "ais"):
        for columns, _ in found[1:]:
            np.testing.assert_allclose(columns[name], found[0][0][name], atol=1e-4)
    np.testing.assert_allclose(found[0][0]["ais"], measured.columns["ais"], atol=0.01)


def test_mistakes_are_told_in_a_sentence(xs):
    def measure(model=MODEL, **options):
        return infsub.measure(KEY, model, PARAMS, xs, progress=False, **options)

    with pytest.raises(ValueError, match="num_certified needs a model that simulates"):
        measure(MODEL._replace(sample_x=None), num_certified=2)
    with pytest.raises(ValueError, match=r"labels must have shape \[N=12\]"):
        measure(labels=[1, 2])
    with pytest.raises(ValueError, match="images must be N=12; got 13"):
        measure(images=np.zeros((13, 8, 8)))
    with pytest.raises(ValueError, match="12 different integers"):
        measure(indices=np.zeros(12, int))
    unknown = ("gauss",)
    for named in ({"families": "gauss"}, {"settings": SETTINGS._replace(families=unknown)}):
        with pytest.raises(ValueError, match="unknown posterior 'gauss'"):
            measure(**named)
    with pytest.raises(ValueError, match="unknown posterior 'rnpv'"):
        measure(own="rnpv")


def test_mistakes_in_what_is_certified_are_told_before_anything_is_measured(xs):
    done = []

    def measure(model=MODEL, settings=SETTINGS, num_certified: Any = 2):
        def count(*_):
            done.append(1)

        def encode(params, x):
            jax.debug.callback(count)
            return MODEL.encode(params, x)

        model = model._replace(encode=encode)
        return infsub.measure(
            KEY, model, PARAMS, xs, settings=settings, num_certified=num_certified, progress=False
        )

    with pytest.raises(ValueError, match="num_certified must be a positive integer; got -1"):
        measure(num_certified=-1)
    adapting = SETTINGS._replace(ais=SETTINGS.ais._replace(adaptation="authors"))
    with pytest.raises(ValueError, match="needs adaptation='pilot'"):
        measure(settings=adapting)
    with pytest.raises((TypeError, ValueError)):
        measure(MODEL._replace(sample_x=lambda key, params, z, x: z[:1]))
    assert not done


def test_a_gaussian_of_lists_is_one(xs):
    def encode(params, x):
        q = MODEL.encode(params, x)
        return infsub.Gaussian(list(q.mean), list(q.scale))

    def bounds_of(model):
        options = {"families": (), "progress": False}
        return [row["elbo"] for row in infsub.measure(KEY, model, PARAMS, xs[:3], **options).rows]

    assert bounds_of(MODEL._replace(encode=encode)) == pytest.approx(bounds_of(MODEL), abs=1e-4)
    infsub.check(KEY, MODEL._replace(encode=encode), PARAMS, xs[:3])
