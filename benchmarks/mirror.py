"""The contender QEMU: `blockdev-mirror` in qemu-storage-daemon, to qemu-nbd over TCP.

The guest reaches its disk over a unix socket, so that its writes do not wait for a network that
is not there when a disk is QEMU's own.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.devices import require_tools, run, scratch_directory
from benchmarks.guest import Disk
from benchmarks.processes import START_SECONDS, server
from benchmarks.qemu import Setting, nbd_server

MODES = ("background", "write-blocking")
JOB = "mirror"


def require_mirror() -> None:
    """Raise ImpossibleError unless all tools are there."""
    require_tools("qemu-storage-daemon", "qemu-nbd", "cc", "fio", "ss")


class Monitor:
    """A connection to a daemon's QMP socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(START_SECONDS)
        self._socket.connect(str(path))
        self._buffer = b""
        self._events: list[str] = []
        self._receive()  # the greeting
        self.execute("qmp_capabilities")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Return what a command returns. RuntimeError with its words if it is refused."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": names}).encode())
        self._socket.settimeout(START_SECONDS)
        while True:
            message = self._receive()
            if "error" in message:
                raise RuntimeError(f"{command}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]

    def wait(self, event: str, timeout_seconds: float) -> bool:
        """Wait for an event, or take one that has come; False if it does not come in time."""
        deadline = time.monotonic() + timeout_seconds
        while event not in self._events:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                message = self._receive()
            except TimeoutError:
                return False
            if message.get("data", {}).get("error"):
                raise RuntimeError(f"{message['event']}: {message['data']['error']}")
        return True

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            received = self._socket.recv(1 << 16)
            if not received:
                raise RuntimeError("QEMU has hung up")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message["event"])
        return message


class Mirror:
    """A source disk that QEMU serves to the guest, and can mirror to a target."""

    def __init__(self, monitor: Monitor, disk: Disk, port: int) -> None:
        self.disk = disk
        self._monitor = monitor
        self._port = port

    def start(self, mode: str) -> None:
        """Begin to mirror the whole disk."""
        self._monitor.execute(
            "blockdev-mirror",
            job_id=JOB,
            device="source",
            target="target",
            sync="full",
            copy_mode=mode,
        )

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until the job is ready: the target follows the source. False if it is not."""
        return self._monitor.wait("BLOCK_JOB_READY", timeout_seconds)

    def finish(self, timeout_seconds: float) -> None:
        """End a job that is ready; it flushes the target. The source stays the guest's disk."""
        finish(self._monitor, timeout_seconds)

    def sent_bytes(self) -> int:
        """Return how much the target has received over TCP, requests with their headers."""
        return received_bytes(self._port)


def finish(monitor: Monitor, timeout_seconds: float) -> None:
    """End a job that is ready: it completes, with an equal target, and flushes it."""
    monitor.execute("block-job-cancel", device=JOB)
    if not monitor.wait("BLOCK_JOB_COMPLETED", timeout_seconds):
        raise RuntimeError(f"the mirror does not end within {timeout_seconds} s")


def received_bytes(port: int) -> int:
    """Return what the connections to a port of this host have received so far, by the kernel."""
    shown = run("ss", "-tinH", "state", "established", f"( sport = :{port} )")
    return sum(int(count) for count in re.findall(r"bytes_received:(\d+)", shown))


@contextmanager
def mirror(source: str, target: str, size_bytes: int, setting: Setting) -> Iterator[Mirror]:
    """A storage daemon that serves the source, and a qemu-nbd that serves the target."""
    with scratch_directory() as directory, nbd_server(target, setting) as (_, port):
        export, control = directory / "guest", directory / "qmp"
        command = ["qemu-storage-daemon"]
        command += ["--chardev", f"socket,path={control},server=on,wait=off,id=qmp"]
        command += ["--monitor", "chardev=qmp"]
        command += ["--blockdev", _node("source", f"host_device,filename={source}", "aio=native")]
        where = f"nbd,server.type=inet,server.host=127.0.0.1,server.port={port}"
        command += ["--blockdev", _node("target", where)]
        command += ["--nbd-server", f"addr.type=unix,addr.path={export}"]
        command += ["--export", "nbd,id=guest,node-name=source,name=guest,writable=on"]

        def ready(_: subprocess.Popen[bytes]) -> bool:
            return export.exists() and control.exists()

        with server(*command, ready=ready, environment=setting.environment):
            monitor = Monitor(control)
            try:
                uri = f"nbd+unix:///guest?socket={export}"
                yield Mirror(monitor, Disk.of_export(uri, size_bytes), port)
            finally:
                monitor.close()


def _node(name: str, *words: str) -> str:
    return f"driver={','.join(words)},node-name={name},cache.direct=on"
