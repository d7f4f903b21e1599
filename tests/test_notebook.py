"""launch/colab.ipynb runs from top to bottom, and shows what it promises."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PATH = ROOT / "launch" / "colab.ipynb"
SIZES = "EPOCHS, POINTS_PER_CLASS, CERTIFIED = 3, 1, 2"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_a_notebook_without_outputs(notebook):
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(codes) > 8
    assert not any(cell.outputs or cell.execution_count for cell in codes)
    assert [cell.metadata.get("tags") for cell in codes].count(["sizes"]) == 1
    for cell in codes:  # ours: no magic, so that any Jupyter runs it
        compile(cell.source, "cell", "exec")


def test_the_repositorys_address_is_in_one_variable(notebook):
    assigned = [
        found[1]
        for cell in notebook.cells
        if cell.cell_type == "code" and (found := re.search(r'"(https://[^"]+)"', cell.source))
    ]
    (address,) = assigned
    owner_and_name = address.removeprefix("https://github.com/")
    badge = (
        f"https://colab.research.google.com/github/{owner_and_name}/blob/main/launch/colab.ipynb"
    )
    assert badge in (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.computing
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's machinery
def test_it_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for cell in notebook.cells:
        if cell.metadata.get("tags") == ["sizes"]:
            cell.source = SIZES
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "\n".join(output.get("text", "") for output in outputs)
    rich = [output["data"] for output in outputs if "data" in output]
    assert re.search(r"jax [\d.]+ on 1 × ", text)
    tables = [data["text/markdown"] for data in rich if "text/markdown" in data]
    assert len(tables) == 2
    for table in tables:
        for line in ("approximation gap full", "amortization gap FFG", "BDMC gap of AIS"):
            assert f"| {line}" in table
    assert sum("image/png" in data for data in rich) == 1
    pages = [data["text/html"] for data in rich if "text/html" in data]
    assert len(pages) == 2
    assert all("<iframe srcdoc=" in page and "amortization" in page for page in pages)
    # Probabilistic PCA: the posterior is Gaussian, so its full covariance leaves no gap.
    left = re.search(r"\| approximation gap full \| (-?[\d.]+) ", tables[1])
    assert left is not None
    assert abs(float(left[1])) < 0.1
