"""Configs × seeds × shards on a cluster: each run trains, is evaluated in shards, and is reported.

  python -m launch.sweep --config=configs/quickstart.py --seeds=0-3 --shards=8 --workdir=runs/sweep \
      --gpus=1 --minutes=720 --slurm=partition=gpu -- --config.train.num_epochs=300

submits to SLURM by submitit, every job after those that it needs, and ends; --cluster=local runs all of
it here. A job that is preempted or out of time saves, is queued again and continues. --dry-run prints
what would be submitted. Run i is in WORKDIR/<config>-seed_<s>, all of them side by side in
WORKDIR/report. The same command again does what is not done. What follows -- goes to every run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

GRACE = 60.0  # seconds that a command may take to save
# Flags of a run that the sweep gives, and what says them to the sweep.
_OURS = {
    "--config": "--config before --",
    "--config.seed": "--seeds",
    "--workdir": "--workdir before --",
    "--shard": "--shards",
    "--mode": "nothing: it does all of them",
    "--cells": "nothing: it runs all of them",
}
STOPPED = (130, 143)  # a command's exit codes when a signal has ended it


class Job(NamedTuple):
    """One process.

    Attributes:
      name: in the queue.
      command: what it runs.
      needs: names of the jobs that it starts after.
      kind: "afterok", when they have ended well; "afterany", when they have ended.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    kind: str = "afterok"


def _is_cancelled() -> bool:
    """Whether this is a job of SLURM's that scancel ends."""
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return False
    asked = ["squeue", "--noheader", "--format=%i", "--states=CANCELLED", f"--jobs={job}"]
    try:
        return bool(subprocess.run(asked, capture_output=True, text=True, timeout=5).stdout.strip())
    except (OSError, subprocess.TimeoutExpired):
        return False


class Command:
    """What submitit runs: a command, stopped and queued again when submitit says so."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = tuple(command)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Runs it to its end. Raises RuntimeError when that is not a good one."""
        print("$", shlex.join(self.command), flush=True)
        # SLURM sends submitit's signal to the whole step; it is not for the command.
        self._process = subprocess.Popen(
            self.command, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        )
        while (code := self._process.poll()) is None:  # no wait(): `checkpoint` is a signal handler
            time.sleep(0.1)
        if code in STOPPED and not _is_cancelled():  # SLURM's own SIGTERM has reached it first
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(GRACE)
        if code:
            raise RuntimeError(f"{shlex.join(self.command)} ended with exit code {code}.")

    def checkpoint(self) -> Any:
        """submitit's hook on preemption and timeout: lets the command save; the same one goes on."""
        import submitit

        process, deadline = self._process, time.monotonic() + GRACE
        if process is not None:
            process.terminate()
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            process.kill()
        return submitit.helpers.DelayedSubmission(Command(self.command))


def plan(
    config_files: Sequence[str],
    seeds: Sequence[int],
    num_shards: int,
    workdir: Path,
    overrides: Sequence[str] = (),
) -> list[Job]:
    """The jobs, each after those that it needs.

    A run is trained, unless its weights are there already, then evaluated in shards, then reported: of
    all that is there, and of what is missing. An experiment's shards share its cells. Several runs are
    joined in one table at the end.

    Raises:
      SystemExit: two configs of one name; a mistake in a config or in the overrides.
    """
    jobs: list[Job] = []
    folders: dict[str, Path] = {}
    evaluations: list[Path] = []
    for file in config_files:
        for seed in seeds:
            name = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', _stem(file))}-seed_{seed}"
            if name in folders:
                sys.exit(
                    f"launch.sweep: two configs are called {name}: sweep them in two workdirs."
                )
            folder = folders[name] = workdir / name
            given = (f"--config={file}", f"--workdir={folder}", *overrides, f"--config.seed={seed}")
            base = _infsub("main", *given)
            kind, found = _kind(given, folder)
            evaluations += found
            mode, needs = ("run" if kind == "experiment" else "evaluate"), ()
            if kind == "run":
                jobs.append(Job(f"{name}-train", (*base, "--mode=train")))
                needs = (jobs[-1].name,)
            parts = []
            for index in range(num_shards):
                shard = f"{index}/{num_shards}"
                command = (*base, f"--mode={mode}", f"--shard={shard}")
                parts.append(Job(f"{name}-{mode}-{shard.replace('/', '-of-')}", command, needs))
            jobs += parts
            ended = tuple(part.name for part in parts)
            jobs.append(Job(f"{name}-report", (*base, "--mode=report"), ended, "afterany"))
    if len(evaluations) > 1:
        reports = tuple(f"{name}-report" for name in folders)
        runs = [f"{'-'.join(path.relative_to(workdir).parts)}={path}" for path in evaluations]
        command = _infsub("report", f"--out={workdir / 'report'}", "--workdirs", *runs)
        jobs.append(Job("join", command, reports, "afterany"))
    return jobs


