"""Data sets: read once, kept on the device, images of a batch made inside jit.

`mnist5k` is shipped in the package. `mnist`, `fashion_mnist`, `binarized_mnist` and `cifar10` are
read from tensorflow-datasets' directories (array_record), in TFDS's own example order; reading
imports no TensorFlow and never touches the network. `python -m infsub.data --prepare=NAME` makes
such a directory. Decoded arrays are kept in $XDG_CACHE_HOME/infsub (~/.cache/infsub).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from infsub.files import cache_folder, checksum, read_json, write_bytes
from infsub.types import Array, Key, UserError

Arrays = tuple[np.ndarray, np.ndarray | None]  # images uint8 [N, H, W, C], labels uint8 [N]


class Source(NamedTuple):
    """What a data set is called in TFDS's directories, and what its images look like."""

    version: str
    image_shape: tuple[int, int, int]
    pixel_levels: int = 256


SOURCES = {
    "mnist5k": Source("1.0.0", (28, 28, 1)),
    "mnist": Source("3.0.1", (28, 28, 1)),
    "fashion_mnist": Source("3.0.1", (28, 28, 1)),
    "binarized_mnist": Source("1.0.0", (28, 28, 1), pixel_levels=2),
    "cifar10": Source("3.0.2", (32, 32, 3)),
}
SPLITS = ("train", "validation", "test")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Images:
    """A split's images on the device.

    Attributes:
      values: uint8; "bits": [N, ceil(X / 8)], eight pixels a byte; otherwise [N, H, W, C].
      coding: "bits"; "dynamic": grey levels 0–255, drawn anew each time; "levels": 0 … levels − 1.
      image_shape: (H, W, C).
    """

    values: Array
    coding: str = field(metadata={"static": True})
    image_shape: tuple[int, int, int] = field(metadata={"static": True})


class Split(NamedTuple):
    """One part of a data set.

    Attributes:
      images: a pytree on the device, for `batch`.
      labels: uint8 [N] on the host, or None where the data set has none.
      size: N.

    `split[:10]` is the first ten datapoints' images, float32 [10, H, W, C], and `split[[3, 5]]` two.
    """

    images: Images
    labels: np.ndarray | None
    size: int

    def __getitem__(self, rows: Any) -> Array:
        """The images of some rows, as `batch`. Raises IndexError, ValueError for dynamic ones."""
        if self.images.coding == "dynamic":
            raise ValueError(
                "dynamically binarised images are drawn: infsub.data.batch(split.images, rows, key)"
            )
        indices = np.arange(self.size)[rows]
        return batch(self.images, jnp.asarray(np.atleast_1d(indices)))

    def __repr__(self) -> str:
        height, width, channels = self.images.image_shape
        labels = "no labels" if self.labels is None else f"{len(np.unique(self.labels))} classes"
        return f"<{self.size} images [{height}, {width}, {channels}], {labels}>"


@dataclass(frozen=True)
class Dataset:
    """A data set whose splits are read when first asked for.

    Attributes:
      name: a key of SOURCES.
      image_shape: (H, W, C).
      levels: values a pixel takes, 0 … levels − 1; 2 is binary.
      identity: a hash of what the images are: name, version, split ranges, binarisation, levels.
    """

    name: str
    image_shape: tuple[int, int, int]
    levels: int
    identity: str
    _coding: str
    _ranges: dict[str, tuple[str, int, int]]  # split -> official split, first row, end
    _read: Callable[[str], Arrays]
    _splits: dict[str, Split] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{split} {size}" for split, size in self.sizes.items())
        return f"<{self.name}: images {list(self.image_shape)} of {self.levels} levels; {sizes}>"

    @property
    def sizes(self) -> dict[str, int]:
        """{split: number of its datapoints}, for which nothing is read."""
        return {split: end - start for split, (_, start, end) in self._ranges.items()}

    @property
    def train(self) -> Split:
        """The training split."""
        return self.split("train")

    @property
    def validation(self) -> Split:
        """The validation split: every choice (early stopping, model, step) is made on it."""
        return self.split("validation")

    @property
    def test(self) -> Split:
        """The official test split (mnist5k: rows training never sees)."""
        return self.split("test")

    def split(self, name: str) -> Split:
        """The split called `name`. Raises UserError for an unknown name or a damaged file."""
        if name not in self._ranges:
            raise UserError(f"split must be one of {', '.join(SPLITS)}; got {name!r}.")
        if name not in self._splits:
            official = self._ranges[name][0]
            images, labels = self._read(official)
            for other, (source, start, end) in self._ranges.items():
                if source == official:  # train and validation come from one decoding
                    rows = slice(start, end)
                    self._splits[other] = Split(
                        self._encode(images[rows]),
                        None if labels is None else labels[rows],
                        end - start,
                    )
        return self._splits[name]

    def _encode(self, images: np.ndarray) -> Images:
        depth = SOURCES[self.name].pixel_levels
        if self._coding != "dynamic":
            images = images // np.uint8(depth // self.levels)
        if self._coding == "bits":
            images = np.packbits(images.reshape(len(images), -1), axis=1)
        return Images(jnp.asarray(images), self._coding, self.image_shape)


