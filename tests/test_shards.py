"""Shards: who takes what, and what is made of their files, whichever of them are there."""

from __future__ import annotations

import pytest

from infsub import files, shards
from infsub.shards import WHOLE, Shard
from infsub.types import UserError


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_shards_take_every_item_once(count):
    items = list(range(17))
    taken = [Shard(index, count).of(items) for index in range(count)]
    assert sorted(item for share in taken for item in share) == items
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


def slurm(task, count, first=0, step=1):
    names = {"ID": task, "COUNT": count, "MIN": first, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


SHARDS = {
    "nothing": ("", {}, WHOLE),
    "nothing, in an array": ("", slurm(1, 4), WHOLE),
    "by hand": ("2/7", {}, Shard(2, 7)),
    "by hand, in an array": ("2/7", slurm(1, 4), Shard(2, 7)),
    "one of one": ("0/1", {}, WHOLE),
    "SLURM": ("auto", slurm(3, 4), Shard(3, 4)),
    "SLURM, from 1": ("auto", slurm(4, 4, first=1), Shard(3, 4)),
    "SLURM, 10-30:10": ("auto", slurm(30, 3, first=10, step=10), Shard(2, 3)),
    "SLURM that says less": (
        "auto",
        {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"},
        Shard(1, 2),
    ),
    "Kubernetes": ("auto", {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "8"}, Shard(0, 8)),
}


@pytest.mark.parametrize("case", SHARDS)
def test_what_is_a_shard(case):
    text, environment, want = SHARDS[case]
    assert shards.parse(text, environment) == want


MISTAKES = {
    "from 1": ("3/3", {}, "--shard=3/3 is no shard: give --shard=i/n, with i from 0"),
    "none": ("0/0", {}, "is no shard"),
    "negative": ("-1/3", {}, "is no shard"),
    "a word": ("first", {}, "is no shard"),
    "a fraction": ("1/2/3", {}, "is no shard"),
    "no scheduler": ("auto", {}, "neither is set"),
    "no count": ("auto", {"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS=nothing"),
    "a word for a count": (
        "auto",
        {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "all"},
        "JOB_COMPLETIONS=all",
    ),
    "beyond": ("auto", {"JOB_COMPLETION_INDEX": "8", "JOB_COMPLETIONS": "8"}, "evenly spaced"),
    "an array with holes": ("auto", slurm(9, 3, first=1), "evenly spaced ids, such as 0-7"),
    "off the step": ("auto", slurm(15, 3, first=10, step=10), "evenly spaced"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_none(case):
    text, environment, sentence = MISTAKES[case]
    with pytest.raises(UserError, match=sentence):
        shards.parse(text, environment)


def write(folder, shard, indices, of="the shard"):
    rows = [{"index": index, "of": of} for index in indices]
    files.append_rows(shards.path_of(folder, "rows", shard), rows)


def test_rows_of_all_files_each_index_once(tmp_path):
    assert shards.read(tmp_path, "rows") == []
    write(tmp_path, Shard(0, 2), [0, 2])
    write(tmp_path, Shard(1, 3), [1, 4, 4])
    write(tmp_path, WHOLE, [2, 3], "the whole")
    (tmp_path / "rows.shard-a-of-b.jsonl").write_text("not ours")
    rows = {row["index"]: row["of"] for row in shards.read(tmp_path, "rows")}
    assert len(shards.read(tmp_path, "rows")) == len(rows) == 5
    assert {index for index, of in rows.items() if of == "the whole"} == {2, 3}
    alone = shards.read(tmp_path, "rows", without=shards.path_of(tmp_path, "rows", WHOLE))
    assert sorted(row["index"] for row in alone) == [0, 1, 2, 4]


def test_what_is_missing_is_said_by_shard(tmp_path):
    assert shards.missing(tmp_path, "rows", 0) == ""
    assert shards.missing(tmp_path, "rows", 3) == "3 of 3 datapoints are missing"
    write(tmp_path, Shard(0, 3), range(0, 10, 3))
    write(tmp_path, Shard(1, 3), [1])
    assert shards.missing(tmp_path, "rows", 10) == (
        "5 of 10 datapoints are missing (shard 1 of 3 has 1 of its 3; shard 2 of 3 has none of its 3)"
    )
    write(tmp_path, Shard(0, 2), [8])
    assert shards.missing(tmp_path, "rows", 10) == "4 of 10 datapoints are missing"
    write(tmp_path, WHOLE, range(10))
    assert shards.missing(tmp_path, "rows", 10) == ""


@pytest.mark.parametrize(
    "row", ["[]", "3", "null", '"a"', "{}", '{"index": "1"}', '{"index": true}']
)
def test_a_file_that_holds_no_rows_is_named(tmp_path, row):
    (tmp_path / "rows.shard-0-of-2.jsonl").write_text(f'{{"index": 1}}\n{row}\n')
    with pytest.raises(UserError, match=r"rows\.shard-0-of-2\.jsonl, line 2, is no row"):
        shards.read(tmp_path, "rows")
