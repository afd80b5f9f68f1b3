"""A process that grows a disk, as an agent would, and dies of it: run by `test_crashes`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from agent.resize.overlay import Overlay
from tests.agent.resizing.disks import Disk, grow


def die_at(piece: int) -> None:
    """Let the process be killed once it has written that many pieces to the device."""
    original, written = Overlay._apply, []

    def apply(self: Overlay, offset: int, length: int) -> None:
        original(self, offset, length)
        written.append(offset)
        if len(written) == piece:
            os.kill(os.getpid(), signal.SIGKILL)

    Overlay._apply = apply  # type: ignore[method-assign]


def die_while_keeping() -> None:
    """Let the process be killed while it writes down what it is going to overwrite."""

    def keep(self: Overlay, runs: list[tuple[int, int]]) -> None:
        self._place.with_suffix(".kept").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    Overlay._keep = keep  # type: ignore[method-assign]


def main(path: str, data_bytes: str, place: str, piece: str) -> None:
    if piece == "keep":
        die_while_keeping()
    elif int(piece):
        die_at(int(piece))
    grow(Disk(path, int(data_bytes), 512, "", ""), Path(place))


if __name__ == "__main__":
    main(*sys.argv[1:])
