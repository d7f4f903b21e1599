"""What is measured: any latent-variable model, as two functions of one datapoint.

A VAE of a config's is one subject, a `Model` of a user's another; what is mapped over a data set is
the same for both. A Subject is a pytree: its arrays travel as arguments, its code is compiled for.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from infsub import data, densities, posteriors
from infsub.datapoints import few_sizes, map_datapoints
from infsub.keys import named
from infsub.measure import (
    Datapoint,
    Settings,
    bounds_of_datapoint,
    certify_datapoint,
    densities_of_datapoint,
)
from infsub.pairs import draw_prior, simulation_lacks
from infsub.samplers import as_sampler
from infsub.types import Array, Gaussian, Key, Model, Params

if TYPE_CHECKING:  # flax is not for a model of one's own
    from infsub.vae import VAE, Variables

# Rows (datapoints × samples) a dispatch works on: what fits a CPU's caches, or fills a GPU.
_ROWS = {"cpu": 320}
_ROWS_ACCELERATOR = 16_000
# Computed, not measured: of CIFAR-10's wide deconvolutions 62,000 floats a row, and as many again for
# their gradients and XLA's copies. An MLP takes a hundredth.
_BYTES_A_ROW = 2**20


class Subject(NamedTuple):
    """A model as `measure` sees it.

    Attributes:
      describe: (key, params, x) -> Datapoint; the key is for the moments of a q that is no Gaussian.
      simulate: (key, params, x) -> (z [D], x), a draw of p(z) p(x|z), covariates taken from the x
        given; None where the model cannot.
    """

    describe: Partial
    simulate: Partial | None


@functools.cache
def of_vae(vae: VAE, own: str) -> Subject:
    """A VAE as what is measured, its x [H, W, C]; `own` is its encoder's family."""

    def describe(key: Key, variables: Variables, x: Array) -> Datapoint:
        posterior, params = vae.posterior(variables, x), vae.encode(variables, x)
        q = posteriors.sampler(posterior, params)
        if not params["shared"] and set(params["encoded"]) == {"mean", "log_scale"}:
            base = posteriors.gaussian_of(params)
        else:
            base = posteriors.moment_matched(key, q)
        return Datapoint(vae.target(variables, x), q, base, own, (posterior, params))

    def simulate(key: Key, variables: Variables, _: Any) -> tuple[Array, Array]:
        return vae.simulate(key, variables)

    return Subject(Partial(describe), Partial(simulate))


def of_model(model: Model) -> Subject:
    """A user's model as a subject; it simulates where it has sample_x, and sample_prior if it needs."""
    simulate = None if simulation_lacks(model) else Partial(_simulate, model)
    return Subject(Partial(_describe, model), simulate)


def _describe(model: Model, key: Key, params: Params, x: Any) -> Datapoint:
    q = model.encode(params, x)
    if isinstance(q, Gaussian):
        q = densities.check_gaussian(q)
        own = "gaussian" if q.scale.ndim < 2 else "full_gaussian"
        return Datapoint(model.target(params, x), q, q, own)
    draw = as_sampler(q)
    return Datapoint(model.target(params, x), draw, posteriors.moment_matched(key, draw), "")


def _simulate(model: Model, key: Key, params: Params, x: Any) -> tuple[Array, Any]:
    key_z, key_x = jax.random.split(key)
    z = draw_prior(key_z, model, params, x)
    return z, model.sample_x(key_x, params, z, x)  # pyright: ignore[reportOptionalCall]


def family_of(model: Model, params: Params, x: Any) -> str:
    """The family of the model's q at x where it is Gaussian; "" where nothing is known of it."""
    q = jax.eval_shape(lambda x: _scale(model, params, x), x)  # params may be a module
    return {1: "gaussian", 2: "full_gaussian"}.get(q.ndim, "")


def _scale(model: Model, params: Params, x: Any) -> Any:
    q = model.encode(params, x)
    return densities.check_gaussian(q).scale if isinstance(q, Gaussian) else jnp.zeros(())


def simulate(key: Key, vae: VAE, variables: Variables, num_points: int) -> data.Split:
    """N draws x ~ p(x) of the model as a split without labels; index i uses fold_in(key, i)."""

    def draw(key: Key, _: Array, variables: Variables) -> Array:
        return vae.simulate(key, variables)[1].astype(jnp.uint8)

    values = jnp.asarray(map_datapoints(draw, key, np.arange(num_points), variables))
    _, height, width, channels = values.shape
    images = data.Images(values, "levels", (height, width, channels))
    return data.Split(images, None, num_points)


def row(
    key: Key,
    x: Any,
    params: Params,
    subject: Subject,
    *,
    settings: Settings,
    chunk_size: int = 500,
) -> dict[str, Array]:
    """The row of bounds of the subject at x: `measure.bounds_of_datapoint`."""
    point = subject.describe(named(key, "moments"), params, x)
    return bounds_of_datapoint(key, point, settings, chunk_size)


def pictures(
    key: Key, x: Any, params: Params, subject: Subject, *, settings: Settings
) -> dict[str, Array]:
    """Of the q and q* of that row, where z is a plane: `measure.densities_of_datapoint`."""
    return densities_of_datapoint(key, subject.describe(named(key, "moments"), params, x), settings)


def certificate(
    key: Key, x: Any, params: Params, subject: Subject, *, settings: Settings
) -> dict[str, Array]:
    """The two-sided bounds of an x that the subject simulates; the x given has the covariates."""

    def simulated(key: Key) -> tuple[Array, Datapoint]:
        key_model, key_q = jax.random.split(key)
        z, drawn = subject.simulate(key_model, params, x)  # pyright: ignore[reportOptionalCall]
        return z, subject.describe(key_q, params, drawn)

    return certify_datapoint(key, simulated, settings)


def sizes(num_points: int, num_chains: int, block_size: int = 0) -> tuple[int, int]:
    """Datapoints a dispatch, in blocks of equal size, nearly, and the samples of each at a time.

    block_size: an upper limit; 0: what the device likes.
    """
    rows = _ROWS.get(jax.default_backend()) or _rows_of_memory(jax.local_devices())
    block_size = block_size or max(1, rows // num_chains)
    equal = -(-num_points // -(-num_points // block_size))
    block_size = min(block_size, few_sizes(equal))
    return block_size, max(1, rows // block_size)


def _rows_of_memory(devices: Sequence[Any]) -> int:
    """What fills a device of each kind and leaves room: an eighth of its memory is for parameters."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    fit = min(limit * 7 // 8 // _BYTES_A_ROW if limit else _ROWS_ACCELERATOR for limit in limits)
    return max(1, min(_ROWS_ACCELERATOR, fit)) * len(devices)
