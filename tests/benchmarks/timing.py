"""Fair timings: side by side in one process, after warm-up, blocked until ready, medians.

What a benchmark finds it tells `record` too: run.py joins that of all of them into one table.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

RECORDS = "INFSUB_BENCH"  # the file that run.py collects in, by the environment


def record(
    name: str,
    ours: float,
    peer: str = "",
    peer_seconds: float | None = None,
    *,
    flop: float | None = None,
    peak: float | None = None,
    compile_seconds: float | None = None,
    memory: float | None = None,
    note: str = "",
) -> None:
    """One row of the table of all benchmarks.

    Args:
      name: what is timed.
      ours: its seconds.
      peer, peer_seconds: what else does the same work, and its seconds.
      flop: of the work.
      peak: FLOP/s of this machine's matrix products.
      compile_seconds: tracing and compiling.
      memory: bytes.
      note: what the numbers do not say.
    """
    if path := os.environ.get(RECORDS):
        rate = flop / ours if flop else None
        row = {
            "name": name,
            "seconds": ours,
            "peer": peer,
            "peer_seconds": peer_seconds,
            "ratio": peer_seconds / ours if peer_seconds else None,
            "flop_per_second": rate,
            "share_of_peak": rate / peak if rate and peak else None,
            "compile_seconds": compile_seconds,
            "memory_bytes": memory,
            "note": note,
        }
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


def compiled(function: Any, *arguments: Any) -> dict[str, Any]:
    """Seconds to trace and compile a jitted function, before its first call, and bytes it works in."""
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    spent = time.perf_counter() - start
    return {"compile_seconds": spent, "memory": program.memory_analysis().temp_size_in_bytes}


def seconds(
    functions: dict[str, Callable[[], Any]],
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[float, float, float]]:
    """Median, least and most wall seconds of each function; they take turns, so drift cancels.

    clock: time.process_time for seconds of CPU, on a machine that is not idle.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            times[name].append(clock() - start)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in times.items()}


def show(title: str, times: dict[str, tuple[float, float, float]], reference: str) -> None:
    """A table: median, least and most milliseconds, and the ratio of medians to `reference`."""
    print(f"\n{title}\n{'':38}  median ms (least – most)   × reference")
    base = times[reference][0]
    for name, (median, least, most) in times.items():
        spread = f"({1e3 * least:.1f} – {1e3 * most:.1f})"
        print(f"{name:38}  {1e3 * median:9.1f} {spread:18} {median / base:9.2f}")


def matmul_peak(size: int = 1500) -> float:
    """This machine's float32 matrix-product rate, FLOP/s."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    product = jax.jit(lambda a: jnp.dot(a, a))
    (median, _, _) = seconds({"matmul": lambda: product(a)}, 15)["matmul"]
    return 2 * size**3 / median
