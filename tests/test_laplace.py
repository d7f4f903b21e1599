"""Laplace: exact where the posterior is Gaussian, never worse than its start, honest about failure."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from models import linear_gaussian

import infsub
from infsub import densities
from infsub.types import Gaussian, Target

MODEL = linear_gaussian(10, 20)


def simulate(model):
    return model.simulate(jax.random.key(7))[1]


def with_outputs(model, x) -> Target:
    """The same target, which says that its likelihood depends on z by W z + b."""
    plain = model.target(x)
    return Target(
        None,
        plain.log_likelihood,
        plain.latent_dim,
        outputs=lambda z: {"mean": model.weight @ z + model.bias},
        log_likelihood_of_outputs=lambda out: densities.normal(x, out["mean"], model.noise),
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", ["target", "outputs"])
def test_a_gaussian_posterior_is_found_in_one_step(make, dtype):
    """Mean, covariance and evidence of the linear-Gaussian model, by jit and vmap, far from the mode."""
    tolerance = 2e-3 if dtype == "float32" else 1e-10
    with jax.enable_x64(dtype == "float64"):
        model = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), MODEL)

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, None))
        def point(key, model):
            _, x = model.simulate(key)
            target = model.target(x) if make == "target" else with_outputs(model, x)
            start = jnp.full(10, 3, dtype)
            return infsub.laplace_with_info(target, start), model.exact_gaussian(x), model.log_px(x)

        (q, info), exact, log_px = point(jax.random.split(jax.random.key(7), 5), model)
    assert q.mean.dtype == q.scale.dtype == info.log_px.dtype == dtype
    np.testing.assert_allclose(q.mean, exact.mean, atol=tolerance)
    np.testing.assert_allclose(q.scale, exact.scale, atol=tolerance)
    np.testing.assert_allclose(info.log_px, log_px, rtol=tolerance / 10)
    assert info.num_steps.tolist() == [1] * 5
    assert info.converged.all()


def test_the_cost_is_counted_in_gradients():
    model, x = MODEL, simulate(MODEL)
    _, hessian = infsub.laplace_with_info(model.target(x), jnp.ones(10))
    # two points: a gradient and ten columns each; and seven values, half a gradient each, between
    assert hessian.num_gradients == 2 * (1 + 10) + 7 / 2
    _, gauss_newton = infsub.laplace_with_info(with_outputs(model, x), jnp.ones((3, 10)))
    assert gauss_newton.num_gradients == 3 * (2 * (1 + 10 / 2) + 7 / 2)
    _, warm = infsub.laplace_with_info(model.target(x), jnp.ones(10), num_adam=200)
    assert warm.num_gradients == 200 + (1 + 10)  # which leave Newton no step


def bent(z):
    """A likelihood that is no logarithm of a concave function, with its mode in a curved valley."""
    return -5 * (z[1] - z[0] ** 2) ** 2 - (1 - z[0]) ** 2 + 3 * jnp.cos(2 * z[2])


@pytest.mark.parametrize("full", [True, False])
def test_no_step_is_for_the_worse_and_every_scale_is_a_scale(full):
    starts = 2 * np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    target = Target(None, bent, 3)

    def log_joint(z):
        return densities.standard_normal(z) + bent(z)

    @jax.jit
    @jax.vmap
    def at(z):
        return log_joint(z), jax.hessian(log_joint)(z)

    value, _ = at(starts)
    for num_steps in (1, 2, 5, 30):
        fit = functools.partial(infsub.laplace_with_info, target, num_steps=num_steps, full=full)
        q, info = jax.device_get(jax.vmap(fit)(starts))
        expected, hessians = jax.device_get(at(q.mean))
        np.testing.assert_allclose(info.log_joint, expected, rtol=1e-5)
        assert np.all(info.log_joint >= value)
        assert np.all(info.num_steps <= num_steps)
        diagonal = np.diagonal(q.scale, axis1=1, axis2=2) if full else q.scale
        assert np.all(np.isfinite(q.scale))
        assert np.all(diagonal > 0)  # so the covariance is positive definite
        value = info.log_joint
    assert info.converged.mean() > 0.9
    hessians = hessians[info.converged]
    if full:  # at a mode the covariance is the inverse of the exact curvature
        covariance = (q.scale @ q.scale.mT)[info.converged]
        np.testing.assert_allclose(
            -covariance @ hessians, np.eye(3)[None].repeat(len(hessians), 0), atol=0.02
        )
    else:
        precision = -np.diagonal(hessians, axis1=1, axis2=2)
        np.testing.assert_allclose(q.scale[info.converged] ** -2, precision, rtol=1e-3)


def test_a_worse_point_is_refused():
    """A tip so sharp that the shortest step overshoots it: the start is kept, and said to be it."""
    tip = Target(None, lambda z: -1000 * jnp.sum(jnp.abs(z - 1)), 2)
    start = jnp.array([1.001, 0.999])
    q, info = infsub.laplace_with_info(tip, start)
    np.testing.assert_array_equal(q.mean, start)
    assert info.num_steps == 0
    assert not info.converged


def test_at_a_saddle_the_scale_is_positive_definite_all_the_same():
    """At a saddle the gradient is 0, so it stays; the scale is positive definite all the same."""
    saddle = Target(None, lambda z: 3 * z[0] ** 2 - z[1] ** 2, 2)
    q, info = infsub.laplace_with_info(saddle, jnp.zeros(2))
    assert info.num_steps == 0
    assert np.all(np.isfinite(q.scale))
    assert np.all(np.diag(q.scale) > 0)


def two_modes(z):
    """Weights 0.2 and 0.8 at −3 and 3 of the first coordinate: narrow and wide."""
    left = jnp.log(0.2) + densities.normal(z, jnp.array([-3.0, 0.0]), jnp.array([0.2, 0.2]))
    right = jnp.log(0.8) + densities.normal(z, jnp.array([3.0, 0.0]), jnp.array([0.8, 0.8]))
    return jnp.logaddexp(left, right) - densities.standard_normal(z)  # the joint is the mixture


def test_of_several_starts_the_mode_of_greater_evidence_is_kept():
    target = Target(None, two_modes, 2)
    left, right = np.float32([-2.8, 0.1]), np.float32([2.5, 0.5])
    (q_left, on_left), (q_right, on_right) = (
        infsub.laplace_with_info(target, start) for start in (left, right)
    )
    # the narrow mode is the higher one, and the less probable
    assert on_left.log_joint > on_right.log_joint
    np.testing.assert_allclose(np.exp([on_left.log_px, on_right.log_px]), [0.2, 0.8], rtol=1e-3)
    np.testing.assert_allclose(q_left.scale, 0.2 * np.eye(2), atol=1e-3)
    nowhere = np.array([np.nan, 0])
    for starts in ([left, right, nowhere], [right, left, nowhere], [nowhere, right, left]):
        q, info = infsub.laplace_with_info(target, np.float32(starts))
        np.testing.assert_allclose(q.mean, q_right.mean, atol=1e-5)
        np.testing.assert_allclose(info.log_px, on_right.log_px, rtol=1e-5)


def test_what_is_not_finite_is_refused():
    """NaN beyond a wall that Newton's full step would cross; and NaN everywhere."""

    def walled(z):
        return jnp.where(jnp.sum(z**2) > 4, jnp.nan, 0.0) + 20 * jnp.sum(z) - 0.1 * jnp.sum(z**4)

    q, info = infsub.laplace_with_info(Target(None, walled, 2), jnp.zeros(2))
    assert info.num_steps > 0
    assert 1 < np.sum(q.mean**2) <= 4
    assert not info.converged  # the best point lies at the wall
    lost = Target(None, lambda z: jnp.nan * jnp.sum(z), 2)
    q, info = infsub.laplace_with_info(lost, jnp.ones(2), num_adam=3)
    np.testing.assert_array_equal(q.mean, [1, 1])
    np.testing.assert_array_equal(q.scale, np.eye(2))
    assert not info.converged
    assert np.isnan(info.log_px)


