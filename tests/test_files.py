from __future__ import annotations

import os
import time

import pytest

from infsub import files
from infsub.types import UserError


def test_rows_survive_a_torn_last_line_and_keep_no_nan(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.append_rows(path, [{"a": 1, "b": float("nan")}, {"a": 2, "b": 0.1}])
    with path.open("a") as file:
        file.write('{"a": 3, "b"')
    assert files.read_rows(path) == [{"a": 1, "b": None}, {"a": 2, "b": 0.1}]
    files.rewrite_rows(path, files.read_rows(path)[1:])
    assert path.read_text() == '{"a": 2, "b": 0.1}\n'
    assert files.read_rows(tmp_path / "none.jsonl") == []


def test_rows_torn_before_the_end_are_not_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2, is no JSON .*: mend it, or remove"):
        files.read_rows(path)


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", "a directory"])
def test_json_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    assert files.read_json(path) is None
    path.mkdir() if isinstance(content, str) else path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"config\.json cannot be read as JSON \(.*\): mend or remove"
    ):
        files.read_json(path)


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    reader = path.open()
    files.write_bytes(path, b"new")
    with reader:
        assert reader.read() == "old"  # whoever reads the old file still does
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]  # nothing left aside


def test_no_two_processes_write_aside_at_the_same_place(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in every container
    assert files.aside(tmp_path / "file") != files.aside(tmp_path / "file")


def test_csv_has_the_columns_of_all_rows(tmp_path):
    files.write_csv(tmp_path / "m.csv", [{"epoch": 1, "elbo": -3.5}, {"epoch": 2, "iwae": -1.0}])
    assert (tmp_path / "m.csv").read_text() == "epoch,elbo,iwae\n1,-3.5,\n2,,-1.0\n"


def test_progress_in_plain_lines(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = files.Progress(100, "train", done=20)
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
    texts = [files.duration(s) for s in (3.4, 60, 200, 3600 * 5 + 700, float("nan"))]
    assert texts == ["3 s", "1 min 0 s", "3 min 20 s", "5 h 11 min", "unknown time"]
