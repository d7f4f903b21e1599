from __future__ import annotations

import os
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infsub import config, members, records
from infsub.types import UserError

DIGITS = {"image_shape": (28, 28, 1), "levels": 2, "steps_per_epoch": 40}


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_puts_every_image_in_its_place(tmp_path, channels):
    images = np.random.default_rng(0).uniform(size=(2, 3, 4, 5, channels))
    members.write_png(tmp_path / "p.png", members.picture(images))
    pixels = np.asarray(Image.open(tmp_path / "p.png")) / 255
    assert pixels.shape == (2 * 5, 3 * 6, 3)
    for row in range(2):
        for column in range(3):
            cell = pixels[5 * row :, 6 * column :][:4, :5]
            expected = np.broadcast_to(images[row, column], (4, 5, 3))
            np.testing.assert_allclose(cell, expected, atol=0.5 / 255 + 1e-9)


def test_tensorboard_reads_the_events_and_drops_those_a_resumed_run_repeats(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    killed = records.TensorBoard(tmp_path)
    for step in (10, 20, 30):
        killed.scalars(step, {"elbo": -float(step), "step": step, "epoch": 1})
    killed.image(20, "samples", image)
    killed.close()
    time.sleep(1.1)  # the files' names tell their order to the second
    resumed = records.TensorBoard(tmp_path, purge_step=20)
    for step in (20, 30, 40):
        resumed.scalars(step, {"elbo": -float(step) - 0.5, "kl": float("nan")})
    resumed.close()

    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["elbo"]
    events = [(event.step, event.value) for event in reader.Scalars("elbo")]
    assert events == [(10, -10.0), (20, -20.5), (30, -30.5), (40, -40.5)]


def test_scalars_are_on_disk_with_the_checkpoint(tmp_path):
    """What a kill leaves in TensorBoard reaches to the step that the run goes on from.

    Even to the first one: what was written before a first checkpoint is written again.
    """
    settings = config.resolve(config.default())
    records.claim(settings, tmp_path, "digits", "", **DIGITS)
    member = members.Member(settings, tmp_path, 0)
    member.resume(0)
    member.record({"step": 10, "epoch": 1, "elbo": -10.0}, 1.0)
    member.close()
    time.sleep(1.1)  # the files' names tell their order to the second
    member = members.Member(settings, tmp_path, 0)
    member.resume(0)
    member.record({"step": 10, "epoch": 1, "elbo": -10.0}, 1.0)
    member.save(10, {"weights": np.zeros(3)})
    member.checkpoints.wait()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))  # of a run that was not closed
    reader.Reload()
    assert [event.step for event in reader.Scalars("elbo")] == [10]
    member.close()


def test_tensorboard_reads_images(tmp_path):
    board = records.TensorBoard(tmp_path)
    board.image(3, "samples", np.full((4, 6, 3), 200, np.uint8))
    board.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    (event,) = reader.Images("samples")
    assert (event.step, event.width, event.height) == (3, 6, 4)


def test_claim_writes_down_what_the_run_is(tmp_path):
    made = config.resolve(config.default())
    records.claim(made, tmp_path / "run", "digits", "", **DIGITS)
    run = records.read_run(tmp_path / "run")
    assert config.to_json(config.from_json(run["config"])) == config.to_json(made)
    assert run["identity"] == config.identity(made, "digits")
    assert run["levels"] == 2
    assert {"python", "jax", "flax", "infsub"} <= run["versions"].keys()
    assert "git_revision" in run


def test_claim_asks_for_the_same_run_and_changes_nothing_else(tmp_path):
    made = config.resolve(config.default())
    records.claim(made, tmp_path, "digits", "", **DIGITS)
    measured = made.copy_and_resolve_references()
    measured.evaluate.iwae_samples = 7  # no weight depends on it
    records.claim(measured, tmp_path, "digits", "", **DIGITS)
    assert records.read_run(tmp_path)["config"]["evaluate"]["iwae_samples"] == 7

    before = (tmp_path / "config.json").read_bytes()
    other = made.copy_and_resolve_references()
    other.train.learning_rate, other.model.encoder.hidden = 0.5, (7,)
    with pytest.raises(UserError) as error:
        records.claim(other, tmp_path, "digits", "", **DIGITS)
    assert "model.encoder.hidden was [200, 200] and is [7]; train.learn" in str(error.value)
    with pytest.raises(UserError, match="data identity was 'digits' and is 'letters'"):
        records.claim(made, tmp_path, "letters", "", **DIGITS)
    with pytest.raises(UserError, match="initial weights"):
        records.claim(made, tmp_path, "digits", "another run", **DIGITS)
    assert (tmp_path / "config.json").read_bytes() == before


def test_claim_refuses_a_folder_of_results_without_a_config(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"has metrics.jsonl and no config.json"):
        records.claim(config.default(), tmp_path, "digits", "", **DIGITS)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        records.claim(config.default(), tmp_path / "file" / "run", "digits", "", **DIGITS)


@pytest.mark.parametrize("content", ["{}", '{"config": [1]}', '{"config": {}}'])
def test_a_config_that_is_no_run_s_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is no run's \(.* must be .*give a run's"):
        records.read_run(tmp_path)


@pytest.fixture
def revisions(monkeypatch):
    """revision(name=default, …): from now on infsub's fields are today's and these."""
    today = dict(config.FIELDS)

    def revision(**added):
        monkeypatch.setattr(
            config,
            "FIELDS",
            today | {n.replace("__", "."): config.Field(d, "") for n, d in added.items()},
        )

    return revision


def test_a_run_of_an_older_revision_is_continued_with_the_defaults_of_new_fields(
    tmp_path, revisions
):
    records.claim(config.resolve(config.default()), tmp_path, "digits", "", **DIGITS)
    before = records.read_run(tmp_path)
    revisions(train__momentum=0.5, evaluate__depth=3)
    records.claim(config.resolve(config.default()), tmp_path, "digits", "", **DIGITS)
    run = records.read_run(tmp_path)
    assert run["identity"] == before["identity"]  # as its checkpoints have it
    assert run["identified"]["train.momentum"] == 0.5
    assert records.read_config(tmp_path).train.momentum == 0.5
    other = config.default()
    other.train.momentum = 0.9
    with pytest.raises(UserError, match=r"train\.momentum was 0\.5 and is 0\.9"):
        records.claim(config.resolve(other), tmp_path, "digits", "", **DIGITS)


def test_fields_that_are_gone_are_named_where_weights_depended_on_them(tmp_path, revisions):
    revisions(train__momentum=0.5, evaluate__depth=3)
    records.claim(config.resolve(config.default()), tmp_path, "digits", "", **DIGITS)
    revisions(train__momentum=0.5)
    assert "depth" not in records.read_config(tmp_path).evaluate  # no weight depended on it
    revisions()
    with pytest.raises(
        UserError, match=r"has train\.momentum=0\.5, a field that this infsub has not"
    ):
        records.read_config(tmp_path)
    with pytest.raises(UserError, match=r"train\.momentum was 0\.5 and is 'nothing'"):
        records.claim(config.resolve(config.default()), tmp_path, "digits", "", **DIGITS)
