from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.scipy.stats import norm

from infsub import bounds, checkpoints, config, data, files, members, records, train_step
from infsub.datapoints import map_datapoints
from infsub.train import train
from infsub.types import UserError
from infsub.vae import Terms, make_vae

KEY = jax.random.key(0)


def tiny_config(**train_fields):
    made = tiny.get_config()
    made.train.update({"num_epochs": 3, "checkpoint_seconds": 1000.0} | train_fields)
    return made


def step_config(**fields):
    values = config.default().train.to_dict() | fields
    return train_step.StepConfig(**{n: values[n] for n in train_step.StepConfig._fields})


def leaves(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist5k")


def test_unpacked_images_are_the_same(digits):
    bits, bytes_ = digits.train.images, train_step.unpacked(digits.train.images)
    assert bits.coding == "bits"
    some = jnp.array([3999, 0, 17])
    np.testing.assert_array_equal(data.batch(bits, some), data.batch(bytes_, some))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The workdir of a trained run."""
    workdir = tmp_path_factory.mktemp("source")
    train(tiny_config(), workdir)
    return workdir


# The schedule and the objective


def rates(per_epoch, **fields):
    train = step_config(**fields)
    return jax.jit(jax.vmap(lambda step: train_step.learning_rate(train, per_epoch, step)))


def test_burda_schedule():
    epochs = np.repeat(np.arange(8), 3 ** np.arange(8))
    assert epochs.size == 3280
    expected = 1e-3 * 10 ** (-epochs / 7)
    found = rates(2, schedule="burda")(jnp.arange(2 * 3280 + 4))
    np.testing.assert_allclose(found[: 2 * 3280], np.repeat(expected, 2), rtol=1e-5)
    np.testing.assert_allclose(found[2 * 3280 :], 1e-4, rtol=1e-5)  # and stays there


def test_constant_and_cosine_schedules():
    steps = jnp.array([0, 20, 40])
    fields = {"num_epochs": 10, "learning_rate": 0.3}
    np.testing.assert_allclose(rates(4, schedule="constant", **fields)(steps), 0.3)
    found = rates(4, schedule="cosine", **fields)(steps)
    np.testing.assert_allclose(found, [0.3, 0.15, 0.0], atol=1e-7)


def test_annealing_weight_rises_linearly_to_one_and_stays():
    train = step_config(annealing="entropy", annealing_epochs=5)
    weight = jax.vmap(lambda step: train_step.annealing_weight(train, 4, step))
    np.testing.assert_allclose(weight(jnp.array([0, 5, 10, 20, 99])), [0, 0.25, 0.5, 1, 1])
    train = step_config(annealing="none", annealing_epochs=5)
    assert train_step.annealing_weight(train, 4, jnp.asarray(0)) == 1


@pytest.mark.parametrize("kind", ["elbo", "iwae"])
@pytest.mark.parametrize("annealing", ["none", "entropy", "kl"])
def test_objective(kind, annealing):
    likelihood, prior, q = np.array([[-90, -80.0], [-7, -6], [-3, -4]])
    w = 0.25
    values = {
        "none": likelihood + prior - q,
        "entropy": likelihood + prior - w * q,
        "kl": likelihood + w * (prior - q),
    }[annealing]
    expected = {"elbo": values.mean(), "iwae": math.log(np.exp(values).mean())}[kind]
    train = step_config(objective=kind, annealing=annealing, num_samples=2)
    terms = Terms(*map(jnp.asarray, (likelihood, prior, q)))
    weight = jnp.asarray(1.0 if annealing == "none" else w)
    assert train_step.objective(train, terms, weight) == pytest.approx(expected, rel=1e-6)


# A step against a loop that is written out


def start(train, model=None, num_train=40):
    vae = make_vae(model or tiny.get_config().model, (28, 28, 1), 2)
    task = train_step.make_task(vae, train, num_train)
    keys, _, variables = train_step.initial(task, np.array([7]))
    return task, keys, train_step.init_states(task, variables)


def test_steps_are_adam_on_the_mean_of_the_batch(digits):
    # By hand: the batch from the permutation, one datapoint after the other, Adam's own formulas.
    fields = {"batch_size": 20, "num_epochs": 2, "gradient_clip": 20.0, "num_samples": 2}
    train = config.default().train
    train.update(fields | {"annealing": "entropy", "annealing_epochs": 1, "schedule": "cosine"})
    train.adam_epsilon = 1e-2
    task, keys, states = start(train)
    variables = jax.tree.map(lambda leaf: leaf[0].copy(), states.variables)
    images = digits.train.images
    states, rows = train_step.train_chunk(task, keys, states, images, 0, 4)

    @jax.jit
    def gradient(variables, key, x, weight):
        def value(variables):
            terms, _ = task.vae.terms(key, variables, x, 2)
            elbo = terms.log_likelihood + terms.log_prior - terms.log_q
            annealed = terms.log_likelihood + terms.log_prior - weight * terms.log_q
            return -jnp.mean(annealed), jnp.mean(elbo)

        return jax.grad(value, has_aux=True)(variables)

    key = keys[0]
    zeros = jax.tree.map(np.zeros_like, variables)
    first, second, elbos, seen = zeros, zeros, [], []
    for step in range(4):
        epoch, position = divmod(step, 2)
        order = jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 0), epoch), 40)
        batch = order[20 * position : 20 * position + 20]
        seen.append(batch)
        sampling = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 2), step), 20)
        results = [
            gradient(variables, k, data.batch(images, i[None])[0], min(step / 2, 1.0))
            for k, i in zip(sampling, batch, strict=True)
        ]
        elbos.append(np.mean([elbo for _, elbo in results]))
        grads = jax.tree.map(lambda *g: np.mean(g, axis=0), *[g for g, _ in results])
        norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
        assert step > 0 or norm > 20, "the test needs a gradient that is clipped"
        grads = jax.tree.map(lambda g, norm=norm: g * min(1, 20 / norm), grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, grads)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
        rate = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / 4))
        variables = jax.tree.map(
            lambda p, m, v, t=step + 1, rate=rate: (
                p - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-2)
            ),
            variables,
            first,
            second,
        )
    found = jax.tree.map(lambda leaf: leaf[0], states.variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, variables)
    for epoch in (0, 1):  # every datapoint once an epoch; the epoch's row is the mean of its steps
        assert sorted(np.concatenate(seen[2 * epoch : 2 * epoch + 2])) == list(range(40))
        mean = rows["elbo"][0, epoch] / rows["count"][0, epoch]
        assert mean == pytest.approx(np.mean(elbos[2 * epoch : 2 * epoch + 2]), rel=1e-5)


@pytest.mark.parametrize("fields", [{}, {"on": "model", "freeze": "decoder"}], ids=str)
def test_chunks_change_no_bit(digits, fields):
    results = []
    for stops in ([10], [1, 3, 6, 10]):  # epochs end at 4 and 8
        task, keys, states = start(tiny_config(batch_size=10, **fields).train)
        begin, ended = 0, {}
        for stop in stops:
            states, rows = train_step.train_chunk(
                task, keys, states, digits.train.images, begin, stop
            )
            for epoch in range(begin // 4, stop // 4):
                ended[epoch] = {n: v[0, epoch - begin // 4].item() for n, v in rows.items()}
            begin = stop
        results.append((states, ended))
    assert list(ended) == [0, 1]
    assert results[0][1] == results[1][1]
    jax.tree.map(np.testing.assert_array_equal, results[0][0], results[1][0])


def step_keys(key, branch, step):
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, branch), step), 20)


def sums_of_epochs(task, key, variables, batches):
    """What two epochs of two steps record of the ELBO of these batches, where nothing is learnt."""

    @jax.jit
    @jax.vmap
    def elbo(key, x):
        terms, _ = task.vae.terms(key, variables, x, 1)
        return jnp.mean(terms.log_likelihood + terms.log_prior - terms.log_q)

    elbos = [np.mean(elbo(step_keys(key, 2, step), x)) for step, x in enumerate(batches)]
    return [elbos[0] + elbos[1], elbos[2] + elbos[3]]


def test_every_epoch_draws_its_dynamic_pixels_anew():
    images = data.load("mnist5k", binarisation="dynamic").train.images
    task, keys, states = start(tiny_config(batch_size=20, learning_rate=0.0).train)
    variables = jax.tree.map(lambda leaf: leaf[0].copy(), states.variables)
    _, rows = train_step.train_chunk(task, keys, states, images, 0, 4)
    batches = []
    for epoch in range(2):
        shuffle, pixels = (
            jax.random.fold_in(jax.random.fold_in(keys[0], i), epoch) for i in (0, 1)
        )
        order = jax.random.permutation(shuffle, 40)
        batches += [data.batch(images, order[:20], pixels), data.batch(images, order[20:], pixels)]
    expected = sums_of_epochs(task, keys[0], variables, batches)
    np.testing.assert_allclose(rows["elbo"][0, :2], expected, rtol=1e-5)


def test_on_the_model_every_step_has_fresh_draws_of_it(digits):
    # Without learning, the epochs' rows are the ELBOs of draws that anyone can make again.
    fields = {"batch_size": 20, "on": "model", "freeze": "decoder", "learning_rate": 0.0}
    task, keys, states = start(tiny_config(**fields).train)
    variables = jax.tree.map(lambda leaf: leaf[0].copy(), states.variables)
    _, rows = train_step.train_chunk(task, keys, states, digits.train.images, 0, 4)

    @jax.jit
    @jax.vmap
    def draw(key):
        return task.vae.simulate(key, variables)[1]

    batches = [draw(step_keys(keys[0], 1, step)) for step in range(4)]
    assert len(np.unique(np.concatenate(batches).reshape(80, -1), axis=0)) == 80
    expected = sums_of_epochs(task, keys[0], variables, batches)
    np.testing.assert_allclose(rows["elbo"][0, :2], expected, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(digits):
    task, keys, states = start(tiny_config(batch_size=10).train)
    bad = jax.tree.map(jnp.copy, states)
    bias = bad.variables["decoder"]["params"]["Dense_1"]["bias"]
    bad.variables["decoder"]["params"]["Dense_1"]["bias"] = bias.at[0, 5].set(jnp.nan)
    before = jax.tree.map(np.array, bad)
    after, rows = train_step.train_chunk(task, keys, bad, digits.train.images, 0, 3)
    jax.tree.map(np.testing.assert_array_equal, before._replace(skipped=np.array([3])), after)
    assert rows["count"][0, 0] == 0


# Runs


def test_a_run_that_diverges_stops_and_says_so(tmp_path):
    diverging = tiny_config(learning_rate=1e30, max_skipped=3, schedule="constant")
    for _ in range(2):  # the same command again says the same
        with pytest.raises(records.Stopped, match=r"more than config.train.max_skipped=3") as stop:
            train(diverging, tmp_path)
        assert stop.value.exit_code == 1
    summary = files.read_json(tmp_path / "summary.json")
    assert summary["ended"] == "diverged"
    assert summary["skipped"] > 3
    with pytest.raises(
        UserError, match="no checkpoint, for its training diverged before the first"
    ):
        checkpoints.load_variables(tmp_path)


def test_an_epoch_without_a_finite_step_has_no_means(tmp_path):
    with pytest.raises(records.Stopped):
        train(tiny_config(learning_rate=1e30, max_skipped=16, schedule="constant"), tmp_path)
    rows = files.read_rows(tmp_path / "metrics.jsonl")
    (row,) = [row for row in rows if row["skipped"] == 16]
    assert [row[name] for name in train_step.METRICS] == [None] * len(train_step.METRICS)


def test_a_run_without_a_finite_validation_value_has_diverged(tmp_path, monkeypatch):
    """Its best weights would be those that nothing has trained."""

    def never_finite(*arguments):
        return {name: v * np.nan for name, v in train_step.validate(*arguments).items()}

    monkeypatch.setattr(sys.modules[train.__module__], "validate", never_finite)
    for _ in range(2):
        with pytest.raises(records.Stopped, match="no validation value was ever finite") as stop:
            train(tiny_config(checkpoint_seconds=0.0), tmp_path)
        assert stop.value.exit_code == 1
    assert files.read_json(tmp_path / "summary.json")["ended"] == "diverged"
    with pytest.raises(UserError, match=r"no validation value of .* was finite .*checkpoint=last"):
        checkpoints.load_variables(tmp_path)
    assert checkpoints.load_variables(tmp_path, "last")[1] > 0


def test_validation_and_the_final_test_are_means_over_their_whole_splits(source, digits):
    settings = tiny_config()
    vae = make_vae(settings.model, (28, 28, 1), 2)
    variables, step = checkpoints.load_variables(source)
    task = train_step.make_task(vae, settings.train, 4000)
    _, ((key,), _), _ = train_step.initial(task, np.array([settings.seed]))

    def bound(key, x, variables):
        sampler = vae.sampler(variables, x)
        found = bounds.elbo(key, vae.target(variables, x), sampler, 2)
        z, log_q = jax.vmap(sampler)(jax.random.split(key))
        values = {
            "elbo": found.log_px,
            "iwae": jnp.log(jnp.mean(jnp.exp(found.log_weights - found.log_px))) + found.log_px,
            "kl": jnp.mean(log_q - jnp.sum(norm.logpdf(z), axis=1)),
        }
        return values, vae.encode(variables, x)["encoded"]["mean"]

    rows = files.read_rows(source / "metrics.jsonl")
    (best,) = [row for row in rows if row["step"] == step]
    summary = files.read_json(source / "summary.json")
    for split, found in (("validation", best), ("test", summary)):
        part = digits.split(split)
        values, means = map_datapoints(bound, key, part[: part.size], variables, block_size=100)
        for name, each in values.items():
            np.testing.assert_allclose(found[f"{split}_{name}"], each.mean(), rtol=1e-5)
        for name in ("elbo", "iwae"):
            error = values[name].std(ddof=1) / math.sqrt(part.size)
            np.testing.assert_allclose(found[f"{split}_{name}_se"], error, rtol=1e-4)
        assert found[f"{split}_active_units"] == np.sum(means.var(axis=0) > 0.01) > 0


def test_early_stopping_waits_for_annealing_and_patience(source, tmp_path):
    # Without learning, and with the same noise each time, validation cannot improve on epoch 1.
    stopping = tiny_config(learning_rate=0.0, patience=2, annealing_epochs=3, num_epochs=50)
    stopping.init_from = str(source)
    train(stopping, tmp_path)
    before, after = (checkpoints.load_variables(w)[0] for w in (source, tmp_path))
    assert leaves(before) == leaves(after)  # it started with all the weights there
    summary = files.read_json(tmp_path / "summary.json")
    assert summary["ended"] == "stopped early"
    assert summary["best_epoch"] == 1
    assert summary["step"] == 5 * 16
    assert len(files.read_rows(tmp_path / "metrics.jsonl")) == 5


def test_weights_to_start_from_are_those_of_a_run_that_has_ended(source, tmp_path):
    """Else the same command would start from others, were it killed before its first checkpoint."""
    running = shutil.copytree(source, tmp_path / "running")
    (running / "summary.json").unlink()
    warm = tiny_config()
    warm.init_from = str(running)
    with pytest.raises(UserError, match="running is not trained to its end"):
        train(warm, tmp_path / "warm")
    assert not (tmp_path / "warm").exists()


def test_what_a_setting_does_not_do_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[train.__module__], "_loop", lambda *_: (0, 0))
    for epochs, said in ((3, True), (4, False)):
        train(tiny_config(num_epochs=epochs), tmp_path / str(epochs))
        shown = (
            f"annealing_epochs=3 of config.train.num_epochs={epochs}: no epoch is trained at w = 1"
        )
        assert (shown in capsys.readouterr().err) == said
    config = tiny_config(objective="iwae").unlock()
    config.init_parts = "decoder"
    train(config.lock(), tmp_path / "idle")
    err = capsys.readouterr().err
    assert "objective=iwae of config.train.num_samples=1 is the ELBO." in err
    assert "init_parts=decoder of no config.init_from takes nothing." in err


@pytest.mark.parametrize(("criterion", "best"), [("elbo", 1), ("iwae", 2)])
def test_the_criterion_chooses_what_is_best(tmp_path, monkeypatch, criterion, best):
    peaks = iter([(3.0, 1.0), (2.0, 3.0), (1.0, 2.0), (0.0, 0.0)])  # three epochs and the test

    def validate(*_):
        return {n: np.float32([v]) for n, v in zip(("elbo", "iwae"), next(peaks), strict=True)}

    monkeypatch.setattr(sys.modules[train.__module__], "validate", validate)
    train(tiny_config(criterion=criterion), tmp_path)
    assert files.read_json(tmp_path / "summary.json")["best_epoch"] == best
    assert checkpoints.load_variables(tmp_path)[1] == 16 * best


def test_best_checkpoint_is_that_of_the_best_validation_epoch(tmp_path):
    # At an absurd rate validation goes up and down; which seed ends below its best differs by jax.
    rough = tiny_config(learning_rate=20.0, schedule="constant", num_epochs=6, keep_every=1)
    rough.train.criterion, rough.train.annealing = "iwae", "none"
    best, folder = 6, tmp_path
    while best == 6 and rough.seed < 6:
        rough.seed += 1
        tmp_path = folder / str(rough.seed)
        train(rough, tmp_path)
        values = [row["validation_iwae"] for row in files.read_rows(tmp_path / "metrics.jsonl")]
        best = int(np.argmax(values)) + 1
    assert best < 6, "the test needs a run whose last epoch is not its best"
    found, step = checkpoints.load_variables(tmp_path)
    kept, _ = checkpoints.load_variables(tmp_path, f"epoch_{best}")
    assert step == best * 16
    jax.tree.map(np.testing.assert_array_equal, found, kept)
    last, last_step = checkpoints.load_variables(tmp_path, "last")
    assert last_step == 6 * 16
    assert np.any(
        last["decoder"]["params"]["Dense_0"]["kernel"]
        != found["decoder"]["params"]["Dense_0"]["kernel"]
    )

    # Without its last checkpoint it goes on from the one before, and still knows which was the best.
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints" / f"{6 * 16:08d}")
    train(rough, tmp_path)
    again, step = checkpoints.load_variables(tmp_path)
    assert step == best * 16
    assert leaves(again) == leaves(found)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows
    with pytest.raises(UserError, match=r"has no checkpoint epoch_7; it has epoch_1, epoch_2"):
        checkpoints.load_variables(tmp_path, "epoch_7")


def test_checkpoints_of_which_none_can_be_read_stay_and_nothing_begins_anew(
    source, tmp_path, monkeypatch
):
    run = shutil.copytree(source, tmp_path / "run")
    (run / "summary.json").unlink()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def broken(arrays):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoints, "_digest", broken)
    with pytest.raises(UserError, match=r"no checkpoint of .*run can be read: .*Input/output err"):
        train(tiny_config(), run)
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize(
    ("freeze", "on"), [("decoder", "data"), ("encoder", "data"), ("decoder", "model")]
)
def test_frozen_parts_stay_bit_for_bit_and_have_no_optimizer_state(source, tmp_path, freeze, on):
    warm = tiny_config(freeze=freeze, on=on)
    warm.init_from, warm.init_parts = str(source), "decoder"
    train(warm, tmp_path)
    before, _ = checkpoints.load_variables(source)
    after, _ = checkpoints.load_variables(tmp_path, "last")
    moved = "decoder" if freeze == "encoder" else "encoder"
    assert leaves(after[moved]) != leaves(before[moved])
    (step,) = checkpoints.steps(tmp_path / "checkpoints")
    arrays = checkpoints.read_arrays(tmp_path / f"checkpoints/{step:08d}")
    moments = [name for name in arrays if name.startswith("optimizer/") and "kernel" in name]
    assert moments
    assert all(f"/{moved}/" in name for name in moments)
    if freeze == "decoder":
        assert leaves(after["decoder"]) == leaves(before["decoder"])
    else:  # a fresh encoder, the one that this seed starts with
        vae = make_vae(warm.model, (28, 28, 1), 2)
        task = train_step.make_task(vae, warm.train, 4000)
        _, _, fresh = train_step.initial(task, np.array([0]))
        assert leaves(after["encoder"]) == leaves(fresh["encoder"])


def test_frozen_batch_norm_keeps_its_statistics(digits):
    model = tiny.get_config().model
    model.encoder.kind = model.decoder.kind = "conv"
    model.encoder.hidden, model.decoder.hidden = (2, 3), (3, 2)
    task, keys, states = start(tiny_config(batch_size=20, freeze="decoder").train, model)
    before = jax.tree.map(np.array, states.variables)
    states, rows = train_step.train_chunk(task, keys, states, digits.train.images, 0, 2)
    after = states.variables
    assert leaves(after["decoder"]) == leaves(before["decoder"])
    for name in ("params", "batch_stats"):
        pairs = zip(leaves(before["encoder"][name]), leaves(after["encoder"][name]), strict=True)
        assert all(a != b for a, b in pairs)
    assert rows["count"][0, 0] == 2


def test_weights_that_do_not_fit_say_which_fields_differ(source, tmp_path):
    warm = tiny_config()
    warm.init_from, warm.model.decoder.hidden = str(source), (9,)
    expected = r"the decoder of config.init_from.* model.decoder.hidden was \[8\] and is \[9\]"
    with pytest.raises(UserError, match=expected):
        train(warm, tmp_path / "warm")
    assert not (tmp_path / "warm").exists()  # so that the command, once it is right, may have it


def test_another_config_s_workdir_is_refused_and_untouched(source, tmp_path):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    other = tiny_config(learning_rate=2e-3)
    with pytest.raises(UserError, match=r"train.learning_rate was 0.001 and is 0.002"):
        train(other, tmp_path)
    other = tiny_config()
    other.data.binarisation = "dynamic"
    with pytest.raises(UserError, match="data identity"):
        train(other, tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_records_that_a_machine_has_lost_are_named(source, tmp_path, capsys):
    """Of a bucket that had the checkpoint and not yet the epochs before it."""
    folder = tmp_path / "lost"
    shutil.copytree(source, folder)
    (folder / "summary.json").unlink()
    path = folder / "metrics.jsonl"
    files.rewrite_rows(path, files.read_rows(path)[:1])
    train(tiny_config(), folder)
    assert "metrics.jsonl lacks 2 of 3 epochs, lost with the machine" in capsys.readouterr().err


def test_seeds_together_are_the_runs_of_their_own(source, tmp_path):
    train(tiny_config(num_seeds=2), tmp_path)
    second = tiny_config()
    second.seed = 1
    train(second, tmp_path / "alone")
    elbos = []
    for alone, together in ((source, "seed_0"), (tmp_path / "alone", "seed_1")):
        runs = [records.read_run(w) for w in (alone, tmp_path / together)]
        assert runs[0]["identity"] == runs[1]["identity"]
        rows = [files.read_rows(w / "metrics.jsonl") for w in (alone, tmp_path / together)]
        assert len(rows[0]) == 3
        for a, b in zip(*rows, strict=True):
            assert a.keys() == b.keys()
            np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-4)
        elbos.append(rows[0][-1]["elbo"])
    assert elbos[0] != pytest.approx(elbos[1], rel=1e-3)
    warm = tiny_config()
    warm.init_from = str(tmp_path)
    with pytest.raises(UserError, match=r"holds 2 runs: give one, such as .*seed_0"):
        train(warm, tmp_path / "warm")
    # Of one the last checkpoint was removed, and the other one is not at its end: there is no common step.
    shutil.rmtree(tmp_path / "seed_0/checkpoints")
    (tmp_path / "seed_1/summary.json").unlink()
    shutil.copytree(
        tmp_path / "seed_1/checkpoints/00000048", tmp_path / "seed_1/checkpoints/00000032"
    )
    left = os.listdir(tmp_path / "seed_1/checkpoints")
    with pytest.raises(UserError, match="have no checkpoint of one step: put back those"):
        train(tiny_config(num_seeds=2), tmp_path)
    assert os.listdir(tmp_path / "seed_1/checkpoints") == left
    # Killed while the first ones were written.
    shutil.rmtree(tmp_path / "seed_1/checkpoints/00000032")
    train(tiny_config(num_seeds=2, keep_last=1, checkpoint_seconds=0.0), tmp_path)
    for seed in ("seed_0", "seed_1"):  # one may be written when the other is not
        assert checkpoints.steps(tmp_path / seed / "checkpoints") == [32, 48]


def test_what_is_due_every_few_epochs_is_done_then_and_no_more_is_kept(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(members.Member, "draw", lambda _, step, grids: drawn.append(step))
    often = {"num_epochs": 6, "validate_every": 2, "picture_every": 3, "checkpoint_seconds": 0.0}
    train(tiny_config(keep_last=1, **often), tmp_path)
    epochs = [row["epoch"] for row in files.read_rows(tmp_path / "metrics.jsonl")]
    validated = [
        row["epoch"]
        for row in files.read_rows(tmp_path / "metrics.jsonl")
        if "validation_elbo" in row
    ]
    assert (epochs, validated) == ([1, 2, 3, 4, 5, 6], [2, 4, 6])
    assert drawn == [4 * 16, 6 * 16, 6 * 16]  # with the next validation, and at the end
    assert checkpoints.steps(tmp_path / "checkpoints") == [6 * 16]


FOUR_DEVICES = """
import jax, numpy as np, tiny
from infsub import data, train_step as steps, vae
assert jax.device_count() == 4
config, digits = tiny.get_config(), data.load("mnist5k")
model = vae.make_vae(config.model, (28, 28, 1), 2)
# Four devices divide no batch of 250, two do; the other two do nothing.
for batch_size, num_devices in ((248, 4), (250, 2)):
    config.train.batch_size = batch_size
    task, found = steps.make_task(model, config.train, 4000), []
    assert task.mesh.size == num_devices, task.mesh
    for task in (task, task._replace(mesh=None)):
        keys, _, variables = steps.initial(task, np.array([0, 1]))
        states = steps.init_states(task, variables)
        arguments = steps.replicated(task, (keys, states, digits.train.images))
        chunk = steps.train_chunk.lower(task, *arguments, 0, 20).compile()
        share = f"f32[{batch_size // num_devices},784]"
        assert (share in chunk.as_text()) == (task.mesh is not None)
        found.append(chunk(*arguments, 0, 20))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), *found)
