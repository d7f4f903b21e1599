"""Posteriors of several modes: what each start finds, what says that it missed one, and what cannot.

z is a plane, so log p(x) is known by quadrature.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import infsub
from infsub import densities, gaps, grids, rows
from infsub.measure import AIS, Datapoint, Settings, bounds_of_datapoint, certify_datapoint
from infsub.types import Gaussian, Target

APART = 2.0  # of each mode from 0: with 0.15 between two temperatures of 25, no chain crosses
NUM_POINTS = 40
NARROW, WIDE = 0.15, np.diag([2.5, 0.3])
STARTS = ("prior", "laplace", "one mode", "both modes")


def two_modes(x, z):
    """log p(x|z) of x, a noisy sight of (|z_1|, z_2): its sign is lost, so p(z|x) has two modes."""
    return densities.normal(x, jnp.stack([jnp.abs(z[0]), z[1]]), NARROW)


def target_of(x):
    return Target(None, Partial(two_modes, x), 2)


def simulate(key):
    """(z, x) with both modes well apart."""
    key_z, key_sign, key_x = jax.random.split(key, 3)
    z = jnp.asarray([APART, 0.0]) + 0.1 * jax.random.normal(key_z, (2,))
    z = z.at[0].multiply(jax.random.rademacher(key_sign, (), z.dtype))
    noise = NARROW * jax.random.normal(key_x, (2,))
    return z, jnp.stack([jnp.abs(z[0]), z[1]]) + noise


def starts_of(target, x):
    """A Gaussian for each of STARTS, of full covariance, so that they share a program."""
    prior = Gaussian(jnp.zeros(2), jnp.eye(2))
    one = Gaussian(x, NARROW * jnp.eye(2))  # an encoder that has seen one of them
    both = Gaussian(x * jnp.asarray([0.0, 1.0]), jnp.asarray(WIDE, x.dtype))
    return [prior, infsub.laplace(target, x), one, both]


@pytest.fixture(scope="module")
def found():
    """Excess over log p(x) [N] and ESS [N] of AIS by its start, and of IWAE from a wide q."""

    def one(key, _):
        x = simulate(jax.random.fold_in(key, 0))[1]
        target = target_of(x)
        truth = grids.log_px(target, 200).log_px
        starts = starts_of(target, x)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
        annealed = jax.vmap(lambda q: infsub.ais(key, target, q, 32, 50, 5))(stacked)
        columns = {
            name: (annealed.log_px[n] - truth, annealed.ess[n]) for n, name in enumerate(STARTS)
        }
        witness = infsub.iwae(key, target, starts[-1], 2000)
        return columns | {"iwae": (witness.log_px - truth, witness.ess)}

    return infsub.map_datapoints(one, jax.random.key(0), np.arange(NUM_POINTS))


@pytest.mark.parametrize("name", ["prior", "both modes"])
def test_a_start_that_covers_both_finds_both(found, name):
    excess, _ = found[name]
    ratios = np.exp(excess)  # E[w] / p(x) = 1
    assert abs(ratios.mean() - 1) < 3 * ratios.std(ddof=1) / np.sqrt(NUM_POINTS)
    assert abs(excess.mean()) < 0.1


@pytest.mark.parametrize("name", ["laplace", "one mode"])
def test_a_start_at_one_of_two_modes_misses_log_2_and_its_weights_do_not_say(found, name):
    """What stays invisible to ESS: the chains agree, on half of the posterior."""
    excess, ess = found[name]
    np.testing.assert_allclose(excess, -np.log(2), atol=0.1)
    assert ess.min() > 0.8 * 32


def test_two_starts_that_disagree_say_it(found):
    for name in ("prior", "both modes"):
        gain = found[name][0] - found["laplace"][0]
        assert gain.mean() > 5 * gain.std(ddof=1) / np.sqrt(NUM_POINTS)


def test_a_second_witness_says_it(found):
    """IWAE of a q that covers both lies above AIS: the table says so, and names the datapoints."""
    columns = {}
    for name, value in (("elbo", found["laplace"][0] - 1), ("ais", found["laplace"][0])):
        columns[name] = rows.Column(value, np.full(NUM_POINTS, 0.02))
    columns["iwae"] = rows.Column(found["iwae"][0], np.full(NUM_POINTS, 0.05))
    decomposition = gaps.decompose(rows.Rows(np.arange(NUM_POINTS), columns))
    assert any("IWAE exceeds log p̂" in note for note in decomposition.notes)
    (flag,) = [flag for flag in decomposition.flags if "IWAE above log p̂" in flag.text]
    assert len(flag.indices) == NUM_POINTS


def test_the_certificate_says_it():
    """Half of the simulated z lie in the other mode, whence reverse AIS does not come home."""

    def one(key, _):
        def simulated(key):
            z, x = simulate(key)
            base = Gaussian(x, jnp.full(2, NARROW))
            return z, Datapoint(target_of(x), base, base, "gaussian")

        settings = Settings(ais_start="laplace")
        return certify_datapoint(key, simulated, settings)

    columns = infsub.map_datapoints(one, jax.random.key(1), np.arange(NUM_POINTS))
    gap = columns["gap"]
    assert gap.mean() - 3 * gap.std(ddof=1) / np.sqrt(NUM_POINTS) > 1.0


def test_the_prior_is_a_start_the_command_has():
    """What to do then: the same points with ais.start=prior."""

    def one(key, _, start):
        x = simulate(jax.random.fold_in(key, 0))[1]
        base = Gaussian(x, jnp.full(2, NARROW))
        point = Datapoint(target_of(x), base, base, "gaussian")
        settings = Settings(ais=AIS(num_temperatures=50), ais_start=start, families=())
        row = bounds_of_datapoint(key, point, settings)
        return row["ais"] - grids.log_px(point.target, 200).log_px

    for start, expected in (("prior", 0.0), ("laplace", -np.log(2))):
        static = {"start": start}
        excess = infsub.map_datapoints(one, jax.random.key(2), np.arange(10), static=static)
        np.testing.assert_allclose(np.mean(excess), expected, atol=0.15)
