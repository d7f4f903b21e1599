"""Two real processes over loopback train as one, whichever of them is stopped or killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from forks import commands

from infsub import checkpoints, files, locks, processes, shards
from infsub.processes import Team
from infsub.shards import WHOLE, Shard
from infsub.types import UserError

HERE = Path(__file__).parent
SLURM = {"SLURM_JOB_ID": "4097", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}
URI = "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"  # job 373920


def nodes(text: str, **others: str) -> dict[str, str]:
    return SLURM | {"SLURM_STEP_NODELIST": text} | others


TEAMS = {
    "nothing": ("", WHOLE, {}, None),
    "shards that need not talk": ("", Shard(1, 2), {}, None),
    "flags": ("node7:1234", Shard(1, 2), {}, Team(Shard(1, 2), "node7:1234")),
    "an address": ("[::1]:1234", Shard(0, 3), {}, Team(Shard(0, 3), "[::1]:1234")),
    "SLURM": ("", WHOLE, nodes("node001"), Team(Shard(1, 2), "node001:61441", "slurm", "1")),
    "SLURM's list": ("", WHOLE, nodes("n,m[1-2]"), Team(Shard(1, 2), "n:61441", "slurm", "1")),
    "SLURM's range": (
        "",
        WHOLE,
        nodes("a-[007,9],b"),
        Team(Shard(1, 2), "a-007:61441", "slurm", "1"),
    ),
    "SLURM, one task": ("", WHOLE, nodes("n", SLURM_NTASKS="1", SLURM_PROCID="0"), None),
    "SLURM, a GPU a task": (
        "",
        WHOLE,
        nodes("n", CUDA_VISIBLE_DEVICES="0"),
        Team(Shard(1, 2), "n:61441", "slurm"),
    ),
    "SLURM, the shell of salloc": ("", WHOLE, nodes("n", SLURM_STEP_NUM_TASKS="1"), None),
    "SLURM, outside of srun": ("", WHOLE, SLURM, None),
    "SLURM, told better": ("a:1", WHOLE, nodes("n"), Team(Shard(1, 2), "a:1", "slurm", "1")),
    "SLURM, but shards": ("", Shard(0, 8), nodes("n"), None),
    "Open MPI": (
        "",
        WHOLE,
        MPI | {"OMPI_MCA_orte_hnp_uri": URI},
        Team(Shard(3, 4), f"10.96.0.1:{61440 + 373920 % 4096}", "ompi"),
    ),
    "Open MPI 6": (
        "",
        WHOLE,
        MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,fe80::2]:3"},
        Team(Shard(3, 4), "[fe80::1]:61441", "ompi"),
    ),
    "Open MPI 5": ("a:1", WHOLE, MPI, Team(Shard(3, 4), "a:1")),
    "Open MPI on GPUs": (
        "a:1",
        WHOLE,
        MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
        Team(Shard(3, 4), "a:1", device="2"),
    ),
    "Open MPI, whose daemons srun has started": (
        "",
        WHOLE,
        nodes("b,c") | MPI | {"OMPI_MCA_orte_hnp_uri": URI},
        Team(Shard(3, 4), f"10.96.0.1:{61440 + 373920 % 4096}", "ompi"),
    ),
}


@pytest.mark.parametrize("case", TEAMS)
def test_who_trains_together(case):
    coordinator, shard, environment, want = TEAMS[case]
    assert processes.parse(coordinator, shard, environment) == want


def test_tasks_that_do_not_train_together_share_their_hosts_gpus(monkeypatch):
    """As jax shares them among those that do."""
    told = []
    monkeypatch.setattr(jax.config, "update", lambda *given: told.append(given))
    for team in (None, Team(Shard(0, 2), "a:1"), Team(Shard(1, 2), "a:1", "slurm", "3")):
        processes.apart(team)
    assert told == [("jax_cuda_visible_devices", "3")]


@pytest.mark.parametrize("scheduler", ["slurm", "ompi"])
def test_jax_reads_the_same_from_the_schedulers_variables(monkeypatch, scheduler):
    clusters = pytest.importorskip("jax._src.clusters")  # ours must not depend on it
    variables = (
        nodes("a-[007,9],b") if scheduler == "slurm" else MPI | {"OMPI_MCA_orte_hnp_uri": URI}
    )
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    team = processes.parse("", WHOLE, os.environ)
    kinds = {kind.name: kind for kind in clusters.ClusterEnv._cluster_types}
    found = kinds[scheduler]
    assert team is not None
    assert team.coordinator == found.get_coordinator_address(1, None)
    assert team.shard == (found.get_process_id(), found.get_process_count())
    assert scheduler != "slurm" or team.device == str(found.get_local_process_id())


MISTAKES = {
    "no port": ("node7", Shard(0, 2), {}, "--coordinator=node7 is no HOST:PORT"),
    "no host": (":80", Shard(0, 2), {}, "is no HOST:PORT"),
    "a large port": ("a:99999", Shard(0, 2), {}, "is no HOST:PORT"),
    "which process": ("a:1", WHOLE, {}, "give each its --shard=i/n too"),
    "no address": ("", WHOLE, MPI, "give --coordinator=HOST:PORT, or --shard=i/n"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_who_does_not(case):
    coordinator, shard, environment, sentence = MISTAKES[case]
    with pytest.raises(UserError, match=sentence):
        processes.parse(coordinator, shard, environment)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_strangers_and_who_comes_twice_are_turned_away():
    deadline = time.monotonic() + 20
    gathered: list[Any] = []
    with processes._server(0) as server:
        port = server.getsockname()[1]
        first = Team(Shard(0, 3), f"localhost:{port}")

        def gather() -> None:
            gathered.append(processes._gather(server, first, deadline))

        def reach(index: int, count: int = 3) -> socket.socket:
            team = first._replace(shard=Shard(index, count))
            return processes._reach("localhost", port, team, deadline)

        thread = threading.Thread(target=gather)
        thread.start()
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(1) == b""
        one = reach(1)
        for index, count in ((1, 3), (0, 3), (1, 2), (3, 3)):
            with pytest.raises(UserError, match=f"does not wait for process {index} of {count}"):
                reach(index, count)
        two = reach(2)
        thread.join()
    assert sorted(gathered[0]) == [1, 2]
    for each in (one, two, *gathered[0].values()):
        each.close()


def test_processes_that_do_not_come_are_a_sentence(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.2)
    at = f"localhost:{free_port()}"
    for index in (0, 1):
        with (
            pytest.raises(
                UserError, match=rf"process {index} of 2: the others are not reached at {at}"
            ),
            processes.joined(Team(Shard(index, 2), at)),
        ):
            pass
    assert processes.count() == 1


# Two processes

SMALL = {
    "train.num_epochs": 6,
    "evaluate.per_class": 0,
    "evaluate.first": 6,
    "evaluate.elbo_samples": 5,
    "evaluate.iwae_samples": 5,
    "evaluate.ais.num_chains": 2,
    "evaluate.ais.num_temperatures": 2,
    "evaluate.local.families": "()",
}
ARGUMENTS = [f"--config={HERE / 'tiny.py'}", *(f"--config.{n}={v}" for n, v in SMALL.items())]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two processes that run commands; the commands of both are started together."""
    folders = [tmp_path_factory.mktemp(f"process{i}") for i in range(2)]
    with commands(folders[0]) as first, commands(folders[1]) as second:
        yield first, second


