"""What benchmarks say of themselves: the row that one records is a row of the table of all."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from infsub import files


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    import growth  # pyright: ignore[reportMissingImports]
    import run  # pyright: ignore[reportMissingImports]
    import timing  # pyright: ignore[reportMissingImports]

    yield growth, run, timing
    for name in ("growth", "run", "timing"):
        del sys.modules[name]


def test_what_is_recorded_is_a_row_of_the_table(benchmarks, tmp_path, monkeypatch):
    _, run, timing = benchmarks
    timing.record("unheard", 1.0)  # alone, a benchmark prints
    monkeypatch.setenv(timing.RECORDS, str(tmp_path / "rows.jsonl"))
    timing.record("AIS", 2.0, "another", 3.0, flop=4e9, peak=8e9, compile_seconds=5.0, memory=6e6)
    timing.record("bare", 0.05, note="a note")
    rows = files.read_rows(tmp_path / "rows.jsonl")
    assert [row["name"] for row in rows] == ["AIS", "bare"]
    first, second = run.table([{"benchmark": "x"} | row for row in rows]).splitlines()[2:]
    assert first == "| x: AIS | 2,000 | another | 3,000 | 1.50 | 2 | 25% | 5.0 | 6.0 |  |"
    assert second == "| x: bare | 50 |  |  |  |  |  |  |  | a note |"


def test_an_exponent_is_the_power_that_seconds_grow_with(benchmarks):
    growth, _, _ = benchmarks
    sizes = (10, 30, 100)
    for power in (0.0, 1.0, 2.0):
        seconds = [3.0 * size**power for size in sizes]
        assert growth.exponent(sizes, seconds) == pytest.approx(power, abs=1e-9)


def test_memory_is_what_a_program_works_in(benchmarks):
    _, _, timing = benchmarks
    spent = timing.compiled(
        jax.jit(lambda x: jnp.sort(jnp.outer(x, x), axis=0).sum()), jnp.ones(256)
    )
    assert spent["compile_seconds"] > 0
    assert spent["memory"] >= 4 * 256**2
