"""Every setting of a run, its default, and what makes two runs the same run.

A config file's `get_config(arg)` starts from `default()` and changes fields; variants are arguments
(`configs/model.py:dataset=fashion_mnist,posterior=auxiliary`), read by `variant`.
Imports no flax, orbax or tensorstore: `--help`, `--mode=status` and mistakes answer at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from infsub.ais import ADAPTATIONS
from infsub.local import RULES
from infsub.measure import AIS, AIS_STARTS, IWAE_STARTS, Settings
from infsub.posteriors import FAMILIES, OWN, chosen_families
from infsub.schedules import SCHEDULES
from infsub.types import UserError, increasing_steps

Config = Any  # a ConfigDict: its fields have no static types

# Part of an identity only where they are set: runs from before they were there keep theirs.
_WHERE_SET = ("model.imported", "model.checkpoint")
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


# What lies somewhere; data.dir has a default of its own.
_PATHS = ("init_from", "evaluate.indices_file")


class Rule(NamedTuple):
    """What a field's value must be.

    Attributes:
      wanted: in words, after "it must be".
      holds: value -> whether it is.
      choices: all values, where there are few.
    """

    wanted: str
    holds: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


class Field(NamedTuple):
    """A field of the config.

    Attributes:
      default: its value, and its type.
      help: what it is.
      rule: what it must be.
    """

    default: Any
    help: str
    rule: Rule | None = None


def one_of(*choices: str) -> Rule:
    """The rule of a field that names one of a few."""
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices, choices)


def _is_folder(name: str) -> bool:
    made = r"checkpoints|tensorboard|seed_.*|.*\.(json|jsonl|csv|html|md|npz|pdf|png|tex)"
    named = re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name)
    return bool(named) and not re.fullmatch(made, name)


def _increases(steps: Any) -> bool:
    try:
        return not steps or bool(increasing_steps("", steps))
    except ValueError:
        return False


POSITIVE = Rule("at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Rule("at least 0", lambda value: 0 <= value < math.inf)
SEED = Rule("from 0 to 2147483647", lambda value: 0 <= value < 2**31)
NETWORK = one_of("mlp", "conv")
FOLDER = Rule(
    "the name of a folder that the run does not make itself, and no file's (.json, .csv and so on), of at "
    'most 100 letters, digits, ".", "-" and "_"',
    lambda value: value == "" or _is_folder(value),
)
CHECKPOINT = Rule(
    "best, last or epoch_<n>", lambda value: bool(re.fullmatch(r"best|last|epoch_\d+", value))
)
IMPORTED = Rule(
    "MODULE:FUNCTION, such as my_module:build",
    lambda value: value == "" or bool(re.fullmatch(r"[\w.]+:[\w.]+", value)),
)
FAMILY_NAMES = Rule(
    f"a tuple of names among {', '.join([OWN, *FAMILIES])}",
    lambda value: all(isinstance(name, str) and name in (OWN, *FAMILIES) for name in value),
)
STEPS = Rule("increasing integers of at least 0, such as (0, 1, 3, 10), or ()", _increases)


def _network(part: str, hidden: str) -> dict[str, Field]:
    return {
        f"model.{part}.kind": Field("mlp", "conv: 4x4 kernels, stride 2, batch norm", NETWORK),
        f"model.{part}.hidden": Field((200, 200), hidden),
        f"model.{part}.activation": Field("elu", "elu | relu | tanh | sigmoid"),
        f"model.{part}.init": Field("xavier_uniform", "or xavier_normal | gaussian"),
    }


FIELDS = {
    "seed": Field(0, "of all that is random", SEED),
    "data.name": Field(
        "mnist5k", "or binarized_mnist | mnist | fashion_mnist | cifar10, once prepared"
    ),
    "data.dir": Field("", 'the TFDS directory; "" is its own default'),
    "data.binarisation": Field(
        "threshold", "at 0.5, or drawn anew each time", one_of("threshold", "dynamic")
    ),
    "data.levels": Field(2, "of a pixel: 2 is Bernoulli, more a discretised logistic", POSITIVE),
    "model.latent_dim": Field(50, "of z", POSITIVE),
    **_network("encoder", "widths, or channels of conv; () is linear"),
    **_network("decoder", "from z to x; as the encoder's"),
    "model.imported": Field(
        "", "a model of one's own in place of these: my_module:build", IMPORTED
    ),
    "model.checkpoint": Field("", "what build is called with, such as a path"),
    "model.posterior.name": Field("gaussian", "the encoder's family", one_of(*FAMILIES)),
    "init_from": Field("", "a run's workdir, or a published one: start from its weights"),
    "init_parts": Field("all", "what to take from it", one_of("all", "decoder")),
    "train.num_epochs": Field(100, "passes over the training data", POSITIVE),
    "train.batch_size": Field(100, "datapoints a step", POSITIVE),
    "train.num_samples": Field(1, "Monte Carlo samples a datapoint", POSITIVE),
    "train.objective": Field("elbo", "iwae is of num_samples", one_of("elbo", "iwae")),
    "train.schedule": Field(
        "constant",
        "burda: the rate times 10^(−i/7) for 3^i epochs, i = 0 … 7",
        one_of("constant", "cosine", "burda"),
    ),
    "train.learning_rate": Field(1e-3, "at the first step", NOT_NEGATIVE),
    "train.adam_epsilon": Field(1e-4, "of Adam(0.9, 0.999); the authors'", NOT_NEGATIVE),
    "train.gradient_clip": Field(0.0, "largest global norm of the gradient; 0: none", NOT_NEGATIVE),
    "train.annealing": Field(
        "none",
        "entropy: w·log q; kl: w·(log p(z) − log q)",
        one_of("none", "entropy", "kl"),
    ),
    "train.annealing_epochs": Field(0, "over which w rises linearly from 0 to 1", NOT_NEGATIVE),
    "train.freeze": Field(
        "none", "stays bit for bit as it is", one_of("none", "encoder", "decoder")
    ),
    "train.on": Field(
        "data", "model: x ~ p(x) of the frozen decoder, new in every step", one_of("data", "model")
    ),
    "train.num_seeds": Field(1, "models trained at once, of seed, seed + 1, …", POSITIVE),
    "train.max_skipped": Field(100, "non-finite steps before the run stops", NOT_NEGATIVE),
    "train.validate_every": Field(1, "epochs", POSITIVE),
    "train.validation_samples": Field(10, "a datapoint", POSITIVE),
    "train.criterion": Field(
        "elbo", "on validation data, chooses the best checkpoint", one_of("elbo", "iwae")
    ),
    "train.patience": Field(0, "epochs without improvement to the end; 0: no end", NOT_NEGATIVE),
    "train.checkpoint_seconds": Field(30.0, "between two checkpoints", NOT_NEGATIVE),
    "train.keep_last": Field(3, "checkpoints", POSITIVE),
    "train.keep_every": Field(0, "epochs: checkpoints kept for good; 0: none", NOT_NEGATIVE),
    "train.picture_every": Field(10, "epochs", POSITIVE),
    "evaluate.name": Field("", "a folder, for a second evaluation of the run", FOLDER),
    "evaluate.split": Field(
        "train",
        "model: x ~ p(x), simulated",
        one_of("train", "validation", "test", "model"),
    ),
    "evaluate.per_class": Field(
        10, "points of each class; 0: see first; own data: 10 means all", NOT_NEGATIVE
    ),
    "evaluate.first": Field(
        0, "the first n points; all where this and per_class are 0", NOT_NEGATIVE
    ),
    "evaluate.indices_file": Field("", "of indices into the split, one a line"),
    "evaluate.block_size": Field(0, "datapoints a dispatch; 0: as the device likes", NOT_NEGATIVE),
    "evaluate.checkpoint": Field("best", "on validation data, or last, or epoch_<n>", CHECKPOINT),
    "evaluate.elbo_samples": Field(1000, "of L[q]", POSITIVE),
    "evaluate.iwae_samples": Field(5000, "of IWAE", POSITIVE),
    "evaluate.iwae_start": Field(
        "posterior",
        "q(z|x) | Laplace's Gaussian:",
        one_of(*IWAE_STARTS),
    ),
    "evaluate.ais.num_chains": Field(16, "a datapoint", POSITIVE),
    "evaluate.ais.num_temperatures": Field(25, "and transitions of each chain", POSITIVE),
    "evaluate.ais.num_leapfrog": Field(5, "steps a transition", POSITIVE),
    "evaluate.ais.schedule": Field("linear", "of the temperatures", one_of(*SCHEDULES)),
    "evaluate.ais.start": Field(
        "laplace",
        "q(z|x) | Laplace's Gaussian | the first family's q* | p(z):",
        one_of(*AIS_STARTS),
    ),
    "evaluate.ais.adaptation": Field("pilot", "of the step sizes", one_of(*ADAPTATIONS)),
    "evaluate.local.families": Field(
        (OWN, "gaussian"), "whose L[q*] is found; own: the encoder's", FAMILY_NAMES
    ),
    "evaluate.local.preset": Field("fast", "the rule of optimisation", one_of(*RULES)),
    "evaluate.local.max_steps": Field(20_000, "a datapoint that needs more is listed", POSITIVE),
    "evaluate.local.curve": Field((), "numbers of steps to take L[q] after", STEPS),
    "evaluate.bdmc.num_points": Field(
        0, "simulated points for the certificate; 0: none", NOT_NEGATIVE
    ),
    "evaluate.grid": Field(
        0, "cells a side of a quadrature, for latent_dim=2; 0: none", NOT_NEGATIVE
    ),
    "report.min_ess": Field(4.0, "AIS of fewer effective chains is listed", NOT_NEGATIVE),
    "report.max_pareto_k": Field(0.7, "IWAE of a heavier tail is listed", NOT_NEGATIVE),
}


def default() -> Config:
    """Every field with its default; locked, so that a misspelt one is an error, not a new field."""
    config: dict[str, Any] = {}
    for name, field in FIELDS.items():
        *sections, last = name.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = field.default
    return ConfigDict(config).lock()


def listing() -> str:
    """A line for every field: NAME=DEFAULT, what it is, [its choices]; --help shows it."""
    lines = []
    for name, field in FIELDS.items():
        choices = " | ".join(field.rule.choices) if field.rule else ""
        lines.append(f"{f'{name}={field.default}':<37} {field.help}{choices and f' [{choices}]'}")
        if name == "model.posterior.name":
            lines += [
                f"model.posterior.* of {family}: "
                + ", ".join(f"{option}={value}" for option, value in row.defaults.items())
                for family, row in FAMILIES.items()
                if row.defaults
            ]
    return "\n".join(lines)


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
    for name, field in FIELDS.items():
        value, kind, rule = values[name], type(field.default), field.rule
        if not isinstance(value, kind) or (rule and not rule.holds(value)):
            wanted = rule.wanted if rule else f"of type {kind.__name__}"
            raise UserError(f"config.{name} is {value!r}; it must be {wanted}.")
    # No shell knows that the value of a flag is a path.
    config.update_from_flattened_dict({name: os.path.expanduser(values[name]) for name in _PATHS})
    if not config.model.imported:  # whose encoder says it when it is there
        own = config.model.posterior.name
        config.evaluate.local.families = chosen_families(config.evaluate.local.families, own)
    last_seed = config.seed + config.train.num_seeds - 1
    if not SEED.holds(last_seed):
        raise UserError(
            f"config.train.num_seeds={config.train.num_seeds} models are of the seeds {config.seed} to "
            f"{last_seed}; each must be {SEED.wanted}."
        )
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
    if config.model.checkpoint and not config.model.imported:
        raise UserError(
            "config.model.checkpoint is what a model of one's own is built from: give "
            "config.model.imported=my_module:build too."
        )
    evaluate = config.evaluate
    if evaluate.split == "model" and not (evaluate.first or evaluate.per_class):
        raise UserError(
            "config.evaluate.split=model has no last datapoint: give config.evaluate.first=N, how "
            "many to simulate."
        )
    if evaluate.ais.start == "local" and not evaluate.local.families:
        raise UserError(
            "config.evaluate.ais.start=local starts from the first of config.evaluate.local.families, "
            "and there is none."
        )
    if evaluate.ais.schedule == "adaptive" and evaluate.ais.adaptation != "pilot":
        raise UserError(
            "config.evaluate.ais.schedule=adaptive is found in the pilot run: it needs "
            "config.evaluate.ais.adaptation=pilot."
        )
    if evaluate.bdmc.num_points and evaluate.ais.adaptation != "pilot":
        raise UserError(
            "config.evaluate.bdmc certifies AIS whose step sizes are frozen, for reverse AIS must take the "
            "same: it needs config.evaluate.ais.adaptation=pilot, or bdmc.num_points=0."
        )
    if evaluate.grid and config.model.latent_dim != 2 and not config.model.imported:
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


def measured(evaluate: Config) -> Settings:
    """What config.evaluate says of the measuring, not of which points; equal ones compile once."""
    options = evaluate.ais.to_dict()
    ais_start = options.pop("start")
    return Settings(
        elbo_samples=evaluate.elbo_samples,
        iwae_samples=evaluate.iwae_samples,
        iwae_start=evaluate.iwae_start,
        ais=AIS(**options),
        ais_start=ais_start,
        **evaluate.local.to_dict(),
        grid=evaluate.grid,
    )


def of_settings(settings: Settings) -> dict[str, Any]:
    """The inverse of `measured`: the fields of config.evaluate that settings stand for."""
    fields = settings._asdict()
    local = {name: fields.pop(name) for name in ("families", "preset", "max_steps", "curve")}
    ais = fields.pop("ais")._asdict() | {"start": fields.pop("ais_start")}
    return fields | {"local": local, "ais": ais}


def to_json(config: Config) -> dict[str, Any]:
    """The config as plain JSON values, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def from_json(values: dict[str, Any]) -> Config:
    """The inverse of `to_json`, also of an older revision's.

    Fields that were added since take their defaults; of those that are gone since, the ones that no
    weight depends on are left out.

    Raises:
      UserError: a value of another type than its field's, or a field that weights depended on and
        that is gone.
    """

    def plain(value: Any) -> Any:
        return tuple(map(plain, value)) if isinstance(value, list) else value

    config, found = default().unlock(), {name: plain(v) for name, v in flatten(values)}
    options = {n: found.pop(n) for n in sorted(found) if n.startswith("model.posterior.")}
    known = dict(flatten(config))
    if gone := [n for n in sorted(found.keys() - known) if not _is_skipped(n)]:
        raise UserError(
            f"the saved config has {gone[0]}={found[gone[0]]!r}, a field that this infsub has not: "
            "mend it, or use the version of infsub that wrote it."
        )
    try:
        config.update_from_flattened_dict({n: v for n, v in found.items() if n in known})
        if options:
            config.model.posterior = ConfigDict({n.split(".")[2]: v for n, v in options.items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the saved config does not fit infsub's fields: {reason}.") from error
    return config.lock()


def _is_skipped(name: str) -> bool:
    return any(name == skip or name.startswith(f"{skip}.") for skip in NOT_IDENTITY)


def completed(before: dict[str, Any]) -> dict[str, Any]:
    """`identified` of an older revision, with the defaults of the fields that were added since."""
    added = {name: list(v) if isinstance(v, tuple) else v for name, v in flatten(default())}
    family = str(before.get("model.posterior.name"))
    row = FAMILIES[family].defaults if family in FAMILIES else {}
    added |= {f"model.posterior.{name}": value for name, value in row.items()}
    skipped = {name for name in added if _is_skipped(name) or name in _WHERE_SET}
    return {name: value for name, value in added.items() if name not in skipped} | before


def identified(config: Config, data_identity: str, init_identity: str = "") -> dict[str, Any]:
    """The fields that a run's weights depend on, with what stands for its data and its start."""
    fields = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flatten(config)
        if not _is_skipped(name) and (value or name not in _WHERE_SET)
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
