"""Processes of contenders: run and measured, or kept running as servers; always ended again."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil

START_SECONDS = 20.0
"""How long a server may take to get ready."""

_STOP_SECONDS = 20.0
_NO_ENVIRONMENT: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended well: its time, and the processor time of its whole tree."""

    seconds: float
    cpu_seconds: float
    output: str


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time that a process and those it has waited for have used.

    What children that still run have used is added: a server that forks for each connection is
    one contender.
    """
    times = process.cpu_times()
    own = times.user + times.system + times.children_user + times.children_system
    return float(own) + sum(cpu_seconds(child) for child in process.children())


def run_measured(*command: str) -> Ran:
    """Run a command to its end. RuntimeError with its words if it fails."""
    with tempfile.TemporaryFile("w+") as words:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT)
        try:
            cpu = await_end(process)
        except BaseException:
            stop(process, signal.SIGKILL)
            raise
        seconds = time.monotonic() - started
        words.seek(0)
        output = words.read()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}: {output}")
    return Ran(seconds, cpu, output)


def await_end(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> float:
    """Wait for a process that ends by itself; return its processor time, and its children's."""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


@contextmanager
def server(
    *command: str,
    ready: Callable[[subprocess.Popen[bytes]], bool],
    environment: Mapping[str, str] = _NO_ENVIRONMENT,
) -> Iterator[psutil.Process]:
    """A process that serves once `ready` says so; RuntimeError if it does not come to it."""
    process = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready(process):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} does not get ready")
            time.sleep(0.01)
        yield psutil.Process(process.pid)
    finally:
        stop(process)


def listens_on(port: int) -> Callable[[subprocess.Popen[bytes]], bool]:
    """Return a `ready` for TCP. It looks at the kernel's table: a connection would be a client."""

    def ready(process: subprocess.Popen[bytes]) -> bool:
        with suppress(psutil.NoSuchProcess):
            connections = psutil.Process(process.pid).net_connections()
            return any(one.laddr.port == port for one in connections if one.laddr)
        return False

    return ready


def free_port() -> int:
    """Return a TCP port of the loopback that nobody has."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_exit(pid: int, timeout_seconds: float) -> bool:
    """Wait until a child has ended, without reaping it; False if it does not.

    It tells at once, where `Popen.wait` with a limit looks every 50 ms.
    """
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], timeout_seconds)[0])
    finally:
        os.close(descriptor)


def stop(
    process: subprocess.Popen[bytes] | subprocess.Popen[str], how: int = signal.SIGTERM
) -> None:
    """End a process, whatever it takes, and wait for it."""
    if process.poll() is None:
        process.send_signal(how)
        if not wait_exit(process.pid, _STOP_SECONDS):
            process.kill()
    process.wait()
