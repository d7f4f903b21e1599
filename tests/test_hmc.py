"""HMC: reversible, volume preserving, second order, and the same chain as an independent one."""

from __future__ import annotations

import functools

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


START, MOMENTUM = jax.random.normal(jax.random.key(0), (2, DIM))


@functools.partial(jax.jit, static_argnames="num_leapfrog")
def flow(z, v, num_leapfrog, step_size=0.1, scale=SCALE):
    """(the state z started from, the state and the momentum at the end)."""
    state = hmc.init(PATH, z)
    return state, *hmc.trajectory(state, v, PATH, BETA, step_size, scale, num_leapfrog)


@functools.partial(jax.jit, static_argnames="num_leapfrog")
def textbook(z, v, num_leapfrog):
    """A half kick, a drift, a half kick, each with a gradient of its own."""

    def leap(_, phase):
        z, v = phase
        v = v + 0.05 * SCALE * jax.grad(log_density)(z)
        z = z + 0.1 * SCALE * v
        return z, v + 0.05 * SCALE * jax.grad(log_density)(z)

    z, v = jax.lax.fori_loop(0, num_leapfrog, leap, (z, v))
    return hmc.init(PATH, z), v


@pytest.mark.parametrize("num_leapfrog", [1, 2, 10])
def test_leapfrog_is_the_textbook_one(num_leapfrog):
    _, end, end_momentum = flow(START, MOMENTUM, num_leapfrog)
    want, v = textbook(START, MOMENTUM, num_leapfrog)
    np.testing.assert_allclose(end.z, want.z, rtol=1e-5)
    np.testing.assert_allclose(end_momentum, v, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(end, want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_leapfrog", [1, 10])
def test_a_trajectory_takes_exactly_l_gradients(num_leapfrog):
    evaluations = []

    @jax.custom_jvp
    def counted(z):
        return log_ratio(z)

    @counted.defjvp
    def counted_jvp(primals, tangents):
        jax.debug.callback(lambda: evaluations.append(1))
        return jax.jvp(log_ratio, primals, tangents)

    path = PATH._replace(log_ratio=Partial(counted))
    state = jax.jit(hmc.init)(PATH, START)

    @jax.jit
    def trajectory(state):
        return hmc.trajectory(state, MOMENTUM, path, BETA, 0.1, SCALE, num_leapfrog)

    jax.block_until_ready(trajectory(state))
    jax.effects_barrier()
    assert len(evaluations) == num_leapfrog


def test_leapfrog_is_reversible():
    _, end, end_momentum = flow(START, MOMENTUM, 10)
    _, back, back_momentum = flow(end.z, -end_momentum, 10)
    assert np.max(np.abs(end.z - START)) > 0.1
    np.testing.assert_allclose(back.z, START, atol=1e-5)
    np.testing.assert_allclose(-back_momentum, MOMENTUM, atol=1e-5)


def test_leapfrog_preserves_volume():
    @jax.jit
    @functools.partial(jax.jacobian, argnums=(0, 1))
    def jacobian(z, v):
        _, end, v = flow(z, v, 10, 0.3)
        return end.z, v

    sign, log_det = np.linalg.slogdet(np.block([list(row) for row in jacobian(START, MOMENTUM)]))
    assert sign == 1
    # float32: each of 10 steps multiplies 8x8 Jacobians with entries of order 1.
    assert abs(log_det) < 1e-4


def test_energy_error_is_second_order():
    z, v = np.random.default_rng(1).normal(size=(2, DIM))

    @functools.partial(jax.jit, static_argnums=2)
    def energy_error(z, v, num_leapfrog):  # of one unit of time
        scale = SCALE.astype(z.dtype)
        state, end, w = flow(z, v, num_leapfrog, 1 / num_leapfrog, scale)
        kinetic = 0.5 * (jnp.sum(w**2) - jnp.sum(v**2))
        return kinetic - (end.log_density(BETA) - state.log_density(BETA))

    with jax.enable_x64(True):
        errors = [float(energy_error(z, v, n)) for n in (50, 100, 200)]
    # Halving ε divides the error by 4, up to O(ε²) of itself.
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 4, rtol=0.01)


def test_same_chain_as_blackjax():
    state = jax.jit(hmc.init)(PATH, START)
    kernel = blackjax.hmc(
        log_density, step_size=0.8, inverse_mass_matrix=SCALE**2, num_integration_steps=7
    )
    our_step = jax.jit(lambda key, state: hmc.step(key, state, PATH, BETA, 0.8, SCALE, 7))
    their_step = jax.jit(kernel.step)
    theirs, accepted = jax.jit(kernel.init)(state.z), []
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
    z = mean + np.sqrt(var) * np.random.default_rng(3).normal(size=(num_chains, 2))
    z = z.astype(np.float32)

    @jax.jit
    @jax.vmap
    def chain(key, z):
        return hmc.step(key, hmc.init(path, z), path, beta, 0.9, scale, 3)

    state, info = jax.device_get(chain(jax.random.split(jax.random.key(3), num_chains), z))
    assert 0.5 < info.acceptance.mean() < 0.97
    moved = state.z - z
    assert np.abs(moved).mean() > 0.3
    # Standard errors of a mean and of a variance over the chains; 4 of them.
    np.testing.assert_allclose(state.z.mean(0), mean, atol=4 * np.sqrt(var / num_chains))
    np.testing.assert_allclose(state.z.var(0), var, atol=4 * var * np.sqrt(2 / num_chains))


def multiple(factor, z):
    return factor * jnp.sum(z)


def beyond_a_wall(wall, z):
    return jnp.where(jnp.sum(z) > wall, 0.0, -jnp.inf)


def test_a_chain_leaves_where_the_density_is_zero_and_does_not_go_there():
    step = jax.jit(hmc.step, static_argnums=6)
    keys = jax.random.split(jax.random.key(0), 50)
    for wall, accepted in ((1e6, [False]), (jnp.sum(START) + 1e-3, [True, False])):
        path = PATH._replace(log_ratio=Partial(beyond_a_wall, wall))
        state = jax.jit(hmc.init)(path, START)
        assert state.log_density(BETA) == -jnp.inf
        after, info = jax.vmap(lambda key: step(key, state, path, BETA, 0.1, SCALE, 3))(keys)  # noqa: B023
        inside = after.z.sum(axis=1) > wall
        np.testing.assert_array_equal(info.accepted, inside)
        assert set(inside.tolist()) == set(accepted)
        np.testing.assert_array_equal(info.acceptance, inside)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_non_finite_proposals_are_rejected(bad):
    state = jax.jit(hmc.init)(PATH, START)
    path = PATH._replace(log_ratio=Partial(multiple, bad))
    step = jax.jit(hmc.step, static_argnums=6)
    after, info = step(jax.random.key(0), state, path, BETA, 0.1, SCALE, 3)
    assert not info.accepted
    assert info.acceptance == 0
    assert info.energy_error == jnp.inf
    for got, want in zip(after, state, strict=True):
        np.testing.assert_array_equal(got, want)
