"""A variational autoencoder as pure functions of one datapoint, made from a model's settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from ml_collections import ConfigDict, FrozenConfigDict

from infsub import densities, networks, posteriors
from infsub.types import Array, Key, Params, Posterior, Target

Variables = dict[str, Any]  # {"encoder": flax variables, "decoder": flax variables, "posterior": …}


class Terms(NamedTuple):
    """What K samples z_k of q(z|x) say of one datapoint, in nats.

    Attributes:
      log_likelihood: [K], log p(x|z_k).
      log_prior: [K], log p(z_k).
      log_q: [K], log q(z_k|x), or its bound for a family with an auxiliary variable.
    """

    log_likelihood: Array
    log_prior: Array
    log_q: Array


class VAE(NamedTuple):
    """The functions of a VAE; equal settings give the same object, so it is a static jit argument.

    Attributes:
      latent_dim: D.
      init: key -> variables.
      encode: (variables, x [H, W, C]) -> the posterior's params.
      posterior: (variables, x) -> Posterior; one that needs no target is the same for all.
      sampler: (variables, x) -> Partial, key -> (z [D], log_q []).
      log_likelihood: (variables, x, z) -> [], log p(x|z).
      target: (variables, x) -> Target, the unnormalised posterior of x; its outputs of a z [D] are pixel
        params [H, W, C·P], P = 1 (logits) or 2 (mean, log scale).
      sample_x: (key, variables, z) -> x [H, W, C], a draw of p(x|z), of the data's levels.
      simulate: (key, variables) -> (z [D], x [H, W, C]), a draw of p(z) p(x|z).
      mean_x: (variables, z) -> [H, W, C] in [0, 1], for pictures.
      terms: (key, variables, x, num_samples, training) -> (Terms, statistics). `training` names the
        networks that use this batch's statistics ("encoder", "decoder"), which needs a vmap over
        datapoints with axis_name="batch"; statistics {network: {"batch_stats": …}} are the new
        running ones. () is evaluation, as in all other functions here.
    """

    latent_dim: int
    init: Callable[[Key], Variables]
    encode: Callable[[Variables, Array], Params]
    posterior: Callable[[Variables, Array], Posterior]
    sampler: Callable[[Variables, Array], Partial]
    log_likelihood: Callable[[Variables, Array, Array], Array]
    target: Callable[[Variables, Array], Target]
    sample_x: Callable[[Key, Variables, Array], Array]
    simulate: Callable[[Key, Variables], tuple[Array, Array]]
    mean_x: Callable[[Variables, Array], Array]
    terms: Callable[..., tuple[Terms, dict[str, Any]]]


def make_vae(
    model: ConfigDict | FrozenConfigDict, image_shape: tuple[int, int, int], levels: int
) -> VAE:
    """The VAE of these settings for images [H, W, C] of `levels` values a channel.

    p(z) = N(0, I); p(x|z) is Bernoulli for 2 levels and a discretised logistic for more
    (Kingma et al. 2016, app. A).

    Args:
      model: latent_dim; encoder and decoder, see networks.py; posterior, a name in
        `posteriors.FAMILIES` and options of the family's, its defaults where not given.
      image_shape: (H, W, C).
      levels: of a pixel, 0 … levels − 1.

    Raises:
      ValueError, TypeError: a network or posterior that there is not, or arguments not its own.
    """
    frozen = FrozenConfigDict(model.to_dict())  # locked or not, it is the same model
    return _make_vae(frozen, tuple(image_shape), levels)


@functools.cache
def _make_vae(model: Any, image_shape: tuple[int, int, int], levels: int) -> VAE:
    latent_dim = model.latent_dim  # Any: its fields have no static types
    options = dict(model.posterior)
    name = options.pop("name")
    options = {**posteriors.family(name).defaults, **options}
    family = functools.partial(posteriors.make, name, latent_dim, **options)

    def nowhere(z: Array) -> Array:
        return jnp.zeros((), z.dtype)

    template = family(target=Target(None, nowhere, latent_dim))
    encoded = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype),
        jax.eval_shape(template.init, jax.random.key(0))["encoded"],
    )
    flat, unravel = ravel_pytree(encoded)
    encoder = networks.encoder(model.encoder, flat.size)
    decoder = networks.decoder(model.decoder, image_shape, 1 if levels == 2 else 2)

    def init(key: Key) -> Variables:
        encoder_key, decoder_key, posterior_key = jax.random.split(key, 3)
        x = jnp.zeros(image_shape)
        variables = {
            "encoder": encoder.init(encoder_key, x, train=False),
            "decoder": decoder.init(decoder_key, jnp.zeros(latent_dim), train=False),
        }
        shared = posterior(variables, x).init(posterior_key)["shared"]
        return variables | {"posterior": shared}

    def scaled(x: Array) -> Array:
        return x / (levels - 1)

    def encode(variables: Variables, x: Array) -> Params:
        outputs: Any = encoder.apply(variables["encoder"], scaled(x), train=False)
        return {"encoded": unravel(outputs), "shared": variables["posterior"]}

    def posterior(variables: Variables, x: Array) -> Posterior:
        return family(target=target(variables, x))

    def sampler(variables: Variables, x: Array) -> Partial:
        return posteriors.sampler(posterior(variables, x), encode(variables, x))

    def decode(variables: Variables, z: Array) -> Array:
        return decoder.apply(variables["decoder"], z, train=False)  # pyright: ignore

    def log_px_given(pixels: Array, x: Array) -> Array:
        if levels == 2:
            return densities.bernoulli_logits(x, pixels)
        mean, log_scale = jnp.split(pixels, 2, axis=-1)
        return densities.discretized_logistic(x, mean, log_scale, levels)

    def log_likelihood(variables: Variables, x: Array, z: Array) -> Array:
        return log_px_given(decode(variables, z), x)

    def target(variables: Variables, x: Array) -> Target:
        decoder_alone = {"decoder": variables["decoder"]}
        return Target(
            None,
            Partial(log_likelihood, decoder_alone, x),
            latent_dim,
            outputs=Partial(decode, decoder_alone),
            log_likelihood_of_outputs=Partial(log_px_given, x=x),
        )

    def sample_x(key: Key, variables: Variables, z: Array) -> Array:
        pixels = decode(variables, z)
        if levels == 2:
            return jax.random.bernoulli(key, jax.nn.sigmoid(pixels)).astype(pixels.dtype)
        mean, log_scale = jnp.split(pixels, 2, axis=-1)
        return densities.sample_discretized_logistic(key, mean, log_scale, levels)

    def simulate(key: Key, variables: Variables) -> tuple[Array, Array]:
        key_z, key_x = jax.random.split(key)
        z = jax.random.normal(key_z, (latent_dim,))
        return z, sample_x(key_x, variables, z)

    def mean_x(variables: Variables, z: Array) -> Array:
        pixels = decode(variables, z)
        if levels == 2:
            return jax.nn.sigmoid(pixels)
        return jnp.clip(jnp.split(pixels, 2, axis=-1)[0], -1, 1) / 2 + 0.5

    def terms(
        key: Key, variables: Variables, x: Array, num_samples: int, training: tuple[str, ...] = ()
    ) -> tuple[Terms, dict[str, Any]]:
        outputs, encoder_stats = encoder.apply(
            variables["encoder"], scaled(x), train="encoder" in training, mutable=["batch_stats"]
        )
        params = {"encoded": unravel(outputs), "shared": variables["posterior"]}
        draw = posteriors.sampler(posterior(variables, x), params)
        z, log_q = jax.vmap(draw)(jax.random.split(key, num_samples))
        pixels, decoder_stats = jax.vmap(
            lambda z: decoder.apply(
                variables["decoder"], z, train="decoder" in training, mutable=["batch_stats"]
            ),
            axis_name="sample",
            out_axes=(0, None),
        )(z)
        values = Terms(
            jax.vmap(log_px_given, in_axes=(0, None))(pixels, x),
            jax.vmap(densities.standard_normal)(z),
            log_q,
        )
        return values, {"encoder": dict(encoder_stats), "decoder": dict(decoder_stats)}  # pyright: ignore

    return VAE(
        latent_dim,
        init,
        encode,
        posterior,
        sampler,
        log_likelihood,
        target,
        sample_x,
        simulate,
        mean_x,
        terms,
    )
