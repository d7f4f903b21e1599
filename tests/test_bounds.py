"""ELBO and IWAE against closed forms, and the streamed forms against plain ones."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from models import linear_gaussian

import infsub
from infsub import bounds
from infsub.samplers import as_sampler
from infsub.types import Gaussian, Target

MODEL = linear_gaussian(10, 20)


@partial(jax.jit, static_argnums=0)
def simulate(num_points, model=MODEL):
    _, xs = jax.vmap(model.simulate)(jax.random.split(jax.random.key(5), num_points))
    return xs


X = MODEL.simulate(jax.random.key(5))[1]


def wide(q):
    """A q that is wrong, so that its gap is not zero."""
    return Gaussian(q.mean + 0.2 * q.scale, 1.3 * q.scale)


def test_elbo_is_log_px_minus_kl():
    xs = simulate(200)

    def point(key, x, model):
        q = wide(model.best_gaussian(x))
        estimate = infsub.elbo(key, model.target(x), q, num_samples=500)
        return estimate, model.log_px(x) - model.kl(x, q)

    estimate, truth = infsub.map_datapoints(point, jax.random.key(0), xs, MODEL)
    z_scores = (estimate.log_px - truth) / estimate.standard_error
    assert abs(z_scores.mean()) < 3 / np.sqrt(200)
    # 200 independent standard errors are right when their z-scores have unit variance.
    assert abs(z_scores.var() - 1) < 3 * np.sqrt(2 / 200)


def test_elbo_of_the_exact_posterior_is_log_px():
    model = linear_gaussian(1, 3)  # one latent dimension: the posterior is a Gaussian of the family
    _, x = model.simulate(jax.random.key(5))
    estimate = infsub.elbo(jax.random.key(0), model.target(x), model.best_gaussian(x))
    np.testing.assert_allclose(estimate.log_px, model.log_px(x), rtol=1e-5)
    assert estimate.standard_error < 1e-5


def test_every_weight_of_the_exact_posterior_is_px():
    """A Gaussian of full covariance: no factorised one is the posterior of ten dimensions."""
    target, q, truth = MODEL.target(X), MODEL.exact_gaussian(X), MODEL.log_px(X)
    elbo = infsub.elbo(jax.random.key(0), target, q)
    np.testing.assert_allclose(elbo.log_weights, truth, rtol=1e-4)
    iwae = infsub.iwae(jax.random.key(0), target, q, 100)
    np.testing.assert_allclose(iwae.log_px, truth, rtol=1e-5)
    np.testing.assert_allclose(iwae.ess, 100, rtol=1e-3)


@pytest.mark.parametrize("latent_dim", [1, 10])
def test_iwae_weights_average_to_px(latent_dim):
    model = linear_gaussian(latent_dim, 20)
    num_points = 2000
    xs = simulate(num_points, model)

    def point(key, x, model):
        q = wide(model.best_gaussian(x))
        estimate = infsub.iwae(key, model.target(x), q, num_samples=20)
        return jnp.exp(estimate.log_px - model.log_px(x))

    ratio = infsub.map_datapoints(point, jax.random.key(0), xs, model)
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / np.sqrt(num_points)
    assert ratio.std() / np.sqrt(num_points) < 0.02


def test_iwae_converges_to_log_px_with_an_honest_standard_error():
    model = linear_gaussian(4, 8, noise=1.0)

    def point(key, x, model):
        # As wide as the prior, so wider than the posterior everywhere: weights are bounded.
        q = Gaussian(model.posterior(x)[0] + 0.1, jnp.ones(4))
        return infsub.iwae(key, model.target(x), q, 2000), model.log_px(x)

    estimate, truth = infsub.map_datapoints(point, jax.random.key(1), simulate(100, model), model)
    z_scores = (estimate.log_px - truth) / estimate.standard_error
    assert estimate.standard_error.max() < 0.1
    # E[log mean w] = log p(x) − error² / 2, to second order, so a z-score's mean is −error / 2.
    assert abs(z_scores.mean() + estimate.standard_error.mean() / 2) < 3 / np.sqrt(100)
    assert abs(z_scores.std() - 1) < 0.25


@pytest.mark.parametrize("num_samples", [1, 7, 1000, 1003])
def test_streaming_does_not_change_the_estimate(num_samples):
    @jax.jit
    def three(key, target, q):
        draw = partial(bounds.log_weight, target=target, q=as_sampler(q))
        keys = jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(num_samples))
        return (
            infsub.iwae(key, target, q, num_samples, chunk_size=100),
            bounds.log_mean_exp(jax.vmap(draw)(keys)),
            infsub.iwae(key, target, q, num_samples, chunk_size=num_samples),
        )

    q = wide(MODEL.best_gaussian(X))
    streamed, plain, whole = three(jax.random.key(2), MODEL.target(X), q)
    for other in (plain, whole):
        np.testing.assert_allclose(streamed.log_px, other.log_px, rtol=1e-5)
        np.testing.assert_allclose(streamed.standard_error, other.standard_error, rtol=1e-3)
        np.testing.assert_allclose(streamed.ess, other.ess, rtol=1e-3)
    np.testing.assert_allclose(streamed.pareto_k, whole.pareto_k, rtol=1e-3)


def plain_pareto_k(weights):
    """Zhang & Stephens' estimator in float64, line by line from Vehtari et al.'s appendix."""
    weights = np.sort(np.asarray(weights, np.float64))
    size = int(np.ceil(min(0.2 * weights.size, 3 * np.sqrt(weights.size))))
    excess = weights[-size:] - weights[-size - 1]
    grid = np.arange(1, 30 + int(np.sqrt(size)) + 1)
    quartile = excess[int(np.floor(size / 4 + 0.5)) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(grid.size / (grid - 0.5))) / (3 * quartile)
    k = np.array([np.mean(np.log1p(-t * excess)) for t in theta])
    profile = size * (np.log(-theta / k) - k - 1)
    weight = 1 / np.array([np.sum(np.exp(profile - p)) for p in profile])
    k = np.mean(np.log1p(-np.sum(weight * theta) * excess))
    return (k * size + 5) / (size + 10)


pareto_ks = jax.jit(jax.vmap(bounds.pareto_k))


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_finds_the_shape_of_the_tail(shape):
    uniform = np.random.default_rng(0).uniform(size=(50, 4000))
    weights = (uniform**-shape - 1) / shape + 0.5
    tail = np.sort(np.log(weights), axis=1)[:, ::-1][:, : bounds._tail_size(4000) + 1]
    found = jax.device_get(pareto_ks(tail.astype(np.float32)))
    np.testing.assert_allclose(found[:5], [plain_pareto_k(w) for w in weights[:5]], rtol=0.01)
    # asymptotic variance (1 + k)² / M of the estimator's maximum likelihood form, over 50 data sets
    error = (1 + shape) / np.sqrt(190 * 50)
    assert abs(found.mean() - shape) < 4 * error + 0.03  # 0.03: its prior pulls k towards 0.5


def test_pareto_k_of_equal_weights_does_not_warn():
    assert pareto_ks(jnp.zeros((50, bounds._tail_size(4000) + 1))).tolist() == [-jnp.inf] * 50


@pytest.mark.parametrize("scale", [20.0, 50.0, 100.0, 1000.0])
def test_pareto_k_warns_where_the_tail_spans_more_than_float32(scale):
    log_weights = scale * np.random.default_rng(0).normal(size=(20, 5000))
    tail = np.sort(log_weights, axis=1)[:, ::-1][:, : bounds._tail_size(5000) + 1]
    found = jax.device_get(pareto_ks(tail.astype(np.float32)))
    assert np.all(found > 0.7)
    if scale >= 100:  # Hill's, of a tail that is cut at e^-1000
        spans = np.minimum(tail[:, :1] - tail, 1000)
        want = spans[:, -1] - np.mean(spans[:, :-1], axis=1)
        np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize("floor", [-10.0, -50.0, -79.0, -100.0, -np.inf])
def test_pareto_k_of_weights_that_a_few_rule_warns(floor):
    """Of a likelihood with a floor, such as a contaminated normal's, all others are equal."""
    tail = np.full((3, bounds._tail_size(4000) + 1), floor, np.float32)
    tail[0, :20] = tail[1, 0] = 0
    tail[2, 0] = floor + 1  # one that hardly counts
    assert np.isfinite(pareto_ks(tail)[:2]).all()  # as rows keep it
    assert (np.asarray(pareto_ks(tail))[:2] > 0.7).all()
    assert np.isinf(floor) or pareto_ks(tail)[2] == -np.inf


