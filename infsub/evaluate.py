"""Rows of bounds: every estimator at every chosen datapoint of a trained run, resumable by block."""

from __future__ import annotations

import contextlib
import hashlib
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infsub import (
    checkpoints,
    compilations,
    data,
    files,
    imported,
    locks,
    provenance,
    records,
    rows,
    shards,
    subjects,
    thumbnails,
)
from infsub import config as configs
from infsub.datapoints import few_sizes, map_datapoints
from infsub.keys import Stream, stream
from infsub.posteriors import chosen_families
from infsub.shards import WHOLE, Shard
from infsub.subjects import Subject
from infsub.types import Key, UserError
from infsub.vae import make_vae

_NUM_DRAWN = 6  # datapoints whose posteriors are drawn
_NUM_AT_ONCE = 500  # images that are copied from the device
_ACTIVITY = "evaluation"  # of the lock
_WEIGHTS = "weights"  # in evaluation.json: a hash of what was measured
_TOLD = (records.NUM_POINTS, records.OWN)


def evaluate(
    config: configs.Config, workdir: Path, shard: Shard = WHOLE, patience: float = 0.0
) -> list[int]:
    """Writes one row of bounds for every chosen datapoint of a run to `rows.jsonl`.

    A row holds index, label, and for every estimator its value and standard error in nats with its
    diagnostics. A datapoint's key is fold_in(the seed's stream ROWS, index), so neither blocks nor
    resuming change its numbers. With bdmc.num_points, `bdmc.jsonl` gets the two-sided bounds of points that
    the model simulates; with grid, `posteriors.npz` the densities of the first datapoints.
    `config.evaluate.name` puts a second evaluation of a run in a folder of its own.

    Args:
      config: of the run.
      workdir: of a run of one seed.
      shard: of the datapoints; it writes into rows of its own, and which rows there are already in
        those of other shards does not matter. The whole evaluates what no shard has, and joins all
        in `rows.jsonl`.
      patience: seconds to wait for another process that makes the same evaluation.

    Returns:
      Indices of the datapoints, of this shard, at which an estimate is not finite.

    Raises:
      UserError: no trained run; a choice of points the data cannot give; rows of other settings;
        another process is making this evaluation.
    """
    run = records.read_run(workdir)  # first, so that no folder is made where no run is
    folder = workdir / config.evaluate.name
    with locks.owned(folder, _ACTIVITY + shard.name, patience):
        if shard == WHOLE:
            locks.refuse_others(folder, f"{_ACTIVITY}.shard-*")
        return _evaluate(config, workdir, run, shard)


def _evaluate(
    config: configs.Config, workdir: Path, run: dict[str, Any], shard: Shard
) -> list[int]:
    began = compilations.spent()
    root = jax.random.key(config.seed)
    key_rows, key_certificate = stream(root, Stream.ROWS), stream(root, Stream.CERTIFICATE)
    source = _theirs(config, root) if config.model.imported else _ours(config, workdir, run, root)
    points, facts, settings = source.points, source.facts, source.settings
    indices = choose(points, settings)
    with contextlib.ExitStack() as whole:
        if shard != WHOLE:  # one shard at a time, and none while the whole is evaluated
            held = locks.owned(workdir / settings.name, _ACTIVITY, locks.MOMENT)
            whole.enter_context(held)
        told: dict[str, Any] = {records.NUM_POINTS: len(indices)}
        told |= {records.OWN: source.own} if config.model.imported else {}
        folder = _claim(workdir, settings, run, facts, told)
        claimed = files.read_json(folder / "evaluation.json") or {}
    if shards.paths(folder, "rows"):
        began = records.continued(began, _clock(folder, shard))
    num_points, num_chains = max(1, len(shard.of(indices))), settings.ais.num_chains
    block_size, chunk_size = subjects.sizes(num_points, num_chains, settings.block_size)
    static = {"settings": configs.measured(settings)}

    def mapped(
        function: Any, key: Key, xs: Any, indices: np.ndarray, **sizes: int
    ) -> dict[str, Any]:
        return map_datapoints(
            function,
            key,
            xs,
            source.params,
            source.subject,
            static=static | sizes,
            block_size=block_size,
            indices=indices,
            warn=False,
        )

    def evaluated(block: np.ndarray) -> dict[str, Any]:
        labels = [None] * len(block) if points.labels is None else points.labels[block]
        columns = mapped(subjects.row, key_rows, points.at(block), block, chunk_size=chunk_size)
        now = files.read_json(folder / "evaluation.json") or {}
        # Another shard may have claimed it while there were no rows.
        if differing := configs.differences(claimed, now):
            raise UserError(
                f"{folder} is another evaluation's by now: {'; '.join(differing)}. Keep both with "
                "--config.evaluate.name=NAME, a folder for this evaluation."
            )
        return {rows.LABEL: labels} | columns

    written = _write_rows(
        folder, "rows", shard, "evaluating", indices, block_size, evaluated, began
    )
    if settings.bdmc.num_points:
        simulated = np.arange(settings.bdmc.num_points)

        def bounded(block: np.ndarray) -> dict[str, Any]:
            covariates = points.at(indices[block % len(indices)])
            return mapped(subjects.certificate, key_certificate, covariates, block)

        _write_rows(folder, "bdmc", shard, "certifying", simulated, block_size, bounded, began)
    bad = _not_finite(indices, written)
    kept = files.read_npz(folder / records.IMAGES, records.SHOWN, records.WORDS)
    # Of no file, or of before others were added to indices_file.
    if not np.array_equal(kept.get("indices", []), indices):
        files.write_npz(folder / records.IMAGES, {"indices": indices} | points.shown(indices))
    if not settings.grid or (folder / records.POSTERIORS).exists():
        return bad
    everything = shards.read(folder, "rows")
    place = np.flatnonzero(~np.isin(indices, _not_finite(indices, everything)))[:_NUM_DRAWN]
    first = indices[place]
    if len(everything) == len(indices) and first.size:  # the last shard draws them
        arrays = {"indices": first, "families": [source.own, *settings.local.families]}
        shown = files.read_npz(folder / records.IMAGES, records.SHOWN, records.WORDS)
        arrays |= {"images": shown["images"][place] / 255} if "images" in shown else {}
        arrays |= mapped(subjects.pictures, key_rows, points.at(first), first)
        files.write_npz(folder / records.POSTERIORS, arrays)
    return bad


