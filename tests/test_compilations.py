"""What is compiled once is kept for other processes, within bounds, and never stops a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from infsub import compilations

# A process as users have it, of which jax was told nothing: it compiles one function of its own.
PROGRAM = """
import json, warnings
import jax, jax.numpy as jnp
from infsub import compilations
before = jax.config.jax_compilation_cache_dir
jnp.arange(3)  # jax has compiled before
warnings.simplefilter("error")
compilations.keep()
start = compilations.spent()
assert jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones(3)) > 0
print(json.dumps([before, jax.config.jax_compilation_cache_dir, *compilations.spent().since(start)]))
"""


def run(home: Path, program: str = PROGRAM, **variables: str) -> list:
    """What a process prints, whose cache is in `home`."""
    told = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    env = told | {"XDG_CACHE_HOME": str(home)} | variables
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def entries(home: Path) -> list[Path]:
    return [*home.glob("infsub/compilations/*/*-cache")]


def test_what_a_process_compiles_is_kept_for_the_next_within_bounds(tmp_path):
    # A full disk stops nothing, and leaves halves of programs that the next process mends.
    full = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    )
    before, folder, *_, compiled, cached = run(tmp_path, full + PROGRAM)
    assert before is None
    assert Path(folder).stat().st_mode & 0o077 == 0
    assert (compiled > 0, cached) == (True, 0)
    assert {path.stat().st_size for path in entries(tmp_path)} == {1000}
    assert run(tmp_path)[-2:] == [compiled, 0]
    assert run(tmp_path)[-2:] == [0, compiled]
    sizes = [path.stat().st_size for path in entries(tmp_path)]
    assert len(sizes) == compiled

    bound = sum(sizes) - 1
    run(tmp_path / "small", JAX_COMPILATION_CACHE_MAX_SIZE=str(bound))
    small = [path.stat().st_size for path in entries(tmp_path / "small")]
    assert 0 < sum(small) <= bound


@pytest.mark.parametrize(
    ("variable", "value"),
    [("JAX_COMPILATION_CACHE_DIR", "mine"), ("JAX_ENABLE_COMPILATION_CACHE", "false")],
)
def test_jax_has_the_first_word(tmp_path, variable, value):
    value = str(tmp_path / value) if variable.endswith("DIR") else value
    before, after, *_ = run(tmp_path / "home", **{variable: value})
    assert after == before
    assert entries(tmp_path / "home") == []


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").touch()
    _, folder, *_ = run(tmp_path / "file")
    assert folder is None


def test_seconds_are_those_of_the_clock_and_count_once():
    before = compilations.spent()
    start = time.monotonic()
    slow = jax.jit(lambda x: (time.sleep(0.3), jax.jit(lambda x: x + 7.5)(x))[1])
    slow(jnp.ones(3))
    found, elapsed = compilations.spent().since(before), time.monotonic() - start
    assert found.compiled + found.cached >= 1
    assert 0.3 < found.tracing < elapsed
    assert found.tracing + found.compiling < found.seconds < elapsed + 0.1
    parts = found.to_json()
    total = sum(value for name, value in parts.items() if name.startswith("seconds_"))
    assert total == pytest.approx(found.seconds, abs=0.05)
    assert compilations.Spent.from_json(parts) == pytest.approx(found, abs=0.05)


def test_an_event_in_another_counts_once(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seconds = compilations._Seconds()
    seconds.add(1)
    now[0] += 0.5
    seconds.add(2)  # it holds the one before
    assert seconds.total == 2
    now[0] += 2
    seconds.add(1)  # beside it
    assert seconds.total == 3
    assert seconds.number == 2
