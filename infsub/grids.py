"""Posteriors of two latent dimensions on a grid: log p(x) by quadrature, densities to look at.

Where z is a plane the true posterior can be had by brute force. The rule of rectangles errs by less
than 1e-6 nats once a cell is as wide as the narrowest standard deviation: it converges faster than
any power of the cell for what is smooth and vanishes at the border (Trefethen & Weideman 2014, SIAM
Review 56(3)).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from infsub import bounds
from infsub.samplers import as_sampler
from infsub.types import Array, Gaussian, Key, Sampler, Target, positive_int

_REACH = 8.0  # the search begins in [−8, 8]²
_TAIL = 1e-5  # of the posterior's mass, may lie beyond each side of the window
_NUM_ZOOMS = 3  # to find a posterior narrower than a cell, and then its width
_MAX_STEPS = 20  # zooms, and growths where it lies outside: then the window spans a million
# Cells of standard deviation: a Gaussian of so many is off by 2 exp(−2π² σ²) = 0.002, and in two rows of
# cells alone, which a chessboard does not see, there are 0.5.
_RESOLVED = 0.6
_SPREAD = 0.01  # of a sampler's mass, may lie beyond each side of the window that covers it
_CHUNK_SIZE = 1000  # samples at a time


class Window(NamedTuple):
    """A square of the plane, in cells G × G; the first axis of what lies on it is z_1.

    Attributes:
      low: [2], its lower left corner.
      width: [], its side.
    """

    low: Array
    width: Array


class Quadrature(NamedTuple):
    """log p(x) of one datapoint by quadrature.

    Attributes:
      log_px: [], in nats.
      error: [], by how much half of the cells, as on a chessboard, say otherwise: far above the
        whole grid's error, for that falls as its square. +inf where there is mass at the border, for
        nobody knows how much lies beyond, and where it is narrower in some direction than the cells
        can show.
    """

    log_px: Array
    error: Array


def centres(window: Window, num_cells: int) -> Array:
    """z at the centres of the cells, [G, G, 2]."""
    steps = (jnp.arange(num_cells) + 0.5) / num_cells
    unit = jnp.stack(jnp.meshgrid(steps, steps, indexing="ij"), axis=-1)
    return window.low + window.width * unit


def log_joint_of_cells(target: Target, window: Window, num_cells: int) -> Array:
    """log p(x, z) at the centres of the cells, [G, G]: column by column, so memory stays small."""
    point = partial(bounds.log_joint, target)
    return jax.lax.map(jax.vmap(point), centres(window, num_cells))


@partial(jax.jit, static_argnames="num_cells")
def find_window(target: Target, num_cells: int) -> Window:
    """The square around all of the posterior but 1e-5 of its mass on each side.

    It grows from [−8, 8]² until no side has mass at its border, and then narrows; where that does not
    come to an end, `integrate` says so.

    Raises ValueError when z is no plane or num_cells is not a positive integer.
    """
    positive_int("num_cells", num_cells)
    if target.latent_dim != 2:
        raise ValueError(f"a grid needs latent_dim=2, a plane; got {target.latent_dim}")

    # By whole cells, so nothing of the window has a gradient; nor has a while_loop one in reverse.
    fixed = jax.lax.stop_gradient(target)

    def step(carry: tuple[Window, Array, Array]) -> tuple[Window, Array, Array]:
        window, zooms, steps = carry
        values = log_joint_of_cells(fixed, window, num_cells)
        return zoom(window, values, _TAIL), zooms + ~_cut_off(values), steps + 1

    def unfinished(carry: tuple[Window, Array, Array]) -> Array:
        _, zooms, steps = carry
        return (zooms < _NUM_ZOOMS) & (steps < _MAX_STEPS)

    start = Window(jnp.full(2, -_REACH), jnp.asarray(2 * _REACH))
    none = jnp.zeros((), int)
    return jax.lax.while_loop(unfinished, step, (start, none, none))[0]


def zoom(window: Window, values: Array, tail: float) -> Window:
    """The square around all of exp(values) but a share `tail` on each side, values [G, G].

    Where a side has mass at its border there may be more beyond: the window grows there by itself, and
    is cut nowhere, for of the whole mass nothing is known yet.
    """
    empty = _empty(values, tail)
    at_border = empty == 0
    # A cell more, for the mass of a narrow posterior may lie anywhere in its cell or the next.
    cut = jnp.where(jnp.any(at_border), jnp.where(at_border, -len(values), 0), empty - 1)
    below, above = cut
    cell = window.width / len(values)
    return _square(window.low + cell * below, window.low + cell * (len(values) - above))


def _empty(values: Array, tail: float) -> Array:
    """How many rows of cells hold a share less than `tail` together, from below and above, [2, 2]."""
    mass = jnp.exp(values - jnp.max(values))
    sides = jnp.stack([jnp.sum(mass, axis=1), jnp.sum(mass, axis=0)])  # marginals [2, G]
    limit = tail * jnp.sum(mass)
    return jnp.stack(
        [jnp.sum(jnp.cumsum(s, axis=1) < limit, axis=1) for s in (sides, sides[:, ::-1])]
    )


def _cut_off(values: Array) -> Array:
    """Whether a side has mass at its border, []; so has what is not finite."""
    return jnp.any(_empty(values, _TAIL) == 0)


def cover(window: Window, z: Array) -> Window:
    """The window, enlarged to hold the samples z [K, 2] but 1 % of them on each side."""
    low, high = jnp.quantile(z, jnp.array([_SPREAD, 1 - _SPREAD]), axis=0)
    return _square(jnp.minimum(window.low, low), jnp.maximum(window.low + window.width, high))


def _square(low: Array, high: Array) -> Window:
    width = jnp.max(high - low)
    return Window((low + high - width) / 2, width)


def integrate(window: Window, values: Array) -> Quadrature:
    """log ∫ exp(values) dz over the window, values [G, G] such as `log_joint_of_cells` -> Quadrature."""
    log_cell = 2 * (jnp.log(window.width) - math.log(values.shape[0]))
    total = bounds.log_sum_exp(values.ravel()) + log_cell
    white = jnp.sum(jnp.indices(values.shape), axis=0) % 2 == 0
    half = bounds.log_sum_exp(jnp.where(white, values, -jnp.inf).ravel()) + log_cell + math.log(2)
    unseen = _cut_off(values) | ~(_narrowest(values) > _RESOLVED)
    return Quadrature(total, jnp.where(unseen, jnp.inf, jnp.abs(total - half)))


def _narrowest(values: Array) -> Array:
    """The standard deviation of exp(values) in the direction where it is least, in cells, []."""
    weights = jax.nn.softmax(values.ravel())
    cells = jnp.indices(values.shape, dtype=values.dtype).reshape(2, -1)
    away = cells - (cells @ weights)[:, None]
    (a, b), (_, c) = (away * weights) @ away.T
    return jnp.sqrt((a + c) / 2 - jnp.hypot((a - c) / 2, b))


@partial(jax.jit, static_argnames="num_cells")
def log_px(target: Target, num_cells: int = 100) -> Quadrature:
    """log p(x) = log ∫ p(x, z) dz of one datapoint on G × G cells around its posterior.

    Raises ValueError as `find_window`; TypeError when a density returns no scalar.
    """
    window = find_window(target, num_cells)
    return integrate(window, log_joint_of_cells(target, window, num_cells))


def draw(key: Key, q: Gaussian | Sampler, num_samples: int) -> Array:
    """z [K, 2] of q: Gaussian(mean [2], scale [2]), or a sampler key -> (z [2], log_q [])."""
    return _draw(key, as_sampler(q), positive_int("num_samples", num_samples))


@partial(jax.jit, static_argnames="num_samples")
def _draw(key: Key, sampler: Partial, num_samples: int) -> Array:
    keys = jax.random.split(key, num_samples)
    return jax.lax.map(lambda key: sampler(key)[0], keys, batch_size=_CHUNK_SIZE)


@partial(jax.jit, static_argnames="num_cells")
def histogram(window: Window, z: Array, num_cells: int) -> Array:
    """The density of samples z [K, 2] on the window, [G, G]: 1 in all, less what lies outside.

    The only density there is of a family with an auxiliary variable.
    """
    cell = jnp.floor((z - window.low) / window.width * num_cells)
    inside = jnp.all((cell >= 0) & (cell < num_cells), axis=1)
    column, row = jnp.where(inside[:, None], cell, num_cells).astype(jnp.int32).T
    counts = jnp.zeros((num_cells, num_cells)).at[column, row].add(1, mode="drop")
    return counts * (num_cells / window.width) ** 2 / len(z)
