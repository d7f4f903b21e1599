"""Fixtures that every test file may use."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and oracles beside the checkout; the test skips where there is none."""
    shared = ROOT.parent / "shared"
    if not (shared / "oracles").is_dir():
        if os.environ.get("CI"):
            pytest.fail("CI must have ../shared: its tests are not to be skipped there")
        pytest.skip("needs ../shared, the folder of real data and oracles")
    return shared


@pytest.fixture(scope="session")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of compiled programs that the processes of this test run share."""
    base = tmp_path_factory.getbasetemp()  # of one of several workers, it lies in that of all
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compilations"


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose time goes into compiling, not computing: XLA optimises little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