@pytest.fixture(scope="module")
def pair(servers):
    """pair(workdir, *arguments, kill=(i, …), also=…) -> the answers of both processes."""

    def run(workdir, *arguments, kill=None, also=()):
        answers: list[dict[str, Any]] = [{}, {}]
        team = [f"--coordinator=127.0.0.1:{free_port()}", f"--workdir={workdir}", *ARGUMENTS]

        def start(i):
            own = kill[1] if kill and kill[0] == i else None
            extra = [*arguments, *(also if i else ())]
            answers[i] = servers[i](*team, f"--shard={i}/2", *extra, kill=own)
            answers[i]["ended"] = time.monotonic()

        threads = [threading.Thread(target=start, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answer in answers:
            assert "Traceback" not in answer["log"], answer["log"]
        return answers

    return run


@pytest.fixture(scope="module")
def whole(servers, tmp_path_factory):
    """What one process trains."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    answer = servers[0]("--mode=train", *ARGUMENTS, f"--workdir={workdir}")
    assert answer["code"] == 0, answer["log"]
    return workdir


def assert_trained_alike(workdir: Path, whole: Path) -> None:
    """Every epoch once, and all numbers equal but for the order of sums."""
    rows, wanted = (files.read_rows(folder / "metrics.jsonl") for folder in (workdir, whole))
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert row.keys() == want.keys()
        np.testing.assert_allclose([*row.values()], [*want.values()], rtol=1e-4, atol=1e-5)
    (last, *_), (wanted_last, *_) = (
        [*reversed(checkpoints.steps(folder / "checkpoints"))] for folder in (workdir, whole)
    )
    assert last == wanted_last
    arrays, other = (
        checkpoints.read_arrays(folder / "checkpoints" / f"{last:08d}")
        for folder in (workdir, whole)
    )
    assert arrays.keys() == other.keys()
    assert bytes(arrays["identity"]) == bytes(other["identity"])
    for name in arrays.keys() - {"identity"}:
        np.testing.assert_allclose(arrays[name], other[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_two_processes_make_what_one_makes(pair, whole, tmp_path):
    workdir = tmp_path / "run"
    answers = pair(workdir)
    assert [answer["code"] for answer in answers] == [0, 0], answers
    assert "2 processes train together, each batch of 250 on 2 devices" in answers[0]["log"]
    assert_trained_alike(workdir, whole)
    # Trained together, they have each evaluated their share, and the last one has reported.
    assert [path.name for path in shards.paths(workdir, "rows")] == [
        "rows.shard-0-of-2.jsonl",
        "rows.shard-1-of-2.jsonl",
    ]
    assert sorted(row["index"] for row in shards.read(workdir, "rows")) == list(range(6))
    assert (workdir / "table.md").exists()
    assert not (workdir / ".training.json").exists()
    # Again: there is nothing to do.
    for answer in pair(workdir, "--mode=train"):
        assert answer["code"] == 0, answer["log"]
        assert "is done" in answer["log"]


def when(workdir: Path, number: int, lines: int) -> dict[str, Any]:
    """A signal once so many epochs are recorded."""
    return {"signal": number, "seconds": 0, "glob": f"{workdir}/metrics.jsonl", "lines": lines}


@pytest.mark.slow
def test_from_one_process_to_two_and_back(servers, pair, whole, tmp_path):
    """Each time stopped by SIGTERM; of two processes the one that does not write gets it."""
    arguments = ["--mode=train", "--config.train.checkpoint_seconds=1000"]
    alone = [*ARGUMENTS, *arguments, f"--workdir={tmp_path}"]
    answer = servers[0](*alone, kill=when(tmp_path, signal.SIGTERM, 1))
    assert answer["code"] == 143, answer["log"]
    (step,) = checkpoints.steps(tmp_path / "checkpoints")
    answers = pair(tmp_path, *arguments, kill=(1, when(tmp_path, signal.SIGTERM, step // 16 + 2)))
    assert [answer["code"] for answer in answers] == [143, 143], answers
    assert f"continuing from step {step} " in answers[0]["log"]
    stopped = checkpoints.steps(tmp_path / "checkpoints")[-1]
    assert step < stopped < 96
    for answer in answers:
        assert f"stopped at step {stopped}, saved" in answer["log"]
    answer = servers[0](*alone)
    assert answer["code"] == 0, answer["log"]
    assert f"continuing from step {stopped} " in answer["log"]
    assert_trained_alike(tmp_path, whole)


@pytest.mark.slow
def test_when_one_is_killed_the_other_ends_and_both_go_on(pair, whole, tmp_path):
    for killed, lines in ((1, 2), (0, 4)):
        kill = (killed, when(tmp_path, signal.SIGKILL, lines))
        answers = pair(tmp_path, "--mode=train", kill=kill)
        other = answers[1 - killed]
        assert [answers[killed]["code"], other["code"]] == [-signal.SIGKILL, 1], other["log"]
        assert other["log"].splitlines()[-1] == (
            f"infsub: process {killed} of 2 has ended, and the training with it: see what it said; the "
            "same command continues from the last checkpoint."
        )
        assert other["ended"] - answers[killed]["ended"] < 20
    answers = pair(tmp_path, "--mode=train")
    assert [answer["code"] for answer in answers] == [0, 0], answers
    assert "continuing from step" in answers[0]["log"]
    assert_trained_alike(tmp_path, whole)


@pytest.mark.slow
def test_what_one_may_not_do_all_say(pair, tmp_path):
    with locks.owned(tmp_path, "training"):
        held = pair(tmp_path, "--mode=train")
    assert list(tmp_path.glob("[!.]*")) == []
    other = pair(tmp_path, "--mode=train", also=["--config.seed=1"])
    odd = pair(tmp_path, "--mode=train", "--config.train.batch_size=125")
    for answers, sentence in (
        (held, f"the training of {tmp_path} is held by process {os.getpid()} on"),
        (other, "process 1 has another config or data set than process 0"),
        (odd, "cannot share config.train.batch_size=125 equally: give a multiple of 2"),
    ):
        assert [answer["code"] for answer in answers] == [2, 2], answers
        assert all(sentence in answer["log"] for answer in answers), answers


@pytest.mark.slow
def test_tasks_of_slurm_find_each_other(whole, tmp_path):
    """A finished run, for here it is about how they start."""
    shutil.copytree(whole, tmp_path / "run")
    command = [sys.executable, "-m", "infsub.main", "--mode=train", *ARGUMENTS]
    tasks = []
    for i in range(2):
        variables = nodes("localhost", SLURM_JOB_ID=str(os.getpid()), SLURM_PROCID=str(i))
        variables |= {"SLURM_LOCALID": str(i), "PYTHONPATH": f"{HERE}:{HERE.parent}"}
        task = subprocess.Popen(
            [*command, f"--workdir={tmp_path / 'run'}"],
            env=os.environ | variables, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        tasks.append(task)
    said = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 processes train together, each batch of 250 on 2 devices" in said[0]
    assert all("is done" in text for text in said)
