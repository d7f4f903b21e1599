"""Training that can be left alone: the loop around `train_step`, with checkpoints and records.

The same command after any interruption gives the same parameters and the same metrics.jsonl, bit for
bit, as if there had been none. Of processes that train together the first one does all of this, and
the others take the steps that it chooses: `_follow`. The sums of their gradients are rounded in
another order, and no more than that differs.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from infsub import compilations, data, files, locks, processes, records, signals
from infsub import config as configs
from infsub.checkpoints import WEIGHTS, Damaged, load_variables
from infsub.members import Member
from infsub.train_step import (
    MAX_EPOCHS,
    METRICS,
    Task,
    TrainState,
    addressable,
    init_states,
    initial,
    make_task,
    pictures,
    replicated,
    train_chunk,
    unpacked,
    validate,
)
from infsub.types import Array, Key, UserError
from infsub.vae import Variables, make_vae

SECONDS = 1.0  # what a dispatch may take, so that a signal is heard and progress shown


def train(config: configs.Config, workdir: str | Path, patience: float = 0.0) -> None:
    """Trains the model of a config, or goes on where an earlier call was stopped.

    Args:
      config: of a run, see config.py.
      workdir: gets config.json, metrics.jsonl, metrics.csv, summary.json, checkpoints, TensorBoard
        events and pictures; of several seeds, seed_0 … in it get them, each a run of its own.
      patience: seconds to wait for another process that trains it.

    Raises:
      UserError: settings that cannot work, or a workdir that is another run's, or that another
        process is training; an init_from that is still in training.
      records.Stopped: SIGTERM or Ctrl-C, after a checkpoint; or more than config.train.max_skipped
        steps were not finite, or all validation values.
    """
    config, workdir = configs.resolve(config), Path(workdir)
    with contextlib.ExitStack() as held:
        _train(config, workdir, held, patience)


def _train(
    config: configs.Config, workdir: Path, held: contextlib.ExitStack, patience: float
) -> None:
    job = processes.together(lambda: _job(config, workdir, held, patience))
    identity = configs.identity(config, job.dataset.identity)
    told = processes.exchanged([identity, bool(job.active)])
    processes.together(lambda: _check_equal(job, [identity for identity, _ in told]))
    if processes.count() > 1 and processes.is_first():
        size = job.task.mesh.size  # pyright: ignore[reportOptionalMemberAccess]
        files.say(
            f"{processes.count()} processes train together, each batch of {config.train.batch_size} on "
            f"{size} devices."
        )
    step, number = 0, 0
    if not told[0][1]:
        files.say(f"the training of {workdir} is done.")
    else:
        try:
            inputs, state = _shared(job, *processes.together(lambda: _restore(job)))
            if not state.step and processes.is_first():
                for sentence in _idle(config):
                    files.say(sentence)
            step, number = (_loop if processes.is_first() else _follow)(job, inputs, state)
        finally:
            for member in job.members:
                member.close()
    processes.together(lambda: _judge(job, step, number))


def _check_equal(job: Job, identities: list[str]) -> None:
    """Raises UserError where processes that are to train together have other configs or data."""
    if len(set(identities)) > 1:
        other = next(i for i, identity in enumerate(identities) if identity != identities[0])
        raise UserError(
            f"process {other} has another config or data set than process 0: start all processes of "
            f"{job.workdir} with one command, on the same {job.config.data.name}."
        )


def _judge(job: Job, step: int, number: int) -> None:
    """Raises Stopped when the signal of this number has ended the training, or it has diverged."""
    if number:
        raise records.Stopped(
            f"stopped at step {step}, saved; the same command continues from there.",
            exit_code=128 + number,
        )
    diverged = [f"{m.workdir} ({m.why})" for m in job.members if m.ended == "diverged"]
    if diverged:
        raise records.Stopped(
            f"training diverged in {', '.join(diverged)}; the last checkpoint before is kept. Try a "
            "smaller config.train.learning_rate or a config.train.gradient_clip, in another --workdir.",
            exit_code=1,
        )


def _idle(config: configs.Config) -> list[str]:
    """Settings that do not do what they say, each in a sentence."""
    train, found = config.train, []
    if train.annealing != "none" and train.annealing_epochs >= train.num_epochs:
        found.append(
            f"config.train.annealing_epochs={train.annealing_epochs} of config.train.num_epochs="
            f"{train.num_epochs}: no epoch is trained at w = 1, on the objective itself."
        )
    if train.objective == "iwae" and train.num_samples == 1:
        found.append("config.train.objective=iwae of config.train.num_samples=1 is the ELBO.")
    if config.init_parts != "all" and not config.init_from:
        found.append(f"config.init_parts={config.init_parts} of no config.init_from takes nothing.")
    return found


class Job(NamedTuple):
    """What stays the same while the S models of one config train together.

    Attributes:
      config: of the run, resolved.
      workdir: of the run.
      dataset: to train, validate and test on.
      task: what runs on the device.
      members: the models' workdirs and records, [S]; of processes that train together the first has
        them, and the others none.
      began: what the process had spent before.
    """

    config: configs.Config
    workdir: Path
    dataset: data.Dataset
    task: Task
    members: list[Member]
    began: compilations.Spent

    @property
    def active(self) -> list[int]:
        """The members that still train."""
        return [i for i, member in enumerate(self.members) if not member.ended]

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.config.train.num_epochs * self.task.steps_per_epoch

    def validates(self, step: int) -> bool:
        """Whether validation is due after so many steps."""
        every = self.config.train.validate_every * self.task.steps_per_epoch
        return step % every == 0 or step == self.total

    def boundary(self, step: int) -> int:
        """The first step after `step` where something is due."""
        train, per_epoch = self.config.train, self.task.steps_per_epoch
        every = [train.validate_every, MAX_EPOCHS, *filter(None, [train.keep_every])]
        epoch = min((step // per_epoch // n + 1) * n for n in every)
        return min(self.total, epoch * per_epoch)


class Inputs(NamedTuple):
    """What the steps of a job read, on the device.

    Attributes:
      keys, keys_validation, keys_pictures: of the models, [S].
      images: of the training split.
    """

    keys: Key
    keys_validation: Key
    keys_pictures: Key
    images: data.Images


class State(NamedTuple):
    """What a job's steps change, all models together.

    Attributes:
      step: steps taken.
      models: TrainState of leaves [S, …].
      best: the variables at the best validation value so far, leaves [S, …].
    """

    step: int
    models: TrainState
    best: Variables


def _job(config: configs.Config, workdir: Path, held: contextlib.ExitStack, patience: float) -> Job:
    """Reads the data, builds the model and makes the workdirs this run's, their locks `held`."""
    names, train, began = config.data, config.train, compilations.spent()
    dataset = data.load_config(names)
    try:
        vae = make_vae(config.model, dataset.image_shape, dataset.levels)
        shapes = jax.eval_shape(vae.init, jax.random.key(0))
    except (ValueError, TypeError) as error:
        raise UserError(f"config.model cannot be built: {error}") from error
    num_train = dataset.train.size
    if train.batch_size > num_train:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is more than the {num_train} "
            f"training images of {names.name}: give a smaller one."
        )
    task = make_task(vae, train, num_train)
    if not processes.is_first():
        return Job(config, workdir, dataset, task, [], began)
    source = _source(Path(config.init_from)) if config.init_from else ""
    if source and not (workdir / "config.json").exists():
        _given_parts(config, dataset.identity, shapes)
    runs = configs.runs(config, workdir)
    # Last: a mistake leaves no folder behind.
    for each, folder in [(config, workdir), *(runs if len(runs) > 1 else [])]:
        held.enter_context(locks.owned(folder, "training", patience))
        records.claim(
            each,
            folder,
            dataset.identity,
            source,
            image_shape=dataset.image_shape,
            levels=dataset.levels,
            steps_per_epoch=task.steps_per_epoch,
        )
    keep_every = train.keep_every * task.steps_per_epoch
    members = [Member(each, folder, keep_every, len(runs)) for each, folder in runs]
    return Job(config, workdir, dataset, task, members, began)


