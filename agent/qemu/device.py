"""A disk of a QEMU as a source: read by its guest-visible content, while QEMU runs and after.

Owns which process shows the disk now (its QEMU, or our keeper once that has ended), that this is
the disk that the guest has, and the export. Whose bitmaps say what was written is the tracker's.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from agent.device import check_allowed, identities, open_error
from agent.errors import FailedPrecondition, NotFound, WarmsyncError
from agent.migration import Identity
from agent.nameplate import another_disk, nameplate
from agent.qemu.access import Access, Seat
from agent.qemu.export import add_export, forget_server, remove_export, stop_server
from agent.qemu.image import Image
from agent.qemu.keeper import Keeper, dismiss
from agent.qemu.monitor import Monitor, converse, gone, is_refused
from agent.qemu.node import Node, find_again, find_node, replaced
from agent.qemu.note import Note, note_of, read_note, write_note
from agent.qemu.tidy import clear, settle, try_again
from agent.qemu.users import Users, export_user, find_users
from native.nbd import NbdDevice

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_QUIET = frozenset(
    {
        "guest-panicked",
        "internal-error",
        "paused",
        "preconfig",
        "prelaunch",
        "shutdown",
    }
)
"""Run states in which no processor of the guest runs (qapi/run-state.json). Not `postmigrate`: it
runs on in another QEMU, and writes to the same image there."""
_SECTOR_BYTES = 512
_AGAIN_SECONDS = 0.1


class QemuDevice(NbdDevice):
    """The disk. `keeper` is there while its QEMU is not."""

    def __init__(
        self,
        source: str,
        seat: Seat,
        node: Node,
        image: Image | None,
        *,
        at_rest: bool = False,
        known: Note | None = None,
    ) -> None:
        self.seat = seat
        self.node = node
        self.image = image
        self.keeper: Keeper | None = None
        self._source = source
        self._closed = False
        self._given_up = False
        self._known = known
        self._plate = "" if image is None else nameplate(image)
        """What the note says."""
        self._users = frozenset(known.users if known else ())
        """Who had the disk when we last looked."""
        if at_rest:
            self.keeper = Keeper(seat, self._image(), node.driver)
        else:
            dismiss(seat.access, seat.access.keeper_path(seat.name))
        try:
            super().__init__(source, socket_path=self._show(), export=seat.export)
        except OSError as error:
            self._let_go()
            raise open_error(source, error) from error
        except BaseException:
            self._let_go()
            raise

    @property
    def socket(self) -> str:
        """The QMP socket of who shows the disk now."""
        return self.keeper.socket if self.keeper else self.node.socket

    def fileno(self) -> int:
        """Return the image's descriptor; OSError where there is none."""
        if self.image is None:
            raise OSError(errno.EBADF, "a disk without a file", self.path)
        return self.image.fileno()

    def key(self) -> tuple[int, int, int]:
        """Return what the source is on this boot."""
        if self.image is not None:
            status = os.fstat(self.image.fileno())
            return status.st_dev, status.st_ino, 0
        digest = hashlib.sha256(self._source.encode()).digest()
        return 0, int.from_bytes(digest[:6], "big"), 0

    def identities(self) -> tuple[Identity, ...]:
        """Return what the disk really is: its image, and whatever that lies on."""
        if self.image is not None:
            return identities(self.image.path)
        name = f"qemu:{self.node.socket}/{self.node.name}"
        return (Identity(name, 0, self.size_bytes()),)

    def is_read_only(self) -> bool:
        """Return whether the image is."""
        return self.image is not None and self.image.is_read_only()

    def set_read_only(self, read_only: bool) -> None:
        """Raise or lift the fence. A disk without a file has none but its QEMU's being paused.

        ValueError once it is closed.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        if self.image is not None:
            self.image.set_read_only(read_only)

    def refresh(self) -> Node:
        """Return the disk as it is now, with its bitmaps, whoever shows it now.

        QEMU_GONE if that is nobody, QEMU_DISK_REPLACED, SOURCE_SIZE_CHANGED, QEMU_DISK_READ_ONLY,
        QMP_UNREACHABLE, STATE_NOT_KEPT.
        """
        node = find_again(self._source, self.node.name, self.node.socket, self.seat.access)
        if node is not None:
            self._check_image(node)
            if self.keeper is not None:
                _log.info("its QEMU runs again path=%s", self.path)
                self._stop_keeper()
            self.node = node
            self._check_shown()
        else:
            self._rest()
            node = self._keeper().node()
        self._check(node)
        self._write_note()
        return node

    def follow(self) -> None:
        """Read from whoever shows the disk now. As `refresh`."""
        self.persist(self.refresh)

    def obstacle(self) -> str:
        """Return why the disk is not quiet; empty if nothing says so."""

        async def ask(monitor: Monitor) -> str:
            try:
                status = (await monitor.execute("query-status"))["status"]
            except FailedPrecondition as error:
                # A storage daemon has no guest: its bitmaps alone tell.
                if error.values.get("kind") == "CommandNotFound":
                    return ""
                raise
            return "" if status in _QUIET else f"its QEMU is {status} (QMP run state)"

        def look() -> str:
            self.refresh()
            if self.keeper is None:
                return self.converse(ask)
            if self._image().has_writer():
                return "a QEMU has opened its image for writing"
            return ""

        return self.persist(look)

    def persist(self, work: Callable[[], _Result]) -> _Result:
        """Do the work, and once more if its QEMU has ended in the middle of it."""
        try:
            return work()
        except FailedPrecondition as error:
            if error.reason != "QEMU_GONE" or self.keeper is not None:
                raise
        return work()

    def converse(self, work: Callable[[Monitor], Awaitable[_Result]]) -> _Result:
        """Talk to whoever shows the disk now."""
        return converse(self.socket, work, self.seat.access.patience_seconds)

    def give_up(self) -> None:
        """What the tracker made is not needed any more: it goes when this closes."""
        self._given_up = True

    def close(self) -> None:
        """Let go of all but what the tracker made, unless that is given up. Safe to call twice."""
        if not self._closed:
            self._closed = True
            super().close()
            self._let_go()

    def _check(self, node: Node) -> None:
        size_bytes = -(-node.size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES
        if size_bytes != self.size_bytes():
            raise FailedPrecondition(
                "SOURCE_SIZE_CHANGED",
                f"{self.path} had {self.size_bytes()} bytes, now {size_bytes}; "
                "start a new migration",
                path=self.path,
                size_bytes=size_bytes,
                expected_bytes=self.size_bytes(),
            )

    def _show(self) -> str:
        """Export the disk; return the NBD server's socket."""
        access, export = self.seat.access, self.seat.export
        name = "image" if self.keeper else self.node.name

        async def ask(monitor: Monitor) -> str:
            try:
                return await add_export(monitor, access, name, export, [])
            except BaseException:
                await stop_server(monitor, access)
                raise

        return self.converse(ask)

    def _check_image(self, node: Node) -> None:
        """A QEMU that was started again may have another image under the same name."""
        same = self.image.is_at(node.path) if self.image else not node.path
        if not same:
            raise replaced(
                self._source, node.socket, f"{node.name} is {node.path or 'no file'} now"
            )

    def _check_shown(self) -> None:
        """The guest and our export stand on the disk; one that was started again has no export."""
        export = self.seat.export
        try:
            users = self._look_at_users()
        except FailedPrecondition as error:
            if error.reason not in ("QEMU_DISK_REPLACED", "QEMU_DISK_UNUSED"):
                raise
            # A job may have ended between the commands that told so.
            time.sleep(_AGAIN_SECONDS)
            users = self._look_at_users()
        if export_user(export) not in users.here:
            self.redirect(socket_path=self._show(), export=export)
        self._users = users.kept(self._users)

    def _look_at_users(self) -> Users:
        async def ask(monitor: Monitor) -> Users:
            return await find_users(monitor, self.node.name)

        users = self.converse(ask)
        moved = users.moved(self.seat.export, self._users)
        if moved:
            raise replaced(self._source, self.node.socket, f"a job has moved it to node {moved}")
        users.check_tracked(self._source)
        if self._known is None:
            users.check_used(self._source, self.node.socket)
        return users

    def _rest(self) -> None:
        """Make sure that a keeper shows the image as it is now."""
        if self.keeper is not None and self.keeper.is_current:
            return
        image = self._image()
        if not image.await_no_writer():
            raise gone(self.node.socket)  # written behind our back, by a QEMU that is silent?
        self._stop_keeper()
        self.keeper = Keeper(self.seat, image, self.node.driver)
        _log.info("its QEMU has ended path=%s", self.path)
        try:
            self.redirect(socket_path=self._show(), export=self.seat.export)
        except BaseException:
            self._stop_keeper()  # the next look starts another, and reads from it
            raise

    def _keeper(self) -> Keeper:
        if self.keeper is None:
            raise RuntimeError("the image is not at rest")
        return self.keeper

    def _image(self) -> Image:
        """Return what a keeper can show. QEMU_GONE if nothing can."""
        if self.image is None or not self.node.is_plain:
            raise gone(self.node.socket)
        return self.image

    def _stop_keeper(self) -> None:
        if self.keeper is not None:
            self.keeper.stop()
            self.keeper = None

    def _let_go(self) -> None:
        """Remove what is ours, but for bitmaps that are needed; now, or once its QEMU answers."""
        try:
            self._stop_keeper()
        except OSError as error:
            _log.warning('a daemon of ours left path=%s reason="%s"', self._source, error)
        is_fenced = self.image is not None and self.image.is_fenced
        if self.image is not None:
            self.image.close()  # first: the fence's lock would keep out who removes bitmaps there
            self.image = None
        try:
            if self._given_up:
                clear(self.seat, self.node)
            else:
                self._remove_export()
        except (WarmsyncError, OSError) as error:
            if not (isinstance(error, WarmsyncError) and error.reason == "QEMU_GONE"):
                _log.warning('left in a QEMU for now path=%s reason="%s"', self._source, error)
                self._leave(keep_note=is_fenced)
        with suppress(OSError):  # the next server there takes its place
            forget_server(self.seat.access, self.node.socket)

    def _remove_export(self) -> None:
        export, access = self.seat.export, self.seat.access

        async def ask(monitor: Monitor) -> None:
            await remove_export(monitor, export)
            await stop_server(monitor, access)

        converse(self.node.socket, ask, access.patience_seconds)

    def _leave(self, *, keep_note: bool) -> None:
        """Have it removed later, but by the next agent if that takes it up."""
        if self._given_up or self._known is None:
            with suppress(WarmsyncError):  # without a note the next start looks at all QEMUs
                write_note(self.seat.note, note_of(self.node, (), self._plate))
            try_again(self.seat, self.node, keep_note=keep_note)

    def _write_note(self) -> None:
        note = note_of(self.node, tuple(sorted(self._users)), self._plate)
        if note != self._known:
            write_note(self.seat.note, note)
            self._known = note


