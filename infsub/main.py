"""Measures where a variational autoencoder's inference loses its nats.

  python -m infsub.main --config=configs/quickstart.py --workdir=runs/quickstart

trains the config's model, evaluates its bounds datapoint by datapoint and reports the gaps; again,
it continues where it was stopped. Any of the fields below is a flag: --config.seed=1. --mode
does one part alone, by the workdir's own config if there is no --config; status says what is done.
With --shard=0/4 … 3/4, four processes share an evaluation: one trains, the last to end reports. With
--coordinator=HOST:PORT too, or as several tasks of SLURM or Open MPI, they train together.
Exit codes: 0 done, 1 failed, 2 a mistake in the command, 130 Ctrl-C and 143 SIGTERM (saved).
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from infsub import compilations, experiments, files, processes, records, shards, status
from infsub import config as configs
from infsub.types import UserError

_ORBAX = f"{os.sep}orbax{os.sep}"
MODES = ["run", "train", "evaluate", "report", "status"]
CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"FILE.py, or FILE.py:name=value,… . Fields:\n{configs.listing()}"
)
WORKDIR = flags.DEFINE_string("workdir", "", "Where everything is written.")
MODE = flags.DEFINE_enum("mode", "run", MODES, "run is train, evaluate and report.")
CELLS = flags.DEFINE_list("cells", [], "Of an experiment: run only these cells, NAME,NAME,… .")
SHARD = flags.DEFINE_string(
    "shard",
    "",
    "i/n, from 0: of an evaluation every n-th datapoint, of an experiment every n-th cell; n processes "
    "share the work. auto: as a SLURM array or a Kubernetes indexed job says.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0: the n processes of --shard=i/n train together, each on its devices. "
    "Several tasks of srun, or of Open MPI 4's mpirun, do so without it; --shard=i/n alone need not talk.",
)


def config_first(argv: list[str]) -> list[str]:
    """`argv` itself, put into the order config_flags insists on: --config=FILE before its overrides.

    Of a flag that is given twice the last counts, which config_flags has of numbers and words alone. A
    field cannot be called import, which is Python's own word: as a flag it may.
    """
    while "--config" in argv[:-1]:
        n = argv.index("--config")
        argv[n : n + 2] = [f"--config={argv[n + 1]}"]
    for n, argument in enumerate(argv):
        if argument.startswith("--config.model.import="):
            argv[n] = argument.replace("import", "imported", 1)
    last = {argument.partition("=")[0]: n for n, argument in enumerate(argv)}
    ours = [
        argument.startswith(("--config=", "--config.")) and "=" in argument for argument in argv
    ]
    argv[:] = [a for n, a in enumerate(argv) if not ours[n] or last[a.partition("=")[0]] == n]
    argv.sort(key=lambda argument: argument.startswith("--config.") and "=" in argument)
    return argv


def explain(argv: list[str], error: Exception) -> str:
    """One sentence for a mistake on the command line, or in the config file it names."""
    if isinstance(error, UserError):
        return str(error)
    given = [a.partition("=")[2] for a in argv if a.startswith("--config=")]
    overrides = [a[9:].partition("=")[0] for a in argv if a.startswith("--config.")]
    if overrides and not given:
        return (
            "--config.field=value changes a config file's field: give --config=FILE.py too, such as "
            "configs/quickstart.py."
        )
    if given and not Path(given[-1].partition(":")[0]).is_file():
        return f"--config={given[-1]}: there is no such file."
    if isinstance(error, AttributeError | KeyError):
        known = [name for name, _ in configs.flatten(configs.default())]
        unknown = [name for name in overrides if name not in known]
        # An experiment has a scale, and each family options of its own.
        ours = [n for n in unknown if n != "scale" and not n.startswith("model.posterior.")]
        for name in ours or unknown:
            similar = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean config.{similar[0]}?" if similar else "--help lists them."
            return f"there is no field config.{name}: {hint}"
    if "get_config() takes" in str(error):
        return (
            f"--config={given[-1]}: its get_config() takes no argument after a colon; change its fields by "
            "flags, such as --config.seed=1."
        )
    if no_number := re.fullmatch(r"flag --(config\.\S+?)=(.*): .*?\b(int|float)\b.*", str(error)):
        name, value, kind = no_number.groups()
        wanted = "a whole number" if kind == "int" else "a number"
        return f"{name} is {value!r}; it must be {wanted}."
    kind = type(error).__name__
    reason = [kind, *filter(None, map(str.strip, str(error).splitlines()))][-1]
    where = "" if type(error).__module__.startswith("absl") else f"--config={given[-1]} failed: "
    return f"{where}{reason if where == '' or kind in reason else f'{kind}: {reason}'}."


def parse(argv: list[str]) -> list[str]:
    """absl's flags; any mistake in them ends the program with one sentence and code 2."""
    try:
        _parse(argv, flags.FLAGS)
        if not WORKDIR.value:
            raise UserError("--workdir is missing: give a directory, such as --workdir=runs/first.")
        return argv[:1]
    except SystemExit:  # absl has shown the help
        sys.exit(0)
    except UserError as error:
        files.say(str(error))
        sys.exit(2)