def _infsub(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"infsub.{module}", *arguments)


def _stem(file: str) -> str:
    """The config's name, with its argument: configs/model.py:posterior=planar is model-posterior_planar."""
    path, _, argument = file.partition(":")
    return "-".join(filter(None, [Path(path).stem, argument.replace("=", "_")]))


def _kind(arguments: Sequence[str], folder: Path) -> tuple[str, list[Path]]:
    """ "experiment", whose cells train and evaluate by themselves; "trained"; or "run", to be trained.

    And where its evaluations will be, of several seeds that train together one each; of an experiment [].

    Raises:
      SystemExit: a mistake that every job of it would end with.
    """
    from infsub import config, experiments, main, published  # jax, flax and orbax: not for --help
    from infsub.types import UserError

    try:
        given, fields = main.config_of(arguments)
        if "experiment" in given:
            experiments.expand(given, folder, fields)
            return "experiment", []
        resolved = config.resolve(given)
        trained = resolved.model.imported or published.is_trained(resolved)
    except UserError as error:
        sys.exit(f"launch.sweep: {error}")
    evaluations = [path / resolved.evaluate.name for _, path in config.runs(resolved, folder)]
    return "trained" if trained else "run", evaluations


def parameters(given: argparse.Namespace) -> dict[str, Any]:
    """What submitit asks the cluster for, for every job; here there is nobody to ask, and no end."""
    if given.cluster == "local":
        return {"timeout_min": 10 * 365 * 24 * 60}
    # submitit writes an underscore as a dash; of its own names these take the place.
    options = {name.replace("-", "_"): value for name, value in given.slurm}
    cpus = options.get("cpus_per_task", given.cpus)
    return {
        "timeout_min": given.minutes,
        "gpus_per_node": given.gpus,
        "cpus_per_task": given.cpus,
        "mem_gb": given.memory,
        "slurm_signal_delay_s": 120,
        # Of its own accord the srun of SLURM 22.05 to 23.02 takes one core a task.
        "slurm_srun_args": [f"--cpus-per-task={cpus}"],
        "slurm_additional_parameters": {"requeue": True, **options},
    }


def visible_gpus() -> list[str]:
    """The GPUs that a job here may have, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(n) for n, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def with_gpus(command: Sequence[str], gpus: Sequence[str] | None) -> tuple[str, ...]:
    """A command that sees these GPUs alone; None: what it would see without submitit, which hides them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES") if gpus is None else ",".join(gpus)
    if given is None:
        return "env", "-u", "CUDA_VISIBLE_DEVICES", *command
    return "env", f"CUDA_VISIBLE_DEVICES={given}", *command


def describe(job: Job, asked: dict[str, Any]) -> str:
    """A job as --dry-run prints it: its name, what it asks for, what it waits for, its command."""
    lines = [job.name, *(f"  {name}={value}" for name, value in asked.items())]
    if job.needs:
        lines.append(f"  {job.kind}={','.join(job.needs)}")
    return "\n".join([*lines, f"  $ {shlex.join(job.command)}"])


