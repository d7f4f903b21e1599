from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from infsub import densities
from infsub.types import Gaussian

KEY = jax.random.key(0)


@partial(jax.jit, static_argnums=2)
def all_levels(mean, log_scale, num_levels):
    return jax.vmap(densities.discretized_logistic, (0, None, None, None))(
        jnp.arange(num_levels, dtype=jnp.float32), mean, log_scale, num_levels
    )


def test_normal_densities_are_scipys():
    x, mean, log_scale = jax.random.normal(KEY, (3, 10))
    expected = stats.norm.logpdf(x, mean, np.exp(log_scale)).sum()
    np.testing.assert_allclose(densities.normal(x, mean, jnp.exp(log_scale)), expected, rtol=1e-5)
    np.testing.assert_allclose(densities.standard_normal(x), stats.norm.logpdf(x).sum(), rtol=1e-5)
    x, mean, log_scale = (a.reshape(2, 5) for a in (x, mean, log_scale))
    np.testing.assert_allclose(densities.normal_log_scale(x, mean, log_scale), expected, rtol=1e-5)
    wide = densities.normal_log_scale(x, mean, jnp.asarray(0.3))  # one scale for all pixels
    np.testing.assert_allclose(wide, stats.norm.logpdf(x, mean, np.exp(0.3)).sum(), rtol=1e-5)


def test_a_gaussian_draw_comes_with_its_density_and_pathwise_gradient():
    q = Gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0]))
    z, log_q = densities.sample_gaussian(KEY, q)
    np.testing.assert_allclose(log_q, densities.normal(z, *q), rtol=1e-6)
    zs, _ = jax.jit(jax.vmap(lambda k: densities.sample_gaussian(k, q)))(
        jax.random.split(KEY, 4000)
    )
    np.testing.assert_allclose(zs.mean(0), q.mean, atol=5 * 3 / 4000**0.5)
    np.testing.assert_allclose(zs.std(0), q.scale, rtol=0.06)
    gradient = jax.grad(lambda m: densities.sample_gaussian(KEY, q._replace(mean=m))[0].sum())
    np.testing.assert_allclose(gradient(q.mean), 1.0)


FULL = Gaussian(jnp.array([1.0, -2.0, 0.5]), jnp.array([[0.5, 0, 0], [1, 2, 0], [-1, 0.3, 0.8]]))


def test_the_density_of_a_full_covariance_is_scipys():
    z = jnp.array([0.3, 1.0, -0.7])
    exact = stats.multivariate_normal(FULL.mean, np.asarray(FULL.scale @ FULL.scale.T, np.float64))
    np.testing.assert_allclose(densities.gaussian(z, FULL), exact.logpdf(z), rtol=1e-5)
    np.testing.assert_allclose(
        densities.gaussian(z, Gaussian(FULL.mean, jnp.diag(FULL.scale))),
        densities.normal(z, FULL.mean, jnp.diag(FULL.scale)),
    )


