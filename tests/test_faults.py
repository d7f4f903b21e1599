"""One round of `make faults`: a run and its shards killed in every phase, and two starts at once."""

from __future__ import annotations

import random
import signal

import faults
import pytest
from forks import commands

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    with commands(tmp_path_factory.mktemp("forks")) as command:
        yield command


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    answer = command(*faults.ARGUMENTS, f"--workdir={workdir}")
    assert answer["code"] == 0, answer["log"]
    return workdir


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["evaluating", "certifying", "reporting"])
def test_every_phase_ends_with_the_code_that_schedulers_start_again(
    command, whole, tmp_path, phase, number
):
    """The training is there; what comes after it is stopped as soon as it has written something."""
    workdir = tmp_path / "run"
    faults.copy_of_the_training(whole, workdir)
    pattern, _ = faults.PHASES[phase]
    due = {"signal": int(number), "seconds": 0, "glob": str(workdir / pattern), "lines": 1}
    answer = command(*faults.ARGUMENTS, f"--workdir={workdir}", kill=due)
    assert answer["code"] == 128 + number, answer["log"]
    last = answer["log"].strip().splitlines()[-1]
    assert last == "infsub: stopped; all that was finished is kept, the same command continues."
    found = faults.Found()
    assert command(*faults.ARGUMENTS, f"--workdir={workdir}")["code"] == 0
    faults.compare(workdir, whole, True, found)
    assert found.wrong == []


@pytest.mark.parametrize("kind", [faults.one_run, faults.shards_of_one])
def test_nothing_is_lost(command, whole, tmp_path, kind):
    found = faults.Found()
    kind(command, tmp_path / "run", whole, random.Random(1), found)
    assert found.wrong == []
    assert sum(found.kills.values()) >= 5


@pytest.mark.parametrize("shard", [False, True])
def test_two_at_once(command, whole, tmp_path, shard):
    found = faults.Found()
    with commands(tmp_path) as other:
        faults.at_once([command, other], tmp_path / "run", whole, found, shard)
    assert found.wrong == []
