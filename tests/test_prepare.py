"""Preparing a data set, from files as the official ones are, over real HTTP on loopback."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import importlib.resources
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest

from infsub import data, locks
from infsub.data import prepare
from infsub.types import UserError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def mnist_files(train, test):
    parts = {"train": train, "t10k": test}
    return {
        f"{part}-{what}": idx(array)
        for part, (images, labels) in parts.items()
        for what, array in (
            ("images-idx3-ubyte.gz", images[..., 0]),
            ("labels-idx1-ubyte.gz", labels),
        )
    }


def cifar_files(train, test):
    def batch(images, labels):
        return np.c_[labels, images.transpose(0, 3, 1, 2).reshape(len(images), -1)].tobytes()

    images, labels = train
    batches = {f"data_batch_{i + 1}": batch(images[i::5], labels[i::5]) for i in range(5)}
    batches["test_batch"] = batch(*test)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, raw in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return {"cifar-10-binary.tar.gz": buffer.getvalue()}


def amat_files(**parts):
    return {
        f"binarized_mnist_{part}.amat": "".join(
            " ".join(map(str, image.reshape(-1))) + "\n" for image in images
        ).encode()
        for part, images in parts.items()
    }


def random_set(num, shape=(28, 28, 1), top=256):
    images = RNG.integers(0, top, (num, *shape)).astype(np.uint8)
    return images, RNG.integers(0, 10, num).astype(np.uint8)


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A function that makes small files the official ones of a set; the folder they are in."""

    def register(name, files):
        folder = tmp_path / "originals" / name
        folder.mkdir(parents=True)
        for file, raw in files.items():
            (folder / file).write_bytes(raw)
        originals = tuple(
            prepare.Original(o.name, len(files[o.name]), hashlib.sha256(files[o.name]).hexdigest())
            for o in prepare.RECIPES[name].files
        )
        recipe = prepare.RECIPES[name]._replace(files=originals)
        monkeypatch.setitem(prepare.RECIPES, name, recipe)
        return folder

    return register


def tfds_order(split, num):
    """TFDS's order: by the md5 of the split's name and the example's key."""
    return sorted(range(num), key=lambda i: hashlib.md5(f"{split}{i}".encode()).hexdigest())


def test_registered_checksums_are_those_of_the_installed_tfds():
    root = importlib.resources.files("tensorflow_datasets")
    for name, recipe in prepare.RECIPES.items():
        for table in (f"url_checksums/{name}.txt", f"datasets/{name}/checksums.tsv"):
            if root.joinpath(table).is_file():
                registered = root.joinpath(table).read_text()
                break
        for original in recipe.files:
            row = f"{recipe.url}/{original.name}\t{original.size}\t{original.sha256}"
            assert row in registered


@pytest.mark.parametrize("name", ["mnist", "binarized_mnist", "cifar10"])
def test_a_prepared_set_holds_the_official_images_in_tfds_order(name, official, tmp_path, capsys):
    import tensorflow_datasets as tfds

    sizes = {"train": 50, "test": 20}
    shape, top = ((32, 32, 3) if name == "cifar10" else (28, 28, 1)), 256
    if name == "binarized_mnist":
        sizes["validation"], top = 30, 2
    sets = {split: random_set(num, shape, top) for split, num in sizes.items()}
    if name == "cifar10":  # five batch files, one after the other
        order = np.concatenate([np.arange(i, 50, 5) for i in range(5)])
        files = cifar_files(sets["train"], sets["test"])
        sets["train"] = tuple(a[order] for a in sets["train"])
    elif name == "mnist":
        files = mnist_files(sets["train"], sets["test"])
    else:
        files = amat_files(**{s.replace("validation", "valid"): a[0] for s, a in sets.items()})
    prepare.prepare(name, str(tmp_path / "tfds"), source=str(official(name, files)))
    for split, (images, labels) in sets.items():
        source = tfds.data_source(name, split=split, data_dir=tmp_path / "tfds")
        examples = source.__getitems__(range(len(source)))
        order = tfds_order(split, len(images))
        np.testing.assert_array_equal([e["image"] for e in examples], images[order])
        if name != "binarized_mnist":
            assert [e["label"] for e in examples] == labels[order].tolist()
        if name == "cifar10":
            assert [e["id"].decode() for e in examples] == [f"{split}_{i:05d}" for i in order]
    prepared = data.load(name, str(tmp_path / "tfds"))
    assert prepared.train.size == (50 if "validation" in sizes else 45)
    assert "50" in capsys.readouterr().err  # plain lines where there is no terminal

    start = time.monotonic()
    prepare.prepare(name, str(tmp_path / "tfds"), source="http://127.0.0.1:1/")  # nothing to do
    assert time.monotonic() - start < 2
    assert "already" in capsys.readouterr().out


