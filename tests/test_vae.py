from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from infsub import bounds, config, data
from infsub.laplace import laplace_with_info
from infsub.posteriors import FAMILIES
from infsub.vae import make_vae

KEY = jax.random.key(0)
SHAPE = (4, 3, 1)
CONV_SHAPE = (10, 10, 1)  # the smallest for two convolutions


def model(posterior="gaussian", latent_dim=3, **options):
    made = config.default().model.unlock()
    made.latent_dim = latent_dim
    made.encoder.hidden = made.decoder.hidden = (8,)
    made.posterior = config.posterior(posterior, **options)
    return made


def conv_model():
    conv = model()
    conv.encoder.kind = conv.decoder.kind = "conv"
    conv.encoder.hidden, conv.decoder.hidden = (3, 4), (4, 3)
    return conv


def small(posterior):
    """A VAE of this family with networks as small as they can be."""
    sizes = {"num_steps": 1, "hidden": (4,), "auxiliary_hidden": (4,), "num_reflections": 2}
    options = {n: sizes[n] for n in FAMILIES[posterior].defaults if n in sizes}
    return make_vae(model(posterior, **options), SHAPE, 2)


def somewhere(vae):
    """Variables away from the start, where flows are the identity and some gradients vanish."""
    rng = np.random.default_rng(0)

    def number(path, leaf):
        value = 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
        return np.exp(value) if "'var'" in jax.tree_util.keystr(path) else value

    return jax.tree_util.tree_map_with_path(number, jax.eval_shape(vae.init, KEY))


def images(seed, num, shape=SHAPE, levels=2):
    return np.random.default_rng(seed).integers(0, levels, (num, *shape)).astype(np.float32)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_amortised(name):
    vae = small(name)
    variables = somewhere(vae)

    def objective(variables, x):
        terms, _ = vae.terms(KEY, variables, x, 7)
        log_weights = terms.log_likelihood + terms.log_prior - terms.log_q
        return jnp.mean(log_weights), log_weights

    @jax.jit
    @jax.vmap
    def all_at(x):
        # `terms` draws as `elbo` does: the training objective is the estimator's bound.
        estimate = bounds.elbo(KEY, vae.target(variables, x), vae.sampler(variables, x), 7)
        encoded = vae.encode(variables, x)["encoded"]
        return jax.grad(objective, has_aux=True)(variables, x), estimate.log_weights, encoded

    (gradients, log_weights), expected, encoded = all_at(images(0, 20))
    assert log_weights.shape == (20, 7)
    np.testing.assert_allclose(log_weights, expected, rtol=2e-5)
    # Every trained number, the posterior's shared ones too, has a gradient at some x.
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if g.size and not np.any(g)
    ]
    assert not dead
    # All that the encoder gives, a flow's context too, follows x.
    assert all(np.all(np.ptp(leaf, axis=0) > 0) for leaf in jax.tree.leaves(encoded))


@pytest.mark.parametrize("name", ["planar", "hamiltonian"])
def test_another_datapoint_compiles_nothing_and_has_its_own_target(name):
    vae = small(name)
    variables = somewhere(vae)
    traces = []

    @jax.jit
    def draw(sampler):
        traces.append(1)
        return sampler(KEY)

    xs = images(0, 2)
    found = [draw(vae.sampler(variables, x)) for x in xs]
    assert len(traces) == 1
    params = vae.encode(variables, xs[0])
    sample = jax.jit(lambda x: vae.posterior(variables, x).sample(KEY, params))
    own, other = map(sample, xs)
    np.testing.assert_allclose(found[0][0], own[0], rtol=1e-4)
    np.testing.assert_allclose(found[0][1], own[1], rtol=1e-4)
    # The test tells the targets apart: a Hamiltonian q of the same params follows that of its x.
    assert np.allclose(own[0], other[0], rtol=1e-3) == (name == "planar")