def _source(folder: Path) -> str:
    """The identity of the run whose weights another one starts from."""
    if not (folder / "config.json").exists():
        raise UserError(
            f"config.init_from={folder} holds no run (it has no config.json): give a run's --workdir, or a "
            "published one."
        )
    run = records.read_run(folder)
    ended = any((folder / name).exists() for name in ("summary.json", WEIGHTS))
    if (folder / "checkpoints").exists() and not ended:
        raise UserError(
            f"config.init_from={folder} is not trained to its end, and its weights may be others by "
            "tomorrow: the command that trains it goes on."
        )
    return run["identity"]


def _restore(job: Job) -> tuple[Inputs, State]:
    """The state at the newest step that all active members have a whole checkpoint of.

    Without members, what is not in checkpoints, and a state of the same shapes.
    """
    seeds = np.asarray([each.seed for each, _ in configs.runs(job.config, job.workdir)])
    keys, (keys_validation, keys_pictures), fresh = initial(job.task, seeds)
    images = unpacked(job.dataset.train.images)
    inputs = Inputs(keys, keys_validation, keys_pictures, images)
    if not job.members:
        return inputs, State(0, init_states(job.task, fresh), fresh)
    best = _warm_start(job, fresh)
    state = State(0, init_states(job.task, best), best)
    members = [job.members[i] for i in job.active]
    # Members that have ended keep their initial values here, which nobody reads.
    stacked = jax.tree.map(np.array, _saved(state))
    template = _of_member(stacked, 0) | {"progress": members[0].progress}
    common = set.intersection(*(set(m.checkpoints.steps()) for m in members))
    if beyond := [step for step in common if step > job.total]:
        raise UserError(
            f"{job.workdir} has a checkpoint of step {max(beyond)}, and its training ends at step "
            f"{job.total}: it is of another run; remove it."
        )
    damaged: list[Damaged] = []
    for step in sorted(common, reverse=True):
        trees: list[Any] = [member.checkpoints.restore(template, step) for member in members]
        if found := [tree for tree in trees if isinstance(tree, Damaged)]:
            damaged += found
            continue
        for error in damaged:
            logging.warning("%s; falling back to the one before.", error)
        for i, tree in zip(job.active, trees, strict=True):
            job.members[i].progress = tree.pop("progress")
            jax.tree.map(lambda all, one, i=i: all.__setitem__(i, one), stacked, tree)
        arrays = jax.tree.map(jnp.asarray, stacked)
        best = arrays.pop("best")
        state = State(step, TrainState(**arrays), best)
        files.say(f"continuing from step {step} of {job.total}.")
        break
    else:
        if damaged:  # or the disk, the memory or orbax is, for the moment
            raise UserError(
                f"no checkpoint of {job.workdir} can be read: {damaged[0]}. Mend what keeps it from "
                "being read, and the same command goes on; or remove all of them, and it begins anew."
            )
        if any(len(member.checkpoints.steps()) > 1 for member in members):
            raise UserError(
                f"the seeds of {job.workdir} that are to go on have no checkpoint of one step: put back "
                "those that were removed, or remove all of them, and their training begins anew."
            )
        if any(member.checkpoints.steps() for member in members):
            # Killed while the first ones were written.
            files.say("not all seeds have a checkpoint: they begin anew.")
    for member in members:
        member.resume(state.step)
    return inputs, state


