"""`make faults`: kills in every phase and in shards, and commands started at the same time.

  .venv/bin/python tests/faults.py [--rounds=3] [--pairs=10] [--seed=0]

Each round kills a run again and again, through training, checkpoints, evaluation, certificate and report,
or its shards, with SIGKILL, SIGTERM and SIGINT, and compares what it ends with to a run that nobody
disturbed: metrics, weights, rows and table, bit for bit; the rows of shards to rounding. Prints what
was done, and ends with 1 when anything was lost, differed, or was a traceback.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from forks import Command, commands

from infsub import checkpoints, files, shards

CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143,), signal.SIGINT: (130,)}
SETTINGS = {
    "train.checkpoint_seconds": 0.0,
    "evaluate.per_class": 0,
    "evaluate.first": 12,
    "evaluate.block_size": 2,
    "evaluate.elbo_samples": 5,
    "evaluate.iwae_samples": 5,
    "evaluate.ais.num_chains": 2,
    "evaluate.ais.num_temperatures": 2,
    "evaluate.local.families": "()",
    "evaluate.bdmc.num_points": 6,
}
ARGUMENTS = [f"--config={Path(__file__).parent / 'tiny.py'}"]
ARGUMENTS += [f"--config.{name}={value}" for name, value in SETTINGS.items()]
# Phase: the path that tells that it has begun, and seconds after that within which the signal comes.
PHASES = {
    "starting": ("", 2.0),
    "training": ("metrics.jsonl", 0.2),
    "saving": ("checkpoints/*.orbax-checkpoint-tmp*", 0.02),
    "evaluating": ("rows.jsonl", 0.05),
    "certifying": ("bdmc.jsonl", 0.05),
    "reporting": ("table.md", 0.3),
}
ORDER = ["starting", *["training"] * 4, *["saving"] * 3, *["evaluating"] * 4, *["certifying"] * 2]
ORDER += ["reporting"]


class Found:
    """What was seen."""

    def __init__(self) -> None:
        self.kills: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def check(self, fine: bool, what: str) -> None:
        """Takes note of `what` unless it is fine."""
        if not fine:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)


def kill(
    command: Command,
    workdir: Path,
    phase: str,
    moments: random.Random,
    found: Found,
    shard: str = "",
) -> None:
    """Starts the command and sends it a signal in this phase, if it comes to it."""
    pattern, within = PHASES[phase]
    number = moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    due: dict[str, Any] = {"signal": int(number), "seconds": moments.uniform(0, within)}
    if pattern:
        path = workdir / pattern
        if shard and phase in ("evaluating", "certifying"):
            path = path.with_name(f"{path.stem}.shard-{shard.replace('/', '-of-')}.jsonl")
        lines = len(files.read_rows(path)) + 1 if path.suffix == ".jsonl" else 0
        due |= {"glob": str(path), "lines": lines}
    extra = [f"--shard={shard}"] if shard else []
    answer = command(*ARGUMENTS, f"--workdir={workdir}", *extra, kill=due)
    where = f"{number.name} while {phase}{shard and f' shard {shard}'}"
    if answer["code"] == 0:  # it was over before
        return
    found.kills[f"{phase}{' of a shard' if shard else ''}, {number.name}"] += 1
    found.check(answer["code"] in CODES[number], f"{where}: exit code {answer['code']}")
    found.check("Traceback" not in answer["log"], f"{where}: {answer['log']}")


def copy_of_the_training(whole: Path, workdir: Path) -> None:
    """A run that is trained as `whole`, and not evaluated."""
    shutil.copytree(whole, workdir)
    for pattern in ("rows*", "bdmc*", "table*", "evaluation.json", "report.html", "*.npz", "gaps*"):
        for path in workdir.glob(pattern):
            path.unlink()


def contents(workdir: Path, with_rows: bool) -> dict[str, Any]:
    """What must be the same to the bit."""
    names = ["metrics.jsonl", "metrics.csv", "summary.json", "samples.png"]
    names += ["rows.jsonl", "bdmc.jsonl", "table.csv"] if with_rows else []
    kept: dict[str, Any] = {name: (workdir / name).read_bytes() for name in names}
    step = checkpoints.steps(workdir / "checkpoints")[-1]
    arrays = checkpoints.read_arrays(workdir / "checkpoints" / f"{step:08d}")
    return kept | {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


def compare(workdir: Path, whole: Path, with_rows: bool, found: Found) -> None:
    """Takes note of everything that differs from the undisturbed run."""
    one, other = contents(workdir, with_rows), contents(whole, with_rows)
    differing = [name for name in other if one.get(name) != other[name]]
    found.check(not differing, f"{workdir.parent.name} differs in {differing}")
    for stem in ("rows", "bdmc"):
        lines = [row for path in shards.paths(workdir, stem) for row in files.read_rows(path)]
        wanted = files.read_rows(whole / f"{stem}.jsonl")
        indices = sorted(row["index"] for row in lines)
        found.check(
            indices == [row["index"] for row in wanted], f"{workdir.parent.name}: {stem} {indices}"
        )
        for row, want in zip(sorted(lines, key=lambda row: row["index"]), wanted, strict=False):
            same = [np.allclose(row[n], want[n], rtol=1e-6, atol=2e-3) for n in want if want[n]]
            found.check(all(same), f"{workdir.parent.name}: {stem} {row} is not {want}")


def one_run(
    command: Command, workdir: Path, whole: Path, moments: random.Random, found: Found
) -> None:
    """A run that is killed in every phase."""
    for phase in ORDER:
        kill(command, workdir, phase, moments, found)
    answer = command(*ARGUMENTS, f"--workdir={workdir}")
    found.check(
        answer["code"] == 0, f"{workdir.parent.name} ends with {answer['code']}: {answer['log']}"
    )
    compare(workdir, whole, True, found)


def shards_of_one(
    command: Command, workdir: Path, whole: Path, moments: random.Random, found: Found
) -> None:
    """Three shards of a run, killed in any order."""
    turns = [
        (f"{i}/3", phase) for i in range(3) for phase in ("evaluating", "certifying", "starting")
    ]
    moments.shuffle(turns)
    for shard, phase in turns:
        kill(command, workdir, phase, moments, found, shard)
    for i in range(3):
        answer = command(*ARGUMENTS, f"--workdir={workdir}", f"--shard={i}/3")
        found.check(answer["code"] == 0, f"shard {i} ends with {answer['code']}: {answer['log']}")
    compare(workdir, whole, False, found)


def at_once(pair: list[Command], workdir: Path, whole: Path, found: Found, shard: bool) -> None:
    """Two commands on one workdir: one is refused with a sentence, or both do their share."""
    answers: list[dict[str, Any]] = [{}, {}]

    def start(i: int) -> None:
        extra = [f"--shard={i}/2"] if shard else []
        answers[i] = pair[i](*ARGUMENTS, f"--workdir={workdir}", *extra)

    threads = [threading.Thread(target=start, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(answer["code"] for answer in answers)
    found.check(
        codes == ([0, 0] if shard else [0, 2]), f"{workdir.parent.name}: exit codes {codes}"
    )
    for answer in answers:
        found.check("Traceback" not in answer["log"], f"{workdir.parent.name}: {answer['log']}")
        if answer["code"] == 2:
            found.check(
                "is held by process" in answer["log"], f"{workdir.parent.name}: {answer['log']}"
            )
    compare(workdir, whole, not shard, found)


def main() -> int:
    """Prints what was seen; 1 when something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 3), ("pairs", 10), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    moments, found, start = random.Random(given.seed), Found(), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(2):
            (folder / f"log{i}").mkdir()
        with commands(folder / "log0") as command, commands(folder / "log1") as other:
            whole = folder / "whole/run"  # its name is in the table
            answer = command(*ARGUMENTS, f"--workdir={whole}")
            if answer["code"]:
                sys.exit(answer["log"])
            for i in range(given.rounds):
                one_run(command, folder / f"killed{i}/run", whole, moments, found)
                shards_of_one(command, folder / f"shards{i}/run", whole, moments, found)
                print(f"round {i + 1}: {sum(found.kills.values())} kills", flush=True)
            for i in range(given.pairs):
                at_once([command, other], folder / f"pair{i}/run", whole, found, shard=i % 2 == 1)
    print(json.dumps(dict(sorted(found.kills.items())), indent=2))
    print(
        f"{sum(found.kills.values())} kills in {given.rounds} runs and {3 * given.rounds} shards, "
        f"{2 * given.pairs} concurrent starts: {len(found.wrong)} things wrong, "
        f"{time.monotonic() - start:.0f} s."
    )
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
