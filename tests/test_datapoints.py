"""map_datapoints: a datapoint's result depends on its index alone."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from models import linear_gaussian

import infsub
from infsub import datapoints
from infsub.types import Gaussian, Target

MODEL = linear_gaussian(4, 8)
XS = jax.vmap(MODEL.simulate)(jax.random.split(jax.random.key(0), 23))[1]


def point(key, x, model):
    q = model.best_gaussian(x)
    return infsub.ais(key, model.target(x), q, 4, 10, 3, step_size=0.3)  # no pilot to compile


@pytest.fixture(scope="module")
def whole():
    return infsub.map_datapoints(point, jax.random.key(1), XS, MODEL, block_size=1000)


@pytest.mark.parametrize("block_size", [1, 5])
def test_blocks_do_not_change_results(whole, block_size):
    blocks = infsub.map_datapoints(point, jax.random.key(1), XS, MODEL, block_size=block_size)
    assert blocks.log_px.shape == (23,)
    # other shapes round differently in the last bits; nothing else may differ
    np.testing.assert_allclose(blocks.log_px, whole.log_px, atol=2e-4)
    np.testing.assert_allclose(blocks.log_weights, whole.log_weights, atol=1e-3)


def test_a_subset_gives_the_same_rows(whole):
    chosen = np.array([20, 3, 11])
    rows = infsub.map_datapoints(
        point, jax.random.key(1), XS[chosen], MODEL, block_size=2, indices=chosen
    )
    np.testing.assert_allclose(rows.log_px, whole.log_px[chosen], atol=2e-4)


def test_all_blocks_share_one_compilation():
    traces, done = [], []

    def counted(key, x, scale):
        traces.append(1)
        return scale * jnp.sum(x)

    for scale in (1.0, 2.0):
        infsub.map_datapoints(
            counted,
            jax.random.key(0),
            XS,
            jnp.asarray(scale),
            block_size=4,
            progress=lambda n, total: done.append((n, total)),
        )
    assert len(traces) == 1
    assert done == [(n, 23) for n in (4, 8, 12, 16, 20, 23)] * 2


@pytest.mark.slow
def test_few_sizes_are_compiled():
    traces = []

    def seen(key, x):
        traces.append(1)
        return x.sum()

    for number in (13, 14, 10):
        got = infsub.map_datapoints(seen, jax.random.key(0), XS[:number])
        np.testing.assert_allclose(got, XS[:number].sum(1), rtol=1e-6)
    assert len(traces) == 2  # for 13 and 14, and for 10
    sizes = [datapoints.few_sizes(n) for n in range(1, 1001)]
    assert sizes[:20] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20, 20, 20, 20]
    assert all(n <= size <= 1.25 * n for n, size in enumerate(sizes, 1))
    assert all(datapoints.few_sizes(size) == size for size in sizes)


def test_equal_static_values_share_one_compilation():
    traces = []

    def scaled(key, x, offset, *, scale, powers):
        traces.append(1)
        return offset + scale * jnp.sum(x) ** powers[0]

    for scale in (2.0, 2.0, 3.0):
        static = {"scale": scale, "powers": (1, 2)}
        got = infsub.map_datapoints(scaled, jax.random.key(0), XS, 1.0, static=static)
        np.testing.assert_allclose(got, 1 + scale * XS.sum(axis=1), rtol=1e-5)
    assert len(traces) == 2


def test_several_devices_give_the_same_numbers(whole, tmp_path):
    """And share each block: one that they do not divide, a ragged one, of fewer datapoints than devices."""
    script = tmp_path / "devices.py"
    script.write_text(
        "import jax, numpy as np, sys\n"
        "from test_datapoints import XS, MODEL, point\n"
        "import infsub\n"
        "from infsub import datapoints\n"
        "assert jax.device_count() == 4\n"
        "block = datapoints._block\n"
        "def shared(*arguments):\n"
        "    result = block(*arguments)\n"
        "    for leaf in (*arguments[2:4], result.log_px, result.log_weights):\n"
        "        parts = [part.data.shape[0] for part in leaf.addressable_shards]\n"
        "        assert parts == 4 * [leaf.shape[0] // 4], leaf.sharding\n"
        "    return result\n"
        "datapoints._block = shared\n"
        "def mapped(xs, size):\n"
        "    return infsub.map_datapoints(point, jax.random.key(1), xs, MODEL, block_size=size).log_px\n"
        "ragged = mapped(XS, 5)\n"
        "MODEL = jax.device_put(MODEL, jax.devices()[1])\n"  # as a checkpoint is restored
        "np.savez(sys.argv[1], ragged=ragged, few=mapped(XS[:3], 8))\n"
    )
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out.npz")],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with np.load(tmp_path / "out.npz") as found:
        for name, size in (("ragged", 23), ("few", 3)):
            np.testing.assert_allclose(found[name], whole.log_px[:size], atol=2e-4)


def with_memory_for(size, monkeypatch):
    """A device that runs out of memory beyond so many datapoints; the sizes that it ran."""
    block, ran = datapoints._block, []

    def limited(*arguments):
        ran.append(arguments[-3].shape[0])
        if ran[-1] > size:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
            )
        return block(*arguments)

    monkeypatch.setattr(datapoints, "_block", limited)
    monkeypatch.setattr(datapoints, "_FITTED", {})
    return ran


@pytest.mark.parametrize("size", [1, 2, 5])
def test_out_of_memory_halves_the_block_and_goes_on_with_the_same_numbers(whole, monkeypatch, size):
    ran = with_memory_for(size, monkeypatch)
    told = r"out of memory with \d+ datapoints at a time: going on with"
    with pytest.warns(RuntimeWarning, match=told) as warned:
        halved = infsub.map_datapoints(point, jax.random.key(1), XS, MODEL, block_size=10)
    np.testing.assert_allclose(halved.log_px, whole.log_px, atol=2e-4)
    np.testing.assert_allclose(halved.log_weights, whole.log_weights, atol=1e-3)
    tried = [n for n in ran if n > size]
    assert tried == sorted(set(tried), reverse=True)  # each once; later blocks are halved at once
    assert len(warned) == len(tried)
    ran.clear()
    infsub.map_datapoints(point, jax.random.key(1), XS, MODEL, block_size=10)
    assert max(ran) <= size  # nor in a later call


def test_a_datapoint_that_never_fits_is_a_sentence(monkeypatch):
    with_memory_for(0, monkeypatch)
    with (
        pytest.warns(RuntimeWarning, match="out of memory with"),
        pytest.raises(MemoryError, match="one datapoint does not fit into the device's memory"),
    ):
        infsub.map_datapoints(point, jax.random.key(1), XS, MODEL, block_size=4)


def test_an_error_of_another_kind_is_left_as_it_is(monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    monkeypatch.setattr(datapoints, "_block", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        infsub.map_datapoints(point, jax.random.key(1), XS, MODEL)


def test_one_bad_datapoint_leaves_the_others_alone():
    """A likelihood that is NaN for some x: their estimates are NaN, every other bit is unchanged."""

    def log_likelihood(x, z):
        return jnp.where(x[0] > 0, jnp.nan, 1.0) * -jnp.sum((x - z) ** 2)

    def estimates(key, x):
        target = Target(None, Partial(log_likelihood, x), 2)
        q = Gaussian(x, jnp.ones(2))
        return (
            infsub.elbo(key, target, q, 10).log_px,
            infsub.iwae(key, target, q, 10).log_px,
            infsub.ais(key, target, q, 4, 5, 2).log_px,
        )

    good = -jnp.abs(jax.random.normal(jax.random.key(0), (8, 2)))
    bad = good.at[jnp.array([2, 5]), 0].set(3.0)
    want = infsub.map_datapoints(estimates, jax.random.key(0), good)
    with pytest.warns(RuntimeWarning, match="not finite at 2 of 8 datapoints: 2, 5"):
        got = infsub.map_datapoints(estimates, jax.random.key(0), bad)
    for before, after in zip(want, got, strict=True):
        assert set(np.flatnonzero(~np.isfinite(after))) == {2, 5}
        np.testing.assert_array_equal(np.delete(after, [2, 5]), np.delete(before, [2, 5]))


def test_a_pytree_of_data():
    xs = {"a": np.arange(5.0), "b": (np.arange(10).reshape(5, 2),)}
    out = infsub.map_datapoints(
        lambda key, x: x["a"] + x["b"][0].sum(), jax.random.key(0), xs, block_size=2
    )
    np.testing.assert_allclose(out, xs["a"] + xs["b"][0].sum(1))


@pytest.mark.parametrize(
    ("xs", "options", "message"),
    [
        ((np.zeros(3), np.zeros(4)), {}, r"one common N ≥ 1; got shapes \[\(3,\), \(4,\)\]"),
        (np.zeros((0, 2)), {}, "one common N ≥ 1"),
        (np.zeros(3), {"block_size": 0}, "block_size must be a positive integer; got 0"),
        (np.zeros(3), {"indices": np.arange(2)}, r"indices must have shape \[N=3\]"),
        (np.zeros(2), {"indices": np.array([0.1, 0.2])}, r"integers from 0 to 2³² − 1; got \[0.1"),
        (np.zeros(2), {"indices": np.array([1, 1 + 2**32])}, "integers from 0 to 2³² − 1"),
        (np.zeros(2), {"indices": np.array(["a", "b"])}, "integers from 0 to 2³² − 1"),
    ],
)
def test_bad_arguments_are_named(xs, options, message):
    with pytest.raises(ValueError, match=message):
        infsub.map_datapoints(lambda key, x: x, jax.random.key(0), xs, **options)


class Layer(NamedTuple):
    """A module as Equinox's: arrays, a function, a size and a truth value, all leaves of one pytree."""

    weight: jax.Array
    activation: Any
    repeats: int
    training: bool

    def __call__(self, x):
        if self.training:
            raise ValueError("in training")
        for _ in range(self.repeats):
            x = self.activation(self.weight @ x)
        return x


