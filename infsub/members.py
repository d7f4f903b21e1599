"""A model of a run while it trains: its workdir, its records there, and what decides when it ends."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from infsub import config as configs
from infsub import files, records
from infsub.checkpoints import Checkpoints


class Member:
    """One model of a run: its workdir, and what decides when it ends.

    Attributes:
      progress: step; best_step, best_epoch and best_value on validation data.
      ended: "" while it trains, then "finished", "stopped early" or "diverged".
      why: it has diverged.
    """

    def __init__(
        self, config: configs.Config, workdir: Path, keep_every_steps: int, num_seeds: int = 1
    ) -> None:
        self.config, self.workdir = config, workdir
        run = records.read_run(workdir)
        self._per_epoch = run["steps_per_epoch"]
        # Seeds are written one after the other, and go on from a step that all of them have.
        keep_last = max(config.train.keep_last, 2 if num_seeds > 1 else 1)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints", run["identity"], keep_last, keep_every_steps
        )
        self.progress = {
            "step": np.asarray(0),
            "best_step": np.asarray(0),
            "best_epoch": np.asarray(0),
            "best_value": np.asarray(-np.inf),
        }
        summary = files.read_json(workdir / "summary.json", records.SUMMARY) or {}
        self.ended = summary.get("ended", "")
        self.why = summary.get("why", "too many steps were not finite")
        if self.ended != "diverged" and summary.get("step") not in self.checkpoints.steps():
            self.ended = ""  # the last checkpoint has been removed: it is made anew
        self._board: records.TensorBoard | None = None

    def resume(self, step: int) -> None:
        """Makes the records those of a run that is at `step`."""
        self.checkpoints.clean(step)
        metrics = self.workdir / "metrics.jsonl"
        rows = files.read_rows(metrics, records.EPOCH)
        rows = [row for row in rows if row["step"] <= step]
        files.rewrite_rows(metrics, rows)
        if lost := step // self._per_epoch - len(rows):
            files.say(
                f"{metrics} lacks {lost} of {step // self._per_epoch} epochs, lost with the machine or its "
                "disk; the weights are whole, and training goes on."
            )
        self._board = records.TensorBoard(self.workdir / "tensorboard", step + 1)

    def judge(self, epoch: int, step: int, value: float) -> bool:
        """Takes note of a validation value; whether it is the best so far."""
        better = bool(np.isfinite(value) and value > self.progress["best_value"])
        if better:
            best = {"best_step": step, "best_epoch": epoch, "best_value": value}
            self.progress |= {name: np.asarray(v) for name, v in best.items()}
        return better

    def out_of_patience(self, epoch: int) -> bool:
        """Whether a validated epoch is too long after the best one."""
        train = self.config.train
        # While w rises, the objective is another one: patience starts when it is the ELBO.
        start = train.annealing_epochs if train.annealing != "none" else 0
        waited = epoch - max(start, int(self.progress["best_epoch"]))
        return 0 < train.patience <= waited

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Checkpoints this member's state, without waiting for the disk."""
        self.progress["step"] = np.asarray(step)
        # A checkpoint is not to be there without its epochs.
        files.sync(self.workdir / "metrics.jsonl")
        self.checkpoints.save(step, state | {"progress": self.progress})
        self.write_csv()
        if self._board is not None:
            self._board.flush()  # what a kill leaves goes as far as the checkpoint that goes on

    def record(self, row: dict[str, Any], speed: float) -> None:
        """One epoch's row, to metrics.jsonl and TensorBoard."""
        files.append_rows(self.workdir / "metrics.jsonl", [row])
        if self._board is not None:
            self._board.scalars(row["step"], row | {"examples_per_second": speed})

    def draw(self, step: int, grids: dict[str, np.ndarray]) -> None:
        """Grids of images [rows, columns, H, W, C] as <name>.png and in TensorBoard."""
        for name, grid in grids.items():
            image = picture(grid)
            write_png(self.workdir / f"{name}.png", image)
            if self._board is not None:
                self._board.image(step, name, image)

    def write_csv(self) -> None:
        """metrics.csv from metrics.jsonl."""
        rows = files.read_rows(self.workdir / "metrics.jsonl")
        files.write_csv(self.workdir / "metrics.csv", rows)

    def end(self, summary: dict[str, Any]) -> None:
        """Writes summary.json, the mark of a run that is done, when all else is on disk."""
        self.checkpoints.wait()
        self.write_csv()
        summary = files.finite({"ended": self.ended} | summary)
        files.write_json(self.workdir / "summary.json", summary)

    def close(self) -> None:
        """Waits until all is on disk."""
        self.checkpoints.close()
        if self._board is not None:
            self._board.close()


def picture(images: np.ndarray) -> np.ndarray:
    """A grid of images [rows, columns, H, W, C] in [0, 1] as one image, uint8 [Y, X, 3]."""
    images = np.pad(images, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)], constant_values=0.5)
    rows, columns, height, width, channels = images.shape
    grid = images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
    grid = np.broadcast_to(grid, (*grid.shape[:2], 3))
    return np.uint8(np.round(255 * np.clip(grid, 0, 1)))  # pyright: ignore[reportReturnType]


def write_png(path: Path, image: np.ndarray) -> None:
    """uint8 [Y, X, 3] as a PNG file."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(image).save(png, "png")
    files.write_bytes(path, png.getvalue())
