"""How the cost of AIS grows: with datapoints, chains, temperatures, dimensions of z; and its memory.

Seconds are of the CPU where the device is one, of the clock elsewhere. An exponent is the slope of log
seconds against log size: 1 is linear. Memory is the process's peak, without what the data themselves
take: it is to stay that of a block.
"""

from __future__ import annotations

import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import record

import infsub

HIDDEN, PIXELS = 64, 256
SIZES = {
    "datapoints": (100, 1000, 10_000),
    "chains": (16, 64, 256),
    "temperatures": (25, 100, 400),
    "latent_dim": (8, 32, 128),
}
# Of all but the one that grows; many datapoints have few chains, so that all takes a minute.
BASE = {"datapoints": 20, "chains": 16, "temperatures": 25, "latent_dim": 32}
FEW = {"chains": 4, "temperatures": 5}
REPEATS = 3


def log_px(
    key: Any, x: Any, params: Any, *, start: str, chains: int, temperatures: int, latent_dim: int
) -> Any:
    """AIS as the command runs it, from Laplace's fit or the prior; a decoder of two layers."""

    def log_likelihood(z: Any) -> Any:
        return infsub.densities.bernoulli_logits(x, jnp.tanh(z @ params[0]) @ params[1])

    target = infsub.Target(None, log_likelihood, latent_dim)
    q = infsub.laplace(target) if start == "laplace" else None
    return infsub.ais(key, target, q, chains, temperatures, num_leapfrog=5).log_px


def problem(start: str, **sizes: int) -> tuple[Callable[[], Any], int]:
    """() -> log p̂ [N] at these sizes, and the bytes of the data."""
    sizes = BASE | sizes
    number, dim = sizes.pop("datapoints"), sizes["latent_dim"]
    random = np.random.default_rng(0)
    shapes = ((dim, HIDDEN), (HIDDEN, PIXELS))
    params = [np.float32(random.normal(size=shape) / shape[0] ** 0.5) for shape in shapes]
    xs = np.float32(random.random((number, PIXELS)) < 0.3)
    static = {"start": start, **sizes}

    def run() -> Any:
        return infsub.map_datapoints(log_px, jax.random.key(0), xs, params, static=static)

    return run, xs.nbytes


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The least-squares slope of log seconds against log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def peak_bytes() -> int:
    """The most memory that the device, or the process on a CPU, has held until now."""
    held = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def grow(start: str, axis: str) -> None:
    """Prints a line a size and the exponent."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    fixed = FEW if axis == "datapoints" else {}
    found, memory, first = [], [], math.nan
    for size in SIZES[axis]:
        run, data = problem(start, **fixed, **{axis: size})
        began = time.perf_counter()
        run()
        first = time.perf_counter() - began
        times = []
        for _ in range(REPEATS):
            began = clock()
            run()
            times.append(clock() - began)
        found.append(statistics.median(times))
        memory.append(peak_bytes() - data)
        print(
            f"{axis:12} {size:6}  {1e3 * found[-1]:10.1f} ms  {memory[-1] / 1e6:7.1f} MB",
            flush=True,
        )
    slope = exponent(SIZES[axis], found)
    print(f"{axis:12} from {start}: exponent {slope:.2f}\n")
    record(
        f"{axis} from {start}",
        found[-1],
        compile_seconds=max(0.0, first - found[-1]),
        memory=memory[-1],
        note=f"exponent {slope:.2f} to {SIZES[axis][-1]:,}; memory × {memory[-1] / memory[0]:.2f}",
    )


if __name__ == "__main__":
    for way, grown in itertools.product(("laplace", "prior"), SIZES):
        grow(way, grown)