def _shared(job: Job, inputs: Inputs, state: State) -> tuple[Inputs, State]:
    """What a step reads and changes, on all devices, as the first process has it."""
    step = processes.exchanged(state.step)[0]
    models = processes.of_first(state.models)
    keys, models, images = replicated(job.task, (inputs.keys, models, inputs.images))
    return inputs._replace(keys=keys, images=images), state._replace(step=step, models=models)


def _warm_start(job: Job, variables: Variables) -> Variables:
    """`variables` [S, …] with the parts that the run `init_from` gives."""
    if not job.config.init_from:
        return variables
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), variables)
    given = _given_parts(job.config, job.dataset.identity, shapes)
    for part in given:
        variables[part] = jax.tree.map(
            lambda a, b: jnp.broadcast_to(a, b.shape), given[part], variables[part]
        )
    return variables


def _given_parts(config: configs.Config, data_identity: str, shapes: Variables) -> Variables:
    """The parts that the run `init_from` gives to a model whose variables have these shapes.

    Raises:
      UserError: it has no weights, or they do not fit.
    """
    source, _ = load_variables(config.init_from)
    parts = ("decoder",) if config.init_parts == "decoder" else tuple(shapes)
    for part in parts:
        if jax.tree.map(np.shape, source[part]) != jax.tree.map(np.shape, shapes[part]):
            run = records.read_run(Path(config.init_from))
            own = configs.identified(config, data_identity, run["identity"])
            differing = configs.differences(run["identified"], own)
            model = [phrase for phrase in differing if phrase.startswith(("model.", "data"))]
            raise UserError(
                f"the {part} of config.init_from={config.init_from} does not fit this "
                f"model: {'; '.join(model)}."
            )
    return {part: source[part] for part in parts}


