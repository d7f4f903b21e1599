"""Checkpoints that survive `kill -9`: orbax writes aside and renames; a checksum tells when read.

A checkpoint is a flat dict of arrays, {"variables/encoder/params/…": …}, with the identity of the run
it is of and a SHA-256 of them all: nothing of it is code. Of processes that train together each has the
whole state, so the first one writes it: the files do not tell how many there were, and any number of
processes goes on from them. `weights.npz` is a checkpoint of the best weights alone, float32 under plain
names, in a run that is published, or measured and not trained here.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infsub import files, records
from infsub.types import UserError
from infsub.vae import Variables, make_vae

_CHECKSUM, _IDENTITY, _STEP = "sha256", "identity", "step"
WEIGHTS = "weights.npz"


class Checkpoints:
    """The checkpoints of one run, `directory`/<step>; each is enough to go on from, best weights too.

    Args:
      directory: made when missing.
      identity: of the run; a checkpoint of another run is refused.
      keep_last: newest checkpoints that are kept.
      keep_every: steps; checkpoints at its multiples are kept for good; 0: none.
    """

    def __init__(
        self, directory: Path, identity: str, keep_last: int = 3, keep_every: int = 0
    ) -> None:
        import orbax.checkpoint as ocp

        self._directory, self._identity = directory, identity
        self._keep_last, self._keep_every = keep_last, keep_every
        self._damaged: list[Path] = []
        self._writer = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone()),
            multiprocessing_options=_alone(),
        )
        self._save_args = ocp.args.PyTreeSave

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were written to their end, ascending."""
        return steps(self._directory)

    def save(self, step: int, tree: Any) -> None:
        """Writes `tree` as it is now, in the background."""
        self.wait()  # one write at a time; what it made superfluous goes first
        path = self._directory / f"{step:08d}"
        if path.exists():
            return
        self._directory.mkdir(exist_ok=True)
        # Copies: the training step is about to reuse the device's buffers.
        arrays = {name: np.array(leaf) for name, leaf in _flatten(tree).items() if leaf.size}
        arrays[_IDENTITY] = np.frombuffer(self._identity.encode(), np.uint8)
        arrays[_CHECKSUM] = _digest(arrays)
        self._writer.save(path.absolute(), args=self._save_args(arrays))

    def wait(self) -> None:
        """Returns when the last `save` is on disk and superseded checkpoints are gone."""
        self._writer.wait_until_finished()
        present = self.steps()
        for step in present[: -self._keep_last]:
            if not (self._keep_every and step % self._keep_every == 0):
                _remove(self._directory / f"{step:08d}")

    def restore(self, template: Any, step: int) -> Any | Damaged:
        """The tree of `step`, like `template`; or what is wrong with it, when it is damaged."""
        path = self._directory / f"{step:08d}"
        try:
            return read(path, template, self._identity)
        except Damaged as error:
            self._damaged.append(path)
            return error

    def clean(self, last_step: int) -> None:
        """Removes what a killed process left half done, and checkpoints after `last_step`.

        Those that `restore` found damaged are kept aside.
        """
        for path in self._damaged:
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)  # of this step, damaged once before
            os.replace(path, aside)
        self._damaged.clear()
        for path in self._directory.glob("*"):
            newer = path.name.isdecimal() and int(path.name) > last_step
            if newer or ".orbax-checkpoint-tmp" in path.name or path.suffix == ".removed":
                _remove(path)

    def close(self) -> None:
        """Waits for the last write and stops the writer."""
        self.wait()
        self._writer.close()


class Damaged(Exception):
    """A checkpoint that is not what was written."""


