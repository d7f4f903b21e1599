"""What made a number: versions, revision of the code, machine; nothing that says whose it is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = ("infsub", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "distrax")


def made_by(done: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a file says of the code and the machine that made its numbers; `done`: as this one says."""
    now = {"versions": versions(), "git_revision": git_revision(), "machine": machine()}
    return now if done is None else {name: done[name] for name in now if name in done}


def versions() -> dict[str, str]:
    """Python's and the main packages' versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def machine() -> str:
    """The processor and its cores, or the accelerators: what took the time, not whose it is."""
    import jax

    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} {devices[0].device_kind}"
    cores = os.cpu_count()
    with contextlib.suppress(AttributeError):  # not Linux
        cores = len(os.sched_getaffinity(0))  # taskset and clusters give a process some of them
    return f"{cores} core{'' if cores == 1 else 's'} of {processor()}"


def processor() -> str:
    """Its name, where Linux says it, else its kind."""
    lines = []
    with contextlib.suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git_revision() -> str:
    """The commit of the code, with "+" when it was changed since; "" outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return ended.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the checkout is another's
        return git("describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return ""
