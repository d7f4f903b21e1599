"""The page of results is what its code makes of the committed rows, and the rows are in order."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from infsub import checkpoints, evaluate, imported, published, records, rows, shards, subjects
from infsub import config as configs
from infsub.datapoints import map_datapoints
from infsub.keys import Stream, stream
from infsub.posteriors import FAMILIES
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


def test_a_row_of_the_page_is_what_numpy_makes_of_the_committed_rows():
    place = ("main_table", "binarized_mnist_gaussian", "full", 0)
    (entry,) = [e for e in ENTRIES if (e.experiment, e.cell, e.scale, e.seed) == place]
    with gzip.open(entry.folder / "rows.jsonl.gz", "rt") as file:
        found = [json.loads(line) for line in file]
    elbo, local, ais = (np.array([r[n] for r in found]) for n in ("elbo", "local_gaussian", "ais"))
    section = (RESULTS / "README.md").read_text().partition("### main_table")[2].splitlines()
    head, row = (
        next(line for line in section if line.startswith(start)).split(" | ")
        for start in ("| scale `full`", "| `binarized_mnist_gaussian`")
    )
    shown = dict(zip(head, row, strict=True))
    for name, gap in (
        ("approximation gap FFG", ais - local),
        ("amortization gap own q", local - elbo),
        ("inference gap", ais - elbo),
    ):
        error = gap.std(ddof=1) / np.sqrt(gap.size)
        digits = 3 if error < 0.0195 else 2
        assert shown[name].startswith(f"{gap.mean():.{digits}f} ± {error:.{digits}f} (")


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
    run = make.loaded.load_run(RESULTS / "reproduction")
    mean = {name: line.mean for name, line in run.lines.items()}
    for name, value, error in (("elbo", -90.59, 0.01), ("log_px", -86.406, 0.004)):
        bound = 3 * np.hypot(mean[name].monte_carlo_error, error)
        assert abs(mean[name].mean - value) < bound
    assert -88.50 < mean["local_gaussian"].mean < -88.40


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.experiment}-{e.cell}-{e.seed}")
def test_bounds_are_in_order(entry):
    """L[q] <= L[q*] <= log p̂, within errors, and all of it is there."""
    run = make.loaded.load_run(entry.folder, entry.cell)
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


class EntryOf(NamedTuple):
    folder: str
    facts: dict[str, Any]


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


def test_weights_of_one_epoch_are_not_certified_by_those_of_another(monkeypatch):
    epochs, runs = (
        {"early": 10, "late": 80},
        {"early": a_run(2.0, 1.0), "late": certified_of([0.1])},
    )
    entries = {name: EntryOf(name, {"run": "of_both"}) for name in epochs}
    monkeypatch.setattr(make, "epoch_of", lambda entry: epochs[entry.folder])
    settings = runs["late"].settings
    early, late = (
        make.Cell(name, "small", {0: run._replace(settings=settings)}, {0: entries[name]})
        for name, run in runs.items()
    )
    known = {"of_both": [early, late]}
    assert make.certifying(early, known) is None
    assert make.certifying(late, known) is late.run


def test_a_table_shows_the_certificate_that_the_page_shows_and_its_verdict():
    run, wide = a_run(2.0, 1.0), certified_of([3.0, 3.1, 2.9, 3.0])
    shown = make.with_certificate(run, wide)
    assert shown.lines["certificate"].values.size == 4
    assert "the AIS bound is within 3.00" in " ".join(shown.notes)
    assert "certificate" in " ".join(shown.verdicts.sentences)
    assert "certificate" not in " ".join(run.verdicts.sentences)
    assert make.with_certificate(run, None) is run


def test_what_log_px_misses_of_a_quadrature_is_said():
    run = a_run(2.0, 1.0)
    log_px = run.found.lines["log_px"]
    truth = log_px.values + np.where(np.arange(50) == 3, 5.0, 0.0)
    run.found.lines["grid"] = log_px._replace(values=truth, errors=np.zeros(50))
    (sentence,) = make.off_the_grid([make.Cell("a", "small", {0: run}, {})])
    assert "log p(x) − log p̂, in nats: 0.10 ± 0.10 (`a`)" in sentence
    assert not list(make.off_the_grid([make.Cell("a", "small", {0: a_run(2.0, 1.0)}, {})]))


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights", sorted(RESULTS.glob(f"runs/*/{checkpoints.WEIGHTS}")), ids=lambda p: p.parent.name
)
def test_published_weights_give_the_published_digits(weights, shared_dir):
    """L[q] of them, as `configs/published.py` promises: the data, the keys and the code are the same."""
    configs_of = {path: records.read_config(path) for path in weights.parent.glob("train-*")}
    folder = min(path for path, each in configs_of.items() if each.evaluate.checkpoint == "best")
    config = configs_of[folder].copy_and_resolve_references()
    config.data.dir = str(shared_dir / "data/tfds")
    root = jax.random.key(config.seed)
    source = evaluate._ours(config, weights.parent, records.read_run(folder), root)
    indices = evaluate.choose(source.points, config.evaluate)[:20]
    settings = configs.measured(config.evaluate)._replace(families=(), curve=())

    def elbo(key, x, *model, settings):
        return subjects.row(key, x, *model, settings=settings)["elbo"]  # XLA drops the rest

    found = map_datapoints(
        elbo,
        stream(root, Stream.ROWS),
        source.points.at(indices),
        source.params,
        source.subject,
        static={"settings": settings},
        indices=indices,
    )
    shown = {row["index"]: row["elbo"] for row in shards.read(folder, "rows")}
    np.testing.assert_allclose(found, [shown[i] for i in indices], atol=0.01)


def test_no_folder_of_anybodys_machine_is_published():
    for path in RESULTS.rglob("*.json"):
        assert '"/' not in path.read_text(), path


def a_run(
    amortization,
    approximation,
    family="gaussian",
    noise=0.1,
    num_points=50,
    log_px=-90.0,
    others=(),
):
    """A run whose gaps are these on average, of datapoints that differ much more among themselves.

    Of the other families the best q* are as good as its own.
    """
    rng = np.random.default_rng(0)
    log_px = rng.normal(log_px, 20, num_points)
    local = log_px - approximation - rng.normal(0, noise, num_points)
    elbo = local - amortization - rng.normal(0, noise, num_points)
    columns = {rows.INDEX: np.arange(num_points), "elbo": elbo}
    columns |= {f"local_{each}": local for each in (family, *others)}
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
    return claims.judge(claim_of(statement), cells)


def claim_of(statement):
    (claim,) = [claim for claim in claims.CLAIMS if statement in claim.statement]
    return claim


def ranked(larger, smaller, between=()):
    """{cell: 1, 0 or −1}."""
    return dict.fromkeys(larger, 1) | dict.fromkeys(between, 0) | dict.fromkeys(smaller, -1)


FFG, AF = (
    [f"{data}_{q}" for data in ("binarized_mnist", "fashion_mnist", "cifar10")]
    for q in ("gaussian", "auxiliary")
)
PLAIN = ["gaussian_none", "auxiliary_none"]
ANNEALED = ["gaussian_entropy", "auxiliary_entropy"]
FLOWS = [f"linear_{q}" for q in ("auxiliary", "rnvp", "planar", "sylvester")]
AFTER = [f"after_{share}_validation" for share in ("1_8", "1_4", "1_2", "1")]
# Of each claim which gap it is about, and where it holds the cells in which that is large, or small.
HELD = {
    "Amortization often costs more": ("amortization", ranked(FFG + AF, [])),
    "where that is FFG": ("approximation", ranked(AF, FFG)),
    "where that is AF": ("approximation", ranked(FFG, AF)),
    "A flow's parameters help": ("amortization", ranked(["linear_gaussian"], FLOWS)),
    "A larger encoder": (
        "amortization",
        ranked(
            ["encoder_200_200", "auxiliary_200_200", "conv"],
            ["encoder_500_500", "auxiliary_500_500", "conv_wide"],
        ),
    ),
    "leaves larger amortization gaps": ("amortization", ranked(PLAIN, ANNEALED)),
    "larger amortization gaps at test points": (
        "amortization",
        ranked([f"{cell}_test" for cell in PLAIN], [f"{cell}_test" for cell in ANNEALED]),
    ),
    "leaves larger approximation gaps": ("approximation", ranked(PLAIN, ANNEALED)),
    "A deeper decoder": (
        "approximation",
        ranked(["decoder_linear"], ["decoder_4x200"], between=["decoder_2x200"]),
    ),
    "is larger on test points": (
        "amortization",
        ranked(["gaussian_test", "auxiliary_test"], ["gaussian_train", "auxiliary_train"]),
    ),
    "overfits": ("amortization", ranked(AFTER[3:], AFTER[:1], between=AFTER[1:3])),
}


def test_no_claim_is_left_out():
    assert [claim_of(words) for words in HELD] == list(claims.CLAIMS)


@pytest.mark.parametrize(("sign", "verdict"), [(1, "confirmed"), (-1, "not confirmed")])
@pytest.mark.parametrize("words", HELD)
def test_a_claim_is_confirmed_where_it_holds_and_not_where_its_opposite_does(words, sign, verdict):
    gap, ranks = HELD[words]
    runs = {}
    for cell, rank in ranks.items():
        family = next((name for name in FAMILIES if name in cell), "gaussian")
        means = {"amortization": 3.0, "approximation": 3.0} | {gap: 3.0 + sign * rank}
        # A generator that gets better while its amortization gap grows, as of what overfits.
        log_px = -90.0 + sign * rank
        runs[cell] = [
            a_run(**means, family=family, log_px=log_px, others=("gaussian", "auxiliary"))
        ]
    said, _ = judged(words, cells_of(claim_of(words).experiment, runs))
    assert said == f"{verdict} at scale `small`"


@pytest.mark.parametrize(
    ("small", "large", "verdict", "number"),
    [
        ([3.0], [2.0], "confirmed", "0.997 ± 0.014"),
        ([2.0], [3.0], "not confirmed", "−1.003 ± 0.014"),
        ([2.0], [2.0], "unclear", "−0.003 ± 0.014"),
        ([3.0, 3.5], [2.0, 2.0], "confirmed", "seed 1: 1.497 ± 0.014"),
        ([3.0, 2.0], [2.0, 3.0], "unclear", "seed 1: −1.003 ± 0.014"),
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


def test_a_flow_that_found_nothing_better_than_its_start_says_nothing_of_its_family():
    def accommodating(gain):
        runs = {}
        for q, approximation in (("gaussian", 1.0), ("auxiliary", 0.4)):
            run = a_run(2.0, approximation, q, others=("gaussian", "auxiliary", "full_gaussian"))
            full = run.found.lines["local_full_gaussian"]
            noise = np.random.default_rng(2).normal(0, 0.1, 50)
            run.found.lines["local_full_gaussian"] = full._replace(
                values=full.values - gain * (q == "auxiliary") - noise
            )
            runs[f"binarized_mnist_{q}"] = [run]
        return judged("where that is AF", cells_of("main_table", runs))

    said, sentence = accommodating(gain=0.0)
    assert said.startswith("unclear at scale")
    assert "0.60 ± " in sentence
    assert "(binarized_mnist, AF found no better than full)" in sentence
    said, sentence = accommodating(gain=0.2)
    assert said.startswith("confirmed at scale")
    assert "found no better" not in sentence


def test_how_much_of_a_claim_is_measured_is_said_of_every_seed():
    of_one, of_two = [a_run(3.0, 1.0)], [a_run(3.0, 1.0)] * 2
    runs = {"gaussian_none": of_two, "auxiliary_none": of_one}
    lower = [a_run(2.0, 1.0, noise=0.2)]
    runs |= {"gaussian_entropy": 2 * lower, "auxiliary_entropy": lower}
    said, _ = judged("leaves larger amortization gaps", cells_of("no_annealing", runs))
    assert said == "confirmed at scale `small`, where 2 of 2 comparisons are measured (1 of seed 1)"


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
    assert ("seed 0: both are best at checkpoint 4 of 4; 50 points" in sentence) == at_the_end
