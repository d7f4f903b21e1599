"""Shards: processes that share an evaluation's datapoints, or an experiment's cells, and need not talk.

Shard i of n takes every n-th item from the i-th on, into rows of its own, rows.shard-i-of-n.jsonl
beside rows.jsonl. Which items those are depends on i and n alone, never on a block size, so shards run
on machines of any kind, in any order. Whoever reads takes the rows of all files, each index once; of
published evaluations they are rows.jsonl.gz.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from infsub import files
from infsub.rows import INDEX
from infsub.types import UserError

_FILE = re.compile(r".*\.shard-(\d+)-of-(\d+)\.jsonl")
WANTED = "--shard=i/n, with i from 0 to n − 1, or --shard=auto"


class Shard(NamedTuple):
    """One share of n.

    Attributes:
      index: i, from 0.
      count: n; 1: all of it.
    """

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"

    def of(self, items: Any) -> Any:
        """Its items of a sequence."""
        return items[self.index :: self.count]

    @property
    def name(self) -> str:
        """As in the names of its files and locks: "", or ".shard-i-of-n"."""
        return "" if self == WHOLE else f".shard-{self.index}-of-{self.count}"


WHOLE = Shard()


def parse(text: str, environment: Mapping[str, str]) -> Shard:
    """The shard of "i/n", of "" (the whole), or of "auto": where the scheduler put this process.

    A SLURM array may start anywhere and count in steps; Kubernetes does not say how many pods there
    are, so JOB_COMPLETIONS must, beside its JOB_COMPLETION_INDEX.

    Raises:
      UserError: no shard, or no scheduler that says which.
    """
    if text == "auto":
        return _scheduled(environment)
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if text and not (found and int(found[1]) < int(found[2])):
        raise UserError(f"--shard={text} is no shard: give {WANTED}.")
    return Shard(int(found[1]), int(found[2])) if found else WHOLE


def _scheduled(environment: Mapping[str, str]) -> Shard:
    names = {
        "SLURM_ARRAY_TASK_ID": ("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"),
        "JOB_COMPLETION_INDEX": ("", "JOB_COMPLETIONS"),
    }
    for name, (first, count) in names.items():
        if name not in environment:
            continue
        given = {key: environment.get(key, "") for key in (name, count)}
        given |= {
            key: environment[key] for key in (first, "SLURM_ARRAY_TASK_STEP") if key in environment
        }
        said = ", ".join(f"{key}={value or 'nothing'}" for key, value in given.items())
        if not all(value.isdecimal() for value in given.values()):
            raise UserError(f"--shard=auto needs numbers in {said}: give them, or --shard=i/n.")
        step = int(given.get("SLURM_ARRAY_TASK_STEP", 1)) if first else 1
        index, rest = divmod(int(given[name]) - int(given.get(first, 0)), max(step, 1))
        if rest or not 0 <= index < int(given[count]):
            raise UserError(
                f"--shard=auto needs an array of evenly spaced ids, such as 0-7, and finds {said}: "
                "give such an array, or --shard=i/n."
            )
        return Shard(index, int(given[count]))
    raise UserError(
        "--shard=auto is read from SLURM_ARRAY_TASK_ID, or from JOB_COMPLETION_INDEX and "
        f"JOB_COMPLETIONS, and neither is set: give {WANTED} inside of such a job."
    )


def path_of(folder: Path, stem: str, shard: Shard) -> Path:
    """Where a shard writes its rows: `stem` is "rows" or "bdmc"."""
    return folder / f"{stem}{shard.name}.jsonl"


def paths(folder: Path, stem: str) -> list[Path]:
    """The files of rows that there are: of a published evaluation, of shards, and of the whole."""
    found = [path for path in folder.glob(f"{stem}.shard-*.jsonl") if _FILE.fullmatch(path.name)]
    whole = path_of(folder, stem, WHOLE)
    published = whole.with_name(f"{whole.name}.gz")
    return [path for path in (published, *sorted(found), whole) if path.exists()]


def read(folder: Path, stem: str, without: Path | None = None) -> list[dict[str, Any]]:
    """The rows of all files but `without`, each index once, the whole evaluation's own first choice.

    Raises:
      UserError: a file that holds no rows.
    """
    by_index: dict[int, dict[str, Any]] = {}
    for path in paths(folder, stem):
        if path != without:
            by_index |= {row[INDEX]: row for row in files.read_rows(path, {INDEX: int})}
    return list(by_index.values())


def missing(folder: Path, stem: str, total: int) -> str:
    """What of an evaluation of `total` datapoints is not there yet, in words; "" when all is.

    Raises:
      UserError: as `read`.
    """
    there = len(read(folder, stem))
    if there >= total:
        return ""
    text = f"{total - there} of {total} datapoints are missing"
    counts = {
        int(found[2]) for path in paths(folder, stem) if (found := _FILE.fullmatch(path.name))
    }
    if len(counts) != 1:
        return text
    parts = []
    for index in range(count := counts.pop()):
        shard = Shard(index, count)
        share = len(shard.of(range(total)))
        done = len(files.read_rows(path_of(folder, stem, shard), {INDEX: int}))
        if done < share:
            parts.append(f"{shard} has {done or 'none'} of its {share}")
    return f"{text} ({'; '.join(parts)})"
