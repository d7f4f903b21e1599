"""Models with known answers: a linear-Gaussian one in closed form, and the published oracle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from infsub import densities
from infsub.types import Gaussian, Model, Target


class LinearGaussian(NamedTuple):
    """z ~ N(0, I), x|z ~ N(W z + b, noise² I): log p(x), p(z|x) and all gaps are closed forms.

    Each is compiled whole: operation by operation it would be ten programs.
    """

    weight: jax.Array  # [X, D]
    bias: jax.Array  # [X]
    noise: jax.Array  # []

    @jax.jit
    def simulate(self, key):
        """One draw of the joint, key -> (z [D], x [X])."""
        key_z, key_x = jax.random.split(key)
        z = jax.random.normal(key_z, self.weight.shape[1:], self.weight.dtype)
        noise = jax.random.normal(key_x, self.bias.shape, self.weight.dtype)
        return z, self.weight @ z + self.bias + self.noise * noise

    def log_likelihood(self, x, z):
        return densities.normal(x, self.weight @ z + self.bias, self.noise)

    def target(self, x) -> Target:
        return Target(None, Partial(LinearGaussian.log_likelihood, self, x), self.weight.shape[1])

    @jax.jit
    def log_px(self, x):
        """log N(x; b, W Wᵀ + noise² I)."""
        cov = self.weight @ self.weight.T + self.noise**2 * jnp.eye(x.size)
        residual = x - self.bias
        quadratic = residual @ jnp.linalg.solve(cov, residual)
        return -0.5 * (quadratic + jnp.linalg.slogdet(cov)[1] + x.size * densities.LOG_2PI)

    @jax.jit
    def precision(self):
        """Of p(z|x), [D, D]: I + Wᵀ W / noise²."""
        return jnp.eye(self.weight.shape[1]) + self.weight.T @ self.weight / self.noise**2

    @jax.jit
    def posterior(self, x):
        """Mean [D] and covariance [D, D] of p(z|x)."""
        cov = jnp.linalg.inv(self.precision())
        return cov @ self.weight.T @ (x - self.bias) / self.noise**2, cov

    @jax.jit
    def exact_gaussian(self, x) -> Gaussian:
        """p(z|x) itself, its scale a Cholesky factor [D, D]."""
        mean, cov = self.posterior(x)
        return Gaussian(mean, jnp.linalg.cholesky(cov))

    @jax.jit
    def best_gaussian(self, x) -> Gaussian:
        """The factorised q closest to p(z|x) in KL(q‖p): its mean, and variances 1 / diag(precision)."""
        return Gaussian(self.posterior(x)[0], 1 / jnp.sqrt(jnp.diag(self.precision())))

    @jax.jit
    def kl(self, x, q: Gaussian):
        """KL(q‖p(z|x)) = log p(x) − L[q]."""
        mean, cov = self.posterior(x)
        precision, shift = self.precision(), q.mean - mean
        trace = jnp.sum(jnp.diag(precision) * q.scale**2)
        log_dets = jnp.linalg.slogdet(cov)[1] - 2 * jnp.sum(jnp.log(q.scale))
        return 0.5 * (trace + shift @ precision @ shift - q.scale.size + log_dets)


def linear_gaussian(latent_dim: int, data_dim: int, noise: float = 0.5) -> LinearGaussian:
    """A fixed model with correlated posteriors."""
    weight, bias = _normals(latent_dim, data_dim)
    weight = np.asarray(weight) * (1 / np.sqrt(data_dim, dtype=weight.dtype))
    return LinearGaussian(jnp.asarray(weight), bias, jnp.asarray(noise))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _normals(latent_dim, data_dim):
    key_w, key_b = jax.random.split(jax.random.key(latent_dim))
    return jax.random.normal(key_w, (data_dim, latent_dim)), jax.random.normal(key_b, (data_dim,))


def load_oracle(shared: Path):
    """The reproduction's MNIST model as a user's own: (params, x [100, 784])."""
    with np.load(shared / "oracles" / "mnist_ffg.npz") as arrays:
        params = {name: jnp.asarray(arrays[name]) for name in arrays.files if name != "x"}
        return params, jnp.asarray(arrays["x"], jnp.float32)


def _mlp(params, name, h):
    for layer in range(3):
        h = h @ params[f"{name}_w{layer}"] + params[f"{name}_b{layer}"]
        h = jax.nn.elu(h) if layer < 2 else h
    return h


def oracle_decode(params, z):
    """Bernoulli logits [784]."""
    return _mlp(params, "decoder", z)


def oracle_log_likelihood(params, x, z):
    return densities.bernoulli_logits(x, oracle_decode(params, z))


def oracle_target(params, x) -> Target:
    return Target(
        None,
        Partial(oracle_log_likelihood, params, x),
        50,
        outputs=Partial(oracle_decode, params),
        log_likelihood_of_outputs=Partial(densities.bernoulli_logits, x),
    )


def oracle_encoder(params, x) -> Gaussian:
    mean, log_variance = jnp.split(_mlp(params, "encoder", x), 2)
    return Gaussian(mean, jnp.exp(0.5 * log_variance))


def reproduction(path: str):
    """That model for --config.model.import: of …/oracles/mnist_ffg.npz (Model, params, x)."""
    params, xs = load_oracle(Path(path).parent.parent)

    def sample_x(key, params, z, x):
        return 1.0 * jax.random.bernoulli(key, jax.nn.sigmoid(oracle_decode(params, z)))

    model = Model(
        50,
        encode=oracle_encoder,
        log_likelihood=oracle_log_likelihood,
        sample_x=sample_x,
        outputs=lambda params, x, z: oracle_decode(params, z),
        log_likelihood_of_outputs=lambda params, x, logits: densities.bernoulli_logits(x, logits),
    )
    return model, params, xs


def own_model(known: LinearGaussian, shift: float = 0.3, widen: float = 1.5) -> Model:
    """A linear-Gaussian model as a user's: params are itself, and its encoder is off by this much."""

    def encode(params, x):
        best = params.best_gaussian(x)
        return Gaussian(best.mean + shift * jnp.sin(x[: best.mean.size]), widen * best.scale)

    def sample_x(key, params, z, x):
        noise = params.noise * jax.random.normal(key, params.bias.shape, z.dtype)
        return params.weight @ z + params.bias + noise

    return Model(known.weight.shape[1], encode, LinearGaussian.log_likelihood, sample_x)
