"""What a run writes down: its config, metrics as JSON lines and CSV, TensorBoard events, progress.

`metrics.jsonl` is the source of truth and holds nothing that depends on the clock, so a resumed run
writes the same bytes; speed and time left are in `progress.json`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infsub import compilations, files, provenance, shards
from infsub import config as configs
from infsub.types import UserError

TRACES = ("checkpoints", "metrics.jsonl", "rows.jsonl", "table.md", "seed_0")  # that a run leaves
POSTERIORS = "posteriors.npz"  # the densities that an evaluation with a grid leaves
# In evaluation.json, beside the settings: how many datapoints it is of; the family of an imported
# encoder, which the config does not know; and what tells apart data that have no name.
NUM_POINTS = "num_points"
OWN = "own family"
DATA = "images"
IMAGES = "images.npz"  # the evaluated datapoints, for the report's page
FACTS: dict[str, type] = {
    "config": dict,
    "identity": str,
    "identified": dict,
    "image_shape": list,
    "levels": int,
    "steps_per_epoch": int,
}
PROGRESS: dict[str, type] = {
    "done": int,
    "total": int,
    "seconds_left": float,
    "examples_per_second": float,
    "time": float,
}
SUMMARY: dict[str, type] = {"ended": str, "step": int}
EPOCH: dict[str, type] = {"step": int, "epoch": int, "elbo": float}  # of a row of metrics.jsonl
# What an evaluation leaves in npz files, and its axes: N datapoints, F families, G cells a side.
DENSITIES = {
    "images": "N…",
    "families": "F text",
    "log_px": "N",
    "low": "N2",
    "width": "N",
    "truth": "NGG",
    "bounds": "NF",
    "densities": "NFGG",
}
BARE_DENSITIES = {n: v for n, v in DENSITIES.items() if n != "images"} | {"indices": "N"}
SHOWN = {"indices": "N", "images": "N…"}
WORDS = {"indices": "N", "words": "N text"}


class Stopped(Exception):
    """A run that ended before its end; the message says why and what to do.

    Attributes:
      exit_code: 143 after SIGTERM and 130 after Ctrl-C, with all saved; 1 when training diverged, an
        estimate is not finite, or some of several seeds could not be evaluated or reported.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class TensorBoard:
    """Event files in `directory` that TensorBoard reads, written without TensorFlow.

    Args:
      directory: of the event files.
      purge_step: a resumed run's events from this step on supersede those of the killed one.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        from tensorboardX import SummaryWriter

        # A queue without bounds: where its thread has died of an error a full one waits for ever, and
        # `flush` is what raises.
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, max_queue=0)

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Every finite number of the row as a scalar."""
        for name, value in row.items():
            if name not in ("step", "epoch") and np.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 [H, W, 3]."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Everything so far is on disk when this returns."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


def write_progress(
    path: Path, progress: files.Progress, speed: float, spent: compilations.Spent
) -> None:
    """progress.json, for `--mode=status`: the only kind of record that depends on the clock.

    speed: examples or datapoints a second.
    spent: on what is done so far.
    """
    content = {
        "done": progress.done,
        "total": progress.total,
        "seconds_left": progress.seconds_left,
        "examples_per_second": speed,
        "time": time.time(),
        "pid": os.getpid(),
        **spent.to_json(),
    }
    files.write_json(path, files.finite(content))


def read_run(workdir: Path, *needed: str) -> dict[str, Any]:
    """The `config.json` of a run: its config, and what `claim` wrote beside it.

    Args:
      workdir: of the run.
      needed: the FACTS that must be there; none: all of them.

    Raises:
      UserError: there is no run in `workdir`, or a fact that is needed is not what a run writes.
    """
    path = Path(workdir) / "config.json"
    run = files.read_json(path)
    if run is None:
        begin = "one is begun by --config=FILE.py without --mode"
        if (Path(workdir) / "cells.json").exists() or any(Path(workdir).glob("*/cells.json")):
            begin = "it is of experiments, and each has its --config"
        raise UserError(
            f"{workdir} holds no run (it has no config.json): give a run's --workdir; {begin}."
        )
    for name in needed or FACTS:
        if wrong := files.wrong_fields(run, {name: FACTS[name]}):
            raise UserError(f"{path} is no run's ({wrong}): give a run's --workdir, or mend it.")
    if needed or _is_imported(run):  # of no data of ours, maybe
        return run
    shape = run["image_shape"]
    if not (
        len(shape) == 3
        and all(type(n) is int and n > 0 for n in shape)
        and run["levels"] > 1
        and run["steps_per_epoch"] > 0
    ):
        raise UserError(
            f"{path} is no run's (image_shape={shape}, levels={run['levels']}, steps_per_epoch="
            f"{run['steps_per_epoch']}): give a run's --workdir, or mend it."
        )
    return run


