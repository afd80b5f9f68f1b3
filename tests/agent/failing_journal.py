"""A process whose journal's disk fails, and which is killed then: run by `test_journal`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from agent.errors import WarmsyncError
from agent.journal import Journal
from agent.migration import Role


def save(journal: Journal, number: int) -> None:
    """Save, and show how that went."""
    try:
        journal.save(Role.TARGET, "web1", {"number": number})
        print("kept")
    except WarmsyncError as error:
        print(type(error).__name__, error.reason)


def main(directory: str, *faults: str) -> None:
    """Save on a disk that is well, then on one with each of the faults; die."""
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    journal = Journal(Path(directory))
    save(journal, 0)
    for number, fault in enumerate(faults, 1):
        ctypes.c_int.in_dll(library, "failing_syncs").value = int("sync" in fault)
        ctypes.c_int.in_dll(library, "read_only").value = int("read-only" in fault)
        save(journal, 0 if fault == "as before" else number)
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