@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
@pytest.mark.parametrize("full", [False, True])
def test_a_q_of_fewer_digits_is_computed_with_in_float32(dtype, full):
    eye = jnp.eye(10) if full else jnp.ones(10)
    q = Gaussian(MODEL.best_gaussian(X).mean.astype(dtype), eye.astype(dtype))
    target, wide = MODEL.target(X), jax.tree.map(lambda a: a.astype("float32"), q)
    for bound in (infsub.elbo, partial(infsub.iwae, num_samples=100)):
        found, want = (bound(jax.random.key(0), target, q) for q in (q, wide))
        np.testing.assert_array_equal(found.log_px, want.log_px)


@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
def test_a_density_of_fewer_digits_is_refused(dtype):
    """A sum of hundreds of nats has no digits behind the point in bfloat16, and integers no gradient."""
    key, eye = jax.random.key(0), Gaussian(jnp.zeros(2), jnp.ones(2))
    target = Target(None, lambda z: z.sum().astype(dtype), 2)
    for bound in (infsub.elbo, infsub.iwae, infsub.ais):
        with pytest.raises(
            TypeError, match=f"log_likelihood must return float32 .* returned {dtype}"
        ):
            bound(key, target, eye)
    with pytest.raises(TypeError, match="log_likelihood must return float32"):
        infsub.laplace(target)
    with pytest.raises(TypeError, match="q's log density must return float32"):
        infsub.elbo(key, MODEL.target(X), lambda key: (jnp.zeros(10), jnp.zeros((), dtype)))


