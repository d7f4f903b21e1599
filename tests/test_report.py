"""Reports from synthetic rows: the numbers, the files, the sentences for mistakes."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from infsub import config as configs
from infsub import files
from infsub import report as reports
from infsub.report import __main__ as command
from infsub.report import curves, figures, pictures, svg, tables
from infsub.report.runs import line_names, load_run
from infsub.rows import in_order
from infsub.types import UserError

N = 40
FILES = ("table.md", "table.csv", "table.tex", "gaps.png", "gaps.pdf", "report.html")


def make_run(
    folder, seed=0, families=("gaussian",), own="gaussian", shift=0.0, edit=None, **fields
):
    """A run with realistic rows: 20 nats of spread, gaps of about 2 nats."""
    folder.mkdir(parents=True, exist_ok=True)
    config = configs.default()
    config.model.posterior.name = own
    config.evaluate.local.families = families
    with config.unlocked():
        config.report.update(fields)
    document = {
        "config": configs.to_json(config),
        "identified": {"data identity": "digits"},
    }
    (folder / "config.json").write_text(json.dumps(document))
    rng, digits = np.random.default_rng(seed), np.random.default_rng(99)
    rows = []
    for n in range(N):
        log_px = digits.normal(-86.4, 20.0) + shift
        local = log_px - digits.gamma(4, 0.5)
        row = {"index": 7 * n, "label": n % 10, "elbo": local - rng.gamma(4, 0.55), "elbo_se": 0.2}
        for i, family in enumerate(families):
            row |= {f"local_{family}": local + 0.5 * i, f"local_{family}_se": 0.1}
            row |= {f"local_{family}_converged": True, f"local_{family}_steps": 1500}
        row |= {"iwae": log_px - 0.3, "iwae_se": 0.3, "iwae_ess": 40.0, "iwae_pareto_k": 0.5}
        row |= {"ais": log_px, "ais_se": 0.1, "ais_ess": 12.0, "ais_acceptance": 0.8}
        if n == 3:  # IWAE is the larger one here
            row["iwae"] = log_px + 1.2
        rows.append(row)
    if edit:
        edit(rows)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def column(rows, key):
    return np.array([row[key] for row in rows])


def test_report_writes_the_numbers_of_the_rows(tmp_path, capsys):
    rows = make_run(tmp_path)
    reports.report(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*FILES, "datapoints.csv", "rows.jsonl", "config.json"]
    )
    with (tmp_path / "table.csv").open() as file:
        lines = {line["quantity"]: line for line in csv.DictReader(file)}
    want = {
        "elbo": column(rows, "elbo"),
        "local_gaussian": column(rows, "local_gaussian"),
        "iwae": column(rows, "iwae"),
        "ais": column(rows, "ais"),
        "log_px": column(rows, "ais"),
        "paper_max": np.maximum(column(rows, "iwae"), column(rows, "ais")),
        "paper_max_of_means": column(rows, "ais"),
    }
    want["paper_max_lift"] = want["paper_max"] - want["log_px"]
    want["approximation_gap_gaussian"] = want["log_px"] - want["local_gaussian"]
    want["amortization_gap_gaussian"] = want["local_gaussian"] - want["elbo"]
    want["inference_gap"] = want["log_px"] - want["elbo"]
    assert list(lines) == in_order(want)
    for name, values in want.items():
        line = lines[name]
        assert float(line["mean"]) == pytest.approx(values.mean())
        assert float(line["standard_error"]) == pytest.approx(values.std(ddof=1) / np.sqrt(N))
        assert float(line["low_95"]) < values.mean() < float(line["high_95"])
        assert (line["num_datapoints"], line["seed"]) == (str(N), "0")
    monte_carlo = float(lines["amortization_gap_gaussian"]["monte_carlo_error"])
    assert monte_carlo == pytest.approx(np.hypot(0.2, 0.1) / np.sqrt(N))

    page = (tmp_path / "table.md").read_text()
    printed = capsys.readouterr().out
    mean = want["inference_gap"].mean()
    for text in (page, printed):
        assert f"| inference gap | {mean:.2f} | " in text
        assert "it lies 0.03 ± 0.03 nats above log p̂, for IWAE is the larger at 1 of 40" in text
    assert f"{N} datapoints." in page
    assert "evaluate.ais.num_temperatures=25" in page
    assert "seed=0" in page


def test_rows_without_errors_and_rows_of_an_older_version(tmp_path):
    """Older rows have a log p̂ of their own, the larger of two noisy bounds: it is not believed."""

    def age(rows):
        for row in rows:
            del row["elbo_se"]
            row |= {"log_px": max(row["iwae"], row["ais"]), "log_px_se": 0.1}

    rows = make_run(tmp_path, edit=age)
    run = load_run(tmp_path)
    np.testing.assert_array_equal(run.lines["log_px"].values, column(rows, "ais"))
    np.testing.assert_array_equal(run.lines["paper_max"].values, column(rows, "log_px"))
    assert run.lines["paper_max"].errors[[2, 3]].tolist() == [0.1, 0.3]
    assert np.isnan(run.lines["inference_gap"].mean.monte_carlo_error)
    reports.report(tmp_path)


def test_families_own_first_and_the_split_of_the_approximation_gap(tmp_path):
    make_run(tmp_path, families=("gaussian", "full_gaussian", "auxiliary"), own="auxiliary")
    run = load_run(tmp_path)
    mean = {name: line.mean.mean for name, line in run.lines.items()}
    assert run.families[0] == "auxiliary"
    assert "amortization_gap_auxiliary" in mean
    assert mean["gain_gaussian"] == pytest.approx(mean["local_gaussian"] - mean["elbo"])
    assert mean["covariance_gap"] == pytest.approx(0.5)
    split = mean["covariance_gap"] + mean["approximation_gap_full_gaussian"]
    assert split == pytest.approx(mean["approximation_gap_gaussian"])
    make_run(tmp_path, own="planar")
    assert any("planar, was not optimised locally" in n for n in load_run(tmp_path).notes)


def test_curves_are_what_local_steps_leave_and_no_lines_of_the_table(tmp_path):
    def add(rows):
        for row in rows:
            for n, share in ((10, 0.9), (0, 0.0), (3, 0.5)):
                after = row["elbo"] + share * (row["local_gaussian"] - row["elbo"])
                row |= {f"after_{n}_gaussian": after, f"after_{n}_gaussian_se": 0.3}
                row |= {
                    f"after_{n}_gaussian_encoded": after - 1,
                    f"after_{n}_gaussian_encoded_se": 0.3,
                }
            row |= {"after_0_planar": -100.0, "after_0_planar_se": 0.1}  # no L[q*] of planar
        rows[5]["after_10_gaussian"] = None

    make_run(tmp_path)
    plain = load_run(tmp_path)
    make_run(tmp_path, edit=add)
    run = load_run(tmp_path)
    curves = {(curve.family, curve.held): curve.points for curve in run.curves}
    assert curves.keys() == {("gaussian", False), ("gaussian", True)}
    fitted, held = curves["gaussian", False], curves["gaussian", True]
    assert [n for n, _ in held] == [0, 3, 10]
    np.testing.assert_allclose(held[0][1].values, fitted[0][1].values + 1)
    assert [n for n, _ in fitted] == [0, 3]
    assert {curve.label for curve in run.curves} == {"FFG", "FFG, weights held"}
    gap = plain.lines["amortization_gap_gaussian"]
    for (_, left), share in zip(fitted, (1, 0.5), strict=True):
        np.testing.assert_allclose(left.values, share * gap.values)
        np.testing.assert_allclose(left.errors, np.hypot(0.1, 0.3))
        assert left.kind == "gap"
    assert [flag.indices for flag in run.flags if "after 10 steps" in flag.text] == [[35]]
    assert tables.csv_rows([run]) == tables.csv_rows([plain])  # all datapoints, the same lines


def test_thresholds_of_the_command_line_count(tmp_path, capsys):
    make_run(tmp_path)
    strict = load_run(tmp_path, thresholds={"min_ess": 1e9, "max_pareto_k": 0.7})
    assert any("effective sample size below 1e+09" in flag.text for flag in strict.flags)
    assert strict.flags != load_run(tmp_path).flags


def test_the_cells_of_an_experiment_have_their_datapoints_beside_their_rows(tmp_path, capsys):
    cells = {name: tmp_path / name for name in ("one", "two")}
    for folder in cells.values():
        make_run(folder)
    reports.experiment("question", None, cells, tmp_path / "out")
    for folder in cells.values():
        with (folder / "datapoints.csv").open() as file:
            assert len(list(csv.DictReader(file))) == N
    assert not (tmp_path / "out" / "datapoints.csv").exists()


def test_every_datapoint_has_its_own_gaps_beside_its_bounds(tmp_path):
    rows = make_run(tmp_path, edit=lambda rows: rows[4].update(ais=None))
    text = files.csv_text(tables.datapoint_rows(load_run(str(tmp_path))))
    shown = list(csv.DictReader(io.StringIO(text)))
    assert [int(line["index"]) for line in shown] == [row["index"] for row in rows]
    of_gaps = {
        "amortization_gap_gaussian": ("local_gaussian", "elbo", np.hypot(0.1, 0.2)),
        "approximation_gap_gaussian": ("ais", "local_gaussian", np.hypot(0.1, 0.1)),
        "inference_gap": ("ais", "elbo", np.hypot(0.1, 0.2)),
    }
    left_out, row = shown.pop(4), rows.pop(4)
    assert [left_out[gap] for gap in of_gaps] == ["", "", ""]
    assert float(left_out["elbo"]) == pytest.approx(row["elbo"])
    for line, row in zip(shown, rows, strict=True):
        assert [float(line[n]) for n in row] == pytest.approx(list(map(float, row.values())))
        for gap, (upper, lower, error) in of_gaps.items():
            assert float(line[gap]) == pytest.approx(row[upper] - row[lower])
            assert float(line[f"{gap}_se"]) == pytest.approx(error)


def test_datapoints_to_look_at_are_listed_by_dataset_index(tmp_path):
    def spoil(rows):
        rows[1]["ais"] = None
        rows[2]["elbo"] = float("-inf")
        rows[4]["local_gaussian_converged"] = False
        rows[5]["ais_ess"] = 2.0
        rows[3]["iwae_pareto_k"] = rows[6]["iwae_pareto_k"] = 0.9

    make_run(tmp_path, edit=spoil)
    clean = make_run(tmp_path / "clean")
    run = load_run(tmp_path)
    texts = {flag.text: flag.indices for flag in run.flags}
    assert texts == {
        "L[q] is not finite at 1 of 40 datapoints, left out": [14],
        "AIS is not finite at 1 of 40 datapoints, left out": [7],
        "L[q*] FFG: local optimisation not converged at 1 of 38 datapoints": [28],
        "AIS: effective sample size below 4 at 1 of 38 datapoints": [35],
        "IWAE: Pareto k above 0.7 at 2 of 38 datapoints": [21, 42],
    }
    others = [row for row in clean if row["index"] not in (7, 14)]
    np.testing.assert_array_equal(run.lines["elbo"].values, column(others, "elbo"))
    reports.report(tmp_path)
    assert (
        "- AIS is not finite at 1 of 40 datapoints, left out: 7\n"
        in (tmp_path / "table.md").read_text()
    )
    with (tmp_path / "datapoints.csv").open() as file:
        looks = {
            int(row["index"]): row["look_at"] for row in csv.DictReader(file) if row["look_at"]
        }
    assert sorted(looks) == [7, 14, 21, 28, 35, 42]
    assert looks[21] == looks[42] == "IWAE: Pareto k above 0.7"
    make_run(tmp_path, edit=spoil, min_ess=1.5, max_pareto_k=0.95)
    assert len(load_run(tmp_path).flags) == 3  # thresholds are the config's


def test_of_many_datapoints_to_look_at_the_page_names_the_first(tmp_path):
    make_run(tmp_path, min_ess=100.0)
    (line,) = [
        line
        for line in tables.document([load_run(tmp_path)]).splitlines()
        if line.startswith("- AIS: effective")
    ]
    listed, _, more = line.partition(" and ")
    assert [int(text) for text in listed.split(": ")[2].split(", ")] == list(range(0, 140, 7))
    assert more == "20 more"


def test_bounds_out_of_order_and_an_estimator_that_failed_are_said(tmp_path):
    def spoil(rows):
        for row in rows:
            row["elbo"] = row["ais"] + 1
            row["iwae"] = None

    make_run(tmp_path, edit=spoil)
    run = load_run(tmp_path)
    assert any("Negative" in n and "amortization gap FFG" in n for n in run.notes)
    assert [f.text for f in run.flags] == ["IWAE is finite nowhere, left out"]
    assert "iwae" not in run.lines


def test_quadrature_is_a_line_without_monte_carlo_error(tmp_path):
    def add(rows):
        for row in rows:
            row |= {"grid": row["ais"] - 0.1, "grid_error": 1e-4}
        rows[2]["grid_error"] = 0.02
        rows[4]["grid"] = None

    make_run(tmp_path, edit=add)
    run = load_run(tmp_path)
    assert {flag.text: flag.indices for flag in run.flags} == {
        "log p(x), grid is not finite at 1 of 40 datapoints, left out": [28],
        "log p(x), grid: difference of half the cells above 0.01 nats at 1 of 39 datapoints": [14],
    }
    grid, log_px = run.lines["grid"], run.lines["log_px"]
    np.testing.assert_allclose(grid.values, log_px.values - 0.1)
    (line,) = [line for line in tables.markdown([run]) if line.startswith("| log p(x), grid |")]
    assert f"| {grid.mean.mean:.2f} | {grid.mean.standard_error:.2f} | 0 |" in line
    check_latex(tables.latex([run, run._replace(name="b")]))


def test_certificate_is_one_sentence(tmp_path):
    make_run(tmp_path)
    gap = [0.02, 0.10, 0.06, None]
    lines = [{"index": i, "lower": -90.0, "upper": g and -90 + g} for i, g in enumerate(gap)]
    (tmp_path / "bdmc.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = load_run(tmp_path)
    assert "On simulated data the AIS bound is within 0.06 ± 0.02 nats" in run.notes[-1]
    assert run.flags[-1].indices == [3]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-88.449, 0.031, "-88.45(3)"),
        (-88.449, 0.014, "-88.449(14)"),
        (2.043, 0.0961, "2.04(10)"),
        (2.043, 0.091, "2.04(9)"),
        (-90.59, 2.1, "-91(2)"),
        (-90.59, 1.2, "-90.6(12)"),
        (-1234.5, 23.0, "-1234(23)"),
        (1.0, float("nan"), "1.00"),
        (1.0, 0.0, "1.00"),
        (-0.003, 0.03, "0.00(3)"),
    ],
)
def test_in_parentheses(value, error, text):
    assert tables.in_parentheses(value, error) == text


def test_bold_only_beyond_two_paired_standard_errors(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", shift=0.05)  # ahead by 0.05 at every datapoint of 20 nats of spread

    def best(*names):
        return tables.best_runs([load_run(tmp_path / name) for name in names])

    found = best("a", "b")
    assert found["ais"] == {1}
    assert "approximation_gap_gaussian" not in found  # equal
    make_run(tmp_path / "c", shift=0.05, edit=lambda rows: rows.pop())
    assert "ais" not in best("a", "c")  # other datapoints: unpaired, far from significant
    make_run(tmp_path / "d", shift=50)
    document = json.loads((tmp_path / "d/config.json").read_text())
    document["identified"]["data identity"] = "clothes"
    (tmp_path / "d/config.json").write_text(json.dumps(document))
    assert best("a", "d") == {}  # other data: not compared
    assert best("a", "b", "d")["ais"] == {1}

    def wins_half(rows):
        for row in rows[::2]:
            row["elbo"] += 1

    make_run(tmp_path / "e", edit=wins_half)
    make_run(tmp_path / "f", edit=lambda rows: [row.update(elbo=row["elbo"] + 0.4) for row in rows])
    assert best("a", "e", "f").get("elbo") is None  # ahead of a, but e and f are not told apart
    gap = "amortization_gap_gaussian"
    assert best("a", "e")[gap] == {1}  # of gaps the smaller is better


def test_join_writes_one_table_and_one_figure(tmp_path, capsys):
    make_run(tmp_path / "runs_1/ffg", families=("gaussian", "auxiliary"))
    make_run(tmp_path / "af", families=("auxiliary",), own="auxiliary", shift=1.0)
    out = tmp_path / "new" / "tables"
    arguments = ["--workdirs", str(tmp_path / "runs_1/ffg"), f"100% AF_2={tmp_path / 'af'}"]
    assert command.main([*arguments, "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(FILES[:-1])  # a page is of one run
    page = (out / "table.md").read_text()
    assert "| nats | ffg | 100% AF_2 |" in page
    assert re.search(r"\| AIS \| -\d+\.\d+\(\d+\) \| \*\*-\d+\.\d+\(\d+\)\*\* \|", page)
    assert re.search(r"\| L\[q\*\] FFG \| -\d+\.\d+\(\d+\) \| – \|", page)
    assert f"| datapoints | {N} | {N} |" in page
    assert re.search(r"100% AF_2: 40 datapoints, .*model.posterior.name=auxiliary", page)
    assert capsys.readouterr().out.startswith("| nats | ffg |")

    assert command.main(["--workdirs", str(tmp_path / "af"), str(tmp_path / "af")]) == 2
    assert "NAME=DIR" in capsys.readouterr().err
    assert command.main(["--workdirs", str(tmp_path / "nowhere"), "--out", str(out)]) == 2
    assert "nowhere" in capsys.readouterr().err
    both = [
        "--workdirs",
        str(tmp_path / "nowhere"),
        str(tmp_path / "af"),
        "--out",
        str(out / "of_one"),
    ]
    assert command.main(both) == 1
    assert "nowhere is left out: " in capsys.readouterr().err
    assert (out / "of_one/table.md").exists()
    a_file = tmp_path / "af/rows.jsonl"
    assert command.main(["--workdirs", str(tmp_path / "af"), "--out", str(a_file)]) == 2
    assert "rows.jsonl cannot be written to" in capsys.readouterr().err


def check_latex(text):
    """Braces and environments match, every row has the columns that were declared."""
    unescaped = re.sub(r"\\[\\{}$&%#_^]", "", text)
    assert unescaped.count("$") % 2 == 0
    assert re.search(r"[_^#~]", re.sub(r"\$[^$]*\$", "", unescaped)) is None
    depth = 0
    for character in unescaped:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text)[::-1]
    columns = re.search(r"\\begin{tabular}{(\w+)}\n(.*)\\end{tabular}", text, re.DOTALL)
    assert columns
    rules = [r"\toprule", r"\midrule", r"\bottomrule"]
    rows = [line for line in columns[2].splitlines() if line not in rules]
    for row in rows:
        assert row.endswith(r" \\")
        assert len(re.split(r"(?<!\\)&", row)) == len(columns[1])
    return rows


def latex_runs(tmp_path):
    make_run(tmp_path / "a", families=("gaussian", "full_gaussian"))
    make_run(tmp_path / "b", shift=0.5)
    return [load_run(tmp_path / "a", "50% {x} & #1_a\\^~$"), load_run(tmp_path / "b")]


def test_latex_is_well_formed(tmp_path):
    runs = latex_runs(tmp_path)
    for text in (tables.latex(runs), tables.latex(runs[:1])):
        rows = check_latex(text)
        assert len(rows) == 17
        assert text.isascii()
        assert "evaluate.iwae\\_samples=5000" in text
        caption = re.search(r"\\caption{(.*)}\n\\label{tab:gaps}", text)
        assert caption
        assert len(caption[1]) < 400  # settings and verdicts are comments above
    assert re.search(r"\$\\mathbf{-\d+\.\d+\(\d+\)}\$", tables.latex(runs))


def test_a_latex_cell_is_the_number_of_its_own_run(tmp_path):
    runs = latex_runs(tmp_path)
    _, *body, _ = check_latex(tables.latex(runs))
    for name, row in zip(line_names(runs), body, strict=True):
        _, *cells = re.sub(r"\\mathbf|[${}]| \\\\", "", row).split(" & ")
        lines = [run.lines.get(name) for run in runs]
        assert cells == [
            tables.in_parentheses(line.mean.mean, line.error) if line else "--" for line in lines
        ]


def test_names_are_kept_out_of_the_tables_markup(tmp_path):
    runs = [
        run._replace(name=name)
        for run, name in zip(latex_runs(tmp_path), ("q(z|x)", "β<2"), strict=True)
    ]
    head = tables.markdown(runs)[0]
    assert head == r"| nats | q(z\|x) | β<2 |"
    assert tables.difference_tables(runs)[1].startswith(r"| β<2 − q(z\|x), paired |")
    text = tables.latex(runs)
    assert r"q(z\textbar{}x) & β\textless{}2" in text
    assert text.startswith("% for xelatex or lualatex")


@pytest.mark.parametrize("num_runs", [2, 4])
def test_latex_passes_a_parser(tmp_path, num_runs):
    walker = pytest.importorskip("pylatexenc.latexwalker")
    text = tables.latex((latex_runs(tmp_path) * 2)[:num_runs], "decoder_size")
    assert r"\label{tab:decoder-size}" in text
    if num_runs > 3:  # too wide for a page, they are made to fit
        assert text.startswith(r"% \usepackage{booktabs,adjustbox}")
        text = re.sub(r"\\(begin|end){adjustbox}({max width=\\textwidth})?\n", "", text)
        assert text.count(r"\rotatebox{90}{") == num_runs
    nodes, _, _ = walker.LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
    table = next(n for n in nodes if n.isNodeType(walker.LatexEnvironmentNode))
    inner = [n.environmentname for n in table.nodelist if n.isNodeType(walker.LatexEnvironmentNode)]
    assert (table.environmentname, inner) == ("table", ["tabular"])


def test_a_bar_goes_from_the_elbo_over_the_local_bound_to_log_px(tmp_path):
    make_run(tmp_path, families=("gaussian", "full_gaussian"))
    run = load_run(tmp_path)
    gap = {n: line.mean for n, line in run.lines.items() if line.kind == "gap"}
    boundary = -gap["approximation_gap_gaussian"].mean
    for runs in ([run], [run, run._replace(name="other")]):
        axes = figures.gap_figure(runs).axes
        assert len(axes) == (2 if len(runs) == 1 else 1)  # datapoints only of a single run
        bars = [
            bar.get_window_extent().transformed(axes[0].transData.inverted())
            for bar in axes[0].patches
        ]
        want = [(-gap["inference_gap"].mean, boundary), (boundary, 0)] * len(runs)
        np.testing.assert_allclose([bar.intervalx for bar in bars], want, atol=1e-9)
        texts = [text.get_text() for text in axes[0].texts]
        amortization = gap["amortization_gap_gaussian"]
        assert f"{amortization.mean:.2f} ± {amortization.standard_error:.2f}" in texts
        assert "L[q*] full" in texts
        assert ("other" in texts) == (len(runs) == 2)


def test_a_gap_that_is_not_split_is_drawn_as_one(tmp_path):
    """Of an encoder whose own family's q* was not found FFG's is a mark, and no part of the gap."""
    make_run(tmp_path, own="auxiliary")
    run = load_run(str(tmp_path))
    bar_axes, stairs_axes = figures.gap_figure([run]).axes
    (bar,) = bar_axes.patches
    inference = run.lines["inference_gap"]
    assert bar.get_width() == pytest.approx(inference.mean.mean)
    assert [text.get_text() for text in bar_axes.get_legend().get_texts()] == ["inference gap"]
    assert len(stairs_axes.patches) == 1
    drawn = svg.gap_figure(run.found)
    assert set(re.findall(r'class="(\w+)"', drawn)) & {"amortization", "approximation"} == set()
    assert "inference gap <b>" in drawn
    assert "no q* of the encoder's own family was found" in drawn
    assert "L[q*]" not in drawn.partition("<figcaption>")[0]


def test_the_bar_of_a_page_has_its_gaps_in_proportion_and_by_their_names(tmp_path):
    make_run(tmp_path)
    run = load_run(str(tmp_path))
    text = svg.gap_figure(run.found)
    named = re.findall(r'<li class="(\w+)">(\w+) gap <b>(.*?)</b> ± (.*?)</li>', text)
    widths = re.findall(r'<rect class="(\w+)" x=".*?" width="(.*?)%"', text)
    whole = run.lines["inference_gap"].mean.mean
    for kind, key, width in zip(("amortization", "approximation"), named, widths, strict=True):
        gap = run.lines[f"{kind}_gap_gaussian"].mean
        assert key == (kind, kind, f"{gap.mean:.2f}", f"{gap.standard_error:.2f}")
        assert width == (kind, f"{100 * gap.mean / whole:.2f}")


def test_a_family_that_is_far_off_is_an_arrow_and_leaves_the_bars_their_room(tmp_path):
    def far_off(rows):
        for row in rows:
            row["local_full_gaussian"] -= 1000.0

    make_run(tmp_path, families=("gaussian", "full_gaussian"), edit=far_off)
    run = load_run(tmp_path)
    inference = run.lines["inference_gap"].mean.mean
    bound = run.lines["local_full_gaussian"].mean.mean
    axes = figures.gap_figure([run]).axes[0]
    assert -3 * inference < axes.get_xlim()[0] < -2 * inference
    (arrow,) = (text for text in axes.texts if text.get_text().startswith("←"))
    assert arrow.get_text() == f"← L[q*] full −{-bound:.1f}"
    ends = arrow.get_window_extent().transformed(axes.transData.inverted()).intervalx
    assert axes.get_xlim()[0] <= ends[0] < ends[1] < -inference


def test_runs_on_other_data_have_an_axis_of_their_own(tmp_path):
    make_run(tmp_path)
    run = load_run(tmp_path)
    other = run._replace(name="other", settings=run.settings | {"data.name": "cifar10"})
    axes = figures.gap_figure([run, other, run]).axes
    assert [len(each.patches) for each in axes] == [4, 2]
    assert [each.get_xlabel().rpartition(", ")[2] for each in axes] == ["mnist5k", "cifar10"]


def test_figure_files_are_a_column_wide_and_repeatable(tmp_path):
    make_run(tmp_path)
    run = load_run(tmp_path)
    image = Image.open(io.BytesIO(figures.encode(figures.gap_figure([run]), "png")))
    assert image.width == pytest.approx(3.4 * 300, abs=1)
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for color in ((0, 0x72, 0xB2), (0xF0, 0xB4, 0x30)):
        assert np.mean(np.all(pixels == color, axis=-1)) > 0.03
    pdf = figures.encode(figures.gap_figure([run, run]), "pdf")
    assert pdf.startswith(b"%PDF")
    assert b"CreationDate" not in pdf
    assert pdf == figures.encode(figures.gap_figure([run, run]), "pdf")
    make_run(tmp_path, edit=lambda rows: rows.__delitem__(slice(1, None)))
    one = load_run(tmp_path)  # one datapoint: its errors are NaN
    assert figures.encode(figures.gap_figure([one]), "png")


def test_no_text_under_a_bar_meets_another_or_a_mark():
    rng, limits = np.random.default_rng(0), (-10.0, 1.0)
    per_nat = figures._per_nat(limits)
    for _ in range(200):
        marks = sorted((x, "L[q*] FFG −93.7"[: rng.integers(5, 15)]) for x in rng.uniform(-9, 0, 6))
        places = figures._place(marks, limits)
        spans = []
        for (x, text), (line, align) in zip(marks, places, strict=True):
            width = figures._points(text, figures.SMALL)
            left = x * per_nat - (width if align == "right" else width / 2)
            spans.append((line, left, left + width))
        for n, (line, left, right) in enumerate(spans):
            for m, (other, start, end) in enumerate(spans):
                if m != n and other == line:
                    assert end <= left or right <= start
                if m != n and other > line:
                    assert not left < marks[m][0] * per_nat < right


def test_a_long_foot_stays_inside_the_figure():
    figure = figures.Figure(figsize=(figures.WIDTH, 2))
    figures.write_foot(figure, "Mean over 50 datapoints of " + "binarized_mnist test, " * 9)
    figure.draw_without_rendering()
    (foot,) = figure.texts
    assert foot.get_window_extent().x1 < figure.bbox.x1


def drawn_lines(axes):
    """{name: (x, y)} of an axes' lines with error bars."""
    lines = {container.get_label(): container[0] for container in axes.containers}
    return {name: (list(line.get_xdata()), list(line.get_ydata())) for name, line in lines.items()}