def test_modules_travel_and_are_compiled_for_what_is_no_array():
    traces = []

    def applied(key, x, layer):
        traces.append(1)
        return layer(x)

    weight = jnp.eye(8)
    for scale, repeats in ((1.0, 1), (2.0, 1), (2.0, 2)):
        layer = Layer(scale * weight, jnp.tanh, repeats, False)
        got = infsub.map_datapoints(applied, jax.random.key(0), XS, layer)
        np.testing.assert_allclose(got, jax.vmap(layer)(XS), rtol=1e-5)
    assert len(traces) == 2  # another weight compiles nothing anew, another size does
    # A module is a function too.
    as_function = infsub.map_datapoints(lambda key, x, f: f(x), jax.random.key(0), XS, layer)
    np.testing.assert_array_equal(as_function, got)


def test_equal_partials_share_one_compilation():
    traces = []

    def scaled(power, key, x, offset, *, scale):
        traces.append(1)
        return offset + scale * jnp.sum(x) ** power

    for scale in (2.0, 3.0):
        for made in (functools.partial, Partial):
            function = functools.partial(made(scaled, 2), scale=jnp.asarray(scale))
            got = infsub.map_datapoints(function, jax.random.key(0), XS, 1.0)
            np.testing.assert_allclose(got, 1 + scale * XS.sum(1) ** 2, rtol=1e-5)
    assert len(traces) == 1


