"""A two-level hierarchical VAE on digits, p(z2) p(z1|z2) p(x|z1), measured through its noise.

About a minute on two cores. infsub's z is flat and its prior here is N(0, I): take the noise
ε = (ε1, ε2) with z2 = ε2 and z1 = μ(z2) + σ(z2) ε1. The ELBO and log p(x) are those of (z1, z2), for
the map is one to one: log q(ε|x) = log q(z1|x) + log q(z2|z1) + Σ log σ(z2). q is no Gaussian in ε,
so the encoder gives a sampler.
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

D1, D2, STEPS, BATCH, POINTS = 8, 3, 1200, 100, 30


class HVAE(nn.Module):
    def setup(self):
        self.q1 = nn.Sequential([nn.Dense(128), nn.tanh, nn.Dense(2 * D1)])  # q(z1|x)
        self.q2 = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(2 * D2)])  # q(z2|z1)
        self.p1 = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(2 * D1)])  # p(z1|z2)
        self.px = nn.Sequential([nn.Dense(128), nn.tanh, nn.Dense(784)])  # p(x|z1), logits

    def __call__(self, x):
        return self.draw(jax.random.key(0), x), self.logits(jnp.zeros(D1 + D2))

    def draw(self, key, x):
        """A noise ε of q(ε|x), and log q(ε|x)."""
        noise = jax.random.normal(key, (D1 + D2,))
        m1, s1 = jnp.split(self.q1(x.ravel() - 0.5), 2)
        z1 = m1 + jnp.exp(s1) * noise[:D1]
        m2, s2 = jnp.split(self.q2(z1), 2)
        z2 = m2 + jnp.exp(s2) * noise[D1:]
        mean, log_scale = jnp.split(self.p1(z2), 2)
        log_q = norm.logpdf(z1, m1, jnp.exp(s1)).sum() + norm.logpdf(z2, m2, jnp.exp(s2)).sum()
        return jnp.append((z1 - mean) * jnp.exp(-log_scale), z2), log_q + log_scale.sum()

    def logits(self, noise):
        mean, log_scale = jnp.split(self.p1(noise[D1:]), 2)
        return self.px(mean + jnp.exp(log_scale) * noise[:D1]).reshape(28, 28)


hvae = HVAE()
digits = data.load("mnist5k").train
xs = np.asarray(data.batch(digits.images, jnp.arange(digits.size)))[..., 0]
params = hvae.init(jax.random.key(0), xs[0])


def loss(params, key, x):  # −ELBO of one x, one sample
    noise, log_q = hvae.apply(params, key, x, method="draw")
    logits = hvae.apply(params, noise, method="logits")
    return log_q - norm.logpdf(noise).sum() - jnp.sum(x * logits - jax.nn.softplus(logits))


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
    return jax.tree_util.Partial(
        lambda params, x, key: hvae.apply(params, key, x, method="draw"), params, x
    )


def log_likelihood(params, x, noise):
    return infsub.densities.bernoulli_logits(x, hvae.apply(params, noise, method="logits"))


def sample_x(key, params, noise, x):
    return (
        jax.random.bernoulli(key, jax.nn.sigmoid(hvae.apply(params, noise, method="logits"))) * 1.0
    )


model = infsub.Model(D1 + D2, encode, log_likelihood, sample_x)
measured = infsub.measure(jax.random.key(2), model, params, xs[:POINTS], num_certified=5)
print(measured)