def config_of(arguments: Sequence[str]) -> tuple[configs.Config, list[str]]:
    """The config that the command has with these arguments, and the fields that they set.

    What this process itself was given does not change.

    Raises:
      UserError: a mistake in any of them.
    """
    argv, values = ["infsub", *arguments], copy.deepcopy(flags.FLAGS)
    for name in [name for name in values if name.partition(".")[0] == "config"]:
        delattr(values, name)
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    _parse(argv, values)
    return values["config"].value, list(config_flags.get_override_values(values["config"]))


def _parse(argv: list[str], values: flags.FlagValues) -> None:
    """Raises UserError: a mistake in them, or in the config file that they name, in one sentence."""
    try:
        if rest := values(config_first(argv))[1:]:
            raise UserError(f"{rest[0]!r} is no flag; flags start with --.")
        getattr(values["config"].value, "seed", None)  # a file that could not be read says so now
    except Exception as error:  # a config file may raise anything
        raise UserError(explain(argv, error)) from error


@functools.cache  # once in a process
def hush() -> None:
    """Warnings as sentences; background threads do not print what goes wrong: it is raised to us too."""
    logging.get_absl_logger().addFilter(
        lambda record: record.levelname != "ERROR" or _ORBAX not in record.pathname
    )
    warnings.showwarning = functools.partial(_in_a_sentence, warnings.showwarning)
    for module, name in ((sys, "unraisablehook"), (threading, "excepthook")):
        setattr(module, name, functools.partial(_unless_known, getattr(module, name)))


def _in_a_sentence(
    hook: Callable[..., None], message: Any, category: type[Warning], filename: str, *rest: Any
) -> None:
    """Our own warnings without the line of code that they come from."""
    if category is RuntimeWarning and str(message).startswith("out of memory"):
        files.say(f"{message}.")
    else:
        hook(message, category, filename, *rest)


def _unless_known(hook: Callable[[Any], None], raised: Any) -> None:
    """`hook`, but for what comes of a full disk: writes after one that failed, and what closes files."""
    if str(raised.exc_value) != "Event loop is closed" and not files.is_full(raised.exc_value):
        hook(raised)


def main(_: list[str]) -> int:
    """Does what --mode says; the exit code."""
    workdir = Path(os.path.expanduser(WORKDIR.value))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        hush()
    try:
        shard = shards.parse(SHARD.value, os.environ)
        team = processes.parse(COORDINATOR.value, shard, os.environ)
        shard = team.shard if team else shard
        shared = ["run", "evaluate", *(["train"] if team else [])]
        if shard != shards.WHOLE and MODE.value not in shared:
            who = "several tasks are" if team else "--shard is"
            raise UserError(
                f"{who} for --mode={' and '.join(shared)}; {MODE.value} is of the whole."
            )
        if MODE.value in ("run", "train", "evaluate") and team is None:
            find_device()
        if MODE.value == "status":
            print(experiments.status(workdir) or status.of_run(workdir))
        elif "experiment" in (CONFIG.value or {}):
            if team:
                raise UserError(
                    "an experiment's cells train one after the other: --shard=i/n shares them among n "
                    "processes, without --coordinator and as one task each."
                )
            with timed():
                return run_experiment(MODE.value, CONFIG.value, workdir, shard)
        elif CELLS.value:
            raise UserError(
                "--cells is for experiments, such as --config=configs/paper/test_set.py."
            )
        else:
            config = CONFIG.value or records.read_config(workdir)
            with timed():
                run(MODE.value, configs.resolve(config), workdir, shard, team)
    except (UserError, records.Stopped, KeyboardInterrupt) as error:
        files.say(str(error) or "stopped; the same command continues.")
        return getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 2)
    except Exception as error:
        if files.is_full(error):
            reason = (
                f"no space is left for {workdir}: the last checkpoint and all whole rows are kept"
            )
            files.say(f"{reason}; make room, and the same command continues.")
        elif isinstance(error, OSError):
            said = f"{error.filename or workdir} cannot be used ({error.strerror or error})"
            then = (
                "mend or remove it" if error.filename else "all whole rows and checkpoints are kept"
            )
            files.say(f"{said}: {then}.")
        elif isinstance(error, MemoryError):
            files.say(f"{error or 'out of memory'}; all whole rows are kept.")
        elif "RESOURCE_EXHAUSTED" in str(error):  # an evaluation halves its blocks first
            files.say(
                "out of memory: take less of config.train.batch_size, num_samples, validation_samples or "
                "num_seeds, in another --workdir; the last checkpoint and all whole rows are kept."
            )
        else:
            raise
        return 1
    return 0


