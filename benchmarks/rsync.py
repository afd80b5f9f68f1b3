"""The contender rsync: a daemon that writes devices, over TCP on the loopback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.contender import Contender, Copied
from benchmarks.devices import require_tools, scratch_directory
from benchmarks.processes import cpu_seconds, free_port, listens_on, run_measured, server

_REAPED_SECONDS = 5.0
_CONFIGURATION = """\
use chroot = no
uid = 0
gid = 0
[devices]
path = {directory}
read only = no
# A daemon refuses this one unless told otherwise.
refuse options = !write-devices
"""


def require_rsync() -> None:
    """Raise ImpossibleError unless it is there."""
    require_tools("rsync")


def contender(*, delta: bool = False) -> Contender:
    """Copy whole files, or with the delta algorithm: digests of the target go to the source."""

    def copy(source: str, target: str) -> Copied:
        with _daemon(target) as (process, port):
            # --fsync: durable when it returns, as with everybody else. --ignore-times: devices
            # have no time that says whether they changed.
            command = ["rsync", "--copy-devices", "--write-devices", "--inplace", "--fsync"]
            command += ["--ignore-times", "--no-whole-file" if delta else "--whole-file", source]
            served = cpu_seconds(process)
            ran = run_measured(*command, f"rsync://127.0.0.1:{port}/devices/{Path(target).name}")
            return Copied(ran.seconds, ran.cpu_seconds, _used(process) - served)

    return Contender("rsync-delta" if delta else "rsync", copy)


@contextmanager
def _daemon(target: str) -> Iterator[tuple[psutil.Process, int]]:
    port = free_port()
    with scratch_directory() as directory:
        file = directory / "rsyncd.conf"
        file.write_text(_CONFIGURATION.format(directory=Path(target).parent))
        command = ["rsync", "--daemon", "--no-detach", f"--config={file}"]
        command += ["--address=127.0.0.1", f"--port={port}", "--log-file=/dev/null"]
        with server(*command, ready=listens_on(port)) as process:
            yield process, port


def _used(process: psutil.Process) -> float:
    """Return the processor time, once the children of the connection are gone and counted."""
    deadline = time.monotonic() + _REAPED_SECONDS
    while process.children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return cpu_seconds(process)
