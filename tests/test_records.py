from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infsub import config, records
from infsub.types import UserError


def test_rows_survive_a_torn_last_line_and_keep_no_nan(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.append_rows(path, [{"a": 1, "b": float("nan")}, {"a": 2, "b": 0.1}])
    with path.open("a") as file:
        file.write('{"a": 3, "b"')
    assert records.read_rows(path) == [{"a": 1, "b": None}, {"a": 2, "b": 0.1}]
    records.rewrite_rows(path, records.read_rows(path)[1:])
    assert path.read_text() == '{"a": 2, "b": 0.1}\n'
    assert records.read_rows(tmp_path / "none.jsonl") == []


def test_rows_torn_before_the_end_are_not_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2, is no JSON .*: mend it, or remove"):
        records.read_rows(path)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    reader = path.open()
    records.write_bytes(path, b"new")
    with reader:
        assert reader.read() == "old"  # whoever reads the old file still does
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]  # nothing left aside


def test_csv_has_the_columns_of_all_rows(tmp_path):
    records.write_csv(tmp_path / "m.csv", [{"epoch": 1, "elbo": -3.5}, {"epoch": 2, "iwae": -1.0}])
    assert (tmp_path / "m.csv").read_text() == "epoch,elbo,iwae\n1,-3.5,\n2,,-1.0\n"


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_puts_every_image_in_its_place(tmp_path, channels):
    images = np.random.default_rng(0).uniform(size=(2, 3, 4, 5, channels))
    records.write_png(tmp_path / "p.png", records.picture(images))
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
        resumed.scalars(step, {"elbo": -float(step) - 0.5})
    resumed.close()

    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["elbo"]
    events = [(event.step, event.value) for event in reader.Scalars("elbo")]
    assert events == [(10, -10.0), (20, -20.5), (30, -30.5), (40, -40.5)]


def test_tensorboard_reads_images(tmp_path):
    board = records.TensorBoard(tmp_path)
    board.image(3, "samples", np.full((4, 6, 3), 200, np.uint8))
    board.close()
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    (event,) = reader.Images("samples")
    assert (event.step, event.width, event.height) == (3, 6, 4)


def test_progress_in_plain_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = records.Progress(100, "train", done=20, seconds=10)
    now[0] = 1000  # of compilation, which says nothing of the speed
    for done in range(21, 101):
        progress.update(done, "note")
        now[0] += 1
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 21/100 steps  note"
    assert lines[1] == "train: 31/100 steps, 1 min 9 s left  note"
    assert lines[-1] == "train: 100/100 steps  note"
    assert len(lines) == 9


def test_duration():
    texts = [records.duration(s) for s in (3.4, 60, 200, 3600 * 5 + 700, float("nan"))]
    assert texts == ["3 s", "1 min 0 s", "3 min 20 s", "5 h 11 min", "unknown time"]


def test_claim_writes_down_what_the_run_is(tmp_path):
    made = config.resolve(config.default())
    records.claim(made, tmp_path / "run", "digits", "", levels=2)
    run = records.read_run(tmp_path / "run")
    assert config.to_json(config.from_json(run["config"])) == config.to_json(made)
    assert run["identity"] == config.identity(made, "digits")
    assert run["levels"] == 2
    assert {"python", "jax", "flax", "infsub"} <= run["versions"].keys()
    assert "git_revision" in run


def test_claim_asks_for_the_same_run_and_changes_nothing_else(tmp_path):
    made = config.resolve(config.default())
    records.claim(made, tmp_path, "digits", "")
    measured = made.copy_and_resolve_references()
    measured.evaluate.iwae_samples = 7  # no weight depends on it
    records.claim(measured, tmp_path, "digits", "")
    assert records.read_run(tmp_path)["config"]["evaluate"]["iwae_samples"] == 7

    before = (tmp_path / "config.json").read_bytes()
    other = made.copy_and_resolve_references()
    other.train.learning_rate, other.model.encoder.hidden = 0.5, (7,)
    with pytest.raises(UserError) as error:
        records.claim(other, tmp_path, "digits", "")
    assert "model.encoder.hidden is [200, 200] there and [7] here; train.learn" in str(error.value)
    with pytest.raises(UserError, match="data identity is 'digits' there and 'letters' here"):
        records.claim(made, tmp_path, "letters", "")
    with pytest.raises(UserError, match="initial weights"):
        records.claim(made, tmp_path, "digits", "another run")
    assert (tmp_path / "config.json").read_bytes() == before


def test_claim_refuses_a_folder_of_results_without_a_config(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"has metrics.jsonl and no config.json"):
        records.claim(config.default(), tmp_path, "digits", "")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        records.claim(config.default(), tmp_path / "file" / "run", "digits", "")


def test_identity_covers_the_whole_config():
    # Every field but those that cannot change a weight: a forgotten one would load wrong weights.
    base = config.resolve(config.default())
    fields = dict(config.flatten(base))
    same, changed = set(), set()
    for name, value in fields.items():
        other = config.default().unlock()
        section, _, field = name.rpartition(".")
        place = other
        for part in filter(None, section.split(".")):
            place = place[part]
        more = {str: "x", tuple: (9,)}.get(type(value), 1)
        place[field] = value + more
        equal = config.identity(other, "d") == config.identity(base, "d")
        (same if equal else changed).add(name)
    assert {n for n in same if not n.startswith(("evaluate.", "report."))} == {
        "data.dir",
        "init_from",
        "train.checkpoint_seconds",
        "train.keep_last",
        "train.picture_every",
    }
    assert not {n for n in changed if n.startswith(("evaluate.", "report."))}
    assert config.identity(base, "d") != config.identity(base, "e")
    assert config.identity(base, "d") != config.identity(base, "d", "weights")
    assert json.loads(json.dumps(config.identified(base, "d"))) == config.identified(base, "d")