config.train.batch_size = 249
assert steps.make_task(model, config.train, 4000).mesh is None
"""


@pytest.mark.slow
def test_devices_share_each_batch_and_reach_the_same_numbers():
    devices = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    flags = {"XLA_FLAGS": devices, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    folder = os.path.dirname(tiny.__file__)
    result = subprocess.run(
        [sys.executable, "-c", FOUR_DEVICES],
        env=os.environ | flags | {"PYTHONPATH": folder},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def plain_loop(images, test_images, epochs):
    """A VAE as anyone writes it: own initialisation, analytic KL, Adam by optax, a Python loop."""
    rng = np.random.default_rng(0)

    def dense(inputs, outputs):
        limit = math.sqrt(6 / (inputs + outputs))
        return rng.uniform(-limit, limit, (inputs, outputs)).astype("f"), np.zeros(outputs, "f")

    params = [
        [dense(784, 200), dense(200, 200), dense(200, 40)],
        [dense(20, 200), dense(200, 200), dense(200, 784)],
    ]
    adam = optax.adam(1e-3, eps=1e-4)

    def mlp(layers, h):
        for w, b in layers[:-1]:
            h = jax.nn.elu(h @ w + b)
        return h @ layers[-1][0] + layers[-1][1]

    def elbos(params, key, x):
        mean, log_scale = jnp.split(mlp(params[0], x), 2, axis=-1)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        kl = jnp.exp(2 * log_scale) + mean**2 - 1 - 2 * log_scale
        logits = mlp(params[1], z)
        log_likelihood = x * logits - jnp.logaddexp(0, logits)
        return jnp.sum(log_likelihood, axis=-1) - 0.5 * jnp.sum(kl, axis=-1)

    @jax.jit
    def step(params, state, key, x):
        gradient = jax.grad(lambda p: -jnp.mean(elbos(p, key, x)))(params)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state, key = adam.init(params), KEY
    for _ in range(epochs):
        for batch in rng.permutation(len(images)).reshape(-1, 100):
            key, now = jax.random.split(key)
            params, state = step(params, state, now, images[batch])
    found = jax.jit(jax.vmap(elbos, in_axes=(None, 0, None)))(
        params, jax.random.split(KEY, 10), test_images
    )
    return np.mean(found, axis=0)


@pytest.mark.slow
def test_a_plain_loop_reaches_the_same_bound(request, tmp_path):
    """On embedded digits; INFSUB_EPOCHS=20 does it on binarized_mnist, the number of the README."""
    epochs, ours = int(os.environ.get("INFSUB_EPOCHS", "0")), config.default()
    ours.model.latent_dim, ours.train.num_epochs = 20, epochs or 4
    if epochs:
        ours.data.name = "binarized_mnist"
        ours.data.dir = str(request.getfixturevalue("shared_dir") / "data/tfds")
        jax.config.update("jax_disable_most_optimizations", False)
    train(ours, tmp_path)
    last, _ = checkpoints.load_variables(tmp_path, "last")
    digits = data.load(ours.data.name, ours.data.dir)
    vae = make_vae(ours.model, (28, 28, 1), 2)
    stacked = jax.tree.map(lambda a: jnp.asarray(a)[None], last)
    found = train_step.validate(vae, 10, stacked, digits.test.images, KEY[None])
    flat = [
        np.asarray(data.batch(split.images, jnp.arange(split.size))).reshape(-1, 784)
        for split in (digits.train, digits.test)
    ]
    plain = plain_loop(*flat, ours.train.num_epochs)
    error = math.hypot(found["elbo_se"][0], plain.std() / math.sqrt(plain.size))
    print(f"test ELBO {found['elbo'][0]:.2f} ± {found['elbo_se'][0]:.2f}, plain {plain.mean():.2f}")
    assert abs(found["elbo"][0] - plain.mean()) < 3 * error


def test_nothing_compiles_twice(tmp_path, caplog):
    jax.clear_caches()
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        train(tiny_config(num_epochs=5, schedule="burda", picture_every=2), tmp_path)
    messages = [record.getMessage() for record in caplog.records]
    compiled = [m.split()[4] for m in messages if m.startswith("Finished XLA compilation of")]
    large = ["train_chunk", "validate", "pictures", "initial", "init_states", "_choose"]
    for name in large:
        assert compiled.count(f"jit({name})") == 1, compiled
    after = compiled[compiled.index("jit(train_chunk)") :]
    assert len(after) <= 6, after
