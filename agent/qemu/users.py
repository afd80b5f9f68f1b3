"""Who uses a disk in its QEMU: devices of its guest, and exports, ours too.

Owns how it is noticed that a disk was replaced: block jobs that end on another node (a mirror, an
active commit) move all its users there. The old node stays, and its bitmaps mark nothing any more.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.qemu.monitor import Monitor
from agent.qemu.node import FILTERS


@dataclass(frozen=True, slots=True)
class Users:
    """`here`: who stands on the disk, or on a job's filter over it; `elsewhere`: on which node."""

    here: frozenset[str]
    elsewhere: dict[str, str]

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
    users = {}
    for one in await monitor.execute("query-block-exports"):
        users[export_user(one["id"])] = one["node-name"]
    for one in await monitor.execute("query-block"):
        name = one.get("qdev") or one["device"]
        if name and "inserted" in one:
            users[f"device {name}"] = one["inserted"].get("node-name", "")
    nodes = {node}
    if nodes != set(users.values()):
        nodes |= await _filters_over(monitor, node)
    here = frozenset(user for user, at in users.items() if at in nodes)
    return Users(here, {user: at for user, at in users.items() if user not in here})


async def _filters_over(monitor: Monitor, node: str) -> set[str]:
    """A job's filter goes by the file's name of what it is over."""
    nodes = await monitor.execute("query-named-block-nodes", flat=True)
    files = {one["file"] for one in nodes if one["node-name"] == node}
    return {one["node-name"] for one in nodes if one["drv"] in FILTERS and one["file"] in files}