def test_curves_against_a_setting_have_a_line_for_each_kind(tmp_path):
    runs = []
    for own, at, shift in (("gaussian", 4, 0.0), ("auxiliary", 2, 1.0), ("gaussian", 1, 2.0)):
        folder = tmp_path / f"{own}_{at}"
        make_run(folder, own=own, families=(own,), shift=shift)
        gap = [{"index": i, "lower": -90.0, "upper": at * (0.1 + 0.01 * i) - 90} for i in range(3)]
        (folder / "bdmc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gap))
        run = load_run(folder)
        runs.append(run._replace(settings=run.settings | {"evaluate.checkpoint": f"epoch_{at}"}))
    kinds = ("model.posterior.name",)
    figure = curves.curve_figure(runs, "evaluate.checkpoint", ("ais", "certificate"), kinds)
    above, below = (drawn_lines(axes) for axes in figure.axes)
    ais = [run.lines["ais"].mean.mean for run in runs]
    assert above == {"FFG": ([1, 4], [ais[2], ais[0]]), "AF": ([2], [ais[1]])}
    assert below["FFG"][1] == pytest.approx([0.11, 0.44])
    for axes, name in zip(figure.axes, ("ais", "certificate"), strict=True):
        (bars,) = axes.containers[0][2]
        errors = [runs[n].lines[name].mean.standard_error for n in (2, 0)]
        assert [np.ptp(bar[:, 1]) / 2 for bar in bars.get_segments()] == pytest.approx(errors)
    assert figure.axes[1].get_xlabel() == "epochs"
    assert "over 3 datapoints that each model simulates" in " ".join(
        text.get_text().replace("\n", " ") for text in figure.texts
    )


def test_curves_are_of_the_encoders_own_family_or_say_what_is_missing(tmp_path):
    y = ("amortization_gap_{family}",)
    figure = {"kind": "curves", "x": "evaluate.checkpoint", "y": y, "lines": ("seed",)}
    make_run(tmp_path, own="auxiliary", families=("auxiliary",))
    run = load_run(str(tmp_path))
    runs = [run._replace(settings=run.settings | {"evaluate.checkpoint": "epoch_2"})]
    (axes,) = reports.draw(runs, figure, {}).axes
    ((_, heights),) = drawn_lines(axes).values()
    assert heights == [run.lines["amortization_gap_auxiliary"].mean.mean]
    make_run(tmp_path, own="auxiliary")
    said = reports.draw([load_run(str(tmp_path))], figure, {})
    assert said == "no figure (no run has amortization gap AF)"


def test_steps_are_drawn_down_to_what_they_leave(tmp_path):
    def add(rows):
        for row in rows:
            row |= {"after_3_rnvp": row["local_rnvp"] - 0.5, "after_3_rnvp_se": 0.1}
            row |= {"after_0_rnvp": row["local_rnvp"] - 2, "after_0_rnvp_se": 0.1}
            row |= {"after_0_rnvp_encoded": row["local_rnvp"] - 2, "after_0_rnvp_encoded_se": 0.1}

    make_run(tmp_path, own="rnvp", families=("rnvp",), edit=add)
    (axes,) = curves.step_figure([load_run(tmp_path, "flow")]).axes
    lines = drawn_lines(axes)
    assert lines.keys() == {"flow: RNVP", "flow: RNVP, weights held"}
    assert lines["flow: RNVP"] == ([0, 3], pytest.approx([2, 0.5]))
    assert lines["flow: RNVP, weights held"] == ([0], pytest.approx([2]))


def densities():
    """What `posteriors.npz` holds, of two datapoints: q* full is the truth, the others FFG of it."""
    steps = (np.arange(40) + 0.5) / 10 - 2
    z = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1)
    truth = np.exp(-0.5 * (z[..., 0] ** 2 + ((z[..., 1] - 0.9 * z[..., 0]) / 0.4) ** 2))
    truth /= truth.sum() * 0.1**2
    gaussian = np.exp(-0.5 * np.sum((z / 0.4) ** 2, axis=-1)) / (2 * np.pi * 0.4**2)
    low = np.array([[-2, -2], [1, 5]])
    return {
        "indices": np.array([4, 9]),
        "images": np.random.default_rng(0).random((2, 28, 28, 1)),
        "families": ["auxiliary", "gaussian", "full_gaussian", "auxiliary"],
        "log_px": np.array([-90.0, -100.0]),
        "low": low,
        "width": np.full(2, 4.0),
        "truth": np.stack([truth, truth]),
        "bounds": np.array([[-91.5, -90.5, -90.0, -90.1], [-103.0, -100.25, -100.0, -100.0]]),
        "densities": np.stack([[gaussian, gaussian, truth, truth]] * 2),
    }


