"""Powers a VM down over QMP: asks the guest, waits for QEMU to be gone, and no longer than agreed.

Owns finding the QEMU by its disks and ending it; made to be a quiesce hook. Never looks at what is
on the disks.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.errors import FailedPrecondition, NotFound, Unavailable, WarmsyncError
from agent.qemu.monitor import Monitor, converse, dial
from agent.qemu.node import is_named, list_nodes

PATIENCE_SECONDS = 10.0
"""How long QMP may take to answer."""
_LOOK_SECONDS = 0.5
_QUIT_SECONDS = 5.0
_OFF = frozenset({"shutdown", "guest-panicked"})
"""Run states of a guest that writes nothing any more (QMP, RunState)."""


@dataclass(frozen=True, slots=True)
class PoweredDown:
    """How a VM ended; `forced`: it did not by itself. `process_ended`: QEMU is gone, too."""

    socket: str
    seconds: float
    forced: bool
    process_ended: bool


@dataclass(frozen=True, slots=True)
class Found:
    """The QMP sockets of the QEMUs that have some disks, and the disks that none of them has."""

    sockets: list[str]
    missing: list[str]


def find_vms(paths: Sequence[str], sockets: Sequence[str]) -> Found:
    """Return which QEMUs have these disks.

    A disk is a device's or image's path as QEMU opened it, or SOCKET/NODE. Sockets at which nobody
    listens count as VMs that are off. Unavailable QMP_UNREACHABLE for one that does not answer, if
    a disk is not found elsewhere.
    """
    found, silent = dict[str, str](), list[WarmsyncError]()
    for address in sockets:
        try:
            nodes = converse(address, list_nodes, PATIENCE_SECONDS)
        except Unavailable as error:
            silent.append(error)
            continue
        except FailedPrecondition as error:
            if error.reason != "QEMU_GONE":
                raise
            continue
        for path in paths:
            if any(is_named(node, path) for node in nodes):
                found[path] = address
    missing = [path for path in paths if path not in found]
    if missing and silent:
        raise silent[0]
    return Found(sorted(set(found.values())), missing)


def not_found(path: str, sockets: Sequence[str]) -> NotFound:
    """Return the error of a disk that no QEMU has."""
    return NotFound(
        "VM_NOT_FOUND",
        f"no QEMU at {', '.join(sockets) or 'no socket'} has {path} open; name its QMP "
        "socket with --socket, or give --allow-off if the VM may be off already",
        path=path,
    )


def power_down(address: str, limit_seconds: float, *, kill: bool) -> PoweredDown:
    """Press the power button and wait until the guest is off. Blocking.

    FailedPrecondition GUEST_STILL_ON. `kill`: end QEMU after the limit; raised if that fails, too.
    """
    started = time.monotonic()
    with _process(address) as process:
        converse(address, lambda qmp: qmp.execute("system_powerdown"), PATIENCE_SECONDS)
        while time.monotonic() - started < limit_seconds:
            if _has_ended(process, _LOOK_SECONDS):
                return PoweredDown(address, time.monotonic() - started, False, True)
            if _is_off(address):  # and its QEMU stays (-no-shutdown)
                return PoweredDown(address, time.monotonic() - started, False, False)
        if not kill:
            raise FailedPrecondition(
                "GUEST_STILL_ON",
                f"the guest at {address} is still on {limit_seconds:g} s after its power button; "
                "power it down inside, raise --seconds, or allow --kill",
                socket=address,
                seconds=limit_seconds,
            )
        _end(address, process)
        return PoweredDown(address, time.monotonic() - started, True, True)


@contextlib.contextmanager
def _process(address: str) -> Iterator[int]:
    """Yield a descriptor of the process that listens at a socket (unix(7), pidfd_open(2))."""
    with dial(address, PATIENCE_SECONDS) as probe:
        size = struct.calcsize("3i")
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    descriptor = os.pidfd_open(struct.unpack("3i", credentials)[0])
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _has_ended(process: int, seconds: float) -> bool:
    waiter = select.poll()
    waiter.register(process, select.POLLIN)
    return bool(waiter.poll(seconds * 1000))


def _is_off(address: str) -> bool:
    async def ask(qmp: Monitor) -> bool:
        return (await qmp.execute("query-status"))["status"] in _OFF

    try:
        return converse(address, ask, PATIENCE_SECONDS)
    except WarmsyncError:
        return False  # it ends just now, or is busy: the process tells


def _end(address: str, process: int) -> None:
    with contextlib.suppress(WarmsyncError):  # it ends while it answers
        converse(address, lambda qmp: qmp.execute("quit"), PATIENCE_SECONDS)
    if not _has_ended(process, _QUIT_SECONDS):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        if not _has_ended(process, _QUIT_SECONDS):
            raise FailedPrecondition(
                "GUEST_STILL_ON",
                f"the QEMU at {address} has not ended {_QUIT_SECONDS:g} s after SIGKILL: the "
                "kernel holds it (state D in ps); see to the storage that it waits for, and start "
                "its VM nowhere else before it is gone",
                socket=address,
                seconds=_QUIT_SECONDS,
            )
