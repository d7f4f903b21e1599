"""One process writes into a folder; another is told who does, and a dead one is no obstacle."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from infsub import evaluate, experiments, files, locks, train
from infsub.config import default, resolve
from infsub.types import UserError

HOLD = """
import sys, time
from pathlib import Path
from infsub import locks
with locks.owned(Path(sys.argv[1]), "training"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the training of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_is_told_who_holds_it_at_once(tmp_path, other):
    start = time.monotonic()
    with pytest.raises(UserError) as refusal, locks.owned(tmp_path, "training"):
        pass
    assert time.monotonic() - start < 5
    found = re.search(r"process (\d+) on (\S+) since .* \((.*)\): wait", str(refusal.value))
    assert found
    assert (int(found[1]), found[2]) == (other.pid, os.uname().nodename)
    with locks.owned(tmp_path, "evaluation"):  # another activity is free
        pass


def test_a_killed_owner_is_no_obstacle(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".training.json").exists()  # it could not take its note away
    with locks.owned(tmp_path, "training"):
        assert json.loads((tmp_path / ".training.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".training.json").exists()


def test_who_has_patience_waits_for_the_other_to_end(tmp_path, other, capsys):
    with pytest.raises(UserError, match="is held by"), locks.owned(tmp_path, "training", 0.2):
        pass
    threading.Timer(0.5, other.kill).start()
    with locks.owned(tmp_path, "training", math.inf):
        assert other.wait() < 0
    assert "waiting, for the training of" in capsys.readouterr().err  # and who holds it


def test_who_looks_at_locks_at_the_same_time_is_not_refused(tmp_path):
    with locks.owned(tmp_path, "evaluation"):
        pass
    refused = []

    def look():
        try:
            for _ in range(20):
                locks.refuse_others(tmp_path, "evaluation", locks.MOMENT)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == []


def test_a_queue_of_jobs_is_longer_than_the_patience_with_each(tmp_path, monkeypatch):
    """Shards of a job array start at once, and each holds the whole evaluation for a moment."""
    here = locks._here
    monkeypatch.setattr(locks, "_here", lambda: here() | {"pid": threading.get_ident()})
    monkeypatch.setattr(locks, "CONFIRMED", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    ended = []

    def shard():
        with contextlib.suppress(UserError), locks.owned(tmp_path, "evaluation", 0.5):
            ended.append(threading.get_ident())

    threads = [threading.Thread(target=shard) for _ in range(12)]  # 1.2 seconds in all
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ended) == 12


def test_an_error_inside_gives_it_back(tmp_path):
    with pytest.raises(ZeroDivisionError), locks.owned(tmp_path, "training"):
        _ = 1 / 0
    with locks.owned(tmp_path, "training"):
        pass


def test_another_host_that_shows_life_keeps_it_and_a_silent_one_does_not(tmp_path):
    note = tmp_path / ".training.json"
    owner = {"host": "elsewhere", "pid": 7, "since": "noon", "command": "infsub"}
    files.write_json(note, owner)
    with pytest.raises(UserError, match="process 7 on elsewhere") as refusal:
        locks.owned(tmp_path, "training").__enter__()
    assert "2 min 0 s" in str(refusal.value)  # what to do: wait so long
    silent = time.time() - locks.PRESUMED_DEAD - 1
    os.utime(note, (silent, silent))
    with locks.owned(tmp_path, "training"):
        pass


def test_an_owner_whose_clock_was_ahead_is_not_one_for_ever(tmp_path):
    note = tmp_path / ".training.json"
    files.write_json(note, {"host": "elsewhere", "pid": 7, "since": "noon", "command": "infsub"})
    ahead = time.time() + 3600
    os.utime(note, (ahead, ahead))
    for _ in range(2):  # presumed alive, and from now on it ages
        with pytest.raises(UserError, match="process 7 on elsewhere"):
            locks.owned(tmp_path, "training").__enter__()
        assert note.stat().st_mtime < time.time() + 60


def test_a_note_that_goes_while_it_is_looked_at_is_nobodys(tmp_path, monkeypatch):
    note = tmp_path / ".training.json"
    owner = {"host": "elsewhere", "pid": 7, "since": "noon", "command": "infsub"}
    files.write_json(note, owner)
    monkeypatch.setattr(locks, "aside", lambda path: (note.unlink(), files.aside(path))[1])
    with locks.owned(tmp_path, "training"):
        assert files.read_json(note)["pid"] == os.getpid()


def test_a_job_waits_until_another_host_is_presumed_dead(tmp_path, monkeypatch):
    """SLURM starts it anew on another host at once; there is nobody who would try again later."""
    owner = {"host": "elsewhere", "pid": 7, "since": "noon", "command": "infsub"}
    files.write_json(tmp_path / ".training.json", owner)
    monkeypatch.setattr(locks, "PRESUMED_DEAD", 0.5)
    monkeypatch.setattr(locks, "SIGN_OF_LIFE", 0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    start = time.monotonic()
    with locks.owned(tmp_path, "training"):
        assert 0.3 < time.monotonic() - start < 60
    # One that lives on this host is refused at once all the same.
    with locks.owned(tmp_path, "training"), pytest.raises(UserError, match="is held by"):
        locks.owned(tmp_path, "training").__enter__()


def test_of_two_hosts_that_start_at_once_the_last_to_say_so_owns(tmp_path, monkeypatch):
    """Where flock is not carried between hosts, both find nobody; here the other one is a note."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(locks, "PRESUMED_DEAD", 0.0)  # it is not waited for
    monkeypatch.setattr(locks, "SIGN_OF_LIFE", 0.0)
    note = tmp_path / ".training.json"
    other = {"host": "elsewhere", "pid": 7, "since": "noon", "command": "infsub"}
    monkeypatch.setattr(time, "sleep", lambda _: files.write_json(note, other))  # meanwhile
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        locks.owned(tmp_path, "training").__enter__()
    assert json.loads(note.read_text()) == other  # it is the other's, and stays


@pytest.fixture(params=["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def no_locks(request, tmp_path, monkeypatch):
    """A file system without flock, on which a process has left what it had, with a note of it."""

    def refuse(*_):
        raise OSError(getattr(errno, request.param), "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "CONFIRMED", 0.01)
    (tmp_path / ".training.lock").write_text("7\nelsewhere\n")

    def leave(host, pid, age=0.0):
        owner = {"host": host, "pid": pid, "since": "noon", "command": "infsub"}
        files.write_json(tmp_path / ".training.json", owner)
        os.utime(tmp_path / ".training.json", (time.time() - age,) * 2)

    return leave


@pytest.mark.parametrize("age", [0.0, locks.PRESUMED_DEAD + 1])
def test_without_flock_the_note_tells_who_lives_elsewhere(tmp_path, no_locks, age):
    no_locks("elsewhere", 7, age)
    expected = contextlib.nullcontext()
    if not age:
        expected = pytest.raises(locks.Held, match=r"process 7 on elsewhere .* after 2 min 0 s")
    with expected as refusal, locks.owned(tmp_path, "training"):
        assert json.loads((tmp_path / ".training.json").read_text())["pid"] == os.getpid()
    assert age or (refusal and refusal.value.silent)


def test_without_flock_the_system_tells_who_runs_here(tmp_path, no_locks):
    """One that does is refused at once, in a job too; a killed one, or its number again, is nobody."""
    no_locks(socket.gethostname(), os.getppid())
    with pytest.raises(locks.Held, match=r"wait until it ends, or stop it") as refusal:
        locks.owned(tmp_path, "training").__enter__()
    assert not refusal.value.silent
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid, age in ((ended.pid, 0.0), (os.getppid(), locks.PRESUMED_DEAD + 1), (os.getpid(), 0.0)):
        no_locks(socket.gethostname(), pid, age)
        with locks.owned(tmp_path, "training"):
            pass


def test_without_flock_the_last_of_two_that_start_at_once_owns(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: no_locks("elsewhere", 7))  # meanwhile
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        locks.owned(tmp_path, "training").__enter__()
    assert json.loads((tmp_path / ".training.json").read_text())["pid"] == 7  # it stays


def test_a_signal_leaves_no_note(tmp_path):
    program = HOLD.replace("with locks", "from infsub import signals\nsignals.watch()\nwith locks")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert (tmp_path / ".training.json").exists()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    assert not (tmp_path / ".training.json").exists()


def test_an_owner_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "SIGN_OF_LIFE", 0.01)
    note = tmp_path / ".training.json"
    with locks.owned(tmp_path, "training"):
        os.utime(note, (0, 0))
        for _ in range(500):
            if note.stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert note.stat().st_mtime > 0


@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00\x01", '{"host": 3'])
def test_a_note_that_is_none_is_no_obstacle(tmp_path, content):
    note = tmp_path / ".training.json"
    note.write_text(content)
    with locks.owned(tmp_path, "training"):
        assert json.loads(note.read_text())["pid"] == os.getpid()  # it is the owner's now
    assert not note.exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written to"),
        locks.owned(tmp_path / "file", "training"),
    ):
        pass


def test_every_mode_that_writes_is_refused(tmp_path, monkeypatch):
    config = resolve(default())
    with locks.owned(tmp_path, "training"), pytest.raises(UserError, match="is held by"):
        train.train(config, tmp_path)
    several = default()
    several.train.num_seeds = 2
    with locks.owned(tmp_path / "several/seed_1", "training"), pytest.raises(UserError) as refusal:
        train.train(several, tmp_path / "several")  # of which another process trains one alone
    assert "several/seed_1 is held by" in str(refusal.value)
    monkeypatch.setattr(evaluate.records, "read_run", lambda workdir: {})  # there is one
    with locks.owned(tmp_path, "evaluation"), pytest.raises(UserError, match="is held by"):
        evaluate.evaluate(config, tmp_path)
    experiment = experiments.experiment("asked", "?", {"a": {}})
    with locks.owned(tmp_path / "asked", "experiment"), pytest.raises(UserError, match="held by"):
        experiments.run(experiment, tmp_path)
