"""One owner: who writes into a folder holds a lock there, which says who that is.

The lock itself is the operating system's (flock): it ends with its process, however that ends, so
nothing has to be cleaned up after a `kill -9`. Beside it lies a note for people, with host, process, time
and command, whose time of change is the owner's sign of life. On file systems that do not carry flock
from host to host (some NFS), or that have none (Lustre), that sign is what keeps others out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
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
from typing import IO, Any

from infsub import signals
from infsub.files import aside, duration, is_full, read_json, say, write_json
from infsub.types import UserError

SIGN_OF_LIFE = 20.0  # seconds between two
PRESUMED_DEAD = 120.0  # seconds without one
MOMENT = 10.0  # seconds within which who only looks, or notes something, is done
_NOTE: dict[str, type] = {"host": str, "pid": int, "since": str, "command": str}
_JOBS = ("SLURM_JOB_ID", "JOB_COMPLETION_INDEX", "SKYPILOT_TASK_ID")  # set in a scheduler's job
CONFIRMED = 1.0  # seconds after which another host's note would be seen
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
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
    ended = threading.Event()
    with _acquire(folder, activity, note, patience) as lock:
        # A signal leaves no note that would hold up the same job on another host.
        ending = signals.at_end(functools.partial(note.unlink, missing_ok=True))
        threading.Thread(target=_show_life, args=(note, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            ending()
            note.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a forked child may hold the file open
                fcntl.flock(lock, fcntl.LOCK_UN)


def _acquire(folder: Path, activity: str, note: Path, patience: float) -> IO[bytes]:
    start, told, owner = time.monotonic(), False, None
    while True:
        try:
            return _try(folder, activity, note)
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


def _try(folder: Path, activity: str, note: Path) -> IO[bytes]:
    """The file that holds the lock until it is closed."""
    with contextlib.ExitStack() as unless_owned:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = unless_owned.enter_context((folder / f".{activity}.lock").open("ab"))
            locked = _lock(lock)
        except BlockingIOError:
            owner = _read(note)
            raise Held(_held(folder, activity, owner, alive=True), owner) from None
        except OSError as error:
            if is_full(error):
                raise
            raise UserError(
                f"--workdir={folder} cannot be written to ({error.strerror}): give another one."
            ) from error
        before = _read(note)
        owner = before if before and _may_live(before, note, locked) else None
        if owner is None:
            mine = _here()
            write_json(note, mine)
            if not locked or _in_a_job():
                # Two that start at once have both found nobody: the last one owns.
                time.sleep(CONFIRMED)
                owner = now if (now := _read(note)) != mine else None
        if owner is not None:
            here = owner["host"] == socket.gethostname()
            raise Held(_held(folder, activity, owner, alive=here), owner, silent=not here)
        unless_owned.pop_all()
        return lock


def _lock(file: IO[bytes]) -> bool:
    """Locks the file; whether its file system knows locks. Raises BlockingIOError: another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _may_live(owner: dict[str, Any], note: Path, locked: bool) -> bool:
    """Whether the process of a note, which is not this one, may be at it still."""
    if owner["host"] == socket.gethostname() and (locked or not _runs(owner["pid"])):
        return False
    age = _age(note)
    if age < 0:  # of a clock that was ahead: from now on it ages
        with contextlib.suppress(OSError):
            os.utime(note)
    return age < PRESUMED_DEAD


def _runs(pid: int) -> bool:
    """Whether another process here has this number."""
    try:
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid != os.getpid()


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
