"""A model of a user's own, as `--config.model.import=own_model:build` finds it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from models import linear_gaussian, own_model

import infsub

KNOWN = linear_gaussian(latent_dim=2, data_dim=4)
MODEL = own_model(KNOWN)


def data():
    return np.asarray(jax.vmap(KNOWN.simulate)(jax.random.split(jax.random.key(7), 9))[1])


@functools.cache
def scaled(factor):
    def encode(params, x):
        q = MODEL.encode(params, x)
        return q._replace(mean=factor * q.mean)

    return MODEL._replace(encode=encode)


def build(checkpoint=""):
    """With data of its own, of two classes; a checkpoint is a factor on the encoder's mean."""
    return scaled(float(checkpoint or 1)), KNOWN, data(), np.arange(9) % 2


FIRST_FOUR = MODEL._replace(encode=lambda params, x: MODEL.encode(params, x.ravel()[:4]))


def features():
    """Each of 64 values, in 0 … 1 but for one datapoint's; of two there is no label, of one class one."""
    xs = np.linspace(0, 1, 40 * 64, dtype=np.float32).reshape(40, 64)
    xs[25, 0] = 1.02
    labels = np.array([b"a", b"b", None, np.nan, *[b"c"] * 36], object)
    return FIRST_FOUR, KNOWN, xs, labels


def bright():
    """Images of which one is ten times as bright."""
    xs = np.random.default_rng(0).normal(size=(40, 8, 8)).astype(np.float32)
    xs[30] *= 10
    return FIRST_FOUR, KNOWN, xs


def of_images():
    """For the config's data: binary images, each pixel with the same logit whatever z."""

    def encode(params, x):
        return infsub.Gaussian(jnp.mean(x) * jnp.ones(2), params)

    def log_likelihood(params, x, z):
        return infsub.densities.bernoulli_logits(x, jnp.full(x.shape, z[0] - 2))

    return infsub.Model(2, encode, log_likelihood), 0.1 * jnp.ones(2)


def correlated():
    """q is the posterior itself, whose covariance is not diagonal."""
    return MODEL._replace(encode=lambda params, x: KNOWN.exact_gaussian(x)), KNOWN, data()


def drawn():
    """Of q there are draws and their density, and no more is known of it."""

    def encode(params, x):
        q = MODEL.encode(params, x)

        def sampler(key):
            z = q.mean + q.scale * jax.random.normal(key, q.mean.shape)
            return z, infsub.densities.normal(z, *q)

        return sampler

    return MODEL._replace(encode=encode), KNOWN, 1 + data()


def of_another_width():
    """Its data have more values than its weights."""
    return MODEL, KNOWN, np.ones((5, 7), np.float32)


def closed():
    """Its weights are in its functions alone."""
    return MODEL, None, data()


def nothing():
    return 3


def torn():
    return MODEL, KNOWN, data(), [1, 2]
