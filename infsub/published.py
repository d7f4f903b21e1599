"""Published models: a workdir of experiments, small enough to be committed, and measured again by anybody.

  python -m infsub.published --workdir=runs/paper --out=configs/paper/results --weights=RUN,RUN

copies of every cell that is done its rows, packed, what says how they were made, and of the runs named
the best weights. The folder mirrors the workdir, so that all that reads one reads the other:

  OUT/runs/<run>/                config.json, summary.json, weights.npz of the runs that were named
  OUT/runs/<run>/<evaluation>/   config.json, evaluation.json, done.json, rows.jsonl.gz, bdmc.jsonl.gz
  OUT/<experiment>/published.json   {cell: {scale: {seed: ENTRY}}}

Of an ENTRY the first two name folders, in OUT/runs; hours are None where they are not known. Packing again
adds to what is there: other seeds, which are experiments of --config.seed=1 in a workdir of their own,
beside the first, and other scales. One of which every cell is there at a scale to be believed more
is left out, with its runs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from infsub import checkpoints, experiments, files, records, shards
from infsub import config as configs
from infsub.types import UserError

FOLDER = Path("configs/paper/results")
SCALES = tuple(experiments.SCALES)  # the one to be believed most first
MAX_WEIGHTS = 12e6  # bytes of all weights together
ENTRY: dict[str, type] = {
    "run": str,
    "evaluation": str,
    "points": int,
    "epochs": int,
    "date": str,
    "machine": str,
    "revision": str,
    "hours": float,
}


class Published(NamedTuple):
    """One evaluation of a published model, as a cell of an experiment.

    Attributes:
      folder: of its rows.
      facts: as ENTRY: points, epochs, date, machine, revision of infsub, hours of training.
    """

    experiment: str
    cell: str
    scale: str
    seed: int
    folder: Path
    facts: dict[str, Any]


def read(out: Path) -> list[Published]:
    """All that is published in a folder, in the order of experiments' names, cells, scales and seeds.

    Raises:
      UserError: a published.json is not as `pack` writes it.
    """
    found = []
    for path in sorted(out.glob("*/published.json")):
        for cell, scale, seed, facts in _entries(path):
            folder = out / "runs" / facts["run"] / facts["evaluation"]
            found.append(Published(path.parent.name, cell, scale, int(seed), folder, facts))
    return found


def _entries(path: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for cell, scales in (files.read_json(path) or {}).items():
        for scale, seeds in scales.items():
            for seed, facts in seeds.items():
                if wrong := files.wrong_fields(facts, ENTRY):
                    raise UserError(f"{path} is not as infsub writes it ({cell}: {wrong}).")
                yield cell, scale, seed, facts


def config(run: str, folder: Path = FOLDER) -> configs.Config:
    """The config that measures a published model anew, with init_from where its weights lie.

    Args:
      run: RUN/EVALUATION, folders in `folder`/runs; the settings are those of that evaluation.
      folder: of what is published.

    Raises:
      UserError: there is no such evaluation of published weights: which there are.
    """
    source = folder / "runs" / run
    known = [
        path.parent
        for weights in sorted(folder.glob(f"runs/*/{checkpoints.WEIGHTS}"))
        for path in sorted(weights.parent.glob("*/evaluation.json"))
    ]
    if source not in known:
        names = ", ".join(path.relative_to(folder / "runs").as_posix() for path in known)
        raise UserError(
            f"run={run} is no evaluation of published weights; there are {names or 'none'}."
        )
    found = records.read_config(source).copy_and_resolve_references().unlock()
    found.init_from, found.evaluate.name = str(source.parent), ""
    return found.lock()


def is_trained(config: configs.Config, workdir: Path | None = None) -> bool:
    """Whether config.init_from has published weights of this very config, and `workdir` no others."""
    source = Path(config.init_from)
    return (
        bool(config.init_from)
        and (source / checkpoints.WEIGHTS).exists()
        and not (workdir and _is_trained_here(workdir))
        and not records.differences(config, records.read_run(source))
    )


def _is_trained_here(workdir: Path) -> bool:
    """Whether a run has begun to train in `workdir`, of its own accord and not as `claim` makes it."""
    return (workdir / "config.json").exists() and not (workdir / checkpoints.WEIGHTS).exists()


def claim(config: configs.Config, workdir: Path) -> None:
    """Makes `workdir` a copy of the run config.init_from, published or not, with its best weights.

    It is that run, identity and all: nothing is trained, and what is measured is measured of it.

    Raises:
      UserError: there are no weights, or they are another config's; nothing is written then.
    """
    source = Path(config.init_from)
    run = records.read_run(source)
    if differing := records.differences(config, run):
        raise UserError(
            f"config.init_from={source} holds the weights of another config: {'; '.join(differing)}. "
            "Give the config that it was made with; configs/published.py has those that are published."
        )
    arrays = _weights(source)
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_npz(workdir / checkpoints.WEIGHTS, arrays)
    files.write_json(workdir / "config.json", run | {"config": configs.to_json(config)})


def pack(workdir: Path, out: Path, weights: Sequence[str] = ()) -> list[str]:
    """Publishes the cells of a workdir that are done; the names of the runs that they are of.

    Says which scales are left out, for all of the experiment is there at one to be believed more.

    Args:
      workdir: of experiments; or of one model of one's own, whose rows are then OUT's.
      out: the folder of what is published; what is in it of other runs stays.
      weights: runs whose weights are published too.

    Raises:
      UserError: OUT has runs that are not published, nothing is done, no such run, weights that are too large
        together, or files that are not a run's. Nothing is written then.
    """
    # What is not published would be removed from it.
    if any(out.glob("*/cells.json")) or ((out / "runs").exists() and not read(out)):
        raise UserError(
            f"--out={out} holds runs that are not published: give another folder to publish in."
        )
    contents, tables, left_out = {}, {}, []
    if (workdir / "config.json").exists():
        contents = _evaluation(workdir, out)
    for path in sorted(workdir.glob("*/cells.json")):
        table = files.read_json(out / path.parent.name / "published.json") or {}
        for name, cell in experiments.read_cells(path).items():
            source = workdir / cell["run"] / cell["evaluation"]
            if not (source / "done.json").exists():
                continue
            run, (seed, facts) = Path(cell["run"]).name, _facts(source.parent, source)
            contents |= _evaluation(source, out / "runs" / run / source.name)
            contents |= _run(source.parent, out / "runs" / run)
            entry = {"run": run, "evaluation": source.name} | facts
            table.setdefault(name, {}).setdefault(cell["scale"], {})[str(seed)] = entry
        table, scales = _believed(table)
        left_out += [f"{path.parent.name} at scale {scale}" for scale in scales]
        tables[out / path.parent.name / "published.json"] = _json(table)
    if not contents:
        raise UserError(f"--workdir={workdir} holds nothing that is measured to its end.")
    runs = sorted({path.parent.name for path in contents if path.name == "summary.json"})
    if unknown := sorted(set(weights) - set(runs)):
        raise UserError(f"--weights names {', '.join(unknown)}; done are {', '.join(runs)}.")
    for name in weights:
        arrays = _weights(workdir / "runs" / name)
        contents[out / "runs" / name / checkpoints.WEIGHTS] = files.npz_bytes(arrays)
    sizes = {path: path.stat().st_size for path in out.glob(f"runs/*/{checkpoints.WEIGHTS}")}
    sizes |= {path: len(c) for path, c in contents.items() if path.name == checkpoints.WEIGHTS}
    if sum(sizes.values()) > MAX_WEIGHTS:
        raise UserError(
            f"all weights together are {sum(sizes.values()) / 1e6:.1f} MB, and may be "
            f"{MAX_WEIGHTS / 1e6:g}: name fewer runs, or remove some of {out}."
        )
    for path, content in (contents | tables).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, content)
    shown = {entry.folder for entry in read(out)}
    for path in out.glob("runs/*/*/evaluation.json"):
        if path.parent not in shown:
            shutil.rmtree(path.parent)
    for path in out.glob("runs/*"):
        if not any(path.glob("*/evaluation.json")):
            shutil.rmtree(path)
    for what in left_out:
        files.say(f"{what} is left out: every cell is there at a scale to be believed more.")
    return runs


def _believed(table: dict[str, dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A published.json without the scales of which every cell is there at one to be believed more; these.

    Not cell by cell: what an experiment compares it compares at one scale.
    """
    left_out, believed = [], set()
    for scale in SCALES:
        having = {name for name, scales in table.items() if scale in scales}
        if having and having <= believed:
            left_out.append(scale)
        believed |= having
    kept = {
        name: {scale: seeds for scale, seeds in scales.items() if scale not in left_out}
        for name, scales in table.items()
    }
    return kept, left_out


