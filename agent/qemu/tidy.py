"""Removes what migrations have left in the QEMUs of this host, and in images at rest.

Owns that it is tried again where a QEMU does not answer, until it does or the agent ends: the next
start looks at all of them. What is ours is known by its name. An image whose storage never answers
holds nobody but a later volume of the same name, and that not for long.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from agent.errors import FailedPrecondition, WarmsyncError
from agent.qemu.access import Access, Seat
from agent.qemu.export import list_exports, remove_export, stop_server
from agent.qemu.image import await_no_writer, claim, is_read_only
from agent.qemu.keeper import dismiss, list_bitmaps, remove_bitmaps
from agent.qemu.monitor import Monitor, converse
from agent.qemu.node import Node, list_nodes
from agent.qemu.note import read_note, remove_note

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 2.0
"""Of each QEMU, at the agent's start and later: one that hangs must not keep the others waiting."""
_AGAIN_SECONDS = 60.0
_WAIT_SECONDS = 20.0
"""How long a new volume of a name waits for the removal of what an earlier one of it has left."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rest:
    """What could not be removed yet, and whether its note stays even then."""

    node: Node
    keep_note: bool


_left: dict[Seat, _Rest] = {}
_busy: dict[Seat, _Rest] = {}
"""What is being removed, each by a thread of its own: the storage of an image may never answer."""
_changed = threading.Condition()
"""Of both; never held while anything is asked."""


def tidy(
    access: Access, going_on: Collection[str], ended: list[Seat], fenced: Collection[str] = ()
) -> list[str]:
    """Remove bitmaps, exports and keepers of volumes not `going_on`; returns their names.

    What `ended` have left in images is removed in the background, and their notes then, but those
    of the `fenced`.
    """
    hurried = replace(access, patience_seconds=_PATIENCE_SECONDS)
    wanted = [access.keeper_path(name) for name in going_on]
    for socket in access.find_keepers():
        if socket not in wanted:
            _dismiss(hurried, socket)

    def is_stale(name: str) -> bool:
        volume = access.volume_of(name)
        return bool(volume) and volume not in going_on

    removed, silent = list[str](), set[str]()
    for socket in access.find_sockets():
        try:
            removed += _sweep(socket, hurried, is_stale)[0]
        except (WarmsyncError, OSError) as error:
            silent.add(socket)
            _log.warning('QEMU not tidied up socket=%s reason="%s"', socket, error)
    for seat in ended:
        note = read_note(seat.note)
        if note is not None:
            try_again(seat, note.node(), keep_note=seat.name in fenced)
            if note.socket not in silent:
                _begin(seat)
        elif seat.name not in fenced:
            _forget(seat)
    return removed


def clear(seat: Seat, node: Node) -> None:
    """Remove all that is left of a volume, but not its keeper: from its QEMU, or from its image.

    QMP_UNREACHABLE, QMP_REFUSED, IMAGE_UNUSABLE; OSError EBUSY if the image is a target now.
    """
    try:
        if node.path in _sweep(node.socket, seat.access, seat.owns)[1]:
            return
    except WarmsyncError as error:
        if error.reason != "QEMU_GONE":
            raise
        if _keeps_bitmaps(node):
            await_no_writer(node.path)  # it may be on its way out
    _clear_image(seat, node)


def _clear_image(seat: Seat, node: Node) -> None:
    """Remove what an image at rest holds of a volume. IMAGE_UNUSABLE, OSError if some may stay.

    But behind a fence, which keeps qemu-img out too, it does.
    """
    if not _keeps_bitmaps(node):
        return
    try:
        with claim(node.path):
            left = remove_bitmaps(node.path, list_bitmaps(node.path, seat.prefix))
            if left and not is_read_only(node.path):
                raise FailedPrecondition(
                    "IMAGE_UNUSABLE",
                    f"{node.path} keeps {', '.join(left)}; end what has it open",
                    path=node.path,
                )
    except FileNotFoundError:
        return
    if left:
        _log.warning("bitmaps left in an image path=%s names=%s", node.path, left)


def _keeps_bitmaps(node: Node) -> bool:
    return node.driver == "qcow2" and bool(node.path)


def try_again(seat: Seat, node: Node, *, keep_note: bool = False) -> None:
    """Clear it later; the seat's note is removed then, if it is not to be kept for a fence."""
    with _changed:
        _put(seat, _Rest(node, keep_note))


