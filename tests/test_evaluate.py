"""Rows of bounds: schema, exact resume, points of every choice, non-finite datapoints named."""

from __future__ import annotations

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from infsub import (
    bounds,
    checkpoints,
    data,
    evaluate,
    files,
    grids,
    locks,
    main,
    provenance,
    records,
    shards,
    subjects,
)
from infsub import config as configs
from infsub.datapoints import map_datapoints
from infsub.keys import Stream, stream
from infsub.report.runs import load_run
from infsub.train import train
from infsub.types import Target, UserError
from infsub.vae import make_vae

pytestmark = pytest.mark.usefixtures("small_pictures")


def small(**fields):
    return configs.resolve(tiny.measured(**fields))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    config = small()
    jax.clear_caches()  # of tests before this one that train the same: programs are to be counted
    train(config, workdir)
    assert evaluate.evaluate(config, workdir) == []
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def again(workdir, **fields):
    return evaluate.evaluate(small(**fields), workdir)


@pytest.mark.parametrize("name", ["progress.json", "progress.evaluation.json"])
def test_progress_says_where_the_seconds_went(trained, name):
    progress = files.read_json(trained / name, records.PROGRESS)
    assert progress is not None
    assert progress["done"] == progress["total"] > 0
    assert progress["programs_compiled"] + progress["programs_cached"] > 0
    assert min(progress[f"seconds_{part}"] for part in ("tracing", "compiling", "running")) > 0


def test_a_last_block_is_no_program_of_its_own(trained, workdir, monkeypatch):
    sizes = []

    def counted(function, key, xs, *args, **options):
        sizes.append(len(xs))
        return map_datapoints(function, key, xs, *args, **options)

    monkeypatch.setattr(evaluate, "map_datapoints", counted)
    nine = workdir / "nine.txt"
    nine.write_text(
        "\n".join(str(row["index"]) for row in files.read_rows(trained / "rows.jsonl")[:9])
    )
    again(workdir, name="ragged", indices_file=str(nine), bdmc={"num_points": 9})
    assert sizes == [5, 5, 5, 5, 2]  # of nine rows, of nine points to certify on, of the pictures
    for name in ("rows.jsonl", "bdmc.jsonl"):
        assert files.read_rows(workdir / "ragged" / name) == files.read_rows(trained / name)[:9]


def test_rows(trained):
    rows = files.read_rows(trained / "rows.jsonl")
    assert len(rows) == 10
    assert [row["label"] for row in sorted(rows, key=lambda row: row["label"])] == list(range(10))
    for row in rows:
        for name in ("elbo", "local_gaussian", "iwae", "ais"):
            assert np.isfinite(row[name])
            assert row[f"{name}_se"] >= 0
        assert 1 <= row["iwae_ess"] <= 50
        assert 1 <= row["ais_ess"] <= 4
        assert 0 < row["ais_acceptance"] <= 1
        assert isinstance(row["local_gaussian_converged"], bool)
    bounds = files.read_rows(trained / "bdmc.jsonl")
    assert [row["index"] for row in bounds] == list(range(10))
    for row in bounds:
        np.testing.assert_allclose(row["gap"], row["upper"] - row["lower"], atol=1e-4)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_another_split_has_its_own_datapoints(workdir, split):
    again(workdir, name="held", split=split)
    part = data.load("mnist5k").split(split)
    rows = files.read_rows(workdir / "held" / "rows.jsonl")
    with np.load(workdir / "held" / "images.npz") as kept:
        want = data.batch(part.images, kept["indices"])
        np.testing.assert_array_equal(kept["images"], 255 * np.asarray(want))
        assert [row["label"] for row in rows] == part.labels[kept["indices"]].tolist()
    # Each bound is of that image: nothing else was measured.
    elbos = {row["index"]: row["elbo"] for row in files.read_rows(workdir / "rows.jsonl")}
    assert all(elbos.get(row["index"]) != row["elbo"] for row in rows)


def test_the_images_of_the_rows_are_kept(trained):
    with np.load(trained / "images.npz") as kept:
        indices, images = kept["indices"], kept["images"]
    assert indices.tolist() == [row["index"] for row in files.read_rows(trained / "rows.jsonl")]
    want = data.batch(data.load("mnist5k").train.images, indices)
    np.testing.assert_array_equal(images, 255 * np.asarray(want))