def test_posteriors_are_drawn_where_they_lie():
    arrays = densities()
    figure = pictures.picture_figure({"a": arrays}, "0")
    panels = np.array(figure.axes).reshape(2, 6)
    assert [axes.get_title() for axes in panels[0]] == [
        *("x", "p(z|x)", "q(z|x) AF", "q* FFG", "q* full", "q* AF")
    ]
    assert [axes.get_xlabel() for axes in panels[1, 1:]] == [
        *("log p(x) −100.0", "KL ≤ 3.00 nats", "KL 0.25 nats", "KL 0.00 nats", "KL ≤ 0.00 nats")
    ]
    np.testing.assert_array_equal(panels[1, 0].images[0].get_array(), arrays["images"][1, ..., 0])
    drawn = panels[1, 1].images[0]
    assert drawn.get_extent() == [1, 5, 5, 9]
    assert drawn.origin == "lower"
    np.testing.assert_array_equal(drawn.get_array(), arrays["truth"][1].T)
    histogram = panels[0, 3].images[0].get_array()  # smoothed, its mass kept
    assert np.sum(histogram) == pytest.approx(np.sum(arrays["densities"][0, 1]), rel=1e-3)
    np.testing.assert_allclose(histogram, arrays["densities"][0, 1].T, atol=0.05)
    assert len({axes.images[0].get_clim() for axes in panels[0, 1:]}) == 1
    # Along a line of the truth its density is the same, and half of its mass, or 95 %, lies within.
    (lines,) = panels[0, 3].collections
    truth = arrays["truth"][0]
    levels = lines.levels
    held = [truth[truth > level].sum() * 0.1**2 for level in levels]
    np.testing.assert_allclose(held, [0.95, 0.5], atol=0.02)
    for path, level in zip(lines.get_paths(), levels, strict=True):
        z_1, z_2 = path.vertices.T
        density = np.exp(-0.5 * (z_1**2 + ((z_2 - 0.9 * z_1) / 0.4) ** 2)) * truth.max()
        np.testing.assert_allclose(density, level, rtol=0.1)


