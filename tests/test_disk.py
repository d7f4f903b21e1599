"""A full disk is one sentence; with room made, the same command ends as if it had never been full."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path

import pytest
from forks import commands

from infsub import files
from infsub.types import UserError

CONFIG = f"--config={Path(__file__).parent / 'tiny.py'}"
TINY = [
    "--config.train.num_epochs=3",
    "--config.evaluate.per_class=0",
    "--config.evaluate.first=40",
]
TINY += ["--config.evaluate.elbo_samples=5", "--config.evaluate.iwae_samples=5"]
TINY += ["--config.evaluate.ais.num_chains=2", "--config.evaluate.ais.num_temperatures=2"]
TINY += ["--config.evaluate.block_size=4", "--config.evaluate.local.families=()"]
RECORDS = ("metrics.jsonl", "summary.json", "rows.jsonl", "table.csv")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    with commands(tmp_path_factory.mktemp("forks")) as command:
        yield command


@pytest.fixture
def disk(tmp_path):
    """disk(size) is a folder of its own disk, which has so many KiB in all; again: it gets others."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        again = "remount," if folder.is_mount() else ""
        options = f"{again}size={size}k"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount a disk ({done.stderr.decode().strip()})")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    answer = command(CONFIG, f"--workdir={workdir}", *TINY)
    assert answer["code"] == 0, answer["log"]
    return workdir


@pytest.mark.slow
@pytest.mark.thorough
# In the records, in the first checkpoint, in later ones, in a picture, in the rows, in the figures.
@pytest.mark.parametrize("free", [0.02, 0.1, 0.3, 0.6, 0.9, 0.97])
def test_a_full_disk_is_a_sentence_and_loses_nothing(command, whole, disk, free):
    size = sum(path.stat().st_blocks for path in whole.rglob("*")) // 2
    workdir = disk(round(free * size)) / "run"
    arguments = [CONFIG, f"--workdir={workdir}", *TINY]
    for _ in range(2):  # the second finds it as full
        answer = command(*arguments)
        assert answer["code"] == 1, answer["log"]
        assert "Traceback" not in answer["log"], answer["log"]
        last = answer["log"].strip().splitlines()[-1]
        assert last.startswith(f"infsub: no space is left for {workdir}: "), answer["log"]
        rows = files.read_rows(workdir / "rows.jsonl")
        assert rows == files.read_rows(whole / "rows.jsonl")[: len(rows)]
    disk(16 * size)
    answer = command(*arguments)
    assert answer["code"] == 0, answer["log"]
    for name in RECORDS:
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_says_that_a_disk_is_full(number):
    full = OSError(number, "no room")
    assert files.is_full(full)
    told = UserError("a report")
    told.__cause__ = full
    assert files.is_full(told)
    assert files.is_full(ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device"))
    assert not files.is_full(OSError(errno.EACCES, "no right"))
    assert not files.is_full(None)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_aside(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    files.append_rows(path, [{"index": 1}])

    def full(self, content):
        self.write_text("torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        files.rewrite_rows(path, [{"index": 2}])
    assert files.read_rows(path) == [{"index": 1}]
    assert list(tmp_path.iterdir()) == [path]
