"""Every benchmark in turn, each in a process of its own, and one table of all: `make bench`.

Writes runs/bench.json. Names of scripts run those alone: `run.py growth annealing`. A ratio is the peer's
seconds by ours.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timing

from infsub import files, provenance

CACHE = "JAX_ENABLE_COMPILATION_CACHE"
HELPERS = {"run", "timing"}
HERE = Path(__file__).parent
WRITTEN = HERE.parents[1] / "runs" / "bench.json"


def machine() -> dict[str, Any]:
    """Where and when."""
    probe = "import jax; d = jax.devices(); print(len(d), d[0].device_kind)"
    devices = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    return {
        "date": datetime.date.today().isoformat(),
        "processor": provenance.processor(),
        "cores": os.cpu_count(),
        "devices": devices.stdout.strip(),
        "load": os.getloadavg()[0],
        "versions": provenance.versions(),
        "revision": provenance.git_revision(),
    }


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """For a cell; "" where there is none."""
    return "" if value is None else f"{value / unit:{form}}"


def milliseconds(seconds: float | None) -> str:
    """Of three digits and more."""
    return number(seconds, ",.0f" if (seconds or 0) > 0.1 else ".3g", 1e-3)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a row a measurement."""
    lines = [
        "| | ms | peer | its ms | ratio | GFLOP/s | of peak | compile s | MB | |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        cells = [
            f"{row['benchmark']}: {row['name']}",
            milliseconds(row["seconds"]),
            row["peer"],
            milliseconds(row["peer_seconds"]),
            number(row["ratio"], ".2f"),
            number(row["flop_per_second"], ",.0f", 1e9),
            number(row["share_of_peak"], ".0%"),
            number(row["compile_seconds"], ".1f"),
            number(row["memory_bytes"], ",.1f", 1e6),
            row["note"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs them, prints the table and writes it; the exit code of the first that fails."""
    scripts = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in HELPERS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "scripts", nargs="*", help=f"of {', '.join(scripts)}; all where none is named"
    )
    chosen = parser.parse_args().scripts or scripts
    if unknown := set(chosen) - set(scripts):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    found = {"machine": machine(), "rows": []}
    for name in chosen:
        print(f"\n== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            # What is compiled is to be compiled: these seconds are in the table too.
            environment = os.environ | {timing.RECORDS: str(path), CACHE: "false"}
            subprocess.run([sys.executable, HERE / f"{name}.py"], check=True, env=environment)
            found["rows"] += [{"benchmark": name} | row for row in files.read_rows(path)]
    print(f"\n{table(found['rows'])}")
    WRITTEN.parent.mkdir(exist_ok=True)
    files.write_json(WRITTEN, found)
    print(f"\nWrote {WRITTEN.relative_to(HERE.parents[1])}: {found['machine']}")


if __name__ == "__main__":
    main()
