"""Every setting of a run, its default, and what makes two runs the same run.

A config file's `get_config(arg)` starts from `default()` and changes fields; variants are arguments
(`configs/model.py:dataset=fashion_mnist,posterior=auxiliary`), read by `variant`.
Imports nothing heavy: `--help`, `--mode=status` and mistakes answer at once.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from infsub.ais import ADAPTATIONS
from infsub.local import RULES
from infsub.posteriors import FAMILIES
from infsub.schedules import SCHEDULES
from infsub.types import UserError, increasing_steps

Config = Any  # a ConfigDict: its fields have no static types

# What cannot change a weight: how often we look, where files lie, and what is measured afterwards.
NOT_IDENTITY = (
    "data.dir",
    "init_from",  # the source's own identity stands in for its path
    "train.checkpoint_seconds",
    "train.keep_last",
    "train.picture_every",
    "evaluate",
    "report",
)

CHOICES = {
    "model.posterior.name": tuple(FAMILIES),
    "data.binarisation": ("threshold", "dynamic"),
    "model.encoder.kind": ("mlp", "conv"),
    "model.decoder.kind": ("mlp", "conv"),
    "init_parts": ("all", "decoder"),
    "train.objective": ("elbo", "iwae"),
    "train.schedule": ("constant", "cosine", "burda"),
    "train.annealing": ("none", "entropy", "kl"),
    "train.freeze": ("none", "encoder", "decoder"),
    "train.on": ("data", "model"),
    "train.criterion": ("elbo", "iwae"),
    "evaluate.split": ("train", "validation", "test", "model"),
    "evaluate.ais.schedule": SCHEDULES,
    "evaluate.ais.start": ("posterior", "local", "prior"),
    "evaluate.ais.adaptation": ADAPTATIONS,
    "evaluate.local.preset": tuple(RULES),
}

AT_LEAST_ONE = (
    "model.latent_dim",
    "train.num_epochs",
    "train.batch_size",
    "train.num_samples",
    "train.num_seeds",
    "train.validate_every",
    "train.validation_samples",
    "train.keep_last",
    "train.picture_every",
    "evaluate.elbo_samples",
    "evaluate.iwae_samples",
    "evaluate.ais.num_chains",
    "evaluate.ais.num_temperatures",
    "evaluate.ais.num_leapfrog",
    "evaluate.local.max_steps",
)
NOT_NEGATIVE = (
    "train.learning_rate",
    "train.adam_epsilon",
    "train.gradient_clip",
    "train.annealing_epochs",
    "train.max_skipped",
    "train.patience",
    "train.keep_every",
    "train.checkpoint_seconds",
    "evaluate.grid",
)


def default() -> Config:
    """Every field with its default; locked, so that a misspelt one is an error, not a new field."""
    network = {
        "kind": "mlp",  # mlp | conv (4x4 kernels, stride 2, batch norm)
        "hidden": (200, 200),  # widths, or channels of conv; () is a linear map
        "activation": "elu",  # elu | relu | tanh | sigmoid
        "init": "xavier_uniform",  # xavier_uniform | xavier_normal | gaussian
    }
    config = {
        "seed": 0,
        "data": {
            "name": "mnist5k",  # binarized_mnist | mnist | fashion_mnist | cifar10 | mnist5k
            "dir": "",  # the TFDS directory; "" is TFDS's own default
            "binarisation": "threshold",  # threshold (at 0.5) | dynamic (drawn anew each time)
            "levels": 2,  # grey levels a channel: 2 is Bernoulli, more is discretised logistic
        },
        "model": {
            "latent_dim": 50,
            "encoder": copy.deepcopy(network),
            "decoder": copy.deepcopy(network),
            "posterior": {"name": "gaussian"},  # see `posterior`
        },
        "init_from": "",  # a run's workdir: start from its weights
        "init_parts": "all",  # all | decoder: what to take from it
        "train": {
            "num_epochs": 100,
            "batch_size": 100,
            "num_samples": 1,  # Monte Carlo samples a datapoint
            "objective": "elbo",  # elbo | iwae (of num_samples)
            "schedule": "constant",  # constant | cosine | burda (1e-3·10^(−i/7) for 3^i epochs)
            "learning_rate": 1e-3,  # at the first step
            "adam_epsilon": 1e-4,  # the authors' setting; Adam(0.9, 0.999)
            "gradient_clip": 0.0,  # largest global norm of the gradient; 0: none
            "annealing": "none",  # none | entropy: w·log q | kl: w·(log p(z) − log q)
            "annealing_epochs": 0,  # w rises linearly from 0 to 1 over so many epochs
            "freeze": "none",  # none | encoder | decoder: stays bit for bit as it is
            "on": "data",  # data | model: x ~ p(x) of the frozen decoder, fresh in every step
            "num_seeds": 1,  # models trained at once, seeds seed, seed + 1, …
            "max_skipped": 100,  # non-finite steps skipped before the run stops
            "validate_every": 1,  # epochs
            "validation_samples": 10,  # a datapoint
            "criterion": "elbo",  # elbo | iwae: on validation data, chooses the best checkpoint
            "patience": 0,  # epochs without improvement before stopping; 0: never stop early
            "checkpoint_seconds": 30.0,
            "keep_last": 3,  # checkpoints, beside the best one
            "keep_every": 0,  # epochs: checkpoints kept for good, to follow the gaps; 0: none
            "picture_every": 10,  # epochs
        },
        "evaluate": {
            "name": "",  # a folder in the workdir, for a second evaluation of the same run
            "split": "train",  # train | validation | test | model: x ~ p(x), simulated
            "per_class": 10,  # class-balanced points; 0: `first` points instead
            "first": 0,  # the first n points; 0 with per_class=0: all
            "indices_file": "",  # a file of indices into the split, one a line
            "block_size": 0,  # datapoints a dispatch; 0: chosen for the device
            "checkpoint": "best",  # best | last | epoch_<n>
            "elbo_samples": 1000,
            "iwae_samples": 5000,
            "ais": {
                "num_chains": 16,
                "num_temperatures": 100,
                "num_leapfrog": 10,
                "schedule": "linear",
                "start": "posterior",  # posterior: from q(z|x) | local: from L[q*]'s q* | prior
                "adaptation": "pilot",  # pilot | authors
            },
            "local": {
                "families": ("gaussian",),
                "preset": "fast",  # fast | authors
                "max_steps": 20_000,  # an optimisation that has not converged by then is listed
                "curve": (),  # numbers of steps, such as (0, 1, 3, 10), to take L[q] after
            },
            "bdmc": {"num_points": 0},  # simulated points for the certificate; 0: none
            "grid": 0,  # log p(x) by quadrature on so many cells a side, for latent_dim=2; 0: none
        },
        "report": {
            "min_ess": 4.0,  # AIS estimates of fewer effective chains are listed
            "max_pareto_k": 0.7,  # IWAE estimates of a heavier tail are listed
        },
    }
    return ConfigDict(config).lock()


def variant(arg: str | None, **defaults: str) -> dict[str, str]:
    """The `name=value,name=value` of a config argument over its defaults.

    Raises:
      UserError: an argument that is not among `defaults`.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, equals, value = item.partition("=")
        if not equals or name not in defaults:
            known = ", ".join(f"{n}={v}" for n, v in defaults.items())
            raise UserError(f"config argument {item!r} is not known; the arguments are {known}.")
        values[name] = value
    return values