def _weights(source: Path) -> dict[str, np.ndarray]:
    """The arrays of a run's weights.npz."""
    identity = records.read_run(source)["identity"]
    return checkpoints.weights(*checkpoints.load_variables(source), identity)


def _facts(run: Path, evaluation: Path) -> tuple[int, dict[str, Any]]:
    """The seed, and of an ENTRY what is not a folder."""
    document = records.read_run(evaluation)
    progress = files.read_json(run / "progress.json") or {}
    measured = files.read_json(evaluation / "progress.evaluation.json", records.PROGRESS) or {}
    spent = records.spent(progress)
    settings, when = document["config"], measured.get("time")
    return settings["seed"], {
        "points": len(shards.read(evaluation, "rows")),
        "epochs": settings["train"]["num_epochs"],
        "date": time.strftime("%Y-%m-%d", time.gmtime(when)) if when else "",
        "machine": document.get("machine", ""),
        "revision": document.get("git_revision", ""),
        "hours": round(spent.seconds / 3600, 4) if spent else None,
    }


def _run(source: Path, target: Path) -> dict[Path, bytes]:
    summary = files.read_json(source / "summary.json", records.SUMMARY)
    if summary is None:
        raise UserError(f"{source} is not trained to its end: run its experiment again.")
    document = _without_paths(records.read_run(source))
    return {target / "config.json": _json(document), target / "summary.json": _json(summary)}


