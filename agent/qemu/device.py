"""A disk of a QEMU as a source: read by its guest-visible content, while QEMU runs and after.

Owns which process shows the disk now (its QEMU, or our keeper once that has ended), the export, and
the note that tells the agent after this one. Whose bitmaps say what was written is the tracker's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from agent.device import check_allowed, identities, open_error
from agent.errors import FailedPrecondition, WarmsyncError
from agent.migration import Identity
from agent.qemu.access import Seat
from agent.qemu.export import add_export, forget_server, list_exports, remove_export, stop_server
from agent.qemu.image import Image
from agent.qemu.keeper import Keeper, list_bitmaps, remove_bitmaps
from agent.qemu.monitor import Monitor, converse, gone, is_refused
from agent.qemu.node import Node, find_again, find_node
from native.nbd import NbdDevice

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_QUIET = frozenset(
    {
        "guest-panicked",
        "internal-error",
        "paused",
        "postmigrate",
        "preconfig",
        "prelaunch",
        "shutdown",
    }
)
"""Run states in which no processor of the guest runs (qapi/run-state.json)."""
_SECTOR_BYTES = 512
_END_SECONDS = 5.0
"""What a QEMU may take from closing its monitor to closing its disks."""


class QemuDevice(NbdDevice):
    """The disk. `keeper` is there while its QEMU is not."""

    def __init__(
        self, source: str, seat: Seat, node: Node, image: Image | None, *, at_rest: bool = False
    ) -> None:
        self.seat = seat
        self.node = node
        self.image = image
        self.keeper: Keeper | None = None
        self.left_bitmaps: list[str] = []
        """To be removed from the image once nobody has it open."""
        self._source = source
        self._closed = False
        if at_rest:
            self.keeper = Keeper(seat, self._image(), node.driver)
        try:
            super().__init__(source, socket_path=self._show(), export=seat.export)
        except OSError as error:
            self._let_go()
            raise open_error(source, error) from error
        except BaseException:
            self._let_go()
            raise
        self._write_note()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

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
        """Raise or lift the fence. A disk without a file has none but its QEMU's being paused."""
        if self.image is not None:
            self.image.set_read_only(read_only)

    def refresh(self) -> Node:
        """Return the disk as it is now, with its bitmaps, whoever shows it now.

        QEMU_GONE if that is nobody, SOURCE_SIZE_CHANGED, QEMU_DISK_READ_ONLY, QMP_UNREACHABLE.
        """
        node = find_again(self._source, self.node.name, self.node.socket, self.seat.access)
        if node is not None:
            if self.keeper is not None:
                _log.info("its QEMU runs again path=%s", self.path)
                self._stop_keeper()
            self.node = node
            self._check_shown()
        else:
            self._rest()
            node = self._keeper().node()
        self._check(node)
        return node

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

    def close(self) -> None:
        """Let go of everything; what the tracker made stays. Safe to call twice."""
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

    def _check_shown(self) -> None:
        """A QEMU that was started again knows nothing of our export."""
        export = self.seat.export

        async def ask(monitor: Monitor) -> bool:
            return export in await list_exports(monitor)

        if not self.converse(ask):
            self.redirect(socket_path=self._show(), export=export)

    def _rest(self) -> None:
        """Make sure that a keeper shows the image as it is now."""
        if self.keeper is not None and self.keeper.is_current:
            return
        image = self._image()
        deadline = time.monotonic() + _END_SECONDS
        while image.has_writer():
            # Written behind our back, by a QEMU that we cannot talk to? Or on its way out.
            if time.monotonic() > deadline:
                raise gone(self.node.socket)
            time.sleep(0.02)
        self._stop_keeper()
        self.keeper = Keeper(self.seat, image, self.node.driver)
        _log.info("its QEMU has ended path=%s", self.path)
        self.redirect(socket_path=self._show(), export=self.seat.export)

    def _keeper(self) -> Keeper:
        if self.keeper is None:
            raise RuntimeError("the image is not at rest")
        return self.keeper

    def _image(self) -> Image:
        if self.image is None:
            raise gone(self.node.socket)
        return self.image

    def _stop_keeper(self) -> None:
        if self.keeper is not None:
            self.keeper.stop()
            self.keeper = None

    def _let_go(self) -> None:
        """Remove what is ours, but for bitmaps; a QEMU that is gone has none of it."""
        export, access = self.seat.export, self.seat.access

        async def ask(monitor: Monitor) -> None:
            await remove_export(monitor, export)
            await stop_server(monitor, access)

        if self.keeper is None:
            try:
                self.converse(ask)
            except WarmsyncError as error:
                if error.reason != "QEMU_GONE":
                    _log.warning('export left behind path=%s reason="%s"', self._source, error)
        self._stop_keeper()
        forget_server(access, self.node.socket)
        if self.image is not None:
            # First, as the fence's lock would keep out who is to remove them.
            self.image.close()
            left = remove_bitmaps(self.image.path, self.left_bitmaps)
            if left:
                _log.warning("bitmaps left in an image path=%s names=%s", self._source, left)
            self.image = None

    def _write_note(self) -> None:
        path = self.seat.note
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        node = self.node
        told = {"socket": node.socket, "name": node.name, "driver": node.driver, "path": node.path}
        text = json.dumps(told)
        new = path.with_name(path.name + ".new")
        new.write_text(text)
        new.replace(path)


def open_qemu(source: str, allowed: tuple[str, ...], seat: Seat) -> QemuDevice:
    """Open a disk of a QEMU, or one at rest that was open before. The domain's errors."""
    check_allowed(source, os.path.realpath(source), allowed)
    at_rest = False
    try:
        node = find_node(source, seat.access)
    except WarmsyncError as error:
        known = _read_note(seat)
        if error.reason != "QEMU_DISK_NOT_FOUND" or known is None:
            raise
        node, at_rest = known, True
    return QemuDevice(source, seat, node, _open_image(source, node), at_rest=at_rest)


def is_taken(error: WarmsyncError) -> bool:
    """Return whether QEMU refused to touch a bitmap because somebody uses it."""
    return is_refused(error, "in use")


def tidy_image(note: Seat) -> None:
    """Remove from an image at rest what a migration has left there that nobody takes up."""
    node = _read_note(note)
    if node is not None and node.driver == "qcow2":
        remove_bitmaps(node.path, list_bitmaps(node.path, note.prefix))


def _open_image(source: str, node: Node) -> Image | None:
    if not node.path:
        return None
    try:
        return Image(node.path)
    except OSError as error:
        raise open_error(source, error) from error


def _read_note(seat: Seat) -> Node | None:
    """Return what an image was before its QEMU has ended: only we may say its format."""
    try:
        told = json.loads(seat.note.read_text())
        node = Node(told["socket"], told["name"], told["driver"], told["path"], 0, read_only=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return node if node.path and os.path.exists(node.path) else None
