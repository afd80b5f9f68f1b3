"""Removes what an agent before this one has left in the QEMUs of this host.

Owns nothing: what is ours is known by its name. A QEMU that does not answer is
left for the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import replace

from agent.errors import WarmsyncError
from agent.qemu.access import Access, Seat
from agent.qemu.device import tidy_image
from agent.qemu.export import list_exports, remove_export, stop_server
from agent.qemu.keeper import dismiss
from agent.qemu.monitor import Monitor, converse
from agent.qemu.node import list_nodes

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 2.0
"""Of each QEMU, at the agent's start: one that hangs must not keep the others waiting."""


def tidy(access: Access, going_on: Container[str], ended: list[Seat]) -> list[str]:
    """Remove bitmaps and exports of volumes not `going_on`, and what `ended` have at rest.

    Returns the names of what was removed.
    """
    access = replace(access, patience_seconds=_PATIENCE_SECONDS)
    for seat in ended:
        dismiss(replace(seat, access=access))
    removed = list[str]()
    for socket in access.find_sockets():
        try:
            removed += _tidy(socket, access, going_on)
        except WarmsyncError as error:
            _log.warning('QEMU not tidied up socket=%s reason="%s"', socket, error)
    for seat in ended:
        tidy_image(seat)
    return removed


def _tidy(socket: str, access: Access, going_on: Container[str]) -> list[str]:
    def is_stale(name: str) -> bool:
        volume = name.removeprefix(access.prefix).rpartition("-")[0]
        return name.startswith(access.prefix) and volume not in going_on

    async def work(monitor: Monitor) -> list[str]:
        removed = []
        for export in filter(is_stale, await list_exports(monitor)):
            await remove_export(monitor, export)
            removed.append(export)
        for node in await list_nodes(monitor):
            for name in [one.name for one in node.bitmaps if is_stale(one.name)]:
                await monitor.execute("block-dirty-bitmap-remove", node=node.name, name=name)
                removed.append(name)
        await stop_server(monitor, access)
        return removed

    return converse(socket, work, access.patience_seconds)