def load(
    name: str, data_dir: str = "", binarisation: str = "threshold", levels: int = 2
) -> Dataset:
    """The data set `name`; a fast look at its directory, the images are read when first used.

    Validation is the official one for binarized_mnist, else the last 5,000 training examples (the
    last tenth of a training set under 50,000) in TFDS's order.

    Args:
      name: a key of SOURCES.
      data_dir: TFDS's directory; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
        mnist5k needs none.
      binarisation: "threshold" (a pixel is 1 from grey level 128 on, its mean at least 0.5) or
        "dynamic" (x ~ Bernoulli(grey / 255), anew at each `batch`).
      levels: values a pixel takes, a power of two; above 2: floor(grey · levels / 256).

    Raises:
      UserError: an unknown name or option; a data set that is not in the directory.
    """
    if name not in SOURCES:
        raise UserError(f"data.name must be one of {', '.join(SOURCES)}; got {name!r}.")
    source = SOURCES[name]
    if binarisation not in ("threshold", "dynamic"):
        raise UserError(f"data.binarisation must be threshold or dynamic; got {binarisation!r}.")
    if levels not in (2, 4, 8, 16, 32, 64, 128, 256) or levels > source.pixel_levels:
        wanted = "2" if source.pixel_levels == 2 else "a power of two from 2 to 256"
        raise UserError(f"data.levels must be {wanted} for {name}; got {levels!r}.")
    if binarisation == "dynamic" and (levels > 2 or source.pixel_levels == 2):
        reason = "its images are binary already" if levels == 2 else "that needs data.levels=2"
        raise UserError(
            f"data.binarisation=dynamic does not fit {name} with {levels} levels: {reason}."
        )
    if name == "mnist5k":
        ranges = {"train": ("", 0, 4000), "validation": ("", 4000, 4500), "test": ("", 4500, 5000)}
        read = _read_mnist5k
    else:
        folder = _prepared_folder(name, data_dir)
        ranges = _ranges(folder)
        read = partial(_read_cached, name, folder)

    what = [name, source.version, sorted(ranges.items()), binarisation, levels]
    identity = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    binary = "dynamic" if binarisation == "dynamic" else "bits"
    coding = binary if levels == 2 else "levels"
    return Dataset(name, source.image_shape, levels, identity, coding, ranges, read)


def load_config(section: Any) -> Dataset:
    """`load` by a config's fields of data: name, dir, binarisation, levels."""
    return load(section.name, section.dir, section.binarisation, section.levels)


@jax.jit
def batch(images: Images, indices: Array, key: Key | None = None) -> Array:
    """The images of the rows `indices`, float32 [B, H, W, C] with values 0 … levels − 1.

    Dynamic binarisation draws x ~ Bernoulli(grey / 255) with fold_in(key, row), so a row's draw
    does not depend on the batch it is in. Jittable; `images` is an argument, never a constant.

    Args:
      images: of a split.
      indices: [B] rows of the split.
      key: for dynamic binarisation only: one for each epoch.

    Raises:
      ValueError: dynamic binarisation without a key.
    """
    rows = images.values[indices]
    match images.coding:
        case "bits":
            bits = jnp.unpackbits(rows, axis=1, count=int(np.prod(images.image_shape)))
            return bits.reshape(-1, *images.image_shape).astype(jnp.float32)
        case "dynamic":
            if key is None:
                raise ValueError("a dynamically binarised batch needs a key; got None")

            def draw(index: Array, grey: Array) -> Array:
                return jax.random.bernoulli(
                    jax.random.fold_in(key, index), grey.astype(jnp.float32) / 255
                )

            return jax.vmap(draw)(indices, rows).astype(jnp.float32)
        case _:
            return rows.astype(jnp.float32)


