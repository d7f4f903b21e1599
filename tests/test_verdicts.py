"""Verdicts: on models built to have each, and rule by rule on rows."""

from __future__ import annotations

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import LinearGaussian, linear_gaussian

import infsub
from infsub import densities, gaps, rows, verdicts
from infsub.types import Gaussian

N = 12
KNOWN = linear_gaussian(latent_dim=2, data_dim=3)
BOTH = ("gaussian", "full_gaussian")
SETTINGS = infsub.Settings(
    elbo_samples=500, iwae_samples=500, ais=infsub.AIS(8, 20, 3), max_steps=1000
)


# Correlated posteriors, of which a factorised q covers little.
CORRELATED = LinearGaussian(
    jnp.array([[2.0, 1.9], [1.9, 2.0], [0.3, 0.3]]), KNOWN.bias, KNOWN.noise
)


def encode(params, x):
    return x["q"]


def log_likelihood(params, x, z):
    return params.log_likelihood(x["x"], z)


def sample_x(key, params, z, x):
    noise = params.noise * jax.random.normal(key, params.bias.shape)
    return x | {"x": params.weight @ z + params.bias + noise}


# q(z|x) comes with the data: one program for encoders of every kind.
LINEAR = infsub.Model(2, encode, log_likelihood, sample_x)


def banana(params, x, z):
    """x ~ N(z_2 + 2 z_1², 0.5²): no Gaussian is like its posterior."""
    return densities.normal(x["x"], z[1:] + 2 * z[:1] ** 2, jnp.asarray(0.5))


def drawn(known):
    return jax.vmap(known.simulate)(jax.random.split(jax.random.key(0), N))[1]


def measured(model, params, xs, families=BOTH, num_certified=0, **settings):
    settings = SETTINGS._replace(**settings)
    return infsub.measure(
        jax.random.key(1),
        model,
        params,
        xs,
        families=families,
        num_certified=num_certified,
        settings=settings,
        progress=False,
    )


def verdict_of(measurement):
    return measurement.run.verdicts


def amortised(known, xs, shift=0.0, widen=1.0):
    q = jax.vmap(known.best_gaussian)(xs)
    return {"x": xs, "q": Gaussian(q.mean + shift, widen * q.scale)}


def test_an_encoder_that_is_off_is_amortization():
    found = verdict_of(measured(LINEAR, KNOWN, amortised(KNOWN, drawn(KNOWN), shift=2.0)))
    assert str(found.model) == "amortization"
    assert verdicts.count(found.points) == {"amortization": N}
    assert "Verdict: amortization. Of an inference gap of" in found.sentences[0]
    assert found.sentences[0].endswith("widen it, or fit q at each datapoint.")
    assert found.sentences[1] == f"Of {N} datapoints: {N} amortization."


def test_a_correlated_posterior_is_the_familys_covariance():
    measurement = measured(LINEAR, CORRELATED, amortised(CORRELATED, drawn(CORRELATED)))
    found = verdict_of(measurement)
    assert str(found.model) == "family (covariance)"
    assert verdicts.count(found.points) == {"family (covariance)": N}
    for text in (str(measurement), measurement._repr_markdown_()):
        assert "Verdict: family (covariance)." in text
    rows_of = list(csv.DictReader(io.StringIO(measurement.datapoints())))
    assert [row["verdict"] for row in rows_of] == ["family (covariance)"] * N
    assert {row["next"] for row in rows_of} == {found.model.advice}


def test_the_exact_posterior_is_tight():
    known = LinearGaussian(jnp.eye(3, 2), KNOWN.bias, KNOWN.noise)  # a posterior that factorises
    found = verdict_of(measured(LINEAR, known, amortised(known, drawn(known))))
    assert str(found.model) == "tight"
    assert verdicts.count(found.points) == {"tight": N}


@pytest.mark.slow
def test_a_banana_is_the_familys_shape():
    def best(x):
        """Where local inference ends, so that amortization costs nothing."""
        target = infsub.Target(None, lambda z: banana(None, {"x": x}, z), 2)
        posterior = infsub.posteriors.gaussian(2)
        found = infsub.optimize_local(jax.random.key(3), target, posterior)
        return infsub.posteriors.gaussian_of(found.params)

    xs = jnp.linspace(-1.0, 0.5, N)[:, None]
    xs = {"x": xs, "q": jax.vmap(best)(xs)}
    model = LINEAR._replace(log_likelihood=banana, sample_x=None)
    found = verdict_of(measured(model, None, xs, ais=infsub.AIS(32, 200, 5)))
    assert str(found.model) == "family (shape)"


@pytest.mark.slow
def test_an_optimiser_that_is_stopped_is_named():
    xs = amortised(CORRELATED, drawn(CORRELATED))
    found = verdict_of(measured(LINEAR, CORRELATED, xs, BOTH[:1], preset="authors", max_steps=100))
    assert str(found.model) == "optimiser"
    assert "max_steps" in found.model.advice


@pytest.mark.slow
def test_few_temperatures_are_inconclusive():
    xs = amortised(CORRELATED, drawn(CORRELATED), shift=1.0)
    settings = {"ais": infsub.AIS(4, 2, 1), "ais_start": "prior"}
    found = verdict_of(measured(LINEAR, CORRELATED, xs, BOTH[:1], num_certified=4, **settings))
    assert str(found.model).startswith("inconclusive")


# Rule by rule: gaps of 12 datapoints that differ by little, errors of a hundredth of a nat.
DEFAULT = {"elbo": -3.0, "local_gaussian": -2.0, "ais": -1.9}
FULL = {"local_full_gaussian": -1.2, "ais": -1.0}
BESIDE = ("_ess", "_acceptance", "_converged")


