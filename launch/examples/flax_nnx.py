"""A VAE in Flax NNX on digits: the module itself is the params.

About a minute on two cores.
"""

# %% The model, trained as anybody would
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import infsub
from infsub import data

D, STEPS, BATCH, POINTS = 8, 1200, 100, 30


class VAE(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Sequential(
            nnx.Linear(784, 128, rngs=rngs), nnx.tanh, nnx.Linear(128, 2 * D, rngs=rngs)
        )
        self.decoder = nnx.Sequential(
            nnx.Linear(D, 128, rngs=rngs), nnx.tanh, nnx.Linear(128, 784, rngs=rngs)
        )

    def encode(self, x):
        mean, log_scale = jnp.split(self.encoder(x.ravel() - 0.5), 2)
        return mean, jnp.exp(log_scale)

    def decode(self, z):
        return self.decoder(z).reshape(28, 28)  # logits


digits = data.load("mnist5k").train
xs = np.asarray(data.batch(digits.images, jnp.arange(digits.size)))[..., 0]
vae = VAE(nnx.Rngs(0))
optimizer = nnx.Optimizer(vae, optax.adam(2e-3), wrt=nnx.Param)


def loss(vae, key, xs):  # −ELBO of a batch
    mean, scale = jax.vmap(vae.encode)(xs)
    logits = jax.vmap(vae.decode)(mean + scale * jax.random.normal(key, mean.shape))
    kl = 0.5 * jnp.sum(mean**2 + scale**2 - 1 - 2 * jnp.log(scale))
    return (kl - jnp.sum(xs * logits - jax.nn.softplus(logits))) / len(xs)


@nnx.jit
def train_step(vae, optimizer, key, xs):
    optimizer.update(vae, nnx.grad(loss)(vae, key, xs))


for number, step_key in enumerate(jax.random.split(jax.random.key(1), STEPS)):
    start = number * BATCH % len(xs)
    train_step(vae, optimizer, step_key, xs[start : start + BATCH])


# %% From the trained model to a table
def encode(vae, x):
    return infsub.Gaussian(*vae.encode(x))


def log_likelihood(vae, x, z):
    return infsub.densities.bernoulli_logits(x, vae.decode(z))


def sample_x(key, vae, z, x):
    return jax.random.bernoulli(key, jax.nn.sigmoid(vae.decode(z))) * 1.0


model = infsub.Model(D, encode, log_likelihood, sample_x)
measured = infsub.measure(jax.random.key(0), model, vae, xs[:POINTS], num_certified=5)
print(measured)
