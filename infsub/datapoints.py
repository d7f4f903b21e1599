"""Maps a function of ONE datapoint over a data set: keys, blocks, devices, progress."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from infsub import data, files
from infsub.programs import Program, call
from infsub.types import Array, Estimate, Key, positive_int

_NUM_NAMED = 10  # datapoints that a warning names


# LLVM at its first level: half the seconds to compile on a CPU, and as few to run, for nearly all of
# those are matrix products, which no compiler has to make.
_QUICKLY = {"xla_backend_optimization_level": 1}


def _block(code: Any, key: Key, indices: Array, xs: Any, arrays: list[Any]) -> Any:
    """The program's results at datapoints of these data set indices [B], xs [B, …]."""
    told_less = jax.config.read("jax_disable_most_optimizations")
    quickly = jax.default_backend() == "cpu" and not told_less
    return _compiled(quickly)(code, key, indices, xs, arrays)


@functools.cache
def _compiled(quickly: bool) -> Callable[..., Any]:
    def block(code, key, indices, xs, arrays):
        def one(index, x):
            return call(code, arrays, jax.random.fold_in(key, index), x)

        return jax.vmap(one)(indices, xs)

    options = _QUICKLY if quickly else None
    return jax.jit(block, static_argnums=0, compiler_options=options)


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


def _swapped(program: Program, key: Key, xs: Any) -> bool:
    """Whether the function takes (x, key), not (key, x)."""
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), xs)
    try:
        jax.eval_shape(lambda key, x: call(program.code, program.arrays, x, key), key, x)
    except Exception:
        return False
    return True


def _not_finite(result: Any, num_points: int) -> np.ndarray:
    """[N] of bool: the datapoints with a number that is not finite; of an Estimate the bound counts.

    The fields beside it are NaN where they do not apply.
    """
    bad = np.zeros(num_points, bool)
    for leaf in jax.tree.leaves(result, is_leaf=lambda part: isinstance(part, Estimate)):
        values = np.asarray(leaf.log_px if isinstance(leaf, Estimate) else leaf)
        if jnp.issubdtype(values.dtype, jnp.inexact):  # numpy does not know bfloat16 for one
            bad |= ~np.isfinite(values).reshape(num_points, -1).all(axis=1)
    return bad


def number_of(xs: Any) -> int:
    """N of a pytree of arrays [N, …].

    Raises:
      ValueError: it is empty or its leaves disagree.
      TypeError: it is a part of a data set, whose images are packed.
    """
    if isinstance(xs, data.Images | data.Split | data.Dataset):
        raise TypeError(
            f"xs must be arrays [N, …]; got infsub.data's {type(xs).__name__}, which keeps its images "
            "packed: take some of them, such as dataset.test[:100]"
        )
    leaves = jax.tree.leaves(xs)
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(
            "xs must be a pytree of arrays [N, …] with one common N ≥ 1; got shapes "
            f"{[np.shape(leaf) for leaf in leaves]}"
        )
    return sizes.pop()