def test_without_a_start_it_climbs_from_0():
    model, x = MODEL, simulate(MODEL)
    q, info = infsub.laplace_with_info(model.target(x))
    np.testing.assert_allclose(q.mean, model.posterior(x)[0], atol=0.05)
    assert info.num_gradients > 200
    same = infsub.laplace(model.target(x), model.best_gaussian(x))
    np.testing.assert_allclose(same.scale, q.scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [[1] * 10, jnp.ones(10, "bfloat16")])
def test_a_start_of_integers_or_few_digits_is_one_of_float32(start):
    target = MODEL.target(simulate(MODEL))
    q, want = (infsub.laplace(target, at) for at in (start, jnp.ones(10)))
    for one, two in zip(q, want, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == np.float32


def test_a_start_of_fewer_digits_than_the_model():
    with jax.enable_x64(True):
        model = jax.tree.map(lambda leaf: leaf.astype("float64"), linear_gaussian(3, 5))
        x = model.simulate(jax.random.key(0))[1]
        wide = model.target(x)
        target = infsub.Target(
            None,
            wide.log_likelihood,
            3,
            outputs=lambda z: z,
            log_likelihood_of_outputs=wide.log_likelihood,
        )
        q = infsub.laplace(target, np.zeros(3, np.float32))
        want = infsub.laplace(wide, np.zeros(3))
    assert q.mean.dtype == "float64"
    np.testing.assert_allclose(q.mean, want.mean, rtol=1e-6)


def test_outputs_of_few_digits_leave_a_curvature_of_float32s():
    """JᵀHJ of bfloat16's would be of no positive P where it exceeds the prior's 1 by a thousand."""
    # The data say nothing about directions that are no coordinates.
    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(10, 10)))
    weights = jax.random.normal(jax.random.key(1), (20_000, 5)) @ turned[:5]
    weights = weights.astype("bfloat16")

    def outputs(z):
        return weights @ z.astype("bfloat16")

    def log_likelihood_of_outputs(logits):
        return infsub.densities.bernoulli_logits(np.ones(20_000), logits.astype("float32"))

    def log_likelihood(z):
        return log_likelihood_of_outputs(outputs(z))

    def plain(z):
        return infsub.densities.bernoulli_logits(np.ones(20_000), weights.astype("float32") @ z)

    target = infsub.Target(
        None,
        log_likelihood,
        10,
        outputs=outputs,
        log_likelihood_of_outputs=log_likelihood_of_outputs,
    )
    start = 0.01 * np.ones(10, np.float32)
    found = infsub.laplace(target, start, num_steps=1)
    want = infsub.laplace(infsub.Target(None, plain, 10), start, num_steps=1)
    volumes = [np.log(np.abs(np.diagonal(q.scale))).sum() for q in (found, want)]
    assert abs(volumes[0] - volumes[1]) < 0.5