def _is_imported(run: dict[str, Any]) -> bool:
    model = run["config"].get("model")
    return isinstance(model, dict) and bool(model.get("imported"))


def differences(config: configs.Config, run: dict[str, Any], **given: str) -> list[str]:
    """What tells a config from that of a run, each as one phrase.

    given: `data_identity` and `init_identity`; one that is not given is taken as the run has it.
    """
    before = configs.completed(run["identified"])
    named = {"data_identity": "data identity", "init_identity": "initial weights"}
    theirs = {name: before.get(field, "") for name, field in named.items()}
    return configs.differences(before, configs.identified(config, **(theirs | given)))


def check(config: configs.Config, workdir: Path, run: dict[str, Any], **given: str) -> None:
    """Raises UserError where a config is not that of the run in `workdir`, as by `differences`."""
    if differing := differences(config, run, **given):
        raise UserError(
            f"{workdir} is another config's: {'; '.join(differing)}. "
            "Give another --workdir, or the config it was made with."
        )


def read_config(workdir: Path) -> configs.Config:
    """The config of the run in `workdir`, resolved.

    Raises:
      UserError: as `read_run`, or a config that infsub cannot use: the field, and what is wrong.
    """
    run = read_run(workdir)
    try:
        return configs.resolve(configs.from_json(run["config"]))
    except UserError as error:
        raise UserError(f"{Path(workdir) / 'config.json'}: {error}") from error


def missing(folder: Path) -> str:
    """What is not there yet of the evaluation in a folder, in words; "" when nothing is known to be.

    Raises:
      UserError: its files cannot be read.
    """
    path = folder / "evaluation.json"
    evaluation = {NUM_POINTS: 0, "bdmc.num_points": 0} | (files.read_json(path) or {})
    if wrong := files.wrong_fields(evaluation, {NUM_POINTS: int, "bdmc.num_points": int}):
        raise UserError(f"{path} is not as infsub writes it ({wrong}): mend or remove it.")
    return "; ".join(
        text if stem == "rows" else f"of the certificate, {text}"
        for stem, name in (("rows", NUM_POINTS), ("bdmc", "bdmc.num_points"))
        if (text := shards.missing(folder, stem, evaluation[name]))
    )


def is_measured(folder: Path) -> bool:
    """Whether all datapoints of the evaluation in a folder have their rows."""
    return bool(shards.paths(folder, "rows")) and not missing(folder)


def spent(progress: dict[str, Any]) -> compilations.Spent | None:
    """Where the seconds that a progress file tells of went; None where it does not say."""
    try:
        return compilations.Spent.from_json(progress)
    except (KeyError, TypeError):
        return None


def continued(began: compilations.Spent, path: Path) -> compilations.Spent:
    """`began`, as much earlier as the processes before had spent by the progress file they left."""
    earlier = spent(files.read_json(path, PROGRESS) or {})
    return began.since(earlier) if earlier else began


def claim(
    config: configs.Config,
    workdir: Path,
    data_identity: str,
    init_identity: str,
    *,
    image_shape: tuple[int, int, int],
    levels: int,
    steps_per_epoch: int,
) -> None:
    """Makes `workdir` this run's own: writes config.json, or finds that it is this run's already.

    Into config.json go the resolved config, its identity, package versions and the git revision,
    and what of the data whoever reads it needs.

    Raises:
      UserError: another config's workdir, with the fields that differ; not writable. Nothing in it
        is changed then.
    """
    given = {"data_identity": data_identity, "init_identity": init_identity}
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        identity = configs.identity(config, **given)
        done = None
        if (workdir / "config.json").exists():
            run = read_run(workdir, "identified", "identity")
            check(config, workdir, run, **given)
            identity = run["identity"]  # an older revision's stays, for its checkpoints carry it
            trained = (workdir / "summary.json").exists()
            done = run if trained or (config.model.imported and is_measured(workdir)) else None
        elif found := [name for name in TRACES if (workdir / name).exists()]:
            raise UserError(
                f"{workdir} has {found[0]} and no config.json, so it is unknown which run it is of: "
                "give another --workdir."
            )
        facts = {
            "image_shape": image_shape,
            "levels": levels,
            "steps_per_epoch": steps_per_epoch,
            "config": configs.to_json(config),
            "identity": identity,
            "identified": configs.identified(config, **given),
            **provenance.made_by(done),
        }
        files.write_json(workdir / "config.json", facts)
    except OSError as error:
        if files.is_full(error):
            raise
        raise UserError(
            f"--workdir={workdir} cannot be written to ({error.strerror}): give another one."
        ) from error
