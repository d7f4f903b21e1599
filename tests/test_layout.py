"""The house: the README's reading order has every module, and imports point one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import infsub

ROOT = Path(__file__).parent.parent
PACKAGE = Path(infsub.__file__).parent


def reading_order() -> list[str]:
    text = (ROOT / "README.md").read_text()
    listed = re.search(r"Read the modules in this order: (programs.*?main)\.", text, re.DOTALL)
    assert listed is not None
    return re.findall(r"\w+", listed[1])


def imports(name: str) -> set[str]:
    """Modules of infsub that a module, or one of a package's, imports anywhere."""
    path, found = PACKAGE / name, set()
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "infsub":
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("infsub."):
                found.add(str(node.module).split(".")[1])
    return found - {name}


def test_the_reading_order_has_every_module():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    modules |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(reading_order()) == sorted(modules)


def test_imports_point_one_way():
    order = reading_order()
    up = {name: imports(name) - set(order[: order.index(name)]) for name in order}
    assert {name: later for name, later in up.items() if later} == {}
    assert imports("main") >= {"config", "experiments"}  # the test sees something
