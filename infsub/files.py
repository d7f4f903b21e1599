"""Files that are whole or not there, JSON and rows of it, and what a person sees of the progress.

Every file is written aside and renamed, or appended to line by line. Whatever stands in a file that
is read, it is a value of the kind that was asked for, or a UserError that names the file.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import hashlib
import io
import json
import os
import secrets
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tqdm import tqdm

from infsub.types import UserError

_BETWEEN_LINES = 10.0  # seconds, of progress that is no bar


def say(text: str) -> None:
    """One plain line on stderr, where progress goes; stdout is for results."""
    print(f"infsub: {text}", file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether somebody sees a bar; a daemon may have no stderr at all."""
    return sys.stderr is not None and sys.stderr.isatty()


def duration(seconds: float) -> str:
    """A time a person reads: 42 s, 3 min 20 s, 5 h 12 min."""
    if not np.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def first_few(numbers: Sequence[int], most: int) -> str:
    """As many as a person reads: 3, 5 and 12 more."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more


class Progress:
    """A bar with the time left on a terminal; a plain line now and then elsewhere. On stderr.

    Args:
      total: units of work.
      label: what is being done.
      done: units done in an earlier session.
      unit: what is counted.
    """

    def __init__(self, total: int, label: str, done: int = 0, unit: str = "step") -> None:
        self.total, self.done, self.seconds_left = total, done, float("nan")
        self._label, self._unit = label, unit
        self._since: tuple[int, float] | None = None  # the first update: before, jax compiles
        self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True)
            if on_terminal()
            else None
        )

    def begin(self) -> None:
        """Says at once that something compiles, before the first units of work are done."""
        if self._bar is not None:
            self._bar.set_postfix_str("compiling")
        else:
            text = f"{self._label}: {self.total} {self._unit}s, compiling"
            print(text, file=sys.stderr, flush=True)

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` units of work are done in all; `note` is put beside."""
        now, self.done = time.monotonic(), done
        first, start = self._since = self._since or (done, now)
        if done > first:
            self.seconds_left = (now - start) / (done - first) * (self.total - done)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._last_line >= _BETWEEN_LINES or done == self.total:
            self._last_line = now
            known = done < self.total and np.isfinite(self.seconds_left)
            left = f", {duration(self.seconds_left)} left" if known else ""
            line = f"{self._label}: {done}/{self.total} {self._unit}s{left}"
            print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def cache_folder() -> Path:
    """Where infsub keeps what can be made anew: in $XDG_CACHE_HOME, or ~/.cache.

    Raises:
      RuntimeError: there is no home.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "infsub"


def aside(path: Path) -> Path:
    """A name beside `path` that no other process takes: in containers all have the same pid."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, whole."""
    new = aside(path)
    try:
        new.write_bytes(content)
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("ENOSPC", "No space left on device", "Disk quota exceeded", "File too large")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that a disk or a quota is full."""
    while error is not None:
        # tensorstore, under orbax, has it in its words alone.
        if getattr(error, "errno", None) in _FULL or any(
            text in str(error) for text in _FULL_TEXTS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_json(path: Path, value: Any) -> None:
    """`value` as an indented JSON file."""
    # What of a command line is no UTF-8 stands there as \udcXX, which is JSON too.
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))


# What a field of a JSON object may be asked to be, in words. NaN is written as null.
KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number or null",
    list: "a list",
    dict: "an object",
}
Kinds = Mapping[str, type]


def wrong_fields(value: Any, needed: Kinds) -> str:
    """What a JSON value lacks of an object with the fields `needed`, in words; "" when nothing."""
    if not isinstance(value, dict):
        return "it is no JSON object"
    for name, kind in needed.items():
        found = value.get(name, ...)
        allowed: Any = (int, float, type(None)) if kind is float else kind
        # A bool is an int to Python, and no number to us.
        if not isinstance(found, allowed) or isinstance(found, bool):
            is_now = "missing" if found is ... else f"{json.dumps(found)[:40]}"
            return f"{name} must be {KINDS[kind]}, and is {is_now}"
    return ""


def read_json(path: Path, needed: Kinds = MappingProxyType({})) -> dict[str, Any] | None:
    """The JSON object in a file, or None when there is no such file.

    Args:
      path: of the file.
      needed: fields that it must have, with their kind, one of KINDS.

    Raises:
      UserError: it is there, and holds no such object: what is wrong, and what to do.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read as JSON ({reason}): mend or remove it.") from error
    if wrong := wrong_fields(value, needed):
        raise UserError(f"{path} is not as infsub writes it ({wrong}): mend or remove it.")
    return value


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line of JSON for each row; NaN and infinities become null."""
    lines = "".join(json.dumps(finite(row)) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(lines)


def sync(path: Path) -> None:
    """Returns when what was written to a file, if there is one, would outlast a loss of power."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())


def rewrite_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines file by these rows."""
    write_bytes(path, "".join(json.dumps(finite(row)) + "\n" for row in rows).encode())


def read_rows(path: Path, needed: Kinds = MappingProxyType({})) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, none where there is no file; a last line torn by a kill is left out.

    Args:
      path: of the file; one whose name ends in .gz is unpacked.
      needed: fields that each row must have, with their kind.

    Raises:
      UserError: it cannot be read, or another line is no row: which, and what to do.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        lines = content.decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): mend or remove it.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and line.startswith("{"):  # without its end: torn
                break
            raise UserError(
                f"{path}, line {number}, is no JSON ({error}): mend it, or remove the file."
            ) from error
        if wrong := wrong_fields(row, needed):
            raise UserError(
                f"{path}, line {number}, is no row ({wrong}): mend it, or remove the file."
            )
        rows.append(row)
    return rows


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as JSON can hold it: NaN and infinities become None, null in the file."""
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; the columns are all fields, in order of appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a CSV file."""
    write_bytes(path, csv_text(rows).encode())


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Arrays by name as a compressed npz file; of numbers and strings, so no reader needs pickle."""
    write_bytes(path, npz_bytes(arrays))


def npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    """What `write_npz` writes: the same arrays are the same bytes."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def checksum(arrays: Mapping[str, np.ndarray]) -> bytes:
    """SHA-256 of arrays by name: of their types, shapes and every byte."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.digest()


def read_npz(path: Path, *layouts: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The arrays of an npz file, none where there is no file; nothing of it is code.

    Args:
      path: of the file.
      layouts: what may be in it, one of these: of each array by name a letter an axis, the same letter
        for the same size, … for any further ones; " text" after them where it is not of numbers.

    Raises:
      UserError: it cannot be read, or an array that is needed is not in it, or not so.
    """
    todo = "remove it and evaluate the run again"
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            axes = next((a for a in layouts if a.keys() <= set(file.files)), layouts[0])
            arrays = {name: file[name] for name in axes}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is torn ({error}): {todo}.") from error
    except (AttributeError, TypeError) as error:  # a single array, not a file of them
        raise UserError(f"{path} is no npz file: {todo}.") from error
    sizes = {"2": 2}
    for name, wanted in axes.items():
        letters, _, text = wanted.partition(" ")
        shape, dtype = arrays[name].shape, arrays[name].dtype
        known = letters.rstrip("…")
        fit = [sizes.setdefault(a, n) == n for a, n in zip(known, shape, strict=False)]
        whole = len(shape) == len(known) or (known != letters and len(shape) > len(known))
        if not whole or not all(fit) or dtype.kind not in ("U" if text else "fiub"):
            raise UserError(f"{path} is torn ({name} is {dtype} of shape {shape}): {todo}.")
    return arrays