def posterior(name: str, **options: Any) -> Config:
    """`config.model.posterior` of a family; options are its maker's arguments (posteriors.py)."""
    if name not in FAMILIES:
        raise UserError(
            f"config.model.posterior.name is {name!r}; it must be one of {', '.join(FAMILIES)}."
        )
    return ConfigDict({"name": name, **FAMILIES[name].defaults, **options})


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, in order of name."""
    if not isinstance(config, dict | ConfigDict):
        yield prefix, config
        return
    for name in sorted(config):
        yield from flatten(config[name], f"{prefix}.{name}" if prefix else name)


def resolve(config: Config) -> Config:
    """A locked copy in which every field has its value.

    Raises:
      UserError: a value that no part of the program could use: the field, and what is wanted.
    """
    config = config.copy_and_resolve_references().unlock()
    values = dict(flatten(config))
    for name in sorted(values.keys() ^ dict(flatten(default())).keys()):
        if not name.startswith("model.posterior."):
            problem = "an unknown field" if name in values else "no field"
            raise UserError(f"the config has {problem} {name}: let it start from config.default().")
    config.model.posterior = posterior(**config.model.posterior)
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise UserError(
                f"config.{name} is {values[name]!r}; it must be one of {', '.join(choices)}."
            )
    for name in AT_LEAST_ONE:
        if values[name] < 1:
            raise UserError(f"config.{name} is {values[name]!r}; it must be at least 1.")
    for name in NOT_NEGATIVE:
        if not values[name] >= 0:
            raise UserError(f"config.{name} is {values[name]!r}; it must not be negative.")
    if config.train.freeze == "decoder" and not config.init_from:
        raise UserError(
            "config.train.freeze=decoder would freeze an untrained decoder; "
            "give config.init_from=WORKDIR, a run to take the decoder from."
        )
    if config.train.on == "model" and config.train.freeze != "decoder":
        raise UserError(
            "config.train.on=model draws each batch from a decoder that does not change: give "
            "config.train.freeze=decoder and config.init_from=WORKDIR, a run to take it from."
        )
    evaluate = config.evaluate
    if evaluate.split == "model" and not (evaluate.first or evaluate.per_class):
        raise UserError(
            "config.evaluate.split=model has no last datapoint: give config.evaluate.first=N, how "
            "many to simulate."
        )
    for family in evaluate.local.families:
        if family not in FAMILIES:
            raise UserError(
                f"config.evaluate.local.families has {family!r}; each must be one of "
                f"{', '.join(FAMILIES)}."
            )
    if evaluate.ais.start == "local" and not evaluate.local.families:
        raise UserError(
            "config.evaluate.ais.start=local starts from the first of config.evaluate.local.families, "
            "and there is none."
        )
    if evaluate.local.curve:
        try:
            increasing_steps("config.evaluate.local.curve", evaluate.local.curve)
        except ValueError as error:
            raise UserError(f"{error}.") from error
    if evaluate.grid and config.model.latent_dim != 2:
        raise UserError(
            f"config.evaluate.grid={evaluate.grid} needs config.model.latent_dim=2, a plane "
            f"to lay a grid on; it is {config.model.latent_dim}."
        )
    if config.train.annealing != "none" and config.train.annealing_epochs < 1:
        raise UserError(
            f"config.train.annealing={config.train.annealing} needs config.train.annealing_epochs "
            "of at least 1."
        )
    return config.lock()


def config_first(argv: list[str]) -> list[str]:
    """`argv` itself, put into the order config_flags insists on: --config before its overrides."""
    argv.sort(key=lambda argument: argument.startswith("--config.") and "=" in argument)
    return argv


def explain(argv: list[str], error: Exception) -> str:
    """One sentence for a mistake on the command line, or in the config file it names."""
    if isinstance(error, UserError):
        return str(error)
    files = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
    overrides = [a[9:].partition("=")[0] for a in argv if a.startswith("--config.")]
    if overrides and not files:
        return "--config.field=value changes a config file's field: give --config=FILE.py too."
    if files and not Path(files[-1].partition(":")[0]).is_file():
        return f"--config={files[-1]}: there is no such file."
    if isinstance(error, AttributeError | KeyError):
        known = [name for name, _ in flatten(default())]
        for name in overrides:
            if name not in known:
                similar = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean config.{similar[0]}?" if similar else "see infsub/config.py."
                return f"there is no field config.{name}: {hint}"
    reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    kind = type(error).__name__
    where = "" if type(error).__module__.startswith("absl") else f"--config={files[-1]} failed: "
    return f"{where}{reason if where == '' or kind in reason else f'{kind}: {reason}'}."


def to_json(config: Config) -> dict[str, Any]:
    """The config as plain JSON values, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(values: dict[str, Any]) -> Config:
    """The inverse of `to_json`; fields that were added since take their defaults."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return tuple(plain(v) for v in value) if isinstance(value, list) else value

    config = default().unlock()
    config.update(plain(values))
    return config.lock()


def identified(config: Config, data_identity: str, init_identity: str = "") -> dict[str, Any]:
    """The fields that a run's weights depend on, with what stands for its data and its start."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(config)
        if not any(name == skip or name.startswith(f"{skip}.") for skip in NOT_IDENTITY)
    }
    return fields | {"data identity": data_identity, "initial weights": init_identity}


def identity(config: Config, data_identity: str, init_identity: str = "") -> str:
    """A hash of all that a run's weights depend on: runs with one hash have the same weights."""
    fields = identified(config, data_identity, init_identity)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`identified` fields that differ, each as one phrase."""
    absent = "nothing"
    return [
        f"{name} was {before.get(name, absent)!r} and is {now.get(name, absent)!r}"
        for name in sorted(before | now)
        if before.get(name, absent) != now.get(name, absent)
    ]


def runs(config: Config, workdir: Path) -> list[tuple[Config, Path]]:
    """The runs of one seed each that a config stands for: itself, or workdir/seed_0 and so on."""
    num_seeds = config.train.num_seeds
    if num_seeds == 1:
        return [(config, workdir)]
    members = []
    for i in range(num_seeds):
        member = config.copy_and_resolve_references()
        member.seed, member.train.num_seeds = config.seed + i, 1
        members.append((member, workdir / f"seed_{i}"))
    return members