def subset(split: Split, first: int | None = None, per_class: int | None = None) -> np.ndarray:
    """Rows of a split, ascending [n]: the first n, or the first n of each class.

    A label that is None or NaN is of no class.

    Raises:
      UserError: not exactly one of the two is given; fewer than n rows; per_class without labels.
    """
    if (first is None) == (per_class is None):
        raise UserError(f"give one of first and per_class; got {first!r} and {per_class!r}.")
    if first is not None:
        if not 1 <= first <= split.size:
            raise UserError(
                f"the first n of {split.size} datapoints needs 1 ≤ n ≤ {split.size}; got {first}."
            )
        return np.arange(first)
    if split.labels is None:
        raise UserError("this data set has no labels, so no per-class subset: ask for the first n.")
    known = [label is not None and label == label for label in split.labels.tolist()]  # NaN is not
    names = np.where(known, split.labels.astype(str), "")
    rows = [np.flatnonzero(known & (names == name)) for name in np.unique(names[known])]
    if not rows:
        raise UserError(
            "no datapoint here has a label, so no per-class subset: ask for the first n."
        )
    fewest = min(map(len, rows))
    if per_class is None or not 1 <= per_class <= fewest:
        raise UserError(
            f"per_class must be 1 to {fewest}, the smallest class here; got {per_class}."
        )
    return np.sort(np.concatenate([row[:per_class] for row in rows]))


def data_folder(data_dir: str) -> Path:
    """The directory TFDS would use: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(os.path.expanduser(folder))  # where there is no such home, it stays as it is


def _read_mnist5k(split: str) -> Arrays:
    with (
        importlib.resources.files("infsub").joinpath("assets/mnist5k.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        return arrays["images"], arrays["labels"]


def _prepared_folder(name: str, data_dir: str) -> Path:
    folder = data_folder(data_dir) / name / SOURCES[name].version
    command = f"python -m infsub.data --prepare={name} --dir={data_folder(data_dir)}"
    if not (folder / "dataset_info.json").is_file():
        raise UserError(
            f"{name} is not in {folder}: prepare it with `{command}`, give the directory that has "
            "it as --config.data.dir=DIR, or use --config.data.name=mnist5k, which needs no files."
        )
    info = read_json(folder / "dataset_info.json") or {}
    if info.get("fileFormat") != "array_record":
        raise UserError(
            f"{folder} is in TFDS's {info.get('fileFormat', 'tfrecord')} format, and array_record "
            f"is wanted: `{command}` with another --dir makes one."
        )
    return folder


def _ranges(folder: Path) -> dict[str, tuple[str, int, int]]:
    info = read_json(folder / "dataset_info.json") or {}
    try:
        sizes = {s["name"]: sum(map(int, s["shardLengths"])) for s in info["splits"]}
        if not sizes.keys() >= {"train", "test"}:
            raise KeyError("train, test")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'dataset_info.json'} names no sizes of splits: delete {folder} and prepare it anew "
            f"with `python -m infsub.data --prepare={folder.parent.name} --dir={folder.parent.parent}`."
        ) from error
    ranges = {split: (split, 0, sizes[split]) for split in SPLITS if split in sizes}
    if "validation" not in sizes:
        end = sizes["train"]
        start = end - min(5000, end // 10)
        ranges |= {"train": ("train", 0, start), "validation": ("train", start, end)}
    return ranges


def _read_cached(name: str, folder: Path, split: str) -> Arrays:
    """The decoded arrays, from the cache if the files are those it was made from."""
    files = sorted(folder.glob(f"{name}-{split}.array_record*"))
    stamp = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    digest = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:16]
    kept = f"{name}-{folder.name}-{split}-{digest}.npz"
    try:
        with (cache_folder() / kept).open("rb") as file, np.load(file) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        if str(found.pop("sha256")) == checksum(found).hex():
            return found["images"], found.get("labels")
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        pass  # not there, or not what was written: it is made anew
    images, labels = _decode(folder, split)
    # A cache that cannot be written costs time, not correctness.
    with contextlib.suppress(OSError, RuntimeError):
        arrays = {"images": images} if labels is None else {"images": images, "labels": labels}
        content = io.BytesIO()  # not compressed: it is read at every start
        named: Any = arrays | {"sha256": np.array(checksum(arrays).hex())}
        np.savez(content, **named)
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_bytes(cache_folder() / kept, content.getvalue())
    return images, labels


def _decode(folder: Path, split: str) -> Arrays:
    import tensorflow_datasets as tfds

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # TFDS's advice to install OpenCV
    try:
        builder = tfds.builder_from_directory(folder)
        source = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
        examples = source.__getitems__(range(len(source)))
    except Exception as error:  # array_record and TFDS raise many kinds for a damaged file
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(
            f"{folder} cannot be read ({reason}): delete it and prepare it anew with `python -m "
            f"infsub.data --prepare={folder.parent.name} --dir={folder.parent.parent}`."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    images = np.stack([example["image"] for example in examples])
    if "label" not in examples[0]:
        return images, None
    return images, np.asarray([example["label"] for example in examples], np.uint8)
