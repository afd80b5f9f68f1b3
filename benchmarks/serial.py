"""When a virtual machine acknowledged what: its serial line, read while it runs.

Owns the clock of the lines (monotonic, `_POLL_SECONDS` coarse); never talks to the guest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_POLL_SECONDS = 0.002
_FAILURES = (b"bad ", b"failed ")


class Acknowledged:
    """The moments at which the host saw that a write was acknowledged."""

    def __init__(self, log: Path) -> None:
        self.moments: list[float] = []
        self._log = log
        self._failure = b""
        self._told = threading.Condition()
        self._ended = threading.Event()

    def wait_more(self, count: int, timeout_seconds: float) -> None:
        """Return when so many more have come. TimeoutError; RuntimeError if the guest failed."""
        with self._told:
            wanted = len(self.moments) + count
            is_there = self._told.wait_for(
                lambda: bool(self._failure) or len(self.moments) >= wanted, timeout_seconds
            )
        if self._failure:
            raise RuntimeError(f"the guest says: {self._failure.decode(errors='replace')}")
        if not is_there:
            raise TimeoutError(f"the guest has not written {count} records in {timeout_seconds} s")

    def listen(self) -> None:
        """Read what is said until `end`."""
        with self._log.open("rb", buffering=0) as file:
            rest = b""
            while not self._ended.wait(_POLL_SECONDS):
                *lines, rest = (rest + file.read()).split(b"\n")
                self._note(lines, time.monotonic())

    def end(self) -> None:
        """Let `listen` return."""
        self._ended.set()

    def _note(self, lines: list[bytes], now: float) -> None:
        if not lines:
            return
        with self._told:
            self.moments += [now for line in lines if line.startswith(b"ack ")]
            failures = (line for line in lines if line.startswith(_FAILURES))
            self._failure = self._failure or next(failures, b"")
            self._told.notify_all()


@contextmanager
def listening(log: Path) -> Iterator[Acknowledged]:
    """What a guest acknowledges in a log that is being written."""
    heard = Acknowledged(log)
    thread = threading.Thread(target=heard.listen, name="serial", daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        heard.end()
        thread.join()
