"""Fixtures that every test file may use, and how XLA compiles for the tests."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Nearly all of the tests' time is XLA's compiling, not its programs' running. Without its emitters of
# fused loops it takes a third to a half as long; the quickstart runs what users get. What the
# environment says comes last, and wins.
os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"


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


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which compile too
def pytest_runtest_setup(item: pytest.Item) -> None:
    """XLA optimises little, but for tests marked `computing`, whose programs run for long."""
    quick = item.get_closest_marker("computing") is None
    jax.config.update("jax_disable_most_optimizations", quick)
