"""The frontier: what certainty about log p(x) costs, by where annealing starts.

Each row is one way to estimate log p(x) on the oracle's 100 digits: its mean beside the converged value,
effective samples, gradients and CPU time a digit (the process's own, which other jobs disturb less
than the clock; two cores halve it); and, of AIS, the gap of bidirectional Monte Carlo on
100 points that the model simulates, which is what certifies it. `--figure=FILE.png` draws them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import load_oracle, oracle_decode, oracle_encoder, oracle_target
from timing import record

import infsub
from infsub import posteriors
from infsub.laplace import laplace_with_info

D, CHAINS, POINTS, BLOCK = 50, 16, 100, 20
REFERENCE = {"num_temperatures": 200, "num_leapfrog": 10}


class Row(NamedTuple):
    """One way to estimate log p(x).

    Attributes:
      start: "prior", "q", "q*" or "laplace".
      options: of `infsub.ais`; None: IWAE.
      num_samples: of IWAE.
    """

    start: str
    options: dict[str, Any] | None
    num_samples: int = 0

    @property
    def name(self) -> str:
        """For people."""
        if self.options is None:
            return f"{self.start}, IWAE-{self.num_samples}"
        o = self.options
        kind = {"authors": ", authors' steps"}.get(o.get("adaptation", ""), "")
        schedule = f", {o['schedule']}" if "schedule" in o else ""
        return f"{self.start}, {o['num_temperatures']} × {o['num_leapfrog']}{schedule}{kind}"


def steps(num_temperatures: int, num_leapfrog: int, **options: Any) -> dict[str, Any]:
    """`options` with the cost of a chain."""
    return {"num_temperatures": num_temperatures, "num_leapfrog": num_leapfrog, **options}


ROWS = [
    Row("prior", steps(500, 10, adaptation="authors")),
    Row("prior", steps(100, 10, schedule="power")),
    Row("q", steps(100, 10)),
    Row("q", steps(50, 10)),
    Row("q", steps(10, 5)),
    Row("q*", steps(50, 10)),
    Row("q*", steps(10, 5)),
    Row("laplace", steps(5, 5)),
    Row("laplace", steps(10, 5)),
    Row("laplace", steps(25, 5)),
    Row("laplace", steps(50, 10)),
    Row("q", None, 5000),
    Row("laplace", None, 1000),
    Row("laplace", None, 5000),
]


def start_of(name: str, key: Any, target: Any, q: Any) -> Any:
    """The Gaussian that annealing starts from, and the gradients it took."""
    none = jnp.zeros(())
    match name:
        case "prior":
            return None, none
        case "q":
            return q, none
        case "q*":
            posterior = posteriors.make("gaussian", D)
            params = posteriors.with_gaussian(posterior.init(key), q)
            local = infsub.optimize_local(key, target, posterior, params)
            return posteriors.gaussian_of(local.params), 20 * local.num_steps
        case _:
            fit, info = laplace_with_info(target, q.mean)
            return fit, info.num_gradients


def estimate(row: Row) -> Callable[..., Any]:
    """(key, x, params) -> (Estimate, gradients []) of one digit."""

    def of_one_digit(key: Any, x: Any, params: Any) -> Any:
        key_start, key = jax.random.split(key)
        target = oracle_target(params, x)
        start, cost = start_of(row.start, key_start, target, oracle_encoder(params, x))
        if row.options is None:
            return infsub.iwae(key, target, start, row.num_samples), cost
        found = infsub.ais(key, target, start, CHAINS, **row.options)
        return found._replace(log_weights=jnp.zeros(())), cost

    return of_one_digit


def certify(row: Row) -> Callable[..., Any]:
    """(key, index, params) -> BDMC gap [] of one simulated digit."""
    options = {k: v for k, v in (row.options or {}).items() if k != "adaptation"}

    def of_one_point(key: Any, _: Any, params: Any) -> Any:
        def model(key: Any) -> Any:
            key_z, key_x, key_start = jax.random.split(key, 3)
            z = jax.random.normal(key_z, (D,))
            x = jax.random.bernoulli(key_x, jax.nn.sigmoid(oracle_decode(params, z))) * 1.0
            target = oracle_target(params, x)
            return z, target, start_of(row.start, key_start, target, oracle_encoder(params, x))[0]

        return infsub.bdmc(key, model, CHAINS, **options).gap

    return of_one_point


def mapped(function: Callable[..., Any], xs: Any, params: Any) -> Any:
    """Over all points, in blocks that fit the caches."""
    return infsub.map_datapoints(function, jax.random.key(0), xs, params, block_size=BLOCK)


def main() -> None:
    """Prints the table, and draws it where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure", help="a PNG file to draw the frontier in")
    arguments = parser.parse_args()
    shared = Path(__file__).resolve().parents[3] / "shared"
    if not (shared / "oracles").is_dir():
        print("needs ../shared, the folder of real data and oracles")
        return
    params, xs = load_oracle(shared)
    found = mapped(estimate(Row("laplace", REFERENCE)), xs, params)[0]
    converged = np.float64(found.log_px)
    error = np.sqrt(np.sum(np.float64(found.standard_error) ** 2)) / POINTS
    print(
        f"converged (laplace, {REFERENCE['num_temperatures']} × 10): "
        f"{converged.mean():.3f} ± {error:.3f} nats a digit; {CHAINS} chains"
    )
    print("| start, T × L | log p̂ | off | ESS/K | k > 0.7 | gradients | CPU ms | BDMC gap |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    table = []
    for row in ROWS:
        function = estimate(row)
        mapped(function, xs[:BLOCK], params)  # compiles
        clock = time.process_time()
        found, cost = jax.block_until_ready(mapped(function, xs, params))
        milliseconds = 1e3 * (time.process_time() - clock) / POINTS
        values, errors = np.float64(found.log_px), np.float64(found.standard_error)
        num_samples = row.num_samples if row.options is None else CHAINS
        gradients = float(np.mean(cost))
        gap = error = np.nan
        if row.options is not None:
            gradients += CHAINS * row.options["num_temperatures"] * row.options["num_leapfrog"]
            gaps = np.float64(mapped(certify(row), np.arange(POINTS), params))
            gap, error = gaps.mean(), gaps.std(ddof=1) / np.sqrt(POINTS)
        lift = values - converged
        table.append((row, gradients, milliseconds, gap, error, abs(lift.mean())))
        cells = [
            row.name,
            f"{values.mean():.3f} ± {np.sqrt(np.sum(errors**2)) / POINTS:.3f}",
            f"{lift.mean():.3f} ± {lift.std(ddof=1) / np.sqrt(POINTS):.3f}",
            f"{np.mean(found.ess) / num_samples:.2f}",
            f"{np.mean(found.pareto_k > 0.7):.0%}",
            f"{gradients:,.0f}",
            f"{milliseconds:,.1f}",
            f"{gap:.3f} ± {error:.3f}" if row.options is not None else "",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
    known = {row.name: milliseconds / 1e3 for row, _, milliseconds, *_ in table}
    for name, spent in known.items():
        record(f"log p̂ from {name}", spent, "q, 100 × 10", known["q, 100 × 10"], note="CPU seconds")
    if arguments.figure:
        draw(table, arguments.figure)


def draw(table: list[Any], path: str) -> None:
    """The BDMC gap against gradients and against time, a line a start."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for start in dict.fromkeys(row.start for row, *_ in table):
        points = [p for p in table if p[0].start == start and p[0].options is not None]
        points.sort(key=lambda p: p[1])
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.errorbar(
                [p[column] for p in points],
                [max(p[3], 1e-3) for p in points],
                [p[4] for p in points],
                fmt="o-",
                capsize=2,
                label=start,
            )
    for axis, label in zip(axes, ("gradients a digit", "CPU ms a digit"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.axhline(0.05, color="0.6", linewidth=1, linestyle=":")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("BDMC gap, nats (± over 100 points)")
    axes[0].legend(title="AIS starts at", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
