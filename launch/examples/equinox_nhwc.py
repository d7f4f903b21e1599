"""A convolutional VAE in Equinox on digits, images and features in NHWC.

About two minutes on two cores. Equinox's own Conv2d takes [C, H, W]: inside the loops of AIS and of
local optimisation XLA runs that layout up to 30 times slower on a CPU (jax-ml/jax#12868), so the
convolutions here are [H, W, C] modules of five lines.
"""

# %% The model, trained as anybody would
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import infsub
from infsub import data

D, STEPS, BATCH, POINTS = 8, 400, 50, 20


class Conv(eqx.Module):
    """[H, W, C] -> [H/2, W/2, C'], or [2H, 2W, C'] transposed."""

    kernel: jax.Array
    bias: jax.Array
    transposed: bool = eqx.field(static=True)

    def __init__(self, channels, features, key, transposed=False):
        self.kernel = jax.random.normal(key, (4, 4, channels, features)) / jnp.sqrt(8 * channels)
        self.bias, self.transposed = jnp.zeros(features), transposed

    def __call__(self, x):
        convolve = jax.lax.conv_transpose if self.transposed else jax.lax.conv_general_dilated
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        return convolve(x[None], self.kernel, (2, 2), "SAME", **options)[0] + self.bias


class VAE(eqx.Module):
    down: list
    features: eqx.nn.Linear
    flat: eqx.nn.Linear
    up: list

    def __init__(self, key):
        keys = jax.random.split(key, 6)
        self.down = [Conv(1, 8, keys[0]), Conv(8, 16, keys[1])]
        self.features = eqx.nn.Linear(7 * 7 * 16, 2 * D, key=keys[2])
        self.flat = eqx.nn.Linear(D, 7 * 7 * 16, key=keys[3])
        self.up = [Conv(16, 8, keys[4], transposed=True), Conv(8, 1, keys[5], transposed=True)]

    def encode(self, x):
        h = x - 0.5
        for layer in self.down:
            h = jax.nn.elu(layer(h))
        mean, log_scale = jnp.split(self.features(h.ravel()), 2)
        return mean, jnp.exp(log_scale)

    def decode(self, z):
        h = jax.nn.elu(self.flat(z)).reshape(7, 7, 16)
        return self.up[1](jax.nn.elu(self.up[0](h)))  # logits


digits = data.load("mnist5k").train
xs = np.asarray(data.batch(digits.images, jnp.arange(digits.size)))


def loss(vae, key, xs):  # −ELBO of a batch
    mean, scale = jax.vmap(vae.encode)(xs)
    logits = jax.vmap(vae.decode)(mean + scale * jax.random.normal(key, mean.shape))
    kl = 0.5 * jnp.sum(mean**2 + scale**2 - 1 - 2 * jnp.log(scale))
    return (kl - jnp.sum(xs * logits - jax.nn.softplus(logits))) / len(xs)


optimizer = optax.adam(2e-3)


@eqx.filter_jit
def train_step(vae, state, key, xs):
    updates, state = optimizer.update(eqx.filter_grad(loss)(vae, key, xs), state)
    return eqx.apply_updates(vae, updates), state


vae = VAE(jax.random.key(0))
state = optimizer.init(eqx.filter(vae, eqx.is_array))
for number, step_key in enumerate(jax.random.split(jax.random.key(1), STEPS)):
    start = number * BATCH % len(xs)
    vae, state = train_step(vae, state, step_key, xs[start : start + BATCH])


# %% From the trained model to a table
def encode(vae, x):
    return infsub.Gaussian(*vae.encode(x))


def log_likelihood_of_outputs(vae, x, logits):
    return infsub.densities.bernoulli_logits(x, logits)


def log_likelihood(vae, x, z):
    return log_likelihood_of_outputs(vae, x, vae.decode(z))


def sample_x(key, vae, z, x):
    return jax.random.bernoulli(key, jax.nn.sigmoid(vae.decode(z))) * 1.0


model = infsub.Model(
    *(D, encode, log_likelihood, sample_x),
    outputs=lambda vae, x, z: vae.decode(z),
    log_likelihood_of_outputs=log_likelihood_of_outputs,
)
measured = infsub.measure(jax.random.key(0), model, vae, xs[:POINTS], num_certified=5)
print(measured)
