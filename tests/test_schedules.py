"""Properties of temperature schedules: what is taken, what is refused, where temperatures go."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from infsub.schedules import SCHEDULES, equal_distances, schedule_betas

PILOT = np.linspace(0, 1, 21, dtype=np.float32) ** 3
equal = jax.jit(equal_distances, static_argnums=2)
spreads = arrays(np.float32, 20, elements=st.floats(0.125, 1024, width=32))


@st.composite
def increasing(draw):
    """Temperatures of any number and any distances, [T+1]."""
    steps = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=50))
    return np.concatenate([[0], np.cumsum(steps)]) / sum(steps)


@settings(max_examples=12)  # each number of temperatures compiles anew
@given(st.sampled_from(SCHEDULES), st.integers(1, 10_000))
@example("linear", 159)  # divided by XLA, the last would be 0.99999994
def test_a_named_schedule_increases_from_0_to_1(name, num_temperatures):
    betas = np.asarray(schedule_betas(name, num_temperatures))
    assert betas.shape == (num_temperatures + 1,)
    assert (betas[0], betas[-1]) == (0, 1)
    assert np.all(np.diff(betas) > 0)


@given(increasing())
def test_an_increasing_array_is_kept(betas):
    np.testing.assert_array_equal(schedule_betas(betas), betas.astype(np.float32))


@given(increasing(), st.data())
def test_no_other_array_is_taken(betas, data):
    at = data.draw(st.integers(0, len(betas) - 1))
    value = data.draw(st.sampled_from([np.nan, np.inf, -0.5, 2.0, betas[at - 1], betas[at] + 1]))
    wrong = betas.copy()
    wrong[at] = value
    for array in (wrong, betas[::-1], betas[:1], betas[None], betas[:-1], betas[1:]):
        if not np.array_equal(array, betas):
            with pytest.raises(ValueError, match="increases strictly from 0 to 1"):
                schedule_betas(array)


@pytest.mark.parametrize("spread", [0.0, np.nan])
def test_where_chains_never_differ_temperatures_lie_at_equal_distances(spread):
    betas = np.asarray(equal(PILOT, np.full(20, spread, np.float32), 7))
    np.testing.assert_allclose(betas, np.linspace(0, 1, 8), atol=1e-6)


def test_a_chain_at_zero_density_leaves_the_other_temperatures_alone():
    spread = np.linspace(1, 2, 20, dtype=np.float32)
    spread[0] = np.nan
    betas = np.asarray(equal(PILOT, spread, 7))
    assert (betas[0], betas[-1]) == (0, 1)
    assert np.all(np.diff(betas) > 0)


@given(spreads)
@example(np.ones(20, np.float32))
def test_temperatures_lie_at_equal_distances(spread):
    """The same share of ∫ sd dβ between any two: by numpy, in float64."""
    betas = np.asarray(equal(PILOT, spread, 7), np.float64)
    assert (betas[0], betas[-1]) == (0, 1)
    assert np.all(np.diff(betas) > 0)
    padded = np.pad(spread.astype(np.float64), 1, mode="edge")
    smoothed = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    lengths = np.concatenate([[0], np.cumsum(smoothed * np.diff(PILOT))])
    reached = np.interp(betas, PILOT, lengths) / lengths[-1]
    np.testing.assert_allclose(reached, np.arange(8) / 7, atol=1e-4)


@given(spreads, st.sampled_from([0.125, 2.0, 1024.0]))
def test_only_the_ratios_of_spreads_count(spread, factor):
    np.testing.assert_allclose(equal(PILOT, factor * spread, 7), equal(PILOT, spread, 7), atol=1e-5)
