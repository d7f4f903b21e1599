"""Prepare a data set in TFDS's format without TensorFlow.

    python -m infsub.data --prepare=NAME [--dir=DIR] [--source=URL or FOLDER]

The official files are downloaded to DIR/downloads/infsub/NAME, checked against the checksums TFDS
registers for them and unpacked with the standard library; a TFDS builder of ours with the name,
version, features, splits and example keys of TFDS's own then writes array_record files, so the
example order is TFDS's as well. TFDS's own builders would import TensorFlow to unpack and encode.

A download that was cut short goes on where it stopped; a preparation is written beside its place
and renamed into it at the end. One process does it, and another waits until it is done.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import signal
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from infsub import locks
from infsub.data import SOURCES, Arrays, data_folder, load
from infsub.files import on_terminal
from infsub.types import UserError

TIMEOUT = 20.0  # seconds without data
SLOWEST = 1024  # bytes a second, over TIMEOUT


class Original(NamedTuple):
    """An official file, with the size and sha256 TFDS registers for it."""

    name: str
    size: int
    sha256: str


class Recipe(NamedTuple):
    """How a set is made: its files at an address, its splits, and what TFDS says of it."""

    url: str
    files: tuple[Original, ...]
    splits: Callable[[dict[str, Path]], dict[str, Callable[[], Arrays]]]
    homepage: str
    label: dict[str, Any] | None = None  # arguments of TFDS's ClassLabel


def _idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    with gzip.open(path) as file:  # magic number, a 4-byte length for each axis, then the bytes
        return np.frombuffer(file.read(), np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _mnist(files: dict[str, Path]) -> dict[str, Callable[[], Arrays]]:
    def read(part: str) -> Arrays:
        images = _idx(files[f"{part}-images-idx3-ubyte.gz"], (-1, 28, 28))
        return images[..., None], _idx(files[f"{part}-labels-idx1-ubyte.gz"], (-1,))

    return {"train": lambda: read("train"), "test": lambda: read("t10k")}


def _binarized_mnist(files: dict[str, Path]) -> dict[str, Callable[[], Arrays]]:
    def read(part: str) -> Arrays:  # text: a line an image, "0 1 0 … 0\n"
        text = np.fromfile(files[f"binarized_mnist_{part}.amat"], np.uint8)
        return (text[::2] - ord("0")).reshape(-1, 28, 28, 1), None

    names = {"train": "train", "validation": "valid", "test": "test"}
    return {split: lambda part=part: read(part) for split, part in names.items()}


def _cifar10(files: dict[str, Path]) -> dict[str, Callable[[], Arrays]]:
    def read(batches: list[str]) -> Arrays:  # a record: the label, then the planes R, G, B
        with tarfile.open(files["cifar-10-binary.tar.gz"]) as archive:
            members = [archive.extractfile(f"cifar-10-batches-bin/{b}.bin") for b in batches]
            raw = b"".join(member.read() for member in members if member)
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]

    train = [f"data_batch_{i}" for i in range(1, 6)]
    return {"train": lambda: read(train), "test": lambda: read(["test_batch"])}


# Name, size in bytes and sha256 of each file.
MNIST_FILES = """
train-images-idx3-ubyte.gz 9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
train-labels-idx1-ubyte.gz 28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
t10k-images-idx3-ubyte.gz 1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
t10k-labels-idx1-ubyte.gz 4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
"""
FASHION_MNIST_FILES = """
train-images-idx3-ubyte.gz 26421880 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
train-labels-idx1-ubyte.gz 29515 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
t10k-images-idx3-ubyte.gz 4422102 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
t10k-labels-idx1-ubyte.gz 5148 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5
"""
BINARIZED_MNIST_FILES = """
binarized_mnist_train.amat 78400000 ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d
binarized_mnist_valid.amat 15680000 1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2
binarized_mnist_test.amat 15680000 e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c
"""
CIFAR10_FILES = """
cifar-10-binary.tar.gz 170052171 c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
"""
GARMENTS = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
OBJECTS = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"


def _originals(table: str) -> tuple[Original, ...]:
    rows = (line.split() for line in table.split("\n") if line)
    return tuple(Original(name, int(size), sha256) for name, size, sha256 in rows)


RECIPES = {
    "mnist": Recipe(
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        _originals(MNIST_FILES),
        _mnist,
        "http://yann.lecun.com/exdb/mnist/",
        {"num_classes": 10},
    ),
    "fashion_mnist": Recipe(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        _originals(FASHION_MNIST_FILES),
        _mnist,
        "https://github.com/zalandoresearch/fashion-mnist",
        {"names": GARMENTS.split(",")},
    ),
    "binarized_mnist": Recipe(
        "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist",
        _originals(BINARIZED_MNIST_FILES),
        _binarized_mnist,
        "http://www.dmi.usherb.ca/~larocheh/mlpython/_modules/datasets/binarized_mnist.html",
    ),
    "cifar10": Recipe(
        "https://www.cs.toronto.edu/~kriz",
        _originals(CIFAR10_FILES),
        _cifar10,
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        {"names": OBJECTS.split(",")},
    ),
}


def prepare(name: str, data_dir: str = "", source: str = "", timeout: float = TIMEOUT) -> Path:
    """Download, check and write a data set; the folder it is in. One that is there already stays.

    Args:
      name: a key of RECIPES.
      data_dir: TFDS's directory, as in `infsub.data.load`.
      source: where the official files are: the address of a mirror's folder, or a local folder;
        empty is the official address. Checksums must hold in any case.
      timeout: seconds without data after which a download is given up.

    Raises:
      UserError: an unknown name; a download, checksum or write that failed.
    """
    if name not in RECIPES:
        hint = "mnist5k is part of the package; " if name == "mnist5k" else ""
        raise UserError(f"{hint}--prepare must be one of {', '.join(RECIPES)}; got {name!r}.")
    root = data_folder(data_dir)
    folder = root / name / SOURCES[name].version
    if folder.exists():
        if not (folder / "dataset_info.json").is_file():
            raise UserError(
                f"{folder} is in the way: it holds no prepared data; move it elsewhere."
            )
        load(name, data_dir)  # says so if it is in another format
        print(f"{name} is already in {folder}.")
        return folder
    downloads = root / "downloads" / "infsub" / name
    try:
        # Of a local folder first: a mistake leaves nothing behind.
        files = _fetch(name, downloads, source, timeout) if _is_local(source) else None
        downloads.mkdir(parents=True, exist_ok=True)
        (downloads / ".preparation.lock").touch()  # or it cannot be written, in our own words
        with locks.owned(downloads, "preparation", math.inf):
            if not folder.exists():  # nobody who was waited for has made it
                _write(name, root, files or _fetch(name, downloads, source, timeout))
    except OSError as error:
        raise UserError(
            f"{name} cannot be written under {root}: {error.strerror or error}; give a directory "
            "that can hold it as --dir=DIR."
        ) from error
    print(f"{name} is in {folder}.")
    return folder


def _is_local(source: str) -> bool:
    return bool(source) and "://" not in source


def _fetch(name: str, downloads: Path, source: str, timeout: float) -> dict[str, Path]:
    """The checked official files by name; those of one set only, for sets share file names."""
    recipe = RECIPES[name]
    local = Path(os.path.expanduser(source)) if _is_local(source) else None
    files = {original.name: (local or downloads) / original.name for original in recipe.files}
    for original in recipe.files:
        path = files[original.name]
        if local is None and not path.exists():
            url = f"{(source or recipe.url).rstrip('/')}/{original.name}"
            _download(url, path, original, timeout)
        elif not path.is_file():
            wanted = ", ".join(files)
            raise UserError(
                f"{path} is not there: --source={source} must be a folder with {wanted}."
            )
        else:
            _check(path, original, f"{path}", "delete it, or give another --source=URL or FOLDER.")
    return files


def _check(path: Path, original: Original, place: str, remedy: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != original.sha256:
        raise UserError(
            f"{place} is not the official file: its sha256 is {digest} and {original.sha256} is "
            f"wanted; {remedy}"
        )


def _download(url: str, path: Path, original: Original, timeout: float) -> None:
    """`url` to `path`, going on from `path`.part if there is one."""
    part = path.with_name(path.name + ".part")
    again = "run the same command again to go on from there, or give --source=URL or FOLDER."
    if part.exists() and part.stat().st_size >= original.size:
        part.unlink()  # of a file that failed its checksum
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    size = start
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            resumed = response.status == 206
            size = start if resumed else 0
            with (
                part.open("ab" if resumed else "wb") as file,
                _progress(original.name, original.size, size, "B") as bar,
            ):
                for block in _blocks(response, timeout):
                    file.write(block)
                    bar.update(len(block))
                    size += len(block)
                    if size > original.size:
                        break  # not the file; its checksum says so
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(
            f"{url} answered {error.code} {error.reason}: give another --source=URL or FOLDER."
        ) from error
    except TimeoutError as error:
        raise UserError(
            f"{url} was too slow: under {SLOWEST} bytes a second for {timeout:g} s, after {size} of "
            f"{original.size} bytes; {again}"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url} cannot be read ({reason}) after {size} bytes; {again}") from error
    if size < original.size:
        raise UserError(f"{url} broke off after {size} of {original.size} bytes; {again}")
    try:
        _check(part, original, url, "run the same command to try again, or give another --source.")
    except UserError:
        part.unlink()
        raise
    os.replace(part, path)


def _blocks(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """What arrives, as it arrives; TimeoutError if it only trickles, URLError if it breaks."""
    start, received = time.monotonic(), 0
    while True:
        try:
            block = response.read1(1 << 16)
        except TimeoutError:
            raise
        except (OSError, http.client.HTTPException) as error:  # OSError alone would be the disk's
            raise urllib.error.URLError(error) from error
        if not block:
            return
        yield block
        received += len(block)
        if time.monotonic() - start > timeout:
            if received < SLOWEST * timeout:
                raise TimeoutError
            start, received = time.monotonic(), 0


def _progress(label: str, total: int, initial: int, unit: str) -> Any:
    """A bar on a terminal, one plain line elsewhere."""
    shown = on_terminal()
    if not shown:
        print(f"{label}: {total:,} {'bytes' if unit == 'B' else unit.strip()}", file=sys.stderr)
    scale: dict[str, Any] = {"unit": unit, "unit_scale": True}
    return tqdm(desc=label, total=total, initial=initial, disable=not shown, **scale)


def _write(name: str, root: Path, files: dict[str, Path]) -> None:
    import tensorflow_datasets as tfds
    from PIL import Image

    recipe, source = RECIPES[name], SOURCES[name]
    features: dict[str, Any] = {"image": tfds.features.Image(shape=source.image_shape)}
    if name == "cifar10":
        features["id"] = tfds.features.Text()
    if recipe.label:
        features["label"] = tfds.features.ClassLabel(**recipe.label)

    def examples(split: str, read: Callable[[], Arrays]) -> Iterator[tuple[int, dict[str, Any]]]:
        images, labels = read()
        with _progress(f"{name} {split}", len(images), 0, " images") as bar:
            for index, image in enumerate(images):  # the key, which TFDS hashes for its order
                example: dict[str, Any] = {"image": Image.fromarray(image.squeeze())}
                if name == "cifar10":
                    example["id"] = f"{split}_{index:05d}"
                if labels is not None:
                    example["label"] = int(labels[index])
                yield index, example
                bar.update()

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(source.version)

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label") if recipe.label else None,
                homepage=recipe.homepage,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: examples(split, read) for split, read in recipe.splits(files).items()}

        def _generate_examples(self) -> Any:
            raise NotImplementedError  # abstract in TFDS; the splits bring their own

    Builder.name = name
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its talk of a download
            Builder(data_dir=root, file_format="array_record").download_and_prepare()
    finally:
        logging.set_verbosity(verbosity)


def main(argv: list[str] | None = None) -> None:
    """The command line; a user's mistake is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m infsub.data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--prepare", metavar="NAME", required=True, help=", ".join(RECIPES))
    parser.add_argument("--dir", default="", help="TFDS's directory (~/tensorflow_datasets)")
    parser.add_argument("--source", default="", help="a mirror's address, or a folder of the files")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds without data")
    flags = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary folders go
    try:
        prepare(flags.prepare, flags.dir, flags.source, flags.timeout)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
