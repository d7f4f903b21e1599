"""Every family by the same tests: densities against autodiff Jacobians, weights, extremes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from infsub import bounds, densities, flows, posteriors
from infsub.types import Target

OPTIONS = {
    "rnvp": {"hidden": (7,), "context_dim": 2},
    "auxiliary": {"hidden": [7], "auxiliary_hidden": [6, 5], "context_dim": 2},
    "hamiltonian": {"auxiliary_hidden": (6, 5), "context_dim": 2},
}
AUXILIARY = ("auxiliary", "hamiltonian")

each_family = pytest.mark.parametrize("name", posteriors.NAMES)


def quartic(z):
    """log p(x|z) whose force is not linear in z."""
    return -0.5 * jnp.sum((z - 0.5) ** 2) - 0.01 * jnp.sum(z**4)


def family(name, latent_dim, **options):
    if name == "hamiltonian":
        options = {"target": Target(None, quartic, latent_dim)} | options
    return posteriors.make(name, latent_dim, **(OPTIONS.get(name, {}) | options))


def anywhere(key, posterior, size=0.3):
    """Parameters away from the start, where no flow is the identity."""
    flat, unravel = ravel_pytree(posterior.init(key))
    return unravel(flat + size * jax.random.normal(key, flat.shape, flat.dtype))


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.fixture
def sample_from(monkeypatch):
    """(posterior, sticking) -> a function (noise, params) -> (y_T, log_q): `sample` fed with its noise.

    y_T is z [D] or (z, v) [2D] as the flow left them, the noise of the same size.
    """

    def bind(posterior, sticking=False):
        def run(noise, params):
            latent_dim = params["encoded"]["mean"].size
            pieces = iter(jnp.split(noise, noise.size // latent_dim))
            ends, push = [], flows.push

            def spy(*args):
                ends.append(push(*args))
                return ends[-1]

            with monkeypatch.context() as patch:
                patch.setattr(jax.random, "normal", lambda key, shape, dtype: next(pieces))
                patch.setattr(flows, "push", spy)
                z, log_q = posterior.sample(jax.random.key(0), params, sticking=sticking)
            assert next(pieces, None) is None
            y = ravel_pytree(ends[0][0])[0] if ends else z
            return jnp.concatenate([z, y[latent_dim:]]), log_q

        return run

    return bind


def log_r(params, y):
    """log r(v|z, h) written out again, at y = (z, v)."""
    z, v = jnp.split(y, 2)
    hidden = jnp.concatenate([z, params["encoded"]["context"]])
    *layers, last = params["shared"]["r"]
    for layer in layers:
        hidden = jax.nn.elu(hidden @ layer["w"] + layer["b"])
    mean, log_scale = jnp.split(hidden @ last["w"] + last["b"], 2)
    log_scale = flows.soft_clip(log_scale, 7.0)
    squares = ((v - mean) / jnp.exp(log_scale)) ** 2
    return -0.5 * jnp.sum(squares + math.log(2 * math.pi)) - jnp.sum(log_scale)


@each_family
@pytest.mark.parametrize("latent_dim", [1, 2, 3, 50])
def test_log_q_is_the_change_of_variables(name, latent_dim, sample_from):
    """log q = log N(noise) − log |det ∂y_T/∂noise| (− log r(v_T|z_T)), by autodiff, in float64."""
    posterior = family(name, latent_dim)
    run = sample_from(posterior)

    @jax.jit
    def both(noise):
        params = anywhere(jax.random.key(1), posterior, 0.3 if latent_dim < 50 else 0.1)
        y, log_q = run(noise, params)
        jacobian = jax.jacfwd(lambda noise: run(noise, params)[0])(noise)
        expected = densities.standard_normal(noise) - jnp.linalg.slogdet(jacobian)[1]
        return log_q, expected - (log_r(params, y) if name in AUXILIARY else 0)

    with jax.enable_x64(True):
        noise = np.random.default_rng(2).normal(size=latent_dim * (1 + (name in AUXILIARY)))
        log_q, expected = both(noise)
        assert log_q.dtype == jnp.float64
        np.testing.assert_allclose(log_q, expected, rtol=1e-9)


@each_family
def test_sticking_the_landing(name, sample_from):
    """Same numbers; the gradient is (∂y_T/∂λ)ᵀ ∇_y log q(y), with ∇_y log q from the Jacobian."""
    posterior = family(name, 3)
    plain, sticking = sample_from(posterior), sample_from(posterior, sticking=True)

    def log_r_live(params, y):
        return log_r(params, y) if name in AUXILIARY else 0.0

    @jax.jit
    def both(noise):
        params = anywhere(jax.random.key(3), posterior)

        def log_q_y(noise):
            y, log_q = plain(noise, params)
            return log_q + log_r_live(params, y)

        jacobian = jax.jacfwd(lambda noise: plain(noise, params)[0])(noise)
        gradient_y = jnp.linalg.solve(jacobian.T, jax.grad(log_q_y)(noise))

        def expected(params):
            y, log_q = plain(noise, params)
            return gradient_y @ y - log_r_live(params, y), log_q

        gradient, log_q = jax.grad(expected, has_aux=True)(params)
        value, found = jax.value_and_grad(lambda params: sticking(noise, params)[1])(params)
        return (value, ravel_pytree(found)[0]), (log_q, ravel_pytree(gradient)[0])

    with jax.enable_x64(True):
        noise = np.random.default_rng(4).normal(size=6 if name in AUXILIARY else 3)
        found, expected = both(noise)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-9)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-8)
        assert np.abs(expected[1]).max() > 0.1


@each_family
def test_importance_weights_average_to_one(name):
    """E_q[p/q] = 1 for a normalised p, a correlated Gaussian in the plane."""
    cholesky = jnp.asarray([[0.8, 0.0], [0.5, 0.6]])

    def log_p(z):
        residual = jax.scipy.linalg.solve_triangular(cholesky, z - 0.2, lower=True)
        return densities.standard_normal(residual) - jnp.log(0.8 * 0.6)

    target = Target(log_p, lambda z: jnp.zeros(()), 2)
    posterior = family(name, 2, **({"target": target} if name == "hamiltonian" else {}))
    params = jax.jit(anywhere, static_argnums=(1, 2))(jax.random.key(5), posterior, 0.1)
    params["encoded"]["log_scale"] = jnp.asarray([0.2, 0.3])
    q = posteriors.sampler(posterior, params)
    weights = jnp.exp(bounds.elbo(jax.random.key(6), target, q, 100_000).log_weights)
    error = jnp.std(weights) / math.sqrt(weights.size)
    assert error < 0.02
    assert abs(jnp.mean(weights) - 1) < 4 * error


@each_family
def test_starts_at_the_factorised_gaussian(name):
    """From the same base Gaussian, the ELBO is FFG's within what planar and leapfrog steps cost."""
    model = models.linear_gaussian(20, 30)
    _, x = model.simulate(jax.random.key(7))
    target, start = model.target(x), model.best_gaussian(x)
    posterior = family(name, 20, **({"target": target} if name == "hamiltonian" else {}))
    params = posteriors.with_gaussian(posterior.init(jax.random.key(8)), start)
    np.testing.assert_allclose(posteriors.gaussian_of(params).scale, start.scale, rtol=1e-5)
    found = bounds.elbo(jax.random.key(9), target, posteriors.sampler(posterior, params), 2000)
    cost = {"planar": 0.05, "hamiltonian": 1.0}.get(name, 0)
    expected = model.log_px(x) - model.kl(x, start)
    assert abs(found.log_px - expected) < 4 * found.standard_error + cost


