"""HMC: reversible, volume preserving, second order, and the same chain as an independent one."""

from __future__ import annotations

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from infsub import hmc

DIM = 4


def log_base(z):
    return -0.5 * jnp.sum(z**2)


def log_ratio(z):
    return -jnp.sum(jnp.cosh(z - 0.5)) + 0.3 * z[0] * z[-1]


PATH = hmc.Path(Partial(log_base), Partial(log_ratio))
BETA = 0.7
SCALE = jnp.array([0.5, 1.0, 1.5, 0.8])


def log_density(z):
    return log_base(z) + BETA * log_ratio(z)


@pytest.fixture
def start():
    z, v = jax.random.normal(jax.random.key(0), (2, DIM))
    return hmc.init(PATH, z), v


@pytest.mark.parametrize("num_leapfrog", [1, 2, 10])
def test_leapfrog_is_the_textbook_one(start, num_leapfrog):
    state, momentum = start
    end, end_momentum = hmc.trajectory(state, momentum, PATH, BETA, 0.1, SCALE, num_leapfrog)
    z, v, step = state.z, momentum, 0.1 * SCALE
    for _ in range(
        num_leapfrog
    ):  # a half kick, a drift, a half kick, each with a gradient of its own
        v = v + 0.5 * step * jax.grad(log_density)(z)
        z = z + step * v
        v = v + 0.5 * step * jax.grad(log_density)(z)
    np.testing.assert_allclose(end.z, z, rtol=1e-5)
    np.testing.assert_allclose(end_momentum, v, rtol=1e-4, atol=1e-5)
    for got, want in zip(end, hmc.init(PATH, z), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_leapfrog", [1, 10])
def test_a_trajectory_takes_exactly_l_gradients(start, num_leapfrog):
    evaluations = []

    @jax.custom_jvp
    def counted(z):
        return log_ratio(z)

    @counted.defjvp
    def counted_jvp(primals, tangents):
        jax.debug.callback(lambda: evaluations.append(1))
        return jax.jvp(log_ratio, primals, tangents)

    path = PATH._replace(log_ratio=Partial(counted))
    state, momentum = start
    jax.block_until_ready(hmc.trajectory(state, momentum, path, BETA, 0.1, SCALE, num_leapfrog))
    jax.effects_barrier()
    assert len(evaluations) == num_leapfrog


def test_leapfrog_is_reversible(start):
    state, momentum = start
    end, end_momentum = hmc.trajectory(state, momentum, PATH, BETA, 0.1, SCALE, 10)
    back, back_momentum = hmc.trajectory(end, -end_momentum, PATH, BETA, 0.1, SCALE, 10)
    assert jnp.max(jnp.abs(end.z - state.z)) > 0.1
    np.testing.assert_allclose(back.z, state.z, atol=1e-5)
    np.testing.assert_allclose(-back_momentum, momentum, atol=1e-5)


def test_leapfrog_preserves_volume(start):
    state, momentum = start

    def flow(phase):
        end, v = hmc.trajectory(
            hmc.init(PATH, phase[:DIM]), phase[DIM:], PATH, BETA, 0.3, SCALE, 10
        )
        return jnp.concatenate([end.z, v])

    jacobian = jax.jacobian(flow)(jnp.concatenate([state.z, momentum]))
    sign, log_det = jnp.linalg.slogdet(jacobian)
    assert sign == 1
    # float32: each of 10 steps multiplies 8x8 Jacobians with entries of order 1.
    assert abs(log_det) < 1e-4


def test_energy_error_is_second_order():
    with jax.enable_x64(True):
        z, v = jax.random.normal(jax.random.key(1), (2, DIM), jnp.float64)

        def energy_error(num_leapfrog):  # of one unit of time
            state = hmc.init(PATH, z)
            scale = SCALE.astype(jnp.float64)
            end, w = hmc.trajectory(state, v, PATH, BETA, 1 / num_leapfrog, scale, num_leapfrog)
            kinetic = 0.5 * (jnp.sum(w**2) - jnp.sum(v**2))
            return kinetic - (end.log_density(BETA) - state.log_density(BETA))

        errors = [float(energy_error(n)) for n in (50, 100, 200)]
    # Halving ε divides the error by 4, up to O(ε²) of itself.
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4, rtol=0.01)


def test_same_chain_as_blackjax(start):
    state, _ = start
    kernel = blackjax.hmc(
        log_density, step_size=0.8, inverse_mass_matrix=SCALE**2, num_integration_steps=7
    )
    our_step = jax.jit(lambda key, state: hmc.step(key, state, PATH, BETA, 0.8, SCALE, 7))
    their_step = jax.jit(kernel.step)
    theirs, accepted = kernel.init(state.z), []
    for key in jax.random.split(jax.random.key(2), 40):
        theirs, _ = their_step(key, theirs)
        state, info = our_step(key, state)
        accepted.append(bool(info.accepted))
        np.testing.assert_allclose(state.z, theirs.position, rtol=1e-3, atol=1e-3)
    assert 0 < sum(accepted) < 40  # both branches were compared


def test_invariance():
    """One transition from exact samples of a Gaussian leaves mean and variance where they were."""
    num_chains, scale = 20_000, jnp.array([0.3, 1.2])
    path = hmc.Path(
        Partial(lambda z: -0.5 * jnp.sum(z**2)), Partial(lambda z: -0.5 * jnp.sum((z - 1) ** 2))
    )
    beta = 0.6  # N(beta / (1 + beta), 1 / (1 + beta))
    mean, var = beta / (1 + beta), 1 / (1 + beta)
    key_z, key = jax.random.split(jax.random.key(3))
    z = mean + jnp.sqrt(var) * jax.random.normal(key_z, (num_chains, 2))

    def chain(key, z):
        state = hmc.init(path, z)
        return hmc.step(key, state, path, beta, 0.9, scale, 3)

    state, info = jax.jit(jax.vmap(chain))(jax.random.split(key, num_chains), z)
    assert 0.5 < info.acceptance.mean() < 0.97
    moved = state.z - z
    assert jnp.abs(moved).mean() > 0.3
    # Standard errors of a mean and of a variance over the chains; 4 of them.
    np.testing.assert_allclose(state.z.mean(0), mean, atol=4 * np.sqrt(var / num_chains))
    np.testing.assert_allclose(state.z.var(0), var, atol=4 * var * np.sqrt(2 / num_chains))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_proposals_are_rejected(start, bad):
    state, _ = start
    path = PATH._replace(log_ratio=Partial(lambda z: bad * jnp.sum(z)))
    after, info = hmc.step(jax.random.key(0), state, path, BETA, 0.1, SCALE, 3)
    assert not info.accepted
    assert info.acceptance == 0
    assert info.energy_error == jnp.inf
    for got, want in zip(after, state, strict=True):
        np.testing.assert_array_equal(got, want)
