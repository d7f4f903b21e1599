"""A user's own model, and the mistakes in it that would give wrong numbers in silence."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from models import LinearGaussian, linear_gaussian

import infsub
from infsub import densities, mistakes
from infsub.types import Gaussian, Model

# Two models whose encoders are exact: a linear Gaussian one with orthogonal columns, so that its
# posteriors factorise, and a nonlinear Bernoulli decoder of two latent dimensions, by quadrature.


def orthogonal() -> LinearGaussian:
    model = linear_gaussian(3, 10)
    columns, _ = np.linalg.qr(model.weight)
    return model._replace(weight=jnp.asarray(columns * np.linspace(0.3, 1.5, 3, dtype=np.float32)))


class Bernoulli(NamedTuple):
    """z ~ N(0, I), independent bits x with logits w tanh(v z) + b."""

    hidden: jax.Array  # [H, D]
    weight: jax.Array  # [X, H]
    bias: jax.Array  # [X]

    def logits(self, z):
        return self.weight @ jnp.tanh(self.hidden @ z) + self.bias

    def log_likelihood(self, x, z):
        return densities.bernoulli_logits(x, self.logits(z))

    def best_gaussian(self, x) -> Gaussian:
        """The moments of p(z|x), from a grid."""
        axis = jnp.linspace(-4, 4, 41)
        z = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
        log_joint = jax.vmap(lambda z: self.log_likelihood(x, z) + densities.standard_normal(z))(z)
        weights = jax.nn.softmax(log_joint)
        mean = weights @ z
        return Gaussian(mean, jnp.sqrt(weights @ (z - mean) ** 2))


@jax.jit
def bernoulli() -> Bernoulli:
    keys = jax.random.split(jax.random.key(7), 3)
    shapes = ((8, 2), (24, 8), (24,))
    return Bernoulli(*map(jax.random.normal, keys, shapes))


def reversed_decoder(decoder):
    return decoder._replace(weight=jnp.asarray(np.asarray(decoder.weight)[::-1]))


class Params(NamedTuple):
    """A decoder and the mistakes made with it: as numbers, so that they share their programs."""

    decoder: Any
    encoder: Any  # the decoder whose posteriors encode gives
    factor: float = 1.0  # times the log likelihood
    prior: float = 0.0  # times log p(z), within the log likelihood
    term: float = 0.0  # times Σ sin z, within the log likelihood
    power: float = 1.0  # of the scale
    width: float = 1.0  # times the scale
    log_scale: float = 0.0  # 1: the scale's logarithm in its place, 2: the variance's
    wander: float = 0.0  # how far means are off, as seems random, in roots of scales
    wild: float = 1.0  # times the scale, here and there
    sees: float = 1.0  # times x, in encode
    noise: float = 1.0  # 0: sample_x returns the mean
    overflow: float = 0.0  # added to the log likelihood where z_0 > 0.5


def log_likelihood(params, x, z):
    wrong = params.prior * densities.standard_normal(z) + params.term * jnp.sum(jnp.sin(z))
    wrong += jnp.where(z[0] > 0.5, params.overflow, 0.0)
    return params.factor * params.decoder.log_likelihood(x, z) + wrong


def encode(params, x):
    mean, scale = params.encoder.best_gaussian(params.sees * x)
    wild = jnp.where(jnp.sin(3e3 * mean) > 0.8, params.wild, 1.0)
    given = params.width * (wild * scale) ** params.power
    mean += params.wander * jnp.sqrt(scale) * jnp.sin(1e4 * mean)
    return Gaussian(mean, jnp.where(params.log_scale, params.log_scale * jnp.log(scale), given))


def sample_normal(key, params, z, x):
    mean = params.decoder.weight @ z + params.decoder.bias
    noise = jax.random.normal(key, mean.shape)
    return mean + params.noise * params.decoder.noise * noise


def sample_bits(key, params, z, x):
    mean = jax.nn.sigmoid(params.decoder.logits(z))
    bits = jax.random.bernoulli(key, mean).astype(mean.dtype)
    return mean + params.noise * (bits - mean)


NORMAL = Model(3, encode, log_likelihood, sample_normal), Params(orthogonal(), orthogonal())
BITS = Model(2, encode, log_likelihood, sample_bits), Params(bernoulli(), bernoulli())
BOTH = pytest.mark.parametrize(("model", "params"), [NORMAL, BITS], ids=["normal", "bits"])
SIZES = {3: 10, 2: 24}  # of x, by D


def names(check) -> set[str]:
    return {finding.name for finding in check.findings if finding.level != "note"}


def draws(model, params, num_points: int) -> np.ndarray:
    """x's of the model, [N, X]."""
    keys = jax.random.split(jax.random.key(5), num_points)
    return np.array(_draws(model.sample_x, model.latent_dim, params, keys))