def judged(certificate=None, error=0.01, spoilt=None, number=0, **bounds):
    """spoilt: other bounds of the first `number` datapoints."""
    bounds = DEFAULT | bounds
    noise = 0.001 * np.random.default_rng(0).normal(size=12)
    made = [
        {"index": n}
        | {name: value + noise[n] for name, value in bounds.items()}
        | {f"{name}_se": error for name in DEFAULT | bounds if not name.endswith(BESIDE)}
        for n in range(12)
    ]
    for row in made:
        row |= {name: value for name, value in bounds.items() if name.endswith(BESIDE)}
    for row in made[:number]:
        row |= spoilt or {}
    parsed = rows.parse(made)
    if certificate is not None:
        values = np.full(5, certificate)
        certificate = gaps.Certificate(gaps.Line(values, np.zeros(5), "difference"), [], [])
    return verdicts.judge(parsed, gaps.decompose(parsed), certificate)


@pytest.mark.parametrize(
    ("bounds", "want"),
    [
        ({}, "amortization"),
        ({"local_gaussian_converged": 0}, "amortization"),  # it can only grow
        ({"local_gaussian": -2.8, "local_gaussian_converged": 0}, "optimiser"),
        ({"local_gaussian": -3.2}, "optimiser"),
        ({"local_gaussian": -2.8}, "family"),
        (FULL | {"local_gaussian": -2.8}, "family (covariance)"),
        (FULL | {"local_gaussian": -2.8, "local_full_gaussian": -2.5}, "family (shape)"),
        (
            FULL
            | {
                "local_gaussian": -2.8,
                "local_full_gaussian": -2.5,
                "local_full_gaussian_converged": 0,
            },
            "family",
        ),
        (FULL | {"local_gaussian": -2.8, "local_full_gaussian": -1.9}, "family"),
        ({"local_gaussian": -2.45}, "inconclusive (which is larger)"),
        ({"ais_ess": 1.5}, "inconclusive (log p̂)"),
        ({"ais_acceptance": 0.0}, "inconclusive (log p̂)"),  # whose chains stand still
        ({"iwae": -1.7}, "inconclusive (log p̂)"),
        ({"iwae": -2.3}, "amortization"),  # below log p̂ it is no witness
        ({"ais": -3.5}, "inconclusive (log p̂)"),
        ({"certificate": 0.9}, "amortization"),
        ({"certificate": 1.2}, "inconclusive (the certificate)"),
        ({"elbo": -1.92, "local_gaussian": -1.91}, "tight"),
        ({"elbo": -2.03, "local_gaussian": -1.91}, "amortization"),
    ],
)
def test_every_rule(bounds, want):
    found = judged(**bounds)
    assert str(found.model) == want
    assert verdicts.count(found.points) == {want: 12}


@pytest.mark.parametrize(
    ("spoilt", "of_one"),
    [({"local_gaussian": -3.5}, "optimiser"), ({"ais": -3.5}, "inconclusive (log p̂)")],
)
def test_what_is_wrong_at_a_tenth_of_the_datapoints_is_of_the_model(spoilt, of_one):
    for number, of_model in ((1, "amortization"), (3, of_one)):
        found = judged(spoilt=spoilt, number=number)
        assert verdicts.count(found.points) == {"amortization": 12 - number, of_one: number}
        assert str(found.model) == of_model


def test_a_large_error_at_a_datapoint_is_inconclusive_there_alone():
    found = judged(error=1.0)
    assert str(found.model) == "amortization"  # its error is over datapoints
    assert verdicts.count(found.points) == {"inconclusive (which is larger)": 12}


@pytest.mark.parametrize("own", ["full_gaussian", ""])
def test_the_optimum_of_another_family_than_the_encoders_is_not_blamed(own):
    """Of q_full or a flow less than L[q] is what L[q*] FFG has to be."""
    parsed = rows.parse(
        [{"index": n, "elbo": -2.0, "local_gaussian": -2.6, "ais": -1.9} for n in (0, 1)]
    )
    found = gaps.decompose(parsed, own)
    judged = verdicts.judge(parsed, found)
    assert verdicts.count(judged.points) == {"inconclusive (the gap is not split)": 2}
    assert judged.sentences[0].startswith(
        "Verdict: inconclusive (the gap is not split). The inference gap"
    )
    assert "the encoder's own family: name it in `families`" in judged.model.advice
    assert not any("Negative" in note for note in found.notes)
    assert str(verdicts.judge(parsed, gaps.decompose(parsed, "gaussian")).model) == "optimiser"


def test_a_certificate_of_one_point_has_its_monte_carlo_error():
    parsed = rows.parse([DEFAULT | {"index": n} for n in range(3)])
    for error, want in ((0.01, "amortization"), (5.0, "inconclusive (the certificate)")):
        line = gaps.Line(np.array([0.01]), np.array([error]), "difference")
        certificate = gaps.Certificate(line, [], [])
        assert str(verdicts.judge(parsed, gaps.decompose(parsed), certificate).model) == want


def test_what_cannot_be_said():
    made = [{"index": n, "elbo": -2.0 - n, "elbo_se": 0.1} for n in range(3)]
    parsed = rows.parse(made)
    found = verdicts.judge(parsed, gaps.decompose(parsed))
    assert str(found.model) == "inconclusive (the gap is not split)"
    made = [DEFAULT | {"index": n} | ({"ais": None} if n == 1 else {}) for n in range(3)]
    parsed = rows.parse(made)
    found = verdicts.judge(parsed, gaps.decompose(parsed))
    assert str(found.points[1]) == "inconclusive (not finite)"
    assert str(found.model) == "inconclusive (log p̂)"  # a third of its datapoints is lost
    assert str(found.points[0]) == "amortization"
