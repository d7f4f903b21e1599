"""A model of the user's own from the command line: evaluated, certified and reported like ours."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import own_model
import pytest

import infsub
from infsub import config as configs
from infsub import evaluate, files, imported, main, records, status, thumbnails
from infsub.train import train
from infsub.types import UserError

HERE = Path(__file__).parent


def small(name="own_model:build", **fields):
    config = configs.default().unlock()
    config.model.imported = name
    config.evaluate.update({"first": 4, "per_class": 0, "elbo_samples": 50, "iwae_samples": 50})
    config.evaluate.ais.update({"num_chains": 4, "num_temperatures": 5, "num_leapfrog": 2})
    config.evaluate.update({"local": {"max_steps": 100}, "bdmc": {"num_points": 3}})
    config.evaluate.update(fields)
    return config.lock()


def run(config, workdir, mode="run"):
    main.run(mode, configs.resolve(config), workdir)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imported") / "run"
    run(small(), workdir)
    return workdir


def test_it_is_measured_as_by_the_library(workdir):
    """The same rows and certificate, from the same seed, by `infsub.measure`."""
    model, params, xs, labels = own_model.build()
    settings = configs.measured(small().evaluate)
    want = infsub.measure(
        jax.random.key(0),
        model,
        params,
        xs[:4],
        num_certified=3,
        settings=settings,
        labels=labels[:4],
        progress=False,
    )
    got = infsub.load(workdir)
    for name in want.rows[0]:
        np.testing.assert_allclose(got.columns[name], want.columns[name], rtol=1e-4, err_msg=name)
    for mine, theirs in zip(got.certificate_rows, want.certificate_rows, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert got.run.families == ["gaussian"]
    assert got.run.settings["model.latent_dim"] == 2


def test_it_is_reported(workdir):
    for name in ("table.md", "table.csv", "report.html", "gaps.png"):
        assert (workdir / name).exists()
    with (workdir / "datapoints.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [point["label"] for point in points] == ["0", "1", "0", "1"]
    assert all(point["verdict"] and point["next"] for point in points)
    assert "4 values, mean" in (workdir / "report.html").read_text()
    shown = status.of_run(workdir)
    for line in (
        "data        of its own\n",
        "own_model:build, z of 2",
        "none, it was trained elsewhere",
    ):
        assert line in shown


def test_what_its_functions_raise_is_a_sentence(tmp_path):
    with pytest.raises(UserError) as raised:
        run(small("own_model:of_another_width"), tmp_path / "run")
    path = tmp_path / "run/error.txt"
    assert re.fullmatch(
        r"--config\.model\.import=own_model:of_another_width failed on its data: TypeError: .*shape.*"
        rf"\. The traceback is in {path}\.",
        str(raised.value),
    )
    assert "models.py" in path.read_text()


@pytest.mark.parametrize(
    ("name", "stated", "own"),
    [
        ("build", "gaussian", "gaussian"),
        ("correlated", "gaussian", "full_gaussian"),
        ("drawn", "gaussian", ""),
        ("drawn", "planar", "planar"),
    ],
)
def test_the_family_is_the_encoders_own(workdir, tmp_path, name, stated, own):
    """A Gaussian says it itself; of draws the config says it, and its default says nothing."""
    config = small(f"own_model:{name}").unlock()
    config.model.posterior = {"name": stated}
    source = evaluate._theirs(config, jax.random.key(0))
    assert source.own == own
    families = (own or "gaussian", "gaussian")
    assert source.settings.local.families == tuple(dict.fromkeys(families))
    copy = shutil.copytree(workdir, tmp_path / "run")
    found = files.read_json(copy / "evaluation.json")
    files.write_json(copy / "evaluation.json", found | {records.OWN: own})
    shown = infsub.load(copy)
    assert shown.run.settings["model.posterior.name"] == own
    assert any("was not optimised locally" in note for note in shown.notes) == (own != "gaussian")


def test_it_has_no_weights_for_a_training_to_start_from(workdir, tmp_path):
    warm = configs.default()
    warm.init_from = str(workdir)
    with pytest.raises(UserError, match=r"is own_model:build, a model of one's own"):
        train(warm, tmp_path / "warm")
    assert not (tmp_path / "warm").exists()


def test_its_data_are_its_own(workdir, tmp_path):
    """Not the config's, and other xs of the same function are other data."""
    shown = infsub.load(workdir)
    assert not any(name.startswith("data") for name in shown.run.settings)
    assert "seed=0" in shown.table("latex")
    assert (
        "mnist"
        not in shown.table("latex") + shown.table("csv") + (workdir / "table.md").read_text()
    )
    measured = imported.digest(own_model.data())
    assert shown.run.data == measured  # as of `measure`, so that both may be compared
    copy = shutil.copytree(workdir, tmp_path / "run")
    found = files.read_json(copy / "evaluation.json")
    files.write_json(copy / "evaluation.json", found | {records.DATA: "others"})
    beside = infsub.compare({"a": shown, "b": infsub.load(copy)})
    assert beside.differences == {}


@pytest.fixture
def without_bounds(monkeypatch):
    """Evaluations whose bounds are 0, and take no time."""

    def zeros(function, key, xs, *rest, indices, **options):
        return {name: np.zeros(len(indices)) for name in ("elbo", "elbo_se")}

    monkeypatch.setattr(evaluate, "map_datapoints", zeros)


