"""Who uses a disk in its QEMU: devices of its guest, and exports, ours too.

Owns how it is noticed that a disk was replaced: block jobs that end on another node (a mirror, an
active commit) move all its users there. The old node stays, and its bitmaps mark nothing any more.
Owns too what is no source: a disk that nobody uses yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.errors import FailedPrecondition
from agent.qemu.monitor import Monitor
from agent.qemu.node import FILTERS

_FILTERED = frozenset({"backing", "file"})
"""How a filter calls what it is over; `target` is what a job of it writes to."""


@dataclass(frozen=True, slots=True)
class Users:
    """`here`: who stands on the disk, or on a filter over it; `elsewhere`: on which node."""

    here: frozenset[str]
    elsewhere: dict[str, str]

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
    users = dict[str, str]()
    for one in await monitor.execute("query-block-exports"):
        users[export_user(one["id"])] = one["node-name"]
    for one in await monitor.execute("query-block"):
        name = one.get("qdev") or one["device"]
        if name and "inserted" in one:
            users[f"device {name}"] = one["inserted"].get("node-name", "")
    nodes = {node}
    if nodes != set(users.values()):
        nodes |= await _filters_over(monitor, node, set(users.values()))
    here = frozenset(user for user, at in users.items() if at in nodes)
    elsewhere = {user: at for user, at in users.items() if user not in here}
    return Users(here, elsewhere)


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
