"""Who uses a disk in its QEMU: devices of its guest, and exports, ours too.

Owns how it is noticed that a disk was replaced: block jobs that end on another node (a mirror, an
active commit) move all its users there. The old node stays, and its bitmaps mark nothing any more.
Owns too what is no source: a disk that is yet to be filled, or a device that writes past the
bitmaps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agent.errors import FailedPrecondition, InvalidArgument
from agent.qemu.monitor import Monitor
from agent.qemu.node import FILTERS

_PASSED_THROUGH = frozenset({"scsi-block", "scsi-generic"})
"""Devices that hand their guest's commands to the host's device by ioctl (SG_IO): QEMU's bitmaps
see none of them (hw/scsi/scsi-disk.c, scsi_block_do_sgio; hw/scsi/scsi-generic.c)."""
_FILTERED = frozenset({"backing", "file"})
"""How a filter calls what it is over; `target` is what a job of it writes to."""
_FORMATS = frozenset({"qcow2", "raw"})
_HANDING_ON = FILTERS | {"preallocate", "raw"}
"""What a write to the node over a disk passes on its way to it."""
_NODE = "block-driver"
_WRITERS = {"block-job": "job", _NODE: "node"}
"""What QEMU's graph knows besides users, who are known by their names."""
_OURS = "export warmsync-"
"""What the users begin with that do not count, whichever agent made them."""


@dataclass(frozen=True, slots=True)
class Users:
    """`here`: who stands on the disk, or on a filter (or raw) over it; `elsewhere`: on which node.

    `passed_through`: which of those here are devices that write past QEMU's bitmaps.
    `filled_by`: what may fill the disk or move it, where nobody but us is here: a job, or a node.
    """

    here: frozenset[str]
    elsewhere: dict[str, str]
    passed_through: frozenset[str] = frozenset()
    filled_by: str = ""

    @property
    def others(self) -> frozenset[str]:
        """Who is here but for exports of ours."""
        return frozenset(user for user in self.here if not user.startswith(_OURS))

    def kept(self, before: frozenset[str]) -> frozenset[str]:
        """Return whom to look for the next time: those here, and those of `before` still there."""
        return self.others | (before & self.elsewhere.keys())

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

    def check_used(self, path: str, socket: str) -> None:
        """FailedPrecondition QEMU_DISK_UNUSED if nobody is here, and something may yet fill it."""
        if self.filled_by and not self.others:
            raise FailedPrecondition(
                "QEMU_DISK_UNUSED",
                f"nobody uses {path} in the QEMU at {socket}, where {self.filled_by} may have yet "
                "to fill it; name the disk that the guest has, after the block job that fills this "
                "one if there is one",
                path=path,
                socket=socket,
                by=self.filled_by,
            )

    def moved(self, export: str, before: frozenset[str]) -> str:
        """Return where the disk's users have gone to; empty if they are here, or are no more.

        `before` are those that were here, `export` is the one that is never moved but by a job.
        An export of another may have gone and come back elsewhere under its name; a device has not.
        And another export may have stayed, as a job of a filter moves those over that filter only.
        """
        lost = sorted(before & self.elsewhere.keys())
        if any(_is_device(user) for user in self.here):
            lost = [user for user in lost if _is_device(user)]
        return next(
            (self.elsewhere[one] for one in (export_user(export), *lost) if one in self.elsewhere),
            "",
        )


def export_user(name: str) -> str:
    """Return how an export is called as a user."""
    return f"export {name}"


def _is_device(user: str) -> bool:
    return user.startswith("device ")


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
    nodes, filled_by = await _look_above(monitor, node, users)
    here = frozenset(user for user, at in users.items() if at in nodes)
    elsewhere = {user: at for user, at in users.items() if user not in here}
    passed_through = {
        user for user in here if await _kind(monitor, devices.get(user, "")) in _PASSED_THROUGH
    }
    return Users(here, elsewhere, frozenset(passed_through), filled_by)


async def _look_above(monitor: Monitor, node: str, users: dict[str, str]) -> tuple[set[str], str]:
    """Return the node and what hands on writes to it, and what may fill it or move it.

    The graph is asked only where it matters, as QEMU calls the command one for debugging.
    """
    used = set(users.values())
    others = {at for user, at in users.items() if not user.startswith(_OURS)}
    if used == others == {node}:
        return {node}, ""
    told = await monitor.execute("query-named-block-nodes", flat=True)
    drivers = {one["node-name"]: one["drv"] for one in told}
    asked = _HANDING_ON - (_FORMATS if drivers.get(node) in _FORMATS else frozenset())
    if node in others and not asked & {drivers.get(at) for at in used}:
        return {node}, ""
    graph = await monitor.execute("x-debug-query-block-graph")
    return _climb(graph, node, {name for name in drivers if drivers[name] in _HANDING_ON})


def _climb(graph: dict[str, Any], node: str, handing_on: set[str]) -> tuple[set[str], str]:
    known = {one["id"]: one for one in graph["nodes"]}
    found, fillers = [node], list[str]()
    for below in found:
        for edge in graph["edges"]:
            parent, name = known[edge["parent"]], known[edge["parent"]]["name"]
            if known[edge["child"]]["name"] != below or parent["type"] not in _WRITERS:
                continue
            if name in handing_on and edge["name"] in _FILTERED and parent["type"] == _NODE:
                found += [name] if name not in found else []
            else:
                fillers.append(f"{_WRITERS[parent['type']]} {name}")
    return set(found), min(fillers, default="")


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
