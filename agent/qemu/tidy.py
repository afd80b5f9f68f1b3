"""Removes what migrations have left in the QEMUs of this host, and in images at rest.

Owns that it is tried again where a QEMU does not answer, until it does or the agent ends: the next
start looks at all of them. What is ours is known by its name.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import replace

from agent.errors import WarmsyncError
from agent.qemu.access import Access, Seat
from agent.qemu.export import list_exports, remove_export, stop_server
from agent.qemu.image import await_no_writer
from agent.qemu.keeper import dismiss, list_bitmaps, remove_bitmaps
from agent.qemu.monitor import Monitor, converse
from agent.qemu.node import Node, list_nodes
from agent.qemu.note import read_note

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 2.0
"""Of each QEMU, at the agent's start and later: one that hangs must not keep the others waiting."""
_AGAIN_SECONDS = 60.0

_left: dict[Seat, tuple[Node, bool]] = {}
"""What could not be removed yet, and whether its note stays even then."""
_lock = threading.Lock()
"""Of `_left`; held while one of it is removed, so that nobody takes the place up meanwhile."""


def tidy(
    access: Access, going_on: Collection[str], ended: list[Seat], fenced: Collection[str] = ()
) -> list[str]:
    """Remove bitmaps, exports and keepers of volumes not `going_on`, and what `ended` have at rest.

    The notes of those that are `fenced` stay. Returns the names of what was removed.
    """
    hurried = replace(access, patience_seconds=_PATIENCE_SECONDS)
    wanted = [access.keeper_path(name) for name in going_on]
    for socket in access.find_keepers():
        if socket not in wanted:
            dismiss(hurried, socket)

    def is_stale(name: str) -> bool:
        volume = access.volume_of(name)
        return bool(volume) and volume not in going_on

    removed, silent = list[str](), set[str]()
    for socket in access.find_sockets():
        try:
            removed += _sweep(socket, hurried, is_stale)
        except WarmsyncError as error:
            silent.add(socket)
            _log.warning('QEMU not tidied up socket=%s reason="%s"', socket, error)
    for seat in ended:
        note = read_note(seat.note)
        if note is not None and note.socket in silent:
            try_again(seat, note.node(), keep_note=seat.name in fenced)
        elif note is not None:
            try:
                _clear_image(seat, note.node())
            except WarmsyncError as error:
                _log.warning('left in an image path=%s reason="%s"', note.path, error)
                try_again(seat, note.node(), keep_note=seat.name in fenced)
    return removed


def clear(seat: Seat, node: Node) -> None:
    """Remove all that is left of a volume, but not its keeper: from its QEMU, or from its image.

    QMP_UNREACHABLE, QMP_REFUSED, IMAGE_UNUSABLE.
    """
    try:
        _sweep(node.socket, seat.access, seat.owns)
    except WarmsyncError as error:
        if error.reason != "QEMU_GONE":
            raise
        if _keeps_bitmaps(node):
            await_no_writer(node.path)  # it may be on its way out
        _clear_image(seat, node)


def _clear_image(seat: Seat, node: Node) -> None:
    """Remove what an image at rest holds of a volume, if nobody has it open."""
    if _keeps_bitmaps(node):
        left = remove_bitmaps(node.path, list_bitmaps(node.path, seat.prefix))
        if left:
            _log.warning("bitmaps left in an image path=%s names=%s", node.path, left)


def _keeps_bitmaps(node: Node) -> bool:
    return node.driver == "qcow2" and bool(node.path)


def try_again(seat: Seat, node: Node, *, keep_note: bool = False) -> None:
    """Clear it later; the seat's note is removed then, if it is not to be kept for a fence."""
    with _lock:
        if not _left:
            _wait()
        _left[seat] = node, keep_note


def give_back(seat: Seat) -> None:
    """Remove what an earlier agent left of a volume that is not taken up: now if that can be done.

    Blocking.
    """
    hurried = _hurried(seat)
    dismiss(hurried.access, hurried.access.keeper_path(seat.name))
    known = read_note(seat.note)
    if known is not None:
        try_again(seat, known.node())
        with _lock:
            if seat in _left:
                _clear_left(seat)


def settle(seat: Seat) -> None:
    """Clear now what is left of an earlier volume of this name, as far as its QEMU allows."""
    with _lock:
        if seat in _left:
            _clear_left(seat)
            _left.pop(seat, None)
            seat.note.unlink(missing_ok=True)


def _wait() -> None:
    timer = threading.Timer(_AGAIN_SECONDS, _clear_all)
    timer.name, timer.daemon = "qemu tidy", True
    timer.start()


def _clear_all() -> None:
    try:
        for seat in list(_left):
            with _lock:
                if seat in _left:
                    _clear_left(seat)
    finally:
        with _lock:
            if _left:
                _wait()


def _clear_left(seat: Seat) -> None:
    node, keep_note = _left[seat]
    try:
        clear(_hurried(seat), node)
        if not keep_note:
            seat.note.unlink(missing_ok=True)
    except (WarmsyncError, OSError) as error:
        _log.warning('still left in a QEMU name=%s reason="%s"', seat.name, error)
        return
    del _left[seat]
    _log.info("removed what was left in a QEMU name=%s", seat.name)


def _hurried(seat: Seat) -> Seat:
    return replace(seat, access=replace(seat.access, patience_seconds=_PATIENCE_SECONDS))


def _sweep(socket: str, access: Access, is_stale: Callable[[str], bool]) -> list[str]:
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
