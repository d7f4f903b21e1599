"""Makes the page of results, README.md beside this file, from the rows that are committed here.

Command:  make results
Nothing is trained or measured, and no data set is needed. An experiment is shown at every scale at which
it is published, the largest first; the claims of the paper are judged by `claims.py`. The project's own
README.md has the main table between the lines HEADLINE.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent
README = HERE.parents[2] / "README.md"
sys.path.insert(0, str(HERE))

import claims  # noqa: E402

from infsub import checkpoints, files, gaps, published, records, report, rows  # noqa: E402
from infsub.report import runs as loaded  # noqa: E402
from infsub.report import tables  # noqa: E402
from infsub.verdicts import judge  # noqa: E402

ORDER = (
    *("main_table", "larger_encoder", "no_annealing", "decoder_size", "flow_parameters"),
    *("over_training", "test_set", "posteriors_2d", "certificate", "local_steps"),
    "generalisation_of_q",
)
MAX_CERTIFICATE = 0.1  # nats
SHOWN = (
    *(rows.ELBO, rows.LOCAL, rows.LOG_PX, rows.GRID),
    *(rows.APPROXIMATION, rows.AMORTIZATION, rows.INFERENCE),
)
SPREAD = (rows.LOG_PX, rows.APPROXIMATION, rows.AMORTIZATION, rows.INFERENCE)
# Why a certificate may be wider than MAX_CERTIFICATE, by run: named on the page.
REASONS: dict[str, str] = {}
MAIN = "infsub.main"
HEADLINE = "<!-- made by make results -->", "<!-- to here -->"
HEAD = """# Results

Made by `make results` from the rows in this folder alone: [make.py](make.py) is the code of this page, and
[claims.py](claims.py) judges. The paper's own numbers are not quoted. In the tables stands
*mean ± standard error over datapoints (Monte Carlo error)*, in nats: the first error is what another draw of
datapoints would change, of a gap the paired one; the second, what other random keys would change on these
datapoints. Neither contains what another seed of training would change: where there are several, their
spread stands below the table.

L[q] is the evidence lower bound of the encoder's q(z|x); L[q*] that of the best q* found in a family at each
datapoint; log p̂ the estimate of log p(x), by AIS (annealed importance sampling). log p̂ − L[q*] is the
approximation gap, L[q*] − L[q] the amortization gap, and the inference gap their sum. The families: FFG, the
Gaussian of diagonal covariance; *full*, the one of full covariance; the flows planar, Sylvester and RNVP; AF,
a flow with auxiliary variables; *own q*, the family that a model was trained with. IWAE is the importance-
weighted bound. Points are the first 1,000 (50) of `binarized_mnist`, which has no labels, elsewhere as many
of each class; of `…_at_model` the model simulates them. The certificate is what bidirectional Monte Carlo
(BDMC) says of AIS: by how much it is off on points that the model simulates, at most. Most experiments
certify on 200 points or none, too few to see what fails at one point in a thousand; `certificate` does so on
1,000. Shown is the certificate of the most points that there is for the same weights and AIS. A few points
can make most of it.

Rows are of the code of the revision *measured at*, under *The models*. After most were made the search for
the q* of AF, RNVP and Sylvester grew: their L[q*] may be higher now, and [Experiments](../../README.md) says
where that is known. An experiment's command trains seed 0; another one is `--config.seed=1`, in a workdir of
its own.

`small` is 30 epochs for most and 50 points, where the paper trains for 3280: it shows that an experiment
works, and its signs may turn round at `full`, the authors' training, of which an encoder alone on a frozen
decoder takes a tenth. The weights measured are the best on validation points, of the epoch *weights of* (at
`over_training`, of several). A scale is shown until every cell that it has is there at a larger one.

Any model below that has weights is measured anew, without training, by

```
python -m {main} --mode=evaluate --workdir=runs/again \\
    --config=configs/published.py:run={run} \\
    --config.data.dir=DIR
```

with the settings of one of its evaluations, the folder that a table's last column links to, or others by
flags; `--mode=report` shows the new rows."""
CLAIMS = """## The claims