def test_posteriors_of_what_is_no_image_are_drawn_beside_its_index():
    arrays = {name: array for name, array in densities().items() if name != "images"}
    axes = pictures.picture_figure({"a": arrays}, "0").axes[0]
    assert not axes.images
    assert [text.get_text() for text in axes.texts] == ["4"]


def test_several_models_share_a_page():
    """Of each the datapoints where q loses most, under its own names of the columns."""
    arrays = densities()
    five = {
        name: np.concatenate([array, array, array[:1]]) if name != "families" else array
        for name, array in arrays.items()
    }
    few = five | {
        "families": ["gaussian", "full_gaussian"],
        "bounds": five["bounds"][:, 1:3],
        "densities": five["densities"][:, 1:3],
    }
    figure = pictures.picture_figure({"AF": five, "FFG": few}, "0")
    panels = np.array(figure.axes).reshape(8, 6)
    blank = [""] * 3
    named = [axes.get_ylabel() for axes in panels[:, 0]]
    assert named == ["AF model", *blank, "FFG model", *blank]
    assert [axes.get_title() for axes in panels[4]] == [
        *("x", "p(z|x)", "q(z|x) FFG", "q* full", "", "")
    ]
    kls = [axes.get_xlabel() for axes in panels[:, 2]]
    assert kls[:4] == ["KL ≤ 3.00 nats", "KL ≤ 3.00 nats", "KL ≤ 1.50 nats", "KL ≤ 1.50 nats"]
    assert kls[4:] == ["KL 0.50 nats", "KL 0.50 nats", "KL 0.50 nats", "KL 0.25 nats"]


