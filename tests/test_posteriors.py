"""Every family by the same tests: densities against autodiff Jacobians, weights, extremes."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from infsub import bounds, densities, flows, posteriors
from infsub.types import Gaussian, Target

OPTIONS = {
    "rnvp": {"hidden": (7,), "context_dim": 2},
    "auxiliary": {"hidden": [7], "auxiliary_hidden": [6, 5], "context_dim": 2},
    "hamiltonian": {"auxiliary_hidden": (6, 5), "context_dim": 2},
}
AUXILIARY = tuple(n for n, family in posteriors.FAMILIES.items() if family.auxiliary)

each_family = pytest.mark.parametrize("name", posteriors.FAMILIES)


def quartic(z):
    """log p(x|z) whose force is not linear in z."""
    return -0.5 * jnp.sum((z - 0.5) ** 2) - 0.01 * jnp.sum(z**4)


def family(name, latent_dim, **options):
    options = {"target": Target(None, quartic, latent_dim)} | OPTIONS.get(name, {}) | options
    return posteriors.make(name, latent_dim, **options)


def anywhere(seed, posterior, size=0.3, dtype=np.float32):
    """Random parameters, away from the start, where no flow is the identity."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(posterior.init, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(size * rng.normal(size=a.shape), dtype), shapes)


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
    def both(noise, params):
        y, log_q = run(noise, params)
        jacobian = jax.jacfwd(lambda noise: run(noise, params)[0])(noise)
        expected = densities.standard_normal(noise) - jnp.linalg.slogdet(jacobian)[1]
        return log_q, expected - (log_r(params, y) if name in AUXILIARY else 0)

    with jax.enable_x64(True):
        noise = np.random.default_rng(1).normal(size=latent_dim * (1 + (name in AUXILIARY)))
        params = anywhere(2, posterior, 0.3 if latent_dim < 50 else 0.1, np.float64)
        log_q, expected = both(noise, params)
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
    def both(noise, params):
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
        noise = np.random.default_rng(3).normal(size=6 if name in AUXILIARY else 3)
        found, expected = both(noise, anywhere(4, posterior, dtype=np.float64))
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
    posterior = family(name, 2, target=target)
    params = anywhere(5, posterior, 0.1)
    params["encoded"]["log_scale"] = jnp.asarray([0.2, 0.3])
    if name == "hamiltonian":
        for step in params["shared"]["steps"]:
            step["log_step_size"] -= 1.5
    q = posteriors.sampler(posterior, params)
    weights = jnp.exp(bounds.elbo(jax.random.key(6), target, q, 100_000).log_weights)
    error = jnp.std(weights) / math.sqrt(weights.size)
    assert error < 0.02
    assert abs(jnp.mean(weights) - 1) < 4 * error


@each_family
def test_a_sign_turns_the_noise_about(name, sample_from, monkeypatch):
    """sign=−1 is the draw that the opposite noise gives."""
    posterior, normal = family(name, 3), jax.random.normal
    params, key = anywhere(14, posterior), jax.random.key(15)
    turned = posterior.sample(key, params, sign=-1)
    assert not np.allclose(turned[0], posterior.sample(key, params)[0])
    monkeypatch.setattr(jax.random, "normal", lambda *args: -normal(*args))
    for one, two in zip(turned, posterior.sample(key, params), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "full_gaussian"])
def test_the_natural_gradient_is_the_fisher_informations(name):
    """F⁻¹ g, F the Hessian of KL(q_λ ‖ q_μ) in μ at μ = λ, in closed form and float64."""
    posterior = family(name, 4)
    with jax.enable_x64(True):
        params = anywhere(16, posterior, 0.5, np.float64)
        gradient = anywhere(17, posterior, 1.0, np.float64)
        flat, unravel = ravel_pytree(params)

        def moments(flat):  # z is linear in the noise, so one draw a unit of noise is its Jacobian
            q = unravel(flat)["encoded"]
            unit = jnp.eye(4)
            if "lower" in q:
                unit = unit.at[np.tril_indices(4, -1)].set(q["lower"])
            cholesky = jnp.exp(q["log_scale"])[:, None] * unit
            return q["mean"], cholesky @ cholesky.T

        def divergence(other):
            (mean_1, cov_1), (mean_2, cov_2) = moments(flat), moments(other)
            inverse, shift = jnp.linalg.inv(cov_2), mean_2 - mean_1
            log_dets = jnp.linalg.slogdet(cov_2)[1] - jnp.linalg.slogdet(cov_1)[1]
            return 0.5 * (jnp.trace(inverse @ cov_1) + shift @ inverse @ shift - 4 + log_dets)

        fisher = jax.hessian(divergence)(flat)
        expected = jnp.linalg.solve(fisher, ravel_pytree(gradient)[0])
        found = ravel_pytree(posterior.natural(params, gradient))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_dense_gaussian_as_the_base():
    """`full_gaussian` becomes it; the others take the factorised Gaussian that is best in KL."""
    model = models.linear_gaussian(4, 6)
    _, x = model.simulate(jax.random.key(18))
    mean, cov = model.posterior(x)
    q, best = Gaussian(mean, jnp.linalg.cholesky(cov)), model.best_gaussian(x)
    full = posteriors.full_gaussian(4)
    params = posteriors.with_gaussian(full.init(jax.random.key(0)), q)
    z, log_q = full.sample(jax.random.key(19), params)
    np.testing.assert_allclose(log_q, densities.gaussian(z, q), rtol=1e-5)
    flow = posteriors.planar(4)
    found = posteriors.gaussian_of(posteriors.with_gaussian(flow.init(jax.random.key(0)), q))
    for one, two in zip(found, best, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)
    again = posteriors.with_gaussian(params, best)  # a factorised one leaves nothing of the dense
    np.testing.assert_array_equal(again["encoded"]["lower"], 0)


