"""The table of fields: defaults that keep their own rules, values that nothing could use, one list."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infsub import config
from infsub.types import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.parent.name != "results")
BAD = [
    ("seed", None),
    ("data.dir", None),
    ("seed", -1),
    ("seed", 2**31),
    ("data.levels", 0),
    ("model.latent_dim", 0),
    ("model.encoder.kind", "transformer"),
    ("model.posterior.name", "iaf"),
    ("train.learning_rate", -1e-3),
    ("train.learning_rate", float("nan")),
    ("train.gradient_clip", float("inf")),
    ("train.patience", -1),
    ("train.batch_size", 0),
    *(("evaluate.name", name) for name in ("a/b", "/tmp/x", "..", ".", ".hidden", "x" * 101)),
    *(
        ("evaluate.name", name)
        for name in ("checkpoints", "tensorboard", "seed_0", "config.json", "a b", "é", "\0")
    ),
    ("evaluate.block_size", -1),
    ("evaluate.per_class", -1),
    ("evaluate.first", -1),
    ("evaluate.checkpoint", "epoch_"),
    ("evaluate.checkpoint", "../best"),
    ("evaluate.elbo_samples", 0),
    ("evaluate.ais.schedule", "cubic"),
    ("evaluate.ais.start", "encoder"),
    ("evaluate.ais.adaptation", "none"),
    ("evaluate.local.families", ("gaussian", "iaf")),
    ("evaluate.local.preset", "slow"),
    ("evaluate.local.curve", (0, 3, 1)),
    ("evaluate.bdmc.num_points", -1),
    ("evaluate.grid", -1),
    ("report.min_ess", -1.0),
]


def changed(fields):
    made = config.default()
    made.update_from_flattened_dict(fields)
    return made


@pytest.mark.parametrize(
    ("own", "names", "families"),
    [
        ("gaussian", ("own", "gaussian"), ("gaussian",)),
        ("rnvp", ("own", "gaussian"), ("rnvp", "gaussian")),
        ("auxiliary", ("gaussian", "auxiliary", "own"), ("gaussian", "auxiliary")),
        ("planar", (), ()),
    ],
)
def test_the_encoders_own_family_is_named(own, names, families):
    fields = {"model.posterior": {"name": own}, "evaluate.local.families": names}
    made = config.default().unlock()
    made.update_from_flattened_dict(fields)
    assert config.resolve(made).evaluate.local.families == families


def test_of_an_imported_model_the_encoder_names_it():
    fields = {"model.imported": "my_module:build", "evaluate.local.families": ("own",)}
    assert config.resolve(changed(fields)).evaluate.local.families == ("own",)


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:20])
def test_a_value_that_nothing_could_use_is_named(name, value):
    with pytest.raises(UserError) as error:
        config.resolve(changed({name: value}))
    said = str(error.value)
    assert said.startswith(f"config.{name} is {value!r}; it must be ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"evaluate.ais.schedule": "adaptive", "evaluate.ais.adaptation": "authors"},
            "schedule=adaptive is found in the pilot run: it needs .*adaptation=pilot",
        ),
        (
            {"evaluate.bdmc.num_points": 5, "evaluate.ais.adaptation": "authors"},
            "step sizes are frozen, .*needs config.evaluate.ais.adaptation=pilot",
        ),
        ({"train.annealing": "kl"}, "annealing=kl needs config.train.annealing_epochs of at"),
        (
            {"seed": 2**31 - 1, "train.num_seeds": 2},
            "num_seeds=2 models are of the seeds 2147483647 to 2147483648; .* from 0 to 2147483647",
        ),
        ({"train.freeze": "decoder"}, "would freeze an untrained decoder; give config.init_from"),
    ],
    ids=str,
)
def test_values_that_contradict_each_other_are_named(fields, said):
    with pytest.raises(UserError, match=said):
        config.resolve(changed(fields))


@pytest.mark.parametrize("name", ["test", "test-1f3a9c", "a.b", "Validation_2", "x" * 100])
def test_an_evaluation_may_be_called(name):
    assert config.resolve(changed({"evaluate.name": name})).evaluate.name == name


def test_a_tilde_is_the_users_home(monkeypatch):
    """No shell expands that of --config.init_from=~/run."""
    monkeypatch.setenv("HOME", "/home/me")
    made = config.resolve(changed({"init_from": "~/run", "evaluate.indices_file": "~/some"}))
    assert made.init_from == "/home/me/run"
    assert made.evaluate.indices_file == "/home/me/some"


def test_the_table_is_the_config():
    made = dict(config.flatten(config.default()))
    assert made == {name: field.default for name, field in config.FIELDS.items()}
    config.resolve(config.default())  # every default keeps its rule
    assert all(field.help for field in config.FIELDS.values())


def test_the_readme_lists_the_fields_as_they_are():
    """Made anew by: python -c "from infsub import config; print(config.listing())"."""
    assert f"```\n{config.listing()}\n```" in (ROOT / "configs/README.md").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_s_head_gives_command_minutes_and_the_number_to_see(path):
    head = ast.get_docstring(ast.parse(path.read_text())) or ""
    found = re.findall(r"^(Command|Minutes|Expect): +\S", head, re.MULTILINE)
    assert found == ["Command", "Minutes", "Expect"]
    assert f"--config={path.relative_to(ROOT)}" in head
    minutes, _, expect = head.partition("Minutes:")[2].partition("Expect:")
    assert "two cores" in minutes
    assert "nats" in expect or "log p̂" in expect


@pytest.mark.parametrize(
    "values",
    [{"seed": "one"}, {"train": 3}, {"train": {"num_epochs": [1]}}],
    ids=str,
)
def test_a_saved_config_of_other_types_is_named(values):
    with pytest.raises(
        UserError, match=r"the saved config (does not fit infsub's fields: |has train=3, a field)"
    ):
        config.from_json(values)


def test_identity_covers_the_whole_config():
    # Every field but those that cannot change a weight: a forgotten one would load wrong weights.
    base = config.resolve(config.default())
    fields = dict(config.flatten(base))
    same, changed = set(), set()
    for name, value in fields.items():
        other = config.default().unlock()
        section, _, field = name.rpartition(".")
        place = other
        for part in filter(None, section.split(".")):
            place = place[part]
        more = {str: "x", tuple: (9,)}.get(type(value), 1)
        place[field] = value + more
        equal = config.identity(other, "d") == config.identity(base, "d")
        (same if equal else changed).add(name)
    assert {n for n in same if not n.startswith(("evaluate.", "report."))} == {
        "data.dir",
        "init_from",
        "train.checkpoint_seconds",
        "train.keep_last",
        "train.picture_every",
    }
    assert not {n for n in changed if n.startswith(("evaluate.", "report."))}
    assert config.identity(base, "d") != config.identity(base, "e")
    assert config.identity(base, "d") != config.identity(base, "d", "weights")
    assert json.loads(json.dumps(config.identified(base, "d"))) == config.identified(base, "d")


# Arguments of a config file

DEFAULTS = {"dataset": "binarized_mnist", "posterior": "gaussian", "scale": "paper"}
values = st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(st.sampled_from(sorted(DEFAULTS)), values), max_size=5))
def test_a_variant_is_what_was_said_over_the_defaults(said):
    arg = ",".join(f"{name}={value}" for name, value in said)
    assert config.variant(arg, **DEFAULTS) == DEFAULTS | dict(said)
    assert config.variant(f",{arg},", **DEFAULTS) == DEFAULTS | dict(said)


@given(st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), min_size=1))
def test_an_unknown_argument_is_named_with_those_that_there_are(item):
    if item.partition("=")[0] in DEFAULTS and "=" in item:
        return
    with pytest.raises(UserError) as error:
        config.variant(f"scale=small,{item}", **DEFAULTS)
    assert repr(item) in str(error.value)
    assert "dataset=binarized_mnist, posterior=gaussian, scale=paper" in str(error.value)


def test_no_argument_leaves_the_defaults():
    assert config.variant(None, **DEFAULTS) == config.variant("", **DEFAULTS) == DEFAULTS