def test_all_is_done(workdir):
    before = {path: path.read_bytes() for path in workdir.glob("*.[jn]*")}
    assert {"rows.jsonl", "posteriors.npz", "images.npz"} <= {path.name for path in before}
    assert again(workdir) == []
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("kept", [0.0, 0.37, 0.95])
def test_a_killed_evaluation_ends_with_the_same_numbers(trained, workdir, kept):
    for name in ("rows.jsonl", "bdmc.jsonl"):
        whole = (workdir / name).read_bytes()
        (workdir / name).write_bytes(whole[: int(kept * len(whole))])
    clock = workdir / "progress.evaluation.json"
    files.write_json(clock, files.read_json(clock) | {"seconds_running": 1000.0})
    again(workdir)
    for name in ("rows.jsonl", "bdmc.jsonl"):
        assert files.read_rows(workdir / name) == files.read_rows(trained / name)
    assert files.read_json(clock)["seconds_running"] > 1000  # of both processes


def sharded(workdir, shard, **fields):
    """The shard's evaluation of the run; its config is that of `again`."""
    return evaluate.evaluate(small(**fields), workdir, shard)


@pytest.fixture
def bare(workdir):
    """A run that is trained, and nothing more."""
    for name in ("rows.jsonl", "bdmc.jsonl", "posteriors.npz", "images.npz", "evaluation.json"):
        (workdir / name).unlink()
    return workdir


def assert_same_rows(workdir, trained):
    """Every index once, and the numbers of one process but for the rounding of other blocks."""
    for stem in ("rows", "bdmc"):
        wanted = {row["index"]: row for row in files.read_rows(trained / f"{stem}.jsonl")}
        lines = [row for path in shards.paths(workdir, stem) for row in files.read_rows(path)]
        assert sorted(row["index"] for row in lines) == sorted(wanted)
        for row in lines:
            want = wanted[row["index"]]
            assert row.keys() == want.keys()
            for name, value in row.items():
                if name.endswith("steps"):  # whether one more step gains anything is a rounding's
                    continue
                np.testing.assert_allclose(value, want[name], rtol=1e-6, atol=2e-3, err_msg=name)


@pytest.mark.parametrize("count", [2, pytest.param(7, marks=pytest.mark.slow)])
def test_shards_give_the_rows_of_one(trained, bare, count):
    order = np.random.default_rng(count).permutation(count)
    for i in order[:-1]:
        assert sharded(bare, shards.Shard(i, count)) == []
    last = shards.Shard(int(order[-1]), count)
    assert not (bare / "posteriors.npz").exists()
    share = len(last.of(range(10)))
    assert records.missing(bare).startswith(
        f"{share} of 10 datapoints are missing ({last} has none of its {share})"
    )
    noted = load_run(bare).notes[-1]
    assert f"{share} of 10 datapoints are missing" in noted
    assert sharded(bare, last) == []
    assert records.missing(bare) == ""
    assert_same_rows(bare, trained)
    assert (bare / "posteriors.npz").exists()  # the last one draws them
    table = load_run(trained).lines
    for name, line in load_run(bare).lines.items():
        np.testing.assert_allclose(line.mean, table[name].mean, rtol=1e-6, atol=2e-3)

    again(bare)  # the whole evaluates nothing, and joins
    assert [path.name for path in shards.paths(bare, "rows")] == ["rows.jsonl"]
    indices = [row["index"] for row in files.read_rows(trained / "rows.jsonl")]
    assert [row["index"] for row in files.read_rows(bare / "rows.jsonl")] == indices
    assert_same_rows(bare, trained)
    before = (bare / "rows.jsonl").read_bytes()
    assert sharded(bare, last) == []  # a late one finds nothing to do
    assert (bare / "rows.jsonl").read_bytes() == before
    assert_same_rows(bare, trained)