def give_back(seat: Seat) -> None:
    """Remove what an earlier agent left of a volume that is not taken up: now if that can be done.

    Blocking.
    """
    hurried = _hurried(seat)
    _dismiss(hurried.access, hurried.access.keeper_path(seat.name))
    known = read_note(seat.note)
    if known is not None:
        with _changed:
            _put(seat, _Rest(known.node(), keep_note=False))
            _begin(seat)
            _changed.wait_for(lambda: seat not in _busy, _WAIT_SECONDS)


def settle(seat: Seat) -> None:
    """Clear now what is left of an earlier volume of this name, as far as its QEMU allows.

    FailedPrecondition IMAGE_UNUSABLE while its image does not answer, STATE_NOT_KEPT.
    """
    with _changed:
        _begin(seat)
        rest = _busy.get(seat)
        if rest is None:
            return
        if not _changed.wait_for(lambda: seat not in _busy, _WAIT_SECONDS):
            raise FailedPrecondition(
                "IMAGE_UNUSABLE",
                f"{rest.node.path} has not answered for {_WAIT_SECONDS:g} s to the removal of what "
                "an earlier migration of this id has left there; see to its storage, or choose "
                "another id",
                path=rest.node.path,
            )
        _left.pop(seat, None)
        remove_note(seat.note)


def _put(seat: Seat, rest: _Rest) -> None:
    _left[seat] = rest
    timer = threading.Timer(_AGAIN_SECONDS, _begin, (seat, rest))
    timer.name, timer.daemon = "qemu tidy", True
    timer.start()


def _begin(seat: Seat, only: _Rest | None = None) -> None:
    """Remove it now, on a thread; a timer, whose turn it is, `only` what it was set for."""
    with _changed:
        rest = _left.get(seat)
        if rest is None or only not in (None, rest):
            return
        del _left[seat]
        if seat in _busy:
            _put(seat, rest)
            return
        _busy[seat] = rest
    name = "qemu tidy"
    threading.Thread(target=_work, args=(seat, rest), name=name, daemon=True).start()


def _work(seat: Seat, rest: _Rest) -> None:
    done = False
    try:
        done = _clear_rest(seat, rest)
    finally:
        with _changed:
            del _busy[seat]
            if not done and seat not in _left:
                _put(seat, rest)
            _changed.notify_all()


def _clear_rest(seat: Seat, rest: _Rest) -> bool:
    try:
        clear(_hurried(seat), rest.node)
        if not rest.keep_note:
            remove_note(seat.note)
    except (WarmsyncError, OSError) as error:
        _log.warning('still left in a QEMU name=%s reason="%s"', seat.name, error)
        return False
    _log.info("removed what was left in a QEMU name=%s", seat.name)
    return True


def _forget(seat: Seat) -> None:
    try:
        remove_note(seat.note)
    except WarmsyncError as error:
        _log.warning('note left name=%s reason="%s"', seat.name, error)


def _dismiss(access: Access, socket: str) -> None:
    try:
        dismiss(access, socket)
    except OSError as error:
        _log.warning('socket of a daemon of ours left path=%s reason="%s"', socket, error)


def _hurried(seat: Seat) -> Seat:
    return replace(seat, access=replace(seat.access, patience_seconds=_PATIENCE_SECONDS))


def _sweep(
    socket: str, access: Access, is_stale: Callable[[str], bool]
) -> tuple[list[str], set[str]]:
    """Return the names of what was removed, and the images that the QEMU has."""

    async def work(monitor: Monitor) -> tuple[list[str], set[str]]:
        removed, paths = list[str](), set[str]()
        for export in filter(is_stale, await list_exports(monitor)):
            await remove_export(monitor, export)
            removed.append(export)
        for node in await list_nodes(monitor):
            paths.add(node.path)
            for name in [one.name for one in node.bitmaps if is_stale(one.name)]:
                await monitor.execute("block-dirty-bitmap-remove", node=node.name, name=name)
                removed.append(name)
        await stop_server(monitor, access)
        return removed, paths

    return converse(socket, work, access.patience_seconds)
