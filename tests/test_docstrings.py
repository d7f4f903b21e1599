"""The docstrings: the examples in them print what they say, and `make docs` makes pages of them."""

from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.scipy.stats import norm

import infsub

ROOT = Path(__file__).parent.parent
FUNCTIONS = {
    n: getattr(infsub, n) for n in infsub.__all__ if inspect.isfunction(getattr(infsub, n))
}
VARIANTS = {"ais_with_info": "ais", "laplace_with_info": "laplace"}  # whose examples they share


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in VARIANTS])
def test_the_example_prints_what_it_says(name):
    """With what the package's docstring says is imported."""
    assert "import infsub, jax, jax.numpy as jnp" in (infsub.__doc__ or "")
    globs = {"infsub": infsub, "jax": jax, "jnp": jnp, "norm": norm}
    (found,) = doctest.DocTestFinder(recurse=False).find(FUNCTIONS[name], name, globs=globs)
    assert found.examples
    runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    said: list[str] = []
    runner.run(found, out=said.append)
    assert not runner.failures, "".join(said)


class Page(HTMLParser):
    """The anchors of a page, its links, and its text; what is in scripts is neither."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors.add(attributes.get("id") or "")
        if tag in ("a", "link", "script", "img"):
            self.links.add(attributes.get("href") or attributes.get("src") or "")

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_make_docs_makes_pages_whose_links_lead_somewhere(tmp_path):
    arguments = ["docs", f"RUN={sys.executable}", f"DOCS={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = ["make", "--old-file=.venv/dev.done", *arguments]  # not the environment anew
    subprocess.run(made, cwd=ROOT, env=environment, check=True, timeout=300)
    pages = {path.resolve(): Page(path) for path in tmp_path.rglob("*.html")}
    modules = {path.stem for path in (ROOT / "infsub").glob("[a-z]*.py")} | {"data", "report"}
    assert modules <= {path.stem for path in pages}
    api = pages[(tmp_path / "infsub.html").resolve()]
    names = {n for n in infsub.__all__ if not inspect.ismodule(getattr(infsub, n))}
    assert names <= api.anchors  # and a module has its page
    assert "E_q[log p(x, z) − log q(z)]" in api.text
    assert ">>> measured = infsub.measure" in api.text
    checked = 0
    for path, page in pages.items():
        for link in page.links:
            if link.startswith(("https://", "data:")) or not link:
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target in pages, f"{path.name} links to {link}"
            assert not anchor or anchor in pages[target].anchors, f"{path.name} links to {link}"
            checked += 1
    assert checked > 1000