Claims of the paper, and what it asks about annealing, decoder size and test points, put as statements.
Beyond 2 standard errors over datapoints a difference says yes or no; *not confirmed* is a no, *unclear* is
neither, or yes and no; of what happens *often* more than half of the differences that are measured decide.
Where one seed of training is named, another may say otherwise."""
REPRODUCTION = """## The reproduction's own model

The PyTorch reproduction of the paper published the weights of its FFG model of MNIST, and the 100 training
digits, ten of each class, that it measures. Nothing is trained here: the numbers differ by the estimators
alone.

| nats | the reproduction | here, seed 0 |
|---|---:|---:|
| L[q] | −90.59 | {elbo} |
| L[q*] FFG | −88.47 … −88.43 | {local} |
| IWAE of 5,000 samples | −86.85 … −86.77, ± 0.05 | {iwae} |
| log p̂ | −86.40 ± 0.02, of another program | {log_px} |

L[q] is of 5,000 samples there and of {elbo_samples:,} here. L[q*] takes Adam there and natural gradients
here, and ends at the same optimum. IWAE's weights have too heavy a tail at {heavy} of the 100 digits
(Pareto k above 0.7), so that its error says too little. log p̂ is AIS; −86.40 ± 0.02 is of 100 temperatures
from q(z|x), by an independent prototype in JAX; here it takes {temperatures} temperatures from Laplace's
Gaussian. The reproduction itself takes the larger of IWAE and of AIS from the prior; on the first ten
digits, where both are known, that AIS, of 100 chains and 500 temperatures, lies about 4 nats below IWAE. If
it does on the others too, its log p̂ is IWAE, which here lies {short} nats below AIS, and its approximation
gap is as much too small. The best Gaussian of full covariance gets to {full}. Certificate: {certificate}
simulated points. `make test-slow` holds these numbers; they are made by this command, from the weights of
the reproduction, which are not in this repository:

```
PYTHONPATH=tests python -m {main} --config=configs/quickstart.py --workdir=runs/reproduction \\
    --config.model.imported=models:reproduction --config.evaluate.per_class=0 \\
    --config.model.checkpoint=../shared/oracles/mnist_ffg.npz --config.evaluate.bdmc.num_points=100 \\
    --config.evaluate.local.families="('gaussian', 'full_gaussian')"
```"""


class Cell(NamedTuple):
    """What is shown of a cell.

    Attributes:
      runs: {seed: its evaluation}, the first seed's in the tables.
      entries: {seed: what is published of it}.
    """

    name: str
    scale: str
    runs: dict[int, loaded.LoadedRun]
    entries: dict[int, published.Published]

    @property
    def run(self) -> loaded.LoadedRun:
        """Of the first seed."""
        return self.runs[min(self.runs)]

    @property
    def entry(self) -> published.Published:
        """Of the first seed."""
        return self.entries[min(self.entries)]


@functools.cache
def load(folder: Path = HERE) -> dict[str, claims.Scales]:
    """{experiment: {scale: {cell: Cell}}} of what is published, in their order, scales as SCALES."""
    found: dict[tuple[str, str, str], dict[int, published.Published]] = {}
    for entry in published.read(folder):
        seeds = found.setdefault((entry.experiment, entry.scale, entry.cell), {})
        seeds[entry.seed] = entry
    cells: dict[str, claims.Scales] = {}
    for name in ORDER:
        scales: dict[str, dict[str, Cell]] = {}
        for scale in published.SCALES:
            for cell in dict(config_of(name).experiment.cells):
                if entries := dict(sorted(found.get((name, scale, cell), {}).items())):
                    runs = {n: loaded.load_run(e.folder, cell) for n, e in entries.items()}
                    scales.setdefault(scale, {})[cell] = Cell(cell, scale, runs, entries)
        if scales:
            cells[name] = scales
    return cells


@functools.cache
def config_of(name: str) -> Any:
    """The config of configs/paper/NAME.py."""
    spec: Any = importlib.util.spec_from_file_location(name, HERE.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def number(line: gaps.Line, by_keys: bool = True) -> str:
    """A mean with its error over datapoints, and that of random keys."""
    mean = line.mean
    other = mean.monte_carlo_error if by_keys else np.nan
    second = f" ({other:.2g})" if np.isfinite(other) else ""
    return f"{gaps.with_error(mean.mean, mean.standard_error)}{second}".replace("-", "−")


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def columns_of(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """{head: names of lines} of the table of these cells; a cell has one line of a column at most.

    What each cell has of one family alone, its own, shares a column.
    """
    found: dict[str, list[str]] = {}
    names = loaded.line_names([cell.run for cell in cells])
    for quantity in SHOWN:
        named = [name for name in names if rows.get(name).quantity == quantity]
        if len(named) > 1 and all(len(cell.run.lines.keys() & {*named}) < 2 for cell in cells):
            found[quantity.label.replace("{family}", "own q")] = named
        else:
            found |= {rows.label(name): [name] for name in named}
    return found


def value(lines: dict[str, gaps.Line], names: Sequence[str], by_keys: bool = True) -> str:
    """The one of these lines that is there, with its errors."""
    return next((number(lines[name], by_keys) for name in names if name in lines), "–")


def section(name: str, cells: dict[str, claims.Scales], folder: Path) -> Iterator[str]:
    """An experiment's part of the page."""
    given, scales, known = config_of(name).experiment, cells.get(name, {}), models(cells)
    yield f"### {name}\n\n**{given.question}**"
    for scale, of_scale in scales.items():
        shown = list(of_scale.values())
        yield (
            f"```\npython -m {MAIN} --config=configs/paper/{name}.py --workdir=runs/paper \\\n"
            f"    --config.scale={scale} --config.data.dir=DIR\n```"
        )
        columns = columns_of(shown)
        heads = [f"scale `{scale}`", "epochs", "weights of", "points", "seed", *columns]
        body = []
        for cell in shown:
            lines, facts = cell.run.lines, cell.entry.facts
            made = [str(facts["epochs"]), str(epoch_of(cell.entry))]
            made += [str(len(cell.run.indices)), str(cell.entry.seed)]
            numbers = [value(lines, names) for names in columns.values()]
            place = f"{facts['run']}/{facts['evaluation']}"
            link = f"[{facts['evaluation']}](runs/{place})"
            certificate = certified(certifying(cell, known))
            body.append([f"`{cell.name}`", *made, *numbers, certificate, link])
        yield "\n".join(table([*heads, "certificate", "rows"], body)).strip()
        yield from out_of_order(shown)
        yield from off_the_grid(shown)
        yield from over_steps(shown)
        yield from over_seeds(shown)
        figure = folder / name / scale / "figure.png"
        if figure.exists():
            yield f"![{given.question}]({figure.relative_to(folder).as_posix()})"
        path = f"{name}/{scale}/table.md"
        yield (
            f"[All lines, intervals, verdicts, settings and datapoints to look at]({path}), at scale "
            f"`{scale}`, {seeds(shown)}."
        )
        missing = [f"`{cell}`" for cell in dict(given.cells) if cell not in of_scale]
        if missing:
            yield f"Not measured at scale `{scale}` yet: {', '.join(missing)}."
    if not scales:
        yield "Not measured yet."


def headline(text: str, cells: dict[str, claims.Scales]) -> str:
    """The project's README.md with the main table, at the largest scale, a column for each model.

    Raises:
      ValueError: `text` has not each line of HEADLINE once; without one there is no telling what to keep.
    """
    scale, shown = next(iter(cells["main_table"].items()))
    runs = [cell.run for cell in shown.values()]
    columns = columns_of(list(shown.values()))
    counts = {f"{len(run.indices):,} points" for run in runs}
    heads = [f"scale `{scale}`, {' or '.join(sorted(counts))}", *(f"`{name}`" for name in shown)]
    body = [
        [label, *(value(run.lines, names, by_keys=False) for run in runs)]
        for label, names in columns.items()
    ]
    known = models(cells)
    certificates = [certified(certifying(c, known), by_keys=False) for c in shown.values()]
    body.append(["certificate", *certificates])
    figure = (HERE / "main_table" / scale / "figure.png").relative_to(README.parent)
    made = [f"![The gaps of each model, a bar from L[q] over L[q*] to log p̂]({figure.as_posix()})"]
    made += table(heads, body)
    before, rest = text.split(HEADLINE[0])
    _, after = rest.split(HEADLINE[1])
    return "\n".join([f"{before}{HEADLINE[0]}", *made, f"{HEADLINE[1]}{after}"])


