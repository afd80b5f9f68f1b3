"""What an agent takes for its host: a boot id and a wall clock of its own.

Both come from files, through the library `host.c`, preloaded. The machine's own are left alone.
"""

from __future__ import annotations

import os
import uuid
from functools import cache
from pathlib import Path

from tests import devices
from tests.gauntlet.schedule import Schedule


class Host:
    """`command` is what an agent is run with."""

    def __init__(self, directory: Path, name: str, plan: Schedule, breach: str = "") -> None:
        self._boot = directory / f"{name}.boot_id"
        self._ahead = directory / f"{name}.clock"
        self.reboot()
        self.set_clock(0)
        clock = (f"WARMSYNC_TEST_CLOCK={self._ahead}",) if f"clock {name}" in plan.kinds else ()
        boot = f"WARMSYNC_TEST_BOOT_ID={self._boot}"
        changed = _change(breach, plan.release_seconds)
        self.command = ("env", f"LD_PRELOAD={_library()}", boot, *clock, *changed)

    def reboot(self) -> None:
        """Have another boot id, which the next agent will see."""
        self._boot.write_text(f"{uuid.uuid4()}\n")

    def set_clock(self, ahead_seconds: int) -> None:
        """Let the wall clock jump, also of an agent that runs."""
        self._ahead.write_text(str(ahead_seconds))


def _change(breach: str, release_seconds: float | None) -> tuple[str, ...]:
    """Return the environment in which an agent breaks a rule, or has another limit."""
    changed = []
    if breach:
        changed.append(f"WARMSYNC_TEST_BREACH={breach}")
    if release_seconds is not None:
        changed.append(f"WARMSYNC_TEST_RELEASE_SECONDS={release_seconds}")
    here = Path(__file__).parent
    places = f"{here / 'breaches' / 'preload'}:{here.parents[1]}"
    return (f"PYTHONPATH={places}", *changed) if changed else ()


@cache
def _library() -> Path:
    """Build the library once; it lies beside the other things that were built."""
    code = Path(__file__).with_name("host.c")
    built = Path(__file__).parents[2] / "build" / "gauntlet" / "host.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    made = built.with_suffix(f".{os.getpid()}")  # another run may be using it
    devices.run("gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", code, "-o", made)
    return made.rename(built)