def test_a_gaussian_may_be_of_lists():
    target, q = MODEL.target(X), Gaussian([0.0] * 10, [1.0] * 10)  # pyright: ignore
    want = Gaussian(jnp.zeros(10), jnp.ones(10))
    for bound in (infsub.elbo, partial(infsub.ais, num_chains=2, num_temperatures=2)):
        found, expected = (bound(jax.random.key(0), target, q) for q in (q, want))
        np.testing.assert_array_equal(found.log_px, expected.log_px)
    np.testing.assert_array_equal(infsub.laplace(target, q).mean, infsub.laplace(target, want).mean)


@pytest.mark.parametrize("level", [0.0, -1500.0, 3e4])
def test_alike_weights_have_the_error_of_their_spread_at_any_level(level):
    spread = np.random.default_rng(0).normal(size=16)
    log_weights = np.float32(level) + np.float32(2.0**-4) * np.round(spread * 16).astype(np.float32)
    relative = np.exp(
        log_weights.astype(np.float64) - level
    )  # exact: multiples of 1/16 at any level
    want = np.std(relative, ddof=1) / np.sqrt(16) / np.mean(relative)
    found = jax.jit(bounds.log_mean_exp)(log_weights)
    np.testing.assert_allclose(found.standard_error, want, rtol=1e-5)
    np.testing.assert_allclose(
        found.log_px, level + np.log(np.mean(relative)), rtol=1e-6, atol=1e-6
    )


def test_iwae_warns_of_a_bad_q_and_not_of_a_good_one():
    model = linear_gaussian(50, 100, noise=0.3)

    @jax.jit
    def both(key, model):
        _, x = model.simulate(key)
        best, target = model.best_gaussian(x), model.target(x)
        bad = Gaussian(best.mean + 0.5 * best.scale, 2 * best.scale)
        warned = infsub.iwae(key, target, bad, 5000)
        silent = infsub.iwae(key, target, model.exact_gaussian(x), 5000)
        return warned, silent, model.log_px(x)

    warned, silent, log_px = both(jax.random.key(0), model)
    assert warned.pareto_k > 0.7
    assert silent.pareto_k < 0.5
    np.testing.assert_allclose(silent.log_px, log_px, atol=1e-3)


def test_float64():
    with jax.enable_x64(True):
        model = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), MODEL)

        def estimates(key, model):
            _, x = model.simulate(key)
            target, q = model.target(x), model.best_gaussian(x)
            return (
                infsub.elbo(key, target, q, 10),
                infsub.iwae(key, target, q, 40),
                infsub.ais(key, target, q, 4, 5, 2),
            )

        for estimate in jax.eval_shape(estimates, jax.random.key(1), model):
            assert all(leaf.dtype == np.float64 for leaf in estimate)