def certified(run: loaded.LoadedRun | None, by_keys: bool = True) -> str:
    """The certificate of a run, and on how many points."""
    line = run.certificate.line if run else None
    return f"{number(line, by_keys)} on {line.values.size}" if line else "–"


def epoch_of(entry: published.Published) -> int:
    """After how many epochs the weights were what was measured."""
    evaluation: Any = files.read_json(entry.folder / "evaluation.json")
    return evaluation["step"] // records.read_run(entry.folder)["steps_per_epoch"]


def ais_of(run: loaded.LoadedRun) -> dict[str, Any]:
    """The settings of its AIS."""
    return {n: v for n, v in run.settings.items() if n.startswith("evaluate.ais.")}


def most_certified(
    runs: Sequence[loaded.LoadedRun], ais: Sequence[dict[str, Any]]
) -> loaded.LoadedRun | None:
    """Of the evaluations of one model, by one of these settings of AIS, that of the most simulated points.

    Not the narrowest: where one point in a thousand is far off, that is the one that missed it.
    """
    found = [run for run in runs if run.certificate.line and ais_of(run) in ais]
    return max(found, key=lambda run: run.lines[rows.CERTIFICATE.name].values.size, default=None)


def certifying(cell: Cell, known: dict[str, list[Cell]]) -> loaded.LoadedRun | None:
    """The evaluation that certifies the cell's AIS best; known: the cells of every model."""
    of_run, epoch = known[cell.entry.facts["run"]], epoch_of(cell.entry)
    of_weights = [c.run for c in of_run if epoch_of(c.entry) == epoch]
    return most_certified(of_weights, [ais_of(cell.run)])


def with_certificate(run: loaded.LoadedRun, other: loaded.LoadedRun | None) -> loaded.LoadedRun:
    """A run as if its own evaluation had made the other one's certificate, of the same AIS."""
    if other is None:
        return run
    judged = judge(run.measured, run.found, other.certificate)
    settings = {n: v for n, v in other.settings.items() if n.startswith("evaluate.bdmc.")}
    shown = {"certificate": other.certificate, "settings": run.settings | settings}
    return run._replace(verdicts=judged, **shown)


def out_of_order(cells: Sequence[Cell]) -> Iterator[str]:
    """The datapoints where a bound is beyond three errors of both above log p̂, so that this is not found."""
    found = []
    for cell in cells:
        for name, line in cell.run.lines.items():
            if rows.get(name).quantity is not rows.APPROXIMATION:
                continue
            for at in np.flatnonzero(line.values < -3 * line.errors):
                index, over = cell.run.indices[at], -line.values[at]
                found.append(
                    f"{rows.label(name)} of `{cell.name}`, point {index}, by {over:.1f} nats"
                )
    if found:
        yield (
            "AIS fails where L[q*] is found above it, beyond three of their errors, and log p̂ is too low "
            f"there: {'; '.join(found)}."
        )


def off_the_grid(cells: Sequence[Cell]) -> Iterator[str]:
    """By how much log p̂ misses the log p(x) of a quadrature."""
    found = []
    for cell in cells:
        if rows.GRID.name in cell.run.lines:
            missed = loaded.difference(cell.run, rows.GRID.name, cell.run, rows.LOG_PX.name)
            found.append(str(claims.Finding(f"`{cell.name}`", *missed)))
    if found:
        yield (
            f"The grid's log p(x) − log p̂, in nats: {', '.join(found)}. Where AIS starts at one mode of a "
            "posterior and misses another, log p̂ and with it the gaps are as much too small."
        )


def over_steps(cells: Sequence[Cell]) -> Iterator[str]:
    """What local steps leave of L[q*] − L."""
    curves = [(cell.name, curve) for cell in cells for curve in cell.run.curves]
    steps = sorted({n for _, curve in curves for n, _ in curve.points})
    body = []
    for name, curve in curves:
        points = dict(curve.points)
        values = [number(points[n]) if n in points else "–" for n in steps]
        body.append([f"`{name}`, {curve.label}", *values])
    if body:
        heads = ["L[q*] − L after local steps", *map(str, steps)]
        yield "\n".join(table(heads, body)).strip()


