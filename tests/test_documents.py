"""What the documents tell a reader to type, and what they say of the project, is so."""

from __future__ import annotations

import copy
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from absl import flags
from ml_collections import config_flags

from infsub import config as configs
from infsub import experiments, main, published
from infsub.data import prepare
from infsub.report import __main__ as join

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch/README.md",
    *sorted(ROOT.glob("configs/**/*.*")),
]
ARGPARSE = {"report": join, "data": prepare, "published": published}
COMMAND = re.compile(r"python -m infsub\.(\w+)((?:[^`\\\n]|\\\\?\n)*)")
COMMANDS = {
    f"{path.relative_to(ROOT)} {number}": (found[1], re.sub(r"\\+\n", " ", found[2]))
    for path in DOCUMENTS
    if path.suffix in (".md", ".py")
    for number, found in enumerate(COMMAND.finditer(path.read_text()))
}


def test_the_python_blocks_run_as_pasted():
    pasted = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, pasted)
    estimate, xs = pasted["estimate"], pasted["xs"]
    assert (
        estimate.log_px.shape == estimate.standard_error.shape == estimate.ess.shape == (len(xs),)
    )
    # Of binary pixels: no probability is above 1.
    assert np.all(np.isfinite(estimate.log_px) & (estimate.log_px < 0))
    assert np.all(estimate.standard_error < 1)


def test_a_model_of_ones_own_takes_fifteen_lines():
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Model(" in b]
    assert "infsub.measure(" in block
    assert "infsub.check(" in block
    assert 5 < sum(bool(line.strip()) for line in block.splitlines()) <= 15


def test_there_are_commands():
    assert len(COMMANDS) > 15


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections'
@pytest.mark.parametrize("where", COMMANDS)
def test_a_command_is_understood(where, tmp_path, capsys, monkeypatch):
    module, arguments = COMMANDS[where]
    arguments = shlex.split(arguments, comments=True)
    if module in ARGPARSE:
        with pytest.raises(SystemExit):
            ARGPARSE[module].main(["--help"])
        shown = capsys.readouterr().out
        assert {a.partition("=")[0] for a in arguments if a[0] == "-"} <= set(shown.split())
        return
    assert module == main.__name__.rpartition(".")[2]
    monkeypatch.chdir(ROOT)
    values, argv = flags.FlagValues(), ["", *arguments]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    for name in ("workdir", "mode", "cells", "shard", "coordinator"):
        values[name] = copy.deepcopy(flags.FLAGS[name])
    assert values(argv) == [""]
    if "experiment" in config.value:
        overrides = list(config_flags.get_override_values(values["config"]))
        cells = {cell.name for cell in experiments.expand(config.value, tmp_path, overrides)}
        assert set(values.cells) <= cells
    else:
        configs.resolve(config.value)


def test_make_has_the_targets_that_documents_name():
    text = "\n".join(path.read_text() for path in DOCUMENTS if path.suffix == ".md")
    text += (ROOT / ".ci/run").read_text() + (ROOT / ".github/workflows/ci.yml").read_text()
    named = set(re.findall(r"(?:^|`|run: )make ([a-z-]+)", text, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"quickstart", "test", "test-slow", "lint", "test-lowest"} <= named <= targets


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    # The fields that the format demands, of the software and of what it refers to.
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}
    for reference in citation["references"]:
        assert reference.keys() >= {"type", "title", "authors"}
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {project['version']}" in changes


def test_the_files_that_documents_link_to_exist():
    for path in DOCUMENTS:
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"