class _Points(NamedTuple):
    """The datapoints there are.

    Attributes:
      size: N.
      labels: [N], or None.
      at: indices [B] -> x's, a pytree [B, …].
      shown: indices [B] -> what a page shows of them, as `thumbnails.arrays`; of all at once, for one
        kind and one range of greys.
    """

    size: int
    labels: np.ndarray | None
    at: Callable[[np.ndarray], Any]
    shown: Callable[[np.ndarray], dict[str, np.ndarray]]


class _Source(NamedTuple):
    """A model and the data it is evaluated on.

    Attributes:
      own: the encoder's family.
      facts: what rows depend on beside the settings.
      settings: config.evaluate, as it is for this model.
    """

    subject: Subject
    params: Any
    own: str
    points: _Points
    facts: dict[str, Any]
    settings: Any


def _ours(config: configs.Config, workdir: Path, run: dict[str, Any], root: Key) -> _Source:
    """The VAE that a run has trained, on its data or on what it simulates."""
    settings, dataset = config.evaluate, data.load_config(config.data)
    records.check(config, workdir, run, data_identity=dataset.identity)
    variables, step = checkpoints.load_variables(workdir, settings.checkpoint)
    facts: dict[str, Any] = {"step": step, _WEIGHTS: imported.digest(variables)}
    variables = jax.device_put(variables)
    vae = make_vae(config.model, dataset.image_shape, dataset.levels)
    if settings.split == "model":
        number = settings.first or 10 * settings.per_class
        split = subjects.simulate(stream(root, Stream.IMAGES), vae, variables, number)
        images = np.asarray(split.images.values)
        facts[records.DATA] = hashlib.sha256(images.tobytes()).hexdigest()[:16]
    else:
        split = dataset.split(settings.split)
        facts |= _drawn(config, dataset)
    own = config.model.posterior.name
    points = _points_of(split, dataset.levels, root)
    return _Source(subjects.of_vae(vae, own), variables, own, points, facts, settings)


def _theirs(config: configs.Config, root: Key) -> _Source:
    """A model of the user's own, on its own data or on the config's.

    Raises:
      UserError: what is asked for it cannot do.
    """
    settings = config.evaluate
    model, params, xs, labels = found = imported.load(
        config.model.imported, config.model.checkpoint
    )
    subject = subjects.of_model(model)
    if settings.split == "model" or (settings.bdmc.num_points and subject.simulate is None):
        field = "split=model" if settings.split == "model" else "bdmc.num_points"
        raise UserError(
            f"config.evaluate.{field} needs a model that simulates, and config.model.imported's does "
            "not: split=model is for infsub's own, bdmc.num_points needs sample_x, and sample_prior "
            "where there is a log_prior."
        )
    if settings.grid and model.latent_dim != 2:
        raise UserError(f"config.evaluate.grid needs a z of 2; the model's is {model.latent_dim}.")
    facts = {"params and xs": found.identity}
    settings = settings.copy_and_resolve_references().unlock()
    if xs is None:
        dataset = data.load_config(config.data)
        points = _points_of(dataset.split(settings.split), dataset.levels, root)
        facts |= _drawn(config, dataset)
    else:
        facts[records.DATA] = imported.digest(xs)
        chosen = settings.first or settings.indices_file
        if not chosen and settings.per_class == configs.default().evaluate.per_class:
            settings.per_class = 0  # nobody asked for so many

        def at(block: np.ndarray) -> Any:
            return jax.tree.map(lambda leaf: np.asarray(leaf)[block], xs)

        def shown(block: np.ndarray) -> dict[str, np.ndarray]:
            return thumbnails.arrays(at(block))

        points = _Points(found.size, labels, at, shown)
    first = jax.tree.map(lambda leaf: leaf[0], points.at(np.arange(1)))
    own, stated = subjects.family_of(model, params, first), config.model.posterior.name
    if not own and stated != "gaussian":  # the default states nothing
        own = stated
    settings.local.families = chosen_families(settings.local.families, own)
    return _Source(subject, params, own, points, facts, settings.lock())