def open_qemu(
    source: str, allowed: tuple[str, ...], seat: Seat, *, fenced: bool = False
) -> QemuDevice:
    """Open a disk of a QEMU, or one at rest that was open before. The domain's errors.

    `fenced`: its guest is off and its image read-only, so no QEMU that cannot be asked matters.
    """
    check_allowed(source, os.path.realpath(source), allowed)
    settle(seat)
    known = read_note(seat.note)
    if known is None:
        node = find_node(source, seat.access)
        return QemuDevice(source, seat, node, _open_image(source, node))
    try:
        found = _find(source, seat.access, known)
    except WarmsyncError:
        if not fenced:
            raise
        found = None
    if found is not None:
        return QemuDevice(source, seat, found, _open_image(source, found), known=known)
    image = _open_known(source, known)
    node = known.node() if image is None else replace(known.node(), path=image.path)
    return QemuDevice(source, seat, node, image, at_rest=True, known=known)


def _find(source: str, access: Access, known: Note) -> Node | None:
    """Return the disk, asked for first where it was; None if no QEMU that answers has it.

    Its image can be fenced then, and that it is at rest is for `refresh` to say.
    """
    if known.socket in access.find_sockets():
        try:
            node = find_again(source, known.name, known.socket, access, settle_seconds=0)
        except FailedPrecondition as error:
            if error.reason != "QEMU_DISK_REPLACED":
                raise
            node = None  # it may be elsewhere now, and the socket another VM's
        if node is not None:
            return node
    try:
        return find_node(source, access)
    except WarmsyncError as error:
        if error.reason not in ("QEMU_DISK_NOT_FOUND", "QMP_UNREACHABLE"):
            raise
        silent = error.reason == "QMP_UNREACHABLE"  # some QEMU, which has the disk or not
        if not _is_left(source, known, silent):
            raise
    return None


