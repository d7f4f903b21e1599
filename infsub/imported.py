"""A model of the user's own, by `--config.model.import=my_module:build`, as what is evaluated.

`build()`, or `build(checkpoint)` with config.model.checkpoint, returns (Model, params) for the data of
config.data, whose x is float32 [H, W, C] of 0 … levels − 1; or (Model, params, xs), and with labels
(Model, params, xs, labels), for data of its own: a pytree of arrays [N, …].
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from infsub import config as configs
from infsub import data, files, records, rows
from infsub.datapoints import number_of
from infsub.types import Model, Params, UserError


class Imported(NamedTuple):
    """What `build` returned.

    Attributes:
      xs: pytree [N, …]; None: the data of the config.
      labels: [N], or None.
    """

    model: Model
    params: Params
    xs: Any = None
    labels: np.ndarray | None = None

    @property
    def size(self) -> int:
        """N of its own data."""
        return number_of(self.xs)

    @property
    def identity(self) -> str:
        """A hash of params and xs."""
        return digest((self.params, self.xs))


def _numbers(tree: Any) -> list[Any]:
    """The leaves of a pytree that are numbers: not a module's functions."""
    numbers = jax.Array | np.ndarray | np.generic | int | float | complex
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, numbers)]


def digest(tree: Any) -> str:
    """A hash of the arrays of a pytree."""
    found = hashlib.sha256()
    for leaf in _numbers(tree):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


@functools.cache
def load(name: str, checkpoint: str) -> Imported:
    """What MODULE:FUNCTION builds; MODULE is looked for in the working directory too.

    Raises:
      UserError: there is none, it failed, or it returned something else.
    """
    flag = f"--config.model.import={name}"
    module, _, attribute = name.partition(":")
    folder = str(Path.cwd())
    sys.path.insert(0, folder)  # as they asked, and as python -m would
    try:
        build: Any = functools.reduce(
            getattr, attribute.split("."), importlib.import_module(module)
        )
        built: Any = build(*([checkpoint] if checkpoint else []))
    except Exception as error:  # their code may raise anything
        reason = " ".join(str(error).split())
        raise UserError(f"{flag} failed: {type(error).__name__}: {reason}.") from error
    finally:
        sys.path.remove(folder)
    known = isinstance(built, tuple) and not isinstance(built, Model) and 2 <= len(built) <= 4
    if not known or not isinstance(built[0], Model):
        raise UserError(
            f"{flag} must return (infsub.Model, params), or with data of its own (Model, params, xs) or "
            f"(Model, params, xs, labels); it returned {_described(built)}."
        )
    found = Imported._make((*built, None, None)[:4])
    if not _numbers(found.params):
        raise UserError(
            f"{flag} returned params without an array, so that nothing tells rows of other weights from "
            "these: return the weights as params, not only in the functions; a number will do where there "
            "are none."
        )
    try:
        labels = None if found.labels is None else rows.checked_labels(found.labels, found.size)
        if found.xs is not None:
            number_of(found.xs)
    except (TypeError, ValueError) as error:
        raise UserError(f"{flag}: {error}.") from error
    return found._replace(labels=labels)


def failed(config: configs.Config, folder: Path, error: Exception) -> UserError:
    """What the model's functions raised on its data as a sentence; the traceback is left in `folder`."""
    path = folder / "error.txt"
    files.write_bytes(path, "".join(traceback.format_exception(error)).encode())
    reason = ": ".join(filter(None, [type(error).__name__, " ".join(str(error).split())]))
    return UserError(
        f"--config.model.import={config.model.imported} failed on its data: {reason.removesuffix('.')}. "
        f"The traceback is in {path}."
    )


def _described(built: Any) -> str:
    if isinstance(built, tuple) and not hasattr(built, "_fields"):
        return f"a tuple of {', '.join(type(part).__name__ for part in built) or 'nothing'}"
    return type(built).__name__


def claim(config: configs.Config, workdir: Path, mode: str) -> None:
    """Makes `workdir` the imported model's own: there is nothing to train before it is evaluated.

    Raises:
      UserError: it is to be trained; as `load` and `records.claim`.
    """
    if mode == "train" or config.train.num_seeds > 1:
        raise UserError(
            "config.model.imported is a model that is trained already: infsub evaluates and reports it, "
            "--mode=run, with config.train.num_seeds=1."
        )
    found = load(config.model.imported, config.model.checkpoint)
    told = config.copy_and_resolve_references().unlock()
    told.model.latent_dim = found.model.latent_dim
    image_shape, levels = (0, 0, 0), 0
    identity = f"of {config.model.imported}"
    if found.xs is None:
        dataset = data.load_config(config.data)
        image_shape, levels, identity = dataset.image_shape, dataset.levels, dataset.identity
    records.claim(
        told,
        workdir,
        identity,
        "",
        image_shape=image_shape,
        levels=levels,
        steps_per_epoch=1,
    )