def seeds(cells: Sequence[Cell]) -> str:
    """How many seeds the cells have, in words."""
    counts = sorted({len(cell.runs) for cell in cells})
    most = max(counts)
    return "one seed" if most == 1 else f"{' to '.join(map(str, counts))} seeds"


def over_seeds(cells: Sequence[Cell]) -> Iterator[str]:
    """Mean and standard deviation over the seeds of training, where there are several."""
    several = [cell for cell in cells if len(cell.runs) > 1]
    columns = {
        head: names
        for head, names in columns_of(several).items()
        if rows.get(names[0]).quantity in SPREAD
    }
    body = []
    for cell in several:
        values = []
        for names in columns.values():
            means = [
                r.lines[n].mean.mean for r in cell.runs.values() for n in names if n in r.lines
            ]
            values.append(spread_of(means) if len(means) > 1 else "–")
        body.append([f"`{cell.name}`", ", ".join(map(str, cell.runs)), *values])
    if body:
        heads = ["mean ± standard deviation over seeds", "seeds", *columns]
        yield "\n".join(table(heads, body)).strip()


def spread_of(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    text = gaps.with_error(float(np.mean(values)), float(np.std(values, ddof=1)))
    return text.replace("-", "−")


def models(cells: dict[str, claims.Scales]) -> dict[str, list[Cell]]:
    """{run: the cells that show it}, with a cell a seed."""
    found: dict[str, list[Cell]] = {}
    for cell in all_of(cells):
        for seed, entry in cell.entries.items():
            one = cell._replace(runs={seed: cell.runs[seed]}, entries={seed: entry})
            found.setdefault(entry.facts["run"], []).append(one)
    return dict(sorted(found.items()))


def all_of(cells: dict[str, claims.Scales]) -> list[Cell]:
    """The cells of all experiments, at all scales."""
    return [
        cell for scales in cells.values() for shown in scales.values() for cell in shown.values()
    ]


def certificates(shown: Sequence[Cell]) -> tuple[str, bool]:
    """The certificate of a model's log p̂, and whether it is within MAX_CERTIFICATE.

    It is of the AIS that the gaps are of; of a model without gaps, of any.
    """

    runs = [cell.run for cell in shown]
    wanted = [run for run in runs if run.found.has_gaps] or runs
    best = most_certified(runs, [ais_of(run) for run in wanted])
    if best is None:
        return "–", False
    return certified(best), best.lines[rows.CERTIFICATE.name].mean.mean <= MAX_CERTIFICATE


def model_section(cells: dict[str, claims.Scales], folder: Path) -> Iterator[str]:
    """Which models there are, how they were made, and how far their log p̂ can be believed."""
    body: list[list[str]] = []
    uncertain: dict[str, list[str]] = {}  # why: which
    for run, shown in models(cells).items():
        cell, facts = shown[0], shown[0].entry.facts
        settings = cell.run.settings
        document = records.read_run(cell.entry.folder.parent)
        versions, revision = document.get("versions", {}), document.get("git_revision", "")
        machine = document.get("machine", facts["machine"])
        text, good = certificates(shown)
        if not good:
            why = REASONS.get(run) or (
                f"no certificate at scale `{cell.scale}`"
                if text == "–"
                else f"{text}, no reason known"
            )
            uncertain.setdefault(why, []).append(f"`{run}`")
        weights = f"runs/{run}/weights.npz"
        hours = "–" if facts["hours"] is None else f"{facts['hours']:.2f}"
        q = rows.family_label(str(settings["model.posterior.name"]))
        facts_of = [one.entry.facts for one in shown]
        dates = sorted({facts["date"] for facts in facts_of})
        measured = ", ".join(sorted({facts["revision"][:7] for facts in facts_of}))
        made = [str(facts["epochs"]), str(cell.entry.seed), hours, machine, revision[:7]]
        made += [" … ".join(dict.fromkeys([dates[0], dates[-1]])), measured]
        code = [f"{versions.get('infsub')}, jax {versions.get('jax')}", text]
        link = f"[npz]({weights})" if (folder / weights).exists() else "–"
        what = [f"`{run}`", str(settings["data.name"]), q, cell.scale]
        body.append([*what, *made, *code, link])
    heads = ["run", "data", "q", "scale", "epochs", "seed", "hours of training", "machine"]
    heads += ["trained at", "measured", "measured at", "infsub", "certificate", "weights"]
    yield "## The models"
    yield "\n".join(table(heads, body)).strip()
    hours = [shown[0].entry.facts["hours"] or 0 for shown in models(cells).values()]
    yield f"{sum(hours):.1f} hours of training in all; other jobs ran beside."
    if uncertain:
        lines = [f"- {why}: {', '.join(named)}." for why, named in uncertain.items()]
        yield (
            f"Without a certificate of at most {MAX_CERTIFICATE:g} nats, so that their log p̂ may be "
            "farther off than its errors say:\n\n" + "\n".join(lines)
        )


def reproduction(folder: Path) -> str:
    """The reproduction's numbers beside ours, which are of the rows in `reproduction`."""
    run = loaded.load_run(folder / "reproduction", "reproduction")
    lines, k = run.lines, run.measured.columns[rows.IWAE.name].fields["pareto_k"]
    return REPRODUCTION.format(
        main=MAIN,
        elbo=number(lines[rows.ELBO.name]),
        local=number(lines[rows.LOCAL.of("gaussian")]),
        iwae=number(lines[rows.IWAE.name]),
        log_px=number(lines[rows.LOG_PX.name]),
        full=number(lines[rows.LOCAL.of("full_gaussian")]),
        short=gaps.with_error(*loaded.difference(run, rows.LOG_PX.name, run, rows.IWAE.name)),
        heavy=int(np.sum(k > gaps.MAX_PARETO_K)),
        elbo_samples=run.settings["evaluate.elbo_samples"],
        temperatures=run.settings["evaluate.ais.num_temperatures"],
        certificate=certified(run),
    )


def pages(folder: Path = HERE) -> dict[str, str]:
    """{path in the folder: text} of the page and of every experiment's table."""
    cells, found = load(folder), {}
    known = models(cells)
    entries = [cell.entry for cell in all_of(cells)]
    place = next(e for e in entries if (e.folder.parent / checkpoints.WEIGHTS).exists()).folder
    run = place.relative_to(folder / "runs").as_posix()
    parts = [HEAD.format(main=MAIN, run=run), CLAIMS, claims.text(cells), "## The experiments"]
    for name in ORDER:
        parts += section(name, cells, folder)
        for scale, shown in cells.get(name, {}).items():
            question = config_of(name).experiment.question
            title = f"{question} ({name}, scale {scale})"
            runs = [with_certificate(cell.run, certifying(cell, known)) for cell in shown.values()]
            found[f"{name}/{scale}/table.md"] = tables.document(runs, title)
    parts += [reproduction(folder), *model_section(cells, folder)]
    return found | {"README.md": "\n\n".join(parts) + "\n"}


def draw(folder: Path = HERE) -> None:
    """Every experiment's figure."""
    from infsub.report import figures

    for name, scales in load(folder).items():
        given = config_of(name).experiment.figure.to_dict()
        for scale, shown in scales.items():
            path = folder / name / scale / "figure.png"
            folders = {cell.name: cell.entry.folder for cell in shown.values()}
            figure = report.draw([cell.run for cell in shown.values()], given, folders)
            if isinstance(figure, str):
                path.unlink(missing_ok=True)
                continue
            path.parent.mkdir(exist_ok=True)
            files.write_bytes(path, figures.encode(figure, "png", dpi=200))


def main() -> None:
    """`make results`."""
    for path in HERE.glob("*/*/table.md"):  # of scales that are not shown any more
        path.unlink()
    draw()
    for name, text in pages().items():
        (HERE / name).parent.mkdir(exist_ok=True)
        files.write_bytes(HERE / name, text.encode())
    files.write_bytes(README, headline(README.read_text(), load()).encode())
    for path in HERE.glob("*/*/figure.png"):
        if not (path.parent / "table.md").exists():
            path.unlink()


if __name__ == "__main__":
    main()
