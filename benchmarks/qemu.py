"""The contender: `qemu-img convert` to `qemu-nbd`, over TCP on the loopback."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.agents import cpu_seconds
from benchmarks.devices import require_tools, run, scratch_directory

_START_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Copied:
    """One copy: its time, and the processor time of both ends."""

    seconds: float
    sender_cpu_seconds: float
    receiver_cpu_seconds: float


def require_qemu() -> None:
    """Raise ImpossibleError unless both tools are there."""
    require_tools("qemu-img", "qemu-nbd")


def version() -> str:
    """Return "qemu-img version 7.2.1"."""
    return run("qemu-img", "--version").splitlines()[0].split(" (")[0]


def copy(source: str, target: str, *, nodelay: Path | None = None) -> Copied:
    """Copy a device to another. `nodelay`: a library to preload into the server."""
    with _server(target, nodelay) as (server, port):
        command = ["qemu-img", "convert", "-n", "-W", "-m", "16", "-t", "none", "-T", "none"]
        command += ["-f", "raw", "-O", "raw", source, f"nbd://127.0.0.1:{port}/"]
        served, used = cpu_seconds(server), _children_seconds()
        started = time.monotonic()
        run(*command)
        seconds = time.monotonic() - started
        return Copied(seconds, _children_seconds() - used, cpu_seconds(server) - served)


@contextmanager
def nodelay_library() -> Iterator[Path]:
    """The path of a library that sets TCP_NODELAY on accepted sockets, compiled now."""
    require_tools("cc")
    with scratch_directory() as directory:
        library = directory / "nodelay.so"
        source = Path(__file__).with_name("nodelay.c")
        run("cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
        yield library


@contextmanager
def _server(target: str, nodelay: Path | None) -> Iterator[tuple[psutil.Process, int]]:
    port = _free_port()
    command = ["qemu-nbd", "--cache=none", "--aio=native", "-e", "8", "-f", "raw", "-t"]
    command += ["-b", "127.0.0.1", "-p", str(port), target]
    preload = {"LD_PRELOAD": str(nodelay)} if nodelay else {}
    with subprocess.Popen(command, env={**os.environ, **preload}) as process:
        try:
            _await(process, port)
            yield psutil.Process(process.pid), port
        finally:
            process.terminate()


def _await(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until it listens. A look at the kernel's table: a connection would count as a client."""
    deadline = time.monotonic() + _START_SECONDS
    server = psutil.Process(process.pid)
    while not any(one.laddr.port == port for one in server.net_connections()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"qemu-nbd does not listen on port {port}")
        time.sleep(0.01)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _children_seconds() -> float:
    """Return the processor time of all processes that have ended and been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
