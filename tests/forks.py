"""Runs the command again and again without importing jax anew: reads a request a line, forks, answers.

The children are real processes, each with a jax runtime of its own, for none is started here.
Request: {"argv": […], "log": FILE, "kill": {"signal": n, "seconds": s, "glob": pattern, "lines": k}}:
the signal is sent s seconds after the start or, given a pattern, after a path of it is written to
and has k lines or more. Answer: {"code": exit code, or minus the signal that ended it, "log": what
it printed}.
"""

from __future__ import annotations

import contextlib
import glob
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Command = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def commands(folder: Path) -> Iterator[Command]:
    """command(*argv, kill=…) -> answer, from a process that logs in `folder`."""
    # No threads before the fork.
    variables = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OPENBLAS_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )

    def command(*argv: str, kill: dict[str, Any] | None = None) -> dict[str, Any]:
        assert server.stdin is not None
        assert server.stdout is not None
        request = {"argv": argv, "log": str(folder / "log"), "kill": kill}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield command
    server.communicate()


def child(request: dict[str, Any]) -> int:
    """The command in this process; its exit code."""
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        signals.watch()  # as the command does, before it imports jax
        sys.argv = ["infsub", *request["argv"]]
        app.run(main.main, flags_parser=main.parse)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def written_since(pattern: str, start: float, lines: int = 0) -> bool:
    """Whether a path that matches was written to after `start`, and has as many lines."""
    for path in map(Path, glob.glob(pattern)):
        try:
            if path.stat().st_mtime > start:
                return not lines or path.read_bytes().count(b"\n") >= lines
        except FileNotFoundError:  # renamed meanwhile
            return True
    return False


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Forks a child for the request, and sends it the signal at its time."""
    pid = os.fork()
    if pid == 0:
        os._exit(child(request))
    kill = request.get("kill") or {}
    start = time.time()
    due = float("inf") if "glob" in kill or not kill else start + kill["seconds"]
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {"code": code, "log": Path(request["log"]).read_text()}
        waiting = due == float("inf") and "glob" in kill
        if waiting and written_since(kill["glob"], start, kill.get("lines", 0)):
            due = time.time() + kill["seconds"]
        if time.time() >= due:
            os.kill(pid, kill["signal"])
            kill, due = {}, float("inf")
        time.sleep(0.001)


if __name__ == "__main__":
    from absl import app

    from infsub import main, signals

    for name in (
        "infsub.evaluate",
        "infsub.train",
        "orbax.checkpoint",
        "tensorboardX",
        "PIL.Image",
    ):
        importlib.import_module(name)  # all that a child will need; no threads yet

    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
