"""What a run writes down: its config, metrics as JSON lines and CSV, TensorBoard events, pictures.

`metrics.jsonl` is the source of truth and holds nothing that depends on the clock, so a resumed run
writes the same bytes; speed and time left are in `progress.json`. Every file is written aside and
renamed, or appended to line by line.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from infsub import config as configs
from infsub.types import UserError

OURS = ("checkpoints", "metrics.jsonl", "rows.jsonl", "table.md", "seed_0")
PACKAGES = ("infsub", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "distrax")


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content)
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """`value` as an indented JSON file."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line of JSON for each row; NaN and infinities become null."""
    lines = "".join(json.dumps(_finite(row)) + "\n" for row in rows)
    with path.open("a") as file:
        file.write(lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def rewrite_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON-lines file by these rows."""
    write_bytes(path, "".join(json.dumps(_finite(row)) + "\n" for row in rows).encode())


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as CSV; the columns are all fields, in order of appearance."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_picture(path: Path, images: np.ndarray) -> None:
    """A PNG of a grid of images, [rows, columns, H, W, C] with values in [0, 1]; C is 1 or 3."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(picture(images)).save(png, "png")
    write_bytes(path, png.getvalue())


def picture(images: np.ndarray) -> np.ndarray:
    """A grid of images [rows, columns, H, W, C] in [0, 1] as one image, uint8 [Y, X, 3]."""
    images = np.pad(images, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)], constant_values=0.5)
    rows, columns, height, width, channels = images.shape
    grid = images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
    grid = np.broadcast_to(grid, (*grid.shape[:2], 3))
    return np.uint8(np.round(255 * np.clip(grid, 0, 1)))  # pyright: ignore[reportReturnType]


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}


class TensorBoard:
    """Event files in `directory` that TensorBoard reads, written without TensorFlow.

    Args:
      directory: of the event files.
      purge_step: a resumed run's events from this step on supersede those of the killed one.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Every finite number of the row as a scalar."""
        for name, value in row.items():
            if name not in ("step", "epoch"):
                self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """uint8 [H, W, 3]."""
        self._writer.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        """Everything so far is on disk when this returns."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class Progress:
    """A bar with the time left on a terminal; a plain line now and then elsewhere. On stderr.

    Args:
      total: units of work.
      label: what is being done.
      done: units done in an earlier session.
      unit: what is counted.
      seconds: least time between two plain lines.
    """

    def __init__(
        self, total: int, label: str, done: int = 0, unit: str = "step", seconds: float = 10.0
    ) -> None:
        self.total, self.done, self.seconds_left = total, done, float("nan")
        self._label, self._unit, self._seconds = label, unit, seconds
        self._first, self._start = done, time.monotonic()
        self._last_line = self._start
        self._bar = (
            tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` units of work are done in all; `note` is put beside."""
        now = time.monotonic()
        self.done = done
        if done > self._first:
            rate = (now - self._start) / (done - self._first)
            self.seconds_left = rate * (self.total - done)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._last_line >= self._seconds or done == self.total:
            self._last_line = now
            left = "" if done == self.total else f", {duration(self.seconds_left)} left"
            line = f"{self._label}: {done}/{self.total} {self._unit}s{left}"
            print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """A time a person reads: 42 s, 3 min 20 s, 5 h 12 min."""
    if not np.isfinite(seconds):
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def read_run(workdir: Path) -> dict[str, Any]:
    """The `config.json` of a run: config, identity, image_shape, levels, steps_per_epoch, versions.

    Raises:
      UserError: there is no run in `workdir`.
    """
    run = read_json(Path(workdir) / "config.json")
    if run is None:
        raise UserError(f"{workdir} holds no run (it has no config.json): give a run's --workdir.")
    return run


def claim(
    config: configs.Config, workdir: Path, data_identity: str, init_identity: str, **facts: Any
) -> None:
    """Makes `workdir` this run's own: writes config.json, or finds that it is this run's already.

    `facts` go into config.json with the resolved config, package versions and the git revision.

    Raises:
      UserError: another config's workdir, with the fields that differ; not writable. Nothing in it
        is changed then.
    """
    here = configs.identified(config, data_identity, init_identity)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        there = read_json(workdir / "config.json")
        if there is None:
            for name in OURS:
                if (workdir / name).exists():
                    raise UserError(
                        f"{workdir} has {name} and no config.json, so it is unknown which run it is"
                        " of: give another --workdir."
                    )
        elif differing := configs.differences(there["identified"], here):
            raise UserError(
                f"{workdir} is another config's: {'; '.join(differing)}. "
                "Give another --workdir, or the config it was made with."
            )
        facts |= {
            "config": configs.to_json(config),
            "identity": configs.identity(config, data_identity, init_identity),
            "identified": here,
            "versions": versions(),
            "git_revision": git_revision(),
        }
        write_json(workdir / "config.json", facts)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be written to ({error.strerror}): give another one."
        ) from error


def versions() -> dict[str, str]:
    """Python's and the main packages' versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def git_revision() -> str:
    """The commit of the code, with "+" when it was changed since; "" outside a checkout."""
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=40"]
    try:
        return subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
