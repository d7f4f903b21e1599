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
POSTERIORS = "posteriors.npz"  # the densities that an evaluation with a grid leaves
PACKAGES = ("infsub", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "distrax")


class Stopped(Exception):
    """A run that ended before its end; the message says why and what to do.

    Attributes:
      exit_code: 143 after SIGTERM and 130 after Ctrl-C, with all saved; 1 when training diverged.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
    """The rows of a JSON-lines file; a last line torn by a kill is left out.

    Raises:
      UserError: another line is no JSON.
    """
    if not path.exists():
        return []
    rows, lines = [], path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(
                    f"{path}, line {number}, is no JSON ({error}): mend it, or remove the file."
                ) from error
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


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Arrays by name as a compressed npz file; of numbers and strings, so no reader needs pickle."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_bytes(path, content.getvalue())


def write_png(path: Path, image: np.ndarray) -> None:
    """uint8 [Y, X, 3] as a PNG file."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(image).save(png, "png")
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
        self._since: tuple[int, float] | None = None  # the first update: before, jax compiles
        self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=done, desc=label, unit=unit, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` units of work are done in all; `note` is put beside."""
        now, self.done = time.monotonic(), done
        first, start = self._since = self._since or (done, now)
        if done > first:
            self.seconds_left = (now - start) / (done - first) * (self.total - done)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._last_line >= self._seconds or done == self.total:
            self._last_line = now
            known = done < self.total and np.isfinite(self.seconds_left)
            left = f", {duration(self.seconds_left)} left" if known else ""
            line = f"{self._label}: {done}/{self.total} {self._unit}s{left}"
            print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def say(text: str) -> None:
    """One plain line on stderr, where progress goes; stdout is for results."""
    print(f"infsub: {text}", file=sys.stderr, flush=True)


def write_progress(workdir: Path, progress: Progress, speed: float) -> None:
    """progress.json, for `--mode=status`: the only record that depends on the clock."""
    content = {
        "done": progress.done,
        "total": progress.total,
        "seconds_left": progress.seconds_left,
        "examples_per_second": speed,
        "time": time.time(),
        "pid": os.getpid(),
    }
    write_json(workdir / "progress.json", _finite(content))


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


def status(workdir: Path) -> str:
    """What a run has done and when it will be done, as a screen of text.

    Raises:
      UserError: there is no run in `workdir`.
    """
    run = read_run(workdir)
    config, per_epoch = configs.from_json(run["config"]), run["steps_per_epoch"]
    model, train = config.model, config.train
    lines = [
        ("run", f"{workdir}, identity {run['identity']}"),
        ("data", f"{config.data.name}, {config.data.binarisation}, {config.data.levels} levels"),
        ("model", f"{model.posterior.name} posterior, z of {model.latent_dim} dimensions"),
    ]
    progress = read_json(workdir / "progress.json")
    if progress is None:
        lines.append(("training", "not begun"))
    else:
        epoch, ago = progress["done"] / per_epoch, time.time() - progress["time"]
        state = f"epoch {epoch:.4g} of {train.num_epochs}, {progress['examples_per_second']:.0f}"
        lines.append(("training", f"{state} examples/s, last seen {duration(ago)} ago"))
        if progress["done"] < progress["total"] and ago < 120:
            end = time.strftime(
                "%d %b %H:%M", time.localtime(time.time() + progress["seconds_left"])
            )
            lines.append(("time left", f"{duration(progress['seconds_left'])}, until {end}"))
    for member, folder in configs.runs(config, workdir):
        lines += _status_of_one(folder, f"seed {member.seed}", per_epoch)
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def _status_of_one(workdir: Path, label: str, per_epoch: int) -> list[tuple[str, str]]:
    lines = [(label, "")]
    for row in read_rows(workdir / "metrics.jsonl")[-1:]:
        validation = {n: row[n] for n in ("validation_elbo", "validation_iwae") if n in row}
        values = {"ELBO": row["elbo"]} | validation
        text = ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in values.items())
        lines.append(("", f"epoch {row['epoch']}: {text}"))
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())
    if saved:
        text = ", ".join(f"{step / per_epoch:.4g}" for step in saved)
        lines.append(("", f"checkpoints at epochs {text}"))
    if summary := read_json(workdir / "summary.json"):
        lines.append(("", f"training {summary['ended']} at step {summary['step']}"))
        if "test_elbo" in summary:
            text = f"test ELBO {summary['test_elbo']:.2f} ± {summary['test_elbo_se']:.2f}"
            lines.append(("", f"best at epoch {summary['best_epoch']}: {text}"))
    num_rows = len(read_rows(workdir / "rows.jsonl"))
    lines.append(("", f"{num_rows} datapoints evaluated"))
    tables = sorted(p.name for p in workdir.glob("table.*"))
    lines.append(("", f"reported: {', '.join(tables)}" if tables else "not reported"))
    return lines


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
