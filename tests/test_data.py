from __future__ import annotations

import hashlib
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infsub import data
from infsub.types import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "infsub"


def all_images(split):
    return np.asarray(data.batch(split.images, jnp.arange(split.size), jax.random.key(0)))


def test_mnist5k_is_balanced_disjoint_and_thresholded_at_one_half():
    digits = data.load("mnist5k")
    path = Path(data.__file__).parents[1] / "assets" / "mnist5k.npz"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest in path.with_name("README.md").read_text()
    grey = np.load(path)["images"]
    start = 0
    for split, size in ((digits.train, 4000), (digits.validation, 500), (digits.test, 500)):
        assert split.size == size
        assert np.bincount(split.labels).tolist() == [size // 10] * 10
        np.testing.assert_array_equal(all_images(split), grey[start : start + size] / 255 >= 0.5)
        start += size
    assert len({image.tobytes() for image in grey}) == 5000


def test_binary_images_are_packed_and_batch_is_jittable():
    train = data.load("mnist5k").train
    assert train.images.values.shape == (4000, 98)
    rows = jnp.array([3, 1, 3999, 3])
    x = jax.jit(data.batch)(train.images, rows)
    assert x.shape == (4, 28, 28, 1)
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, all_images(train)[np.asarray(rows)])


def test_dynamic_binarisation_is_a_function_of_key_and_row_with_the_grey_levels_as_means():
    train = data.load("mnist5k", binarisation="dynamic").train
    rows = jnp.arange(5)
    key, other = jax.random.split(jax.random.key(1))
    x = data.batch(train.images, rows, key)
    np.testing.assert_array_equal(x, jax.jit(data.batch)(train.images, rows, key))
    np.testing.assert_array_equal(x[3:4], data.batch(train.images, rows[3:4], key))
    assert (x != data.batch(train.images, rows, other)).any()
    assert set(np.unique(x)) == {0.0, 1.0}
    draws = jax.vmap(lambda k: data.batch(train.images, rows, k))(jax.random.split(key, 500))
    grey = train.images.values[rows] / 255.0
    z = (draws.mean(0) - grey) / jnp.sqrt(jnp.maximum(grey * (1 - grey), 1e-3) / 500)
    assert jnp.abs(z).max() < 5
    with pytest.raises(ValueError, match="needs a key"):
        data.batch(train.images, rows)


def test_levels_split_the_grey_scale_evenly():
    eight = all_images(data.load("mnist5k", levels=8).test)
    full = all_images(data.load("mnist5k", levels=256).test)
    np.testing.assert_array_equal(eight, np.floor(full / 32))
    assert eight.max() == 7
    assert full.max() == 255


def test_identity_tells_apart_what_differs_and_nothing_else():
    options = [{}, {"binarisation": "dynamic"}, {"levels": 8}, {"levels": 4}]
    assert len({data.load("mnist5k", **o).identity for o in options}) == len(options)
    assert data.load("mnist5k").identity == data.load("mnist5k", data_dir="elsewhere").identity


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "mnits"}, "one of mnist5k, mnist, .*'mnits'"),
        ({"name": "mnist5k", "binarisation": "dynamical"}, "threshold or dynamic; got 'dynamical'"),
        ({"name": "mnist5k", "levels": 3}, "power of two from 2 to 256 for mnist5k; got 3"),
        ({"name": "binarized_mnist", "levels": 8}, "must be 2 for binarized_mnist; got 8"),
        ({"name": "binarized_mnist", "binarisation": "dynamic"}, "binary already"),
        ({"name": "mnist5k", "binarisation": "dynamic", "levels": 8}, "needs data.levels=2"),
    ],
)
def test_a_wrong_option_is_one_sentence(arguments, words):
    with pytest.raises(UserError, match=words):
        data.load(**arguments)


def test_subsets():
    test = data.load("mnist5k").test
    assert data.subset(test, first=7).tolist() == list(range(7))
    rows = data.subset(test, per_class=10)
    assert np.bincount(test.labels[rows]).tolist() == [10] * 10
    assert (np.diff(rows) > 0).all()
    shuffled = test._replace(labels=np.array([1, 1, 0, 1, 0, 0], np.uint8), size=6)
    assert data.subset(shuffled, per_class=2).tolist() == [0, 1, 2, 4]
    for wrong in (
        {"first": 501},
        {"first": 0},
        {"per_class": 51},
        {"per_class": 0},
        {},
        {"first": 1, "per_class": 1},
    ):
        with pytest.raises(UserError):
            data.subset(test, **wrong)
    with pytest.raises(UserError, match="no labels"):
        data.subset(test._replace(labels=None), per_class=1)
    with pytest.raises(UserError, match="'dev'"):
        data.load("mnist5k").split("dev")


def test_a_missing_set_names_the_directory_and_the_remedy_at_once(tmp_path, monkeypatch):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        data.load("mnist", str(tmp_path))
    assert time.monotonic() - start < 2
    assert str(tmp_path / "mnist" / "3.0.1") in str(error.value)
    assert f"python -m infsub.data --prepare=mnist --dir={tmp_path}" in str(error.value)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "other"))
    with pytest.raises(UserError, match=str(tmp_path / "other")):
        data.load("mnist")
