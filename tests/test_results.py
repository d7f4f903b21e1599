"""The page of results is what its code makes of the committed rows, and the rows are in order."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from infsub import checkpoints, imported, published, rows
from infsub.report.runs import decomposed

RESULTS = Path(__file__).parent.parent / "configs/paper/results"
SPEC = importlib.util.spec_from_file_location("make_results", RESULTS / "make.py")
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)
claims = sys.modules["claims"]
ENTRIES = published.read(RESULTS)


def test_the_page_is_made_of_the_committed_rows():
    made = make.pages()
    committed = {RESULTS / "README.md", *RESULTS.glob("*/*/table.md")}
    assert {RESULTS / name for name in made} == committed
    for name, text in made.items():
        assert (RESULTS / name).read_text() == text, f"{name}: run `make results`"
    figures = {path.parent for path in RESULTS.glob("*/*/figure.png")}
    assert figures <= {path.parent for path in committed}
    assert sum(path.stat().st_size for path in RESULTS.glob("*/*/figure.png")) < 5e6


def test_the_readme_shows_the_main_table():
    text = make.README.read_text()
    assert make.headline(text, make.load()) == text, "run `make results`"
    for run in (cell.run for cell in next(iter(make.load()["main_table"].values())).values()):
        mean = run.lines["inference_gap"].mean
        assert f"| {make.gaps.with_error(mean.mean, mean.standard_error)} |" in text
    for mark in make.HEADLINE:  # nothing of a README is lost that has no place for it
        with pytest.raises(ValueError, match="unpack"):
            make.headline(text.replace(mark, ""), make.load())


def test_the_reproduction_is_measured_as_the_reproduction_measured_it():
    """Its own numbers, see ../shared/oracles/README.md, within the errors of both."""
    run = make.loaded.load_run(str(RESULTS / "reproduction"))
    mean = {name: line.mean for name, line in run.lines.items()}
    for name, value, error in (("elbo", -90.59, 0.01), ("log_px", -86.406, 0.004)):
        bound = 3 * np.hypot(mean[name].monte_carlo_error, error)
        assert abs(mean[name].mean - value) < bound
    assert -88.50 < mean["local_gaussian"].mean < -88.40


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.experiment}-{e.cell}-{e.seed}")
def test_bounds_are_in_order(entry):
    """L[q] <= L[q*] <= log p̂, within errors, and all of it is there."""
    run = make.loaded.load_run(str(entry.folder), entry.cell)
    assert len(run.measured.indices) == entry.facts["points"]
    assert not run.missing
    gaps = {name: line.mean for name, line in run.lines.items() if line.kind == "gap"}
    assert gaps
    for name, gap in gaps.items():
        assert gap.mean > -3 * np.hypot(gap.standard_error, gap.monte_carlo_error), name


def test_every_model_is_certified_or_the_reason_is_named():
    page, cells = (RESULTS / "README.md").read_text(), make.load()
    listed = page.partition("Without a certificate of at most")[2]
    for run, shown in make.models(cells).items():
        assert make.certificates(shown)[1] or re.search(f"^- [^`].*: .*`{run}`", listed, re.M)
    assert "no reason known" not in page


def certified_of(gaps, num_temperatures=25):
    """A run whose certificate is of these gaps."""
    run = a_run(2.0, 1.0)
    two_sided = {"gap": np.asarray(gaps), "gap_se": np.full(len(gaps), 0.01)}
    columns = {
        rows.INDEX: np.arange(len(gaps)),
        "lower": -two_sided["gap"],
        "upper": 0 * two_sided["gap"],
    }
    columns |= {f"{n}_se": two_sided["gap_se"] for n in ("lower", "upper")} | two_sided
    certified = make.gaps.certify(rows.parse(rows.to_json(columns), rows.LOWER, rows.UPPER))
    settings = {"evaluate.ais.num_temperatures": num_temperatures}
    return run._replace(certificate=certified, settings=settings)


def test_of_several_certificates_of_one_ais_that_of_the_most_points_is_shown():
    """Not the narrowest: where one point in ten is far off, that is the one that missed it."""
    lucky, whole = certified_of([0.0, 0.1, 0.0]), certified_of([0.0, 0.1, 0.0, 12.0])
    other = certified_of([0.0, 0.1, 0.0, 0.0, 0.0], num_temperatures=50)
    shown = make.most_certified([lucky, whole, other], [make.ais_of(lucky)])
    assert shown is whole
    assert make.certified(shown).endswith(" on 4")
    assert make.certified(make.most_certified([a_run(2.0, 1.0)], [{}])) == "–"


def test_a_bound_above_log_px_at_a_point_is_named():
    run = a_run(2.0, 1.0)
    line = run.found.lines["approximation_gap_gaussian"]
    below = np.where(np.arange(50) == 7, -3.0, line.values)
    run.found.lines["approximation_gap_gaussian"] = line._replace(
        values=below, errors=np.full(50, 0.1)
    )
    (sentence,) = make.out_of_order([make.Cell("a", "small", {0: run}, {})])
    assert "`a`, point 7, by 3.0 nats" in sentence
    assert not list(make.out_of_order([make.Cell("a", "small", {0: a_run(2.0, 1.0)}, {})]))


def test_weights_are_those_that_were_measured():
    """All together they are small, and each fits its run and what its rows say of it."""
    paths = sorted(RESULTS.glob(f"runs/*/{checkpoints.WEIGHTS}"))
    assert paths
    assert sum(path.stat().st_size for path in paths) <= published.MAX_WEIGHTS
    for path in paths:
        variables, step = checkpoints.load_variables(path.parent)
        digest = imported.digest(variables)
        evaluations = [json.loads(p.read_text()) for p in path.parent.glob("*/evaluation.json")]
        best = [e for e in evaluations if e["checkpoint"] == "best"]
        assert best
        assert {(e["step"], e["weights"]) for e in best} == {(step, digest)}


def test_no_folder_of_anybodys_machine_is_published():
    for path in RESULTS.rglob("*.json"):
        assert '"/' not in path.read_text(), path


def a_run(amortization, approximation, family="gaussian", noise=0.1, num_points=50):
    """A run whose gaps are these on average, of datapoints that differ much more among themselves."""
    rng = np.random.default_rng(0)
    log_px = rng.normal(-90, 20, num_points)
    local = log_px - approximation - rng.normal(0, noise, num_points)
    elbo = local - amortization - rng.normal(0, noise, num_points)
    columns = {rows.INDEX: np.arange(num_points), "elbo": elbo, f"local_{family}": local}
    columns |= {"ais": log_px} | {f"{n}_se": np.full(num_points, 0.01) for n in ("elbo", "ais")}
    document = {"config": {"model": {"posterior": {"name": family}}}, "data": "", "missing": ""}
    return decomposed("", rows.to_json(columns), [], document)


def cells_of(experiment, runs, scale="small"):
    """{experiment: {scale: {cell: Cell}}} of {cell: [runs of seed 0, 1, …]}."""
    cells = {
        name: make.Cell(name, scale, dict(enumerate(seeds)), {}) for name, seeds in runs.items()
    }
    return {experiment: {scale: cells}}


def judged(statement, cells):
    """At the largest scale."""
    return all_judged(statement, cells)[0]


def all_judged(statement, cells):
    (claim,) = [claim for claim in claims.CLAIMS if statement in claim.statement]
    return claims.judge(claim, cells)


@pytest.mark.parametrize(
    ("small", "large", "verdict", "number"),
    [
        ([3.0], [2.0], "confirmed", "1.00 ± "),
        ([2.0], [3.0], "not confirmed", "−1.00 ± "),
        ([2.0], [2.0], "unclear", "0.00 ± "),
        ([3.0, 3.5], [2.0, 2.0], "confirmed", "seed 1: 1.50 ± "),
        ([3.0, 2.0], [2.0, 3.0], "unclear", "seed 1: −1.00 ± "),
    ],
)
def test_a_claim_is_judged_from_the_rows(small, large, verdict, number):
    runs = {
        "encoder_200_200": [a_run(gap, 1.0) for gap in small],
        "encoder_500_500": [a_run(gap, 1.0, noise=0.2) for gap in large],
    }
    said, sentence = judged("larger encoder", cells_of("larger_encoder", runs))
    assert said == f"{verdict} at scale `small`, where 1 of 3 comparisons is measured"
    assert number in sentence
    assert sentence.endswith("; 50 points.")
    assert "in nats: seed 0: " in sentence


def test_a_generator_is_judged_by_what_the_q_it_was_trained_with_misses_elsewhere():
    def trained_with(own, approximation, other, its):
        run = a_run(2.0, approximation, own)
        noise = np.random.default_rng(1).normal(0, 0.1, 50)
        line = run.found.lines["log_px"]._replace(values=its + noise, kind="gap")
        run.found.lines[f"approximation_gap_{other}"] = line
        return [run]

    runs = {
        "binarized_mnist_gaussian": trained_with("gaussian", 2.0, "auxiliary", 0.2),
        "binarized_mnist_auxiliary": trained_with("auxiliary", 0.4, "gaussian", 20.0),
    }
    for which, verdict, number in (("FFG", "confirmed", "1"), ("AF", "not confirmed", "−0.")):
        said, sentence = judged(f"where that is {which}", cells_of("main_table", runs))
        assert said.startswith(f"{verdict} at scale")
        assert f"seed 0: {number}" in sentence


def test_often_is_more_than_half():
    names = ("binarized_mnist_gaussian", "binarized_mnist_auxiliary", "fashion_mnist_gaussian")
    for gaps, verdict in (
        ((3, 3, 1), "confirmed"),
        ((1, 1, 3), "not confirmed"),
        ((3, 1), "unclear"),
    ):
        runs = {name: [a_run(gap, 2.0)] for name, gap in zip(names, gaps, strict=False)}
        said = judged("often", cells_of("main_table", runs))[0]
        assert said.startswith(f"{verdict} at scale `small`, where")


def test_scales_are_not_compared_and_the_absent_is_not_judged():
    smaller = cells_of("larger_encoder", {"encoder_200_200": [a_run(3, 1)]})
    larger = cells_of("larger_encoder", {"encoder_500_500": [a_run(2, 1)]}, "full")
    both = {"larger_encoder": larger["larger_encoder"] | smaller["larger_encoder"]}
    for cells in ({}, smaller, larger, both):
        assert all_judged("larger encoder", cells) == [
            ("not measured yet", "it needs larger_encoder.")
        ]


def test_a_smaller_scale_has_its_say_until_all_of_a_claim_is_measured_at_a_larger_one():
    names = ("gaussian_none", "gaussian_entropy", "auxiliary_none", "auxiliary_entropy")
    gaps = {name: [a_run(2 + ("none" in name), 1, name.split("_")[0])] for name in names}
    small, full = gaps, {n: gaps[n] for n in names[:2]}
    cells = cells_of("no_annealing", full, "full")
    cells["no_annealing"] |= cells_of("no_annealing", small)["no_annealing"]
    statement = "leaves larger amortization gaps"
    said, below = (said for said, _ in all_judged(statement, cells))
    assert said == "confirmed at scale `full`, where 1 of 2 comparisons is measured"
    assert below == "confirmed at scale `small`"
    cells = cells_of("no_annealing", small, "full")
    cells["no_annealing"] |= cells_of("no_annealing", small)["no_annealing"]
    assert [said for said, _ in all_judged(statement, cells)] == ["confirmed at scale `full`"]


@pytest.mark.parametrize(
    ("gaps", "falls", "verdict"),
    [
        ((3, 2, 2.5, 3), (0, 0, 0, 0), "confirmed"),
        ((3, 4, 4.5, 5), (5, 3, 0, 9), "confirmed"),  # first, whatever the generator loses later
        ((3, 2.9, 2.8, 2.7), (0, 0, 0, 40), "not confirmed"),
        ((3, 2.9, 2.8, 2.7), (3, 2, 1, 0), "unclear"),
    ],
)
def test_what_overfits_first_has_lost_when_the_other_is_best(gaps, falls, verdict):
    runs = {}
    for share, gap, fall in zip(("1_8", "1_4", "1_2", "1"), gaps, falls, strict=True):
        run = a_run(gap, 1.0, noise=0.2)
        line = run.found.lines["log_px"]
        run.found.lines["log_px"] = line._replace(values=line.values - fall)
        runs[f"after_{share}_validation"] = [run]
    said, sentence = judged("overfits", cells_of("over_training", runs))
    assert said == f"{verdict} at scale `small`"
    at_the_end = gaps[-1] == min(gaps) and falls[-1] == min(falls)
    assert ("both are best at checkpoint 4 of 4" in sentence) == at_the_end
