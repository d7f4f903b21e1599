"""The page of a run: what it holds, and what a browser shows of it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import infsub
from infsub import thumbnails
from infsub.report import page, runs

N = 120
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\">&'\u2028$style ${data}"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def make_run(num_points=N, seed=0, name="run", without=()):
    """A run of rows as an evaluation writes them; the fourth has no AIS, two labels are hostile."""
    rng = np.random.default_rng(seed)
    log_px = rng.normal(-86.4, 20.0, num_points)
    local = log_px - rng.gamma(4, 0.5, num_points)
    elbo = local - rng.gamma(4, 0.55, num_points)
    columns = {
        "index": 7 * np.arange(num_points),
        "label": [HOSTILE if n % 60 == 59 else int(n) % 5 for n in range(num_points)],
        "elbo": elbo,
        "elbo_se": np.full(num_points, 0.2),
        "local_gaussian": local,
        "local_gaussian_se": np.full(num_points, 0.1),
        "local_gaussian_steps": np.full(num_points, 900),
        "local_gaussian_converged": np.arange(num_points) % 40 != 5,
        "ais": np.where(np.arange(num_points) == 3, np.nan, log_px),
        "ais_se": np.full(num_points, 0.1),
        "ais_ess": np.full(num_points, 12.0),
        "ais_acceptance": np.full(num_points, 0.8),
    }
    listed = {
        key: np.asarray(values, object).tolist()
        for key, values in columns.items()
        if not key.startswith(without)
    }
    measured = [dict(zip(listed, row, strict=True)) for row in zip(*listed.values(), strict=True)]
    document = {"config": {"seed": name}, "data": "", "missing": ""}
    return runs.decomposed(name, measured, [], document)


def judged(run, sentence, points):
    """The run with other verdicts."""
    verdicts = run.verdicts._replace(sentences=[sentence], points=points)
    return run._replace(verdicts=verdicts)


def data_of(html):
    """What the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def column(data, key):
    (found,) = [c for c in data["columns"] if c["key"] == key]
    return found


def test_a_row_has_the_numbers_of_its_datapoint():
    run = make_run()
    data = data_of(page.document(run))
    bound = {name: run.measured.columns[name].values for name in ("elbo", "local_gaussian", "ais")}
    kept = np.where(np.arange(N) == 3, np.nan, 1)  # a datapoint with one infinite bound has no gap
    for key, want in {
        **bound,
        "inference_gap": bound["ais"] - bound["elbo"],
        "amortization_gap_gaussian": kept * (bound["local_gaussian"] - bound["elbo"]),
        "approximation_gap_gaussian": bound["ais"] - bound["local_gaussian"],
    }.items():
        got = np.array(column(data, key)["values"], float)
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert column(data, "inference_gap")["errors"][0] == pytest.approx(np.hypot(0.1, 0.2), abs=1e-4)
    assert column(data, "index")["values"] == run.measured.indices.tolist()
    assert column(data, "local_gaussian_converged")["values"][5] == 0
    flagged = [[data["flags"][f] for f in flags] for flags in column(data, "flags")["values"]]
    assert flagged[3] == ["AIS is not finite, left out"]
    assert flagged[5] == ["L[q*] FFG: local optimisation not converged"]
    assert [bool(flags) for flags in flagged] == [n == 3 or n % 40 == 5 for n in range(N)]


def test_the_tables_numbers_are_the_lines():
    run = make_run()
    html = page.document(judged(run, "It is fine.", run.verdicts.points))
    mean = run.lines["inference_gap"].mean
    row = re.search(r'<tr class="gap"><th scope="row">inference gap</th>(.*?)</tr>', html)
    assert row is not None
    cells = re.findall("<td>(.*?)</td>", row[1])
    assert cells[:2] == [f"{mean.mean:.2f}", f"{mean.standard_error:.2f}"]
    assert "It is fine." in html
    assert "<p>Settings: seed=run.</p>" in html
    assert all(note in html for note in run.notes)


