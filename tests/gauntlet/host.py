"""What an agent takes for its host: a boot id and a wall clock of its own.

The boot id is a file that is mounted over the kernel's in a mount namespace of the agent; the
clock is `clock.c`, preloaded. The machine's own are left alone.
"""

from __future__ import annotations

import uuid
from functools import cache
from pathlib import Path

from tests import devices
from tests.gauntlet.schedule import Schedule

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Host:
    """`command` is what an agent is run with."""

    def __init__(self, directory: Path, name: str, plan: Schedule, breach: str = "") -> None:
        self._boot = directory / f"{name}.boot_id"
        self._ahead = directory / f"{name}.clock"
        self.reboot()
        self.set_clock(0)
        preload = f"LD_PRELOAD={_clock()}" if f"clock {name}" in plan.kinds else "LD_PRELOAD="
        mount = f'mount --bind {self._boot} {_BOOT_ID} && exec "$@"'
        self.command = (
            *("env", preload, f"WARMSYNC_TEST_CLOCK={self._ahead}", *_break(breach)),
            # As a slave it sees what is unmounted later: else it would hold disks that are gone.
            *("unshare", "--mount", "--propagation", "slave", "sh", "-c", mount, "sh"),
        )

    def reboot(self) -> None:
        """Have another boot id, which the next agent will see."""
        # Another file: the one before stays mounted for whoever still runs.
        self._boot.unlink(missing_ok=True)
        self._boot.write_text(f"{uuid.uuid4()}\n")

    def set_clock(self, ahead_seconds: int) -> None:
        """Let the wall clock jump, also of an agent that runs."""
        self._ahead.write_text(str(ahead_seconds))


def _break(breach: str) -> tuple[str, ...]:
    """Return the environment in which an agent breaks a rule."""
    if not breach:
        return ()
    here = Path(__file__).parent
    places = f"{here / 'breaches' / 'preload'}:{here.parents[1]}"
    return f"PYTHONPATH={places}", f"WARMSYNC_TEST_BREACH={breach}"


@cache
def _clock() -> Path:
    """Build the library once; it lies beside the other things that were built."""
    code = Path(__file__).with_name("clock.c")
    built = Path(__file__).parents[2] / "build" / "gauntlet" / "clock.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    devices.run("gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", code, "-o", built)
    return built