def find_device() -> None:
    """Raises UserError where there is no device of the kind that JAX_PLATFORMS asks for.

    Not in a team, whose processes find their devices together.
    """
    asked = os.environ.get("JAX_PLATFORMS")
    try:
        if asked:
            jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "there is no plugin for it"
        raise UserError(
            f"JAX_PLATFORMS={asked} asks for a device that jax does not find here ({reason}): leave it out, "
            "or install what it needs, for CUDA pip install 'infsub[cuda13]'."
        ) from error


def _diverged(folder: Path) -> bool:
    summary = files.read_json(folder / "summary.json", records.SUMMARY) or {}
    return summary.get("ended") == "diverged"


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Keeps what is compiled, and says where the seconds went, if any went there."""
    compilations.keep()
    began = compilations.spent()
    yield
    spent = compilations.spent().since(began)
    if spent.compiled or spent.cached:
        files.say(f"{spent}.")


def run(
    mode: str,
    config: configs.Config,
    workdir: Path,
    shard: shards.Shard = shards.WHOLE,
    team: processes.Team | None = None,
) -> None:
    """Trains, evaluates and reports, or does the one of them that `mode` names.

    Of a shard: one of the processes trains and the others wait for it, or those of a team train
    together; then each evaluates its shard, and the last to end reports.

    Raises:
      UserError: a mistake, which no seed gets past.
      records.Stopped: as `train.train`; or seeds that have failed, when the others are done.
    """
    from infsub import (  # flax and orbax: not for a mistake, nor for --help
        evaluate,
        imported,
        published,
        report,
        train,
    )

    failed, refused, runs = [], [], configs.runs(config, workdir)
    trained = mode == "evaluate" or (mode == "run" and published.is_trained(config, workdir))
    if config.model.imported or trained:
        processes.apart(team)
    if config.model.imported and mode != "report":
        imported.claim(config, workdir, mode)
    elif trained:
        if config.init_from and not (workdir / "config.json").exists():
            published.claim(config, workdir)
        if mode == "run":
            files.say(f"nothing is trained: the weights are those of {config.init_from}.")
    elif mode == "report" and not config.model.imported:
        records.check(config, workdir, records.read_run(workdir))
    elif mode in ("run", "train"):
        with processes.joined(team):
            if mode == "run":
                processes.together(lambda: evaluate.check(config, workdir))
            try:
                train.train(config, workdir, 0.0 if team or shard == shards.WHOLE else math.inf)
            except records.Stopped as stopped:  # of seeds that diverged: the others go on
                if stopped.exit_code != 1 or mode == "train" or config.train.num_seeds == 1:
                    raise
                failed.append(str(stopped).removesuffix("."))
                runs = [(member, folder) for member, folder in runs if not _diverged(folder)]
    for member, folder in runs:
        evaluation = folder / config.evaluate.name
        try:
            if mode in ("run", "evaluate") and (bad := evaluate.evaluate(member, folder, shard)):
                failed.append(f"an estimate is not finite at datapoints {bad} of {folder}")
            if mode == "run" and (lacking := records.missing(evaluation)):
                files.say(f"{shard} of {evaluation} is done, {lacking}: the last shard reports.")
            elif mode in ("run", "report"):
                report.report(evaluation, config.report.to_dict())
        except UserError as error:  # of one seed: the others go on
            refused.append(str(error).removesuffix("."))
        except (records.Stopped, OSError, MemoryError):
            raise
        except Exception as error:  # their code may raise anything
            if not config.model.imported or mode == "report":
                raise
            raise imported.failed(config, folder, error) from error
    if len(refused) == len(runs) and not failed:
        raise UserError(f"{'; '.join(dict.fromkeys(refused))}.")
    if failed or refused:
        raise records.Stopped(f"{'; '.join(failed + refused)}.", exit_code=1)


def run_experiment(
    mode: str, config: configs.Config, workdir: Path, shard: shards.Shard = shards.WHOLE
) -> int:
    """Runs an experiment's cells, or draws its table and figure anew; the exit code."""
    overrides = list(config_flags.get_override_values(flags.FLAGS["config"]))
    if mode == "report":
        if CELLS.value:
            raise UserError("--cells is for --mode=run; report draws all that is done.")
        return experiments.redraw(config, workdir, overrides)
    if mode != "run":
        raise UserError(f"--mode={mode} is for one run; an experiment has run, report and status.")
    return experiments.run(config, workdir, overrides, CELLS.value, shard)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
