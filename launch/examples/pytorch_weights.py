"""A VAE trained in PyTorch: its state_dict goes through numpy, its two networks are written again.

About a minute on two cores. A Linear of PyTorch has its weight as [out, in]: y = W x + b.
"""

# %% The model, trained as anybody would
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import infsub
from infsub import data

D, STEPS, BATCH, POINTS = 8, 1200, 100, 30

digits = data.load("mnist5k").train
xs = np.array(data.batch(digits.images, jnp.arange(digits.size))).reshape(-1, 784)
torch.manual_seed(0)
vae = nn.ModuleDict(
    {
        "encoder": nn.Sequential(nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 2 * D)),
        "decoder": nn.Sequential(nn.Linear(D, 128), nn.Tanh(), nn.Linear(128, 784)),
    }
)
optimizer = torch.optim.Adam(vae.parameters(), 2e-3)
for number in range(STEPS):
    start = number * BATCH % len(xs)
    batch = torch.from_numpy(xs[start : start + BATCH])
    mean, log_scale = vae["encoder"](batch - 0.5).chunk(2, dim=1)
    z = mean + log_scale.exp() * torch.randn_like(mean)
    kl = 0.5 * (mean**2 + (2 * log_scale).exp() - 1 - 2 * log_scale).sum()
    logits = vae["decoder"](z)
    negative_elbo = kl + nn.functional.binary_cross_entropy_with_logits(
        logits, batch, reduction="sum"
    )
    optimizer.zero_grad()
    (negative_elbo / BATCH).backward()
    optimizer.step()

# %% From the trained model to a table
params = {name: jnp.asarray(value.numpy()) for name, value in vae.state_dict().items()}


def network(params, name, x):
    h = jnp.tanh(params[f"{name}.0.weight"] @ x + params[f"{name}.0.bias"])
    return params[f"{name}.2.weight"] @ h + params[f"{name}.2.bias"]


def encode(params, x):
    mean, log_scale = jnp.split(network(params, "encoder", x - 0.5), 2)
    return infsub.Gaussian(mean, jnp.exp(log_scale))


def log_likelihood(params, x, z):
    return infsub.densities.bernoulli_logits(x, network(params, "decoder", z))


def sample_x(key, params, z, x):
    return jax.random.bernoulli(key, jax.nn.sigmoid(network(params, "decoder", z))) * 1.0


model = infsub.Model(D, encode, log_likelihood, sample_x)
measured = infsub.measure(jax.random.key(0), model, params, xs[:POINTS], num_certified=5)
print(measured)
