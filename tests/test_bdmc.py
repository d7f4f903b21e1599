"""Bidirectional Monte Carlo: the truth lies between its two bounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from models import linear_gaussian
from scipy import stats

import infsub
from infsub.types import Gaussian, Target


def simulated(model, key):
    z, x = model.simulate(key)
    best = model.best_gaussian(x)
    return z, model.target(x), Gaussian(best.mean + 0.5 * best.scale, 1.5 * best.scale)


def test_the_truth_lies_between():
    model, num_points = linear_gaussian(20, 40, noise=0.3), 300

    def point(key, _, model):
        result = infsub.bdmc(key, Partial(simulated, model), 8, 10, 3)
        x = model.simulate(jax.random.split(key)[0])[1]  # the datapoint that bdmc simulated
        return result, model.log_px(x)

    result, truth = infsub.map_datapoints(
        point, jax.random.key(0), np.arange(num_points), model, block_size=100
    )
    below, above = truth - result.lower.log_px, result.upper.log_px - truth
    for excess in (below, above):
        assert excess.mean() > 5 * excess.std() / np.sqrt(num_points)
    np.testing.assert_allclose(result.gap, below + above, atol=1e-3)
    np.testing.assert_allclose(
        result.standard_error,
        np.hypot(result.lower.standard_error, result.upper.standard_error),
        rtol=1e-5,
    )


@pytest.mark.slow
def test_the_gap_closes_with_temperatures():
    model, num_points = linear_gaussian(20, 40, noise=0.3), 100

    def gaps(num_temperatures):
        def point(key, _, model):
            return infsub.bdmc(key, Partial(simulated, model), 8, num_temperatures, 5).gap

        return infsub.map_datapoints(point, jax.random.key(1), np.arange(num_points), model)

    coarse, fine = gaps(10), gaps(100)
    assert abs(fine.mean()) < 0.05 + 3 * fine.std() / np.sqrt(num_points)
    assert coarse.mean() - fine.mean() > 3 * np.hypot(coarse.std(), fine.std()) / np.sqrt(
        num_points
    )


@pytest.mark.slow
def test_both_directions_run_the_same_kernels():
    """Frozen step sizes given by hand: reverse_ais inside bdmc is the public one."""
    model = linear_gaussian(3, 6)
    key_of_both = jax.random.key(3)
    key_model, key = jax.random.split(key_of_both)
    z, target, q = simulated(model, key_model)
    # The keys are not the same, so the laws of the log weights are compared, of 2000 chains each,
    # and another step size is told apart by the same test.
    many = infsub.bdmc(key_of_both, Partial(simulated, model), 2000, 10, 2, step_size=0.3)
    alone, other = (
        infsub.reverse_ais(key, target, z, q, 2000, 10, 2, step_size=step_size)
        for step_size in (0.3, 0.1)
    )
    same_law = stats.ks_2samp(alone.log_weights, many.upper.log_weights)
    another_law = stats.ks_2samp(other.log_weights, many.upper.log_weights)
    assert same_law.pvalue > 1e-3
    assert another_law.pvalue < 1e-6


def test_a_model_of_ones_own_is_told_what_certifies_it():
    model = infsub.Model(2, lambda params, x: x, lambda params, x, z: z.sum())
    with pytest.raises(
        TypeError, match=r"simulate must be .*got Model: infsub.measure\(…, num_certified=N\)"
    ):
        infsub.bdmc(jax.random.key(0), model)  # pyright: ignore


def test_z_must_be_one_sample():
    target = Target(None, lambda z: jnp.sum(z), 3)
    with pytest.raises(ValueError, match=r"z must be an exact posterior sample \[D=3\]"):
        infsub.reverse_ais(jax.random.key(0), target, jnp.zeros((2, 3)))