def _loop(job: Job, inputs: Inputs, state: State) -> tuple[int, int]:
    """Trains until all members have ended, or a signal comes to any process.

    Returns:
      The last step, and the signal's number, or 0.
    """
    train, per_epoch = job.config.train, job.task.steps_per_epoch
    models, state = state.models, state._replace(models=addressable(state.models))
    bar = files.Progress(job.total, "train", done=state.step)
    chunk, saved = 8, time.monotonic()
    clock = job.workdir / "progress.json"
    began = records.continued(job.began, clock) if state.step else job.began
    with signals.noted() as stop:
        _end_members(job, inputs, state)
        while True:
            begin = state.step
            end = min(begin + chunk, job.boundary(begin)) if job.active else begin
            end, number = _agreed(end, stop)
            if number or end == begin:
                break
            start = time.monotonic()
            models, rows = train_chunk(job.task, inputs.keys, models, inputs.images, begin, end)
            state, rows = state._replace(step=end, models=addressable(models)), jax.device_get(rows)
            seconds = time.monotonic() - start
            speed = (end - begin) * train.batch_size / seconds
            if seconds > SECONDS:
                chunk = max(1, chunk // 2)
            elif seconds < SECONDS / 2:
                chunk *= 2
            state, note = _end_epochs(job, inputs, state, begin, rows, speed)
            _end_members(job, inputs, state)
            kept = end % (train.keep_every * per_epoch or job.total) == 0
            late = time.monotonic() - saved > train.checkpoint_seconds
            if kept or late:
                _save(job, state, job.active)
                saved = time.monotonic()
            bar.update(end, note)
            records.write_progress(clock, bar, speed, compilations.spent().since(began))
    bar.close()
    if number:
        _save(job, state, job.active)
    return state.step, number


def _follow(job: Job, inputs: Inputs, state: State) -> tuple[int, int]:
    """Takes the steps that the first process chooses; what it returns, as `_loop`."""
    models, begin = state.models, state.step
    with signals.noted() as stop:
        while True:
            end, number = _agreed(begin, stop)
            if number or end == begin:
                return begin, number
            models, rows = train_chunk(job.task, inputs.keys, models, inputs.images, begin, end)
            jax.block_until_ready(rows)
            begin = end


def _agreed(end: int, stop: signals.Request) -> tuple[int, int]:
    """The step to go to, as the first process has it, and the number of a signal to any process."""
    told = processes.exchanged([end, stop.number])
    return told[0][0], max(number for _, number in told)


def _end_epochs(
    job: Job, inputs: Inputs, state: State, begin: int, rows: dict[str, np.ndarray], speed: float
) -> tuple[State, str]:
    """Records the epochs that ended after step `begin`, the last one with validation if it is due.

    Returns:
      The state with its best variables, and a note for the progress.
    """
    train, per_epoch = job.config.train, job.task.steps_per_epoch
    first, end = begin // per_epoch, state.step // per_epoch
    validation = {}
    if job.validates(state.step):
        validation = _validate(job, inputs, state.models.variables, "validation")
    better = np.zeros(len(job.members), bool)
    for i in job.active:
        member = job.members[i]
        for epoch in range(first, end):
            values = {name: _plain(values[i, epoch - first]) for name, values in rows.items()}
            count = values.pop("count")
            means = {n: _plain(np.float32(values.pop(n) / (count or np.nan))) for n in METRICS}
            row = {"epoch": epoch + 1, "step": (epoch + 1) * per_epoch, **means, **values}
            row["skipped"] = per_epoch - round(count)
            if epoch == end - 1 and validation:
                row |= {f"validation_{n}": _plain(v[i]) for n, v in validation.items()}
                better[i] = member.judge(end, state.step, row[f"validation_{train.criterion}"])
            member.record(row, speed)
    if better.any():
        state = state._replace(best=_choose(better, state.models.variables, state.best))
    if validation and end // train.picture_every > first // train.picture_every:
        _draw(job, inputs, state.step, state.models.variables, job.active)
    count = rows["count"][:, 0]
    count = np.where(count, count, np.nan)  # of no step there is no mean
    shown = validation.get("elbo", rows["elbo"][:, 0] / count)
    kind = "validation ELBO" if validation else "ELBO"
    return state, f"epoch {end}, {kind} {', '.join(f'{v:.2f}' for v in shown)}"


def _end_members(job: Job, inputs: Inputs, state: State) -> None:
    """Ends the members that are done, stopped or diverged at this step."""
    train, epoch = job.config.train, state.step // job.task.steps_per_epoch
    skipped = np.asarray(state.models.skipped)
    ending = []
    for i in job.active:
        member = job.members[i]
        if skipped[i] > train.max_skipped:
            member.ended = "diverged"
            member.why = (
                f"more than config.train.max_skipped={train.max_skipped} steps were not finite"
            )
        elif job.validates(state.step) and member.out_of_patience(epoch):
            member.ended = "stopped early"
        elif state.step == job.total:
            member.ended = "finished"
        if member.ended in ("finished", "stopped early") and not member.progress["best_step"]:
            member.ended, member.why = "diverged", "no validation value was ever finite"
        if member.ended == "diverged":
            member.end({"why": member.why, "step": state.step, "skipped": int(skipped[i])})
        elif member.ended:
            ending.append(i)
    if not ending:
        return
    _save(job, state, ending)
    _draw(job, inputs, state.step, state.best, ending)
    test = _validate(job, inputs, state.best, "test")
    for i in ending:
        progress = {n: value.item() for n, value in sorted(job.members[i].progress.items())}
        measured = {f"test_{name}": _plain(value[i]) for name, value in test.items()}
        samples = {"test_samples": train.validation_samples}
        job.members[i].end(progress | measured | samples | {"skipped": int(skipped[i])})


def _save(job: Job, state: State, members: list[int]) -> None:
    stacked = jax.device_get(_saved(state))
    for i in members:
        job.members[i].save(state.step, _of_member(stacked, i))


def _saved(state: State) -> dict[str, Any]:
    """What a checkpoint holds of the state, by name, leaves [S, …]."""
    return state.models._asdict() | {"best": state.best}


def _of_member(stacked: Any, i: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def _validate(job: Job, inputs: Inputs, variables: Variables, split: str) -> dict[str, np.ndarray]:
    images, num_samples = job.dataset.split(split).images, job.config.train.validation_samples
    return jax.device_get(
        validate(job.task.vae, num_samples, variables, images, inputs.keys_validation)
    )


def _draw(job: Job, inputs: Inputs, step: int, variables: Variables, members: list[int]) -> None:
    images, names = job.dataset.validation.images, ("reconstructions", "samples")
    grids = jax.device_get(pictures(job.task.vae, variables, images, inputs.keys_pictures))
    for i in members:
        drawn = {name: grid[i] for name, grid in zip(names, grids, strict=True)}
        job.members[i].draw(step, drawn)


def _plain(value: Any) -> float:
    # The shortest decimal of a float32: 0.001, where its nearest float64 is 0.0010000000474974513.
    return float(str(value))


@jax.jit
def _choose(better: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf, `new` where better [S], `old` elsewhere."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, new, old)