@each_family
@pytest.mark.parametrize("sticking", [False, True])
def test_extreme_inputs_stay_finite(name, sticking):
    """Whatever an encoder says, up to 1e4: z, log_q and all gradients are finite, in float32."""
    target = Target(None, lambda z: -0.5 * jnp.sum((z - 0.5) ** 2), 5)
    posterior = family(name, 5, **({"target": target} if name == "hamiltonian" else {}))

    def check(key, params):
        def loss(params):
            z, log_q = posterior.sample(key, params, sticking=sticking)
            return log_q + jnp.sum(z), (z, log_q)

        return jax.value_and_grad(loss, has_aux=True)(params)

    start = anywhere(jax.random.key(10), posterior)
    flat, unravel = ravel_pytree(start["encoded"])
    signs = jnp.sign(jax.random.normal(jax.random.key(11), (20, flat.size)))
    extremes = jnp.concatenate([signs, jnp.ones((1, flat.size)), -jnp.ones((1, flat.size))])
    if name == "full_gaussian" and sticking:
        extremes /= 1e3  # it must solve with its Cholesky factor, which 1e4 makes singular
    encoded = jax.vmap(unravel)(1e4 * extremes)
    keys = jax.random.split(jax.random.key(12), len(extremes))
    axes = {"encoded": 0, "shared": None}
    values = jax.jit(jax.vmap(check, in_axes=(0, axes)))(keys, start | {"encoded": encoded})
    assert all_finite(values)


