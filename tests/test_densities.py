from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from infsub import densities
from infsub.types import Gaussian

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=2)
def all_levels(mean, log_scale, num_levels):
    return jax.vmap(densities.discretized_logistic, (0, None, None, None))(
        jnp.arange(num_levels, dtype=jnp.float32), mean, log_scale, num_levels
    )


def test_normal_densities_are_scipys():
    x, mean, log_scale = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)

    @jax.jit
    def found(x, mean, log_scale):
        return (
            densities.normal(x, mean, jnp.exp(log_scale)),
            densities.standard_normal(x),
            densities.normal(x, mean, jnp.asarray(1.3)),  # one scale for all
        )

    exact = stats.norm.logpdf(x, mean, np.exp(log_scale)).sum()
    wide = stats.norm.logpdf(x, mean, 1.3).sum()
    expected = exact, stats.norm.logpdf(x).sum(), wide
    np.testing.assert_allclose(found(x, mean, log_scale), expected, rtol=1e-5)


def test_parameters_of_another_shape_are_refused():
    """[D] against [D, 1] would be [D, D], and summed without a word."""
    x, column, image = jnp.arange(3.0), jnp.arange(3.0)[:, None], jnp.zeros((2, 2, 1))
    for call in (
        lambda: densities.normal.__wrapped__(x, column, 1.0),
        lambda: densities.normal.__wrapped__(x, x, column),
        lambda: densities.bernoulli_logits(x, x[:2]),
        lambda: densities.discretized_logistic(image, x, image, 2),
    ):
        with pytest.raises(ValueError, match=r"needs parameters of .*; got shape \("):
            call()
    found = densities.bernoulli_logits(image[..., 0], image)  # of one size, in any shape
    np.testing.assert_allclose(found, -4 * np.log(2), rtol=1e-6)


def test_a_gaussian_draw_comes_with_its_density_and_pathwise_gradient():
    q = Gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0]))

    @jax.jit
    @jax.vmap
    def draw(key):
        z, log_q = densities.sample_gaussian(key, q)
        gradient = jax.grad(lambda m: densities.sample_gaussian(key, q._replace(mean=m))[0].sum())
        return z, log_q, densities.normal(z, *q), gradient(q.mean)

    zs, log_q, expected, gradient = jax.device_get(draw(jax.random.split(KEY, 4000)))
    np.testing.assert_allclose(log_q, expected, rtol=1e-6)
    np.testing.assert_allclose(zs.mean(0), q.mean, atol=5 * 3 / 4000**0.5)
    np.testing.assert_allclose(zs.std(0), q.scale, rtol=0.06)
    np.testing.assert_allclose(gradient, 1.0)


FULL = Gaussian(jnp.array([1.0, -2.0, 0.5]), jnp.array([[0.5, 0, 0], [1, 2, 0], [-1, 0.3, 0.8]]))


def test_the_density_of_a_full_covariance_is_scipys():
    z, diagonal = np.float32([0.3, 1.0, -0.7]), jnp.asarray(np.diag(FULL.scale))

    @jax.jit
    def found(z):
        narrow = Gaussian(FULL.mean, diagonal)
        return (
            densities.gaussian(z, FULL),
            densities.gaussian(z, narrow),
            densities.normal(z, *narrow),
        )

    dense, narrow, expected = found(z)
    scale = np.asarray(FULL.scale, np.float64)
    exact = stats.multivariate_normal(FULL.mean, scale @ scale.T)
    np.testing.assert_allclose(dense, exact.logpdf(z), rtol=1e-5)
    np.testing.assert_allclose(narrow, expected)


