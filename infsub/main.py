"""Measures where a variational autoencoder's inference loses its nats.

  python -m infsub.main --config=configs/quickstart.py --workdir=runs/quickstart

trains the config's model, evaluates its bounds datapoint by datapoint and reports the gaps. The same
command again continues where it was stopped. Any field of infsub/config.py is a flag, such as
--config.train.learning_rate=1e-4. --mode does one part alone; then, without --config, the workdir's
own config serves. --mode=status says what a run has done and when it will be done.

Exit codes: 0 done, 1 failed, 2 a mistake in the command, 130 Ctrl-C and 143 SIGTERM (saved).
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from infsub import config as configs
from infsub import records
from infsub.types import UserError

MODES = ["run", "train", "evaluate", "report", "status"]
CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py, or FILE.py:name=value,… .")
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.")
MODE = flags.DEFINE_enum("mode", "run", MODES, "run is train, evaluate and report.")


def parse(argv: list[str]) -> list[str]:
    """absl's flags; any mistake in them ends the program with one sentence and code 2."""
    flags.FLAGS.set_default("verbosity", logging.WARNING)
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is no flag; flags start with --.")
        if WORKDIR.value is None:
            raise UserError("--workdir is missing: give a directory, such as --workdir=runs/first.")
        getattr(CONFIG.value, "seed", None)  # a file that could not be read says so now
        return rest
    except SystemExit:  # absl has shown the help
        sys.exit(0)
    except Exception as error:  # a config file may raise anything
        sys.exit(fail(configs.explain(argv, error), 2))


def main(_: list[str]) -> int:
    """Does what --mode says; the exit code."""
    workdir = Path(WORKDIR.value or "")
    try:
        if MODE.value == "status":
            print(records.status(workdir))
            return 0
        config = CONFIG.value or configs.from_json(records.read_run(workdir)["config"])
        run(MODE.value, configs.resolve(config), workdir)
        return 0
    except UserError as error:
        return fail(str(error), 2)
    except records.Stopped as error:
        return fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return fail("stopped; the same command continues.", 130)


def run(mode: str, config: configs.Config, workdir: Path) -> None:
    """Trains, evaluates and reports, or the one of them that `mode` names."""
    if mode in ("run", "train"):
        from infsub.train import train

        train(config, workdir)
    for member, folder in configs.runs(config, workdir):
        if mode in ("run", "evaluate"):
            from infsub.evaluate import evaluate

            evaluate(member, folder)
        if mode in ("run", "report"):
            from infsub.report import report

            report(str(folder))


def fail(text: str, code: int) -> int:
    """Says why; returns the exit code."""
    print(f"infsub: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
