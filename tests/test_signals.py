"""SIGTERM and Ctrl-C end the command with one sentence and 143 or 130, wherever it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infsub import signals

ROOT = Path(__file__).parent.parent
# Of its file alone, as the module needs no other: jax takes seconds to import.
LOAD = f"""
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("signals", {signals.__file__!r})
signals = module_from_spec(spec)
spec.loader.exec_module(signals)
"""
BUSY = """
signals.watch()
print("ready", flush=True)
{work}
print("not reached", flush=True)
"""
WORK = {
    "Python": "while True: pass",
    "C, which hears no Python": "import time; [time.sleep(60) for _ in range(9)]",
    "an except that swallows all": """
while True:
    try:
        raise ValueError
    except BaseException:
        pass
""",
}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def start(program: str) -> subprocess.Popen[str]:
    """A process that is ready to be sent signals."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD + program], stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed, once it has ended, within seconds."""
    try:
        return process.communicate(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("work", WORK)
def test_it_ends_within_seconds_with_a_sentence(work, number):
    process = start(BUSY.format(work=WORK[work]))
    process.send_signal(number)
    process.send_signal(number)  # twice, quickly
    out, error = ended(process)
    assert process.returncode == CODES[number]
    assert out == ""
    assert error.strip().splitlines() == [
        "infsub: stopped; all that was finished is kept, the same command continues."
    ]


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_while_jax_is_imported_too(tmp_path, number, seconds):
    command = [sys.executable, "-m", "infsub.main", "--mode=status", f"--workdir={tmp_path}"]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    while not _watches(process.pid):  # Python itself must have started
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(number)
    _, error = process.communicate(timeout=10)
    assert "Traceback" not in error
    late = {2} if seconds else set()  # it was done: there is no run
    assert process.returncode in {CODES[number]} | late
    assert len(error.strip().splitlines()) == 1


def _watches(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, by what Linux says of it."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))
    return False


SAVES = """
import time
signals.watch()
with signals.noted() as stop:
    print("ready", flush=True)
    while not stop.number:
        time.sleep(0.01)
    print("saved", flush=True)
    raise SystemExit(128 + stop.number)
"""


@pytest.mark.parametrize("number", CODES)
def test_noted_work_may_save_first(number):
    process = start(SAVES)
    process.send_signal(number)
    process.send_signal(number)
    out, _ = ended(process)
    assert (out, process.returncode) == ("saved\n", CODES[number])


def test_what_is_to_be_done_at_the_end_is_done_once_each_and_may_fail():
    program = """
signals.at_end(lambda: 1 / 0)
signals.at_end(lambda: print("first", flush=True))
signals.at_end(lambda: print("taken back", flush=True))()
"""
    process = start(program + BUSY.format(work=WORK["Python"]))
    process.send_signal(signal.SIGTERM)
    assert (ended(process)[0], process.returncode) == ("first\n", 143)


def test_noted_work_that_does_not_end_is_ended(monkeypatch):
    program = SAVES.replace("signals.watch()", "signals.GRACE = 0.2; signals.watch()")
    process = start(program.replace("while not stop.number", "while True"))
    process.send_signal(signal.SIGTERM)
    out, error = ended(process)
    assert (out, process.returncode) == ("", 143)
    assert "the same command continues" in error


def test_a_library_borrows_the_handlers_and_gives_them_back():
    before = [signal.getsignal(number) for number in signals.NUMBERS]
    with signals.noted() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop.number and time.monotonic() < deadline:
            time.sleep(0.001)
        assert stop.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in signals.NUMBERS] == before
