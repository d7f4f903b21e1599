"""Whatever somebody put into a workdir, the command says which file, what is wrong and what to do.

A table of spoilt workdirs: each is one sentence and an exit code, in this process, with no traceback.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
import tiny
from absl import flags

from infsub import checkpoints, evaluate, experiments, main
from infsub import config as configs
from infsub.train import train

pytestmark = pytest.mark.usefixtures("small_pictures")

POINTS = 4
CELL = {"state": "done", "run": "runs/a", "evaluation": "train-b", "scale": "small"}
PICTURES = {"table", "gaps", "posteriors", "datapoints"}  # of a report that fails late


def config():
    return configs.resolve(tiny.measured(per_class=0, first=POINTS, bdmc={"num_points": POINTS}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is trained, evaluated as far as its files tell, and one cell of an experiment."""
    workdir = tmp_path_factory.mktemp("whole")
    train(config(), workdir)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_write_rows", stop)  # once the folder is claimed
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(config(), workdir)
    bounds = ("elbo", "local_gaussian", "iwae", "ais")
    rows = [{"index": n, "label": n} | dict.fromkeys(bounds, -90.0 - n) for n in range(POINTS)]
    certificate = [{"index": n, "lower": -90.0, "upper": -89.0, "gap": 1.0} for n in range(POINTS)]
    for name, lines in (("rows", rows), ("bdmc", certificate)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (workdir / f"{name}.jsonl").write_text(text)
    np.savez(workdir / "posteriors.npz", **arrays())
    written = [workdir / name for name in ("rows.jsonl", "bdmc.jsonl", "posteriors.npz")]
    before = [path.read_bytes() for path in written]
    assert run(workdir, "evaluate")[0] == 0
    assert [path.read_bytes() for path in written] == before  # nothing was left to compute
    (workdir / "seen").mkdir()
    (workdir / "seen/cells.json").write_text(json.dumps({"a": CELL}))
    return workdir


def arrays(**changed):
    """What an evaluation with a grid leaves."""
    n, f, g = 2, 1, 4
    made = {
        "images": np.zeros((n, 28, 28, 1)),
        "families": np.array(["gaussian"]),
        "log_px": np.zeros(n),
        "low": np.zeros((n, 2)),
        "width": np.ones(n),
        "truth": np.ones((n, g, g)),
        "bounds": np.zeros((n, f)),
        "densities": np.ones((n, f, g, g)),
    }
    return {name: value for name, value in (made | changed).items() if value is not None}


def run(workdir, mode, *arguments):
    """The command in this process: (exit code, what it said)."""
    flags.FLAGS(["infsub", f"--workdir={workdir}", f"--mode={mode}", "--shard=", *arguments])
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(main.files, "say", said.append)
        code = main.main([])
    return code, said


def text(name, content):
    """Puts a content into a file of the workdir."""
    return lambda workdir: (workdir / name).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def folder(name):
    """Puts a folder where a file was."""

    def spoil(workdir):
        (workdir / name).unlink()
        (workdir / name).mkdir()

    return spoil


def fields(name, **changed):
    """Changes fields of a JSON object, dots written as __; ... removes one."""

    def spoil(workdir):
        value = json.loads((workdir / name).read_text())
        for path, new in changed.items():
            *sections, last = path.split("__")
            place = value
            for section in sections:
                place = place[section]
            place[last] = new
            if new is ...:
                del place[last]
        (workdir / name).write_text(json.dumps(value))

    return spoil


def setting(**changed):
    """Changes fields of the run's config."""
    return fields("config.json", **{f"config__{name}": value for name, value in changed.items()})


def last_row(name, line):
    """Adds a line to a file of rows."""
    return lambda workdir: (workdir / name).write_text((workdir / name).read_text() + line + "\n")


def densities(**changed):
    """Changes arrays of posteriors.npz; None removes one."""
    return lambda workdir: np.savez(workdir / "posteriors.npz", **arrays(**changed))


def array(value):
    """The content of an npy file, of one array."""
    content = io.BytesIO()
    np.save(content, value)
    return content.getvalue()


def objects(workdir):
    """An npz with code in it."""
    content = io.BytesIO()
    np.savez(content, **arrays(log_px=np.array([print, print], object)))
    (workdir / "posteriors.npz").write_bytes(content.getvalue())


def unfinished(spoil):
    """Spoils a run whose training is not done."""

    def spoil_it(workdir):
        (workdir / "summary.json").unlink()
        spoil(workdir)

    return spoil_it


def no_steps(workdir):
    shutil.rmtree(workdir / "checkpoints")


def torn_checkpoint(workdir):
    step = checkpoints.steps(workdir / "checkpoints")[-1]
    for path in (workdir / "checkpoints" / f"{step:08d}").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


CONFIG = r"config\.json cannot be read as JSON .*: mend or remove it"
NO_RUN = r"config\.json is no run's \({}.*\): give a run's --workdir, or mend it"
ROW = rf"{{}}\.jsonl, line {POINTS + 1}, is no (row|JSON) \(.*\): mend it, or remove the file"
TORN = r"posteriors\.npz is (torn|no npz file).*: remove it and evaluate the run again"
JSON = r"{}\.json is not as infsub writes it \({}.*\): mend or remove it"

# What is spoilt, in which mode it is met, and what is said.
INPUTS = {
    # config.json
    **{
        f"config.json, {name}, {mode}": (text("config.json", content), mode, said)
        for mode in ("status", "evaluate", "report", "train")
        for name, content, said in (
            ("empty", "", CONFIG),
            ("[]", "[]", JSON.format("config", "it is no JSON object")),
            ("binary", b"\x80\x81\xff\x00", CONFIG),
        )
    },
    "config.json, truncated": (text("config.json", '{"config": {"see'), "status", CONFIG),
    "config.json, {}": (text("config.json", "{}"), "status", NO_RUN.format("config must be an o")),
    "config.json, deep": (text("config.json", "[" * 99999), "report", CONFIG),
    "config.json, a folder": (folder("config.json"), "train", CONFIG),
    "config.json, null": (
        text("config.json", "null"),
        "status",
        JSON.format("config", "it is no JSON"),
    ),
    "no identity": (
        fields("config.json", identity=...),
        "status",
        NO_RUN.format("identity must be"),
    ),
    "identity, a list": (
        fields("config.json", identity=[]),
        "train",
        NO_RUN.format("identity must"),
    ),
    "identified, a text": (
        fields("config.json", identified="x"),
        "train",
        NO_RUN.format("identif"),
    ),
    "levels, a text": (
        fields("config.json", levels="2"),
        "evaluate",
        NO_RUN.format("levels must be"),
    ),
    "one level": (
        fields("config.json", levels=1),
        "evaluate",
        NO_RUN.format(r"image_shape=\[28, 2"),
    ),
    "image_shape, a number": (
        fields("config.json", image_shape=28),
        "status",
        NO_RUN.format("image_shape must be a list, and is 28"),
    ),
    "image_shape, texts": (
        fields("config.json", image_shape=["a", 1, 1]),
        "evaluate",
        NO_RUN.format(r"image_shape=\['a', 1, 1\]"),
    ),
    "no steps an epoch": (
        fields("config.json", steps_per_epoch=0),
        "status",
        NO_RUN.format("image_s"),
    ),
    "config, a list": (
        fields("config.json", config=[1]),
        "report",
        NO_RUN.format("config must be"),
    ),
    "seed, a text": (
        setting(seed="a"),
        "status",
        r"config\.json: the saved config does not fit.*seed",
    ),
    "seed, an object": (
        setting(seed={"a": 1}),
        "evaluate",
        r"config\.json: the saved.* has seed\.a=1",
    ),
    "seed, null": (setting(seed=None), "evaluate", r"config\.seed is None; it must be from 0"),
    "train, a number": (
        setting(train=3),
        "status",
        r"the saved config has train=3, a field that this",
    ),
    "a field of another version": (
        setting(train__momentum=0.9),
        "evaluate",
        r"has train\.momentum=0\.9, a field that this infsub has not: mend it, or use the version",
    ),
    "widths, texts": (
        setting(model__encoder__hidden=["a"]),
        "evaluate",
        "is another config's|config.model cannot be built",
    ),
    "a family that is none": (
        setting(model__posterior={"name": "iaf"}),
        "status",
        r"config\.model\.posterior\.name is 'iaf'; it must be one of",
    ),
    "a family, a number": (
        setting(model__posterior={"name": 3}),
        "report",
        r"config\.model\.posterior\.name is 3; it must be one of",
    ),
    "an option that is none": (
        setting(model__posterior={"name": "gaussian", "depth": 3}),
        "evaluate",
        "is another config's|config.model cannot be built",
    ),
    "a negative block": (
        setting(evaluate__block_size=-1),
        "evaluate",
        "block_size is -1; it must be",
    ),
    "a name that leaves": (
        setting(evaluate__name="../outside"),
        "evaluate",
        "name is '../outside'; it",
    ),
    "a name, absolute": (
        setting(evaluate__name="/tmp/outside"),
        "report",
        "name is '/tmp/outside'; i",
    ),
    "a name with a slash": (
        setting(evaluate__name="a/b"),
        "evaluate",
        "name is 'a/b'; it must be the",
    ),
    "a name that is long": (setting(evaluate__name="a" * 300), "report", "at most 100 letters"),
    "a name of ours": (setting(evaluate__name="checkpoints"), "evaluate", "does not make itself"),
    "no pilot": (
        setting(evaluate__ais__schedule="adaptive", evaluate__ais__adaptation="authors"),
        "train",
        r"it needs config\.evaluate\.ais\.adaptation=pilot",
    ),
    "thresholds, a text": (setting(report__min_ess="low"), "report", r"min_ess|does not fit"),
    "another model": (
        setting(model__decoder__hidden=[9]),
        "evaluate",
        r"another config's: model\.decoder\.hidden was \[8\] and is \[9\]",
    ),
    "another seed": (setting(seed=5), "evaluate", r"is another config's: seed was 0 and is 5"),
    "a checkpoint that is none": (
        setting(evaluate__checkpoint="first"),
        "evaluate",
        "best, last or e",
    ),
    "a checkpoint that is gone": (
        setting(evaluate__checkpoint="epoch_9"),
        "evaluate",
        "no checkpoint epoch_9; it has epoch_",
    ),
    # rows
    **{
        f"{stem}.jsonl, {line}, {mode}": (last_row(f"{stem}.jsonl", line), mode, ROW.format(stem))
        for stem in ("rows", "bdmc")
        for mode in ("report", "evaluate")
        for line in ("[1]", "3", '"text"', '{"label": 3}', '{"index": "a"}')
    },
    "rows.jsonl, binary": (text("rows.jsonl", b"\x00\xff\x80"), "evaluate", "line 1, is no JSON"),
    "rows.jsonl, binary, status": (
        text("rows.jsonl", b"\x00\xff\x80"),
        "status",
        "line 1, is no JSON",
    ),
    "rows.jsonl, a folder": (
        folder("rows.jsonl"),
        "report",
        r"rows\.jsonl cannot be read \(Is a dir",
    ),
    "rows.jsonl, others": (
        last_row("rows.jsonl", '{"index": 9}'),
        "evaluate",
        "holds other datapoints",
    ),
    "rows.jsonl, texts": (
        last_row("rows.jsonl", '{"index": 1, "elbo": "low"}'),
        "report",
        r"rows\.jsonl: elbo must be a number",
    ),
    "rows.jsonl, no bound": (
        last_row("rows.jsonl", '{"index": 9}'),
        "report",
        "must be a JSON object w",
    ),
    "rows.jsonl, empty": (text("rows.jsonl", ""), "report", "is missing or has no complete row"),
    "bdmc.jsonl, others": (
        last_row("bdmc.jsonl", '{"index": 7}'),
        "evaluate",
        "holds other datapoints",
    ),
    "a shard's rows, a list": (
        text("rows.shard-0-of-2.jsonl", "[]\n"),
        "report",
        r"rows\.shard-0-of-2\.jsonl, line 1, is no row",
    ),
    # what lies beside them
    "metrics.jsonl, a list": (last_row("metrics.jsonl", "[1]"), "status", "line 3, is no row"),
    "metrics.jsonl, texts": (
        text("metrics.jsonl", '{"step": "a", "epoch": 1, "elbo": 1}\n'),
        "status",
        r"metrics\.jsonl, line 1, is no row \(step must be a whole number, and is \"a\"\)",
    ),
    "metrics.jsonl, torn inside": (
        unfinished(last_row("metrics.jsonl", '{"step"')),
        "train",
        r"metrics\.jsonl, line 3, is no JSON",
    ),
    "progress.json, []": (
        text("progress.json", "[]"),
        "status",
        JSON.format("progress", "it is no"),
    ),
    "progress.json, texts": (
        fields("progress.json", done="all"),
        "status",
        JSON.format("progress", 'done must be a whole number, and is "all"'),
    ),
    "progress.json, no time": (
        fields("progress.json", time=...),
        "status",
        JSON.format("progress", "time must be a number or null, and is missing"),
    ),
    "progress.json, empty": (
        text("progress.json", ""),
        "status",
        "progress.json cannot be read as J",
    ),
    "summary.json, a number": (
        text("summary.json", "3"),
        "status",
        JSON.format("summary", "it is no"),
    ),
    "summary.json, {}": (
        text("summary.json", "{}"),
        "train",
        JSON.format("summary", "ended must be"),
    ),
    "evaluation.json, []": (
        text("evaluation.json", "[]"),
        "evaluate",
        JSON.format("evaluation", "it"),
    ),
    "evaluation.json, binary": (
        text("evaluation.json", b"\xff"),
        "report",
        "cannot be read as JSON",
    ),
    "evaluation.json, texts": (
        fields("evaluation.json", num_points="all"),
        "report",
        JSON.format("evaluation", "num_points must be a whole number"),
    ),
    "evaluation.json, of other settings": (
        fields("evaluation.json", elbo_samples=7),
        "evaluate",
        r"was made with other settings: elbo_samples was 7 and is 20",
    ),
    "evaluation.json, of another version": (
        fields("evaluation.json", tempering=3),
        "evaluate",
        r"was made with other settings: tempering was 3 and is 'nothing'",
    ),
    # pictures' densities
    "posteriors.npz, empty": (text("posteriors.npz", ""), "report", TORN),
    "posteriors.npz, binary": (text("posteriors.npz", b"PK\x03\x04 no"), "report", TORN),
    "posteriors.npz, a folder": (folder("posteriors.npz"), "report", TORN),
    "posteriors.npz, objects": (objects, "report", TORN),
    "posteriors.npz, lacking": (densities(truth=None), "report", TORN),
    "posteriors.npz, shapes": (densities(width=np.ones(7)), "report", TORN),
    "posteriors.npz, texts": (densities(log_px=np.array(["a", "b"])), "report", TORN),
    "images.npz, empty": (text("images.npz", ""), "report", TORN.replace("posteriors", "images")),
    "images.npz, one array": (
        text("images.npz", array(np.zeros(3))),
        "report",
        TORN.replace("posteriors", "images"),
    ),
    # checkpoints
    "no checkpoints": (no_steps, "evaluate", "has no checkpoint yet: run it with --mode=train"),
    "a torn checkpoint": (
        torn_checkpoint,
        "evaluate",
        "checkpoint .* cannot be read .*; remove it, and the training command goes on",
    ),
    # an experiment's folder
    "cells.json, []": (
        text("seen/cells.json", "[]"),
        "status",
        JSON.format("cells", "it is no")[:60],
    ),
    "cells.json, texts": (
        text("seen/cells.json", '{"a": "done"}'),
        "status",
        r"cells\.json is not as infsub writes it \(a: it is no JSON object\): remove it",
    ),
    "cells.json, no scale": (
        text("seen/cells.json", json.dumps({"a": CELL | {"scale": None}})),
        "status",
        r"cells\.json is not as .* \(a: scale must be a text, and is null\): remove it",
    ),
    "cells.json that leaves": (
        text("seen/cells.json", json.dumps({"a": CELL | {"run": "../.."}})),
        "status",
        r"its folder \.\./\.\./train-b is not in the workdir",
    ),
    "cells.json, absolute": (
        text("seen/cells.json", json.dumps({"a": CELL | {"run": "/etc"}})),
        "status",
        "its folder /etc/train-b is not in the workdir",
    ),
}


def test_there_are_enough():
    assert len(INPUTS) >= 60


def test_the_workdir_is_well_unless_it_is_spoilt(whole, capsys):
    for mode in ("evaluate", "train"):
        assert run(whole, mode)[0] == 0
    assert run(whole, "status") == (0, [])  # of the cells, whose folder is here
    assert "a  " in capsys.readouterr().out


@pytest.mark.parametrize("case", INPUTS)
def test_a_bad_input_is_one_sentence_and_code_2(whole, tmp_path, case):
    spoil, mode, said = INPUTS[case]
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    if not case.startswith("cells"):
        shutil.rmtree(workdir / "seen")
    spoil(workdir)
    before = {path for path in tmp_path.rglob("*") if not path.name.startswith(".")}
    code, sentences = run(workdir, mode)
    assert code == 2
    *told, sentence = sentences
    assert len(told) <= 1  # what was done before it was met
    assert re.search(said, sentence), sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    after = {path for path in tmp_path.rglob("*") if not path.name.startswith(".")}
    assert {path.stem for path in after - before} <= PICTURES  # the pictures come last


@pytest.mark.parametrize("name", ["../outside", "a/b", "", "/tmp/a", "a" * 300])
def test_cells_and_experiments_cannot_leave_the_workdir(tmp_path, name):
    for named in (
        experiments.experiment(name, "?", {"a": {}}),
        experiments.experiment("e", "?", {name: {}}),
    ):
        with pytest.raises(experiments.UserError, match="must be the name of a folder"):
            experiments.expand(named, tmp_path)


def test_what_the_system_refuses_is_a_sentence(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "tensorboard")
    (workdir / "tensorboard").write_text("")
    code, sentences = run(workdir, "train")
    assert code == 1
    assert re.search(r"tensorboard\S* cannot be used \(.*\): mend or remove it\.", sentences[-1])
    assert os.path.isfile(workdir / "tensorboard")


@pytest.mark.parametrize(
    "error",
    [AssertionError(), RuntimeError("Unable to initialize backend 'cuda':\nno such device")],
)
def test_a_device_that_is_not_there_is_a_sentence(tmp_path, monkeypatch, error):
    def find():
        raise error

    monkeypatch.setattr(jax, "devices", find)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for mode in ("run", "train", "evaluate"):
        code, (sentence,) = run(tmp_path / "run", mode)
        assert code == 2
        assert sentence.startswith(
            "JAX_PLATFORMS=cuda asks for a device that jax does not find here"
        )
        assert "\n" not in sentence
        assert str(error)[-14:] in sentence
    assert run(tmp_path / "run", "report")[1] != [sentence]  # it computes nothing


def test_a_device_without_room_for_the_training_is_a_sentence(tmp_path, monkeypatch):
    def run_out(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(main, "run", run_out)
    monkeypatch.setattr(main.records, "read_config", lambda _: configs.default())
    code, (sentence,) = run(tmp_path / "run", "train")
    assert code == 1
    assert re.search(r"take less of config\.train\.batch_size, .* checkpoint .* kept", sentence)


def test_out_of_memory_is_a_sentence(whole, monkeypatch, capsys):
    def run_out(*_):
        raise MemoryError("one datapoint does not fit into the device's memory")

    monkeypatch.setattr(main, "run", run_out)
    code, (sentence,) = run(whole, "evaluate")
    assert code == 1
    assert sentence.startswith(
        "one datapoint does not fit into the device's memory; all whole rows"
    )
    before: list[str] = []
    show = functools.partial(main._in_a_sentence, lambda *shown: before.append(str(shown[0])))
    show("out of memory with 8 datapoints at a time: going on with 4", RuntimeWarning, "file.py", 1)
    assert capsys.readouterr().err == (
        "infsub: out of memory with 8 datapoints at a time: going on with 4.\n"
    )
    show("something else", RuntimeWarning, "file.py", 1)
    assert before == ["something else"]