@partial(jax.jit, static_argnums=(0, 1))
def _draws(sample_x, latent_dim, params, keys):
    def draw(key):
        key_z, key_x = jax.random.split(key)
        return sample_x(key_x, params, jax.random.normal(key_z, (latent_dim,)), None)

    return jax.vmap(draw)(keys)


@BOTH
def test_a_right_model_stays_silent(model, params):
    ranks = []
    for seed in range(20):
        check = infsub.check(jax.random.key(seed), model, params)
        assert names(check) == set()
        assert check.ok
        ranks.append(check.calibration.ranks)
        if model is NORMAL[0]:  # q is exact, not only its moments
            assert not check.findings
            for coverage in check.calibration[:2]:
                assert abs(coverage.value - coverage.expected) < 4 * coverage.standard_error
    if model is NORMAL[0]:
        assert mistakes.uniformity(np.concatenate(ranks)) > 1e-3


@BOTH
@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"factor": "1/X"}, {"mean"}),
        ({"factor": -1.0}, {"loss"}),
        ({"factor": "-1/X"}, {"loss"}),
        ({"factor": 0.5}, {"factor"}),
        ({"prior": 1.0}, {"prior_twice"}),
        ({"prior": -1.0, "factor": -1.0}, {"prior_twice", "loss"}),
        ({"prior": 1.0, "factor": "1/X"}, {"prior_twice", "mean"}),
        ({"prior": "1/X", "factor": "1/X"}, {"prior_twice", "mean"}),
        ({"term": 1.0}, {"term_of_z"}),
        ({"term": 4.0}, {"term_of_z"}),
        ({"factor": 0.0}, {"ignores_z"}),
        ({"power": 2.0}, {"scale_power"}),
        ({"log_scale": 1.0}, {"scale_sign", "scale_power"}),
        ({"log_scale": 2.0}, {"scale_sign", "scale_power"}),
        ({"width": 0.2}, {"width"}),
        ({"width": 5.0}, {"width"}),
        ({"encoder": "other"}, {"encoder"}),
        ({"sees": 0.0}, {"constant_encoder"}),
        ({"noise": 0.0}, {"fixed_x"}),
        ({"overflow": math.nan}, {"non_finite"}),
    ],
    ids=lambda value: ", ".join(
        map(str, sorted(value.items() if isinstance(value, dict) else value))
    ),
)
def test_each_mistake_is_found_and_no_other(model, params, change, found):
    size = SIZES[model.latent_dim]
    values = {"1/X": 1 / size, "-1/X": -1 / size, "other": reversed_decoder(params.decoder)}
    change = {name: values.get(value, value) for name, value in change.items()}
    check = infsub.check(jax.random.key(0), model, params._replace(**change))
    assert names(check) == found
    assert not check.ok


