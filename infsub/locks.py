"""One owner: who writes into a folder holds a lock there, which says who that is.

The lock itself is the operating system's (flock, by filelock): it ends with its process, however that
ends, so nothing has to be cleaned up after a `kill -9`. Beside it lies a note for people, with host,
process, time and command, whose time of change is the owner's sign of life. On file systems that do
not carry flock from host to host (some NFS), that sign is what keeps a second host out.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from infsub import signals
from infsub.files import aside, duration, is_full, read_json, say, write_json
from infsub.types import UserError

SIGN_OF_LIFE = 20.0  # seconds between two
PRESUMED_DEAD = 120.0  # seconds without one
MOMENT = 10.0  # seconds within which who only looks, or notes something, is done
_NOTE: dict[str, type] = {"host": str, "pid": int, "since": str, "command": str}
_JOBS = ("SLURM_JOB_ID", "JOB_COMPLETION_INDEX", "SKYPILOT_TASK_ID")  # set in a scheduler's job
CONFIRMED = 1.0  # seconds after which another host's note would be seen
POLL = 1.0  # seconds between two looks at a lock that is waited for


class Held(UserError):
    """Another process does it.

    Attributes:
      owner: what its note says; None: there is none to read.
      silent: it is of another host and may be dead: the operating system says that nobody holds it.
    """

    def __init__(self, text: str, owner: dict[str, Any] | None, silent: bool = False) -> None:
        super().__init__(text)
        self.owner, self.silent = owner, silent


@contextlib.contextmanager
def owned(folder: Path, activity: str, patience: float = 0.0) -> Iterator[None]:
    """While entered, this process alone does `activity` ("training", "evaluation", …) in `folder`.

    Args:
      folder: made when missing.
      activity: what is done.
      patience: seconds to wait for another process that does it, anew for each one of a queue.

    Raises:
      Held: another process does; who that is and what to do.
      UserError: the folder cannot be written to.
    """
    note = folder / f".{activity}.json"
    lock = FileLock(folder / f".{activity}.lock", timeout=0)
    _acquire(folder, activity, lock, note, patience)
    ended = threading.Event()
    try:
        # A signal leaves no note that would hold up the same job on another host.
        ending = signals.at_end(functools.partial(note.unlink, missing_ok=True))
        threading.Thread(target=_show_life, args=(note, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            ending()
            note.unlink(missing_ok=True)
    finally:
        lock.release()


def _acquire(folder: Path, activity: str, lock: FileLock, note: Path, patience: float) -> None:
    start, told, owner = time.monotonic(), False, None
    while True:
        try:
            return _try(folder, activity, lock, note)
        except Held as error:
            if error.owner and error.owner != owner:
                start, owner = time.monotonic(), error.owner
            # A job that starts anew on another host has nobody who tries again after a while.
            batch = PRESUMED_DEAD + SIGN_OF_LIFE if error.silent and _in_a_job() else 0.0
            longest = max(patience, batch)
            if time.monotonic() - start >= longest:
                raise
            if longest > 60 and not told:
                say(f"waiting, for {error}")
                told = True
        time.sleep(min(POLL, max(longest / 100, 0.01)))


def _in_a_job() -> bool:
    return any(name in os.environ for name in _JOBS)


def _try(folder: Path, activity: str, lock: FileLock, note: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        owner = _read(note)
        raise Held(_held(folder, activity, owner, alive=True), owner) from None
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(
            f"--workdir={folder} cannot be written to ({error.strerror}): give another one."
        ) from error
    before = _read(note)
    other = before if before and before["host"] != socket.gethostname() else None
    if not (other and _age(note) < PRESUMED_DEAD):
        mine = _here()
        write_json(note, mine)
        if not _in_a_job():
            return
        # Two hosts that start at once have both found nobody: the last one owns.
        time.sleep(CONFIRMED)
        other = now if (now := _read(note)) != mine else None
    if other:
        lock.release()
        raise Held(_held(folder, activity, other, alive=False), other, silent=True)


def refuse_others(folder: Path, activities: str, patience: float = 0.0) -> None:
    """Raises Held when a process does one of the activities that match a pattern, such as "a-*".

    Looking holds them for a moment: who looks at what others look at too needs a patience of MOMENT.
    """
    for path in folder.glob(f".{activities}.lock"):
        with owned(folder, path.name[1 : -len(".lock")], patience):
            pass


def _here() -> dict[str, Any]:
    """What the note says of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }


def _read(note: Path) -> dict[str, Any] | None:
    try:
        return read_json(note, _NOTE)
    except UserError:  # being written, or not ours
        return None


def _age(note: Path) -> float:
    """Seconds since the owner's last sign of life, by the clock of the note's own file system.

    Infinitely many where there is no note any more.
    """
    probe = aside(note)
    probe.touch()
    try:
        return probe.stat().st_mtime - note.stat().st_mtime
    except FileNotFoundError:
        return math.inf
    finally:
        probe.unlink()


def _show_life(note: Path, ended: threading.Event) -> None:
    while not ended.wait(SIGN_OF_LIFE):
        with contextlib.suppress(OSError):
            os.utime(note)


def _held(folder: Path, activity: str, owner: dict[str, Any] | None, alive: bool) -> str:
    who = "another process"
    if owner:
        who = "process {pid} on {host} since {since} ({command})".format(**owner)
    text = f"the {activity} of {folder} is held by {who}"
    if alive:
        return f"{text}: wait until it ends, or stop it."
    return (
        f"{text}, which gave a sign of life within the last {duration(PRESUMED_DEAD)}: wait until it "
        f"ends; if it is dead, the same command goes on after {duration(PRESUMED_DEAD)}."
    )
