"""What a subject simulates, and how many datapoints a dispatch works on."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from models import linear_gaussian, own_model

from infsub import subjects


def test_z_is_what_the_simulated_x_was_made_from():
    known = linear_gaussian(3, 5)
    simulate = subjects.of_model(own_model(known)).simulate
    keys = jax.random.split(jax.random.key(0), 2000)
    z, x = jax.jit(jax.vmap(lambda key: simulate(key, known, np.zeros(5))))(keys)
    noise = np.asarray(x - z @ known.weight.T - known.bias)
    # Standard errors of a variance over the draws; 4 of them.
    np.testing.assert_allclose(noise.var(), known.noise**2, rtol=4 * np.sqrt(2 / noise.size))
    np.testing.assert_allclose(z.var(), 1, rtol=4 * np.sqrt(2 / z.size))


class Device:
    """An accelerator with so many GiB, or one that does not say."""

    def __init__(self, gibibytes):
        self._stats = gibibytes and {"bytes_limit": gibibytes * 2**30}

    def memory_stats(self):
        return self._stats


@pytest.mark.parametrize(
    ("gibibytes", "rows"),
    [
        ([80], 16_000),
        ([8], 7168),
        ([0.001], 1),
        ([None], 16_000),
        ([80] * 8, 128_000),
        ([80, 8], 14_336),
    ],
)
def test_rows_fill_the_smallest_device_s_memory(gibibytes, rows):
    assert subjects._rows_of_memory([Device(each) for each in gibibytes]) == rows


@pytest.mark.parametrize("num_points", [1, 7, 20, 21, 1000])
def test_blocks_are_of_equal_size_and_within_the_limit(num_points):
    block, chunk = subjects.sizes(num_points, 16, 8)
    assert 1 <= block <= 8
    assert chunk >= 1
    num_blocks = -(-num_points // block)
    assert num_blocks * block - num_points < num_blocks  # the last one lacks less than one each


def test_other_numbers_of_datapoints_are_the_same_few_programs():
    found = {n: subjects.sizes(n, 16, 20) for n in range(1, 1001)}
    for n, (block, _) in found.items():
        assert -(-n // block) * block <= 1.25 * n + 1
    assert {found[n] for n in range(65, 1001)} == {found[100]}
    assert len(set(found.values())) == 13  # 1 … 8, 10, 12, 14, 16, 20
