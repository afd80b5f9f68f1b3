"""Who uses a disk in its QEMU: devices of its guest, and exports, ours too.

Owns how it is noticed that a disk was replaced: block jobs that end on another node (a mirror, an
active commit) move all its users there. The old node stays, and its bitmaps mark nothing any more.
Owns too what is no source: a disk that nobody uses yet, or a device that writes past the bitmaps.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.errors import FailedPrecondition, InvalidArgument
from agent.qemu.monitor import Monitor
from agent.qemu.node import FILTERS

_PASSED_THROUGH = frozenset({"scsi-block", "scsi-generic"})
"""Devices that hand their guest's commands to the host's device by ioctl (SG_IO): QEMU's bitmaps
see none of them (hw/scsi/scsi-disk.c, scsi_block_do_sgio; hw/scsi/scsi-generic.c)."""
_FILTERED = frozenset({"backing", "file"})
"""How a filter calls what it is over; `target` is what a job of it writes to."""


@dataclass(frozen=True, slots=True)
class Users:
    """`here`: who stands on the disk, or on a filter over it; `elsewhere`: on which node.

    `passed_through`: which of those here are devices that write past QEMU's bitmaps.
    """

    here: frozenset[str]
    elsewhere: dict[str, str]
    passed_through: frozenset[str] = frozenset()

    def check_tracked(self, path: str) -> None:
        """InvalidArgument TRACKER_UNSUITABLE if a guest writes past QEMU's bitmaps."""
        for user in sorted(self.passed_through):
            raise InvalidArgument(
                "TRACKER_UNSUITABLE",
                f"{path} is passed through to its guest as a SCSI device ({user}), whose writes "
                "QEMU's bitmaps do not see; use --tracker scan, or give it to the guest as scsi-hd "
                "(libvirt: device='disk')",
                path=path,
                user=user,
            )

    def check_used(self, path: str, socket: str, ours: str) -> None:
        """FailedPrecondition QEMU_DISK_UNUSED if all stand elsewhere: a job may still fill it.

        `ours` is what the users begin with that do not count.
        """
        others = {user: at for user, at in self.elsewhere.items() if not user.startswith(ours)}
        if any(not user.startswith(ours) for user in self.here):
            return
        for user, at in sorted(others.items()):
            raise FailedPrecondition(
                "QEMU_DISK_UNUSED",
                f"nobody uses {path} in the QEMU at {socket}, whose {user} is on node {at}; name "
                "the disk that the guest has, after the block job that fills this one if there is "
                "one, or open it in a qemu-storage-daemon of its own if its VM is off",
                path=path,
                socket=socket,
                user=user,
                node=at,
            )

    def moved(self, export: str, before: frozenset[str]) -> str:
        """Return where the disk's users have gone to; empty if they are here, or are no more.

        `before` are those that were here, `export` is the one that is never moved but by a job.
        """
        if export_user(export) in self.elsewhere:
            return self.elsewhere[export_user(export)]
        if self.here - {export_user(export)}:
            return ""
        return next((self.elsewhere[one] for one in sorted(before) if one in self.elsewhere), "")


def export_user(name: str) -> str:
    """Return how an export is called as a user."""
    return f"export {name}"


async def find_users(monitor: Monitor, node: str) -> Users:
    """Return the users of a QEMU's nodes."""
    users, devices = dict[str, str](), dict[str, str]()
    for one in await monitor.execute("query-block-exports"):
        users[export_user(one["id"])] = one["node-name"]
    for one in await monitor.execute("query-block"):
        name = one.get("qdev") or one["device"]
        if name and "inserted" in one:
            users[f"device {name}"] = one["inserted"].get("node-name", "")
            devices[f"device {name}"] = one.get("qdev", "")
    nodes = {node}
    if nodes != set(users.values()):
        nodes |= await _filters_over(monitor, node, set(users.values()))
    here = frozenset(user for user, at in users.items() if at in nodes)
    elsewhere = {user: at for user, at in users.items() if user not in here}
    passed_through = {
        user for user in here if await _kind(monitor, devices.get(user, "")) in _PASSED_THROUGH
    }
    return Users(here, elsewhere, frozenset(passed_through))


async def _filters_over(monitor: Monitor, node: str, used: set[str]) -> set[str]:
    """Ask the graph: filters that are not a job's have a file name of their own.

    Only where somebody stands on a filter, as QEMU calls the command one for debugging.
    """
    told = await monitor.execute("query-named-block-nodes", flat=True)
    filters = {one["node-name"] for one in told if one["drv"] in FILTERS}
    if not filters & used:
        return set()
    graph = await monitor.execute("x-debug-query-block-graph")
    names = {one["id"]: one["name"] for one in graph["nodes"] if one["type"] == "block-driver"}
    edges = [
        (names[one["child"]], names.get(one["parent"], ""))
        for one in graph["edges"]
        if one["name"] in _FILTERED
    ]
    over, found = {node}, set[str]()
    while over:
        over = {parent for child, parent in edges if child in over and parent in filters} - found
        found |= over
    return found


async def _kind(monitor: Monitor, device: str) -> str:
    """Return the QOM type of a device by its id or QOM path; empty if it is none, or no more."""
    if not device:
        return ""
    path = device if device.startswith("/") else f"/machine/peripheral/{device}"
    try:
        return str(await monitor.execute("qom-get", path=path, property="type"))
    except FailedPrecondition as error:
        if error.values.get("kind") != "DeviceNotFound":
            raise
        return ""  # unplugged meanwhile
