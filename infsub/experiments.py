"""Experiments: a question, and the cells whose table and figure answer it.

A cell is a run and one evaluation of it, written as the fields in which it differs from the others.
Cells that train the same weights share a run, and those that measure the same share the rows, within
an experiment and between all experiments of one workdir:

  WORKDIR/runs/<data>-<posterior>-<hash>/    a run; in it <split>-<hash>/ for each evaluation
  WORKDIR/<experiment>/                      cells.json, table.*, its figure, what went wrong
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from infsub import config as configs
from infsub import files, locks, records, shards
from infsub.shards import WHOLE, Shard
from infsub.types import UserError

Fields = Mapping[str, Any]  # {dotted name of a config field: value}

_TRAINED = {  # by the authors
    "train.num_epochs": 3280,
    "train.schedule": "burda",
    "train.annealing_epochs": 400,
    "train.validate_every": 10,  # after every one it would take as long as the training
}
# At `full` an encoder alone, on the decoder of another cell, trains a tenth of the way.
_FROZEN = {
    "full": {
        "train.num_epochs": 328,
        "train.schedule": "cosine",
        "train.annealing_epochs": 40,
    }
}
# The one to be believed most comes first. `full`: the authors' training, our measuring, certified.
# `paper`: all the authors' settings. `small`: half an hour on two cores. `smoke`: minutes, no meaning.
SCALES: dict[str, dict[str, Any]] = {
    "full": _TRAINED | {"evaluate.per_class": 100, "evaluate.bdmc.num_points": 200},
    "paper": _TRAINED
    | {
        "evaluate.per_class": 100,
        "evaluate.ais.num_chains": 100,
        "evaluate.ais.num_temperatures": 10_000,
        "evaluate.ais.num_leapfrog": 10,
        "evaluate.ais.start": "prior",
        "evaluate.ais.adaptation": "authors",
        "evaluate.local.preset": "authors",
        "evaluate.local.max_steps": 100_000,
    },
    "small": {
        "train.num_epochs": 30,
        "train.schedule": "cosine",
        "train.annealing_epochs": 10,
        "evaluate.per_class": 5,
    },
    "smoke": {
        "train.num_epochs": 2,
        "train.schedule": "cosine",
        "train.annealing_epochs": 1,
        "evaluate.per_class": 0,
        "evaluate.first": 4,
        "evaluate.elbo_samples": 50,
        "evaluate.iwae_samples": 50,
        "evaluate.ais.num_chains": 4,
        "evaluate.ais.num_temperatures": 10,
        "evaluate.local.max_steps": 100,
    },
}
_CONV = {
    "model.encoder.kind": "conv",
    "model.encoder.hidden": (64, 128, 256),
    "model.decoder.kind": "conv",
    "model.decoder.hidden": (256, 128, 64),
}
# What a data set asks for at a scale: at `small` narrow convolutions, which a laptop trains in minutes.
_NARROW = _CONV | {"model.encoder.hidden": (16, 32, 64), "model.decoder.hidden": (64, 32, 16)}
_NARROWEST = _CONV | {"model.encoder.hidden": (4, 4, 4), "model.decoder.hidden": (4, 4, 4)}
DATA_SETS: dict[str, dict[str, dict[str, Any]]] = {
    "cifar10": {
        "full": _CONV | {"train.annealing_epochs": 50},
        "paper": _CONV | {"train.annealing_epochs": 50, "evaluate.per_class": 10},
        "small": _NARROW | {"train.num_epochs": 10, "train.annealing_epochs": 3},
        "smoke": _NARROWEST,
    }
}


class Cell(NamedTuple):
    """A run and one evaluation of it.

    Attributes:
      name: in its experiment.
      config: of both, resolved.
      folder: the run's, which cells of the same run share.
      needs: cells of this experiment whose weights it starts from.
    """

    name: str
    config: configs.Config
    folder: Path
    needs: tuple[str, ...]

    @property
    def evaluation(self) -> Path:
        """The folder of the rows."""
        return self.folder / self.config.evaluate.name


def experiment(
    name: str,
    question: str,
    cells: Mapping[str, Fields],
    *,
    shared: Fields | None = None,
    scales: Mapping[str, Fields] | None = None,
    smoke: Sequence[str] = (),
    figure: Fields | None = None,
) -> configs.Config:
    """The config of an experiment: every field of a run, `scale`, and `experiment`, the data below.

    Args:
      name: of its folder in the workdir.
      question: what its figure answers.
      cells: {name: fields}. A value "@CELL" of init_from is that cell's run. "@1/4" as
        evaluate.checkpoint is after a quarter of the epochs, as train.keep_every so many of them, as
        evaluate.ais.num_temperatures a quarter of the scale's; "@2" as model.encoder.hidden makes the
        first layer twice as wide as the scale's.
      shared: fields of all cells.
      scales: {scale: fields}, on top of SCALES.
      smoke: the cells that scale `smoke` runs, one of each kind; none: all.
      figure: {"kind": "bars"}, "steps", "posteriors", or {"kind": "curves", "x": field, "y":
        quantities, "lines": fields}, {family} in a quantity being the encoder's; see infsub.report.
    """
    config = configs.default().unlock()
    config.scale = "small"
    config.experiment = {
        "name": name,
        "question": question,
        # Pairs, not dicts: a ConfigDict sorts its fields and takes no dots in their names.
        "cells": tuple(
            (cell, tuple({**(shared or {}), **fields}.items())) for cell, fields in cells.items()
        ),
        "smoke": tuple(smoke),
        "scales": {scale: tuple(fields.items()) for scale, fields in (scales or {}).items()},
        "figure": dict(figure or {"kind": "bars"}),
    }
    return config.lock()


def at_scale(scale: str, data_name: str) -> dict[str, Any]:
    """The fields of a scale for a data set.

    Raises:
      UserError: an unknown scale.
    """
    if scale not in SCALES:
        raise UserError(f"the scale is {scale!r}; it must be one of {', '.join(SCALES)}.")
    return (
        {"train.annealing": "entropy"} | SCALES[scale] | DATA_SETS.get(data_name, {}).get(scale, {})
    )


def expand(config: configs.Config, workdir: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """The cells of an experiment, each after those that it needs.

    default < scale < data set at that scale < a frozen decoder at that scale < the experiment's scale
    < cell < the user's overrides.

    Args:
      config: of `experiment`, with the user's overrides in it.
      workdir: where runs lie.
      overrides: names of the fields that the user set.

    Raises:
      UserError: an unknown scale, field or cell, a wrong value, cells that need each other.
    """
    given, scale = config.experiment, config.scale
    values = dict(configs.flatten(config))
    fixed = {name: values[name] for name in overrides if name != "scale"}
    for name in fixed.keys() & {"train.num_seeds", "init_from", "evaluate.name"}:
        raise UserError(f"config.{name} is set by the experiment {given.name} cell by cell.")
    others = fixed.get("data.name")  # data that the user wants in every cell
    if scale == "smoke":  # only these data are everywhere
        fixed = {"data.name": "mnist5k"} | fixed
    described = dict(given.cells)
    for called in (given.name, *described):
        if not called or not configs.FOLDER.holds(called):
            raise UserError(f"experiment {given.name}: {called!r} must be {configs.FOLDER.wanted}.")
    cells: dict[str, Cell] = {}

    def add(name: str, path: tuple[str, ...] = ()) -> Cell:
        if name in cells:
            return cells[name]
        if name not in described:
            raise UserError(
                f"experiment {given.name}: cell {path[-1]} needs an unknown cell {name}."
            )
        if name in path:
            raise UserError(f"experiment {given.name}: cells {', '.join(path)} need each other.")
        fields = dict(described[name])
        under = at_scale(scale, others or fields.get("data.name", config.data.name))
        if fields.get("train.freeze") == "decoder":
            under |= _FROZEN.get(scale, {})
        under |= dict(given.scales.get(scale, ()))
        fields = under | _shares(fields, under | fixed) | fixed
        source = fields.pop("init_from", "").removeprefix("@")
        needs = (add(source, (*path, name)),) if source else ()
        cell = _cell(f"experiment {given.name}, cell {name}", name, fields, needs, workdir)
        cells[name] = cell
        return cell

    for name in described:
        add(name)
    return list(cells.values())


def _shares(fields: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`fields` with every "@share" as the number it is of the scale's, or the user's."""
    values = dict(configs.flatten(configs.default())) | given

    def value(name: str, value: Any) -> Any:
        if not isinstance(value, str) or not value.startswith("@") or name == "init_from":
            return value
        share = Fraction(value[1:])
        if name in ("evaluate.checkpoint", "train.keep_every"):
            epochs = share * values["train.num_epochs"]
            if epochs.denominator > 1:
                raise UserError(
                    f"config.train.num_epochs={values['train.num_epochs']} has no whole {share} of it, "
                    f"after which a checkpoint is kept: give a multiple of {share.denominator}."
                )
            return int(epochs) if name == "train.keep_every" else f"epoch_{epochs}"
        if name == "model.encoder.hidden":
            first, *rest = values[name]
            return (round(share * first), *rest)
        return round(share * values[name])

    return {n: value(n, v) for n, v in fields.items()}


