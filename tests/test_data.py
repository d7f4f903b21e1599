from __future__ import annotations

import hashlib
import os
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


@pytest.fixture
def small(tmp_path):
    """A directory with a mnist of 20 + 10 images, written by TFDS."""
    import tensorflow_datasets as tfds
    from PIL import Image

    rng = np.random.default_rng(0)

    def examples(num):
        for i in range(num):
            image = Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8))
            yield i, {"image": image, "label": i % 10}

    class Mnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.1")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": examples(20), "test": examples(10)}

        def _generate_examples(self):
            raise NotImplementedError

    Mnist.name = "mnist"
    Mnist(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    return tmp_path / "tfds"


def all_images(split):
    return np.asarray(data.batch(split.images, np.arange(split.size), jax.random.key(0)))


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
    rows = np.array([3, 1, 3999, 3])
    x = jax.jit(data.batch)(train.images, rows)
    assert x.shape == (4, 28, 28, 1)
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x, all_images(train)[rows])


def test_dynamic_binarisation_is_a_function_of_key_and_row_with_the_grey_levels_as_means():
    train = data.load("mnist5k", binarisation="dynamic").train
    batch, rows = data.batch, np.arange(5)
    key, other = map(jax.random.key, (1, 2))
    x = np.asarray(batch(train.images, rows, key))
    np.testing.assert_array_equal(x, batch(train.images, rows, key))
    np.testing.assert_array_equal(x[3:4], batch(train.images, rows[3:4], key))
    assert (x != batch(train.images, rows, other)).any()
    assert set(np.unique(x)) == {0.0, 1.0}
    draws = jax.vmap(batch, (None, None, 0))(train.images, rows, jax.random.split(key, 500))
    grey = np.asarray(train.images.values)[:5] / 255
    z = (np.mean(draws, 0) - grey) / np.sqrt(np.maximum(grey * (1 - grey), 1e-3) / 500)
    assert np.abs(z).max() < 5
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


@pytest.mark.parametrize(
    ("name", "sizes", "mean"),
    [
        ("binarized_mnist", (50000, 10000, 10000), 0.132512),
        ("mnist", (55000, 5000, 10000), 33.7912),
        ("fashion_mnist", (55000, 5000, 10000), 73.1466),
    ],
)
def test_exact_sets_have_their_published_sizes_and_pixel_means(name, sizes, mean, shared_dir):
    levels = 2 if name == "binarized_mnist" else 256
    test = data.load(name, str(shared_dir / "data" / "tfds"), levels=levels).test
    np.testing.assert_allclose(all_images(test).mean(dtype=np.float64), mean, rtol=2e-6)
    binary = data.load(name, str(shared_dir / "data" / "tfds"))
    assert tuple(binary._ranges[s][2] - binary._ranges[s][1] for s in data.SPLITS) == sizes


def test_cifar_has_three_binary_channels_or_eight_levels_and_a_validation_split(shared_dir):
    tfds_dir = str(shared_dir / "data" / "tfds")
    binary, eight = (data.load("cifar10", tfds_dir, levels=levels) for levels in (2, 8))
    assert binary.identity != eight.identity
    x, y = all_images(binary.test), all_images(eight.test)
    assert x.shape == (10000, 32, 32, 3)
    assert binary.test.images.values.shape == (10000, 384)
    np.testing.assert_array_equal(x, y >= 4)
    levels = y.astype(np.uint8)
    np.testing.assert_array_equal(levels, y)
    assert np.flatnonzero(np.bincount(levels.ravel())).tolist() == list(range(8))
    start, end = binary._ranges["validation"][1:]
    assert binary._ranges["train"] == ("train", 0, start)
    assert end - start == min(5000, end // 10)


def test_decoded_arrays_are_kept_and_a_changed_or_torn_cache_is_not_believed(
    small, cache, monkeypatch
):
    first = data.load("mnist", str(small)).test
    kept = list(cache.iterdir())
    assert [f.suffix for f in kept] == [".npz"]

    def never(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", never)
        np.testing.assert_array_equal(
            all_images(data.load("mnist", str(small)).test), all_images(first)
        )
    kept[0].write_bytes(kept[0].read_bytes()[:1000])
    np.testing.assert_array_equal(
        all_images(data.load("mnist", str(small)).test), all_images(first)
    )
    with np.load(kept[0]) as arrays:  # a whole file of the right shapes, and of other pixels
        zeros = {name: arrays[name] for name in arrays.files}
    zeros["images"] = np.zeros_like(zeros["images"])
    np.savez(kept[0], **zeros)
    np.testing.assert_array_equal(
        all_images(data.load("mnist", str(small)).test), all_images(first)
    )
    shard = next((small / "mnist" / "3.0.1").glob("mnist-test*"))
    os.utime(shard, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", never)
        with pytest.raises(AssertionError, match="decoded again"):
            data.load("mnist", str(small)).split("test")


def test_no_cache_is_no_error(small, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert data.load("mnist", str(small)).test.size == 10

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert data.load("mnist", str(small)).test.size == 10


def test_train_and_validation_are_apart(small):
    images, labels = data._decode(small / "mnist" / "3.0.1", "train")
    mnist = data.load("mnist", str(small), levels=256)
    np.testing.assert_array_equal(all_images(mnist.train), images[:18])
    np.testing.assert_array_equal(all_images(mnist.validation), images[18:])
    np.testing.assert_array_equal(mnist.validation.labels, labels[18:])


def test_a_damaged_file_and_a_foreign_format_are_one_sentence(small):
    folder = small / "mnist" / "3.0.1"
    shard = next(folder.glob("mnist-test*"))
    shard.write_bytes(shard.read_bytes()[:-70000])
    with pytest.raises(UserError, match=r"cannot be read .* delete it and prepare it anew"):
        data.load("mnist", str(small)).split("test")
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        data.load("mnist", str(small)).split("test")
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="tfrecord format, and array_record is wanted"):
        data.load("mnist", str(small))


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


def test_a_data_set_is_short_in_print_and_its_rows_are_images():
    dataset = data.load("mnist5k")
    assert repr(dataset) == (
        "<mnist5k: images [28, 28, 1] of 2 levels; train 4000, validation 500, test 500>"
    )
    assert repr(dataset.test) == "<500 images [28, 28, 1], 10 classes>"
    assert repr(dataset.test._replace(labels=None)) == "<500 images [28, 28, 1], no labels>"
    images = dataset.train.images
    for rows in (slice(10), [3, 5], np.arange(4000) < 7, -1):
        want = data.batch(images, np.atleast_1d(np.arange(4000)[rows]))
        np.testing.assert_array_equal(dataset.train[rows], want)
    with pytest.raises(
        ValueError, match=r"are drawn: infsub.data.batch\(split.images, rows, key\)"
    ):
        data.load("mnist5k", binarisation="dynamic").train[:10]
    with pytest.raises(IndexError):
        dataset.train[4000]