def _drawn(config: configs.Config, dataset: data.Dataset) -> dict[str, str]:
    """What tells images apart whose pixels this seed has drawn."""
    if config.data.binarisation != "dynamic":
        return {}
    return {records.DATA: f"{dataset.identity} drawn by seed {config.seed}"}


def _points_of(split: data.Split, levels: int, root: Key) -> _Points:
    key = stream(root, Stream.IMAGES)

    def at(block: np.ndarray) -> np.ndarray:
        return np.asarray(data.batch(split.images, jnp.asarray(block), key))

    def shown(chosen: np.ndarray) -> dict[str, np.ndarray]:
        blocks = np.split(chosen, range(_NUM_AT_ONCE, len(chosen), _NUM_AT_ONCE))
        images = [(at(block) * (255 / (levels - 1))).astype(np.uint8) for block in blocks]
        return {"images": np.concatenate(images)}

    return _Points(split.size, split.labels, at, shown)


def _check_kept(config: configs.Config, workdir: Path) -> None:
    """Raises UserError where training would end without the checkpoint that is to be evaluated."""
    which, train = config.evaluate.checkpoint, config.train
    if not which.startswith("epoch_"):
        return
    ended = [(folder / "summary.json").exists() for _, folder in configs.runs(config, workdir)]
    if all(ended):  # what there is, evaluation says itself
        return
    epoch = int(which[6:])
    before = 0 < epoch < train.num_epochs
    kept = before and train.keep_every and epoch % train.keep_every == 0
    if not kept and epoch != train.num_epochs:
        every = f"that of every {train.keep_every} epochs and " if train.keep_every else ""
        other = f", or config.train.keep_every={epoch}" if before else ""
        raise UserError(
            f"config.evaluate.checkpoint={which} is none that training keeps: it keeps {every}the last "
            f"one, epoch_{train.num_epochs}. Give one of these{other}."
        )


def check(config: configs.Config, workdir: Path) -> None:
    """Raises UserError where there will be no such checkpoint or datapoints, before all is trained for them.

    Not of as many of each class: for that the data would have to be read.
    """
    _check_kept(config, workdir)
    size = data.load_config(config.data).sizes.get(config.evaluate.split)
    if size:  # not of what the model simulates
        choose(types.SimpleNamespace(size=size, labels=None), config.evaluate)


def choose(split: Any, settings: Any) -> np.ndarray:
    """Indices [N] into a split, or whatever has a size and labels: by file, per class, first n, all."""
    if settings.indices_file:
        return _read_indices(Path(settings.indices_file), split.size)
    if settings.first:
        return data.subset(split, first=settings.first)
    if settings.per_class and split.labels is not None:
        return data.subset(split, per_class=settings.per_class)
    if settings.per_class:  # a data set without labels: as many points, from the front
        return data.subset(split, first=min(10 * settings.per_class, split.size))
    return np.arange(split.size)


def _read_indices(path: Path, size: int) -> np.ndarray:
    try:
        indices = np.array([int(line) for line in path.read_text().split()])
    except (OSError, ValueError) as error:
        raise UserError(
            f"config.evaluate.indices_file={path} must be a file of integers, one a line ({error})."
        ) from error
    if not indices.size or indices.min() < 0 or indices.max() >= size:
        raise UserError(f"{path} must hold indices from 0 to {size - 1}, the split's size − 1.")
    if np.unique(indices).size < indices.size:
        raise UserError(f"{path} names a datapoint twice: each index may stand there once.")
    return indices


def _not_finite(indices: np.ndarray, written: list[dict[str, Any]]) -> list[int]:
    """Those of the indices whose row has an estimate that is not finite."""
    measured = rows.parse(written)
    finite = measured.finite(measured.columns)
    return [int(i) for i in indices[np.isin(indices, measured.indices[~finite])]]