def test_a_draw_of_full_covariance_comes_with_its_density_and_pathwise_gradient():
    zs = jax.jit(jax.vmap(lambda key: densities.sample_gaussian(key, FULL)[0]))
    zs = zs(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(np.mean(zs, 0), FULL.mean, atol=5 * 3 / 20_000**0.5)
    np.testing.assert_allclose(np.cov(zs, rowvar=False), FULL.scale @ FULL.scale.T, atol=0.3)

    @jax.jit
    def both(q):
        def density(q):
            return densities.gaussian(densities.sample_gaussian(KEY, q)[0], q)

        by_value = jax.value_and_grad(lambda q: densities.sample_gaussian(KEY, q)[1])(q)
        return by_value, jax.value_and_grad(density)(q)

    (log_q, by_value), (density, by_density) = jax.device_get(both(FULL))
    np.testing.assert_allclose(log_q, density, rtol=1e-5)
    np.testing.assert_allclose(by_value.mean, by_density.mean, atol=1e-4)
    np.testing.assert_allclose(np.diag(by_value.scale), -1 / np.diag(FULL.scale), rtol=1e-5)
    np.testing.assert_allclose(np.tril(by_value.scale), np.tril(by_density.scale), atol=1e-2)


def test_nobody_reads_above_the_diagonal_of_a_cholesky_factor():
    dirty = FULL._replace(scale=FULL.scale + np.triu(np.full((3, 3), np.float32(np.nan)), 1))

    @jax.jit
    def values(q):
        z, log_q = densities.sample_gaussian(KEY, q)
        return z, log_q, densities.gaussian(z, q)

    for one, two in zip(values(dirty), values(FULL), strict=True):
        np.testing.assert_array_equal(one, two)


def test_bernoulli_logits_value_and_gradient_at_any_logit():
    logits = np.float32([-1e4, -90.0, -3.0, 0.0, 0.5, 20.0, 1e4])
    each = jax.jit(jax.vmap(jax.value_and_grad(densities.bernoulli_logits, argnums=1)))
    for bit in (0.0, 1.0):
        value, gradient = each(np.full(7, bit, np.float32), logits)
        exact = -np.logaddexp(0, np.asarray(logits, np.float64) * (1 - 2 * bit))
        np.testing.assert_allclose(value, exact, rtol=1e-6, atol=2e-7)
        np.testing.assert_allclose(gradient, bit - special.expit(logits), atol=1e-7)
    total = jax.jit(densities.bernoulli_logits)(np.float32([1, 0]), np.float32([0.3, 0.3]))
    np.testing.assert_allclose(np.exp(total), 0.574443 * (1 - 0.574443), rtol=1e-5)


def test_softplus_is_jaxs_and_its_gradient_takes_no_log():
    a = jnp.concatenate([jnp.linspace(-90, 90, 181), jnp.asarray([-1e30, 1e30])])
    np.testing.assert_allclose(densities.softplus(a), jax.nn.softplus(a), rtol=3e-7, atol=2e-7)
    gradients = {}
    for name, function in (("ours", densities.softplus), ("jax's", jax.nn.softplus)):
        gradient = jax.jit(jax.vmap(jax.grad(function)))
        np.testing.assert_allclose(gradient(a), jax.nn.sigmoid(a), atol=1e-6)
        gradients[name] = gradient.lower(a).compile().as_text()
    logs = {name: bool(re.search(r" log(-plus-one)?\(", text)) for name, text in gradients.items()}
    assert logs == {"ours": False, "jax's": True}


@pytest.mark.parametrize("num_levels", [2, 8, 256])
def test_discretized_logistic_is_the_difference_of_two_cdfs(num_levels):
    mean, log_scale = 0.3, -1.2
    edges = np.arange(1, 2 * num_levels - 2, 2) / (num_levels - 1) - 1
    cdf = stats.logistic.cdf(np.r_[-np.inf, edges, np.inf], mean, np.exp(log_scale))
    np.testing.assert_allclose(
        np.exp(all_levels(mean, log_scale, num_levels)), np.diff(cdf), rtol=1e-4
    )


@pytest.mark.parametrize("num_levels", [2, 8, 256])
def test_discretized_logistic_sums_to_one_with_finite_gradients(num_levels):
    means = [-1e4, -1.0, -0.49, 0.0, 0.1428571, 1.0, 30.0, 1e4]
    log_scales = [-100.0, -7.0, -3.0, 0.0, 7.0, 100.0]
    pairs = np.stack(np.meshgrid(means, log_scales), -1).reshape(-1, 2).astype(np.float32)

    @jax.jit
    @jax.vmap
    @functools.partial(jax.jacfwd, has_aux=True)
    def gradients_and_values(pair):
        log_p = all_levels(*pair, num_levels)
        return log_p, log_p

    gradients, log_p = gradients_and_values(pairs)
    assert log_p.shape == (48, num_levels)
    assert np.isfinite(log_p).all()
    assert np.all(log_p <= 0)
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1, rtol=2e-5)
    assert np.isfinite(gradients).all()


def test_levels_may_be_an_images_bytes():
    """2x + 1 of a byte would start anew at 128."""
    x, mean = np.arange(256, dtype=np.uint8), jnp.linspace(-1, 1, 256)
    for levels in (x, x.astype(np.int32)):
        np.testing.assert_array_equal(
            densities.discretized_logistic(levels, mean, 0 * mean - 3, 256),
            densities.discretized_logistic(jnp.float32(x), mean, 0 * mean - 3, 256),
        )


def test_discretized_logistic_gradient_is_the_float64_difference_quotient():
    def exact(mean, log_scale, k, num_levels):
        v, half, scale = 2 * k / (num_levels - 1) - 1, 1 / (num_levels - 1), np.exp(log_scale)
        upper = np.inf if k == num_levels - 1 else v + half
        lower = -np.inf if k == 0 else v - half
        a, b = (upper - mean) / scale, (lower - mean) / scale
        # the side on which the two cdfs are small, so their difference keeps its digits
        if b > 0:
            a, b = -b, -a
        return np.log(stats.logistic.cdf(a) - stats.logistic.cdf(b))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=1)
    def found(k, at):
        return densities.discretized_logistic(k, *at, 8)

    for k, mean, log_scale in [(0, 0.4, -1.0), (3, -0.9, -2.0), (7, -0.3, 0.5), (4, 0.9, -2.5)]:
        value, gradient = found(np.float32(k), np.float32([mean, log_scale]))
        np.testing.assert_allclose(value, exact(mean, log_scale, k, 8), rtol=1e-5)
        quotient = [
            (exact(mean + d, log_scale + e, k, 8) - exact(mean - d, log_scale - e, k, 8)) / 2e-5
            for d, e in ((1e-5, 0), (0, 1e-5))
        ]
        np.testing.assert_allclose(gradient, quotient, rtol=1e-4, atol=1e-5)


draws = jax.jit(functools.partial(densities.sample_discretized_logistic, num_levels=8))


@pytest.mark.parametrize("log_scale", [-8.0, -1.5, 1.0])
def test_draws_of_the_discretized_logistic_have_its_probabilities(log_scale):
    num = 20000
    x = draws(KEY, np.full(num, 0.35, np.float32), np.full(num, log_scale, np.float32))
    assert x.dtype == jnp.float32
    counts = np.bincount(np.asarray(x, int), minlength=8)
    p = np.exp(all_levels(0.35, log_scale, 8))
    np.testing.assert_array_less(np.abs(counts - num * p), 5 * np.sqrt(num * p * (1 - p)) + 1)
