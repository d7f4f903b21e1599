"""A NumPyro model and guide, with a plate and a local latent, as they were written for SVI.

About a minute on two cores. The functions of one datapoint are traces of the model and of the guide
on a batch of one.
"""

# %% The model, trained as anybody would
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import infsub
from infsub import data

D, STEPS, BATCH, POINTS = 8, 1200, 100, 30


def dense(name, x, size):
    scale = 1 / np.sqrt(x.shape[-1])
    kernel = numpyro.param(
        f"{name}.kernel", lambda key: scale * jax.random.normal(key, (x.shape[-1], size))
    )
    return x @ kernel + numpyro.param(f"{name}.bias", jnp.zeros(size))


def model(xs):
    with numpyro.plate("datapoints", len(xs)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(D), 1).to_event(1))
        logits = dense("decoder.1", jnp.tanh(dense("decoder.0", z, 128)), 784)
        numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=xs)


def guide(xs):
    h = jnp.tanh(dense("encoder.0", xs - 0.5, 128))
    mean, scale = dense("encoder.mean", h, D), jnp.exp(dense("encoder.scale", h, D))
    with numpyro.plate("datapoints", len(xs)):
        numpyro.sample("z", dist.Normal(mean, scale).to_event(1))


digits = data.load("mnist5k").train
xs = np.asarray(data.batch(digits.images, jnp.arange(digits.size))).reshape(-1, 784)
svi = SVI(model, guide, optax.adam(2e-3), Trace_ELBO())
state, update = svi.init(jax.random.key(0), xs[:BATCH]), jax.jit(svi.update)
for number in range(STEPS):
    start = number * BATCH % len(xs)
    state, _ = update(state, xs[start : start + BATCH])
params = svi.get_params(state)


# %% From the trained model to a table
def trace(program, values, x):
    with handlers.seed(rng_seed=0), handlers.substitute(data=values):
        return handlers.trace(program).get_trace(x[None])


def encode(params, x):
    q = trace(guide, params, x)["z"]["fn"].base_dist
    return infsub.Gaussian(q.loc[0], q.scale[0])


def log_likelihood(params, x, z):
    return trace(model, params | {"z": z[None]}, x)["x"]["fn"].log_prob(x[None])[0]


def sample_x(key, params, z, x):
    return trace(model, params | {"z": z[None]}, x)["x"]["fn"].sample(key)[0] * 1.0


vae = infsub.Model(D, encode, log_likelihood, sample_x)
measured = infsub.measure(jax.random.key(1), vae, params, xs[:POINTS], num_certified=5)
print(measured)
