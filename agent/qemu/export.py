"""Exports: what a QEMU shows of a disk over NBD, and the server for it.

Owns that each is removed again, and the server with the last one. A QEMU has one NBD server; if
others have started it, ours goes there too, if the configuration names its socket.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from contextlib import suppress

from agent.errors import FailedPrecondition
from agent.qemu.access import Access
from agent.qemu.monitor import Monitor, is_refused
from native.nbd import NbdDevice

_POLL_SECONDS = 0.002


async def add_export(
    monitor: Monitor, access: Access, node: str, name: str, bitmaps: list[str]
) -> str:
    """Show a node read-only under a name of ours; return the NBD server's socket.

    QMP_REFUSED; FailedPrecondition QEMU_NBD_BUSY where a server runs whose socket is not known.
    """
    await remove_export(monitor, name)
    candidates = await _start_server(monitor, access)
    await monitor.execute(
        "block-export-add",
        type="nbd",
        id=name,
        node_name=node,
        name=name,
        writable=False,
        bitmaps=bitmaps,
    )
    found = next((path for path in candidates if _shows(path, name)), None)
    if found is None:
        await remove_export(monitor, name)
        raise FailedPrecondition(
            "QEMU_NBD_BUSY",
            f"the QEMU at {monitor.socket_path} runs an NBD server that is not ours; stop it "
            "(nbd-server-stop), or name its socket in the agent's configuration "
            "([qemu] nbd_sockets)",
            socket=monitor.socket_path,
        )
    return found


async def remove_export(monitor: Monitor, name: str) -> None:
    """Remove an export, if it is there, and wait until it is gone."""
    asked = False
    while name in await list_exports(monitor):
        if not asked:
            await monitor.execute("block-export-del", id=name, mode="hard")
            asked = True
        await asyncio.sleep(_POLL_SECONDS)


async def list_exports(monitor: Monitor) -> list[str]:
    """Return the ids of all NBD exports."""
    found = await monitor.execute("query-block-exports")
    return [one["id"] for one in found if one["type"] == "nbd"]


async def stop_server(monitor: Monitor, access: Access) -> None:
    """Stop our server once nothing is exported any more; another's is left alone."""
    path = access.nbd_path(monitor.socket_path)
    if await list_exports(monitor) or not _listens(path):
        return
    await monitor.execute("nbd-server-stop")
    with suppress(FileNotFoundError):
        os.unlink(path)


def forget_server(access: Access, qmp_socket: str) -> None:
    """Remove the socket of a server of ours whose process has ended."""
    path = access.nbd_path(qmp_socket)
    if not _listens(path):
        with suppress(FileNotFoundError):
            os.unlink(path)


def await_no_server(access: Access, qmp_socket: str) -> None:
    """Wait for a process that was told to end, so that the socket of its server can be removed."""
    deadline = time.monotonic() + access.patience_seconds
    while _listens(access.nbd_path(qmp_socket)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


async def _start_server(monitor: Monitor, access: Access) -> list[str]:
    """Return the sockets at which the server may be."""
    path = access.nbd_path(monitor.socket_path)
    access.run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
    try:
        await monitor.execute("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    except FailedPrecondition as error:
        if not is_refused(error, "already running"):
            raise
        return [path, *access.find_nbd_sockets()]
    with suppress(OSError):  # what is read here is the guest's; QEMU may be another user
        os.chmod(path, 0o600)
    return [path]


def _shows(path: str, name: str) -> bool:
    try:
        NbdDevice(path, socket_path=path, export=name, connections=1, patience_seconds=2).close()
    except OSError:
        return False
    return True


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # so many wait for it that its queue is full
        except OSError:
            return False
    return True
