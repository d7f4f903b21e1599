from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from forks import commands

from infsub import config as configs
from infsub import evaluate, experiments, files, locks, records, report, train
from infsub.experiments import expand, experiment
from infsub.local import RULES
from infsub.shards import WHOLE, Shard
from infsub.types import UserError

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs/paper").glob("*.py"))
NAMES = [file.stem for file in FILES]


def config_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/paper/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def overridden(config, **fields):
    """The config as if the user had set these fields, and their names."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config, [k.replace("__", ".") for k in fields]


def by_name(cells):
    return {cell.name: cell for cell in cells}


def test_the_readme_has_the_questions_of_all_eleven():
    table = (ROOT / "configs/README.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == NAMES
    assert len(NAMES) >= 11  # of the paper and its reproduction


@pytest.mark.parametrize("scale", experiments.SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_expands(name, scale, tmp_path):
    config, overrides = overridden(config_of(name), scale=scale)
    assert config.experiment.name == name  # its folder is called like its file
    assert config.experiment.question.endswith("?")
    cells = expand(config, tmp_path, overrides)
    seen = set()
    for cell in cells:
        assert set(cell.needs) <= seen, "a cell stands before what it needs"
        seen.add(cell.name)
        configs.resolve(cell.config)
        evaluate._check_kept(cell.config, cell.folder)
        if scale == "smoke":
            assert cell.config.data.name == "mnist5k"
    assert seen == set(dict(config.experiment.cells)) >= set(config.experiment.smoke)


def test_paper_scale_has_the_authors_settings(tmp_path):
    config, overrides = overridden(config_of("main_table"), scale="paper")
    cells = by_name(expand(config, tmp_path, overrides))
    for name, annealing_epochs, per_class in (
        ("binarized_mnist_gaussian", 400, 100),
        ("cifar10_auxiliary", 50, 10),
    ):
        train, evaluated = cells[name].config.train, cells[name].config.evaluate
        assert (train.num_epochs, train.schedule, train.annealing) == (3280, "burda", "entropy")
        assert (train.annealing_epochs, evaluated.per_class) == (annealing_epochs, per_class)
        assert (train.batch_size, train.num_samples, train.adam_epsilon) == (100, 1, 1e-4)
        ais = evaluated.ais
        assert (ais.num_chains, ais.num_temperatures, ais.num_leapfrog) == (100, 10_000, 10)
        assert (ais.schedule, ais.start, ais.adaptation) == ("linear", "prior", "authors")
        assert evaluated.local.preset == "authors"
        assert (evaluated.iwae_samples, evaluated.iwae_start) == (5000, "posterior")
        model = cells[name].config.model
        assert (model.latent_dim, model.encoder.activation) == (50, "elu")
    hidden = model.encoder.hidden, model.decoder.hidden  # of cifar10
    assert hidden == ((64, 128, 256), (256, 128, 64))
    flow = model.posterior
    assert (flow.num_steps, flow.hidden, flow.auxiliary_hidden) == (2, (200,), (200, 200))
    model = cells["binarized_mnist_gaussian"].config.model
    assert model.encoder.hidden == model.decoder.hidden == (200, 200)
    rule = RULES["authors"]
    assert (rule.learning_rate, rule.num_samples, rule.window, rule.patience) == (
        1e-3,
        100,
        100,
        10,
    )
    assert (rule.sticking_the_landing, rule.paired, rule.natural, rule.decay) == (0, 0, 0, 1)


QUESTION = "Why?"


def a_config(**options):
    cells = {
        "source": {},
        "user": {"init_from": "@source", "init_parts": "decoder", "train.freeze": "decoder"},
        "again": {"evaluate.split": "test"},
        "late": {"evaluate.checkpoint": "@1/2"},
    }
    return experiment("one", QUESTION, cells, **options)


def test_cells_share_runs_and_rows(tmp_path):
    config, overrides = overridden(a_config(), scale="smoke")
    cells = by_name(expand(config, tmp_path, overrides))
    source, user, again = cells["source"], cells["user"], cells["again"]
    assert user.config.init_from == str(source.folder)
    assert user.needs == ("source",)
    assert again.folder == source.folder != user.folder
    assert again.evaluation != source.evaluation
    assert cells["late"].config.evaluate.checkpoint == "epoch_1"  # of two

    # Another experiment that trains the same weights and measures the same has the same folders.
    other = experiment("two", QUESTION, {"x": {}, "y": {"train.learning_rate": 0.5}})
    config, overrides = overridden(other, scale="smoke")
    others = by_name(expand(config, tmp_path, overrides))
    assert others["x"].evaluation == source.evaluation
    assert others["y"].folder != source.folder
    # A run that starts from other weights is another run.
    config, overrides = overridden(a_config(), scale="smoke", seed=3)
    assert by_name(expand(config, tmp_path, overrides))["user"].folder != user.folder


def test_who_beats_whom(tmp_path):
    cells = {"a": {}, "b": {"train.num_epochs": 9}}
    config = experiment("e", QUESTION, cells, scales={"smoke": {"train.batch_size": 7}})
    config, overrides = overridden(config, scale="smoke")
    a, b = (cell.config.train for cell in expand(config, tmp_path, overrides))
    assert (a.num_epochs, b.num_epochs) == (2, 9)  # the scale, the cell
    assert (a.batch_size, b.batch_size) == (7, 7)  # the experiment's own scale
    config, overrides = overridden(config, train__num_epochs=5)
    assert [cell.config.train.num_epochs for cell in expand(config, tmp_path, overrides)] == [5, 5]


def test_data_that_the_user_chose_bring_their_own_fields(tmp_path):
    cells = {"a": {}, "b": {"data.name": "cifar10"}}
    for data, kind, annealing in (("cifar10", "conv", 50), ("fashion_mnist", "mlp", 400)):
        config = experiment("e", QUESTION, cells)
        config, overrides = overridden(config, scale="full", data__name=data)
        for cell in expand(config, tmp_path, overrides):
            assert cell.config.data.name == data
            assert cell.config.model.encoder.kind == kind
            assert cell.config.train.annealing_epochs == annealing


def test_shares_are_of_the_users_epochs(tmp_path):
    cells = {"late": {"evaluate.checkpoint": "@1/2", "train.keep_every": "@1/4"}}
    config = experiment("e", QUESTION, cells)
    late, overrides = overridden(config, train__num_epochs=8)
    (cell,) = expand(late, tmp_path, overrides)
    assert (cell.config.evaluate.checkpoint, cell.config.train.keep_every) == ("epoch_4", 2)
    odd, overrides = overridden(config, train__num_epochs=9)
    with pytest.raises(UserError, match=r"num_epochs=9 has no whole 1/[24].*a multiple of [24]\."):
        expand(odd, tmp_path, overrides)


def test_at_full_an_encoder_alone_trains_a_tenth_of_the_way(tmp_path):
    """On a frozen decoder, which itself trains as the authors' does; and the user's word is last."""
    for scale, epochs in (("full", (3280, 328)), ("small", (30, 30)), ("paper", (3280, 3280))):
        config, overrides = overridden(a_config(), scale=scale)
        cells = by_name(expand(config, tmp_path, overrides))
        assert tuple(cells[n].config.train.num_epochs for n in ("source", "user")) == epochs
    config, overrides = overridden(a_config(), scale="full", train__num_epochs=6)
    assert by_name(expand(config, tmp_path, overrides))["user"].config.train.num_epochs == 6


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"a": {"train.epochs": 3}}, "experiment e, cell a: .*epochs"),
        ({"a": {"train.num_epochs": "many"}}, "experiment e, cell a: .*num_epochs"),
        ({"a": {"model.posterior.name": "iaf"}}, "cell a: .*must be one of gaussian"),
        ({"a": {"init_from": "@b"}}, "cell a needs an unknown cell b"),
        ({"a": {"init_from": "@b"}, "b": {"init_from": "@a"}}, "need each other"),
    ],
)
def test_a_wrong_cell_is_named_before_anything_runs(tmp_path, cells, message):
    with pytest.raises(UserError, match=message):
        expand(experiment("e", QUESTION, cells), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stubs(monkeypatch):
    """Training and evaluation that only note what is called; `broken` names runs that raise."""
    calls, broken = [], set()

    def train_one(config, folder, patience):
        calls.append(("train", config.seed))
        if config.seed in broken:
            raise ValueError("out of luck")
        folder.mkdir(parents=True, exist_ok=True)

    def evaluate_one(config, folder, patience):
        calls.append(("evaluate", config.seed))
        evaluation = folder / config.evaluate.name
        evaluation.mkdir(exist_ok=True)
        files.write_json(evaluation / "evaluation.json", {records.NUM_POINTS: 1})
        files.append_rows(evaluation / "rows.jsonl", [{"index": 0}])
        return [7] if config.seed == 99 else []

    monkeypatch.setattr(train, "train", train_one)
    monkeypatch.setattr(evaluate, "evaluate", evaluate_one)
    monkeypatch.setattr(report, "experiment", lambda *arguments: {})
    return calls, broken


def test_a_failing_cell_leaves_the_others_whole(tmp_path, stubs, capsys):
    calls, broken = stubs
    cells = {
        "a": {"seed": 1},
        "b": {"seed": 2},
        "c": {"init_from": "@b", "seed": 3},
        "d": {"seed": 4},
    }
    config = experiment("e", QUESTION, cells)
    broken.add(2)
    assert experiments.run(config, tmp_path) == 1
    assert calls == [("train", 1), ("evaluate", 1), ("train", 2), ("train", 4), ("evaluate", 4)]
    summary = json.loads((tmp_path / "e/cells.json").read_text())
    assert summary["a"]["state"] == summary["d"]["state"] == "done"
    assert "out of luck" in summary["b"]["state"]
    assert summary["c"]["state"] == "not run, for it needs b"
    assert "ValueError: out of luck" in (tmp_path / "e/error-b.txt").read_text()
    assert "2 of 4 cells of e are done; b: out of luck" in capsys.readouterr().err
    shown = experiments.status(tmp_path).splitlines()
    assert shown[0] == "e"
    assert [line.split()[0] for line in shown[1:]] == list(cells)
    assert "out of luck" in shown[2]

    calls.clear()
    broken.clear()
    assert experiments.run(config, tmp_path) == 0  # tries what failed, and nothing else
    assert calls == [("train", 2), ("evaluate", 2), ("train", 3), ("evaluate", 3)]
    assert not (tmp_path / "e/error-b.txt").exists()
    calls.clear()
    assert experiments.run(config, tmp_path) == 0
    assert calls == []


@pytest.mark.parametrize("lost", ["rows.jsonl", records.POSTERIORS])
def test_a_cell_of_which_something_was_removed_is_done_again(tmp_path, stubs, monkeypatch, lost):
    """As the sentence on a torn file says: remove it."""
    calls, _ = stubs
    config = experiment("e", QUESTION, {"a": {"model.latent_dim": 2, "evaluate.grid": 20}})
    (cell,) = expand(config, tmp_path)
    evaluate_one = evaluate.evaluate

    def draw(*arguments, **options):
        bad = evaluate_one(*arguments, **options)
        (cell.evaluation / records.POSTERIORS).touch()
        return bad

    monkeypatch.setattr(evaluate, "evaluate", draw)
    for expected in (["train", "evaluate"], [], ["train", "evaluate"], []):
        calls.clear()
        assert experiments.run(config, tmp_path) == 0
        assert [kind for kind, _ in calls] == expected
        if not expected:
            (cell.evaluation / lost).unlink()


def test_points_that_are_not_finite_are_named_every_time(tmp_path, stubs, capsys):
    config = experiment("e", QUESTION, {"a": {"seed": 99}})
    for _ in range(2):
        assert experiments.run(config, tmp_path) == 1
        assert "not finite at datapoints [7]" in capsys.readouterr().err


def test_a_cell_without_a_whole_datapoint_leaves_the_table_of_the_others(
    tmp_path, monkeypatch, capsys
):
    config = experiment("e", QUESTION, {"a": {"seed": 1}, "b": {"seed": 99}, "c": {"seed": 3}})

    def train_one(cell_config, folder, patience):
        (folder / cell_config.evaluate.name).mkdir(parents=True)

    def evaluate_one(cell_config, folder, patience):
        evaluation = folder / cell_config.evaluate.name
        elbo = None if cell_config.seed == 99 else -80.0
        rows = [{"index": i, "elbo": elbo, "ais": -79.0 - i} for i in range(2)]
        files.write_json(evaluation / "config.json", {"config": configs.to_json(cell_config)})
        files.append_rows(evaluation / "rows.jsonl", rows)
        return [0, 1] if cell_config.seed == 99 else []

    monkeypatch.setattr(train, "train", train_one)
    monkeypatch.setattr(evaluate, "evaluate", evaluate_one)
    for attempt in (experiments.run, experiments.run, experiments.redraw):
        assert attempt(config, tmp_path) == 1
        said = capsys.readouterr().err
        assert "3 of 3 cells of e are done; b: " in said
        assert "no datapoint whose bounds are all finite" in said
        states = json.loads((tmp_path / "e/cells.json").read_text())
        assert [name for name, cell in states.items() if cell["state"] != "done"] == ["b"]
        lines = (tmp_path / "e/table.csv").read_text().splitlines()
        assert {line.split(",")[0] for line in lines[1:]} == {"a", "c"}


def test_smoke_runs_one_cell_of_each_kind(tmp_path, stubs):
    calls, _ = stubs
    cells = {"a": {"seed": 1}, "b": {"seed": 2, "init_from": "@a"}, "c": {"seed": 3}}
    config = experiment("e", QUESTION, cells, smoke=("b",))
    assert experiments.run(overridden(config, scale="smoke")[0], tmp_path) == 0
    assert [seed for kind, seed in calls if kind == "train"] == [1, 2]
    assert experiments.run(config, tmp_path) == 0
    assert [seed for kind, seed in calls if kind == "train"] == [1, 2, 1, 2, 3]


def test_one_cell_alone_brings_what_it_needs(tmp_path, stubs):
    calls, _ = stubs
    cells = {"a": {"seed": 1}, "b": {"seed": 2, "init_from": "@a"}, "c": {"seed": 3}}
    config = experiment("e", QUESTION, cells)
    assert experiments.run(config, tmp_path, only=["b"]) == 0
    assert [seed for kind, seed in calls if kind == "train"] == [1, 2]
    with pytest.raises(UserError, match="--cells names x; e has a, b, c"):
        experiments.run(config, tmp_path, only=["x"])


def test_shards_share_the_cells_and_each_brings_what_its_own_need(tmp_path, stubs, capsys):
    calls, broken = stubs
    cells = {
        "a": {"seed": 1},
        "b": {"seed": 2, "init_from": "@a"},
        "c": {"seed": 3, "init_from": "@a"},
        "d": {"seed": 4},
    }
    config = experiment("e", QUESTION, cells)
    broken.add(4)
    assert experiments.run(config, tmp_path, shard=Shard(1, 2)) == 1
    # The source's evaluation is the other shard's.
    assert calls == [("train", 1), ("train", 2), ("evaluate", 2), ("train", 4)]
    assert "1 of 4 cells of e are done; d: out of luck" in capsys.readouterr().err
    calls.clear()
    assert experiments.run(config, tmp_path, shard=Shard(0, 2)) == 0  # its own are well
    assert calls == [("train", 1), ("evaluate", 1), ("train", 3), ("evaluate", 3)]
    states = {n: c["state"] for n, c in json.loads((tmp_path / "e/cells.json").read_text()).items()}
    assert {name for name, state in states.items() if state == "done"} == {"a", "b", "c"}
    assert "out of luck" in states["d"]  # as the other shard has left it
    broken.clear()
    calls.clear()
    assert experiments.run(config, tmp_path) == 0
    assert calls == [("train", 4), ("evaluate", 4)]
    assert "4 of 4 cells of e are done." in capsys.readouterr().err


def test_the_whole_and_a_shard_of_an_experiment_exclude_each_other(tmp_path, stubs, monkeypatch):
    monkeypatch.setattr(locks, "MOMENT", 0.1)
    config = experiment("e", QUESTION, {"a": {}})
    with locks.owned(tmp_path / "e", "experiment.shard-1-of-2"):
        for shard in (WHOLE, Shard(1, 2)):
            with pytest.raises(UserError, match=r"experiment\.shard-1-of-2 of .* is held"):
                experiments.run(config, tmp_path, shard=shard)
        assert experiments.run(config, tmp_path, shard=Shard(0, 2)) == 0
    with locks.owned(tmp_path / "e", "experiment"), pytest.raises(UserError, match="is held"):
        experiments.run(config, tmp_path, shard=Shard(0, 2))


def test_a_stop_request_is_not_a_failing_cell(tmp_path, stubs, monkeypatch):
    def stop(config, folder, patience):
        raise records.Stopped("stopped", exit_code=143)

    monkeypatch.setattr(train, "train", stop)
    with pytest.raises(records.Stopped):
        experiments.run(experiment("e", QUESTION, {"a": {}}), tmp_path)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(*arguments) runs infsub.main in a process of its own."""
    with commands(tmp_path_factory.mktemp("forks")) as command:
        yield command


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One for all experiments of a worker, so that they share their runs."""
    return tmp_path_factory.mktemp("paper")


# In every run one that trains two families and takes their curves; the others by night.
OFTEN = "local_steps"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == OFTEN else pytest.mark.thorough) for n in NAMES],
)
def test_smoke(command, workdir, name):
    arguments = [f"--config={ROOT}/configs/paper/{name}.py", "--config.scale=smoke"]
    answer = command(*arguments, f"--workdir={workdir}")
    assert answer["code"] == 0, answer["log"]
    folder = workdir / name
    assert {"cells.json", "table.md", "table.csv", "table.tex"} <= {
        p.name for p in folder.iterdir()
    }
    assert [p.suffix for p in folder.glob("*.p*")].count(".png") >= 1
    given = config_of(name).experiment
    states = {n: c["state"] for n, c in json.loads((folder / "cells.json").read_text()).items()}
    assert {states[n] for n in given.smoke or states} == {"done"}
    assert given.question in (folder / "table.md").read_text()

    from pylatexenc.latexwalker import LatexWalker

    LatexWalker((folder / "table.tex").read_text(), tolerant_parsing=False).get_latex_nodes()


@pytest.mark.slow
def test_killed_in_a_cell_it_continues(command, tmp_path):
    """Killed while the second cell's rows are written: the rows there stay, the table is the same."""
    arguments = [f"--config={ROOT}/configs/paper/test_set.py", "--config.scale=smoke"]
    arguments += ["--cells=gaussian_train,gaussian_test", "--config.evaluate.block_size=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert command(*arguments, f"--workdir={whole}")["code"] == 0
    rows = f"{killed}/runs/*/test-*/rows.jsonl"
    kill = {"signal": 9, "seconds": 0, "glob": rows, "lines": 2}
    answer = command(*arguments, f"--workdir={killed}", kill=kill)
    assert answer["code"] == -9, answer["log"]
    first = next(killed.glob("runs/*/train-*/rows.jsonl"))
    before = first.stat().st_mtime_ns
    table = (killed / "test_set/table.md").read_text()  # of the cell that was done
    assert ", scale smoke): 1 of 4 cells, gaussian_train\n" in table
    answer = command(*arguments, f"--workdir={killed}")
    assert answer["code"] == 0, answer["log"]
    assert first.stat().st_mtime_ns == before
    table = "test_set/table.csv"
    assert (killed / table).read_bytes() == (whole / table).read_bytes()


def test_mistakes(command, tmp_path):
    quick = f"--config={ROOT}/configs/quickstart.py"
    paper = f"--config={ROOT}/configs/paper/test_set.py"
    for arguments, message in (
        ([quick, "--cells=a"], "--cells is for experiments"),
        (
            [paper, "--config.scale=huge"],
            "the scale is 'huge'; it must be one of full, paper, small, smoke",
        ),
        ([paper, "--cells=a"], "--cells names a; test_set has gaussian_train"),
        ([paper, "--mode=train"], "--mode=train is for one run"),
        ([paper, "--config.init_from=x"], "config.init_from is set by the experiment test_set"),
        ([paper, "--config.train.num_epoch=2"], "did you mean config.train.num_epochs"),
    ):
        answer = command(*arguments, f"--workdir={tmp_path}")
        assert answer["code"] == 2, answer["log"]
        assert re.search(re.escape(message), answer["log"]), answer["log"]
        assert len(answer["log"].strip().splitlines()) == 1
        assert not list(tmp_path.iterdir())