@pytest.mark.parametrize("name", ["features", "bright"])
def test_its_datapoints_look_as_they_do_in_the_library(without_bounds, tmp_path, name):
    """Of one kind and in one range of greys, however many fit into a block."""
    config = small(f"own_model:{name}", first=40, block_size=20, bdmc={"num_points": 0})
    imported.claim(config, tmp_path, "run")
    evaluate.evaluate(config, tmp_path)
    found = files.read_npz(tmp_path / records.IMAGES, records.SHOWN, records.WORDS)
    want = thumbnails.arrays(getattr(own_model, name)()[2])
    for key, values in want.items():
        np.testing.assert_array_equal(found[key], values)
    assert ("images" in found) == (name == "bright")


def test_all_of_its_data_are_measured_unless_so_many_are_asked_for(without_bounds, tmp_path):
    """As `infsub.measure` does, whatever its labels: a class of one, none, bytes."""
    config = small("own_model:features", first=0, per_class=10, bdmc={"num_points": 0})
    for folder, number in (("all", 40), ("two", 3)):
        imported.claim(config, tmp_path / folder, "run")
        with config.unlocked():
            config.evaluate.per_class = 10 if folder == "all" else 1
        evaluate.evaluate(config, tmp_path / folder)
        written = files.read_rows(tmp_path / folder / "rows.jsonl")
        assert len(written) == number
        assert [row.get("label") for row in written[:2]] == ["a", "b"]


def test_other_weights_do_not_mix(workdir):
    """Nor does another checkpoint take another run's folder."""
    config = small().unlock()
    config.model.checkpoint = "2.0"
    with pytest.raises(UserError, match=r"model\.checkpoint was 'nothing' and is '2.0'"):
        run(config.lock(), workdir)
    found: Any = files.read_json(workdir / "evaluation.json")
    files.write_json(workdir / "evaluation.json", found | {"params and xs": "others"})
    with pytest.raises(UserError, match="params and xs was 'others'"):
        run(small(), workdir)
    files.write_json(workdir / "evaluation.json", found)


def test_pixels_that_a_seed_draws_are_other_data():
    """Not the very same datapoints, and so not paired."""
    config = small("own_model:of_images", bdmc={"num_points": 0}).unlock()
    config.data.binarisation = "dynamic"
    found = []
    for config.seed in (0, 1):
        source = evaluate._theirs(config, jax.random.key(config.seed))
        found.append((source.facts[records.DATA], source.points.at(np.arange(2))))
    assert found[0][0] != found[1][0]
    assert np.any(found[0][1] != found[1][1])


@pytest.mark.slow
def test_it_may_be_of_our_data(tmp_path):
    run(small("own_model:of_images", bdmc={"num_points": 0}), tmp_path / "run")
    measured = infsub.load(tmp_path / "run")
    assert measured.columns["label"].size == 4
    assert measured.xs.shape[:3] == (4, 28, 28)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("no_module:build", {}, "failed: ModuleNotFoundError: No module named 'no_module'"),
        ("own_model:no_function", {}, "failed: AttributeError"),
        ("own_model:nothing", {}, r"must return \(infsub.Model, params\).*it returned int"),
        (
            "own_model:closed",
            {},
            "returned params without an array.*: return the weights as params",
        ),
        ("own_model:torn", {}, r"labels must have shape \[N=9\]; got \(2,\)"),
        ("own_model", {}, "must be MODULE:FUNCTION"),
        ("own_model:of_images", {}, "bdmc.num_points needs a model that simulates"),
        ("own_model:build", {"split": "model"}, "split=model is for infsub's own"),
    ],
)
def test_mistakes_are_told_in_a_sentence(tmp_path, name, fields, message):
    with pytest.raises(UserError, match=message):
        run(small(name, **fields), tmp_path / "run")


def test_it_is_not_trained_here(tmp_path):
    with pytest.raises(UserError, match="is a model that is trained already"):
        run(small(), tmp_path / "run", "train")
    config = configs.default().unlock()
    config.model.checkpoint = "x"
    with pytest.raises(UserError, match=r"give config\.model\.imported=my_module:build too"):
        configs.resolve(config)


def test_runs_from_before_keep_their_identity():
    """Fields of an own model are in an identity only where there is one."""
    identified = configs.identified(configs.default(), "data")
    assert not {"model.imported", "model.checkpoint"} & identified.keys()
    assert configs.differences(configs.completed(identified), identified) == []


def test_the_flag_is_spelt_import(tmp_path):
    assert main.config_first(["--config.model.import=a:b", "--config=x.py"]) == [
        "--config=x.py",
        "--config.model.imported=a:b",
    ]
    command = [sys.executable, "-m", "infsub.main", f"--config={HERE / 'tiny.py'}"]
    command += ["--config.model.import=broken:build", f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "broken.py").write_text("def build():\n    raise OSError('no such file')\n")
    environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert "--config.model.import=broken:build failed: OSError: no such file." in done.stderr


def test_the_path_is_as_it_was():
    before = list(sys.path)
    imported.load("own_model:build", "")
    assert sys.path == before