def steps(directory: Path) -> list[int]:
    """Steps of the finished checkpoints in a directory, ascending; needs no orbax."""
    return sorted(int(p.name) for p in directory.glob("*") if p.name.isdecimal())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the checkpoint at `path`, or of a file of weights, by name, their checksum verified.

    Raises:
      Damaged: it cannot be read, or its arrays are not those that were written.
    """
    import orbax.checkpoint as ocp

    try:
        if path.name == WEIGHTS:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = dict(file)
        else:
            handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
            with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader:
                arrays = reader.restore(path.absolute())
        whole = np.array_equal(arrays.pop(_CHECKSUM), _digest(arrays))
    except Exception as error:  # a truncated file ends in any of a dozen errors of tensorstore's
        reason = str(error).partition("\n")[0][:120]
        raise Damaged(f"checkpoint {path} cannot be read ({reason})") from error
    if not whole:
        raise Damaged(f"checkpoint {path} is damaged: its checksum does not match")
    return arrays


def read(path: Path, template: Any, identity: str) -> Any:
    """The checkpoint at `path` of the run of this identity, in the structure of `template`.

    Leaves that the checkpoint has and the template has not are left out.

    Raises:
      Damaged: as `read_arrays`, or it does not say of which run it is.
      UserError: the arrays are whole, and of another run or do not fit the template.
    """
    arrays, wanted = read_arrays(path), _flatten(template)
    if _IDENTITY not in arrays:
        raise Damaged(f"checkpoint {path} is damaged: it does not say whose it is")
    if (found := bytes(arrays.pop(_IDENTITY)).decode(errors="replace")) != identity:
        raise UserError(
            f"{path} is a checkpoint of run {found}, and its folder is of run {identity}: remove it, "
            "or give the workdir that it is from."
        )
    for name, leaf in wanted.items():
        if leaf.size and (name not in arrays or arrays[name].shape != leaf.shape):
            found = arrays[name].shape if name in arrays else "nothing"
            raise UserError(f"weights in {path} do not fit: {name} is {found}, not {leaf.shape}.")
    leaves = [arrays.get(name, np.zeros(leaf.shape, leaf.dtype)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def load_variables(workdir: str | Path, which: str = "best") -> tuple[Variables, int]:
    """The VAE's variables, numpy arrays, and the step they were saved at.

    Args:
      workdir: of a run of one seed, or a published one, which has the best weights alone.
      which: "best" on validation data, "last", or "epoch_<n>", one that train.keep_every kept.

    Raises:
      UserError: no run, no such checkpoint, or a damaged one.
    """
    workdir = Path(workdir)
    run, config = records.read_run(workdir), records.read_config(workdir)
    if (num_seeds := config.train.num_seeds) > 1:
        raise UserError(f"{workdir} holds {num_seeds} runs: give one, such as {workdir}/seed_0.")
    if config.model.imported:
        raise UserError(
            f"{workdir} is {config.model.imported}, a model of one's own, whose weights infsub does not "
            "keep: give a run that infsub trained."
        )
    directory = workdir / "checkpoints"
    present, published = steps(directory), workdir / WEIGHTS
    if not present and not published.exists():
        summary = files.read_json(workdir / "summary.json", records.SUMMARY)
        if summary and summary["ended"] == "diverged":
            raise UserError(
                f"{workdir} has no checkpoint, for its training diverged before the first one: train "
                "with a smaller config.train.learning_rate, in another --workdir."
            )
        raise UserError(f"{workdir} has no checkpoint yet: run it with --mode=train first.")
    try:
        vae = make_vae(config.model, run["image_shape"], run["levels"])
        variables = jax.eval_shape(vae.init, jax.random.key(0))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{workdir / 'config.json'}: config.model cannot be built: {error}"
        ) from error
    if not present:
        return _read_weights(published, variables, run["identity"], which)
    step, name = present[-1], "best" if which == "best" else "variables"
    if which.startswith("epoch_") and which[6:].isdecimal():
        step = int(which[6:]) * run["steps_per_epoch"]
    elif which not in ("best", "last"):
        raise UserError(f"checkpoint {which!r} is not known; give best, last or epoch_<n>.")
    if step not in present:
        have = ", ".join(f"epoch_{s / run['steps_per_epoch']:g}" for s in present)
        raise UserError(f"{workdir} has no checkpoint {which}; it has {have}.")
    template = {name: variables, "progress": {"best_step": np.zeros((), np.int64)}}
    try:
        tree = read(directory / f"{step:08d}", template, run["identity"])
    except Damaged as error:
        gone = "it" if step == present[-1] else "it and those after it"
        raise UserError(f"{error}; remove {gone}, and the training command goes on.") from error
    best_step = int(tree["progress"]["best_step"])
    if which == "best" and not best_step:  # they are the weights before the first step
        go_on = "" if (workdir / "summary.json").exists() else "go on training, or "
        raise UserError(
            f"no validation value of {workdir} was finite so far, so no weights are its best: {go_on}give "
            "config.evaluate.checkpoint=last."
        )
    return tree[name], best_step if which == "best" else step


def weights(variables: Variables, step: int, identity: str) -> dict[str, np.ndarray]:
    """What `weights.npz` holds: the variables, float32, under names as encoder/params/Dense_0/kernel.

    With them the step they are of, the identity of their run, and the SHA-256 of it all.
    """
    arrays = {n: np.asarray(a, np.float32) for n, a in _flatten(variables).items() if a.size}
    arrays |= {_STEP: np.asarray(step), _IDENTITY: np.frombuffer(identity.encode(), np.uint8)}
    return arrays | {_CHECKSUM: _digest(arrays)}


def _read_weights(path: Path, variables: Any, identity: str, which: str) -> tuple[Variables, int]:
    if which != "best":
        raise UserError(
            f"{path} has the best weights alone: give config.evaluate.checkpoint=best, not {which}."
        )
    try:
        tree = read(path, variables | {_STEP: np.zeros((), np.int64)}, identity)
    except Damaged as error:
        raise UserError(f"{error}; take the published file again.") from error
    step = int(tree.pop(_STEP))
    return tree, step


def _alone() -> Any:
    """For orbax: this process reads and writes, and waits for no other one."""
    import orbax.checkpoint as ocp

    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _digest(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.frombuffer(files.checksum(arrays), np.uint8)


def _remove(path: Path) -> None:
    # Renamed first: a kill in the middle of the removal must not leave half a checkpoint.
    gone = path if path.suffix == ".removed" else path.with_suffix(".removed")
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