def test_an_overconfident_q_has_ranks_that_are_not_uniform():
    model, params = NORMAL
    check = infsub.check(jax.random.key(0), model, params._replace(width=0.6))
    assert check.calibration.p_value < 1e-6
    assert np.unique(check.calibration.ranks).size == 200  # of 51 steps, broken at random
    assert check.calibration.coverage_50.value < 0.4
    assert [f.name for f in check.findings] == ["calibration"]
    assert check.ok  # no mistake: what the gaps are there to measure


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_means_that_are_off_are_no_variance_given_as_scale(power):
    """A half-trained encoder: its squares look as if scales were variances, the curvature knows better."""
    model, params = NORMAL
    decoder = params.decoder._replace(noise=jnp.asarray(0.05))
    params = params._replace(decoder=decoder, encoder=decoder, wander=1.3, wild=40.0)
    params = params._replace(power=power)
    check = infsub.check(jax.random.key(0), model, params)
    squares = check.statistics["(z - mean)² / scale² of q"].value
    if power == 1:
        assert 3 < squares < 30
        assert names(check) == set()
        assert [f.name for f in check.findings] == ["calibration"]
    else:
        assert names(check) == {"width"}
        assert "were the scales variances" in check.findings[0].sentence


@pytest.mark.parametrize("columns", [(1.0, 1.0, 1.0), (1.0, 0.75, 0.55)])
def test_a_factorised_q_may_be_narrow(columns):
    """Beside a correlated posterior the best q is far narrower than z's spread: that is no mistake."""
    model, params = NORMAL
    weight = params.decoder.weight
    nearly_parallel = weight[:, 2:] * jnp.array(columns) + 0.06 * weight
    decoder = params.decoder._replace(weight=nearly_parallel)
    check = infsub.check(
        jax.random.key(0), model, params._replace(decoder=decoder, encoder=decoder)
    )
    assert check.statistics["(z - mean)² / scale² of q"].value > 4
    assert names(check) == set()


def by_outputs(params, x, logits):
    return params.width * densities.bernoulli_logits(x, logits)


@pytest.mark.parametrize("simulates", [True, False])
def test_outputs_must_say_the_same_as_the_likelihood(simulates):
    model, params = BITS
    model = model._replace(
        outputs=lambda params, x, z: params.decoder.logits(z), log_likelihood_of_outputs=by_outputs
    )
    xs = None if simulates else draws(model, params, 200)
    model = model if simulates else model._replace(sample_x=None)
    assert names(infsub.check(jax.random.key(0), model, params, xs)) == set()
    wrong = params._replace(width=1.1)  # of the scale too, which is no mistake
    assert names(infsub.check(jax.random.key(0), model, wrong, xs)) == {"outputs"}


def test_what_the_pairs_cannot_tell_is_said():
    """A likelihood far sharper than the prior hides it."""
    model, params = NORMAL
    decoder = params.decoder._replace(noise=jnp.asarray(0.005))
    check = infsub.check(
        jax.random.key(0), model, params._replace(decoder=decoder, encoder=decoder)
    )
    assert [f.name for f in check.findings] == ["unchecked"]
    assert "raise num_points" in str(check)


def test_uniformity_is_kolmogorov_and_smirnovs_p():
    """The limiting law's quantiles, as tabulated: P(√N D > 1.3581) = 0.05."""
    for scaled, p in ((1.0727, 0.2), (1.2238, 0.1), (1.3581, 0.05), (1.6276, 0.01)):
        size = 10**6
        values = (np.arange(size) + 0.5) / size * (1 - scaled / math.sqrt(size))
        assert abs(mistakes.uniformity(values) - p) < 0.01 * p
    assert mistakes.uniformity((np.arange(100) + 0.5) / 100) == 1


