"""One datapoint's row, of a model that is no VAE: every bound in its order, at known distances."""

from __future__ import annotations

import inspect
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import linear_gaussian

from infsub import config as configs
from infsub import gaps, rows
from infsub.datapoints import map_datapoints
from infsub.keys import named
from infsub.measure import AIS, Datapoint, Settings, bounds_of_datapoint, certify_datapoint
from infsub.types import Gaussian

MODEL = linear_gaussian(latent_dim=3, data_dim=5)
N = 20
SETTINGS = Settings(
    elbo_samples=500,
    iwae_samples=500,
    ais=AIS(num_chains=8, num_temperatures=20, num_leapfrog=3),
    families=("gaussian", "full_gaussian"),
    max_steps=1000,
    iwae_start="laplace",
)


def amortised(x):
    best = MODEL.best_gaussian(x)
    return Gaussian(best.mean + 0.3 * jnp.sin(x[:3]), 1.5 * best.scale)


def point_of(x):
    q = amortised(x)
    return Datapoint(MODEL.target(x), q, q, "gaussian")


def bounds(key, x, *, settings):
    return bounds_of_datapoint(key, point_of(x), settings)


def certified(key, _, *, settings):
    def simulate(key):
        z, x = MODEL.simulate(key)
        return z, point_of(x)

    return certify_datapoint(key, simulate, settings)


@pytest.fixture(scope="module")
def xs():
    return jax.vmap(MODEL.simulate)(jax.random.split(jax.random.key(0), N))[1]


@pytest.fixture(scope="module")
def columns(xs):
    static = {"settings": SETTINGS}
    # Equal weights have no tail: their Pareto k is −inf, and no reason for a warning.
    return map_datapoints(bounds, jax.random.key(1), xs, static=static, warn=False)


def test_the_defaults_are_those_of_the_config():
    evaluate = configs.default().evaluate
    assert configs.measured(evaluate) == Settings()
    told = dict(configs.flatten(configs.of_settings(Settings())))
    assert told == {n: v for n, v in configs.flatten(evaluate) if n in told}
    assert len(told) == 14


CHANGED = {
    "elbo_samples": 7,
    "iwae_samples": 8,
    "iwae_start": "laplace",
    "grid": 9,
    "ais.num_chains": 2,
    "ais.num_temperatures": 3,
    "ais.num_leapfrog": 4,
    "ais.schedule": "power",
    "ais.start": "prior",
    "ais.adaptation": "authors",
    "local.families": ("planar",),
    "local.preset": "thorough",
    "local.max_steps": 5,
    "local.curve": (0, 1),
}


def test_no_field_of_the_config_is_lost_on_the_way_to_the_settings():
    evaluate = configs.default().evaluate
    before = dict(configs.flatten(evaluate))
    evaluate.update_from_flattened_dict(CHANGED)
    assert all(before[name] != value for name, value in CHANGED.items())
    told = configs.of_settings(configs.measured(evaluate))
    assert dict(configs.flatten(told)) == CHANGED


def test_every_setting_reaches_its_estimator(monkeypatch):
    """A setting that nobody reads changes no number, and the rows would look right."""
    taken = {}

    def record(name):
        function = getattr(sys.modules["infsub.measure"], name)

        def recorded(*args, **options):
            bound = inspect.signature(function).bind(*args, **options)
            taken[name] = {k: v for k, v in bound.arguments.items() if k != "changes"}
            taken[name] |= bound.arguments.get("changes", {})
            return function(*args, **options)

        monkeypatch.setattr(sys.modules["infsub.measure"], name, recorded)

    for name in ("elbo", "iwae", "ais", "bdmc", "optimize_local", "local_curve"):
        record(name)
    of_ais = {"num_chains": 2, "num_temperatures": 3, "num_leapfrog": 4, "schedule": "power"}
    authors = AIS(**of_ais, adaptation="authors")
    settings = Settings(7, 8, families=("gaussian",), preset="thorough", max_steps=5, curve=(0, 1))
    row, certificate = (settings._replace(ais=each) for each in (authors, AIS(**of_ais)))
    key, x = jax.random.key(0), jnp.zeros(5)
    jax.eval_shape(lambda: bounds_of_datapoint(key, point_of(x), row, chunk_size=3))
    jax.eval_shape(lambda: certified(key, None, settings=certificate))
    wanted = {
        "elbo": {"num_samples": 7},
        "iwae": {"num_samples": 8, "chunk_size": 3},
        "ais": authors._asdict(),
        "bdmc": of_ais,
        "optimize_local": {"rule": "thorough", "max_steps": 5},
        "local_curve": {"steps": (0, 1), "rule": "thorough", "num_final_samples": 7},
    }
    assert {name: {k: taken[name][k] for k in said} for name, said in wanted.items()} == wanted


def test_every_bound_lies_where_its_closed_form_says(xs, columns):
    found = rows.parse(rows.to_json({rows.INDEX: np.arange(N)} | columns))
    log_px = np.asarray(jax.vmap(MODEL.log_px)(xs))
    kl = np.asarray(jax.vmap(lambda x: MODEL.kl(x, amortised(x)))(xs))
    best = np.asarray(jax.vmap(lambda x: MODEL.kl(x, MODEL.best_gaussian(x)))(xs))
    lines = gaps.decompose(found).lines
    want = {
        "elbo": log_px - kl,
        "local_gaussian": log_px - best,
        "local_full_gaussian": log_px,
        "iwae": log_px,
        "log_px": log_px,
        "approximation_gap_gaussian": best,
        "amortization_gap_gaussian": kl - best,
        "inference_gap": kl,
    }
    for name, values in want.items():
        line = lines[name]
        # Local optimisation may end a little below its optimum.
        error = 4 * line.mean.monte_carlo_error + 0.01
        assert line.mean.mean == pytest.approx(values.mean(), abs=error), name
        np.testing.assert_array_less(
            abs(line.values - values), 4 * line.errors + 0.01, err_msg=name
        )
    assert columns["local_gaussian_converged"].all()


