"""Training that can be left alone: the loop around `train_step`, with checkpoints and records.

The same command after any interruption gives the same parameters and the same metrics.jsonl, bit for
bit, as if there had been none.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infsub import config as configs
from infsub import data, files, locks, records, signals
from infsub.checkpoints import Checkpoints, load_variables
from infsub.train_step import (
    MAX_EPOCHS,
    METRICS,
    TrainState,
    init_states,
    initial,
    make_task,
    pictures,
    replicated,
    train_chunk,
    unpacked,
    validate,
)
from infsub.types import Array, UserError
from infsub.vae import Variables, make_vae

SECONDS = 1.0  # what a dispatch may take, so that a signal is heard and progress shown


class Member:
    """One model of a run: its workdir, and what decides when it ends.

    Attributes:
      progress: step; best_step, best_epoch and best_value on validation data.
      ended: "" while it trains, then "finished", "stopped early" or "diverged".
    """

    def __init__(self, config: configs.Config, workdir: Path, keep_every_steps: int) -> None:
        self.config, self.workdir = config, workdir
        identity = records.read_run(workdir)["identity"]
        self.checkpoints = Checkpoints(
            workdir / "checkpoints", identity, config.train.keep_last, keep_every_steps
        )
        self.progress = {
            "step": np.asarray(0),
            "best_step": np.asarray(0),
            "best_epoch": np.asarray(0),
            "best_value": np.asarray(-np.inf),
        }
        self.ended = (files.read_json(workdir / "summary.json") or {}).get("ended", "")
        self._board: records.TensorBoard | None = None

    def resume(self, step: int) -> None:
        """Makes the records those of a run that is at `step`."""
        self.checkpoints.clean(step)
        metrics = self.workdir / "metrics.jsonl"
        rows = files.read_rows(metrics)
        files.rewrite_rows(metrics, [row for row in rows if row["step"] <= step])
        self._board = records.TensorBoard(self.workdir / "tensorboard", step + 1 if step else None)

    def judge(self, epoch: int, step: int, value: float) -> bool:
        """Takes note of a validation value; whether it is the best so far."""
        better = bool(value > self.progress["best_value"])
        if better:
            best = {"best_step": step, "best_epoch": epoch, "best_value": value}
            self.progress |= {name: np.asarray(v) for name, v in best.items()}
        return better

    def out_of_patience(self, epoch: int) -> bool:
        """Whether a validated epoch is too long after the best one."""
        train = self.config.train
        # While w rises, the objective is another one: patience starts when it is the ELBO.
        start = train.annealing_epochs if train.annealing != "none" else 0
        waited = epoch - max(start, int(self.progress["best_epoch"]))
        return 0 < train.patience <= waited

    def save(self, step: int, lanes: dict[str, Any]) -> None:
        """Checkpoints this member's state, without waiting for the disk."""
        self.progress["step"] = np.asarray(step)
        self.checkpoints.save(step, lanes | {"progress": self.progress})
        self.write_csv()

    def record(self, row: dict[str, Any], speed: float) -> None:
        """One epoch's row, to metrics.jsonl and TensorBoard."""
        files.append_rows(self.workdir / "metrics.jsonl", [row])
        if self._board is not None:
            self._board.scalars(row["step"], row | {"examples_per_second": speed})

    def draw(self, step: int, grids: dict[str, np.ndarray]) -> None:
        """Grids of images [rows, columns, H, W, C] as <name>.png and in TensorBoard."""
        for name, grid in grids.items():
            image = records.picture(grid)
            files.write_png(self.workdir / f"{name}.png", image)
            if self._board is not None:
                self._board.image(step, name, image)

    def write_csv(self) -> None:
        """metrics.csv from metrics.jsonl."""
        rows = files.read_rows(self.workdir / "metrics.jsonl")
        files.write_csv(self.workdir / "metrics.csv", rows)

    def end(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, the mark of a run that is done, when all else is on disk."""
        self.checkpoints.wait()
        self.write_csv()
        files.write_json(self.workdir / "summary.json", {"ended": self.ended} | summary)

    def close(self) -> None:
        """Waits until all is on disk."""
        self.checkpoints.close()
        if self._board is not None:
            self._board.close()


def train(config: configs.Config, workdir: str | Path) -> None:
    """Trains the model of a config, or goes on where an earlier call was stopped.

    Args:
      config: of a run, see config.py.
      workdir: gets config.json, metrics.jsonl, metrics.csv, summary.json, checkpoints, TensorBoard
        events and pictures; of several seeds, seed_0 … in it get them, each a run of its own.

    Raises:
      UserError: settings that cannot work, or a workdir that is another run's, or that another
        process is training.
      records.Stopped: SIGTERM or Ctrl-C, after a checkpoint; or more than config.train.max_skipped
        steps were not finite.
    """
    config, workdir = configs.resolve(config), Path(workdir)
    with locks.owned(workdir, "training"):
        _train(config, workdir)


def _train(config: configs.Config, workdir: Path) -> None:
    run = Run(config, workdir)
    if not run.active:
        files.say(f"the training of {workdir} is done.")
    else:
        try:
            run.restore()
            run.loop()
        finally:
            for member in run.members:
                member.close()
    diverged = [str(m.workdir) for m in run.members if m.ended == "diverged"]
    if diverged:
        raise records.Stopped(
            f"training diverged in {', '.join(diverged)}: more than config.train.max_skipped="
            f"{run.train.max_skipped} steps were not finite; the last checkpoint before is kept. "
            "Try a smaller config.train.learning_rate or a config.train.gradient_clip, in another "
            "--workdir.",
            exit_code=1,
        )


class Run:
    """The S models of one config that train together, and their state on the device.

    Attributes:
      members: the models' workdirs and records, [S].
      states: TrainState of leaves [S, …].
      best: the variables at the best validation value so far, leaves [S, …].
      step: steps taken, by all of them.
    """

    def __init__(self, config: configs.Config, workdir: Path) -> None:
        self.config, self.train, self.workdir = config, config.train, workdir
        names = config.data
        self.dataset = data.load(names.name, names.dir, names.binarisation, names.levels)
        try:
            self.vae = make_vae(config.model, self.dataset.image_shape, self.dataset.levels)
            jax.eval_shape(self.vae.init, jax.random.key(0))
        except (ValueError, TypeError) as error:
            raise UserError(f"config.model cannot be built: {error}") from error
        num_train = self.dataset.train.size
        if self.train.batch_size > num_train:
            raise UserError(
                f"config.train.batch_size={self.train.batch_size} is more than the {num_train} "
                f"training images of {names.name}: give a smaller one."
            )
        self.task = make_task(self.vae, self.train, num_train)
        self.per_epoch = self.task.steps_per_epoch
        self.total = self.train.num_epochs * self.per_epoch
        self.members = self._claim()

    def _claim(self) -> list[Member]:
        facts = {
            "image_shape": self.dataset.image_shape,
            "levels": self.dataset.levels,
            "steps_per_epoch": self.per_epoch,
        }
        source = records.read_run(Path(self.config.init_from)) if self.config.init_from else {}
        identities = (self.dataset.identity, source.get("identity", ""))
        if source:
            here = configs.identified(self.config, *identities)
            self.misfits = configs.differences(source["identified"], here)
        runs = configs.runs(self.config, self.workdir)
        records.claim(self.config, self.workdir, *identities, **facts)
        if len(runs) > 1:
            for config, workdir in runs:
                records.claim(config, workdir, *identities, **facts)
        keep_every = self.train.keep_every * self.per_epoch
        return [Member(config, workdir, keep_every) for config, workdir in runs]

    @property
    def active(self) -> list[int]:
        """The members that still train."""
        return [i for i, member in enumerate(self.members) if not member.ended]

    def restore(self) -> None:
        """Sets the state to the newest step that all active members have a whole checkpoint of."""
        seeds = np.asarray([member.config.seed for member in self.members])
        self.keys, self.look_keys, fresh = initial(self.task, seeds)
        self.best, self.step = self._warm_start(fresh), 0
        self.states = init_states(self.task, self.best)
        members = [self.members[i] for i in self.active]
        # Lanes of members that have ended keep their initial values, which nobody reads.
        lanes = jax.tree.map(np.array, self.states._asdict() | {"best": self.best})
        template = _lane(lanes, 0) | {"progress": members[0].progress}
        common = set.intersection(*(set(m.checkpoints.steps()) for m in members))
        if beyond := [step for step in common if step > self.total]:
            raise UserError(
                f"{self.workdir} has a checkpoint of step {max(beyond)}, and its training ends at step "
                f"{self.total}: it is of another run; remove it."
            )
        for step in sorted(common, reverse=True):
            trees = [member.checkpoints.restore(template, step) for member in members]
            if None not in trees:
                for i, tree in zip(self.active, filter(None, trees), strict=True):
                    self.members[i].progress = tree.pop("progress")
                    jax.tree.map(lambda lane, leaf, i=i: lane.__setitem__(i, leaf), lanes, tree)
                lanes = jax.tree.map(jnp.asarray, lanes)
                self.best, self.step = lanes.pop("best"), step
                self.states = TrainState(**lanes)
                files.say(f"continuing from step {step} of {self.total}.")
                break
        self.keys, self.states, self.images = replicated(
            self.task, (self.keys, self.states, unpacked(self.dataset.train.images))
        )
        for member in members:
            member.resume(self.step)

    def _warm_start(self, variables: Variables) -> Variables:
        if not self.config.init_from:
            return variables
        source, _ = load_variables(self.config.init_from)
        for part in ("decoder",) if self.config.init_parts == "decoder" else tuple(variables):
            shapes = jax.tree.map(lambda a: a.shape[1:], variables[part])
            if jax.tree.map(np.shape, source[part]) != shapes:
                model = [d for d in self.misfits if d.startswith(("model.", "data"))]
                raise UserError(
                    f"the {part} of config.init_from={self.config.init_from} does not fit this "
                    f"model: {'; '.join(model)}."
                )
            variables[part] = jax.tree.map(
                lambda a, b: jnp.broadcast_to(a, b.shape), source[part], variables[part]
            )
        return variables

    def loop(self) -> None:
        """Trains until all members have ended, or a signal comes."""
        bar = files.Progress(self.total, "train", done=self.step)
        chunk, saved = 8, time.monotonic()
        with signals.noted() as stop:
            self._end_members()
            while self.active and not stop.number:
                begin, start = self.step, time.monotonic()
                self.step = min(begin + chunk, self._boundary(begin))
                self.states, rows = train_chunk(
                    self.task, self.keys, self.states, self.images, begin, self.step
                )
                rows = jax.device_get(rows)
                seconds = time.monotonic() - start
                speed = (self.step - begin) * self.train.batch_size / seconds
                if seconds > SECONDS:
                    chunk = max(1, chunk // 2)
                elif seconds < SECONDS / 2:
                    chunk *= 2
                note = self._end_epochs(begin, rows, speed)
                self._end_members()
                kept = self.step % (self.train.keep_every * self.per_epoch or self.total) == 0
                late = time.monotonic() - saved > self.train.checkpoint_seconds
                if kept or late:
                    self._save()
                    saved = time.monotonic()
                bar.update(self.step, note)
                records.write_progress(self.workdir, bar, speed)
        bar.close()
        if stop.number:
            self._save()
            raise records.Stopped(
                f"stopped at step {self.step}, saved; the same command continues from there.",
                exit_code=128 + stop.number,
            )

    def _boundary(self, step: int) -> int:
        """The first step after `step` where something is due."""
        every = [self.train.validate_every, MAX_EPOCHS, *filter(None, [self.train.keep_every])]
        epoch = min((step // self.per_epoch // n + 1) * n for n in every)
        return min(self.total, epoch * self.per_epoch)

    def _validates(self) -> bool:
        every = self.train.validate_every * self.per_epoch
        return self.step % every == 0 or self.step == self.total

    def _end_epochs(self, begin: int, rows: dict[str, np.ndarray], speed: float) -> str:
        """Records the epochs that ended after `begin`, the last one with validation if it is due."""
        first, end = begin // self.per_epoch, self.step // self.per_epoch
        validation = (
            self._validate(self.states.variables, "validation") if self._validates() else {}
        )
        better = np.zeros(len(self.members), bool)
        for i in self.active:
            member = self.members[i]
            for epoch in range(first, end):
                values = {name: _plain(values[i, epoch - first]) for name, values in rows.items()}
                count = values.pop("count")
                means = {n: _plain(np.float32(values.pop(n) / max(count, 1))) for n in METRICS}
                row = {"epoch": epoch + 1, "step": (epoch + 1) * self.per_epoch, **means, **values}
                row["skipped"] = self.per_epoch - round(count)
                if epoch == end - 1 and validation:
                    row |= {f"validation_{n}": _plain(v[i]) for n, v in validation.items()}
                    value = row[f"validation_{self.train.criterion}"]
                    better[i] = member.judge(end, self.step, value)
                member.record(row, speed)
        if better.any():
            self.best = _choose(better, self.states.variables, self.best)
        if validation and end // self.train.picture_every > first // self.train.picture_every:
            self._draw(self.states.variables, self.active)
        shown = validation.get("elbo", rows["elbo"][:, 0] / np.maximum(rows["count"][:, 0], 1))
        kind = "validation ELBO" if validation else "ELBO"
        return f"epoch {end}, {kind} {', '.join(f'{v:.2f}' for v in shown)}"

    def _end_members(self) -> None:
        """Ends the members that are done, stopped or diverged at this step."""
        skipped = np.asarray(self.states.skipped)
        ending = []
        for i in self.active:
            member = self.members[i]
            if skipped[i] > self.train.max_skipped:
                member.ended = "diverged"
                member.end({"step": self.step, "skipped": int(skipped[i])})
            elif self._validates() and member.out_of_patience(self.step // self.per_epoch):
                member.ended = "stopped early"
            elif self.step == self.total:
                member.ended = "finished"
            if member.ended in ("finished", "stopped early"):
                ending.append(i)
        if not ending:
            return
        self._save(ending)
        self._draw(self.best, ending)
        test = self._validate(self.best, "test")
        for i in ending:
            progress = {n: value.item() for n, value in sorted(self.members[i].progress.items())}
            measured = {f"test_{name}": _plain(value[i]) for name, value in test.items()}
            samples = {"test_samples": self.train.validation_samples}
            self.members[i].end(progress | measured | samples | {"skipped": int(skipped[i])})

    def _save(self, members: list[int] | None = None) -> None:
        lanes = jax.device_get(self.states._asdict() | {"best": self.best})
        for i in self.active if members is None else members:
            self.members[i].save(self.step, _lane(lanes, i))

    def _validate(self, variables: Variables, split: str) -> dict[str, np.ndarray]:
        images, samples = self.dataset.split(split).images, self.train.validation_samples
        return jax.device_get(validate(self.vae, samples, variables, images, self.look_keys[0]))

    def _draw(self, variables: Variables, members: list[int]) -> None:
        images, names = self.dataset.validation.images, ("reconstructions", "samples")
        grids = jax.device_get(pictures(self.vae, variables, images, self.look_keys[1]))
        for i in members:
            drawn = {name: grid[i] for name, grid in zip(names, grids, strict=True)}
            self.members[i].draw(self.step, drawn)


def _plain(value: Any) -> float:
    # The shortest decimal of a float32: 0.001, where its nearest float64 is 0.0010000000474974513.
    return float(str(value))


def _lane(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], tree)


@jax.jit
def _choose(better: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf, the lanes of `new` where better [S], of `old` elsewhere."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)
