from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from absl import flags
from forks import commands
from ml_collections import config_flags

from infsub import config as configs
from infsub import evaluate, files, main, records, report, train
from infsub.types import UserError

ROOT = Path(__file__).parent.parent
QUICK = f"--config={ROOT / 'configs/quickstart.py'}"
PAPER = f"--config={ROOT / 'configs/paper/larger_encoder.py'}"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(*arguments) runs infsub.main in a process: (exit code, what it printed)."""
    with commands(tmp_path_factory.mktemp("forks")) as command:

        def run(*arguments):
            answer = command(*arguments)
            return answer["code"], answer["log"]

        yield run


BROKEN = {
    "syntax.py": "x = (",
    "import.py": "import nothere",
    "empty.py": "x = 3",
    "field.py": "from infsub.config import default\n"
    "def get_config():\n    config = default()\n    config.train.epochs = 3\n    return config",
    "silent.py": "def get_config():\n    assert False",
    "bare.py": "from ml_collections import ConfigDict\n"
    "def get_config():\n    return ConfigDict({'seed': 1})",
}
MISTAKES = {
    "no workdir": ([QUICK], "--workdir is missing"),
    "no config": (["W"], "holds no run .it has no config.json."),
    "unknown flag": (["W", QUICK, "--confg=x"], "Unknown command line flag 'confg'"),
    "unknown mode": (["W", QUICK, "--mode=test"], "value should be one of <run.train.evaluate"),
    "no flag": (["W", QUICK, "train"], "'train' is no flag"),
    "config and its value apart": (
        ["W", "--config", "nothere.py"],
        "--config=nothere.py: there is no",
    ),
    "field beside those that only some configs have": (
        ["W", PAPER, "--config.scale=full", "--config.model.posterior.rank=3", "--config.sed=1"],
        "no field config.sed: did you mean config.seed?",
    ),
    "field, the config apart": (
        ["W", *QUICK.split("="), "--config.sed=1"],
        "no field config.sed: did you mean config.seed?",
    ),
    "team of an experiment": (
        ["W", PAPER, "--shard=0/2", "--coordinator=a:1"],
        "cells train one after the other: --shard=i/n shares them",
    ),
    "cells of a report": (
        ["W", PAPER, "--mode=report", "--cells=conv"],
        "--cells is for --mode=run",
    ),
    "missing file": (["W", "--config=nothere.py"], "--config=nothere.py: there is no such file"),
    "directory": (["W", "--config=."], "--config=.: there is no such file"),
    "syntax": (["W", "syntax.py"], "syntax.py failed: SyntaxError.*line 1"),
    "import": (["W", "import.py"], "import.py failed: ModuleNotFoundError: No module .*nothere"),
    "empty": (["W", "empty.py"], "empty.py failed: .*no attribute 'get_config'"),
    "field in file": (["W", "field.py"], 'field.py failed: .*Key "epochs" does not exist'),
    "without a word": (["W", "silent.py"], "silent.py failed: AssertionError."),
    "bare": (["W", "bare.py"], "the config has no field data.binarisation"),
    "argument": (["W", f"{QUICK}:z=3"], "takes no argument after a colon"),
    "field": (
        ["W", QUICK, "--config.train.learning_rat=1"],
        "there is no field config.train.learning_rat: did you mean config.train.learning_rate?",
    ),
    "float": (["W", QUICK, "--config.train.learning_rate=fast"], "is 'fast'; it must be a number"),
    "integer": (
        ["W", QUICK, "--config.train.num_epochs=1.5"],
        "is '1.5'; it must be a whole number",
    ),
    "choice": (["W", QUICK, "--config.train.objective=mle"], "'mle'; it must be one of elbo, iwae"),
    "range": (["W", QUICK, "--config.train.batch_size=0"], "is 0; it must be at least 1"),
    "too large": (["W", QUICK, "--config.train.batch_size=9999"], "more than the 4000 training im"),
    "posterior": (["W", QUICK, "--config.model.posterior.name=iaf"], "must be one of gaussian, fu"),
    "network": (["W", QUICK, "--config.model.encoder.activation=swish"], "must be one of elu"),
    "data set": (["W", QUICK, "--config.data.name=imagenet"], "must be one of mnist5k"),
    "no data": (
        ["W", QUICK, "--config.data.name=mnist", "--config.data.dir=/nowhere"],
        "mnist is not in /nowhere/mnist/3.0.1: prepare it with",
    ),
    "no plane": (
        ["W", QUICK, "--config.evaluate.grid=50"],
        "grid=50 needs config.model.latent_dim=2",
    ),
    "frozen": (["W", QUICK, "--config.train.freeze=decoder"], "give config.init_from=WORKDIR"),
    "on model": (["W", QUICK, "--config.train.on=model"], "give config.train.freeze=decoder and"),
    "split": (
        ["W", QUICK, "--config.evaluate.split=dev"],
        "split is 'dev'; it must be one of train, validation, test, model.",
    ),
    "more points than there are": (
        ["W", QUICK, "--config.evaluate.first=100000"],
        "the first n of 4000 datapoints needs 1 ≤ n ≤ 4000; got 100000",
    ),
    "no indices": (
        ["W", QUICK, "--config.evaluate.indices_file=/nope"],
        "indices_file=/nope must be a file of integers",
    ),
    "checkpoint that is not kept": (
        ["W", QUICK, "--config.evaluate.checkpoint=epoch_7"],
        "checkpoint=epoch_7 is none that training keeps: .*epoch_50.*config.train.keep_every=7",
    ),
    "checkpoint after the end": (
        ["W", QUICK, "--config.evaluate.checkpoint=epoch_60", "--config.train.keep_every=20"],
        r"checkpoint=epoch_60 is none that training keeps: .*every 20 epochs .* one of these\.$",
    ),
    "no end": (
        ["W", QUICK, "--config.evaluate.split=model", "--config.evaluate.per_class=0"],
        "give config.evaluate.first=N",
    ),
    "curve": (
        ["W", QUICK, "--config.evaluate.local.curve=(0,3,1)"],
        r"config.evaluate.local.curve is \(0, 3, 1\); it must be increasing",
    ),
    "start of AIS": (
        ["W", QUICK, "--config.evaluate.ais.start=encoder"],
        "start is 'encoder'; it must be one of posterior, laplace, local, prior.",
    ),
    "no chains": (
        ["W", QUICK, "--config.evaluate.ais.num_chains=0"],
        "is 0; it must be at least 1",
    ),
    "family": (
        ["W", QUICK, "--config.evaluate.local.families=('iaf',)"],
        r"families is \('iaf',\); it must be a tuple of names among own, gaussian",
    ),
    "families in a list": (
        ["W", QUICK, "--config.evaluate.local.families=[['gaussian']]"],
        r"families is \(\['gaussian'\],\); it must be a tuple of names among own, gaussian",
    ),
    "folder": (
        ["W", QUICK, "--config.evaluate.name=../outside"],
        "name is '../outside'; it must be the name of a folder",
    ),
    "no pilot": (
        [
            "W",
            QUICK,
            "--config.evaluate.ais.schedule=adaptive",
            "--config.evaluate.ais.adaptation=authors",
        ],
        "it needs config.evaluate.ais.adaptation=pilot",
    ),
    "no family": (
        ["W", QUICK, "--config.evaluate.ais.start=local", "--config.evaluate.local.families=()"],
        "starts from the first of config.evaluate.local.families, and there is none",
    ),
    "no shard": (["W", QUICK, "--shard=4/4"], "--shard=4/4 is no shard: give --shard=i/n, with i"),
    "no array": (["W", QUICK, "--shard=auto"], "SLURM_ARRAY_TASK_ID, or from JOB_COMPLETION_INDEX"),
    "shard of a training": (
        ["W", QUICK, "--mode=train", "--shard=0/2"],
        "--shard is for --mode=run",
    ),
    "no team": (["W", QUICK, "--coordinator=a:1"], "give each its --shard=i/n too"),
    "report of a team": (
        ["W", "--mode=report", "--coordinator=a:1", "--shard=0/2"],
        "several tasks are for --mode=run and evaluate and train; report is of the whole",
    ),
    "no source": (["W", QUICK, "--config.init_from=/nowhere"], "init_from=/nowhere holds no run"),
    "unwritable": (["--workdir=/proc/run", QUICK], "--workdir=/proc/run cannot be written to"),
    "override alone": (["W", "--config.seed=3"], "give --config=FILE.py too"),
    "not trained": (["W", QUICK, "--mode=evaluate"], "holds no run"),
    "not evaluated": (["W", "--mode=report"], "holds no run"),
    "no status": (["W", "--mode=status"], "holds no run"),
    "nothing at home": (
        ["--workdir=~/nowhere", "--mode=status"],
        f"{re.escape(os.path.expanduser('~'))}/nowhere holds no run",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_sentence_and_code_2(command, tmp_path, mistake):
    arguments, expected = MISTAKES[mistake]
    for i, argument in enumerate(arguments):
        if argument in BROKEN:
            (tmp_path / argument).write_text(BROKEN[argument])
            arguments = [*arguments[:i], f"--config={tmp_path / argument}", *arguments[i + 1 :]]
    workdir = tmp_path / "run"
    arguments = [f"--workdir={workdir}" if a == "W" else a for a in arguments]
    code, log = command(*arguments)
    assert code == 2, log
    lines = log.strip().splitlines()
    assert len(lines) == 1, log
    assert lines[0].startswith("infsub: ")
    assert re.search(expected, lines[0]), log
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("text", "steps"), [("(0,1,3)", (0, 1, 3)), ("0,1,3", (0, 1, 3)), ("3", (3,)), ("()", ())]
)
def test_a_curve_on_the_command_line_is_a_tuple_to_the_end(text, steps):
    values, argv = flags.FlagValues(), ["", f"--config.evaluate.local.curve={text}"]
    default = configs.default()
    config_flags.DEFINE_config_dict("config", default, flag_values=values, sys_argv=argv)
    values(argv)
    resolved = configs.resolve(values.config)
    saved = json.loads(json.dumps(configs.to_json(resolved)))
    for config in (resolved, configs.from_json(saved), configs.resolve(configs.from_json(saved))):
        assert config.evaluate.local.curve == steps
        assert isinstance(config.evaluate.local.curve, tuple)


def test_help_and_import_take_seconds():
    start = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-m", "infsub.main", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert shown.returncode == 0
    assert "--workdir" in shown.stdout
    assert "python -m infsub.main --config=" in shown.stdout
    for name in configs.FIELDS:
        assert f" {name}=" in shown.stdout
    assert time.monotonic() - start < 30  # a busy machine; on an idle one it is three


def test_infsub_is_the_same_command(tmp_path):
    """The console script, as pip makes it, and `python -m infsub`."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["infsub"].split(":")
    script = tmp_path / "infsub"
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    said = []
    for start in (["-m", "infsub.main"], ["-m", "infsub"], [str(script)]):
        arguments = [sys.executable, *start, "--mode=status", f"--workdir={tmp_path / 'none'}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        ended = subprocess.run(arguments, capture_output=True, text=True, env=environment)
        said.append((ended.returncode, ended.stdout, ended.stderr))
    assert said[0] == said[1] == said[2]
    assert said[0][1] or said[0][2]


TINY = ["--config.evaluate.per_class=0", "--config.evaluate.first=3"]
TINY += ["--config.evaluate.elbo_samples=5", "--config.evaluate.iwae_samples=5"]
TINY += ["--config.evaluate.ais.num_chains=2", "--config.evaluate.ais.num_temperatures=2"]
TINY += ["--config.train.num_epochs=2"]


@pytest.mark.parametrize("mode", ["run", "evaluate", "report"])
def test_seeds_that_fail_are_named_and_the_others_are_done(tmp_path, monkeypatch, mode):
    """The first is refused, the second has no finite datapoint, the third is well."""
    calls = []

    def evaluate_one(config, folder, shard):
        calls.append(("evaluate", config.seed))
        if config.seed == 0:
            raise UserError("seed_0 has no checkpoint.")
        return [7] if config.seed == 1 else []

    def report_one(folder, thresholds):
        seed = int(folder.name[-1])
        calls.append(("report", seed))
        if seed < 2:
            raise UserError(f"seed_{seed} has no datapoint that is finite; look at its samples.")

    monkeypatch.setattr(train, "train", lambda *_: None)
    for name in ("read_run", "check"):
        monkeypatch.setattr(records, name, lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate", evaluate_one)
    monkeypatch.setattr(report, "report", report_one)
    # Where another one's estimates are not finite, one that diverged before is done all the same.
    (tmp_path / "seed_2").mkdir()
    files.write_json(tmp_path / "seed_2/summary.json", {"ended": "diverged", "step": 3})
    config = configs.default()
    config.train.num_seeds = 3
    with pytest.raises(records.Stopped) as stopped:
        main.run(mode, config, tmp_path)
    assert stopped.value.exit_code == 1
    assert calls[-1] == ("evaluate" if mode == "evaluate" else "report", 2)
    for said in ("seed_0 has no ", "seed_1 has no datapoint" if mode != "evaluate" else "[7] of"):
        assert said in str(stopped.value)

    config.train.num_seeds = 1  # what no seed gets past is a mistake
    calls.clear()
    with pytest.raises(UserError, match=r"^seed_0 has no |^seed_\d has no datapoint"):
        main.run(mode, config, tmp_path / "seed_0")


@pytest.mark.parametrize("mode", ["run", "train"])
def test_a_seed_that_diverged_keeps_no_other_from_its_rows(tmp_path, monkeypatch, mode):
    calls = []

    def diverge(*_):
        raise records.Stopped("training diverged in seed_0.", exit_code=1)

    def evaluate_one(config, folder, shard):
        calls.append(config.seed)
        return []

    (tmp_path / "seed_0").mkdir()
    files.write_json(tmp_path / "seed_0/summary.json", {"ended": "diverged", "step": 3})
    monkeypatch.setattr(train, "train", diverge)
    monkeypatch.setattr(evaluate, "check", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate", evaluate_one)
    monkeypatch.setattr(report, "report", lambda folder, thresholds: calls.append(folder.name))
    config = configs.default()
    config.train.num_seeds = 2
    with pytest.raises(records.Stopped, match=r"^training diverged in seed_0") as stopped:
        main.run(mode, config, tmp_path)
    assert stopped.value.exit_code == 1
    assert calls == ([1, "seed_1"] if mode == "run" else [])
    config.train.num_seeds = 1
    calls.clear()
    with pytest.raises(records.Stopped, match=r"^training diverged in seed_0"):
        main.run(mode, config, tmp_path)
    assert not calls


def test_of_a_flag_given_twice_the_last_counts(tmp_path):
    """Of a tuple, too, which absl would take for the longer one, and of --config itself."""
    other = tmp_path / "other.py"
    other.write_text("def get_config():\n    raise RuntimeError\n")
    widths = [f"--config.model.encoder.hidden={each}" for each in ("(200,200)", "(9,)")]
    given = [widths[0], "--config.seed=1", f"--config={other}", QUICK, "--config.seed=2", widths[1]]
    config, fields = main.config_of([*given, "--workdir=w", "--mode=status", "--mode=train"])
    assert (config.seed, config.model.encoder.hidden) == (2, (9,))
    assert sorted(fields) == ["model.encoder.hidden", "seed"]


def test_without_stderr_nobody_is_shown_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    files.Progress(3, "training").update(1)
    assert not files.on_terminal()


@pytest.mark.slow
def test_the_whole_way_and_again(command, tmp_path):
    arguments = [*TINY, f"--config={ROOT / 'tests/tiny.py'}", f"--workdir={tmp_path}"]
    code, log = command(*arguments)
    assert code == 0, log
    names = set(os.listdir(tmp_path))
    assert {"config.json", "metrics.jsonl", "metrics.csv", "rows.jsonl", "table.md"} <= names
    assert {"table.csv", "gaps.png", "reconstructions.png", "samples.png", "tensorboard"} <= names
    rows = (tmp_path / "rows.jsonl").read_bytes()
    assert len(rows.splitlines()) == 3
    assert re.search(r"infsub: .* s: .* s tracing, .* s compiling \(\d+ programs, and \d+", log)

    code, log = command(*arguments)
    assert code == 0, log
    assert "is done" in log
    assert (tmp_path / "rows.jsonl").read_bytes() == rows
    code, log = command("--mode=report", f"--workdir={tmp_path}")  # the workdir's own config
    assert code == 0, log
    code, log = command(*arguments, "--mode=report", "--config.model.latent_dim=7")
    assert code == 2
    assert "is another config's: model.latent_dim was " in log

    code, status = command("--mode=status", f"--workdir={tmp_path}")
    assert code == 0
    for text in ("mnist5k", "epoch 2 of 2", "test ELBO", "3 datapoints evaluated", "table.md"):
        assert text in status
    assert status.count("s compiling (") == 2  # of training and of evaluation
    assert len(status.splitlines()) < 24

    (tmp_path / "rows.jsonl").unlink()
    for shard, said in (("1/2", "2 of 3 datapoints are missing"), ("0/2", "Wrote table.md")):
        code, log = command(*arguments, f"--shard={shard}")
        assert code == 0, log
        assert said in log  # the last one reports
    code, log = command("--mode=status", f"--workdir={tmp_path}")
    assert "3 datapoints evaluated" in log

    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, log = command(*arguments, "--config.seed=4")
    assert code == 2
    assert "seed was 0 and is 4" in log
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