def test_a_prior_of_ones_own():
    """z ~ N(1, 0.5²) and x|z ~ N(z, 1): the posterior has precision 5."""
    x = jnp.array([0.3, 2.0])
    target = Target(
        Partial(densities.normal, mean=jnp.ones(2), scale=jnp.full(2, 0.5)),
        Partial(densities.normal, x, scale=jnp.ones(2)),
        2,
        outputs=lambda z: z,
        log_likelihood_of_outputs=Partial(densities.normal, x, scale=jnp.ones(2)),
    )
    q, info = infsub.laplace_with_info(target, jnp.zeros(2))
    np.testing.assert_allclose(q.mean, (4 + x) / 5, rtol=1e-4)
    np.testing.assert_allclose(q.scale, np.eye(2) / np.sqrt(5), atol=1e-5)
    truth = densities.normal(x, jnp.ones(2), jnp.sqrt(jnp.full(2, 1.25)))
    np.testing.assert_allclose(info.log_px, truth, rtol=1e-4)


def test_a_thousand_dimensions():
    """A diagonal scale by default: the closest to the posterior, and memory that grows with D."""
    model = linear_gaussian(1000, 300)
    x = simulate(model)
    q, info = infsub.laplace_with_info(model.target(x))
    assert q.scale.shape == (1000,)
    assert info.converged

    @jax.jit
    def exact(model, x, q):
        best = model.best_gaussian(x)
        return best.scale, model.kl(x, q) - model.kl(x, best), model.log_px(x)

    scale, divergence, log_px = exact(model, x, q)
    np.testing.assert_allclose(q.scale, scale, rtol=1e-3)
    assert divergence < 0.05
    assert info.log_px < log_px  # ½ Σ log of the diagonal overstates ½ log det P


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (
            jnp.zeros(2),
            r"start must be z \[D=3\], a Gaussian, or several z \[S, D=3\]; got shape \(2,\)",
        ),
        (jnp.zeros((0, 3)), r"got shape \(0, 3\)"),
        (Gaussian(jnp.zeros(4), jnp.ones(4)), r"got shape \(4,\)"),
    ],
)
def test_bad_arguments_are_named(start, message):
    target = Target(None, lambda z: jnp.sum(z), 3)
    with pytest.raises(ValueError, match=message):
        infsub.laplace(target, start)
    with pytest.raises(ValueError, match="num_steps must be a positive integer; got 0"):
        infsub.laplace(target, num_steps=0)
    with pytest.raises(TypeError, match="log_likelihood must return a scalar"):
        infsub.laplace(Target(None, lambda z: z, 3))
    with pytest.raises(ValueError, match="outputs and log_likelihood_of_outputs go together"):
        Target(None, lambda z: jnp.sum(z), 3, outputs=lambda z: z)
