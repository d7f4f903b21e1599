"""A conditional VAE on digits: the prior p(z|c) depends on the digit's class c.

About a minute on two cores. x is a pair, (image [28, 28], class as one-hot [10]); the prior has a mean
and a scale for each class, so log_prior and sample_prior are given.
"""

# %% The model, trained as anybody would
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.scipy.stats import norm

import infsub
from infsub import data

D, STEPS, BATCH, POINTS = 6, 1200, 100, 30


class CVAE(nn.Module):
    def setup(self):
        self.encoder = nn.Sequential([nn.Dense(128), nn.tanh, nn.Dense(2 * D)])
        self.decoder = nn.Sequential([nn.Dense(128), nn.tanh, nn.Dense(784)])
        self.prior = nn.Dense(2 * D)

    def __call__(self, x):
        return self.encode(x), self.decode(jnp.zeros(D), x[1]), self.prior_of(x[1])

    def encode(self, x):
        mean, log_scale = jnp.split(self.encoder(jnp.append(x[0].ravel() - 0.5, x[1])), 2)
        return mean, jnp.exp(log_scale)

    def prior_of(self, c):
        mean, log_scale = jnp.split(self.prior(c), 2)
        return mean, jnp.exp(log_scale)

    def decode(self, z, c):
        return self.decoder(jnp.append(z, c)).reshape(28, 28)  # logits


cvae = CVAE()
digits = data.load("mnist5k").train
images = np.asarray(data.batch(digits.images, jnp.arange(digits.size)))[..., 0]
xs = (images, np.eye(10, dtype=np.float32)[digits.labels])
params = cvae.init(jax.random.key(0), jax.tree.map(lambda a: a[0], xs))


def loss(params, key, x):  # −ELBO of one x, one sample
    mean, scale = cvae.apply(params, x, method="encode")
    z = mean + scale * jax.random.normal(key, (D,))
    logits = cvae.apply(params, z, x[1], method="decode")
    log_prior = norm.logpdf(z, *cvae.apply(params, x[1], method="prior_of")).sum()
    log_x = jnp.sum(x[0] * logits - jax.nn.softplus(logits))
    return norm.logpdf(z, mean, scale).sum() - log_prior - log_x


@jax.jit
def train(params, xs):
    optimizer = optax.adam(2e-3)

    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, len(xs[0]), (BATCH,))
        batch, keys = jax.tree.map(lambda a: a[chosen], xs), jax.random.split(key, BATCH)
        grads = jax.grad(lambda p: jax.vmap(loss, (None, 0, 0))(p, keys, batch).mean())(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


params = train(params, jax.tree.map(jnp.asarray, xs))
some = jax.tree.map(lambda a: a[:POINTS], xs)  # to be measured


# %% From the trained model to a table
def log_likelihood(params, x, z):
    return infsub.densities.bernoulli_logits(x[0], cvae.apply(params, z, x[1], method="decode"))


def log_prior(params, x, z):
    return norm.logpdf(z, *cvae.apply(params, x[1], method="prior_of")).sum()


def encode(params, x):
    return infsub.Gaussian(*cvae.apply(params, x, method="encode"))


def sample_prior(key, params, x):
    mean, scale = cvae.apply(params, x[1], method="prior_of")
    return mean + scale * jax.random.normal(key, (D,))


def sample_x(key, params, z, x):
    logits = cvae.apply(params, z, x[1], method="decode")
    return jax.random.bernoulli(key, jax.nn.sigmoid(logits)) * 1.0, x[1]


model = infsub.Model(D, encode, log_likelihood, sample_x, log_prior, sample_prior)
measured = infsub.measure(jax.random.key(2), model, params, some, num_certified=5)
print(measured)
