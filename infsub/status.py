"""What `--mode=status` shows of a run: what is done, by its files alone, and when the rest will be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from infsub import config as configs
from infsub import files, records, shards


def of_run(workdir: Path) -> str:
    """What a run has done and when it will be done, as a screen of text.

    Raises:
      UserError: there is no run in `workdir`.
    """
    run = records.read_run(workdir)
    config, per_epoch = records.read_config(workdir), run["steps_per_epoch"]
    model, train = config.model, config.train
    what = f"{config.data.name}, {config.data.binarisation}, {config.data.levels} levels"
    q = f"{model.posterior.name} posterior"
    if model.imported:
        what = what if run["levels"] else "of its own"
        q = model.imported
    lines = [
        ("run", f"{workdir}, identity {run['identity']}"),
        ("data", what),
        ("model", f"{q}, z of {model.latent_dim} dimensions"),
    ]
    progress = files.read_json(workdir / "progress.json", records.PROGRESS)
    if model.imported:
        lines.append(("training", "none, it was trained elsewhere"))
    elif progress is None:
        lines.append(("training", "not begun"))
    else:
        epoch, ago = progress["done"] / per_epoch, time.time() - (progress["time"] or np.nan)
        speed = progress["examples_per_second"] or np.nan
        state = f"epoch {epoch:.4g} of {train.num_epochs}, {speed:.0f}"
        lines.append(("training", f"{state} examples/s, last seen {files.duration(ago)} ago"))
        left = progress["seconds_left"]  # None before it is known
        if progress["done"] < progress["total"] and ago < 120 and left is not None:
            end = time.strftime("%d %b %H:%M", time.localtime(time.time() + left))
            lines.append(("time left", f"{files.duration(left)}, until {end}"))
        lines += _seconds("time spent", progress)
    for member, folder in configs.runs(config, workdir):
        lines += _of_one(folder, f"seed {member.seed}", per_epoch)
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def _seconds(label: str, progress: dict[str, Any]) -> list[tuple[str, str]]:
    found = records.spent(progress)
    return [(label, str(found))] if found else []


def _of_one(workdir: Path, label: str, per_epoch: int) -> list[tuple[str, str]]:
    lines = [(label, "")]
    for row in files.read_rows(workdir / "metrics.jsonl", records.EPOCH)[-1:]:
        shown = {
            "ELBO": "elbo",
            "validation ELBO": "validation_elbo",
            "validation IWAE": "validation_iwae",
        }
        text = ", ".join(
            f"{text} {_nats(row[name])}" for text, name in shown.items() if name in row
        )
        lines.append(("", f"epoch {row['epoch']}: {text}"))
    saved = sorted(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdecimal())
    if saved:
        text = ", ".join(f"{step / per_epoch:.4g}" for step in saved)
        lines.append(("", f"checkpoints at epochs {text}"))
    if summary := files.read_json(workdir / "summary.json", records.SUMMARY):
        lines.append(("", f"training {summary['ended']} at step {summary['step']}"))
        if "test_elbo" in summary:
            text = f"test ELBO {_nats(summary['test_elbo'])} ± {_nats(summary.get('test_elbo_se'))}"
            lines.append(("", f"best at epoch {summary.get('best_epoch')}: {text}"))
    named = sorted(path.parent for path in workdir.glob("*/evaluation.json"))
    if not named or (workdir / "evaluation.json").exists():
        named.insert(0, workdir)
    return lines + [line for folder in named for line in _of_evaluation(folder, workdir)]


def _of_evaluation(folder: Path, workdir: Path) -> list[tuple[str, str]]:
    name = f"{folder.name}: " if folder != workdir else ""
    num_rows, lacking = len(shards.read(folder, "rows")), records.missing(folder)
    lines = [("", f"{name}{num_rows} datapoints evaluated{f', {lacking}' if lacking else ''}")]
    for path in sorted(folder.glob("progress.evaluation*.json")):
        lines += _seconds("evaluating", files.read_json(path, records.PROGRESS) or {})
    tables = sorted(p.name for p in folder.glob("table.*"))
    lines.append(("", f"{name}reported: {', '.join(tables)}" if tables else f"{name}not reported"))
    return lines


def _nats(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "unknown"