def test_undoing_the_order_of_a_set_written_by_tfds_gives_its_official_beginning(shared_dir):
    tfds_dir = str(shared_dir / "data" / "tfds")
    labels = data.load("mnist", tfds_dir).test.labels
    official_order = np.empty(10000, int)
    official_order[tfds_order("test", 10000)] = labels
    assert official_order[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_features_are_those_of_tfds_own_builders(shared_dir, official, tmp_path):
    tfds_dir = shared_dir / "data" / "tfds"
    files = {
        "mnist": mnist_files(random_set(20), random_set(10)),
        "fashion_mnist": mnist_files(random_set(20), random_set(10)),
        "cifar10": cifar_files(random_set(20, (32, 32, 3)), random_set(10, (32, 32, 3))),
    }
    for name, originals in files.items():
        folder = prepare.prepare(name, str(tmp_path), source=str(official(name, originals)))
        theirs = tfds_dir / name / folder.name
        assert (folder / "features.json").read_text() == (theirs / "features.json").read_text()
        tables = {f.name: f.read_text() for f in theirs.glob("*.labels.txt")}
        assert {f.name: f.read_text() for f in folder.glob("*.labels.txt")} == tables


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder; the first part of the address says what goes wrong."""

    def do_GET(self):
        server = self.server
        _, mode, name = self.path.split("/")
        raw = (server.folder / name).read_bytes()
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        server.requests.append((mode, name, start))
        if mode == "missing":
            self.send_error(404)
            return
        if mode == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        if mode == "wrong":
            raw = bytes(len(raw))
        if mode == "norange":
            start = 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(raw) - start))
        self.end_headers()
        if mode in ("stall", "trickle", "short"):
            self.wfile.write(raw[start : start + 100])
            self.wfile.flush()
            sent, end = start + 100, time.monotonic() + 5
            while mode != "short" and time.monotonic() < end and not server.stop.wait(0.05):
                if mode == "trickle":
                    self.wfile.write(raw[sent : sent + 1])
                    sent += 1
            return
        self.wfile.write(raw[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(official):
    folder = official("mnist", mnist_files(random_set(30), random_set(10)))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.folder, httpd.requests, httpd.stop = folder, [], threading.Event()
        httpd.handle_error = lambda *_: None  # the client goes away in some tests
        httpd.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield httpd
        httpd.stop.set()
        httpd.shutdown()
        thread.join()


def test_download_over_http_and_files_of_two_sets_with_the_same_names(server, official, tmp_path):
    fashion = official("fashion_mnist", mnist_files(random_set(30), random_set(10)))
    prepare.prepare("mnist", str(tmp_path), source=f"{server.url}/ok/")
    server.folder = fashion
    prepare.prepare("fashion_mnist", str(tmp_path), source=f"{server.url}/ok")
    a, b = (data.load(name, str(tmp_path)) for name in ("mnist", "fashion_mnist"))
    assert (np.asarray(a.test.images.values) != np.asarray(b.test.images.values)).any()
    assert not list((tmp_path / "downloads").rglob("*.part"))


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("stall", r"too slow.* 0.5 s, after 100 of \d+ bytes; run the same command again"),
        ("trickle", r"too slow: under 1024 bytes a second for 0.5 s"),
        ("short", r"broke off after 100 of \d+ bytes; run the same command again"),
        ("wrong", r"is not the official file: its sha256 is \w{64} and \w{64} is wanted"),
        ("reset", r"cannot be read \(.*reset.*\) after 0 bytes; run the same command again"),
        ("missing", r"answered 404 Not Found: give another --source"),
    ],
)
def test_a_failed_download_is_a_sentence_within_seconds_and_leaves_nothing_that_is_read(
    mode, words, server, tmp_path
):
    start = time.monotonic()
    with pytest.raises(UserError, match=words) as error:
        prepare.prepare("mnist", str(tmp_path), source=f"{server.url}/{mode}", timeout=0.5)
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--prepare=mnist"):
        data.load("mnist", str(tmp_path))
    server.stop.set()

    prepare.prepare("mnist", str(tmp_path), source=f"{server.url}/ok")  # and it recovers
    assert data.load("mnist", str(tmp_path)).test.size == 10
    resumed = next(start for mode, _, start in server.requests if mode == "ok")
    if mode in ("stall", "short"):
        assert resumed == 100
    elif mode == "trickle":
        assert resumed > 100
    else:
        assert resumed == 0


def test_of_two_at_once_the_second_waits_and_finds_it_done(server, tmp_path, monkeypatch):
    said, written, failed = [], [], []
    waits, write = threading.Event(), prepare._write

    def write_slowly(name, *given):
        written.append(name)
        waits.wait(20)
        write(name, *given)

    monkeypatch.setattr(locks, "POLL", 0.05)
    monkeypatch.setattr(locks, "say", lambda text: (said.append(text), waits.set()))
    monkeypatch.setattr(prepare, "_write", write_slowly)

    def run():
        try:
            prepare.prepare("mnist", str(tmp_path), source=f"{server.url}/ok")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert written == ["mnist"]
    wanted = sorted(original.name for original in prepare.RECIPES["mnist"].files)
    assert sorted(name for _, name, _ in server.requests) == wanted  # each of them once
    assert len(said) == 1
    assert re.match("waiting, for the preparation of .* is held by ", said[0])  # and by whom
    assert data.load("mnist", str(tmp_path)).test.size == 10


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    with pytest.raises(UserError, match="broke off"):
        prepare.prepare("mnist", str(tmp_path), source=f"{server.url}/short")
    prepare.prepare("mnist", str(tmp_path), source=f"{server.url}/norange")
    assert data.load("mnist", str(tmp_path)).test.size == 10


def test_refused_connections_and_unknown_addresses(tmp_path):
    for source in ("http://127.0.0.1:9", "nowhere://x", "http://"):
        start = time.monotonic()
        with pytest.raises(UserError, match="cannot be read"):
            prepare.prepare("mnist", str(tmp_path), source=source, timeout=1)
        assert time.monotonic() - start < 3


def test_a_folder_with_missing_or_changed_files(server, tmp_path):
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is not there"):
        prepare.prepare("mnist", str(tmp_path / "tfds"), source=str(tmp_path / "empty"))
    changed = server.folder / "t10k-labels-idx1-ubyte.gz"
    changed.write_bytes(b"not it")
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is not the official"):
        prepare.prepare("mnist", str(tmp_path / "tfds"), source=str(server.folder))
    assert changed.read_bytes() == b"not it"
    assert not (tmp_path / "tfds").exists()


IN_ANOTHER_PROCESS = """
import os, sys
from infsub import data
from infsub.data import prepare
from PIL import Image
folder, source, files = sys.argv[1], sys.argv[2], eval(sys.argv[3])
files = tuple(prepare.Original(*file) for file in files)
prepare.RECIPES["mnist"] = prepare.RECIPES["mnist"]._replace(files=files)
"""
KILLED = """
count = 0
def fromarray(array, make=Image.fromarray):
    global count
    count += 1
    return os._exit(9) if count == 5 else make(array)
Image.fromarray = fromarray
prepare.prepare("mnist", folder, source=source)
"""
ALIVE = """
prepare.prepare("mnist", folder, source=source)
assert data.load("mnist", folder).test.size == 10
"""


def run_python(code, folder, source):
    """Runs `code` where TensorFlow is installed but ends the process with 7 when imported."""
    poison = folder / "poison" / "tensorflow" / "__init__.py"
    poison.parent.mkdir(parents=True)
    poison.write_text("import os; os._exit(7)")
    path = os.pathsep.join([str(poison.parent.parent), os.environ.get("PYTHONPATH", "")])
    files = [tuple(original) for original in prepare.RECIPES["mnist"].files]
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS + code, str(folder), str(source)]
    environ = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        [*command, repr(files)], capture_output=True, text=True, timeout=60, env=environ
    )


def test_a_killed_preparation_leaves_nothing_that_is_read(server, tmp_path):
    run = run_python(KILLED, tmp_path, server.folder)
    assert run.returncode == 9, run.stderr
    assert list((tmp_path / "mnist").iterdir())  # the half-made folder, of another name
    with pytest.raises(UserError, match="--prepare=mnist"):
        data.load("mnist", str(tmp_path))
    prepare.prepare("mnist", str(tmp_path), source=str(server.folder))
    assert data.load("mnist", str(tmp_path)).test.size == 10


def test_an_unwritable_place_and_a_folder_in_the_way(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--dir=DIR"):
        prepare.prepare("mnist", str(tmp_path / "file"), source=str(server.folder))
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    with pytest.raises(UserError, match="in the way"):
        prepare.prepare("mnist", str(tmp_path), source=str(server.folder))


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"must be one of mnist, fashion_mnist, .*'mnits'"):
        prepare.prepare("mnits", str(tmp_path))
    with pytest.raises(UserError, match="mnist5k is part of the package"):
        prepare.prepare("mnist5k", str(tmp_path))


def test_the_command_line_ends_with_one_sentence_and_exit_code_2(tmp_path):
    flags = ["--prepare=mnist", f"--dir={tmp_path}", "--source=http://127.0.0.1:9"]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "infsub.data", *flags],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("error: http://127.0.0.1:9/train-images-idx3-ubyte.gz cannot be")
    assert run.stderr.count("\n") == 1


def test_writing_and_reading_import_no_tensorflow(server, tmp_path):
    run = run_python(ALIVE, tmp_path, server.folder)
    assert run.returncode == 0, run.stderr
