"""L[q*] of every family on the published model's digits: bound, steps, CPU seconds an image.

python tests/benchmarks/local_optimisation.py [--digits=20] [--before] [FAMILY ...]

"now" starts from Laplace's Gaussian, its fit included; "before" is Adam from the encoder's q. CPU
seconds are the process's own, so other jobs beside it disturb them less than the clock. Compiled
before they count.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import load_oracle, oracle_encoder, oracle_target
from timing import record

import infsub
from infsub import local, posteriors
from infsub.types import Params

BLOCK = 20  # digits at a time


def now(name: str, key: Any, x: Any, model: Params) -> infsub.LocalResult:
    target = oracle_target(model, x)
    posterior = posteriors.make(name, 50, target=target)
    start = infsub.laplace(target, oracle_encoder(model, x))
    return infsub.optimize_local(key, target, posterior, start=start)


def before(name: str, key: Any, x: Any, model: Params) -> infsub.LocalResult:
    target = oracle_target(model, x)
    posterior = posteriors.make(name, 50, target=target)
    params = posteriors.with_gaussian(posterior.init(key), oracle_encoder(model, x))
    return infsub.optimize_local(key, target, posterior, params, local.RULES["fast"])


WAYS: dict[str, Callable[..., infsub.LocalResult]] = {"before": before, "now": now}


def measure(name: str, way: str, xs: Any, model: Params) -> str:
    """A row of the table."""
    method = WAYS[way]

    def run(keys: Any, xs: Any, model: Params) -> infsub.LocalResult:
        def one(arguments: tuple[Any, Any]) -> infsub.LocalResult:
            return method(name, *arguments, model)

        return jax.lax.map(one, (keys, xs), batch_size=BLOCK)

    arguments = jax.random.split(jax.random.key(10), len(xs)), xs, model
    began = time.perf_counter()
    compiled = jax.jit(run).lower(*arguments).compile()
    began = time.perf_counter() - began
    clock, cpu = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(compiled(*arguments))
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    label = posteriors.FAMILIES[name].label
    title = f"L[q*] {label}, {way}, an image"
    record(title, cpu / len(xs), compile_seconds=began, note="CPU seconds")
    error = jnp.sqrt(jnp.sum(found.elbo.standard_error**2)) / len(xs)
    return (
        f"{label:9}  {way:6}  {len(xs):6}"
        f"  {jnp.mean(found.elbo.log_px):8.3f} ± {error:.3f}"
        f"  {jnp.mean(found.num_steps):6.0f}  {jnp.max(found.num_steps):6}"
        f"  {jnp.mean(found.converged):9.0%}  {cpu / len(xs):9.3f}  {clock / len(xs):9.3f}"
    )


def main() -> None:
    """Prints a row a family and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(posteriors.FAMILIES))
    parser.add_argument("--digits", type=int, default=20)
    parser.add_argument("--before", action="store_true")
    options = parser.parse_args()
    shared = Path(__file__).resolve().parents[3] / "shared"
    if not (shared / "oracles").is_dir():
        print("needs ../shared, the folder of real data and oracles")
        return
    model, digits = load_oracle(shared)
    xs = digits[:: len(digits) // options.digits][: options.digits]
    print(
        "family     method  digits  L[q*], nats         steps    most  converged  CPU-s/img    s/img"
    )
    for name in options.families:
        for way in ["before", "now"] if options.before else ["now"]:
            print(measure(name, way, xs, model), flush=True)


if __name__ == "__main__":
    main()