def test_a_draw_of_full_covariance_comes_with_its_density_and_pathwise_gradient():
    z, log_q = densities.sample_gaussian(KEY, FULL)
    np.testing.assert_allclose(log_q, densities.gaussian(z, FULL), rtol=1e-5)
    draw = jax.jit(jax.vmap(lambda k: densities.sample_gaussian(k, FULL)[0]))
    zs = draw(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(zs.mean(0), FULL.mean, atol=5 * 3 / 20_000**0.5)
    np.testing.assert_allclose(np.cov(zs.T), FULL.scale @ FULL.scale.T, atol=0.3)
    by_value, by_density = (
        jax.grad(lambda q, f=f: f(q)[1])(FULL)
        for f in (
            lambda q: densities.sample_gaussian(KEY, q),
            lambda q: (0, densities.gaussian(densities.sample_gaussian(KEY, q)[0], q)),
        )
    )
    np.testing.assert_allclose(by_value.mean, by_density.mean, atol=1e-4)
    np.testing.assert_allclose(jnp.diag(by_value.scale), -1 / jnp.diag(FULL.scale), rtol=1e-5)
    np.testing.assert_allclose(jnp.tril(by_value.scale), jnp.tril(by_density.scale), atol=1e-2)


def test_nobody_reads_above_the_diagonal_of_a_cholesky_factor():
    dirty = FULL._replace(scale=FULL.scale + jnp.triu(jnp.full((3, 3), jnp.nan), 1))
    z, log_q = densities.sample_gaussian(KEY, FULL)
    np.testing.assert_array_equal(densities.sample_gaussian(KEY, dirty)[0], z)
    np.testing.assert_array_equal(densities.sample_gaussian(KEY, dirty)[1], log_q)
    np.testing.assert_array_equal(densities.gaussian(z, dirty), densities.gaussian(z, FULL))


def test_bernoulli_logits_value_and_gradient_at_any_logit():
    logits = jnp.array([-1e4, -90.0, -3.0, 0.0, 0.5, 20.0, 1e4])
    for bit in (0.0, 1.0):
        x = jnp.full(7, bit)
        value, gradient = jax.vmap(jax.value_and_grad(densities.bernoulli_logits, argnums=1))(
            x, logits
        )
        exact = -np.logaddexp(0, np.asarray(logits, np.float64) * (1 - 2 * bit))
        np.testing.assert_allclose(value, exact, rtol=1e-6, atol=2e-7)
        np.testing.assert_allclose(gradient, bit - jax.nn.sigmoid(logits), atol=1e-7)
    total = densities.bernoulli_logits(jnp.array([1.0, 0.0]), jnp.array([0.3, 0.3]))
    np.testing.assert_allclose(np.exp(total), 0.574443 * (1 - 0.574443), rtol=1e-5)


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
    means = jnp.array([-1e4, -1.0, -0.49, 0.0, 0.1428571, 1.0, 30.0, 1e4])
    log_scales = jnp.array([-100.0, -7.0, -3.0, 0.0, 7.0, 100.0])
    mean, log_scale = (a.reshape(-1) for a in jnp.meshgrid(means, log_scales))
    log_p = jax.vmap(lambda m, s: all_levels(m, s, num_levels))(mean, log_scale)
    assert log_p.shape == (48, num_levels)
    assert jnp.isfinite(log_p).all()
    assert (log_p <= 0).all()
    np.testing.assert_allclose(jnp.exp(log_p).sum(1), 1, rtol=2e-5)
    jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda m, s: all_levels(m, s, num_levels), (0, 1))))
    assert all(jnp.isfinite(gradient).all() for gradient in jacobian(mean, log_scale))


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

    for k, mean, log_scale in [(0, 0.4, -1.0), (3, -0.9, -2.0), (7, -0.3, 0.5), (4, 0.9, -2.5)]:
        value, gradient = jax.value_and_grad(
            lambda p, k=k: densities.discretized_logistic(jnp.array(float(k)), p[0], p[1], 8)
        )(jnp.array([mean, log_scale]))
        np.testing.assert_allclose(value, exact(mean, log_scale, k, 8), rtol=1e-5)
        quotient = [
            (exact(mean + d, log_scale + e, k, 8) - exact(mean - d, log_scale - e, k, 8)) / 2e-5
            for d, e in ((1e-5, 0), (0, 1e-5))
        ]
        np.testing.assert_allclose(gradient, quotient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("log_scale", [-8.0, -1.5, 1.0])
def test_draws_of_the_discretized_logistic_have_its_probabilities(log_scale):
    num = 20000
    mean = jnp.full(num, 0.35)
    x = densities.sample_discretized_logistic(KEY, mean, jnp.full(num, log_scale), 8)
    assert x.dtype == jnp.float32
    counts = np.bincount(np.asarray(x, int), minlength=8)
    p = np.exp(all_levels(0.35, log_scale, 8))
    np.testing.assert_array_less(np.abs(counts - num * p), 5 * np.sqrt(num * p * (1 - p)) + 1)
