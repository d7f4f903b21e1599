"""Quadrature of two latent dimensions against closed forms, and the estimators against quadrature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from models import linear_gaussian
from scipy.stats import multivariate_normal, norm

import infsub
from infsub import densities, gaps, grids
from infsub.types import Gaussian, Target

G = 64


@pytest.fixture(scope="module", params=[0.5, 0.02])
def quadratures(request):
    """20 datapoints; with little noise a posterior is as narrow as a twentieth of a first cell."""
    model = linear_gaussian(2, 5, noise=request.param)

    @jax.jit
    @jax.vmap
    def one(key):
        _, x = model.simulate(key)
        target = model.target(x)
        window = grids.find_window(target, G)
        values = grids.log_joint_of_cells(target, window, G)
        integral, log_px = grids.integrate(window, values), grids.log_px(target, G)
        exact = model.log_px(x), *model.posterior(x)
        return exact, window, grids.centres(window, G), values, integral, log_px

    return jax.device_get(one(jax.random.split(jax.random.key(3), 20)))


def test_log_px_is_the_closed_form(quadratures):
    (want, _, _), *_, integral, log_px = quadratures
    np.testing.assert_allclose(log_px.log_px, want, atol=1e-3)
    np.testing.assert_allclose(integral.log_px, want, atol=1e-3)
    assert np.all(log_px.error < 1e-2)


def test_density_is_the_posterior(quadratures):
    (_, mean, cov), windows, z, values, integral, _ = quadratures
    exact = [multivariate_normal(m, c) for m, c in zip(mean, cov, strict=True)]
    want = np.array([normal.logpdf(at) for normal, at in zip(exact, z, strict=True)])
    got = values - integral.log_px[:, None, None]
    near = want > want.max((1, 2), keepdims=True) - 10
    np.testing.assert_allclose(got[near], want[near], atol=0.02)  # log p(x, z) of 1e4 nats, float32
    # All of it within, and not lost in the window either.
    spread = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    low, width = windows.low, windows.width[:, None]
    assert np.all(low < mean - 3.8 * spread)
    assert np.all(low + width > mean + 3.8 * spread)
    assert np.all(width[:, 0] < 14 * spread.max(axis=1))


@pytest.mark.parametrize("shift", [7.5, -11.0])
def test_a_posterior_far_from_the_prior_is_found(shift):
    target = Target(
        None, Partial(lambda shift, z: -0.5 * jnp.sum(((z - shift) / 0.1) ** 2), shift), 2
    )
    # N(z; 0, I) · exp(−‖z − s‖² / 2v), v = 0.01, integrates to v / (1 + v) exp(−‖s‖² / 2(1 + v)).
    want = np.log(0.01 / 1.01) - shift**2 / 1.01
    np.testing.assert_allclose(grids.log_px(target, G).log_px, want, rtol=1e-5)


def around(mean, scale, z):
    return densities.normal(z, mean, scale)


@pytest.mark.parametrize("sizes", [(30.0, 5.0, 60.0), (100.0, 20.0, 150.0), (30.0, 8.0, 50.0)])
def test_a_posterior_outside_the_first_window_is_found_whole(sizes):
    """z ~ N(0, s²), x|z ~ N(z, l²): of the posterior a corner of the first window sees one end."""
    width, noise, x = map(np.float32, sizes)
    target = Target(Partial(around, 0.0, width), Partial(around, x, noise), 2)
    found = grids.log_px(target, G)
    want = 2 * norm.logpdf(x, scale=np.hypot(width, noise))
    np.testing.assert_allclose(found.log_px, want, atol=1e-3)
    assert found.error < 1e-3


def test_a_posterior_narrower_than_a_cell_says_so():
    """A direction of z is known ever better: the right log p(x), or an error that is flagged."""

    def likelihood(z, x, rotation, noise):
        return densities.normal(x, rotation @ z, noise)

    @jax.jit
    @jax.vmap
    def one(x, rotation, noise):
        arguments = {"x": x, "rotation": rotation, "noise": noise}
        return grids.log_px(Target(None, Partial(likelihood, **arguments), 2), G)

    angle = np.tile(np.arctan([0, 1 / 3, 1 / 2, 1]), 100)
    noise = np.stack([np.full(400, 2.0), np.repeat(np.geomspace(0.5, 0.002, 100), 4)], axis=1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    x = np.random.default_rng(0).normal(size=(400, 2))
    given = (a.astype(np.float32) for a in (x, np.moveaxis(turn, -1, 0), noise))
    found = one(*given)
    off = np.abs(found.log_px - norm.logpdf(x, scale=np.hypot(1, noise)).sum(axis=1))
    assert np.all((off < 0.01) | (found.error > gaps.MAX_GRID_ERROR))
    assert np.all(found.error[:120] < 0.01)  # to a ninth of the other direction's width


def test_a_window_that_ends_amid_the_mass_says_so():
    flat = Target(lambda z: 0.0 * jnp.sum(z), lambda z: 0.0 * jnp.sum(z), 2)
    assert grids.log_px(flat, G).error == np.inf


def test_a_coarse_grid_says_so():
    model = linear_gaussian(2, 5)
    target = model.target(model.simulate(jax.random.key(0))[1])
    assert grids.log_px(target, 6).error > 0.05
    assert grids.log_px(target, 48).error < 1e-3


def test_histogram_is_the_density_within_poisson_errors():
    q = Gaussian(jnp.array([0.5, -1.0]), jnp.array([0.3, 0.2]))
    window = grids.Window(jnp.array([-1.0, -2.2]), jnp.asarray(2.6))
    num_samples = 100_000

    @jax.jit
    def drawn(key):
        z = grids.draw(key, q, num_samples)
        log_q = jax.vmap(jax.vmap(lambda z: densities.normal(z, *q)))(grids.centres(window, G))
        return z, grids.histogram(window, z, G), jnp.exp(log_q)

    z, histogram, density = jax.device_get(drawn(jax.random.key(0)))
    low, width = jax.device_get(window)
    area = (width / G) ** 2
    inside = np.all((z >= low) & (z < low + width), axis=1)
    np.testing.assert_allclose(np.sum(histogram) * area, np.mean(inside), rtol=1e-5)
    expected, counts = density * area * num_samples, histogram * area * num_samples
    likely = expected > 10
    squares = (counts - expected)[likely] ** 2 / expected[likely]
    assert abs(squares.mean() - 1) < 3 * np.sqrt(2 / likely.sum())


def test_a_histogram_leaves_out_what_lies_outside():
    window = grids.Window(jnp.array([1.0, 2.0]), jnp.asarray(4.0))
    z = jnp.array([[1.5, 2.5], [4.5, 2.5], [0.9, 3.0], [3.0, 6.1], [jnp.nan, 3.0]])
    # Of the first axis the first cell, then the second; both low on the second axis.
    np.testing.assert_allclose(grids.histogram(window, z, 2), [[0.05, 0], [0.05, 0]])


def test_a_window_covers_samples_and_keeps_what_it_had():
    window = grids.Window(jnp.array([0.0, 0.0]), jnp.asarray(1.0))

    @jax.jit
    def covers(key):
        z = grids.draw(key, Gaussian(jnp.array([3.0, 0.5]), jnp.full(2, 0.1)), 20_000)
        inside = 0.5 + 0.1 * (z - z.mean(axis=0))
        return z, grids.cover(window, z), grids.cover(window, inside)

    z, covering, same = jax.device_get(covers(jax.random.key(1)))
    low, high = covering.low, covering.low + covering.width
    assert np.all(low <= window.low)
    assert np.all(high >= window.low + window.width)
    assert np.mean(np.all((z > low) & (z < high), axis=1)) == pytest.approx(0.99, abs=0.003)
    for found, want in zip(same, window, strict=True):
        np.testing.assert_allclose(found, want)


def curved(weights, x, z):
    """log p(x|z) of bits [30] whose logits bend with z: posteriors like bananas, and with two modes."""
    w_1, w_2 = weights
    return densities.bernoulli_logits(x, w_2 @ jnp.sin(w_1 @ z))


def test_iwae_and_ais_agree_with_quadrature():
    key_1, key_2 = jax.random.split(jax.random.key(0))
    weights = jax.random.normal(key_1, (8, 2)), 0.7 * jax.random.normal(key_2, (30, 8))

    def one(key, _, weights):
        key_z, key_x, key_iwae, key_ais = jax.random.split(key, 4)
        z = jax.random.normal(key_z, (2,))
        x = jax.random.bernoulli(key_x, jax.nn.sigmoid(weights[1] @ jnp.sin(weights[0] @ z)))
        target = Target(None, Partial(curved, weights, x.astype(z.dtype)), 2)
        truth = grids.log_px(target, G)
        prior = Gaussian(jnp.zeros(2), jnp.ones(2))
        iwae = infsub.iwae(key_iwae, target, prior, 2000)
        ais = infsub.ais(key_ais, target, None, num_chains=8, num_temperatures=20, num_leapfrog=3)
        return truth, jnp.stack([iwae.log_px, ais.log_px]) - truth.log_px

    num_points = 60
    truth, excess = infsub.map_datapoints(one, jax.random.key(1), np.arange(num_points), weights)
    assert truth.error.max() < 0.01
    ratios = np.exp(excess)  # both estimate p(x) without bias
    errors = ratios.std(axis=0) / np.sqrt(num_points)
    assert np.all(np.abs(ratios.mean(axis=0) - 1) < 3 * errors)
    assert np.all(errors < 0.1)


def test_mistakes():
    model = linear_gaussian(3, 5)
    with pytest.raises(ValueError, match="latent_dim=2, a plane; got 3"):
        grids.log_px(model.target(jnp.zeros(5)))
    with pytest.raises(ValueError, match="num_cells must be a positive integer; got 0"):
        grids.log_px(linear_gaussian(2, 5).target(jnp.zeros(5)), 0)