def test_bad_inputs_are_named_by_index():
    model, params = NORMAL
    xs = np.concatenate([np.zeros((3, 10), np.float32), draws(model, params, 200)])[::-1].copy()
    xs[[3, 17], 2] = np.nan
    xs[40, 0] = np.inf
    check = infsub.check(jax.random.key(0), model, params, xs)
    assert names(check) == {"nan_input"}
    assert "at 3, 17, 40" in check.findings[0].sentence
    assert np.isfinite(check.statistics["ELBO on xs"].value)
    check = infsub.check(jax.random.key(0), model, params, np.full((5, 10), np.nan))
    assert names(check) == {"nan_input"}


def test_no_datapoint_is_finite():
    model, params = NORMAL
    xs = draws(model, params, 200)
    params = params._replace(decoder=params.decoder._replace(noise=jnp.asarray(jnp.nan)))
    check = infsub.check(jax.random.key(0), model, params, xs)
    assert names(check) == {"non_finite"}


def test_data_on_another_scale():
    model, params = BITS
    bits = draws(model, params, 200)
    grey, pixels = 0.7 * bits, (255 * bits).astype(np.uint8)
    for xs, found in ((bits, set()), (bits == 1, set()), (pixels, {"pixels"}), (grey, {"grey"})):
        assert names(infsub.check(jax.random.key(0), model, params, xs)) == found


def test_the_elbo_of_training():
    """The linear Gaussian model knows its own: q is exact, so the ELBO is log p(x)."""
    model, params = NORMAL
    xs = draws(model, params, 200)
    truth = float(np.mean(jax.vmap(params.decoder.log_px)(xs)))
    half_log_2pi = 0.5 * math.log(2 * math.pi)

    def sentences(training_elbo):
        check = infsub.check(jax.random.key(0), model, params, xs, training_elbo=training_elbo)
        assert abs(check.statistics["ELBO on xs"].value - truth) < 1e-3
        return [f.sentence for f in check.findings if f.name == "training_elbo"]

    assert sentences(truth) == []
    assert "a loss" in sentences(-truth)[0]
    assert "a mean over the 10 values" in sentences(truth / 10)[0]
    assert "without a Gaussian's -X/2 log 2π" in sentences(truth + 10 * half_log_2pi)[0]
    assert "would fit" not in sentences(5 * truth)[0]


@pytest.mark.parametrize(
    ("change", "found", "words"),
    [
        ({}, set(), ""),
        ({"factor": 0.1}, {"fit"}, "averaged over the 10 values"),
        ({"factor": -1.0}, {"fit"}, "a loss"),
        ({"power": 2.0}, {"fit"}, "a variance"),
        ({"log_scale": 2.0}, {"scale_sign"}, "log_variance"),
        ({"encoder": reversed_decoder(orthogonal())}, {"fit"}, "encoder"),
    ],
    ids=str,
)
def test_without_sample_x_the_data_are_looked_at(change, found, words):
    model, params = NORMAL
    xs = draws(model, params, 200)
    check = infsub.check(
        jax.random.key(0), model._replace(sample_x=None), params._replace(**change), xs
    )
    assert names(check) == found
    assert words in check.findings[0].sentence
    assert check.findings[-1].name == "unchecked"
    assert check.calibration is None


def test_bytes_show_without_sample_x():
    model, params = NORMAL
    xs = np.round(255 * np.random.default_rng(0).uniform(size=(200, 10)))
    check = infsub.check(jax.random.key(0), model._replace(sample_x=None), params, xs)
    assert names(check) == {"pixels"}


class Counts(NamedTuple):
    """z ~ N(0, I), independent counts x of rates exp(w z + 3)."""

    weight: jax.Array  # [X, D]
    factor: float = 1.0  # times the log likelihood
    power: float = 1.0  # of the scale

    def log_likelihood(self, x, z):
        log_rate = self.weight @ z + 3
        return jnp.sum(x * log_rate - jnp.exp(log_rate) - jax.scipy.special.gammaln(x + 1))

    def encode(self, x):
        """The mode and the curvature of p(z|x), by Newton's steps."""

        def precision(z):
            return jnp.eye(z.size) + (self.weight.T * jnp.exp(self.weight @ z + 3)) @ self.weight

        def step(_, z):
            gradient = z - self.weight.T @ (x - jnp.exp(self.weight @ z + 3))
            return z - jnp.linalg.solve(precision(z), gradient)

        mode = jax.lax.fori_loop(0, 8, step, jnp.zeros(self.weight.shape[1]))
        return Gaussian(mode, jnp.diag(precision(mode)) ** (-0.5 * self.power))


