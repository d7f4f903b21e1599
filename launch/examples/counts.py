"""Counts of genes in cells: a negative binomial with a library-size covariate, as in scVI.

About a minute on two cores. x is a pair, (counts [G], log library size []): the model is of the counts
given the library size, which sample_x therefore carries over. Data are simulated.
"""

# %% The model, trained as anybody would
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import gammaln

import infsub

D, GENES, CELLS, STEPS, BATCH, POINTS = 4, 60, 2000, 1500, 100, 30

rng = np.random.default_rng(0)
loadings = rng.normal(size=(D, GENES))
rates = np.exp(rng.normal(size=(CELLS, D)) @ loadings * 0.7)
library = rng.lognormal(5.5, 0.4, CELLS)
means = library[:, None] * rates / rates.sum(1, keepdims=True)
counts = rng.poisson(means * rng.gamma(5.0, 1 / 5.0, means.shape))  # negative binomial
xs = (counts.astype(np.float32), np.log(library).astype(np.float32))


def dense(key, inputs, outputs):
    return {
        "w": jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs),
        "b": jnp.zeros(outputs),
    }


def network(layers, x):
    return jnp.tanh(x @ layers[0]["w"] + layers[0]["b"]) @ layers[1]["w"] + layers[1]["b"]


keys = jax.random.split(jax.random.key(0), 4)
params = {
    "encoder": [dense(keys[0], GENES, 64), dense(keys[1], 64, 2 * D)],
    "decoder": [dense(keys[2], D, 64), dense(keys[3], 64, GENES)],
    "log_dispersion": jnp.zeros(GENES),
}


def gaussian(params, x):
    mean, log_scale = jnp.split(network(params["encoder"], jnp.log1p(x[0])), 2)
    return mean, jnp.exp(log_scale)


def mean_counts(params, log_library, z):
    return jnp.exp(log_library) * jax.nn.softmax(network(params["decoder"], z))


def log_negative_binomial(x, mean, r):  # [G], of the mean and of r, the inverse dispersion
    choose = gammaln(x + r) - gammaln(r) - gammaln(x + 1)
    return choose + r * jnp.log(r / (r + mean)) + x * jnp.log(mean / (r + mean))


def loss(params, key, x):  # −ELBO of one cell
    mean, scale = gaussian(params, x)
    mu = mean_counts(params, x[1], mean + scale * jax.random.normal(key, (D,)))
    kl = 0.5 * jnp.sum(mean**2 + scale**2 - 1 - 2 * jnp.log(scale))
    return kl - log_negative_binomial(x[0], mu, jnp.exp(params["log_dispersion"])).sum()


@jax.jit
def train(params, xs):
    optimizer = optax.adam(2e-3)

    def step(carry, key):
        params, state = carry
        chosen = jax.random.choice(key, CELLS, (BATCH,))
        batch, keys = jax.tree.map(lambda a: a[chosen], xs), jax.random.split(key, BATCH)
        grads = jax.grad(lambda p: jax.vmap(loss, (None, 0, 0))(p, keys, batch).mean())(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


params = train(params, jax.tree.map(jnp.asarray, xs))


# %% From the trained model to a table
def log_likelihood(params, x, z):
    mu = mean_counts(params, x[1], z)
    return log_negative_binomial(x[0], mu, jnp.exp(params["log_dispersion"])).sum()


def sample_x(key, params, z, x):
    key_gamma, key_poisson = jax.random.split(key)
    r = jnp.exp(params["log_dispersion"])
    rate = mean_counts(params, x[1], z) * jax.random.gamma(key_gamma, r) / r
    return jax.random.poisson(key_poisson, rate).astype(jnp.float32), x[1]


model = infsub.Model(D, lambda p, x: infsub.Gaussian(*gaussian(p, x)), log_likelihood, sample_x)
some = jax.tree.map(lambda a: a[:POINTS], xs)
measured = infsub.measure(jax.random.key(2), model, params, some, num_certified=5)
print(measured)
