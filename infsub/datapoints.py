"""Maps a function of ONE datapoint over a data set: keys, blocks, devices, progress."""

from __future__ import annotations

import warnings
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


# The most datapoints at a time that fitted into memory, of programs that ran out of it.
_FITTED: dict[Any, int] = {}


def _fitted(run: Callable[..., Any], code: Any, inputs: Any) -> Any:
    """run(*inputs) of inputs [B, …] as numpy arrays, in parts where the device's memory is too small.

    code: what the program is compiled for; its next block is halved from the start.

    Raises:
      MemoryError: one datapoint a device is too many.
    """
    size, devices = len(jax.tree.leaves(inputs)[0]), len(jax.local_devices())
    if size <= _FITTED.get(code, size):
        try:
            return jax.tree.map(np.asarray, run(*inputs))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if size <= devices:
                raise MemoryError(
                    "one datapoint does not fit into the device's memory: take fewer samples or chains"
                ) from error
        half = -(-size // (2 * devices)) * devices
        text = f"out of memory with {size} datapoints at a time: going on with {half}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
        _FITTED[code] = half
    half = -(-size // (2 * devices)) * devices
    # Two of the same shape, which overlap where the whole is odd: one compilation.
    first = _fitted(run, code, jax.tree.map(lambda leaf: leaf[:half], inputs))
    last = _fitted(run, code, jax.tree.map(lambda leaf: leaf[size - half :], inputs))
    return jax.tree.map(lambda a, b: np.concatenate([a, b[2 * half - size :]]), first, last)


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
      What `function` returns, each leaf with a leading [N], as numpy arrays. Where a block does not
      fit into memory it is halved, with a warning, and the numbers are the same.

    Raises:
      ValueError: xs is empty, its leaves disagree on N, or block_size < 1.
      MemoryError: one datapoint a device does not fit into memory.
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

    code = (function, tuple(static.items()))

    def run(*inputs: Any) -> Any:
        return _block(*code, key, *jax.device_put(inputs, sharding), args)

    results = []
    for start in range(0, num_points, block_size):
        # The last block is filled up with copies of its last datapoint: one shape, one compilation.
        rows = np.minimum(np.arange(start, start + block_size), num_points - 1)
        xs_block = jax.tree.map(lambda leaf, rows=rows: jnp.asarray(leaf)[rows], xs)
        result = _fitted(run, code, (jnp.asarray(indices[rows]), xs_block))
        stop = min(start + block_size, num_points)
        results.append(jax.tree.map(lambda leaf, n=stop - start: np.asarray(leaf)[:n], result))
        if progress is not None:
            progress(stop, num_points)
    return jax.tree.map(lambda *blocks: np.concatenate(blocks), *results)
