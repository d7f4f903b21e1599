"""launch/examples: other people's models run, and take few lines from trained model to table."""

from __future__ import annotations

import ast
import importlib.util
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

import infsub

EXAMPLES = sorted((Path(__file__).parent.parent / "launch" / "examples").glob("*.py"))
LAST = "# %% From the trained model to a table\n"
MOST_LINES = 15


def test_there_is_an_example_of_each_kind():
    assert {path.stem for path in EXAMPLES} == {
        *("flax_linen", "flax_nnx", "equinox_nhwc", "numpyro_guide", "pytorch_weights"),
        *("counts", "conditional_prior", "hierarchical"),
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_takes_few_lines_from_the_trained_model_to_the_table(path):
    before, cell, after = path.read_text().partition(LAST)
    assert cell
    # Training knows nothing of infsub but where digits are.
    assert "infsub." not in before.partition('"""\n\n')[2].replace("from infsub.", "")
    code = [line for line in after.splitlines() if line.strip() and not line.startswith("#")]
    assert 5 < len(code) <= MOST_LINES
    assert code[-1] == "print(measured)"


def imported(path: Path) -> set[str]:
    """The packages that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.computing
@pytest.mark.filterwarnings("default")  # of other people's frameworks
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, capsys):
    if missing := [name for name in imported(path) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'infsub[examples]', or PyTorch")
    names = runpy.run_path(str(path))
    measured, lines = names["measured"], names["measured"].run.lines
    (model,) = [value for value in names.values() if isinstance(value, infsub.Model)]
    params = names["params"] if "params" in names else names["vae"]
    assert len(measured.gaps.indices) == names["POINTS"]  # all are finite
    inference = lines["inference_gap"].mean
    assert 0 < inference.mean < 20
    assert lines["approximation_gap_gaussian"].mean.mean > -0.05
    assert "| inference gap |" in capsys.readouterr().out
    assert np.isfinite(inference.standard_error)
    assert abs(lines["certificate"].mean.mean) < 1
    checked = infsub.check(jax.random.key(0), model, params, measured.xs)
    assert checked.ok, str(checked)
