"""Fixtures that every test file may use, and how XLA compiles for the tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Nearly all of the tests' time is XLA's compiling, not its programs' running. Without its emitters of
# fused loops it takes a third to a half as long (the quickstart runs what users get), in one piece a tenth
# less of a core that another worker wants too, and what one process has compiled no other compiles again,
# unless that is as quick. Set before anything imports jax, and inherited by the commands that tests start.
_QUICKLY = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{_QUICKLY} {os.environ.get('XLA_FLAGS', '')}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache/compilations")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Tracing makes many objects and few cycles: collecting is a twentieth of the time otherwise.
gc.set_threshold(50_000, 20, 50)

# The same examples each time: a run is red for what changed. A first example may compile.
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """XLA optimises little while modules are imported too; xdist's controller imports none."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        import jax  # not before the variables above are set

        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and oracles beside the checkout; the test skips where there is none."""
    shared = ROOT.parent / "shared"
    if not (shared / "oracles").is_dir():
        if os.environ.get("CI"):
            pytest.fail("CI must have ../shared: its tests are not to be skipped there")
        pytest.skip("needs ../shared, the folder of real data and oracles")
    return shared


@pytest.fixture(scope="module")
def small_pictures() -> Iterator[None]:
    """The posteriors of two datapoints are drawn, and from fewer samples than one would look at."""
    from infsub import evaluate  # not before the variables above are set

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "_NUM_DRAWN", 2)
        patch.setattr(sys.modules["infsub.measure"], "_NUM_SAMPLES", 20_000)
        yield


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which compile too
def pytest_runtest_setup(item: pytest.Item) -> None:
    """XLA optimises little, but for tests marked `computing`, whose programs run for long."""
    import jax  # not before the variables above are set

    quick = item.get_closest_marker("computing") is None
    jax.config.update("jax_disable_most_optimizations", quick)
