"""Keys: streams that never meet, and no draw that uses another's key.

jax_debug_key_reuse follows every key through a program's trace, so the programs below are traced, not
run. It cannot stay on for all tests: it also remembers the keys that a process has used, and most of
them use one constant key for several draws, or compare two draws from the same. Common noise that is
meant to be common takes its key through `jax.random.clone`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import tiny

import infsub
from infsub import data, posteriors, subjects, train_step
from infsub.keys import Stream, named, stream
from infsub.measure import Settings
from infsub.types import Gaussian
from infsub.vae import Terms, make_vae

ROOT = jax.random.key(0)
MODEL = models.linear_gaussian(3, 4)
TARGET, Q = MODEL.target(jnp.arange(4.0)), Gaussian(jnp.zeros(3), jnp.ones(3))


def test_the_streams_of_a_seed_never_meet():
    keys = [stream(ROOT, number) for number in Stream]
    keys += [named(key, name) for key in keys for name in ("pixels", "elbo", "local")]
    keys += [jax.random.fold_in(stream(ROOT, number), i) for number in Stream for i in range(100)]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys)


def test_training_keeps_its_numbers():
    """Weights depend on them: with other numbers a run could not be made again."""
    names = ["SHUFFLE", "BATCH", "NOISE", "INIT", "VALIDATION", "PICTURES"]
    assert [Stream[name] for name in names] == list(range(6))
    expected = jax.random.fold_in(jax.random.key(0), 2)
    assert stream(ROOT, Stream.NOISE) == expected


def test_rows_keep_their_numbers():
    """Published ones are measured again by them, to the digit."""
    assert [Stream.ROWS, Stream.CERTIFICATE, Stream.IMAGES] == [6, 7, 8]
    assert named(ROOT, "elbo") == jax.random.fold_in(ROOT, 3870793605)


def draws_twice(function, *args):
    """Whether the function uses a key for two draws, found in its trace."""
    with jax.debug_key_reuse(True):
        try:
            jax.eval_shape(function, *args)
        except jax.errors.KeyReuseError:
            return True
    return False


def test_a_key_used_twice_is_found():
    assert draws_twice(lambda key: jax.random.normal(key) + jax.random.uniform(key), ROOT)
    assert not draws_twice(
        lambda key: jax.random.normal(key) + jax.random.uniform(named(key, "b")), ROOT
    )


def estimators():
    gaussian = posteriors.gaussian(3)
    yield "elbo", lambda key: infsub.elbo(key, TARGET, Q)
    yield "iwae", lambda key: infsub.iwae(key, TARGET, Q)
    for adaptation in ("pilot", "authors"):
        yield (
            f"ais-{adaptation}",
            lambda key, a=adaptation: infsub.ais(key, TARGET, Q, adaptation=a),
        )
    yield "reverse_ais", lambda key: infsub.reverse_ais(key, TARGET, Q.mean, Q)
    for rule in ("fast", "authors"):
        yield (
            f"local-{rule}",
            lambda key, r=rule: infsub.optimize_local(key, TARGET, gaussian, rule=r),
        )
    yield (
        "curve",
        lambda key: infsub.local_curve(key, TARGET, gaussian, gaussian.init(key), (0, 1)),
    )
    for name in posteriors.FAMILIES:
        family = posteriors.make(name, 3, target=TARGET)
        yield f"{name}-init", family.init
        params = jax.eval_shape(family.init, ROOT)
        yield f"{name}-sample", lambda key, f=family, p=params: jax.eval_shape(f.sample, key, p)


@pytest.mark.parametrize("estimator", [pytest.param(f, id=name) for name, f in estimators()])
def test_no_estimator_draws_twice_from_a_key(estimator):
    assert not draws_twice(estimator, ROOT)


@pytest.fixture(scope="module", params=["data", "model"])
def training(request):
    """(task, images of dynamic pixels, keys, those of validation and pictures, fresh variables)."""
    config = tiny.get_config()
    config.train.on = request.param
    config.train.freeze = "decoder" if request.param == "model" else "none"
    dataset = data.load("mnist5k", "", "dynamic", 2)
    vae = make_vae(config.model, dataset.image_shape, dataset.levels)
    task = train_step.make_task(vae, config.train, dataset.train.size)
    shapes = jax.eval_shape(lambda seeds: train_step.initial(task, seeds), np.arange(2))
    return task, dataset.train.images, *shapes


def test_no_part_of_training_draws_twice_from_a_key(training):
    task, images, keys, (keys_validation, keys_pictures), variables = training
    initial, states = train_step.initial, train_step.init_states
    assert not draws_twice(lambda seeds: initial(task, seeds), np.arange(2))
    assert not draws_twice(
        lambda keys, v: train_step.train_chunk(task, keys, states(task, v), images, 0, 3),
        keys,
        variables,
    )
    assert not draws_twice(
        lambda keys, v: train_step.validate(task.vae, 2, v, images, keys),
        keys_validation,
        variables,
    )
    assert not draws_twice(
        lambda keys, v: train_step.pictures(task.vae, v, images, keys), keys_pictures, variables
    )


def test_pixels_are_not_drawn_with_the_noise_of_z():
    """Of a grey image half the pixels are as the other noise would have them; all, if it is the same.

    fold_in(key, i) and split(key, n)[i] are the same key, which no trace tells.
    """
    grey = np.full((10, 16, 16, 1), 128, np.uint8)
    images = data.Images(jnp.asarray(grey), "dynamic", (16, 16, 1))

    def drawn(key):
        return jax.random.bernoulli(key, jnp.full((16, 16, 1), 128 / 255)).astype(jnp.float32)

    def terms(key, variables, x, num_samples):
        same = jnp.mean(drawn(key) == x)[None]
        return Terms(same, same, same), {}

    vae = make_vae(tiny.get_config().model, (16, 16, 1), 2)
    vae = vae._replace(
        terms=terms,
        sampler=lambda variables, x: lambda key: (drawn(key), None),
        mean_x=lambda variables, z: z if z.ndim == 3 else jnp.zeros((16, 16, 1)),
    )
    shapes = jax.eval_shape(vae.init, ROOT)  # of one model; nobody reads the values
    variables = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape), leaf.dtype), shapes)
    same = train_step.validate(vae, 1, variables, images, ROOT[None])["log_likelihood"]
    pixels, reconstructed = train_step.pictures(vae, variables, images, ROOT[None])[0][0]
    assert same == pytest.approx(0.5, abs=0.05)
    assert np.mean(pixels == reconstructed) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("start", ["posterior", "local", "prior"])
@pytest.mark.parametrize(
    "function",
    [subjects.row, subjects.certificate, subjects.pictures],
    ids=lambda function: function.__name__,
)
def test_no_row_draws_twice_from_a_key(function, start):
    config = tiny.get_config()
    vae = make_vae(config.model, (28, 28, 1), 2)
    families = ("gaussian", "auxiliary")
    settings = Settings(families=families, curve=(0, 1), ais_start=start, grid=20)
    variables, x = jax.eval_shape(vae.init, ROOT), jnp.zeros((28, 28, 1))
    subject = subjects.of_vae(vae, "gaussian")

    def row(key, variables):
        return function(key, x, variables, subject, settings=settings)

    assert not draws_twice(row, ROOT, variables)