def test_gradients_flow_through_the_elbo():
    @jax.jit
    @jax.vmap
    def gradients(q):
        def bound(q):
            return infsub.elbo(jax.random.key(0), MODEL.target(X), q, 4000).log_px

        # the closed-form gradient −∂KL, 0 at the best q
        return jax.grad(bound)(q), jax.grad(lambda q: -MODEL.kl(X, q))(q)

    best = MODEL.best_gaussian(X)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), best, wide(best))
    found, exact = jax.device_get(gradients(both))
    at_best, at_wrong = (jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(2))
    exact = jax.tree.map(lambda leaf: leaf[1], exact)
    for got, want in zip(at_wrong, exact, strict=True):
        np.testing.assert_allclose(got, want, atol=0.3)
    assert max(np.abs(leaf).max() for leaf in at_best) < 0.3


def test_one_nan_weight_makes_the_estimate_nan():
    """XLA's vectorised exp may lose a NaN: log Σ exp of eight NaNs was once log 3."""
    log_weights = np.zeros((50, 40), np.float32)
    log_weights[7, 3] = np.nan
    estimate = jax.jit(jax.vmap(bounds.log_mean_exp))(log_weights)
    for value in (estimate.log_px, estimate.standard_error, estimate.ess):
        assert np.flatnonzero(np.isnan(value)).tolist() == [7]


@pytest.mark.parametrize("estimator", [infsub.elbo, infsub.iwae])
def test_bad_arguments_are_named(estimator):
    key, x, q = jax.random.key(0), X, MODEL.best_gaussian(X)
    with pytest.raises(ValueError, match="num_samples must be a positive integer; got 0"):
        estimator(key, MODEL.target(x), q, num_samples=0)
    with pytest.raises(ValueError, match=r"q must sample z of shape \[10\].*\(3,\)"):
        estimator(key, MODEL.target(x), Gaussian(jnp.zeros(3), jnp.ones(3)))
    for scale in (jnp.ones(3), jnp.ones((10, 3)), jnp.ones(())):
        with pytest.raises(ValueError, match=r"q must have a mean \[D\] and a scale \[D\], or"):
            estimator(key, MODEL.target(x), Gaussian(jnp.zeros(10), scale))
    vector = Target(None, lambda z: z, 10)
    with pytest.raises(TypeError, match="log_likelihood must return a scalar"):
        estimator(key, vector, q)
    with pytest.raises(TypeError, match="log_likelihood must be a function"):
        Target(None, 3.0, 10)  # pyright: ignore
    with pytest.raises(ValueError, match="latent_dim must be a positive integer; got -1"):
        Target(None, lambda z: 0.0, -1)


def test_a_new_datapoint_does_not_compile_anew():
    traces = []

    def log_likelihood(x, z):
        traces.append(1)
        return -jnp.sum((x - z) ** 2)

    q = Gaussian(jnp.zeros(3), jnp.ones(3))
    for x in (jnp.zeros(3), jnp.ones(3), 2 * jnp.ones(3)):
        infsub.iwae(jax.random.key(0), Target(None, Partial(log_likelihood, x), 3), q, 10)
        if x[0] == 0:
            first = len(traces)
    assert len(traces) == first


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # distrax's own, of JAX's insides
def test_q_may_be_a_distribution_object():
    import distrax

    target, exact = MODEL.target(X), MODEL.exact_gaussian(X)
    q = distrax.MultivariateNormalTri(exact.mean, exact.scale)
    elbo = infsub.elbo(jax.random.key(0), target, q)
    np.testing.assert_allclose(elbo.log_weights, MODEL.log_px(X), rtol=1e-4)

    def of_one_point(key, x, model):
        q = wide(model.best_gaussian(x))
        object_q = distrax.MultivariateNormalDiag(q.mean, q.scale)
        target = model.target(x)
        return infsub.iwae(key, target, q, 500).log_px, infsub.iwae(
            key, target, object_q, 500
        ).log_px

    ours, theirs = infsub.map_datapoints(of_one_point, jax.random.key(1), simulate(50), MODEL)
    difference = ours - theirs  # the same law, from other draws
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(50)


@pytest.mark.parametrize("q", [(jnp.zeros(10), jnp.ones(10)), 3.0, jnp.zeros(10)])
def test_what_is_no_q_is_a_sentence(q):
    target = MODEL.target(X)
    for bound in (infsub.elbo, infsub.iwae):
        with pytest.raises(TypeError, match=r"q must be infsub.Gaussian.*, a function .*; got"):
            bound(jax.random.key(0), target, q)