def test_posteriors_are_files_of_the_report(tmp_path, capsys):
    make_run(tmp_path)
    files.write_npz(tmp_path / "posteriors.npz", densities())
    reports.report(tmp_path)
    assert ", posteriors.png, posteriors.pdf, report.html in" in capsys.readouterr().out
    image = Image.open(io.BytesIO((tmp_path / "posteriors.png").read_bytes()))
    assert image.width == pytest.approx(6.75 * 300, abs=1)
    assert (tmp_path / "posteriors.pdf").read_bytes().startswith(b"%PDF")
    out = tmp_path / "experiment"
    reports.experiment("Where?", {"kind": "posteriors"}, {"a": tmp_path}, out)
    same = (out / "posteriors.png").read_bytes()
    assert same == (tmp_path / "posteriors.png").read_bytes()
    assert not (out / "gaps.png").exists()
    assert not (out / "report.html").exists()
    arrays = densities()  # as of a user's own images, [N, H, W]
    arrays["images"] = arrays["images"][..., 0]
    files.write_npz(tmp_path / "posteriors.npz", arrays)
    reports.report(tmp_path)
    assert same == (tmp_path / "posteriors.png").read_bytes()
    whole = (tmp_path / "posteriors.npz").read_bytes()
    for torn in (whole[:1000], b""):
        (tmp_path / "posteriors.npz").write_bytes(torn)
        with pytest.raises(UserError, match=r"posteriors\.npz is torn .*evaluate the run again"):
            reports.report(tmp_path)


