"""What jax compiles: kept in the user's cache for the next process, and the seconds that it takes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
from filelock import FileLock, Timeout

from infsub.files import cache_folder, duration

_OURS = {
    # jax keeps what took a second; but what a short run waits for is small programs too.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    # Some thousand programs: the quickstart's 29 take 1.5 MB.
    "jax_compilation_cache_max_size": 2**28,
}


def keep() -> None:
    """Keeps compiled programs in the user's cache from here on, unless jax was told where, or not to.

    They are in infsub/compilations of $XDG_CACHE_HOME or ~/.cache: 256 MB for a kind of machine, of which
    what was used last stays. JAX_COMPILATION_CACHE_DIR=DIR moves them, and
    JAX_ENABLE_COMPILATION_CACHE=false stops it; jax's other variables are obeyed too. Where nothing can
    be written nothing is kept.
    """
    config: Any = jax.config  # whose fields have no types
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return
    with contextlib.suppress(OSError, RuntimeError, Timeout):  # RuntimeError: there is no home
        folder = _folder()
        _mend(folder)
        for name, value in _OURS.items():
            if name.upper() not in os.environ:
                config.update(name, value)
        # A disk that is full costs time later, and nobody asked for the cache.
        text = "Error (reading|writing) persistent compilation cache entry"
        warnings.filterwarnings("ignore", text, UserWarning)
        config.update("jax_compilation_cache_dir", str(folder))


def _folder() -> Path:
    """Of one kind of machine: jax's key may leave out a CPU's instructions and cores."""
    machine: list[Any] = [platform.machine(), os.cpu_count()]
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        machine.append(len(os.sched_getaffinity(0)))
        names = ("model name", "flags", "Features", "CPU part")
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        machine += sorted({line for line in lines if line.startswith(names)})
    kind = hashlib.sha256(repr(machine).encode()).hexdigest()[:8]
    return cache_folder() / "compilations" / kind


def _mend(folder: Path) -> None:
    """Removes programs that a kill or a full disk has torn, for jax would never write them again.

    jax holds this lock while it writes a program and, after that, when it was used.

    Raises:
      OSError: the folder cannot be written to.
      Timeout: another process holds the lock for long.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who writes here runs code as this user
    with FileLock(folder / ".lockfile", timeout=10):
        for path in folder.glob("*-cache"):
            if not path.with_name(f"{path.name.removesuffix('-cache')}-atime").exists():
                path.unlink()


class Spent(NamedTuple):
    """What a process spends until its programs run; between two times, by `since`.

    Attributes:
      seconds: of the clock.
      tracing: of them, in which Python ran functions to see what they compute, and told XLA.
      compiling: in which XLA compiled, or read what was kept.
      compiled: programs.
      cached: programs that were read instead.
    """

    seconds: float
    tracing: float
    compiling: float
    compiled: int
    cached: int

    def since(self, before: Spent) -> Spent:
        """What was spent after `before`."""
        differences: Any = (now - then for now, then in zip(self, before, strict=True))
        return Spent(*differences)

    def __str__(self) -> str:
        tracing, compiling = duration(self.tracing), duration(self.compiling)
        programs = f"{self.compiled} programs, and {self.cached} from the cache"
        return f"{duration(self.seconds)}: {tracing} tracing, {compiling} compiling ({programs})"

    def to_json(self) -> dict[str, float]:
        """By name, as in progress.json; what is neither tracing nor compiling is running."""
        running = self.seconds - self.tracing - self.compiling
        parts = {"tracing": self.tracing, "compiling": self.compiling, "running": running}
        seconds = {f"seconds_{name}": round(value, 2) for name, value in parts.items()}
        return {**seconds, "programs_compiled": self.compiled, "programs_cached": self.cached}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Spent:
        """Of what `to_json` gave. Raises KeyError where something is missing."""
        tracing, compiling = content["seconds_tracing"], content["seconds_compiling"]
        seconds = content["seconds_running"] + tracing + compiling
        programs = content["programs_compiled"], content["programs_cached"]
        return cls(seconds, tracing, compiling, *programs)


class _Seconds:
    """The seconds of events of which some lie in others: each second counts once."""

    def __init__(self) -> None:
        self._events: list[tuple[float, float]] = []

    def add(self, seconds: float) -> None:
        """Of an event that ends now."""
        begin = time.monotonic() - seconds
        while self._events and self._events[-1][0] >= begin:
            self._events.pop()
        self._events.append((begin, seconds))

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self._events)

    @property
    def number(self) -> int:
        return len(self._events)


class _Heard:
    """What jax has told since this was made."""

    def __init__(self) -> None:
        self.tracing, self.compiling, self.cached = _Seconds(), _Seconds(), 0
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, event: str, duration_secs: float, **_: Any) -> None:
        match event.removeprefix("/jax/core/compile/"):
            case "jaxpr_trace_duration" | "jaxpr_to_mlir_module_duration":
                self.tracing.add(duration_secs)
            case "backend_compile_duration":  # of programs that are read too
                self.compiling.add(duration_secs)

    def _event(self, event: str, **_: Any) -> None:
        self.cached += event == "/jax/compilation_cache/cache_hits"


_heard = functools.cache(_Heard)  # from the first call on


def spent() -> Spent:
    """Of this process, since it was first asked; the difference of two says something."""
    heard = _heard()
    tracing, compiling, cached = heard.tracing.total, heard.compiling.total, heard.cached
    return Spent(time.monotonic(), tracing, compiling, heard.compiling.number - cached, cached)
