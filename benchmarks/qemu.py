"""Contenders over NBD: qemu-img and nbdcopy, to qemu-nbd, over TCP on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.certificates import Certificates
from benchmarks.compiler import build
from benchmarks.contender import Contender, Copied
from benchmarks.devices import require_tools
from benchmarks.processes import cpu_seconds, free_port, listens_on, run_measured, server


@dataclass(frozen=True, slots=True)
class Setting:
    """How a copy travels. `preload`: a library for the server's sockets; `tls`: or in the clear."""

    preload: Path | None = None
    tls: Certificates | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What the server is started with."""
        return {"LD_PRELOAD": str(self.preload)} if self.preload else {}


def require_qemu() -> None:
    """Raise ImpossibleError unless all tools are there."""
    require_tools("qemu-img", "qemu-nbd", "nbdcopy", "cc")


@contextmanager
def nodelay_library() -> Iterator[Path]:
    """The path of a library that sets TCP_NODELAY on accepted sockets, compiled now."""
    with build("nodelay.c", "-shared", "-fPIC", "-ldl") as library:
        yield library


def contenders(
    library: Path, connections: tuple[int, ...] = (1,), tls: Certificates | None = None
) -> Iterator[Contender]:
    """Yield qemu-img, and nbdcopy with so many connections, each as it is and with no delay."""
    for suffix, setting in (("", Setting(tls=tls)), ("+nodelay", Setting(library, tls))):
        yield _convert(f"qemu-img{suffix}", setting)
        for count in connections:
            yield _nbdcopy(f"nbdcopy-{count}{suffix}", setting, count)


@contextmanager
def nbd_server(target: str, setting: Setting) -> Iterator[tuple[psutil.Process, int]]:
    """A qemu-nbd that serves a device for writing; yields it and its port.

    `-e 8` (clients that share the device) is also what lets it advertise NBD_FLAG_CAN_MULTI_CONN.
    """
    port = free_port()
    command = ["qemu-nbd", "--cache=none", "--aio=native", "-e", "8", "-f", "raw", "-t"]
    command += ["-b", "127.0.0.1", "-p", str(port)]
    if setting.tls:
        command += ["--object", _credentials(setting.tls, "server"), "--tls-creds", "tls"]
    with server(
        *command, target, ready=listens_on(port), environment=setting.environment
    ) as process:
        yield process, port


def _convert(name: str, setting: Setting) -> Contender:
    def copy(source: str, target: str) -> Copied:
        command = ["qemu-img", "convert", "-n", "-W", "-m", "16", "-t", "none", "-T", "none"]
        with nbd_server(target, setting) as (process, port):
            where = f"driver=nbd,host=127.0.0.1,port={port}"
            if setting.tls:
                command += ["--object", _credentials(setting.tls, "client")]
                where += ",tls-creds=tls"
            command += ["-f", "raw", "--target-image-opts", source, where]
            return _measure(process, command)

    return Contender(name, copy)


def _nbdcopy(name: str, setting: Setting, connections: int) -> Contender:
    def copy(source: str, target: str) -> Copied:
        with nbd_server(target, setting) as (process, port):
            uri = f"nbd://127.0.0.1:{port}/"
            if setting.tls:
                uri = f"nbds://127.0.0.1:{port}/?tls-certificates={setting.tls.qemu_directory}"
            command = ["nbdcopy", "--flush", f"--connections={connections}", source, uri]
            return _measure(process, command)

    return Contender(name, copy)


def _measure(process: psutil.Process, command: list[str]) -> Copied:
    served = cpu_seconds(process)
    ran = run_measured(*command)
    return Copied(ran.seconds, ran.cpu_seconds, cpu_seconds(process) - served)


def _credentials(tls: Certificates, endpoint: str) -> str:
    # verify-peer: both ends show a certificate, as our agents do.
    where = f"dir={tls.qemu_directory},endpoint={endpoint},verify-peer=on"
    return f"tls-creds-x509,id=tls,{where}"