def _is_left(source: str, known: Note, silent: bool) -> bool:
    """Whether there is an image, which a QEMU that is `silent` does not write to."""
    if not known.is_plain:
        return False
    try:
        image = _open_known(source, known)
    except NotFound:
        return False
    if image is None:
        return False
    try:
        return not (silent and image.has_writer())
    finally:
        image.close()


def open_image(source: str, allowed: tuple[str, ...], seat: Seat) -> Image | None:
    """Open only the image of a disk that was open before; None if it has none. Asks no QEMU."""
    check_allowed(source, os.path.realpath(source), allowed)
    known = read_note(seat.note)
    if known is not None:
        return _open_known(source, known)
    try:
        return Image(os.path.realpath(source))
    except OSError as error:
        raise open_error(source, error) from error


def _open_known(source: str, known: Note) -> Image | None:
    """Open the image of a note, whatever its path is now: devices change theirs at a reboot.

    None for a disk without one. The errors of opening it; FailedPrecondition SOURCE_REPLACED if
    nothing of these names has its nameplate.
    """
    if not known.path:
        return None
    failure: WarmsyncError | None = None
    names = (known.path, os.path.realpath(source)) if known.plate else (known.path,)
    for path in dict.fromkeys(names):
        try:
            image = Image(path)
        except OSError as error:
            failure = failure or open_error(source, error)
            continue
        found = nameplate(image)
        if known.plate in ("", found):
            return image
        image.close()
        failure = another_disk(path, known.plate, found)
    raise failure or another_disk(source, known.plate, "")


def is_taken(error: WarmsyncError) -> bool:
    """Return whether QEMU refused to touch a bitmap because somebody uses it."""
    return is_refused(error, "in use")


def _open_image(source: str, node: Node) -> Image | None:
    if not node.path:
        return None
    try:
        return Image(node.path)
    except OSError as error:
        raise open_error(source, error) from error