def test_simulate_draws_z_of_the_prior_and_x_given_it():
    vae, num = make_vae(model(), SHAPE, 2), 4000
    variables = somewhere(vae)

    @jax.jit
    @jax.vmap
    def draw(key):
        z, x = vae.simulate(key, variables)
        return z, x, vae.mean_x(variables, z)

    z, x, mean = jax.device_get(draw(jax.random.split(KEY, num)))
    assert np.all(np.abs(np.mean(z, axis=0)) < 4 / np.sqrt(num))
    assert np.all(np.abs(np.mean(z**2, axis=0) - 1) < 4 * np.sqrt(2 / num))
    assert set(np.unique(x)) == {0, 1}
    assert np.mean(np.std(mean, axis=0)) > 0.05, "the test needs pixels that depend on z"
    noise, variance = x - mean, mean * (1 - mean)
    assert np.all(np.abs(np.mean(noise, axis=0)) < 4 * np.sqrt(np.mean(variance, axis=0) / num))
    products = noise[..., None] * z[:, None, None, None]  # the noise is not that of z
    errors = np.std(products, axis=0) / np.sqrt(num)
    assert np.all(np.abs(np.mean(products, axis=0)) < 4.5 * errors)


@pytest.mark.parametrize(("shape", "levels"), [((2, 3, 1), 2), ((1, 2, 1), 4), ((1, 1, 3), 3)])
def test_likelihood_sums_to_one_over_all_images(shape, levels):
    vae = make_vae(model(), shape, levels)
    variables = somewhere(vae)
    every = list(itertools.product(range(levels), repeat=math.prod(shape)))
    z = np.float32([0.3, -2.0, 1.0])

    @jax.jit
    def all_of(every, keys):
        log_px = jax.vmap(lambda x: vae.log_likelihood(variables, x, z))(every)
        draws = jax.vmap(lambda key: vae.sample_x(key, variables, z))(keys)
        return log_px, draws, vae.mean_x(variables, z)

    every = np.asarray(every, np.float32)
    found = all_of(every.reshape(-1, *shape), jax.random.split(KEY, 4000))
    log_px, draws, mean = jax.device_get(found)
    assert np.logaddexp.reduce(log_px) == pytest.approx(0, abs=1e-5)

    probability = np.exp(log_px)
    expected, square = probability @ every, probability @ every**2
    error = np.sqrt((square - expected**2) / 4000)
    drawn = draws.reshape(4000, -1)
    assert np.all(np.abs(drawn.mean(axis=0) - expected) < 4 * error + 1e-6)
    assert set(np.unique(drawn)) <= set(range(levels))
    assert mean.shape == shape
    if levels == 2:
        np.testing.assert_allclose(mean.ravel(), expected, rtol=1e-4)
    else:
        assert np.all((mean >= 0) & (mean <= 1))


@functools.cache
def train_mode(vae, training):
    @jax.jit
    def apply(variables, x):
        return jax.vmap(
            lambda x: vae.terms(KEY, variables, x, 2, training),
            axis_name="batch",
            out_axes=(0, None),
        )(x)

    return apply


def test_batch_norm_is_the_batch_s_in_training_and_the_running_one_in_evaluation():
    vae = make_vae(conv_model(), CONV_SHAPE, 2)
    variables = jax.jit(vae.init)(KEY)
    x = images(0, 6, CONV_SHAPE)
    alone = np.concatenate([x[:1], np.zeros_like(x[1:])])

    both, statistics = train_mode(vae, ("encoder", "decoder"))(variables, x)
    other, _ = train_mode(vae, ("encoder", "decoder"))(variables, alone)
    assert both.log_q[0, 0] != other.log_q[0, 0]  # the first datapoint's, in other company
    for part in ("encoder", "decoder"):
        before, _ = ravel_pytree(variables[part]["batch_stats"])
        after, _ = ravel_pytree(statistics[part]["batch_stats"])
        assert before.shape == after.shape
        assert np.all(before != after)

    _, statistics = train_mode(vae, ("encoder",))(variables, x)
    jax.tree.map(
        np.testing.assert_array_equal,
        variables["decoder"]["batch_stats"],
        statistics["decoder"]["batch_stats"],
    )

    in_company, _ = train_mode(vae, ())(variables, x)
    lonely, _ = train_mode(vae, ())(variables, alone)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), in_company, lonely)