@pytest.mark.parametrize("missing", ["matplotlib", "log_px"])
def test_without_a_figure_the_tables_are_still_written(tmp_path, capsys, monkeypatch, missing):
    def strip(rows):
        for row in rows:
            for key in ("iwae", "ais"):
                del row[key]

    if missing == "matplotlib":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        make_run(tmp_path)
    else:
        make_run(tmp_path, edit=strip)
    reports.report(tmp_path)
    assert (tmp_path / "table.tex").exists()
    assert not (tmp_path / "gaps.png").exists()
    assert "no figure (" in capsys.readouterr().out


def rewrite(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "rows.jsonl").unlink(), "rows.jsonl is missing or has no"),
        (rewrite("rows.jsonl", ""), "no complete row; evaluate the run first"),
        (rewrite("rows.jsonl", '{"index": 3, "el'), "no complete row"),
        (
            rewrite("rows.jsonl", '{"index": 1, "elbo": 1}\n{"ind\n{"index": 2}\n'),
            "line 2, is no JSON",
        ),
        (rewrite("rows.jsonl", '{"index": 1}\n'), "line 1 must be a JSON object with index and"),
        (rewrite("rows.jsonl", '{"index": 1, "elbo": "low"}\n'), "elbo must be a number"),
        (rewrite("rows.jsonl", '{"index": 1, "elbo": null}\n'), "no datapoint whose bounds are"),
        (rewrite("config.json", "{"), "config.json cannot be read as JSON"),
        (
            rewrite("config.json", "[]"),
            "config.json is not as infsub writes it (it is no JSON object)",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(tmp_path, spoil, said):
    make_run(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        reports.report(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / name).exists() for name in FILES)


def test_the_order_of_the_rows_does_not_matter(tmp_path):
    make_run(tmp_path)
    want = load_run(tmp_path)
    make_run(tmp_path, edit=lambda rows: rows.reverse())  # as several workers may write them
    got = load_run(tmp_path)
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_array_equal(got.lines["ais"].values, want.lines["ais"].values)


def test_a_torn_last_row_and_rows_evaluated_twice(tmp_path):
    rows = make_run(tmp_path)
    again = rows[5] | {"elbo": -300.0}
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps(again) + '\n{"index": 1000, "elbo": -9')
    run = load_run(tmp_path)
    assert run.indices.tolist() == [7 * n for n in range(N)]
    assert run.lines["elbo"].values[5] == -300


def test_a_tilde_is_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(command, "join", lambda workdirs, out: os.mkdir(out) or {})
    assert command.main(["--workdirs", "run", "--out=~/tables"]) == 0
    assert (tmp_path / "tables").exists()