@pytest.mark.parametrize("activation", flows.ACTIVATIONS)
def test_an_auxiliary_flow_placed_at_a_gaussian(activation):
    """q is the exact posterior, r its conditional: log p(x, z) − log q is log p(x) at every draw."""
    model = models.linear_gaussian(4, 6)
    _, x = model.simulate(jax.random.key(20))
    mean, cov = model.posterior(x)
    q = Gaussian(mean, jnp.linalg.cholesky(cov))
    sizes = {"hidden": (9,), "auxiliary_hidden": (8, 6), "context_dim": 2}
    posterior = posteriors.auxiliary(4, activation=activation, **sizes)
    params = posteriors.start(jax.random.key(21), posterior, q)
    weights = bounds.elbo(
        jax.random.key(22), model.target(x), posteriors.sampler(posterior, params), 1000
    ).log_weights
    straight = activation in ("elu", "relu")
    np.testing.assert_allclose(weights, model.log_px(x), atol=0.05 if straight else 0.5)
    np.testing.assert_allclose(jnp.mean(weights), model.log_px(x), atol=2e-3 if straight else 0.02)
    narrow = posteriors.auxiliary(4, hidden=(3,))  # has no room for a straight line of each z
    params = posteriors.start(jax.random.key(21), narrow, q)
    np.testing.assert_allclose(
        posteriors.gaussian_of(params).scale, model.best_gaussian(x).scale, rtol=1e-4
    )


@pytest.mark.parametrize("latent_dim", [2, 5, 8])
@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (functools.partial(posteriors.rnvp, hidden=(9, 7), context_dim=2), 5e-3),
        (posteriors.sylvester, 0.03),
    ],
)
def test_a_flow_placed_at_a_gaussian(make, tolerance, latent_dim):
    """Two steps shear independent noise into the exact posterior of full covariance."""
    model = models.linear_gaussian(latent_dim, 2 * latent_dim)
    _, x = model.simulate(jax.random.key(20))
    mean, cov = model.posterior(x)
    q = Gaussian(mean, jnp.linalg.cholesky(cov))
    posterior = make(latent_dim)
    params = posteriors.start(jax.random.key(21), posterior, q)
    bound = bounds.elbo(
        jax.random.key(22), model.target(x), posteriors.sampler(posterior, params), 1000
    )
    factorised = 0.5 * jnp.sum(jnp.log(jnp.diag(model.precision()) * jnp.diag(cov)))
    assert latent_dim == 2 or factorised > 0.3  # what it would lose without
    np.testing.assert_allclose(bound.log_px, model.log_px(x), atol=tolerance)


def test_a_flow_without_room_for_shears_is_not_placed():
    for narrow in (posteriors.rnvp(4, 1), posteriors.rnvp(4, hidden=(1,))):
        assert narrow.place is None


@each_family
def test_starts_at_the_factorised_gaussian(name):
    """From the same base Gaussian, the ELBO is FFG's within what planar and leapfrog steps cost."""
    model = models.linear_gaussian(20, 30)
    _, x = model.simulate(jax.random.key(7))
    target, start = model.target(x), model.best_gaussian(x)
    posterior = family(name, 20, target=target)
    params = posteriors.with_gaussian(jax.jit(posterior.init)(jax.random.key(8)), start)
    np.testing.assert_allclose(posteriors.gaussian_of(params).scale, start.scale, rtol=1e-5)
    found = bounds.elbo(jax.random.key(9), target, posteriors.sampler(posterior, params), 2000)
    cost = {"planar": 0.05, "hamiltonian": 1.0}.get(name, 0)
    expected = model.log_px(x) - model.kl(x, start)
    assert abs(found.log_px - expected) < 4 * found.standard_error + cost