def test_equal_configs_give_the_same_object():
    # The same static argument: a second evaluation compiles nothing.
    vae = make_vae(model("planar"), SHAPE, 2)
    again = config.default()
    again.model = model("planar")
    saved = config.from_json(config.to_json(again))
    assert make_vae(saved.model, SHAPE, 2) is vae
    assert make_vae(model("planar", latent_dim=4), SHAPE, 2) is not vae


def test_options_that_are_not_given_are_the_amortised_family_s():
    given = model()
    given.posterior = {"name": "rnvp"}
    vae = make_vae(given, SHAPE, 2)
    params = jax.eval_shape(vae.encode, jax.eval_shape(vae.init, KEY), images(0, 1)[0])
    assert params["encoded"]["context"].shape == (50,)


def test_grey_levels_reach_the_encoder_between_zero_and_one():
    # Three levels 0, 1, 2 look to the encoder as 0, ½, 1.
    vae, binary = make_vae(model(), SHAPE, 3), make_vae(model(), SHAPE, 2)
    variables = jax.jit(vae.init)(KEY)
    x = images(0, 1)[0]
    ours = vae.encode(variables, 2 * x)["encoded"]["mean"]
    np.testing.assert_array_equal(ours, binary.encode(variables, x)["encoded"]["mean"])


def test_a_model_that_cannot_be_built_says_why():
    bad = model()
    bad.encoder.activation = "swish"
    with pytest.raises(ValueError, match="activation must be one of elu"):
        make_vae(bad, SHAPE, 2)
    unknown = model()
    unknown.posterior = {"name": "flow"}
    with pytest.raises(ValueError, match="unknown posterior 'flow'"):
        make_vae(unknown, SHAPE, 2)
    with pytest.raises(TypeError, match="num_stpes"):
        make_vae(model("planar", num_stpes=2), SHAPE, 2)


def test_embedded_digits_fit():
    digits = data.load("mnist5k")
    vae = make_vae(config.default().model, digits.image_shape, digits.levels)
    variables = jax.eval_shape(vae.init, KEY)
    x = jax.eval_shape(functools.partial(data.batch, digits.train.images), jnp.arange(1))
    params = jax.eval_shape(vae.encode, variables, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    assert params["encoded"]["mean"].shape == (50,)


@pytest.mark.parametrize(
    ("make", "shape", "levels"), [(model, SHAPE, 2), (conv_model, CONV_SHAPE, 8)]
)
def test_the_target_says_what_its_likelihood_depends_on_z_by(make, shape, levels):
    """So Laplace's curvature is Gauss-Newton's, of the pixels' own parameters."""
    vae = make_vae(make(), shape, levels)
    variables, (x,) = somewhere(vae), images(0, 1, shape, levels)

    @jax.jit
    def values(x, z):
        target = vae.target(variables, x)
        q, info = laplace_with_info(target, jnp.zeros(3))

        def pixels(z):
            return target.outputs(z).reshape(-1)

        def log_px_given(pixels):
            return target.log_likelihood_of_outputs(pixels.reshape(*shape, -1))

        jacobian = jax.jacobian(pixels)(q.mean)
        hessian = jax.hessian(log_px_given)(pixels(q.mean))
        precision = jnp.eye(3) - jacobian.T @ hessian @ jacobian
        both = target.log_likelihood_of_outputs(target.outputs(z)), target.log_likelihood(z)
        return both, info.converged, q.scale @ q.scale.T @ precision

    (by_outputs, log_likelihood), converged, identity = values(x, np.float32([0.3, -1, 0.5]))
    np.testing.assert_allclose(by_outputs, log_likelihood, rtol=1e-6)
    assert converged
    np.testing.assert_allclose(identity, np.eye(3), atol=1e-3)