def submit_slurm(jobs: Sequence[Job], folder: Path, asked: dict[str, Any]) -> dict[str, str]:
    """Submits all jobs at once, SLURM keeps their order; {name: SLURM's id}."""
    import submitit

    ids: dict[str, str] = {}
    for job in jobs:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=1000)
        extra = dict(asked["slurm_additional_parameters"])
        if job.needs:
            needed = ":".join(ids[name] for name in job.needs)
            extra |= {"dependency": f"{job.kind}:{needed}", "kill-on-invalid-dep": "yes"}
        executor.update_parameters(
            **asked | {"slurm_additional_parameters": extra, "name": job.name}
        )
        ids[job.name] = executor.submit(Command(job.command)).job_id
        print(f"{ids[job.name]}  {job.name}", flush=True)
    return ids


def run_local(
    jobs: Sequence[Job],
    folder: Path,
    asked: dict[str, Any],
    num_parallel: int,
    num_gpus: int = 0,
) -> dict[str, str]:
    """Runs all jobs here, so many at a time; {name: "done", "failed" or "not run"}.

    Each has `num_gpus` of the visible GPUs to itself; 0: all of them have all.
    """
    import submitit

    gpus = visible_gpus()
    free = [gpus[i * num_gpus : (i + 1) * num_gpus] or None for i in range(num_parallel)]
    executor = submitit.AutoExecutor(folder, cluster="local")
    executor.update_parameters(**asked)
    waiting, running, states = list(jobs), {}, {}
    while waiting or running:
        for name, (started, theirs) in list(running.items()):
            if started.done():
                states[name] = "failed" if started.exception() else "done"
                print(f"{states[name]}: {name} ({started.paths.stderr})", flush=True)
                free.append(theirs)
                del running[name]
        for job in list(waiting):
            ended = [states.get(name) for name in job.needs]
            if None in ended or not free:
                continue
            waiting.remove(job)
            if job.kind == "afterok" and set(ended) - {"done"}:
                states[job.name] = "not run"
            else:
                theirs = free.pop(0)
                started = executor.submit(Command(with_gpus(job.command, theirs)))
                running[job.name] = started, theirs
        time.sleep(0.1)
    return states


def _seeds(text: str) -> list[int]:
    """ "0-3,7" as 0, 1, 2, 3, 7."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} names no seed: give them as 0-3,7")
    return seeds


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m launch.sweep`; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    overrides = given[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m launch.sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", action="append", required=True, metavar="FILE.py[:arg]")
    parser.add_argument("--workdir", type=os.path.expanduser, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=_seeds, default=[0], metavar="0-3,7")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="of each evaluation")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument(
        "--parallel", type=int, default=2, metavar="N", help="jobs at a time, local"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=0,
        metavar="N",
        help="of a job; local, 0: all of them to all jobs",
    )
    for name, default, unit in (("minutes", 720, "N"), ("cpus", 4, "N"), ("memory", 16, "GB")):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar=unit, help="of a job of SLURM's"
        )
    parser.add_argument(
        "--slurm", type=_setting, action="append", default=[], metavar="NAME=VALUE",
        help="of sbatch, such as partition=gpu",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    options = parser.parse_args(given[:cut])
    for name in ("shards", "parallel"):
        if (number := getattr(options, name)) < 1:
            parser.error(f"--{name}={number} must be at least 1")
    for override in overrides:
        if other := _OURS.get(override.partition("=")[0]):
            parser.error(f"{override} after --: the sweep says that to each run; give it {other}")
    gpus, wanted = visible_gpus(), options.gpus * options.parallel
    if options.cluster == "local" and wanted > len(gpus):
        parser.error(
            f"--gpus={options.gpus} for --parallel={options.parallel} jobs at a time are {wanted}, and this "
            f"machine has {len(gpus)}: give fewer"
        )
    workdir = Path(options.workdir)
    jobs = plan(options.config, options.seeds, options.shards, workdir, overrides)
    asked = parameters(options)
    if options.dry_run:
        print("\n".join(describe(job, asked) for job in jobs))
        return 0
    if importlib.util.find_spec("submitit") is None:
        sys.exit("launch.sweep: submitit is not installed: pip install 'infsub[cluster]'")
    folder = workdir / "jobs"
    if options.cluster == "local":
        states = run_local(jobs, folder, asked, options.parallel, options.gpus)
        return int(set(states.values()) != {"done"})
    submit_slurm(jobs, folder, asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