def _claim(
    workdir: Path,
    settings: Any,
    run: dict[str, Any],
    facts: dict[str, Any],
    told: dict[str, Any],
) -> Path:
    """The folder of this evaluation, whose config.json says with which settings it is made.

    Rows depend on the `facts` as on the settings; what is `told` beside them follows from them.
    """
    folder = workdir / settings.name
    used = _used(settings) | facts
    before = files.read_json(folder / "evaluation.json")
    if before is not None:
        before = {name: value for name, value in before.items() if name not in _TOLD}
        since = {name: facts[name] for name in (records.DATA,) if name in facts}
        before = _used(configs.default().evaluate) | since | before  # with what was added since
    if before != used and shards.read(folder, "rows"):
        made = " and ".join(map(str, shards.paths(folder, "rows")))
        if before is None:
            raise UserError(
                f"{folder / 'evaluation.json'} is missing, which says with which settings and weights "
                f"{made} was made: put it back, or remove the rows too."
            )
        raise UserError(
            f"{made} was made with other settings: {'; '.join(configs.differences(before, used))}. Keep "
            "both with --config.evaluate.name=NAME, a folder for this evaluation, or remove it."
        )
    if before != used:  # what is left of an evaluation whose rows were removed
        left = [folder / name for name in (records.POSTERIORS, records.IMAGES)]
        for path in (*left, *shards.paths(folder, "bdmc")):
            path.unlink(missing_ok=True)
    run |= {"config": run["config"] | {"evaluate": settings.to_dict()}}
    if settings.name:  # else the file is the training's too
        same = before == used and records.is_measured(folder)
        run |= provenance.made_by(files.read_json(folder / "config.json") if same else None)
    files.write_json(folder / "config.json", run)
    files.write_json(folder / "evaluation.json", used | told)
    return folder


def _used(settings: Any) -> dict[str, Any]:
    """The settings that rows depend on, as JSON has them."""
    used = {n: v for n, v in configs.flatten(settings) if n not in ("block_size", "name")}
    return {n: list(v) if isinstance(v, tuple) else v for n, v in used.items()}


def _clock(folder: Path, shard: Shard) -> Path:
    return folder / f"progress.{_ACTIVITY}{shard.name}.json"


def _write_rows(
    folder: Path,
    stem: str,
    shard: Shard,
    label: str,
    indices: np.ndarray,
    block_size: int,
    block_columns: Callable[[np.ndarray], dict[str, Any]],
    began: compilations.Spent,
) -> list[dict[str, Any]]:
    """Appends a row for each index of the shard that is nowhere yet, block by block; its rows.

    The last block is filled up with copies of its last datapoint: one program. A block that a kill has
    torn is computed whole again, in the same program on the same datapoints, so that the numbers are
    the same to the bit; its missing rows are kept.
    """
    path = shards.path_of(folder, stem, shard)
    written = {row[rows.INDEX]: row for row in files.read_rows(path, {rows.INDEX: int})}
    elsewhere = {row[rows.INDEX]: row for row in shards.read(folder, stem, without=path)}
    if not elsewhere.keys() | written.keys() <= set(indices.tolist()):
        raise UserError(f"{path} holds other datapoints: remove it, or name this evaluation.")
    share = shard.of(indices)
    mine = np.array([i for i in share.tolist() if i in written or i not in elsewhere], int)
    done = len(set(mine.tolist()) & written.keys())
    if done < len(mine):
        files.rewrite_rows(path, written.values())  # without a torn last line
    named = label if shard == WHOLE else f"{label} {shard}"
    progress = files.Progress(len(mine), named, done, "datapoint")
    whole = min(block_size, few_sizes(max(1, len(mine))))
    clock = _clock(folder, shard)
    for block in np.split(mine, range(block_size, len(mine), block_size)):
        missing = ~np.isin(block, list(written))
        if missing.any():
            start = time.monotonic()
            full = np.pad(block, (0, max(0, whole - len(block))), "edge")
            columns = {n: values[: len(block)] for n, values in block_columns(full).items()}
            block_rows = rows.to_json({rows.INDEX: block} | columns)
            new = [row for row, wanted in zip(block_rows, missing, strict=True) if wanted]
            files.append_rows(path, new)
            written |= {row[rows.INDEX]: row for row in new}
            progress.update(done := done + len(new))
            speed = len(new) / (time.monotonic() - start)
            records.write_progress(clock, progress, speed, compilations.spent().since(began))
    progress.close()
    known = elsewhere | written
    found = [known[i] for i in share.tolist()]
    others = [other for other in shards.paths(folder, stem) if other != path]
    if shard == WHOLE and (others or [*written] != indices.tolist()):
        files.rewrite_rows(path, found)
        for other in others:
            other.unlink()
    return found