def times_factor(params, x, z):
    return params.factor * params.log_likelihood(x, z)


COUNTS = Model(2, Counts.encode, times_factor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 1 / 30}, "averaged over the 30 values"),
        ({"factor": -1.0}, "a loss"),
        ({"power": 2.0}, "a variance"),
        ({}, ""),
    ],
    ids=str,
)
def test_counts_are_no_bytes(change, words):
    """Whole numbers up to 70 or so; what is wrong is what explains the curvature."""
    rng = np.random.default_rng(0)
    weight = np.linalg.qr(rng.normal(size=(30, 2)))[0].astype(np.float32)
    xs = rng.poisson(np.exp(rng.normal(size=(200, 2)) @ weight.T + 3))
    assert 50 < xs.max() <= 255
    check = infsub.check(jax.random.key(0), COUNTS, Counts(weight, **change), xs.astype(np.float32))
    assert names(check) == ({"fit"} if words else set())
    assert words in check.findings[0].sentence
    assert "255" not in str(check)


def test_an_encoder_in_training_mode():
    model, params = NORMAL
    rng = np.random.default_rng(0)

    def dropout(params, x):
        q = encode(params, x)
        return q._replace(mean=q.mean * rng.uniform(0.9, 1.1))

    check = infsub.check(jax.random.key(0), model._replace(encode=dropout), params)
    assert names(check) == {"changing"}


def test_an_encoder_with_random_numbers_from_outside():
    model, params = NORMAL
    rng = np.random.default_rng(0)

    def noisy(params, x):
        q = encode(params, x)
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        factor = jax.pure_callback(
            lambda _: np.float32(rng.uniform(0.9, 1.1)), shape, x[0], vmap_method="sequential"
        )
        return q._replace(mean=q.mean * factor)

    assert names(infsub.check(jax.random.key(0), model._replace(encode=noisy), params)) == {
        "changing"
    }


def sample_of_gaussian(q, key):
    return densities.sample_gaussian(key, q)


def test_any_q():
    """A sampler and a full covariance say the same as the Gaussian that they are."""
    model, params = NORMAL

    def sampler(params, x):
        return Partial(sample_of_gaussian, encode(params, x))

    def full(params, x):
        q = encode(params, x)
        return Gaussian(q.mean, jnp.diag(q.scale))

    for other in (sampler, full):
        check = infsub.check(jax.random.key(0), model._replace(encode=other), params)
        assert not check.findings
        wrong = params._replace(width=0.2)
        check = infsub.check(jax.random.key(0), model._replace(encode=other), wrong)
        assert names(check) == {"width"}


class Batches(NamedTuple):
    """z ~ N(2 batch, scale² I), x["y"] ~ N(W z + x["offset"], I): a prior with a covariate, and x too."""

    weight: jax.Array  # [X, D]
    scale: float = 0.3
    drawn_scale: float = 0.3  # of what sample_prior draws for batch 1
    factor: float = 1.0  # times the log likelihood

    def log_likelihood(self, x, z):
        return self.factor * densities.normal(x["y"], self.weight @ z + x["offset"], jnp.ones(12))

    def sample_x(self, key, z, x):
        return {**x, "y": self.weight @ z + x["offset"] + jax.random.normal(key, (12,))}

    def log_prior(self, x, z):
        return densities.normal(z, 2.0 * x["batch"], self.scale)

    def sample_prior(self, key, x):
        scale = jnp.where(x["batch"], self.drawn_scale, self.scale)
        return 2.0 * x["batch"] + scale * jax.random.normal(key, (2,))

    def encode(self, x):
        """p(z|x), up to its covariance."""
        precision = self.weight.T @ self.weight + jnp.eye(2) / self.scale**2
        shift = x["y"] - x["offset"] - self.weight @ jnp.full(2, 2.0 * x["batch"])
        mean = 2.0 * x["batch"] + jnp.linalg.inv(precision) @ self.weight.T @ shift
        return Gaussian(mean, 1 / jnp.sqrt(jnp.diagonal(precision)))