@each_family
def test_parameters_may_be_vmapped(name):
    posterior = family(name, 3)
    keys = jax.random.split(jax.random.key(13), 4)
    params = [anywhere(key, posterior) for key in keys]
    z, log_q = jax.vmap(posterior.sample)(keys, jax.tree.map(lambda *a: jnp.stack(a), *params))
    for i, key in enumerate(keys):
        expected = posterior.sample(key, params[i])
        np.testing.assert_allclose(z[i], expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(log_q[i], expected[1], rtol=1e-4, atol=1e-5)


@each_family
def test_float32_stays_float32_where_float64_is_on(name):
    posterior = family(name, 3)
    params = posterior.init(jax.random.key(14))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    with jax.enable_x64(True):
        for sticking in (False, True):
            z, log_q = posterior.sample(jax.random.key(15), params, sticking=sticking)
            assert z.dtype == log_q.dtype == jnp.float32


STEPS = {
    "planar": (flows.planar, lambda key: flows.init_planar(key, 4)),
    "sylvester": (flows.sylvester, lambda key: flows.init_sylvester(key, 4, 3, 2)),
    "coupling": (flows.coupling("tanh"), lambda key: flows.init_coupling(key, 2, 2, 3, (5,))),
    "leapfrog": (
        flows.leapfrog(Target(None, quartic, 2)),
        lambda key: flows.init_leapfrog(2),
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_invert(name):
    """Round trips: in one go for couplings, by Newton's iteration from y' for the tanh flows."""
    step, init = STEPS[name]
    with jax.enable_x64(True):
        for key in jax.random.split(jax.random.key(16), 5):
            flat, unravel = ravel_pytree(init(key))
            params = unravel(flat + 0.5 * jax.random.normal(key, flat.shape))
            y = 2 * jax.random.normal(key, (4,))
            context = jax.random.uniform(key, (2 if name == "leapfrog" else 3,))
            pair = name in ("coupling", "leapfrog")
            start = (y[:2], y[2:]) if pair else y
            end, log_det = step.forward(params, start, context)
            back, log_det_back = step.inverse(params, end, context, end)
            for _ in range(0 if pair else 50):
                back, log_det_back = step.inverse(params, end, context, back)
            np.testing.assert_allclose(ravel_pytree(back)[0], y, atol=1e-9)
            np.testing.assert_allclose(log_det_back, log_det, atol=1e-9)


def test_planar_with_zero_w_is_a_shift():
    posterior = posteriors.planar(3, num_steps=1)
    params = posterior.init(jax.random.key(17))
    u = jnp.asarray([1.0, -2.0, 3.0])
    params["encoded"]["steps"] = [{"u": u, "w": jnp.zeros(3), "b": jnp.asarray(0.5)}]
    gradient = jax.grad(lambda params: posterior.sample(jax.random.key(18), params)[1])(params)
    assert all_finite(gradient)
    z, log_q = posterior.sample(jax.random.key(18), params)
    base, log_q_base = posteriors.gaussian(3).sample(jax.random.key(18), params)
    np.testing.assert_allclose(z - base, u * np.tanh(0.5), rtol=1e-5)
    np.testing.assert_allclose(log_q, log_q_base, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2])
def test_planar_cannot_fold(size):
    """However strongly u opposes w, the determinant 1 + tanh' û·w stays positive."""
    w = jax.random.normal(jax.random.key(19), (4,))
    params = {"u": -size * w, "w": w, "b": jnp.zeros(())}
    log_dets = [flows.planar.forward(params, scale * w, None)[1] for scale in (-1, 0, 1e-3, 1)]
    assert all_finite(log_dets)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_flow_sees_x(name):
    """Mistake 2 of the predecessors: other features h(x) must give other samples."""
    posterior = family(name, 4)
    params = anywhere(jax.random.key(20), posterior)
    moved = params | {"encoded": params["encoded"] | {"context": jnp.asarray([1.0, -1.0])}}
    key = jax.random.key(21)
    assert not jnp.allclose(posterior.sample(key, params)[0], posterior.sample(key, moved)[0])


def test_moment_matched_gaussian():
    posterior = posteriors.full_gaussian(2)
    params = posterior.init(jax.random.key(22))
    encoded = {"mean": jnp.asarray([1.0, 2.0]), "lower": jnp.asarray([2.0])}
    params["encoded"] |= encoded
    q = posteriors.moment_matched(jax.random.key(23), posterior, params, 20_000)
    np.testing.assert_allclose(q.mean, [1, 2], atol=0.06)
    np.testing.assert_allclose(q.scale, [1, math.sqrt(5)], rtol=0.03)


def test_equal_arguments_give_the_same_object():
    assert posteriors.rnvp(4, hidden=[5]) is posteriors.rnvp(4, hidden=(5,))
    target = Target(None, quartic, 2)
    one, two = posteriors.hamiltonian(target), posteriors.hamiltonian(target)
    assert jax.tree.structure(one.sample) == jax.tree.structure(two.sample)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown posterior 'flow': it must be one of gaussian"):
        posteriors.make("flow", 2)
    with pytest.raises(ValueError, match="num_steps must be a positive integer; got 0"):
        posteriors.planar(2, num_steps=0)
    with pytest.raises(ValueError, match="hidden must be a positive integer; got -1"):
        posteriors.rnvp(2, hidden=(-1,))
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        posteriors.auxiliary(2, activation="gelu")
    with pytest.raises(ValueError, match="rank must be at most latent_dim=2; got 3"):
        posteriors.sylvester(2, rank=3)
    with pytest.raises(ValueError, match="the target has latent_dim=3; the posterior 2"):
        posteriors.make("hamiltonian", 2, target=Target(None, quartic, 3))
