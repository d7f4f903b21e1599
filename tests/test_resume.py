"""A run that is killed at any moment, and continued, ends with the very bytes of one that is not."""

from __future__ import annotations

import glob
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from forks import Command, commands

from infsub import checkpoints, data, files, records
from infsub import config as configs
from infsub.types import UserError

HERE = Path(__file__).parent
FILES = ("metrics.jsonl", "metrics.csv", "summary.json", "samples.png", "reconstructions.png")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """command(workdir, *arguments, kill=…) trains the tiny config: {"code": …, "log": …}."""
    with commands(tmp_path_factory.mktemp("forks")) as command:

        def train(workdir: Path, *arguments: str, **kill: Any) -> dict[str, Any]:
            config = f"--config={HERE / 'tiny.py'}"
            return command("--mode=train", config, f"--workdir={workdir}", *arguments, **kill)

        yield train


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    result = command(workdir)
    assert result["code"] == 0, result["log"]
    return workdir


def contents(workdir: Path) -> dict[str, Any]:
    """All that must be the same: the records' bytes, and every array of the newest checkpoint."""
    files = {name: (workdir / name).read_bytes() for name in FILES}
    step = checkpoints.steps(workdir / "checkpoints")[-1]
    arrays = checkpoints.read_arrays(workdir / "checkpoints" / f"{step:08d}")
    return files | {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


def assert_same(workdir: Path, whole: Path) -> None:
    one, other = contents(workdir), contents(whole)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_killed_many_times_it_ends_bit_identical(
    command: Command, whole: Path, tmp_path: Path, seed: int
) -> None:
    moments, metrics = random.Random(seed), tmp_path / "metrics.jsonl"
    writing = str(tmp_path / "checkpoints/*.orbax-checkpoint-tmp*")
    kinds = ["starting"] * 2 + ["after a row"] * 9 + ["writing"] * 3
    moments.shuffle(kinds)
    num_killed = num_torn = num_ahead = 0
    for kind in kinds:
        if kind == "starting":
            kill = {"seconds": moments.uniform(0, 2)}
        elif kind == "writing":
            kill = {"seconds": moments.uniform(0, 0.02), "glob": writing}
        else:
            lines = len(files.read_rows(metrics)) + 1
            kill = {"seconds": moments.uniform(0, 0.2), "glob": str(metrics), "lines": lines}
        result = command(tmp_path, kill=kill | {"signal": signal.SIGKILL})
        num_killed += result["code"] == -signal.SIGKILL
        num_torn += bool(glob.glob(writing))
        steps, rows = checkpoints.steps(tmp_path / "checkpoints"), files.read_rows(metrics)
        num_ahead += bool(rows) and rows[-1]["step"] > max(steps, default=0)
    result = command(tmp_path)
    assert result["code"] == 0, result["log"]
    assert_same(tmp_path, whole)
    # The test tested something.
    assert num_killed >= 10
    assert num_torn >= 1
    assert num_ahead >= 1  # the records were ahead of the checkpoint, and were taken back


def test_truncated_checkpoint_falls_back_and_says_so(
    command: Command, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    steps = checkpoints.steps(tmp_path / "checkpoints")
    assert len(steps) > 2
    newest = tmp_path / "checkpoints" / f"{steps[-1]:08d}"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    shutil.copytree(newest, newest.with_suffix(".damaged"))  # not for the first time
    flipped = tmp_path / "checkpoints" / f"{steps[-2]:08d}"
    largest = max(flipped.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1  # what orbax itself does not notice
    largest.write_bytes(content)

    result = command(tmp_path)
    assert result["code"] == 0
    assert result["log"].count("falling back") == 2
    assert f"continuing from step {steps[-3]} " in result["log"]
    assert_same(tmp_path, whole)


def test_a_stop_request_saves_and_exits(command: Command, whole: Path, tmp_path: Path) -> None:
    """As does the next one, of the run that went on."""
    arguments = ["--config.train.checkpoint_seconds=1000"]  # no part of the run's identity
    stopped: list[int] = []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        kill = {"signal": number, "seconds": 0.02, "glob": str(tmp_path / "progress.json")}
        result = command(tmp_path, *arguments, kill=kill)
        assert result["code"] == code, result["log"]
        assert "the same command continues" in result["log"]
        assert "Traceback" not in result["log"]
        assert all(f"continuing from step {step} " in result["log"] for step in stopped[-1:])
        progress = files.read_json(tmp_path / "progress.json")
        assert max(stopped, default=0) < progress["done"] < progress["total"]
        stopped.append(progress["done"])
        assert checkpoints.steps(tmp_path / "checkpoints") == stopped
        late = progress["seconds_tracing"] + 1000
        files.write_json(tmp_path / "progress.json", progress | {"seconds_tracing": late})
    result = command(tmp_path, *arguments)
    assert f"continuing from step {stopped[-1]} " in result["log"]
    spent = records.spent(files.read_json(tmp_path / "progress.json"))
    assert 2000 < spent.tracing < spent.seconds < 3000  # of all processes
    assert_same(tmp_path, whole)


@pytest.mark.slow
def test_seeds_are_resumed_together(command: Command, tmp_path: Path) -> None:
    arguments = ["--config.train.num_seeds=2", "--config.train.num_epochs=3"]
    assert command(tmp_path / "whole", *arguments)["code"] == 0
    whole_checkpoint = str(tmp_path / "run/seed_1/checkpoints" / ("[0-9]" * 8))
    kill = {"signal": signal.SIGKILL, "seconds": 0.1, "glob": whole_checkpoint}
    assert command(tmp_path / "run", *arguments, kill=kill)["code"] == -signal.SIGKILL
    assert "continuing" in command(tmp_path / "run", *arguments)["log"]
    for seed in ("seed_0", "seed_1"):
        assert_same(tmp_path / "run" / seed, tmp_path / "whole" / seed)


@pytest.mark.slow
def test_resume_keeps_batch_statistics(command: Command, tmp_path: Path) -> None:
    arguments = ["--config.train.num_epochs=3"]
    for part in ("encoder", "decoder"):
        arguments += [f"--config.model.{part}.kind=conv", f"--config.model.{part}.hidden=(2,2,2)"]
    result = command(tmp_path / "whole", *arguments)
    assert result["code"] == 0, result["log"]
    run = tmp_path / "run"
    kill = {"signal": signal.SIGKILL, "seconds": 0, "glob": str(run / "metrics.jsonl"), "lines": 2}
    assert command(run, *arguments, kill=kill)["code"] == -signal.SIGKILL
    assert "continuing" in command(run, *arguments)["log"]
    names = [name for name in contents(run) if "batch_stats" in name]
    assert len(names) >= 8  # means and variances of both networks, also of the best checkpoint
    assert_same(run, tmp_path / "whole")


def test_a_finished_run_is_left_alone(command: Command, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    before.pop(whole / "config.json")
    result = command(whole)
    assert result["code"] == 0
    assert "done" in result["log"]
    after = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    after.pop(whole / "config.json")
    assert before == after


def test_a_checkpoint_of_another_run_is_refused(
    command: Command, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    run = files.read_json(whole / "config.json")
    files.write_json(tmp_path / "config.json", run | {"identity": "of another"})
    with pytest.raises(UserError, match="is a checkpoint of run"):
        checkpoints.load_variables(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(whole / "checkpoints", other / "checkpoints")
    shutil.copy(whole / "config.json", other)
    result = command(other, "--config.seed=1")  # its identity is another, so it is refused before
    assert result["code"] == 2
    config = tiny.get_config()
    config.seed, config.train.num_epochs = 1, 1
    config = configs.resolve(config)
    facts = {name: run[name] for name in ("image_shape", "levels", "steps_per_epoch")}
    claimed = tmp_path / "claimed"
    records.claim(config, claimed, data.load_config(config.data).identity, "", **facts)
    shutil.copy(claimed / "config.json", other)
    result = command(other, "--config.seed=1", "--config.train.num_epochs=1")
    assert result["code"] == 2
    assert "another run" in result["log"]
    assert "Traceback" not in result["log"]


def test_load_variables_finds_what_was_kept(whole: Path) -> None:
    last, last_step = checkpoints.load_variables(whole, "last")
    best, best_step = checkpoints.load_variables(whole)
    summary = files.read_json(whole / "summary.json")
    assert last_step == summary["step"]
    assert best_step == summary["best_step"]
    rows = files.read_rows(whole / "metrics.jsonl")
    assert summary["best_value"] == max(row["validation_elbo"] for row in rows)
    kernels = [v["encoder"]["params"]["Dense_0"]["kernel"] for v in (last, best)]
    assert np.array_equal(*kernels) == (best_step == last_step)
