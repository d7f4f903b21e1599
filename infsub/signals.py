"""SIGTERM and Ctrl-C end the command within seconds, with one sentence and 143 or 130, wherever it is.

The operating system's handler writes the signal's number into a pipe, even while XLA compiles and no
Python runs; a thread reads it. Work that is safe to kill (all of it: files are renamed into place,
rows appended whole) is ended by that thread at once. Training asks for a moment, to save its last
steps. Imports the standard library alone, and is watching before jax is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

NUMBERS = (signal.SIGTERM, signal.SIGINT)
GRACE = 10.0  # seconds that training may take to save


class Request:
    """A request to stop, noted for the work that asked to hear of it.

    Attributes:
      number: of the signal; 0: none came.
    """

    def __init__(self) -> None:
        self.number = 0

    def end_late(self) -> None:
        """Ends the process if the work has not ended by itself."""
        _stop(self.number)


_listening: list[Request] = []
_actions: list[Callable[[], None]] = []
_watching = False


def watch() -> None:
    """From now on the signals end this process with a sentence; once, in the main thread."""
    global _watching
    if _watching:
        return
    _watching = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in NUMBERS:
        signal.signal(number, _nothing)
    threading.Thread(target=_read, args=(reader,), daemon=True).start()


def take_back() -> None:
    """Gives Python's handlers their signals again, after a library has put its own beneath them."""
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS:
            signal.signal(number, signal.getsignal(number))


def _nothing(number: int, _frame: Any) -> None:
    """The thread acts; but a signal whose handler is the default writes nothing into the pipe."""


def _read(reader: int) -> None:
    while number := os.read(reader, 1):
        if number[0] not in NUMBERS:
            continue
        if not _listening:
            _stop(number[0])
        request = _listening[-1]
        if not request.number:
            request.number = number[0]
            timer = threading.Timer(GRACE, request.end_late)
            timer.daemon = True
            timer.start()


def at_end(action: Callable[[], None]) -> Callable[[], None]:
    """Calls `action` before a signal ends the process; what is returned takes that back."""
    _actions.append(action)

    def forget() -> None:
        with contextlib.suppress(ValueError):
            _actions.remove(action)

    return forget


def _stop(number: int) -> None:
    end("stopped; all that was finished is kept, the same command continues.", 128 + number)


def end(text: str, code: int) -> None:
    """Ends this process from any thread, with a sentence, whatever the main thread does."""
    for action in _actions.copy():
        with contextlib.suppress(Exception):
            action()
    # Straight to the descriptor: the main thread may hold the locks of sys.stderr.
    with contextlib.suppress(OSError):
        os.write(2, f"\ninfsub: {text}\n".encode())
    os._exit(code)


@contextlib.contextmanager
def noted() -> Iterator[Request]:
    """While entered, the first signal is noted in the Request instead of ending the process.

    The work has GRACE seconds to end after it. Where nobody watches, in a notebook or in another
    program, the handlers are borrowed and given back, and a second Ctrl-C is obeyed.
    """
    request = Request()
    if _watching:
        _listening.append(request)
        try:
            yield request
        finally:
            _listening.remove(request)
        return
    before: dict[int, Callable[..., Any] | int | None] = {}

    def note(number: int, _frame: Any) -> None:
        if request.number == signal.SIGINT == number:
            raise KeyboardInterrupt
        request.number = number

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in NUMBERS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_command() -> bool:
    """Whether this process is infsub's command line, seen before its modules are imported."""
    given = sys.orig_argv[1:]
    module = given[given.index("-m") + 1 : given.index("-m") + 2] if "-m" in given else []
    return module in (["infsub"], ["infsub.main"]) or os.path.basename(sys.argv[0]) == "infsub"
