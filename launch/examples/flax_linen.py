"""A VAE in Flax linen on digits: measured where its inference loses its nats.

About a minute on two cores. Expect an amortization gap of several nats: 30 epochs on 4,000 digits.
"""

# %% The model, trained as anybody would
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import infsub
from infsub import data

D, STEPS, BATCH, POINTS = 8, 1200, 100, 30


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.tanh(nn.Dense(128)(x.ravel() - 0.5))
        return nn.Dense(D)(h), nn.Dense(D)(h)  # mean, log of the standard deviation


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(784)(nn.tanh(nn.Dense(128)(z))).reshape(28, 28)  # logits


encoder, decoder = Encoder(), Decoder()
digits = data.load("mnist5k").train
xs = np.asarray(data.batch(digits.images, jnp.arange(digits.size)))[..., 0]
key = jax.random.key(0)
params = {"encoder": encoder.init(key, xs[0]), "decoder": decoder.init(key, jnp.zeros(D))}


def loss(params, key, x):  # −ELBO of one x
    mean, log_scale = encoder.apply(params["encoder"], x)
    z = mean + jnp.exp(log_scale) * jax.random.normal(key, (D,))
    logits = decoder.apply(params["decoder"], z)
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(2 * log_scale) - 1 - 2 * log_scale)
    return kl - jnp.sum(x * logits - jax.nn.softplus(logits))


@jax.jit
def train(params, xs):
    optimizer = optax.adam(2e-3)

    def step(carry, key):
        params, state = carry
        batch = xs[jax.random.choice(key, len(xs), (BATCH,))]
        keys = jax.random.split(key, BATCH)
        grads = jax.grad(lambda p: jax.vmap(loss, (None, 0, 0))(p, keys, batch).mean())(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


params = train(params, xs)


# %% From the trained model to a table
def encode(params, x):
    mean, log_scale = encoder.apply(params["encoder"], x)
    return infsub.Gaussian(mean, jnp.exp(log_scale))


def log_likelihood(params, x, z):
    return infsub.densities.bernoulli_logits(x, decoder.apply(params["decoder"], z))


def sample_x(key, params, z, x):
    return jax.random.bernoulli(key, jax.nn.sigmoid(decoder.apply(params["decoder"], z))) * 1.0


model = infsub.Model(D, encode, log_likelihood, sample_x)
measured = infsub.measure(key, model, params, xs[:POINTS], num_certified=5)
print(measured)
