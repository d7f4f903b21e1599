"""Maps a function of ONE datapoint over a data set: keys, blocks, devices, progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from infsub.types import Key, positive_int


@partial(jax.jit, static_argnums=(0, 1))
def _block(function, static, key, indices, xs, args):
    def one(index, x):
        return function(jax.random.fold_in(key, index), x, *args, **dict(static))

    return jax.vmap(one)(indices, xs)


def number_of(xs: Any) -> int:
    """N of a pytree of arrays [N, …]. Raises ValueError where it is empty or its leaves disagree."""
    leaves = jax.tree.leaves(xs)
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            "xs must be a pytree of arrays [N, …] with one common N ≥ 1; got shapes "
            f"{[np.shape(leaf) for leaf in leaves]}"
        )
    return sizes.pop()


def map_datapoints(
    function: Callable[..., Any],
    key: Key,
    xs: Any,
    *args: Any,
    static: Mapping[str, Any] = MappingProxyType({}),
    block_size: int | None = None,
    indices: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """function(fold_in(key, index), x, *args, **static) for every datapoint, in bounded memory.

    A datapoint's key depends on its index alone, so its result does not depend on the block it falls
    in, on the number of devices, or on which other datapoints are evaluated. It compiles once.

    Args:
      function: (key, x, *args) -> any pytree; a function defined once (a new one compiles anew).
      key: of the whole data set.
      xs: a pytree of arrays [N, …].
      *args: passed to every datapoint: parameters travel here, as arguments.
      static: passed to every datapoint by name, and compiled for: hashable values, of which equal
        ones compile once.
      block_size: datapoints at a time; None is 64 on a CPU, 1024 on an accelerator, rounded up to a
        multiple of the number of devices, which share each block.
      indices: [N], data set indices that key the datapoints; None is 0 … N−1.
      progress: called after each block with (datapoints done, N).

    Returns:
      What `function` returns, each leaf with a leading [N], as numpy arrays.

    Raises:
      ValueError: xs is empty, its leaves disagree on N, or block_size < 1.
    """
    num_points = number_of(xs)
    indices = np.arange(num_points) if indices is None else np.asarray(indices)
    if indices.shape != (num_points,):
        raise ValueError(f"indices must have shape [N={num_points}]; got {indices.shape}")
    if block_size is None:
        block_size = 64 if jax.default_backend() == "cpu" else 1024
    devices = jax.local_devices()
    block_size = min(positive_int("block_size", block_size), num_points)
    block_size = -(-block_size // len(devices)) * len(devices)
    mesh = jax.make_mesh((len(devices),), ("block",), axis_types=(AxisType.Auto,), devices=devices)
    sharding = NamedSharding(mesh, PartitionSpec("block"))

    results = []
    for start in range(0, num_points, block_size):
        # The last block is filled up with copies of its last datapoint: one shape, one compilation.
        rows = np.minimum(np.arange(start, start + block_size), num_points - 1)
        xs_block = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf)[rows], xs)
        inputs = jax.device_put((jnp.asarray(indices[rows]), xs_block), sharding)
        result = _block(function, tuple(static.items()), key, *inputs, args)
        stop = min(start + block_size, num_points)
        results.append(jax.tree.map(lambda leaf, n=stop - start: np.asarray(leaf)[:n], result))
        if progress is not None:
            progress(stop, num_points)
    return jax.tree.map(lambda *blocks: np.concatenate(blocks), *results)