def test_the_gaps_of_a_label_are_its_datapoints():
    run = make_run()
    html = page.document(run)
    inference = run.lines["inference_gap"].values
    kept = [n for n in range(N) if n != 3]
    of_two = [inference[i] for i, n in enumerate(kept) if n % 5 == 2]
    row = re.search(r'data-label="2">2</button> <small>× (\d+)</small></th>\s*<td>([\d.]+)', html)
    assert row is not None
    assert (int(row[1]), float(row[2])) == (len(of_two), pytest.approx(np.mean(of_two), abs=0.01))


def test_what_users_have_named_is_text():
    run = judged(make_run(name=HOSTILE), HOSTILE, [HOSTILE] * N)
    html = page.document(run, xs=[np.array([HOSTILE] * N, object)])
    assert html.count("</script>") == 2  # the data's and the page's own
    assert "<img" not in html
    data = data_of(html)
    assert column(data, "label")["values"][59] == HOSTILE
    assert column(data, "verdict")["values"] == data["words"] == [HOSTILE] * N


def test_a_page_asks_for_nothing():
    run = make_run(without=("label",))
    html = page.document(run)
    assert "default-src 'none'" in html
    assert not re.search(r"(?:src|href)=[\"']?(?!data:)[\w/.]", html)
    assert "http" not in html.replace("http-equiv", "")


