from __future__ import annotations

from infsub import compilations, config, files, records, status


def test_status_knows_no_time_left_before_the_second_dispatch(tmp_path):
    digits = {"image_shape": (28, 28, 1), "levels": 2, "steps_per_epoch": 40}
    records.claim(config.resolve(config.default()), tmp_path, "digits", "", **digits)
    progress = files.Progress(4000, "train")
    progress.update(40)
    spent = compilations.Spent(4.0, 1.0, 0.5, 2, 3)
    records.write_progress(tmp_path / "progress.json", progress, 100.0, spent)
    assert "epoch 1 of 100, 100 examples/s" in status.of_run(tmp_path)
    assert "time left" not in status.of_run(tmp_path)