def test_a_killed_shard_ends_with_the_same_numbers_and_others_do_what_is_missing(trained, bare):
    one, path = shards.Shard(1, 2), bare / "rows.shard-1-of-2.jsonl"
    sharded(bare, one)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # torn in a line, and in its block
    sharded(bare, one)
    assert path.read_bytes() == whole
    path.write_bytes(whole[: len(whole) // 2])
    again(bare)  # it never comes back: the whole takes its whole rows, and the rest
    assert_same_rows(bare, trained)
    torn = {row["index"]: row for row in map(json.loads, whole.splitlines())}
    rows = {row["index"]: row for row in files.read_rows(bare / "rows.jsonl")}
    kept = len(whole[: len(whole) // 2].splitlines()) - 1
    assert kept > 0
    assert [rows[index] for index in torn][:kept] == list(torn.values())[:kept]


def test_the_whole_and_a_shard_exclude_each_other(bare, monkeypatch):
    monkeypatch.setattr(locks, "MOMENT", 0.1)
    one = shards.Shard(1, 3)
    with (
        locks.owned(bare, "evaluation"),
        pytest.raises(UserError, match=r"the evaluation of .* held"),
    ):
        sharded(bare, one)
    with locks.owned(bare, "evaluation.shard-1-of-3"):
        with pytest.raises(UserError, match=r"the evaluation\.shard-1-of-3 of .* held"):
            again(bare)
        with pytest.raises(UserError, match=r"the evaluation\.shard-1-of-3 of .* held"):
            sharded(bare, one)
    assert shards.paths(bare, "rows") == []


def test_shards_of_other_settings_do_not_mix_while_there_are_no_rows(bare, monkeypatch):
    """One has claimed the folder and computes; the other one, of new settings, claims it and ends."""
    map_all, claimed = evaluate.map_datapoints, []

    def compute(*arguments, **options):
        if not claimed:
            claimed.append("by the other")
            sharded(bare, shards.Shard(1, 2), split="test")
        return map_all(*arguments, **options)

    monkeypatch.setattr(evaluate, "map_datapoints", compute)
    with pytest.raises(UserError, match=r"another evaluation's by now: split was 'train' and"):
        sharded(bare, shards.Shard(0, 2))
    counts = [len(files.read_rows(path)) for path in shards.paths(bare, "rows")]
    assert counts == [0, 5]


@pytest.mark.slow
def test_points_of_the_model(trained, workdir):
    """Row i is of the model's draw i, whatever else is drawn; the report takes it for other data."""
    fields = {"local": {"curve": (0, 2)}, "bdmc": {"num_points": 0}}
    config = small(name="own", split="model", per_class=0, first=5, **fields)
    assert evaluate.evaluate(config, workdir) == []
    rows = files.read_rows(workdir / "own" / "rows.jsonl")
    assert [row["index"] for row in rows] == list(range(5))
    for row in rows:
        assert row["label"] is None
        for name in ("after_0_gaussian", "after_2_gaussian"):
            assert np.isfinite([row[name], row[f"{name}_se"]]).all()
    variables, _ = checkpoints.load_variables(workdir)
    vae = make_vae(small().model, (28, 28, 1), 2)
    key = stream(jax.random.key(0), Stream.IMAGES)
    few, more = (subjects.simulate(key, vae, variables, n).images.values for n in (2, 5))
    np.testing.assert_array_equal(few, more[:2])
    assert set(np.unique(more)) == {0, 1}
    _, x = vae.simulate(jax.random.fold_in(key, 1), variables)
    np.testing.assert_array_equal(x, more[1])

    other = shutil.copytree(workdir / "own", workdir / "other")
    facts = files.read_json(other / "evaluation.json")
    files.write_json(other / "evaluation.json", facts | {"images": "of another decoder"})
    loaded = [load_run(workdir / name).data for name in ("", "own", "other")]
    assert len(set(loaded)) == 3


@pytest.mark.slow
def test_the_curve_of_the_own_family_starts_at_the_amortised_q():
    """The encoder's flow, of other options than local inference's, is where n = 0 is."""
    config = small(local={"families": ("rnvp",), "curve": (0, 30), "max_steps": 100})
    config = config.copy_and_resolve_references().unlock()
    config.model.posterior = configs.posterior("rnvp", num_steps=3, hidden=(20,))
    config.evaluate.elbo_samples = 2000
    vae = make_vae(config.model, (28, 28, 1), 2)
    variables = jax.jit(vae.init)(jax.random.key(0))
    # Away from the first weights, of which the flow is so slight that a Gaussian start is as good.
    flat, unravel = ravel_pytree(variables["encoder"])
    noise = 0.1 * jax.random.normal(jax.random.key(1), flat.shape)
    variables |= {"encoder": unravel(flat + noise)}
    xs = data.batch(data.load("mnist5k").train.images, jnp.arange(4))
    static = {"settings": configs.measured(config.evaluate)}
    subject = subjects.of_vae(vae, "rnvp")
    row = map_datapoints(subjects.row, jax.random.key(2), xs, variables, subject, static=static)
    errors = np.hypot(row["after_0_rnvp_se"], row["elbo_se"])
    assert np.all(np.abs(row["after_0_rnvp"] - row["elbo"]) < 4 * errors)
    np.testing.assert_array_equal(row["after_0_rnvp"], row["after_0_rnvp_encoded"])
    assert np.all(row["after_30_rnvp_encoded"] > row["after_0_rnvp"])
    assert np.all(row["after_30_rnvp"] > row["after_30_rnvp_encoded"])


@pytest.mark.slow
def test_ais_starts_elsewhere_where_the_encoder_is_lost():
    """In the rows and in the certificate: of an untrained model, whose encoder says nothing."""
    config = small(local={"max_steps": 500}).copy_and_resolve_references().unlock()
    config.model.decoder.init = "xavier_normal"
    vae = make_vae(config.model, (28, 28, 1), 2)
    variables = jax.jit(vae.init)(jax.random.key(0))
    decoder, unravel = ravel_pytree(variables["decoder"])
    variables |= {"decoder": unravel(2 * decoder)}  # sharp posteriors
    key, key_images = jax.random.key(1), jax.random.key(2)
    xs = subjects.simulate(key_images, vae, variables, 32).images.values
    gaps = {}
    for start in ("posterior", "laplace", "local"):
        config.evaluate.ais.start = start
        static = {"settings": configs.measured(config.evaluate)}
        subject = subjects.of_vae(vae, "gaussian")
        certified = map_datapoints(
            subjects.certificate, key, np.arange(32), variables, subject, static=static
        )
        gaps[start] = certified["gap"]
    row = map_datapoints(subjects.row, key, xs, variables, subject, static=static)
    gained = [gaps["posterior"] - gaps[start] for start in ("laplace", "local")]
    # From q(z|x) the row's AIS would end nats below L[q*] too.
    gained.append(row["ais"] - row["local_gaussian"] + 1)
    for gain in gained:
        assert np.sum(gain > 0) > 16 + 3 * np.sqrt(8)  # heavy tails: by sign, beyond a coin's


@pytest.mark.slow
def test_other_settings_do_not_mix(workdir):
    before = (workdir / "rows.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"iwae_samples was 50 and is 60.*evaluate\.name"):
        again(workdir, iwae_samples=60)
    assert (workdir / "rows.jsonl").read_bytes() == before
    again(workdir, iwae_samples=60, name="more")
    assert (workdir / "rows.jsonl").read_bytes() == before
    more = files.read_rows(workdir / "more" / "rows.jsonl")
    # What made them stays with them, until there are others.
    told = workdir / "more/config.json"
    for lost, revision in ((0, "of old"), (1, provenance.git_revision())):
        files.write_json(told, files.read_json(told) | {"git_revision": "of old"})
        files.rewrite_rows(workdir / "more/rows.jsonl", more[lost:])
        again(workdir, iwae_samples=60, name="more")
        assert files.read_json(told)["git_revision"] == revision
    # the ELBO's key does not depend on what else is measured
    rows = files.read_rows(workdir / "rows.jsonl")
    assert [row["elbo"] for row in more] == [row["elbo"] for row in rows]
    assert [row["iwae"] for row in more] != [row["iwae"] for row in rows]


def test_quadrature_and_the_densities_of_the_first_points(trained):
    rows = files.read_rows(trained / "rows.jsonl")
    for row in rows:
        assert row["grid_error"] < 0.01
        for name in ("elbo", "local_gaussian", "iwae"):
            assert row[name] < row["grid"] + 5 * row[f"{name}_se"]
    errors = np.array([row["ais"] - row["grid"] for row in rows])
    error = np.sqrt(np.mean([row["ais_se"] ** 2 for row in rows]))  # of four chains, each is rough
    assert abs(errors.mean()) < 4 * error / np.sqrt(len(rows))
    assert abs(errors).mean() < 2 * error  # 0.8 where they are normal
    assert abs(errors).max() < 5 * error

    with np.load(trained / "posteriors.npz") as file:
        arrays = dict(file)
    first = [row["index"] for row in rows[:2]]
    assert arrays["indices"].tolist() == first
    split = data.load("mnist5k").train
    np.testing.assert_array_equal(arrays["images"], data.batch(split.images, jnp.array(first)))
    assert arrays["families"].tolist() == ["gaussian", "gaussian"]  # the encoder's, and local
    np.testing.assert_allclose(arrays["log_px"], [row["grid"] for row in rows[:2]], atol=2e-3)
    # The very q and q* of the rows: their bounds are, but for rounding.
    want = [[row["elbo"], row["local_gaussian"]] for row in rows[:2]]
    np.testing.assert_allclose(arrays["bounds"], want, atol=0.01)
    cells = (arrays["width"] / arrays["truth"].shape[-1]) ** 2
    np.testing.assert_allclose(arrays["truth"].sum((1, 2)) * cells, 1, atol=0.01)
    held = arrays["densities"].sum((2, 3)) * cells[:, None]
    assert np.all((held > 0.97) & (held < 1 + 1e-5))
    vae = make_vae(small().model, (28, 28, 1), 2)
    variables, _ = checkpoints.load_variables(trained)
    for n, x in enumerate(arrays["images"]):
        z = 0.1 * jnp.stack(jnp.meshgrid(*[jnp.arange(-120.0, 121)] * 2), axis=-1)
        log_joint = jax.lax.map(jax.vmap(partial(bounds.log_joint, vae.target(variables, x))), z)
        log_px = jax.nn.logsumexp(log_joint) + 2 * np.log(0.1)
        np.testing.assert_allclose(arrays["log_px"][n], log_px, atol=2e-3)
        # q lies where the encoder has put it.
        z = grids.centres(grids.Window(arrays["low"][n], arrays["width"][n]), 100)
        mean = np.einsum("ij,ijk->k", arrays["densities"][n, 0], z) * cells[n]
        want = vae.encode(variables, x)["encoded"]["mean"]
        np.testing.assert_allclose(mean, want, atol=0.02 * arrays["width"][n])


def test_what_is_left_of_other_settings_does_not_stay(workdir, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_write_rows", stop)
    for grid in (40, 50):
        (workdir / "rows.jsonl").unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            again(workdir, grid=grid)
        for name in ("posteriors.npz", "bdmc.jsonl"):
            assert (workdir / name).exists() == (grid == 40)


def test_choices_of_points(tmp_path):
    split = data.load("mnist5k").test
    chosen = evaluate.choose(split, small(per_class=3).evaluate)
    assert np.bincount(split.labels[chosen]).tolist() == [3] * 10
    assert evaluate.choose(split, small(first=7).evaluate).tolist() == list(range(7))
    assert evaluate.choose(split, small(per_class=0).evaluate).size == 500
    file = tmp_path / "indices.txt"
    file.write_text("7\n3\n499\n")
    by_file = small(indices_file=str(file)).evaluate
    assert evaluate.choose(split, by_file).tolist() == [7, 3, 499]
    for text, message in [
        ("7\nx\n", "file of integers"),
        ("500\n", "0 to 499"),
        ("1\n1\n", "names a datapoint twice"),
        ("", "0 to 499"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            evaluate.choose(split, by_file)


@pytest.mark.slow
def test_non_finite_datapoints_are_named(workdir, monkeypatch, capsys):
    """A likelihood that is NaN where the first lit pixel lies low: those rows alone, by index."""
    good = {row["index"]: row for row in files.read_rows(workdir / "rows.jsonl")}
    images = data.load("mnist5k").train.images
    xs = np.asarray(data.batch(images, jnp.asarray(sorted(good))))
    lit = xs.sum(axis=(1, 2, 3))
    threshold = np.sort(lit)[-3]
    bad = [index for index, n in zip(sorted(good), lit, strict=True) if n >= threshold]
    make_vae = evaluate.make_vae

    def broken(*arguments):
        vae = make_vae(*arguments)

        def target(variables, x):
            inner = vae.target(variables, x)
            poison = jnp.where(jnp.sum(x) >= threshold, jnp.nan, 0.0)
            return Target(
                None,
                lambda z: inner.log_likelihood(z) + poison,
                2,
                outputs=inner.outputs,  # so that AIS starts where it did
                log_likelihood_of_outputs=lambda outputs: (
                    inner.log_likelihood_of_outputs(outputs) + poison
                ),
            )

        return vae._replace(target=target)

    monkeypatch.setattr(evaluate, "make_vae", broken)
    config = small(name="broken", grid=0, bdmc={"num_points": 0})
    with pytest.raises(records.Stopped, match=str(bad[0])) as stopped:
        main.run("evaluate", config, workdir)
    assert stopped.value.exit_code == 1
    rows = {row["index"]: row for row in files.read_rows(workdir / "broken" / "rows.jsonl")}
    assert [index for index in rows if rows[index]["ais"] is None] == bad
    for index in set(rows) - set(bad):
        for name in ("elbo", "iwae", "ais", "local_gaussian"):
            np.testing.assert_allclose(rows[index][name], good[index][name], rtol=1e-4)
    main.run("report", config, workdir)
    table = (workdir / "broken" / "table.md").read_text()
    assert f"not finite at {len(bad)} of 10" in table
    assert all(str(index) in table for index in bad)
