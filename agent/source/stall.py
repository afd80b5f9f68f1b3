"""The watch over the disks of one source: one that answers nothing is told, with its name.

Owns a timer, and what it has told. A call into the kernel cannot be ended from outside, so nothing
is ended here and no error is made of it: whoever waits goes on when the disk does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from agent.counters import Requests
from agent.disk import SourceDisk
from agent.sender import Sender

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
STALL_SECONDS = 30.0
"""How long a disk may end none of its requests, or a flush last, before it is told. The kernel
gives up on a request of a SCSI or NVMe disk after as long, by default."""


class StallWatch:
    """One migration's, while it runs."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._silences = [Silence(disk) for disk in sender.disks]
        self._timer: asyncio.TimerHandle | None = None
        self._told = ""

    def start(self) -> None:
        """Look at the disks from now on."""
        self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def stop(self) -> None:
        """Look no more. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tell("")

    def _look(self) -> None:
        self.start()
        now = time.monotonic()
        paths = [one.path for one in self._silences if one.seconds(now) >= STALL_SECONDS]
        self._tell(stalled(paths, STALL_SECONDS) if paths else "")

    def _tell(self, text: str) -> None:
        """Show it where nothing else is shown; what others show is theirs to take back."""
        shown = self._sender.progress.trouble
        if text != self._told:
            _log.warning('source stalls message="%s"', text or "all disks answer again")
        if text != shown and shown in ("", self._told):
            self._sender.note(trouble=text)
        self._told = text


class Silence:
    """How long one disk has answered nothing, as often as it is asked."""

    def __init__(self, disk: SourceDisk) -> None:
        self._disk = disk
        self._last: Requests | None = None
        self._since: float | None = None

    @property
    def path(self) -> str:
        """The source's."""
        return self._disk.volume.source

    def seconds(self, now: float) -> float:
        """Return for how long it has had something to do and ended none of it; `now`: monotonic.

        What the kernel counts shows reads and writes, whoever made them; a flush only shows in the
        call that waits for it.
        """
        found, before = self._disk.requests(), self._last
        self._last = found
        silent = found is not None and found.in_flight > 0
        if not silent or before is None or found is None or found.ended != before.ended:
            self._since = now
        flushing = self._disk.flushing_since
        return max(now - (self._since or now), now - (flushing or now))


def stalled(paths: Sequence[str], seconds: float) -> str:
    """Return what is told of disks that answer nothing."""
    names = ", ".join(paths)
    return f"source {names}: no answer for {seconds:.0f} s; check the disk and the kernel log"