def test_a_flow_goes_on_from_the_best_gaussian_asked_for_or_not(xs, columns):
    """And IWAE of the encoder's q is what its errors say."""
    settings = SETTINGS._replace(families=("planar",), iwae_start="posterior")
    found = map_datapoints(bounds, jax.random.key(1), xs, static={"settings": settings})
    assert np.all(found["local_planar_steps"] > columns["local_gaussian_steps"])
    gains = found["local_planar"] - columns["local_gaussian"]
    assert np.mean(gains) > 0
    assert np.all(gains > -4 * np.hypot(found["local_planar_se"], columns["local_gaussian_se"]))
    beyond, errors = found["iwae"] - jax.vmap(MODEL.log_px)(xs), found["iwae_se"]
    assert np.all(abs(beyond) < 4 * errors + 0.01)
    assert abs(beyond.mean()) < 4 * np.linalg.norm(errors) / N + 0.01


def test_a_flow_that_can_be_the_posterior_begins_as_it(xs):
    """p(z|x) is a Gaussian of full covariance: from a factorised one it is far in so few steps."""
    settings = SETTINGS._replace(families=("rnvp",), max_steps=1)

    @jax.jit
    @jax.vmap
    def local(key, x):
        row = bounds(key, x, settings=settings)
        return row["local_rnvp"], row["local_rnvp_se"]  # XLA drops what nobody reads

    found, errors = local(jax.random.split(jax.random.key(1), 4), xs[:4])
    assert np.all(abs(jax.vmap(MODEL.log_px)(xs[:4]) - found) < 4 * errors + 0.03)


def test_iwae_of_q_star_lies_between_its_elbo_and_log_px(xs, columns):
    log_px = jax.vmap(MODEL.log_px)(xs)
    gap = jax.vmap(lambda x: MODEL.kl(x, MODEL.best_gaussian(x)))(xs)
    np.testing.assert_allclose(columns["local_full_gaussian_iwae"], log_px, atol=2e-3)
    found, errors = columns["local_gaussian_iwae"], columns["local_gaussian_iwae_se"]
    assert np.all(found - columns["local_gaussian"] > gap / 2)
    assert np.all(found - log_px < 4 * errors)


def test_the_certificate_holds_zero_and_its_bounds_the_truth():
    """From the encoder's q, which is off; a z that x was not made from would be nats too high."""
    settings = SETTINGS._replace(families=(), ais_start="posterior")

    def truth(key, _):
        key_model, _ = jax.random.split(key)
        return MODEL.log_px(MODEL.simulate(named(key_model, "model"))[1])

    key, points = jax.random.key(2), np.arange(100)
    got = map_datapoints(certified, key, points, static={"settings": settings})
    log_px = map_datapoints(truth, key, points)
    line = gaps.certify(rows.parse(rows.to_json({rows.INDEX: points} | got))).line
    assert line is not None
    assert 0 < line.mean.standard_error < 0.03
    assert abs(line.mean.mean) < 4 * line.mean.standard_error
    for name, sign in (("upper", 1), ("lower", -1)):
        beyond = sign * (got[name] - log_px)
        assert abs(beyond.mean()) < 4 * beyond.std() / 10
        assert 0 < beyond.std() / 10 < 0.03
    np.testing.assert_allclose(got["gap"], got["upper"] - got["lower"], atol=1e-4)


def test_from_mode_and_curvature_nothing_is_left_to_anneal(xs, columns):
    """The posterior is Gaussian: Laplace's is it, every weight is p(x), forwards and backwards."""
    log_px = jax.vmap(MODEL.log_px)(xs)
    for name in ("ais", "iwae"):
        np.testing.assert_allclose(columns[name], log_px, atol=2e-3)
        assert np.all(columns[f"{name}_se"] < 1e-3)
    assert np.all(columns["elbo"] < log_px - 0.1)  # of the encoder's q still
    static = {"settings": SETTINGS._replace(families=())}
    both = map_datapoints(certified, jax.random.key(4), np.arange(N), static=static)
    np.testing.assert_allclose(both["gap"], 0, atol=2e-3)


@pytest.mark.parametrize("name", ["ais_start", "iwae_start"])
def test_an_unknown_start_is_named(xs, name):
    settings = SETTINGS._replace(**{name: "encoder"})
    with pytest.raises(ValueError, match=f"{name} must be one of posterior, .*got 'encoder'"):
        bounds(jax.random.key(0), xs[0], settings=settings)


def test_a_start_without_a_family_and_a_certificate_of_steps_that_adapt_are_named(xs):
    settings = SETTINGS._replace(ais_start="local", families=())
    with pytest.raises(ValueError, match="the first of families, and there is none"):
        bounds(jax.random.key(0), xs[0], settings=settings)
    settings = SETTINGS._replace(ais=SETTINGS.ais._replace(adaptation="authors"))
    with pytest.raises(ValueError, match="needs adaptation='pilot'; got 'authors'"):
        certified(jax.random.key(0), None, settings=settings)
