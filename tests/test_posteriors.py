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
    return jax.tree.map(lambda a: np.asarray(size * rng.normal(size=a.shape), dtype), shapes)


def all_finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def sample_from(posterior, sticking=False):
    """A function (noise, params, sign) -> (y_T, log_q): `sample` fed with its noise.

    y_T is z [D] or (z, v) [2D] as the flow left them, the noise of the same size.
    """

    def run(noise, params, sign=1):
        latent_dim = params["encoded"]["mean"].size
        pieces = iter(jnp.split(noise, noise.size // latent_dim))
        ends, push = [], flows.push

        def spy(*args):
            ends.append(push(*args))
            return ends[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "normal", lambda key, shape, dtype: next(pieces))
            patch.setattr(flows, "push", spy)
            z, log_q = posterior.sample(jax.random.key(0), params, sticking, sign)
        assert next(pieces, None) is None
        y = ravel_pytree(ends[0][0])[0] if ends else z
        return jnp.concatenate([z, y[latent_dim:]]), log_q

    return run


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


@functools.cache
def jacobian_and_values(name, latent_dim):
    """(noise, params, sign) -> (∂y_T/∂noise, (y_T, log_q, log N(noise) − log r(v_T|z_T)))."""
    run = sample_from(family(name, latent_dim))

    @jax.jit
    @functools.partial(jax.jacfwd, has_aux=True)
    def both(noise, params, sign):
        y, log_q = run(noise, params, sign)
        expected = densities.standard_normal(noise)
        return y, (y, log_q, expected - (log_r(params, y) if name in AUXILIARY else 0))

    return both


def noise_of(name, latent_dim, seed):
    return np.random.default_rng(seed).normal(size=latent_dim * (1 + (name in AUXILIARY)))


@each_family
@pytest.mark.parametrize("latent_dim", [1, 3, 50])
def test_log_q_is_the_change_of_variables(name, latent_dim):
    """log q = log N(noise) − log |det ∂y_T/∂noise| (− log r(v_T|z_T)), by autodiff, in float64."""
    size = 0.3 if latent_dim < 50 else 0.1
    with jax.enable_x64(True):
        params = anywhere(2, family(name, latent_dim), size, np.float64)
        noise = noise_of(name, latent_dim, 1)
        found = jacobian_and_values(name, latent_dim)(noise, params, 1)
    jacobian, (_, log_q, rest) = jax.device_get(found)
    assert log_q.dtype == np.float64
    np.testing.assert_allclose(log_q, rest - np.linalg.slogdet(jacobian)[1], rtol=1e-9)


@pytest.mark.parametrize("name", ["rnvp", "auxiliary"])
def test_a_coupling_may_contract_as_far_as_a_sigmoid_does(name):
    """With elu on the output of its scale network, as in others' code, it ends at 2 σ(−1) = 0.54."""
    posterior = family(name, 3, num_steps=1)
    params = jax.jit(posterior.init)(jax.random.key(0))
    (step,) = params["shared"]["steps"]
    for layers in step.values():
        bias = layers[-1]["b"]
        layers[-1]["b"] = np.where(np.arange(bias.size) < bias.size // 2, -5.0, bias)
    fresh = jax.jit(posterior.init)(jax.random.key(0))
    closed, open_ = (jax.jit(posterior.sample)(jax.random.key(1), p)[0] for p in (params, fresh))
    # 0.3 of it is the soft limit's.
    np.testing.assert_allclose(np.log(closed / open_), np.log(2 / (1 + np.exp(5))), atol=0.4)


@each_family
def test_a_sign_turns_the_noise_about(name):
    """sign=−1 is the draw that the opposite noise gives."""
    noise = noise_of(name, 3, 15)
    with jax.enable_x64(True):
        params = anywhere(14, family(name, 3), dtype=np.float64)
        turned, opposite, plain = (
            jacobian_and_values(name, 3)(noise, params, sign)[1]
            for noise, sign in ((noise, -1), (-noise, 1), (noise, 1))
        )
    for one, two in zip(turned[:2], opposite[:2], strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-14)
    assert not np.allclose(turned[0], plain[0])


@each_family
def test_sticking_the_landing(name):
    """Same numbers; the gradient is (∂y_T/∂λ)ᵀ ∇_y log q(y), with ∇_y log q from the Jacobian."""
    posterior = family(name, 3)
    plain, sticking = sample_from(posterior), sample_from(posterior, sticking=True)

    @jax.jit
    def derivatives(noise, params):
        flat, unravel = ravel_pytree(params)

        def log_r_of(flat, y):
            return log_r(unravel(flat), y) if name in AUXILIARY else 0.0

        found = jax.value_and_grad(lambda flat: sticking(noise, unravel(flat))[1])(flat)
        (y, log_q), pull = jax.vjp(lambda noise, flat: plain(noise, unravel(flat)), noise, flat)
        units = jnp.eye(y.size + 1)
        rows = jax.vmap(pull)((units[:, :-1], units[:, -1]))
        return found, log_q, *rows, jax.grad(log_r_of, (0, 1))(flat, y)

    with jax.enable_x64(True):
        params = anywhere(4, posterior, dtype=np.float64)
        values = derivatives(noise_of(name, 3, 3), params)
    (value, found), log_q, by_noise, by_params, (r_by_params, r_by_y) = jax.device_get(values)
    # The last row is log_q's; log q(y), of z and v together, is log_q + log r.
    gradient_y = np.linalg.solve(by_noise[:-1].T, by_noise[-1] + r_by_y @ by_noise[:-1])
    gradient = (gradient_y - r_by_y) @ by_params[:-1] - r_by_params
    np.testing.assert_allclose(value, log_q, rtol=1e-9)
    np.testing.assert_allclose(found, gradient, atol=1e-8)
    assert np.abs(gradient).max() > 0.1


@each_family
def test_importance_weights_average_to_one(name):
    """E_q[p/q] = 1 for a normalised p, a correlated Gaussian in the plane."""
    inverse = np.linalg.inv([[0.8, 0.0], [0.5, 0.6]]).astype(np.float32)

    def log_p(z):
        return densities.standard_normal(inverse @ (z - 0.2)) - math.log(0.8 * 0.6)

    target = Target(log_p, lambda z: jnp.zeros(()), 2)
    posterior = family(name, 2, target=target)
    params = anywhere(5, posterior, 0.1)
    params["encoded"]["log_scale"] = np.asarray([0.2, 0.3], np.float32)
    if name == "hamiltonian":
        for step in params["shared"]["steps"]:
            step["log_step_size"] -= 1.5
    q = posteriors.sampler(posterior, params)
    weights = np.exp(bounds.elbo(jax.random.key(6), target, q, 100_000).log_weights)
    error = np.std(weights) / math.sqrt(weights.size)
    assert error < 0.02
    assert abs(np.mean(weights) - 1) < 4 * error


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

        fisher = jax.jit(jax.hessian(divergence))(flat)
        expected = np.linalg.solve(fisher, ravel_pytree(gradient)[0])
        found = ravel_pytree(jax.jit(posterior.natural)(params, gradient))[0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_dense_gaussian_as_the_base():
    """`full_gaussian` becomes it; the others take the factorised Gaussian that is best in KL."""
    model = models.linear_gaussian(4, 6)
    _, x = model.simulate(jax.random.key(18))
    q, best = model.exact_gaussian(x), model.best_gaussian(x)
    full, flow = posteriors.full_gaussian(4), posteriors.planar(4)

    @jax.jit
    def based(key):
        params = posteriors.with_gaussian(full.init(key), q)
        z, log_q = full.sample(key, params)
        again = posteriors.with_gaussian(params, best)
        narrow = posteriors.gaussian_of(posteriors.with_gaussian(flow.init(key), q))
        return log_q, densities.gaussian(z, q), narrow, again["encoded"]["lower"]

    log_q, expected, narrow, lower = based(jax.random.key(19))
    np.testing.assert_allclose(log_q, expected, rtol=1e-5)
    for one, two in zip(narrow, best, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)
    np.testing.assert_array_equal(lower, 0)  # a factorised one leaves nothing of the dense


def test_a_gaussian_is_based_where_it_is_at_any_scale():
    scales = jnp.asarray([1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e6])
    family = posteriors.full_gaussian(6)
    params = posteriors.with_gaussian(family.init(jax.random.key(0)), Gaussian(scales, scales))
    np.testing.assert_allclose(posteriors.gaussian_of(params).scale, scales, rtol=1e-5)


def start(posterior, q):
    return jax.jit(lambda q: posteriors.start(jax.random.key(21), posterior, q))(q)


def test_a_flow_is_placed_by_one_program():
    """Its loops would each compile, in every call."""
    traces = []

    def place(params, q):
        traces.append(1)
        return params

    posterior = posteriors.rnvp(2, hidden=(3,))._replace(place=place)
    for scale in (1.0, 2.0):
        posteriors.start(jax.random.key(0), posterior, Gaussian(jnp.ones(2), scale * jnp.eye(2)))
    assert len(traces) == 1


def test_a_flow_that_cannot_be_placed_is_at_the_factorised_gaussian():
    """Of an aspect beyond float32's digits the smallest eigenvalue comes out negative."""
    q = Gaussian(jnp.zeros(2), jnp.asarray([[1.0, 0.0], [0.5, 1e-5]]))
    posterior = posteriors.auxiliary(2, hidden=(4,), auxiliary_hidden=(4,))
    params = posteriors.start(jax.random.key(0), posterior, q)
    for one, two in zip(posteriors.gaussian_of(params), posteriors.factorised(q), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)


def weights_at(params, posterior, model, x):
    q = posteriors.sampler(posterior, params)
    return bounds.elbo(jax.random.key(22), model.target(x), q, 1000).log_weights


@pytest.mark.parametrize("activation", flows.ACTIVATIONS)
def test_an_auxiliary_flow_placed_at_a_gaussian(activation):
    """q is the exact posterior, r its conditional: log p(x, z) − log q is log p(x) at every draw."""
    model = models.linear_gaussian(4, 6)
    _, x = model.simulate(jax.random.key(20))
    sizes = {"hidden": (9,), "auxiliary_hidden": (8, 6), "context_dim": 2}
    init = posteriors.auxiliary(4, **sizes).init  # of any activation: compiled once
    posterior = posteriors.auxiliary(4, activation=activation, **sizes)
    params = jax.jit(init)(jax.random.key(21))
    params = jax.jit(posterior.place)(params, model.exact_gaussian(x))
    weights = weights_at(params, posterior, model, x)
    straight = activation in ("elu", "relu")
    np.testing.assert_allclose(weights, model.log_px(x), atol=0.05 if straight else 0.5)
    np.testing.assert_allclose(np.mean(weights), model.log_px(x), atol=2e-3 if straight else 0.02)


def test_nobody_reads_above_the_diagonal_of_a_factor():
    """Where LAPACK leaves what was there before."""
    q = Gaussian(jnp.ones(4), jnp.array(np.tri(4, dtype=np.float32)))
    spoilt = q._replace(scale=q.scale + jnp.triu(jnp.full((4, 4), 9.0), 1))
    posterior = posteriors.auxiliary(4)
    place = jax.jit(functools.partial(posteriors.start, jax.random.key(21), posterior))
    jax.tree.map(np.testing.assert_array_equal, place(spoilt), place(q))


def test_an_auxiliary_flow_without_room_is_at_the_factorised_gaussian():
    model = models.linear_gaussian(4, 6)
    _, x = model.simulate(jax.random.key(20))
    narrow = posteriors.auxiliary(4, hidden=(3,))  # has no room for a straight line of each z
    params = start(narrow, model.exact_gaussian(x))
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
    posterior = make(latent_dim)
    params = start(posterior, model.exact_gaussian(x))
    bound = np.mean(weights_at(params, posterior, model, x))
    factorised = model.kl(x, model.best_gaussian(x))
    assert latent_dim == 2 or factorised > 0.3  # what it would lose without
    np.testing.assert_allclose(bound, model.log_px(x), atol=tolerance)


def test_a_flow_without_room_for_shears_is_not_placed():
    for narrow in (posteriors.rnvp(4, 1), posteriors.rnvp(4, hidden=(1,))):
        assert narrow.place is None
    linear = {"hidden": ()}, {"auxiliary_hidden": ()}
    for narrow in (
        posteriors.rnvp(4, hidden=()),
        *(posteriors.auxiliary(4, **hidden) for hidden in linear),
    ):
        assert narrow.place is None


@pytest.mark.parametrize("limit", [7.0, 100.0])
def test_a_soft_clip_stays_within_its_limit_and_increases(limit):
    a = np.float32([-np.inf, -1e10, -1e7, -500, -limit, 0, 1, limit, 500, 1e7, 1e10, np.inf])
    clipped = np.asarray(jax.jit(flows.soft_clip)(a, limit))
    assert np.all(np.abs(clipped) <= limit)
    assert np.all(np.diff(clipped) >= 0)
    np.testing.assert_allclose(clipped[[0, 5, 6, -1]], [-limit, 0, 1, limit], rtol=0.01, atol=1e-6)


@each_family
def test_starts_at_the_factorised_gaussian(name):
    """From the same base Gaussian, the ELBO is FFG's within what planar and leapfrog steps cost."""
    model = models.linear_gaussian(20, 30)
    _, x = model.simulate(jax.random.key(7))
    target, best = model.target(x), model.best_gaussian(x)
    posterior = family(name, 20, target=target)
    params = start(posterior, best)
    np.testing.assert_allclose(posteriors.gaussian_of(params).scale, best.scale, rtol=1e-5)
    found = bounds.elbo(jax.random.key(9), target, posteriors.sampler(posterior, params), 2000)
    cost = {"planar": 0.05, "hamiltonian": 1.0}.get(name, 0)
    expected = model.log_px(x) - model.kl(x, best)
    assert abs(found.log_px - expected) < 4 * found.standard_error + cost


@each_family
def test_extreme_inputs_stay_finite(name):
    """Whatever an encoder says, up to 1e4: z, log_q and all gradients are finite, in float32."""
    target = Target(None, lambda z: -0.5 * jnp.sum((z - 0.5) ** 2), 5)
    posterior = family(name, 5, target=target)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, {"encoded": 0, "shared": None}))
    def values(key, params):
        def loss(params):
            z, log_q = posterior.sample(key, params)
            # Only sticking, full_gaussian solves with its Cholesky factor, which 1e4 makes singular.
            if name != "full_gaussian":
                log_q += posterior.sample(key, params, sticking=True)[1]
            return log_q + jnp.sum(z), z

        return jax.value_and_grad(loss, has_aux=True)(params)

    params, rng = anywhere(9, posterior), np.random.default_rng(10)

    def extremes(leaf):
        signs = np.sign(rng.normal(size=(20, *leaf.shape)))
        all_one = np.ones((1, *leaf.shape))
        return np.asarray(1e4 * np.concatenate([signs, all_one, -all_one]), np.float32)

    encoded = jax.tree.map(extremes, params["encoded"])
    keys = jax.random.split(jax.random.key(11), 22)
    assert all_finite(values(keys, params | {"encoded": encoded}))


@each_family
def test_vmapped_parameters_and_their_precision(name):
    """A batch of parameters is a loop over them; float32 stays float32 where float64 is on."""
    posterior = family(name, 3)
    keys = jax.random.split(jax.random.key(12), 3)
    params = [anywhere(seed, posterior) for seed in (13, 14, 15)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *params)
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
    u, key = jnp.asarray([1.0, -2.0, 3.0]), jax.random.key(18)

    @jax.jit
    def values(key):
        params = posterior.init(key)
        params["encoded"]["steps"] = [{"u": u, "w": jnp.zeros(3), "b": jnp.asarray(0.5)}]

        def log_q_and_z(params):
            z, log_q = posterior.sample(key, params)
            return log_q, z

        value, gradient = jax.value_and_grad(log_q_and_z, has_aux=True)(params)
        return value, gradient, posteriors.gaussian(3).sample(key, params)

    (log_q, z), gradient, (base, log_q_base) = values(key)
    assert all_finite(gradient)
    np.testing.assert_allclose(z - base, u * np.tanh(0.5), rtol=1e-5)
    np.testing.assert_allclose(log_q, log_q_base, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2])
def test_planar_cannot_fold(size):
    """However strongly u opposes w, the determinant 1 + tanh' û·w stays positive."""
    w = np.random.default_rng(19).normal(size=4).astype(np.float32)
    params = {"u": -size * w, "w": w, "b": np.float32(0)}
    log_det = jax.jit(jax.vmap(lambda z: flows.planar.forward(params, z, None)[1]))
    assert all_finite(log_det(np.outer([-1, 0, 1e-3, 1], w)))


@pytest.mark.parametrize("name", OPTIONS)
def test_the_flow_sees_x(name):
    """Mistake 2 of the predecessors: other features h(x) must give other samples."""
    posterior = family(name, 3)
    params = anywhere(20, posterior)
    moved = params | {"encoded": params["encoded"] | {"context": np.float32([1, -1])}}
    draw, key = jax.jit(posterior.sample), jax.random.key(21)
    (z, log_q), (other_z, other_log_q) = draw(key, params), draw(key, moved)
    assert not np.allclose(z, other_z)
    assert log_q != other_log_q


def test_of_one_draw_no_moments_are_taken():
    with pytest.raises(ValueError, match="must be at least 2: of one draw there is no standard"):
        posteriors.moment_matched(jax.random.key(0), Gaussian(jnp.zeros(2), jnp.ones(2)), 1)


def test_moment_matched_gaussian():
    posterior = posteriors.full_gaussian(2)
    params = posterior.init(jax.random.key(22))
    encoded = {"mean": jnp.asarray([1.0, 2.0]), "lower": jnp.asarray([2.0])}
    params["encoded"] |= encoded
    draw = posteriors.sampler(posterior, params)
    q = posteriors.moment_matched(jax.random.key(23), draw, 20_000)
    np.testing.assert_allclose(q.mean, [1, 2], atol=0.06)
    np.testing.assert_allclose(q.scale, [1, math.sqrt(5)], rtol=0.03)
    full = posteriors.moment_matched(jax.random.key(23), draw, 20_000, full=True)
    np.testing.assert_array_equal(full.mean, q.mean)
    np.testing.assert_allclose(full.scale, [[1, 0], [2, 1]], atol=0.06)
    with pytest.raises(ValueError, match="num_samples must exceed D=2 for a full covariance"):
        posteriors.moment_matched(jax.random.key(23), draw, 2, full=True)


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
