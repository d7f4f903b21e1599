"""What is published of a workdir is what was measured, and is measured again from its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from infsub import (
    checkpoints,
    evaluate,
    experiments,
    files,
    main,
    published,
    records,
    report,
    shards,
    train,
)
from infsub import config as configs
from infsub.report.runs import load_run
from infsub.types import UserError

pytestmark = pytest.mark.usefixtures("small_pictures")

DEFAULT = dict(configs.flatten(configs.default()))
SMALL = tiny.measured(per_class=0, first=5, grid=0, bdmc={"num_points": 5})
TINY = {n: value for n, value in configs.flatten(SMALL) if value != DEFAULT[n]}
FROZEN = {"init_from": "@a", "init_parts": "decoder", "train.freeze": "decoder"}
CELLS = {
    "a": {"evaluate.grid": 40},
    "user": FROZEN | {"model.posterior.name": "planar", "evaluate.bdmc.num_points": 0},
}


def an_experiment():
    config = experiments.experiment("e", "Why?", CELLS, shared=TINY).unlock()
    config.scale = "smoke"
    return config.lock()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("published") / "paper"
    assert experiments.run(an_experiment(), workdir) == 0
    return workdir


def runs_of(workdir):
    cells = experiments.read_cells(workdir / "e/cells.json")
    return {name: Path(cell["run"]).name for name, cell in cells.items()}


def place_of(out, cell):
    """RUN/EVALUATION of a cell."""
    (found,) = (p for p in published.read(out) if p.cell == cell)
    return f"{found.facts['run']}/{found.facts['evaluation']}"


@pytest.fixture(scope="module")
def out(workdir):
    out = workdir.parent / "results"
    published.pack(workdir, out, [runs_of(workdir)["a"], runs_of(workdir)["user"]])
    return out


def singles(folder, stem):
    """The rows of an evaluation, their numbers as the float32 that they are."""
    return [
        {n: np.float32(v) if isinstance(v, float) else v for n, v in row.items()}
        for row in shards.read(folder, stem)
    ]


def test_it_mirrors_the_workdir(workdir, out):
    found = published.read(out)
    assert [(p.experiment, p.cell, p.scale, p.seed) for p in found] == [
        ("e", cell, "smoke", 0) for cell in sorted(CELLS)
    ]
    for cell in found:
        assert cell.facts["points"] == 5
        assert cell.facts["epochs"] == 2
        assert cell.facts["date"].startswith("20")
        assert cell.facts["machine"]
        assert 0 < cell.facts["hours"] < 1
        original = workdir / cell.folder.relative_to(out)
        for stem in ("rows", "bdmc"):
            assert singles(cell.folder, stem) == singles(original, stem)
        ours, theirs = load_run(cell.folder), load_run(original)
        assert ours.lines.keys() == theirs.lines.keys()
        for name, line in theirs.lines.items():
            assert tuple(ours.lines[name].mean) == pytest.approx(tuple(line.mean), abs=1e-4)
        assert not ours.missing
    densities = files.read_npz(found[0].folder / records.POSTERIORS, records.DENSITIES)
    before = files.read_npz(
        workdir / found[0].folder.relative_to(out) / records.POSTERIORS, records.DENSITIES
    )
    np.testing.assert_allclose(densities["truth"], before["truth"], rtol=1e-3)


def test_it_says_nothing_of_the_machines_folders(workdir, out):
    for path in out.rglob("*.json"):
        assert str(workdir.parent) not in path.read_text(), path
    (user,) = (cell for cell in published.read(out) if cell.cell == "user")
    document = json.loads((user.folder / "config.json").read_text())
    assert document["config"]["init_from"] == f"runs/{runs_of(workdir)['a']}"
    assert (out / document["config"]["init_from"] / "config.json").exists()
    settings = document["config"]
    settings["evaluate"]["indices_file"] = "/home/me/points.txt"
    settings["model"]["checkpoint"] = "/home/me/weights.pt"
    shown = json.dumps(published._without_paths(document))
    assert "points.txt" in shown
    assert "weights.pt" in shown
    assert "/home" not in shown


def test_packed_again_it_is_the_same_to_the_byte(workdir, out):
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    published.pack(workdir, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_seeds_are_added_and_a_larger_scale_replaces_a_smaller_one(workdir, out, tmp_path, capsys):
    """Once all of the experiment is there at the larger one, for scales are not compared."""
    here, there = tmp_path / "paper", shutil.copytree(out, tmp_path / "results")
    shutil.copytree(workdir, here)
    shutil.copytree(there / "runs" / runs_of(workdir)["a"], there / "runs/of-nobody")
    for path in here.rglob("config.json"):
        text = path.read_text()
        path.write_text(text.replace('"seed": 0', '"seed": 3'))
    published.pack(here, there)
    assert {(p.scale, p.seed) for p in published.read(there)} == {("smoke", 0), ("smoke", 3)}
    assert not (there / "runs/of-nobody").exists()
    cells = here / "e/cells.json"
    larger = json.loads(cells.read_text().replace('"smoke"', '"small"'))
    cells.write_text(json.dumps({"a": larger["a"]}))
    published.pack(here, there)
    smaller = {(cell, "smoke", seed) for cell in CELLS for seed in (0, 3)}
    found = {(p.cell, p.scale, p.seed) for p in published.read(there)}
    assert found == smaller | {("a", "small", 3)}
    assert "left out" not in capsys.readouterr().err
    cells.write_text(json.dumps(larger))
    published.pack(here, there)
    assert "infsub: e at scale smoke is left out: every cell is there" in capsys.readouterr().err
    found = {(p.cell, p.scale, p.seed) for p in published.read(there)}
    assert found == {(cell, "small", 3) for cell in CELLS}


@pytest.mark.parametrize("cell", ["a", "user"])
def test_measured_again_from_its_weights_it_is_the_same(workdir, out, tmp_path, cell):
    """Rows and certificate, bit for bit, of a run that was never trained here."""
    (entry,) = (p for p in published.read(out) if p.cell == cell)
    run = place_of(out, cell)
    main.run("evaluate", published.config(run, out), tmp_path / "again")
    main.run("evaluate", published.config(run, out), tmp_path / "again")  # it is done
    for stem in ("rows", "bdmc"):
        assert singles(tmp_path / "again", stem) == singles(entry.folder, stem)
    again, before = (
        files.read_json(folder / "evaluation.json") or {}
        for folder in (tmp_path / "again", entry.folder)
    )
    assert again == before
    assert len(before["weights"]) == 16
    main.run("report", published.config(run, out), tmp_path / "again")


def test_a_run_of_it_trains_nothing(tmp_path, monkeypatch, capsys):
    """But one with another setting starts from its weights, and trains, as --mode=train does."""
    trained = []
    monkeypatch.setattr(train, "train", lambda config, *_: trained.append(config))
    for name in ("evaluate", "check"):
        monkeypatch.setattr(evaluate, name, lambda *_: [])
    monkeypatch.setattr(report, "report", lambda *_: None)
    results = Path(__file__).parent.parent / published.FOLDER
    weights, *_ = sorted(results.glob(f"runs/*/{checkpoints.WEIGHTS}"))
    evaluation, *_ = sorted(weights.parent.glob("*/evaluation.json"))
    place = evaluation.parent.relative_to(results / "runs").as_posix()
    config = configs.resolve(published.config(place, results))
    for _ in range(2):
        main.run("run", config, tmp_path / "again")
        assert checkpoints.load_variables(tmp_path / "again")[1] > 0
    assert capsys.readouterr().err.count("nothing is trained: the weights are those of") == 2
    assert not trained
    main.run("train", config, tmp_path / "more")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/config.json").write_text("{}")
    main.run("run", config, tmp_path / "more")  # it goes on
    longer = config.copy_and_resolve_references().unlock()
    longer.train.num_epochs += 1
    main.run("run", longer, tmp_path / "longer")
    assert trained == [config, config, longer]


def test_other_weights_are_not_mixed_with_these_rows(workdir, out, tmp_path):
    """Nor a run's with another's: the rows say which weights they are of."""
    config = published.config(place_of(out, "a"), out)
    main.run("evaluate", config, tmp_path / "again")
    path = tmp_path / "again" / checkpoints.WEIGHTS
    variables, step = checkpoints.load_variables(tmp_path / "again")
    variables["decoder"]["params"]["Dense_0"]["bias"] += 1
    identity = json.loads((tmp_path / "again/config.json").read_text())["identity"]
    files.write_npz(path, checkpoints.weights(variables, step, identity))
    with pytest.raises(UserError, match=r"weights was '.*' and is '"):
        main.run("evaluate", config, tmp_path / "again")
    told = files.read_json(tmp_path / "again/evaluation.json") or {}
    del told["weights"]
    files.write_json(tmp_path / "again/evaluation.json", told)
    with pytest.raises(UserError, match="weights was 'nothing' and is"):
        main.run("evaluate", config, tmp_path / "again")
    (tmp_path / "again/evaluation.json").unlink()
    with pytest.raises(UserError, match=r"evaluation.json is missing, .* remove the rows too"):
        main.run("evaluate", config, tmp_path / "again")
    assert not (tmp_path / "again/evaluation.json").exists()


def test_a_copy_is_a_workdir_in_which_all_is_done(workdir, out, tmp_path):
    copy = shutil.copytree(out, tmp_path / "paper")
    assert experiments.run(an_experiment(), copy) == 0
    assert not list(copy.glob("runs/*/checkpoints"))
    again, before = ((folder / "e/table.md").read_text() for folder in (copy, workdir))
    assert again.partition("\n\nNats a datapoint")[0] == before.partition("\n\nNats a datapoint")[0]


def test_weights_are_plain(workdir, out):
    with np.load(out / "runs" / runs_of(workdir)["a"] / checkpoints.WEIGHTS) as arrays:
        assert arrays["encoder/params/Dense_0/kernel"].shape == (784, 8)
        assert arrays["encoder/params/Dense_0/kernel"].dtype == np.float32


def test_mistakes_are_told_in_a_sentence(workdir, out, tmp_path):
    name, place, test = runs_of(workdir)["a"], place_of(out, "a"), tmp_path / "run"
    for run in ("", "no", name, f"{name}/no", f"../{out.name}/runs/{place}"):
        with pytest.raises(
            UserError, match=rf"run={run} is no evaluation of .*there are .*{place}"
        ):
            published.config(run, out)
    config = published.config(place, out).unlock()
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere holds no run"):
        main.run("evaluate", config, test)
    config.init_from, config.model.encoder.hidden = str(out / "runs" / name), (9,)
    with pytest.raises(UserError, match=r"another config: model.encoder.hidden was \[8\] and is"):
        main.run("evaluate", config, test)
    config = published.config(place, out).unlock()
    config.evaluate.checkpoint = "last"
    with pytest.raises(UserError, match=r"best weights alone: give config\.evaluate\.check"):
        main.run("evaluate", config, tmp_path / "last")
    damaged = shutil.copytree(out / "runs" / name, tmp_path / "damaged")
    content = (damaged / checkpoints.WEIGHTS).read_bytes()
    (damaged / checkpoints.WEIGHTS).write_bytes(content[: len(content) // 2])
    config.init_from = str(damaged)
    with pytest.raises(UserError, match=r"cannot be read .*; take the published file again"):
        main.run("evaluate", config, test)
    arrays = checkpoints.read_arrays(out / "runs" / name / checkpoints.WEIGHTS)
    del arrays["identity"]
    checksum = np.frombuffer(files.checksum(arrays), np.uint8)
    files.write_npz(damaged / checkpoints.WEIGHTS, arrays | {"sha256": checksum})
    with pytest.raises(UserError, match="does not say whose it is; take the published file again"):
        main.run("evaluate", config, test)
    assert not test.exists()


def test_what_cannot_be_published_is_not(workdir, out, tmp_path, monkeypatch, capsys):
    name = runs_of(workdir)["a"]
    assert published.main([f"--workdir={tmp_path / 'none'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "none holds nothing that is measured to its end" in capsys.readouterr().err
    arguments = [f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]
    assert published.main([*arguments, "--weights=no"]) == 2
    assert f"--weights names no; done are {name}" in capsys.readouterr().err
    monkeypatch.setattr(published, "MAX_WEIGHTS", 100)
    assert published.main([*arguments, f"--weights={name}"]) == 2
    assert "MB, and may be 0.0001: name fewer runs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published.main(["--workdir=~/none", "--out=~/out"]) == 2
    assert f"--workdir={tmp_path}/none holds nothing" in capsys.readouterr().err


def test_a_workdir_is_not_published_in(workdir, out, tmp_path, capsys):
    """Else what is not done in it would be removed, as what nobody shows is."""
    copy = shutil.copytree(workdir, tmp_path / "paper")
    (unfinished := copy / "runs/unfinished").mkdir()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert published.main([f"--workdir={copy}", f"--out={copy}"]) == 2
    said = "holds runs that are not published: give another folder to publish in"
    assert said in capsys.readouterr().err
    assert unfinished.exists()
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    runs = tmp_path / "project" / "runs"  # where README keeps workdirs
    (other := runs / "quickstart").mkdir(parents=True)
    copy.rename(runs / "paper")
    arguments = [f"--workdir={runs / 'paper'}", f"--out={runs.parent}"]
    assert published.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert other.exists()


def test_configs_of_runs_are_complete(workdir, out):
    """They are resolved as a command line's are, with no field that another machine lacks."""
    found = configs.resolve(published.config(place_of(out, "user"), out))
    assert found.model.posterior.name == "planar"
    assert found.data.dir == ""