def decode(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


@pytest.mark.parametrize(
    "shape", [(28, 28), (28, 28, 1), (1, 28, 28), (784,), (32, 32, 3), (3, 32, 32)]
)
@pytest.mark.parametrize("kind", ["binary", "grey", "bytes"])
def test_images_are_drawn(shape, kind):
    rng = np.random.default_rng(0)
    xs = rng.random((N, *shape))
    xs = {"binary": np.round(xs), "grey": xs, "bytes": np.uint8(255 * xs)}[kind]
    run = make_run()
    data = data_of(page.document(run, xs={"x": xs}))
    want = xs[7] if kind == "bytes" else 255 * xs[7]
    if 3 in shape:
        want = np.moveaxis(want, 0, -1) if shape[0] == 3 else want
    else:
        want = np.stack(3 * [want.reshape(28, 28)], axis=-1)
    np.testing.assert_allclose(decode(data["pictures"][7]), want, atol=1.01)


def test_a_large_image_is_made_small_and_other_data_are_words():
    assert max(decode(thumbnails.png(np.zeros((300, 200, 3), np.uint8))).shape) == 64
    xs = {"counts": np.arange(12.0).reshape(3, 4), "size": np.array([1.5, 2.0, 3.0])}
    assert thumbnails.pictures(xs) is None
    assert thumbnails.words(xs, 3)[1] == "4 values, mean 5.5, 4 … 7; 2"


def test_pictures_are_of_the_largest_gaps_when_there_is_no_room(monkeypatch):
    monkeypatch.setattr(page, "PICTURES", 20_000)
    run = make_run()
    xs = np.random.default_rng(0).random((N, 28, 28))
    data = data_of(page.document(run, xs=xs))
    drawn = np.array([text is not None for text in data["pictures"]])
    gap = np.array(column(data, "inference_gap")["values"], float)
    assert 1 < drawn.sum() < N
    assert np.nanmin(gap[drawn]) >= np.nanmax(gap[~drawn])


def test_as_many_datapoints_as_rows():
    with pytest.raises(ValueError, match="120"):
        page.document(make_run(), xs=np.zeros((3, 8, 8)))


def test_a_page_without_gaps_is_a_page_too():
    data = data_of(page.document(make_run(without=("label", "local", "ais"))))
    assert [c["key"] for c in data["columns"]] == ["index", "flags", "elbo"]


def test_a_measurement_shows_each_datapoint_in_its_row(tmp_path):
    """The rows of a run are sorted by index; those of a Measurement are as its datapoints came."""
    indices = [30, 10, 20]
    measured = [{"index": i, "label": "a", "elbo": -1.0 * i, "elbo_se": 0.1} for i in indices]
    xs = np.stack([np.full((8, 8), i, np.uint8) for i in indices])
    path = infsub.Measurement(measured, xs=xs).page(tmp_path / "page.html")
    data = data_of(path.read_text())
    assert column(data, "index")["values"] == [10, 20, 30]
    assert column(data, "elbo")["values"] == [-10, -20, -30]
    assert [decode(text)[0, 0, 0] for text in data["pictures"]] == [10, 20, 30]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        yield (found := started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]))
        found.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page with all there is: hostile labels, verdicts, pictures, flags."""
    run = make_run(name="What <b>is</b> measured")
    xs = np.random.default_rng(0).random((N, 28, 28)) > 0.5
    verdicts = ["amortization" if n % 2 else HOSTILE for n in range(N)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write(path, judged(run, "The encoder is to blame.", verdicts), xs)
    return path, run


@pytest.fixture
def opened(browser, written):
    """Opens the page; no error, no warning and no request but for itself must be left at the end."""
    path, contexts, said = written[0], [], []

    def open_page(path=path, **options):
        contexts.append(browser.new_context(offline=True, **options))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda r: r.url.startswith("data:") or said.append(r.url))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert all(text.startswith("file:") for text in said), said


def indices(tab):
    return [int(text) for text in tab.locator("#rows tbody th .point > span").all_inner_texts()]


def ordered(run, key, sign=-1):
    """Dataset indices by a gap as the page has it, the largest first; ties by index."""
    values = zip(np.round(sign * run.lines[key].values, 4), run.indices.tolist(), strict=True)
    return [index for _, index in sorted(values)]


def test_it_sorts(opened, written):
    tab, run = opened(), written[1]
    tab.select_option("#size", "200")
    assert indices(tab) == [*ordered(run, "inference_gap"), 21]  # that of no gap last
    header = tab.get_by_role("columnheader", name="amortization gap FFG")
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert tab.locator("[aria-sort]").count() == 1
    assert indices(tab) == [*ordered(run, "amortization_gap_gaussian"), 21]
    tab.keyboard.press("Enter")  # the focus stays on the heading
    assert header.get_attribute("aria-sort") == "ascending"
    assert indices(tab) == [*ordered(run, "amortization_gap_gaussian", 1), 21]
    tab.get_by_role("columnheader", name="datapoint").get_by_role("button").click()
    assert indices(tab) == run.measured.indices.tolist()


def test_it_filters(opened, written):
    tab, run = opened(), written[1]
    tab.select_option("#size", "200")
    everything = set(run.measured.indices.tolist())
    of_two = {7 * n for n in range(N) if n % 5 == 2 and n % 60 != 59}
    tab.select_option("#label", label=f"2 ({len(of_two)})")
    assert set(indices(tab)) == of_two
    values = dict(zip(run.indices.tolist(), run.lines["inference_gap"].values, strict=True))
    mean = np.mean([values[index] for index in of_two])
    assert f"{len(of_two)} of {N} datapoints; their mean inference gap is {mean:.2f}" in (
        tab.locator("#status").inner_text()
    )
    tab.select_option("#verdict", label="amortization (60)")
    assert set(indices(tab)) == {index for index in of_two if index // 7 % 2}
    tab.get_by_role("button", name="Show all").click()
    assert set(indices(tab)) == everything
    tab.fill("#search", "not CONVERGED")
    assert set(indices(tab)) == {7 * n for n in range(N) if n % 40 == 5}
    tab.fill("#search", "no such thing")
    assert indices(tab) == []
    tab.get_by_role("button", name="Show all").click()
    tab.get_by_role("button", name="AIS is not finite at 1 of 120 datapoints").click()
    assert indices(tab) == [21]
    tab.get_by_role("button", name="Show all").click()
    tab.locator('.labels [data-label="4"]').click()
    assert set(indices(tab)) == {7 * n for n in range(N) if n % 5 == 4 and n % 60 != 59}


def test_hostile_names_are_seen_as_they_are(opened):
    tab = opened()
    assert tab.title() == tab.locator("h1").inner_text() == "What <b>is</b> measured"
    tab.select_option("#label", "=" + HOSTILE)
    assert indices(tab) == [7 * 119, 7 * 59] or indices(tab) == [7 * 59, 7 * 119]
    assert tab.locator("img").count() == 2  # the datapoints'
    tab.fill("#search", HOSTILE.split()[1])
    assert len(indices(tab)) == 2
    assert tab.title() == "What <b>is</b> measured"


def test_a_datapoint_of_the_figure_is_found(opened, written):
    tab, run = opened(), written[1]
    tab.fill("#search", "not converged")
    stairs = tab.locator("#stairs")
    box = stairs.bounding_box()
    number = 70  # on the second page of rows
    x = box["width"] * (number + 0.5) / len(run.indices)
    stairs.hover(position={"x": x, "y": 50})
    wanted = ordered(run, "inference_gap")[number]
    assert tab.locator("#tip").inner_text().startswith(f"datapoint {wanted}, label ")
    stairs.click(position={"x": x, "y": 50})
    assert tab.locator("#rows tr.chosen .point > span").inner_text() == str(wanted)
    assert tab.locator("#rows tr.chosen").is_visible()
    assert tab.locator("#search").input_value() == ""


def test_pages_of_rows_and_their_indices(opened, tmp_path):
    tab = opened()
    first = indices(tab)
    assert len(first) == 50
    tab.get_by_role("button", name="Next").click()
    assert tab.locator("#shown").inner_text() == "51–100 of 120"
    assert not set(first) & set(indices(tab))
    tab.get_by_role("button", name="Next").click()
    assert tab.get_by_role("button", name="Next").is_disabled()
    tab.fill("#search", "not converged")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Save these indices").click()
    download.value.save_as(tmp_path / "indices.txt")
    saved = [int(line) for line in (tmp_path / "indices.txt").read_text().split()]
    assert saved == indices(tab)  # what config.evaluate.indices_file reads
    tab.get_by_label("diagnostics").uncheck()
    assert not tab.get_by_role("columnheader", name="AIS ESS").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_its_screen_and_its_ink_is_seen(opened, width, scheme):
    tab = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # WCAG 2: 4.5 to 1 for text, 3 to 1 for what a figure is drawn in.
    colors = tab.evaluate(
        """() => Object.fromEntries(["paper", "card", "ink", "quiet", "accent", "warn", "warn-paper",
        "amortization", "approximation"].map((name) => [name,
        getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim()]))"""
    )
    for ink in ("ink", "quiet", "accent"):
        assert contrast(colors[ink], colors["paper"]) >= 4.5
        assert contrast(colors[ink], colors["card"]) >= 4.5
    assert contrast(colors["warn"], colors["warn-paper"]) >= 4.5
    assert contrast(colors["amortization"], colors["paper"]) >= 3
    assert (luminance(colors["paper"]) < 0.1) == (scheme == "dark")
    assert tab.evaluate(
        "getComputedStyle(document.body).backgroundColor"
    ) == "rgb({}, {}, {})".format(*bytes.fromhex(colors["paper"][1:]))


def luminance(color):
    channels = np.frombuffer(bytes.fromhex(color[1:]), np.uint8) / 255
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(a, b):
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_a_screen_reader_is_told(opened):
    tab = opened()
    tree = tab.locator("body").aria_snapshot()
    for said in (
        'heading "What <b>is</b> measured" [level=1]',
        'img "Inference gaps of 119 datapoints',
        'searchbox "Search',
        'combobox "Label"',
        'columnheader "inference gap',
        'region "Datapoints"',
        'navigation "Rows"',
        "status:",
    ):
        assert said in tree, said
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll("button, input, select, img")].filter((e) =>
        e.tagName === "IMG" ? !e.hasAttribute("alt") : !(e.textContent.trim() || e.labels?.length)).length"""
    )
    assert unnamed == 0


def test_ten_thousand_datapoints_stay_quick(opened, tmp_path):
    run = make_run(10_000, seed=1)
    path = tmp_path / "report.html"
    page.write(path, run, np.random.default_rng(0).random((10_000, 28, 28)) > 0.5)
    tab = opened(path)
    assert tab.locator("#rows tbody tr").count() == 50  # however many there are
    seconds = tab.evaluate(
        """() => {
          const start = performance.now();
          document.querySelector('[data-key="elbo"]').click();
          document.getElementById("search").value = "not converged";
          document.getElementById("search").dispatchEvent(new Event("input", {bubbles: true}));
          document.body.offsetHeight;
          return (performance.now() - start) / 1000;
        }"""
    )
    assert tab.locator("#status").inner_text().startswith("250 of 10000")
    assert seconds < 2  # 0.1 on an idle core
