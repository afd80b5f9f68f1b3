"""Block nodes: which one is a disk, in which QEMU, and its dirty bitmaps.

Owns the search by the name of an image, and what makes a node the disk that a guest sees. Changes
nothing.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

from agent.errors import FailedPrecondition, NotAllowed, NotFound, Unavailable, WarmsyncError
from agent.qemu.access import Access
from agent.qemu.monitor import Monitor, converse

FILTERS = frozenset(
    {
        "blklogwrites",
        "commit_top",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "mirror_top",
        "throttle",
    }
)
"""Nodes that stand over a disk, a job's or for good: what is written passes them."""
_PROTOCOLS = frozenset({"file", "host_device", "nvme"})
"""Nodes under a format, which show the image's own bytes."""
_OPTIONS = "json:"
"""How a node's file is told that was opened with options which matter."""
SETTLE_SECONDS = 5.0
"""What a QEMU that answers may be without a disk: when it begins, and when it ends."""


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap; `count_bytes` are dirty. `inconsistent`: QEMU did not end well."""

    name: str
    recording: bool
    count_bytes: int
    inconsistent: bool


@dataclass(frozen=True, slots=True)
class Node:
    """A disk as a QEMU has it. `path` is its image's real path; empty where there is none."""

    socket: str
    name: str
    driver: str
    path: str
    size_bytes: int
    read_only: bool
    bitmaps: tuple[Bitmap, ...] = ()
    keeps_bitmaps: bool = False
    """Whether persistent bitmaps outlive QEMU: in qcow2, but for its first version."""
    is_plain: bool = True
    """Whether an image alone says what it shows: no offset, no other backing file, no key."""


async def list_nodes(monitor: Monitor) -> list[Node]:
    """Return all nodes of a QEMU."""
    found = await monitor.execute("query-named-block-nodes", flat=True)
    return [_node(monitor.socket_path, one) for one in found]


async def get_node(monitor: Monitor, name: str) -> Node | None:
    """Return a node by its name."""
    return next((node for node in await list_nodes(monitor) if node.name == name), None)


def find_again(
    source: str, name: str, socket: str, access: Access, settle_seconds: float = SETTLE_SECONDS
) -> Node | None:
    """Return the disk in the QEMU that had it, or in the one that was started there since.

    None if no QEMU is there. QEMU_DISK_REPLACED from one that answers and does not have the disk:
    its guest may run and write elsewhere. QMP_UNREACHABLE, QEMU_DISK_AMBIGUOUS and
    QEMU_DISK_READ_ONLY.
    """
    deadline = time.monotonic() + settle_seconds
    while True:
        try:
            nodes = converse(socket, list_nodes, access.patience_seconds)
        except FailedPrecondition as error:
            if error.reason == "QEMU_GONE":
                return None
            raise
        disks = _disks([node for node in nodes if is_named(node, source)])
        same = [node for node in disks if node.name == name] or disks
        if same:
            return _choose(source, [socket], same, [])
        if time.monotonic() > deadline:
            raise replaced(source, socket, "it is none of its disks any more")
        time.sleep(0.1)


def find_node(source: str, access: Access) -> Node:
    """Return the disk that `source` names: an image's path, or SOCKET/NODE.

    NotAllowed QMP_NOT_ALLOWED without a configuration, NotFound QEMU_DISK_NOT_FOUND,
    FailedPrecondition QEMU_DISK_AMBIGUOUS and QEMU_DISK_READ_ONLY, Unavailable QMP_UNREACHABLE if a
    QEMU that might have it does not answer.
    """
    if not access.sockets:
        raise NotAllowed(
            "QMP_NOT_ALLOWED",
            "this agent may talk to no QEMU; name their QMP sockets in its configuration "
            "([qemu] sockets)",
            path=source,
        )
    sockets = access.find_sockets()
    matches, silent = list[Node](), list[WarmsyncError]()
    for socket in sockets:
        try:
            nodes = converse(socket, list_nodes, access.patience_seconds)
        except Unavailable as error:
            silent.append(error)
            continue
        except FailedPrecondition as error:
            if error.reason != "QEMU_GONE":  # else a socket that its QEMU has left behind
                raise
            continue
        matches += [node for node in nodes if is_named(node, source)]
    return _choose(source, sockets, _disks(matches), silent)


