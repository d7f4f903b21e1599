"""Every estimator is lowered for a GPU on a machine without one: nothing that only a CPU does creeps in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import infsub
from infsub import config, data, datapoints, densities, posteriors, train_step
from infsub.vae import make_vae

D = 2
KEY, X = jax.random.key(0), jnp.ones(5)


def lowered(function, *arguments):
    """The program for CUDA, which needs no such device: jax refuses what has no rule there."""
    return jax.export.export(function, platforms=["cuda"])(*arguments)


def assert_is_for_a_gpu(program, result):
    """It is for CUDA alone, and returns what the function does: the same shapes and types."""
    assert program.platforms == ("cuda",)
    wanted = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(result)]
    assert [(leaf.shape, leaf.dtype) for leaf in program.out_avals] == wanted


def target(x):
    return infsub.Target(None, lambda z: densities.bernoulli_logits(x, jnp.sum(z) * x), D)


def q(x):
    return infsub.Gaussian(x[:D], jnp.ones(D))


def correlated(x):
    return infsub.Gaussian(x[:D], jnp.eye(D))


ESTIMATORS = {
    "elbo": lambda key, x: infsub.elbo(key, target(x), q(x)),
    "iwae": lambda key, x: infsub.iwae(key, target(x), correlated(x)),
    "ais": lambda key, x: infsub.ais(key, target(x)),
    "ais, adaptive": lambda key, x: infsub.ais(key, target(x), correlated(x), schedule="adaptive"),
    "ais, authors": lambda key, x: infsub.ais(key, target(x), q(x), adaptation="authors"),
    "reverse_ais": lambda key, x: infsub.reverse_ais(key, target(x), x[:D], q(x)),
    "bdmc": lambda key, x: infsub.bdmc(key, lambda key: (x[:D], target(x), q(x))),
    "laplace": lambda key, x: infsub.laplace(target(x)),
    "local_curve": lambda key, x: infsub.local_curve(
        key, target(x), posteriors.gaussian(D), posteriors.gaussian(D).init(key), (0, 3)
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_lowered_for_a_gpu(name):
    estimator = jax.jit(ESTIMATORS[name])
    assert_is_for_a_gpu(lowered(estimator, KEY, X), estimator.eval_shape(KEY, X))


@pytest.mark.parametrize("family", posteriors.FAMILIES)
def test_local_inference_is_lowered_for_a_gpu(family):
    @jax.jit
    def found(key, x):
        posterior = posteriors.make(family, D, target=target(x))
        return infsub.optimize_local(key, target(x), posterior, start=infsub.laplace(target(x)))

    assert_is_for_a_gpu(lowered(found, KEY, X), found.eval_shape(KEY, X))


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_training_is_lowered_for_a_gpu(kind):
    settings = tiny.get_config()
    settings.model.encoder.kind = settings.model.decoder.kind = kind
    settings = config.resolve(settings)
    vae = make_vae(settings.model, (28, 28, 1), 2)
    train = data.load("mnist5k").train
    task = train_step.make_task(vae, settings.train, train.size)
    keys, _, variables = train_step.initial(task, np.array([0]))
    states, images = train_step.init_states(task, variables), train_step.unpacked(train.images)
    arguments = task, keys, states, images, 0, 2
    result = train_step.train_chunk.eval_shape(*arguments)
    assert_is_for_a_gpu(lowered(train_step.train_chunk, *arguments), result)


def test_what_a_gpu_cannot_do_is_seen():
    with pytest.raises(NotImplementedError):
        lowered(jax.jit(jax.lax.linalg.schur), jnp.eye(2))
    with pytest.raises(ValueError, match="platform"):  # a round trip to the host
        lowered(jax.jit(lambda x: jax.pure_callback(np.sin, x, x)), X)


@pytest.mark.parametrize(("backend", "level"), [("cpu", 1), ("gpu", None)])
def test_options_for_a_cpu_are_for_a_cpu(backend, level, monkeypatch):
    options = []

    def jit(function, **arguments):
        options.append(arguments["compiler_options"])
        return lambda code, key, indices, xs, arrays: indices

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "jit", jit)
    monkeypatch.setattr(datapoints, "_compiled", datapoints._compiled.__wrapped__)
    jax.config.update("jax_disable_most_optimizations", False)
    infsub.map_datapoints(lambda key, x: x, KEY, np.zeros(3))
    (found,) = options
    assert (found or {}).get("xla_backend_optimization_level") == level