def _evaluation(source: Path, target: Path) -> dict[Path, bytes]:
    if lacking := records.missing(source):
        raise UserError(f"{source} is not evaluated to its end ({lacking}).")
    document = records.read_run(source)
    evaluation: dict[str, Any] = files.read_json(source / "evaluation.json") or {}
    contents = {
        target / "config.json": _json(_without_paths(document)),
        target / "evaluation.json": _json(_without_folder(evaluation, "indices_file")),
    }
    if done := files.read_json(source / "done.json"):
        contents[target / "done.json"] = _json(done)
    for stem in ("rows", "bdmc"):
        if rows := shards.read(source, stem):
            lines = "".join(json.dumps(_shortest(row)) + "\n" for row in rows)
            contents[target / f"{stem}.jsonl.gz"] = gzip.compress(lines.encode(), 9, mtime=0)
    layouts = records.DENSITIES, records.BARE_DENSITIES
    if arrays := files.read_npz(source / records.POSTERIORS, *layouts):
        # Three digits, for a picture: half the bytes.
        for name in arrays.keys() & {"images", "truth", "densities"}:
            bits = arrays[name].astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)
            arrays[name] = bits.view(np.float32)
        contents[target / records.POSTERIORS] = files.npz_bytes(arrays)
    return contents


def _shortest(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the shortest decimals of its float32 numbers: half the bytes, the same numbers."""

    def short(value: Any) -> Any:
        single = np.float32(value) if isinstance(value, float) else None
        return float(str(single)) if single is not None and float(single) == value else value

    return {name: short(value) for name, value in files.finite(row).items()}


def _without_paths(document: dict[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of the machine's folders."""
    settings = document["config"]
    source = settings["init_from"] and f"runs/{Path(settings['init_from']).name}"
    told = {"init_from": source, "data": settings["data"] | {"dir": ""}}
    told["evaluate"] = _without_folder(settings["evaluate"], "indices_file")
    told["model"] = _without_folder(settings["model"], "checkpoint")
    return document | {"config": settings | told}


def _without_folder(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return settings | ({name: Path(settings[name]).name} if settings.get(name) else {})


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m infsub.published`."""
    parser = argparse.ArgumentParser(
        prog="python -m infsub.published",
        description="Packs the experiments of a workdir to publish them.",
    )
    parser.add_argument(
        "--workdir", type=os.path.expanduser, required=True, metavar="DIR", help="of experiments"
    )
    parser.add_argument(
        "--out", type=os.path.expanduser, default=FOLDER, metavar="DIR", help=f"default: {FOLDER}"
    )
    parser.add_argument(
        "--weights", default="", metavar="RUN,RUN", help="folders of runs/ whose weights go along"
    )
    given = parser.parse_args(arguments)
    try:
        chosen = [name for name in given.weights.split(",") if name]
        runs = pack(Path(given.workdir), Path(given.out), chosen)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"Published in {given.out}: {', '.join(runs) or 'one evaluation'}; make results draws the page."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