@each_family
def test_extreme_inputs_stay_finite(name):
    """Whatever an encoder says, up to 1e4: z, log_q and all gradients are finite, in float32."""
    target = Target(None, lambda z: -0.5 * jnp.sum((z - 0.5) ** 2), 5)
    posterior = family(name, 5, target=target)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, {"encoded": 0, "shared": None}))
    def values(key, params):
        def loss(params, sticking):
            z, log_q = posterior.sample(key, params, sticking=sticking)
            return log_q + jnp.sum(z), (z, log_q)

        both = jax.value_and_grad(loss, has_aux=True)
        # Only sticking, full_gaussian solves with its Cholesky factor, which 1e4 makes singular.
        return both(params, False), both(params, True) if name != "full_gaussian" else None

    params = anywhere(9, posterior)
    flat, unravel = ravel_pytree(params["encoded"])
    signs = np.sign(np.random.default_rng(10).normal(size=(20, flat.size)))
    extremes = 1e4 * np.concatenate([signs, np.ones((1, flat.size)), -np.ones((1, flat.size))])
    encoded = jax.vmap(unravel)(jnp.asarray(extremes, jnp.float32))
    keys = jax.random.split(jax.random.key(11), len(extremes))
    assert all_finite(values(keys, params | {"encoded": encoded}))


@each_family
def test_vmapped_parameters_and_their_precision(name):
    """A batch of parameters is a loop over them; float32 stays float32 where float64 is on."""
    posterior = family(name, 3)
    keys = jax.random.split(jax.random.key(12), 3)
    params = [anywhere(seed, posterior) for seed in (13, 14, 15)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    with jax.enable_x64(True):
        z, log_q = jax.jit(jax.vmap(posterior.sample))(keys, stacked)
        one = jax.jit(posterior.sample)
        each = [one(key, p) for key, p in zip(keys, params, strict=True)]
    assert z.dtype == log_q.dtype == jnp.float32
    np.testing.assert_allclose(z, [z for z, _ in each], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_q, [log_q for _, log_q in each], rtol=1e-4, atol=1e-5)


STEPS = {
    "planar": (flows.planar, lambda key: flows.init_planar(key, 4)),
    "sylvester": (flows.sylvester, lambda key: flows.init_sylvester(key, 4, 3, 2)),
    "coupling": (flows.coupling("tanh"), lambda key: flows.init_coupling(key, 2, 2, 2, (5,))),
    "leapfrog": (flows.leapfrog(Target(None, quartic, 2)), lambda key: flows.init_leapfrog(2)),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_invert(name):
    """Back from y' the value is y, and the Jacobian the inverse of the way there."""
    step, init = STEPS[name]
    pair = name in ("coupling", "leapfrog")
    shapes = jax.eval_shape(init, jax.random.key(0))

    def halves(y):
        return (y[:2], y[2:]) if pair else y

    @jax.jit
    def there_and_back(params, y, context):
        def forward(y):
            end, log_det = step.forward(params, halves(y), context)
            return ravel_pytree(end)[0], log_det

        def inverse(end):
            back, log_det = step.inverse(params, halves(end), context, halves(y))
            return ravel_pytree(back)[0], log_det

        end, log_det = forward(y)
        slope = jax.jacobian(forward)(y)
        return inverse(end), jax.jacobian(inverse)(end), log_det, slope

    rng = np.random.default_rng(16)
    with jax.enable_x64(True):
        for _ in range(20):
            params = jax.tree.map(lambda a: 0.7 * rng.normal(size=a.shape), shapes)
            y, context = 2 * rng.normal(size=4), rng.uniform(size=2)
            (back, log_det_back), slope_back, log_det, slope = there_and_back(params, y, context)
            np.testing.assert_allclose(back, y, atol=1e-9)
            np.testing.assert_allclose(log_det_back, log_det, atol=1e-9)
            np.testing.assert_allclose(slope_back[0] @ slope[0], np.eye(4), atol=1e-7)
            np.testing.assert_allclose(slope_back[1] @ slope[0], slope[1], atol=1e-7)


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
    params = anywhere(20, posterior)
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
    full = posteriors.moment_matched(jax.random.key(23), posterior, params, 20_000, full=True)
    np.testing.assert_array_equal(full.mean, q.mean)
    np.testing.assert_allclose(full.scale, [[1, 0], [2, 1]], atol=0.06)
    with pytest.raises(ValueError, match="num_samples must exceed D=2 for a full covariance"):
        posteriors.moment_matched(jax.random.key(23), posterior, params, 2, full=True)


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
    with pytest.raises(ValueError, match=r"needs a target of latent_dim=2; got .*latent_dim=3"):
        posteriors.make("hamiltonian", 2, target=Target(None, quartic, 3))
    with pytest.raises(ValueError, match="needs a target of latent_dim=2; got no target"):
        posteriors.make("hamiltonian", 2)