def test_numpy_goes_to_the_device_block_by_block(monkeypatch):
    sizes = []
    put = jax.device_put

    def noting(x, *where):
        sizes.extend([x[1].shape] if isinstance(x, tuple) else [])  # (indices, xs); else the key
        return put(x, *where)

    monkeypatch.setattr(jax, "device_put", noting)
    xs = np.asarray(XS)
    got = infsub.map_datapoints(lambda key, x: x.sum(), jax.random.key(0), xs, block_size=5)
    assert set(sizes) == {(5, 8)}
    np.testing.assert_allclose(got, xs.sum(1), rtol=1e-5)


def test_a_bar_speaks_before_the_program_is_compiled(capsys):
    said = []

    def seen(key, x):
        said.append(capsys.readouterr().err)  # while it is traced
        return x.sum()

    infsub.map_datapoints(seen, jax.random.key(0), XS, block_size=10, progress="counting")
    assert said == ["counting: 23 datapoints, compiling\n"]
    assert "counting: 23/23 datapoints" in capsys.readouterr().err
    infsub.map_datapoints(seen, jax.random.key(0), XS, progress=True)
    assert "datapoints: 23/23" in capsys.readouterr().err


def test_results_that_are_not_finite_are_named_by_index():
    def broken(key, x):
        return jnp.where(x[0] > 0, jnp.nan, x[1])

    bad = np.flatnonzero(XS[:, 0] > 0) + 100
    with pytest.warns(
        RuntimeWarning, match=rf"not finite at {bad.size} of 23 datapoints: {bad[0]}, "
    ):
        infsub.map_datapoints(broken, jax.random.key(0), XS, indices=np.arange(100, 123))
    infsub.map_datapoints(broken, jax.random.key(0), XS, warn=False)
    with pytest.warns(RuntimeWarning, match=rf"not finite at {bad.size} of 23 datapoints"):
        infsub.map_datapoints(
            lambda key, x: broken(key, x).astype("bfloat16"), jax.random.key(0), XS
        )
    # What does not apply to an estimate is NaN, and says nothing.
    infsub.map_datapoints(
        lambda key, x: infsub.elbo(key, MODEL.target(x), MODEL.best_gaussian(x)),
        jax.random.key(0),
        XS,
    )


def test_mistakes_are_told_in_a_sentence():
    dataset = infsub.data.load("mnist5k")
    key = jax.random.key(0)

    def swapped(x, key):
        return jnp.sum(x) + jax.random.normal(key)

    with pytest.raises(TypeError, match=r"must take \(key, x, …\).*it takes \(x, key, …\)"):
        infsub.map_datapoints(swapped, key, XS)
    with pytest.raises(TypeError, match="incompatible shapes"):  # no other mistake is taken for it
        infsub.map_datapoints(lambda key, x: x + jnp.zeros(3), key, XS)
    for packed in (dataset, dataset.test, dataset.test.images):
        with pytest.raises(
            TypeError, match=r"packed: take some of them, such as dataset.test\[:100\]"
        ):
            infsub.map_datapoints(swapped, key, packed)
    with pytest.raises(TypeError, match="progress must be True, a word"):
        infsub.map_datapoints(swapped, key, XS, progress=3)  # pyright: ignore