def test_a_prior_and_covariates_of_ones_own():
    model = Model(
        2,
        Batches.encode,
        Batches.log_likelihood,
        lambda key, params, z, x: params.sample_x(key, z, x),
        Batches.log_prior,
        lambda key, params, x: params.sample_prior(key, x),
    )
    params = Batches(10 * linear_gaussian(2, 12).weight)
    xs = {
        "y": np.zeros((100, 12), np.float32),
        "offset": np.linspace(20, 60, 100, dtype=np.float32),
        "batch": np.arange(100, dtype=np.float32) % 2,
    }
    assert names(infsub.check(jax.random.key(0), model, params, xs)) == set()
    check = infsub.check(jax.random.key(0), model, params._replace(drawn_scale=0.6), xs)
    assert "prior" in names(check)
    # Four times the square for one half of the datapoints, once for the other.
    assert abs(check.statistics["score² / curvature of log_prior"].value - 2.5) < 0.6
    check = infsub.check(jax.random.key(0), model, params._replace(factor=1 / 12), xs)
    assert names(check) == {"mean"}
    assert "averaged over the 12 values" in str(check)  # of y: covariates are none


def test_the_report():
    model, params = NORMAL
    check = infsub.check(jax.random.key(0), model, params._replace(factor=-0.1, power=2.0))
    report = str(check)
    assert report.startswith("Something is wrong.")
    assert "error (loss)" in report
    assert "averaged over the 10 values" in report
    assert "a constant without z" in report
    assert [f.level for f in check.findings] == ["error", "error", "note"]
    assert "&lt;" not in check._repr_html_()
    assert check._repr_html_().startswith("<pre>Something is wrong.")


def test_impossible_arguments():
    (model, params), key = NORMAL, jax.random.key(0)
    blind = model._replace(sample_x=None)
    for arguments, words in (
        ((blind, params), "without sample_x"),
        ((model._replace(log_prior=log_likelihood), params), "without sample_prior"),
    ):
        with pytest.raises(ValueError, match=words):
            infsub.check(key, *arguments)
    with pytest.raises(ValueError, match="at least 20"):
        infsub.check(key, model, params, num_points=10)
    with pytest.raises(ValueError, match="needs xs"):
        infsub.check(key, model, params, training_elbo=-90.0)
    with pytest.raises(ValueError, match=r"shape \[4\], the latent_dim"):
        infsub.check(key, blind._replace(latent_dim=4), params, np.ones((30, 10)))
    with pytest.raises(TypeError, match="must return a scalar"):
        infsub.check(key, model._replace(log_likelihood=lambda p, x, z: x), params)


def test_equal_models_share_their_programs():
    traces, numbers = [], []

    def counted(params, x, z):
        traces.append(1)
        return log_likelihood(params, x, z)

    _, params = NORMAL
    for seed in range(3):
        model = Model(3, encode, counted, sample_normal)
        infsub.check(jax.random.key(seed), model, params)
        numbers.append(len(traces))
    assert numbers[0] == numbers[1] == numbers[2] > 0
    x, z = jnp.ones(10), jnp.ones(3)
    target = model.target(params, x)
    assert jax.jit(target.log_likelihood)(z) == jax.jit(log_likelihood)(params, x, z)
    assert target.log_prior is None
