"""Rows of bounds: every estimator at every chosen datapoint of a trained run, resumable by block."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from infsub import checkpoints, data, grids, posteriors, records, rows
from infsub import config as configs
from infsub.ais import ais
from infsub.bdmc import bdmc
from infsub.bounds import elbo, iwae
from infsub.datapoints import map_datapoints
from infsub.local import LocalResult, local_curve, optimize_local
from infsub.types import Array, Estimate, Gaussian, Key, Params, Posterior, Target, UserError
from infsub.vae import VAE, Variables, make_vae

# Rows (datapoints × samples) a dispatch works on: what fits a CPU's caches, or fills a GPU.
_ROWS = {"cpu": 320}
_ROWS_ACCELERATOR = 16_000
_MEASURED = ("elbo_samples", "iwae_samples", "ais", "local", "grid")  # config.evaluate's fields
# Datapoints whose posteriors are drawn, each on so many cells a side, a q from so many samples.
_NUM_DRAWN, _NUM_CELLS, _NUM_SAMPLES = 6, 100, 400_000
# Factor on the learning rate of an amortised flow's weights in its curve. After 3000 steps q* is 0.09
# nats ahead with 0.03, 0.24 with 0.1, 0.23 with 0.01 (AF on eight binarised MNIST digits).
_TRAINED = 0.03
_BEYOND = 0.002  # of the true posterior, may lie beyond each side of its picture


def evaluate(config: configs.Config, workdir: Path) -> list[int]:
    """Writes one row of bounds for every chosen datapoint of a run to `rows.jsonl`.

    A row holds index, label, and for every estimator its value and standard error in nats with its
    diagnostics. A datapoint's key is fold_in(seed's key, index), so neither blocks nor resuming
    change its numbers. With bdmc.num_points, `bdmc.jsonl` gets the two-sided bounds of points that
    the model simulates; with grid, `posteriors.npz` the densities of the first datapoints.
    `config.evaluate.name` puts a second evaluation of a run in a folder of its own.

    Returns:
      Indices of the datapoints at which an estimate is not finite.

    Raises:
      UserError: no trained run; a choice of points the data cannot give; rows of other settings.
    """
    run, settings = records.read_run(workdir), config.evaluate
    dataset = data.load(**{"data_dir" if k == "dir" else k: v for k, v in config.data.items()})
    variables, step = checkpoints.load_variables(workdir, settings.checkpoint)
    variables = jax.device_put(variables)
    vae = make_vae(config.model, dataset.image_shape, dataset.levels)
    key_rows, key_bdmc, key_images = jax.random.split(jax.random.key(config.seed), 3)
    facts: dict[str, Any] = {"step": step}
    if settings.split == "model":
        split = simulate(key_images, vae, variables, settings.first or 10 * settings.per_class)
        facts["images"] = hashlib.sha256(np.asarray(split.images.values).tobytes()).hexdigest()[:16]
    else:
        split = dataset.split(settings.split)
    indices = choose(split, settings)
    folder = _claim(workdir, settings, run, facts)
    rows_per_block = _ROWS.get(jax.default_backend(), _ROWS_ACCELERATOR)
    block_size = settings.block_size or max(1, rows_per_block // settings.ais.num_chains)
    block_size = -(-len(indices) // -(-len(indices) // block_size))  # blocks of equal size

    chunk_size = max(1, rows_per_block // block_size)
    own = config.model.posterior.name
    point = _bound(bounds_of_datapoint, vae, settings, chunk_size=chunk_size, own=own)

    def images(block: np.ndarray) -> np.ndarray:
        return np.asarray(data.batch(split.images, jnp.asarray(block), key_images))

    def evaluated(block: np.ndarray) -> dict[str, Any]:
        labels = [None] * len(block) if split.labels is None else split.labels[block]
        columns = map_datapoints(
            point, key_rows, images(block), variables, block_size=block_size, indices=block
        )
        return {rows.LABEL: labels} | columns

    written = _write_rows(folder / "rows.jsonl", "evaluating", indices, block_size, evaluated)
    if settings.bdmc.num_points:
        simulated = np.arange(settings.bdmc.num_points)
        certified = _bound(certify_datapoint, vae, settings)

        def bounded(block: np.ndarray) -> dict[str, Any]:
            return map_datapoints(
                certified, key_bdmc, block, variables, block_size=block_size, indices=block
            )

        _write_rows(folder / "bdmc.jsonl", "certifying", simulated, block_size, bounded)
    measured = rows.parse(written)
    finite = measured.finite(measured.columns)
    bad = [int(i) for i in indices if i in measured.indices[~finite]]
    first = indices[~np.isin(indices, bad)][:_NUM_DRAWN]
    if settings.grid and first.size and not (folder / records.POSTERIORS).exists():
        drawn, xs = _bound(densities_of_datapoint, vae, settings), images(first)
        arrays = {
            "indices": first,
            "images": xs / (dataset.levels - 1),
            "families": [own, *settings.local.families],
        }
        arrays |= {} if split.labels is None else {"labels": split.labels[first]}
        arrays |= map_datapoints(
            drawn, key_rows, xs, variables, block_size=len(first), indices=first
        )
        records.write_npz(folder / records.POSTERIORS, arrays)
    return bad


def _bound(function: Callable[..., Any], vae: VAE, settings: Any, **options: Any) -> Any:
    """`function` with its static arguments; the same object for equal ones, so it compiles once.

    Of the settings only those that it computes with: which points they are does not compile anew.
    """
    used = FrozenConfigDict({name: settings[name] for name in _MEASURED})
    return _cached_bound(function, vae, used, tuple(options.items()))


@functools.cache
def _cached_bound(function: Any, vae: VAE, settings: Any, options: tuple[Any, ...]) -> Any:
    return partial(function, vae=vae, settings=settings, **dict(options))


def simulate(key: Key, vae: VAE, variables: Variables, num_points: int) -> data.Split:
    """N draws x ~ p(x) of the model as a split without labels; index i uses fold_in(key, i)."""

    def draw(key: Key, _: Array, variables: Variables) -> Array:
        return vae.simulate(key, variables)[1].astype(jnp.uint8)

    values = jnp.asarray(map_datapoints(draw, key, np.arange(num_points), variables))
    _, height, width, channels = values.shape
    images = data.Images(values, "levels", (height, width, channels))
    return data.Split(images, None, num_points)


def choose(split: data.Split, settings: Any) -> np.ndarray:
    """Indices into a split [N], by file, per class, first n, or all."""
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


def _claim(workdir: Path, settings: Any, run: dict[str, Any], facts: dict[str, Any]) -> Path:
    """The folder of this evaluation, whose config.json says with which settings it is made."""
    folder = workdir / settings.name if settings.name else workdir
    used = {n: v for n, v in configs.flatten(settings) if n not in ("block_size", "name")}
    used = {n: list(v) if isinstance(v, tuple) else v for n, v in used.items()} | facts
    there = records.read_json(folder / "evaluation.json")
    if there is not None and there != used and records.read_rows(folder / "rows.jsonl"):
        raise UserError(
            f"{folder / 'rows.jsonl'} was made with other settings: "
            f"{'; '.join(configs.differences(there, used))}. Keep both with "
            "--config.evaluate.name=NAME, a folder for this evaluation, or remove that file."
        )
    if settings.name:
        folder.mkdir(exist_ok=True)
    if there != used:  # what is left of an evaluation whose rows were removed
        for name in (records.POSTERIORS, "bdmc.jsonl"):
            (folder / name).unlink(missing_ok=True)
    run |= {"config": run["config"] | {"evaluate": settings.to_dict()}}
    records.write_json(folder / "config.json", run)
    records.write_json(folder / "evaluation.json", used)
    return folder


def _write_rows(
    path: Path,
    label: str,
    indices: np.ndarray,
    block_size: int,
    block_columns: Callable[[np.ndarray], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Appends a row for each index, block by block, after the whole blocks that are there already."""
    written = records.read_rows(path)
    done = [row[rows.INDEX] for row in written]
    if done != indices[: len(done)].tolist():
        raise UserError(f"{path} holds other datapoints: remove it, or name this evaluation.")
    if len(written) < len(indices):  # a killed run may have torn its last block
        written = written[: len(written) // block_size * block_size]
        records.rewrite_rows(path, written)
    progress = records.Progress(len(indices), label, len(written), "datapoint")
    for start in range(len(written), len(indices), block_size):
        block = indices[start : start + block_size]
        block_rows = rows.to_json({rows.INDEX: block} | block_columns(block))
        records.append_rows(path, block_rows)
        written += block_rows
        progress.update(len(written))
    progress.close()
    return written


def bounds_of_datapoint(
    key: Key, x: Array, variables: Variables, *, vae: VAE, settings: Any, chunk_size: int, own: str
) -> dict[str, Array]:
    """Every bound of one x [H, W, C] as named scalars: value, `_se`, diagnostics; all in nats.

    `own` is the encoder's family.
    """
    key_q, key_elbo, key_iwae, key_ais, key_local = jax.random.split(key, 5)
    target, q = vae.target(variables, x), vae.sampler(variables, x)
    base = _start(key_q, vae, variables, x)
    row = rows.build(rows.ELBO.name, elbo(key_elbo, target, q, settings.elbo_samples))

    start = None if settings.ais.start == "prior" else base
    for family in settings.local.families:
        posterior, params, local, key_after = _fit(key_local, family, target, base, settings)
        key_moments, key_curve = jax.random.split(key_after)
        stopped = {"steps": local.num_steps, "converged": local.converged}
        row |= rows.build(rows.LOCAL.of(family), local.elbo, **stopped)
        row |= rows.build(rows.LOCAL_IWAE.of(family), local.iwae)
        if settings.ais.start == "local" and family == settings.local.families[0]:
            start = posteriors.moment_matched(key_moments, posterior, local.params)
        if settings.local.curve:
            rates = {rows.AFTER: 1.0}
            if family == own:  # from the encoder's output itself: after 0 steps, L[q]
                posterior, params = vae.posterior(variables, x), vae.encode(variables, x)
                rates = {rows.AFTER: _TRAINED, rows.AFTER_HELD: 0.0} if params["shared"] else rates
            row |= _curves(key_curve, family, target, posterior, params, rates, settings)

    options = {k: v for k, v in settings.ais.items() if k != "start"}
    weighted = iwae(key_iwae, target, q, settings.iwae_samples, chunk_size=chunk_size)
    row |= rows.build(rows.IWAE.name, weighted)
    row |= rows.build(rows.AIS.name, ais(key_ais, target, start, **options))
    if settings.grid:
        truth = grids.log_px(target, settings.grid)
        row |= rows.build(rows.GRID.name, truth.log_px, error=truth.error)
    return row


def _fit(
    key: Key, family: str, target: Target, base: Gaussian, settings: Any
) -> tuple[Posterior, Params, LocalResult, Key]:
    """Local inference of one family: it, its start, its q*, and a key for what is done with them."""
    posterior = posteriors.make(family, target.latent_dim, target=target)
    key_init, key_fit, key_after = jax.random.split(
        jax.random.fold_in(key, zlib.crc32(family.encode())), 3
    )
    params = posterior.init(key_init)
    if settings.local.preset == "fast":  # from the encoder; the authors start at N(0, I)
        params = posteriors.with_gaussian(params, base)
    local = optimize_local(
        key_fit,
        target,
        posterior,
        params,
        settings.local.preset,
        max_steps=settings.local.max_steps,
    )
    return posterior, params, local, key_after


def _curves(
    key: Key,
    family: str,
    target: Target,
    posterior: Posterior,
    params: Params,
    rates: dict[rows.Quantity, float],
    settings: Any,
) -> dict[str, Array]:
    """Columns of the bounds on the way from `params`, a curve for each quantity's `shared_rate`."""
    steps = settings.local.curve

    def curve(shared_rate: Array) -> Estimate:
        return local_curve(
            key,
            target,
            posterior,
            params,
            steps,
            settings.local.preset,
            num_samples=settings.elbo_samples,
            shared_rate=shared_rate,
        )

    # One after the other, by one compiled program.
    curves = jax.lax.map(curve, jnp.asarray(list(rates.values())))
    columns = {}
    for i, quantity in enumerate(rates):
        for j, n in enumerate(steps):
            error = curves.standard_error[i, j]
            columns |= rows.build(quantity.of(family, n), curves.log_px[i, j], se=error)
    return columns


def densities_of_datapoint(
    key: Key, x: Array, variables: Variables, *, vae: VAE, settings: Any
) -> dict[str, Array]:
    """p(z|x) of one x, q(z|x) and each family's q*, the F of its row, on one grid; z is a plane.

    Returns:
      log_px [], low [2] and width [] of the window, truth [G, G], bounds [F], densities [F, G, G].
    """
    key_q, key_elbo, key_draw, _, key_local = jax.random.split(key, 5)
    target, q = vae.target(variables, x), vae.sampler(variables, x)
    base = _start(key_q, vae, variables, x)
    bounds, samplers = [elbo(key_elbo, target, q, settings.elbo_samples)], [q]
    for family in settings.local.families:
        posterior, _, local, _ = _fit(key_local, family, target, base, settings)
        bounds.append(local.elbo)
        samplers.append(posteriors.sampler(posterior, local.params))
    keys = jax.random.split(key_draw, len(samplers))
    zs = [grids.draw(k, q, _NUM_SAMPLES) for k, q in zip(keys, samplers, strict=True)]
    window = grids.find_window(target, settings.grid)
    log_joint = grids.log_joint(target, window, settings.grid)
    log_px = grids.integrate(log_joint, window).log_px
    # A q that misses the posterior is to be seen where it is.
    window = functools.reduce(grids.cover, zs, grids.zoom(window, log_joint, _BEYOND))
    return {
        "log_px": log_px,
        **window._asdict(),
        "truth": jnp.exp(grids.log_joint(target, window, _NUM_CELLS) - log_px),
        "bounds": jnp.stack([bound.log_px for bound in bounds]),
        "densities": jnp.stack([grids.histogram(z, window, _NUM_CELLS) for z in zs]),
    }


def _start(key: Key, vae: VAE, variables: Variables, x: Array) -> Gaussian:
    """The Gaussian to start from: the encoder's own, or one with the moments of its flow."""
    params, posterior = vae.encode(variables, x), vae.posterior(variables, x)
    if not params["shared"] and set(params["encoded"]) == {"mean", "log_scale"}:
        return posteriors.gaussian_of(params)
    return posteriors.moment_matched(key, posterior, params)


def certify_datapoint(
    key: Key, _: Array, variables: Variables, *, vae: VAE, settings: Any
) -> dict[str, Array]:
    """The two-sided bounds of one datapoint that the model simulates, as named scalars in nats."""

    def model(key: Key) -> tuple[Array, Target, Gaussian | None]:
        key_model, key_q = jax.random.split(key)
        z, x = vae.simulate(key_model, variables)
        target = vae.target(variables, x)
        if settings.ais.start == "prior":
            return z, target, None
        q = _start(key_q, vae, variables, x)
        if settings.ais.start == "local":
            key_local, family = jax.random.fold_in(key_q, 1), settings.local.families[0]
            posterior, _, local, key_after = _fit(key_local, family, target, q, settings)
            q = posteriors.moment_matched(key_after, posterior, local.params)
        return z, target, q

    options = {k: v for k, v in settings.ais.items() if k not in ("start", "adaptation")}
    result = bdmc(key, model, **options)
    return {
        **rows.build(rows.TWO_SIDED.name, result.gap, se=result.standard_error),
        **rows.build(rows.LOWER.name, result.lower),
        **rows.build(rows.UPPER.name, result.upper),
    }