def few_sizes(number: int) -> int:
    """The least of 1 … 8, 10, 12, 14, 16, 20, 24, … that is not below `number`.

    A block of each size is a program, which takes seconds to compile: a fourth more datapoints at most
    is cheaper.
    """
    step = 1 << max(0, (number - 1).bit_length() - 3)
    return -(-number // step) * step


def map_datapoints(
    function: Callable[..., Any],
    key: Key,
    xs: Any,
    *args: Any,
    static: Mapping[str, Any] = MappingProxyType({}),
    block_size: int | None = None,
    indices: Any = None,
    progress: bool | str | Callable[[int, int], None] | None = None,
    warn: bool = True,
) -> Any:
    """function(fold_in(key, index), x, *args, **static) for every datapoint, in bounded memory.

    A datapoint's key depends on its index alone, so its result does not depend on the block it falls
    in, on the number of devices, or on which other datapoints are evaluated (of keys of jax's default,
    threefry; others, such as "rbg", draw otherwise under vmap). It compiles once, and
    not anew for equal partials of one function: what is bound to them are arguments.

    Args:
      function: (key, x, *args) -> any pytree; a function or a partial of it, a module. Defined once:
        a function defined anew compiles anew.
      key: of the whole data set.
      xs: a pytree of arrays [N, …]; numpy's go to the device block by block.
      *args: passed to every datapoint: parameters travel here, as arguments, in any pytree. It is
        compiled for a module's functions, sizes and truth values; those of your own go to `static`.
      static: passed to every datapoint by name, and compiled for: hashable values, of which equal
        ones compile once.
      block_size: datapoints at a time; None is 64 on a CPU, 1024 on an accelerator. Of fewer datapoints the
        block is as many, and up to a fourth more, so that few sizes are compiled. It is rounded up to a
        multiple of the number of devices, which share each block. A datapoint stays whole: where there
        are fewer than devices, the others compute copies. Sharing its chains would buy little, for 16
        take 2.3 times as long as 4 (100 temperatures on a CPU), and cost a word between devices at every
        transition of the pilot, which moves all chains by one step size.
      indices: [N], data set indices that key the datapoints; None is 0 … N−1.
      progress: True, or a word for what is done, draws a bar with the time left on stderr; or a
        function called after each block with (datapoints done, N).
      warn: of results that are not finite, by index.

    Returns:
      What `function` returns, each leaf with a leading [N], as numpy arrays. Where a block does not
      fit into memory it is halved, with a warning, and the numbers are the same.

    Raises:
      ValueError: xs is empty or its leaves disagree on N, block_size < 1, or indices that are not N
        integers from 0 to 2³² − 1.
      MemoryError: one datapoint a device does not fit into memory.
      TypeError: xs is a data set's; the function takes x before key; progress is none of these.

    Example:
      >>> def log_px(key, x, noise):
      ...     target = infsub.Target(None, lambda z: norm.logpdf(x, z, noise).sum(), latent_dim=1)
      ...     return infsub.ais(key, target).log_px
      >>> xs = jnp.zeros((3, 1))
      >>> infsub.map_datapoints(log_px, jax.random.key(0), xs, 1.0).shape
      (3,)
    """
    num_points = number_of(xs)
    indices = np.arange(num_points) if indices is None else np.asarray(indices)
    if indices.shape != (num_points,):
        raise ValueError(f"indices must have shape [N={num_points}]; got {indices.shape}")
    whole = np.issubdtype(indices.dtype, np.integer)  # a key is folded with 32 bits of each
    if not whole or indices.min() < 0 or indices.max() >= 2**32:
        raise ValueError(f"indices must be integers from 0 to 2³² − 1; got {indices}")
    if not (progress is None or isinstance(progress, bool | str) or callable(progress)):
        raise TypeError(
            "progress must be True, a word, or a function called with (datapoints done, N); got "
            f"{progress!r}"
        )
    if block_size is None:
        block_size = 64 if jax.default_backend() == "cpu" else 1024
    devices = jax.local_devices()
    block_size = min(positive_int("block_size", block_size), few_sizes(num_points))
    block_size = -(-block_size // len(devices)) * len(devices)
    mesh = jax.make_mesh((len(devices),), ("block",), axis_types=(AxisType.Auto,), devices=devices)
    sharding = NamedSharding(mesh, PartitionSpec("block"))

    program = Program(function, args, static)
    # What is committed to another device, such as a checkpoint's arrays, comes along.
    everywhere = NamedSharding(mesh, PartitionSpec())
    key, arrays = jax.tree.map(
        lambda a: jax.device_put(a, everywhere) if isinstance(a, jax.Array) else a,
        (key, program.arrays),
    )

    def run(*inputs: Any) -> Any:
        indices, xs = jax.device_put(inputs, sharding)
        return _block(program.code, key, indices, xs, arrays)

    bar = None
    if progress and not callable(progress):
        label = progress if isinstance(progress, str) else "datapoints"
        bar = files.Progress(num_points, label, unit="datapoint")
        bar.begin()
    results = []
    for start in range(0, num_points, block_size):
        # The last block is filled up with copies of its last datapoint: one shape, one compilation.
        chosen = np.minimum(np.arange(start, start + block_size), num_points - 1)
        # numpy's are cut on the host: on the device they would be copied there whole, each time.
        xs_block = jax.tree.map(lambda leaf, chosen=chosen: _rows(leaf, chosen), xs)
        try:
            result = _fitted(run, program.code, (indices[chosen], xs_block))
        except (TypeError, ValueError) as error:
            if not results and _swapped(program, key, xs):
                raise TypeError(
                    "function must take (key, x, …), the datapoint's key first; it takes (x, key, …)"
                ) from error
            raise
        stop = min(start + block_size, num_points)
        results.append(jax.tree.map(lambda leaf, n=stop - start: np.asarray(leaf)[:n], result))
        if bar is not None:
            bar.update(stop)
        elif callable(progress):
            progress(stop, num_points)
    if bar is not None:
        bar.close()
    result = jax.tree.map(lambda *blocks: np.concatenate(blocks), *results)
    if warn and (bad := indices[_not_finite(result, num_points)]).size:
        named = files.first_few(bad.tolist(), _NUM_NAMED)
        text = f"results are not finite at {bad.size} of {num_points} datapoints: {named}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return result


def _rows(leaf: Any, chosen: np.ndarray) -> Any:
    return leaf[chosen] if isinstance(leaf, jax.Array) else np.asarray(leaf)[chosen]