def _cell(
    where: str, name: str, fields: dict[str, Any], needs: tuple[Cell, ...], workdir: Path
) -> Cell:
    config = configs.default()
    try:
        config.update_from_flattened_dict(fields)
        config.init_from = str(needs[0].folder) if needs else ""
        config = configs.resolve(config).unlock()
    except (KeyError, AttributeError, TypeError, ValueError, UserError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: {reason}") from error
    weights = configs.identity(config, "", needs[0].folder.name if needs else "")
    kind = f"{config.data.name}-{config.model.posterior.name}"
    measured = [(k, v) for k, v in configs.flatten(config.evaluate) if k != "block_size"]
    digest = hashlib.sha256(json.dumps(measured).encode()).hexdigest()
    config.evaluate.name = f"{config.evaluate.split}-{digest[:8]}"
    folder = workdir / "runs" / f"{kind}-{weights[:8]}"
    return Cell(name, config.lock(), folder, tuple(cell.name for cell in needs))


def run(
    config: configs.Config,
    workdir: Path,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    shard: Shard = WHOLE,
) -> int:
    """Runs what is not done of an experiment's cells, and joins all into one table and one figure.

    A failing cell is named, with its traceback in a file, and the rest goes on; the same command
    tries it again. What a signal stopped continues with the same command.

    Args:
      config, workdir, overrides: as in `expand`.
      only: cells to run, with those that they need; none: all, or at smoke one of each kind.
      shard: of these cells; of those that they need it trains what is not trained, and waits for
        another shard that is at it. The table is of all cells that are done, whoever did them.

    Returns:
      The exit code: 1 when a cell failed, else 0.

    Raises:
      UserError: as `expand`, an unknown cell in `only`, or another process runs this experiment.
      records.Stopped: SIGTERM or Ctrl-C while training.
    """
    cells = expand(config, workdir, overrides)
    known = {cell.name: cell for cell in cells}
    if unknown := set(only) - known.keys():
        raise UserError(
            f"--cells names {', '.join(sorted(unknown))}; {config.experiment.name} has "
            f"{', '.join(known)}."
        )
    kinds = config.experiment.smoke if config.scale == "smoke" else ()
    wanted = set(only or kinds or known)
    if shard != WHOLE:
        wanted = set(shard.of([name for name in known if name in wanted]))
    needed = set(wanted)
    for cell in reversed(cells):  # sources come before their users
        needed |= set(cell.needs) if cell.name in needed else set()
    if shard == WHOLE:
        wanted = needed
    folder = workdir / config.experiment.name
    with locks.owned(folder, f"experiment{shard.name}"):
        if shard == WHOLE:
            locks.refuse_others(folder, "experiment.shard-*")
        else:
            locks.refuse_others(folder, "experiment", locks.MOMENT)
        states: dict[str, str] = {}
        for i, cell in enumerate(cells):
            if cell.name not in needed or _done(cell):
                continue
            files.say(f"{config.experiment.name}, cell {i + 1} of {len(cells)}: {cell.name}")
            patience = 0.0 if shard == WHOLE else math.inf
            states[cell.name] = _run_cell(cell, folder, states, cell.name in wanted, patience)
            _summarise(config, cells, states, folder, show=False)
        failed = _summarise(config, cells, states, folder, show=True)
    return 1 if failed & wanted else 0


def redraw(config: configs.Config, workdir: Path, overrides: Sequence[str] = ()) -> int:
    """Table and figure of an experiment from the rows that are there; 1: none, or a cell went wrong."""
    folder = workdir / config.experiment.name
    folder.mkdir(parents=True, exist_ok=True)
    cells = expand(config, workdir, overrides)
    wrong = _summarise(config, cells, {}, folder, show=True)
    return 0 if any(map(_done, cells)) and not wrong else 1


def status(workdir: Path) -> str:
    """A line for every cell of the experiments in `workdir`; "" when there are none."""
    lines = []
    for path in sorted(workdir.glob("*/cells.json")):
        lines.append(path.parent.name)
        for name, cell in read_cells(path).items():
            rows = shards.read(workdir / cell["run"] / cell["evaluation"], "rows")
            text = f"{cell['state']}, {len(rows)} datapoints evaluated, {cell['run']}"
            lines.append(f"  {name:<32}{text}")
    return "\n".join(lines)


_CELL = ("state", "run", "evaluation", "scale")  # in cells.json, all texts


def read_cells(path: Path) -> dict[str, dict[str, str]]:
    """What cells.json says of each cell, {} where there is none; its folders stay in the workdir."""
    cells = files.read_json(path) or {}
    for name, cell in cells.items():
        wrong = files.wrong_fields(cell, dict.fromkeys(_CELL, str))
        if not wrong:
            folder = Path(cell["run"], cell["evaluation"])
            outside = folder.is_absolute() or ".." in folder.parts
            wrong = f"its folder {folder} is not in the workdir" if outside else ""
        if wrong:
            raise UserError(f"{path} is not as infsub writes it ({name}: {wrong}): remove it.")
    return cells


def _done(cell: Cell) -> dict[str, Any] | None:
    """What the cell ended with, if it has and nothing of it has been removed since."""
    done = files.read_json(cell.evaluation / "done.json", {"not_finite": list})
    drawn = not cell.config.evaluate.grid or (cell.evaluation / records.POSTERIORS).exists()
    return done if done and drawn and not records.missing(cell.evaluation) else None


def _run_cell(
    cell: Cell, folder: Path, states: Mapping[str, str], evaluated: bool, patience: float
) -> str:
    """Trains and, where wanted, evaluates; "" or, in a sentence, what went wrong."""
    from infsub import evaluate, train  # flax and orbax: not for a mistake in an experiment

    if missing := [name for name in cell.needs if states.get(name)]:
        return f"not run, for it needs {missing[0]}"
    error_file = _error_file(folder, cell)
    start = time.monotonic()
    try:
        if evaluated:
            evaluate.check(cell.config, cell.folder)
        train.train(cell.config, cell.folder, patience)
        if not evaluated:
            return ""
        bad = evaluate.evaluate(cell.config, cell.folder, patience=patience)
    except Exception as error:
        if isinstance(error, records.Stopped) and error.exit_code > 1:
            raise  # a signal, not a failing cell
        files.write_bytes(error_file, traceback.format_exc().encode())
        reason = " ".join(str(error).split()) or type(error).__name__
        files.say(f"cell {cell.name} failed: {reason}")
        return f"{reason} (see {error_file.name})"
    error_file.unlink(missing_ok=True)
    seconds = round(time.monotonic() - start, 1)
    files.write_json(cell.evaluation / "done.json", {"not_finite": bad, "seconds": seconds})
    return ""


def _error_file(folder: Path, cell: Cell) -> Path:
    return folder / f"error-{cell.name}.txt"


def _summarise(
    config: configs.Config, cells: list[Cell], states: Mapping[str, str], folder: Path, show: bool
) -> set[str]:
    """Writes cells.json, the table and the figure; the names of the cells that went wrong."""
    with locks.owned(folder, "table", 6 * locks.MOMENT):  # shards may end cells at the same time
        return _write_summary(config, cells, states, folder, show)


def _write_summary(
    config: configs.Config, cells: list[Cell], states: Mapping[str, str], folder: Path, show: bool
) -> set[str]:
    from infsub import report

    before = read_cells(folder / "cells.json")
    failed = {  # in another shard, which tells us by its file
        cell.name: before[cell.name]["state"]
        for cell in cells
        if cell.name in before and cell.name not in states and _error_file(folder, cell).exists()
    }
    wrong = failed | {name: why for name, why in states.items() if why}
    ended = {}
    for cell in cells:
        if done := _done(cell):
            wrong.pop(cell.name, None)
            ended[cell.name] = cell.evaluation
            if done["not_finite"]:
                wrong[cell.name] = f"an estimate is not finite at datapoints {done['not_finite']}"
    if ended:
        given = config.experiment
        title = f"{given.question} ({given.name}, scale {config.scale})"
        figure = given.figure.to_dict() if show else None  # drawn once, at the end
        thresholds = cells[0].config.report.to_dict()
        wrong |= report.experiment(title, figure, ended, folder, thresholds, len(cells))
    summary = {
        cell.name: {
            "state": wrong.get(cell.name) or ("done" if cell.name in ended else "to do"),
            "run": str(cell.folder.relative_to(folder.parent)),
            "evaluation": cell.config.evaluate.name,
            "scale": config.scale,
        }
        for cell in cells
    }
    files.write_json(folder / "cells.json", summary)
    if show:
        counts = f"{len(ended)} of {len(cells)} cells of {config.experiment.name} are done"
        text = "".join(f"; {name}: {why.removesuffix('.')}" for name, why in wrong.items())
        files.say(f"{counts}{text}.")
    return set(wrong)