def replaced(source: str, socket: str, detail: str) -> FailedPrecondition:
    """Return the error of a QEMU whose guest has another disk now."""
    return FailedPrecondition(
        "QEMU_DISK_REPLACED",
        f"the QEMU at {socket} has another disk in place of {source} ({detail}), and its guest "
        "may write there; start a new migration, of the disk that the guest has now",
        path=source,
        socket=socket,
    )


def _choose(
    source: str, sockets: list[str], disks: list[Node], silent: list[WarmsyncError]
) -> Node:
    writable = [node for node in disks if not node.read_only]
    if len(writable) == 1:
        return writable[0]
    if writable:
        names = ", ".join(f"{node.socket}/{node.name}" for node in writable)
        raise FailedPrecondition(
            "QEMU_DISK_AMBIGUOUS",
            f"{source} is more than one disk ({names}); name it as SOCKET/NODE",
            path=source,
        )
    if disks:
        raise FailedPrecondition(
            "QEMU_DISK_READ_ONLY",
            f"{source} is open read-only in the QEMU at {disks[0].socket} (under a snapshot?); "
            "name the image that the guest writes to",
            path=source,
            socket=disks[0].socket,
        )
    if silent:
        raise silent[0]
    raise NotFound(
        "QEMU_DISK_NOT_FOUND",
        f"none of the {len(sockets)} QEMUs that answer to this agent has the disk {source}; check "
        "that its VM runs and that [qemu] sockets matches its QMP socket; if the VM is off, open "
        "the image in a qemu-storage-daemon with such a socket",
        path=source,
        sockets=len(sockets),
    )


def is_named(node: Node, source: str) -> bool:
    """Return whether `source` means this node: its image by any path, or SOCKET/NODE."""
    if source == f"{node.socket}/{node.name}":
        return True
    return bool(node.path) and node.path == os.path.realpath(source)


def _disks(nodes: list[Node]) -> list[Node]:
    """Leave out what stands over or under the disks, in each QEMU for itself.

    But a filter that was named itself: only it is among these then.
    """
    nodes = [node for node in nodes if node.driver not in FILTERS] or nodes
    formats = {node.socket for node in nodes if node.driver not in _PROTOCOLS}
    return [node for node in nodes if node.driver not in _PROTOCOLS or node.socket not in formats]


def _node(socket: str, told: dict[str, Any]) -> Node:
    name = told["file"]
    return Node(
        socket=socket,
        name=told["node-name"],
        driver=told["drv"],
        path=_path(name),
        size_bytes=told["image"]["virtual-size"],
        read_only=told["ro"],
        bitmaps=tuple(_bitmap(one) for one in told.get("dirty-bitmaps", ()) if "name" in one),
        keeps_bitmaps=told["drv"] == "qcow2" and _compat(told["image"]) != "0.10",
        is_plain=name.startswith("/"),
    )


def _path(name: str) -> str:
    """Return the real path of the file under a node; empty if there is none."""
    if name.startswith(_OPTIONS):
        try:
            told = json.loads(name.removeprefix(_OPTIONS))
        except ValueError:  # QEMU cuts it off if it is too long
            return ""
        while isinstance(told.get("file"), dict):
            told = told["file"]
        name = str(told.get("filename", ""))
    return os.path.realpath(name) if name.startswith("/") else ""


def _compat(image: dict[str, Any]) -> str:
    return str(image.get("format-specific", {}).get("data", {}).get("compat", ""))


def _bitmap(told: dict[str, Any]) -> Bitmap:
    return Bitmap(
        told["name"], told["recording"], told["count"], bool(told.get("inconsistent", False))
    )
