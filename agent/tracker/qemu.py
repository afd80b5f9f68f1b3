"""The `qemu` tracker: dirty bitmaps of the QEMU or storage daemon that has the disk.

Owns the chain of bitmaps (names end in b1, b2 and so on), of which only the last records. A take
adds the next and freezes the last in one transaction, in this order, so that each write is in
one of them or in both; the frozen ones go once they are read. An agent that died in between has
left more than one: all of them count.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from agent.errors import FailedPrecondition, WarmsyncError
from agent.qemu.device import QemuDevice, is_taken
from agent.qemu.export import add_export, remove_export
from agent.qemu.monitor import Monitor
from agent.qemu.node import Bitmap, Node
from agent.tracker import Take, has_mark
from native.bitmap import DirtyBitmap
from native.nbd import MAX_CONTEXTS, read_marks


class QemuTracker:
    """Marks kept by QEMU's block layer, above every image format."""

    scheme = "qemu"
    digests = None
    looks_cheaply = True

    def __init__(self, device: QemuDevice, block_size_bytes: int) -> None:
        self._device = device
        self._block_size_bytes = block_size_bytes
        self._prefix = f"{device.seat.prefix}b"
        self._taken_at_rest = 0
        """The keeper whose bitmaps were taken: the image has not changed since."""

    def start(self) -> None:
        """Remove what an agent before us has left, and begin to record."""
        node = self._device.refresh()
        if self._device.keeper is not None:
            return  # nobody writes; all is to be sent anyway
        self._remove(one.name for one in node.bitmaps if self._is_ours(one))
        self._add(1)

    def resume(self) -> None:
        """See `agent.tracker.Tracker`: the chain has to end in a bitmap that was always on."""
        own = self._own(self._device.refresh())
        if not _is_whole(own):
            raise OSError(errno.ESTALE, "QEMU has not kept its bitmaps", self._device.path)

    def take(self, into: DirtyBitmap) -> Take:
        """See `agent.tracker.Tracker`."""
        return self._device.persist(lambda: self._take(into))

    def _take(self, into: DirtyBitmap) -> Take:
        node = self._device.refresh()
        own = self._own(node)
        if self._device.keeper is not None:
            return self._take_at_rest(node, own, into)
        names = [one.name for one in own]
        following = _number(names[-1]) + 1 if names else 1
        if not _is_whole(own):
            into.set_all()  # first: once the next chain is there, nobody sees that one was lost
            self._add(following)
            self._remove(names)
            return Take(into.size_bytes, f"{self._device.path}: its QEMU lost our bitmaps")
        self._rotate(names[-1], following)
        marked = self._read_into(node, names, into)
        self._remove(names)
        return Take(marked)

    def look(self) -> int:
        """See `agent.tracker.Tracker`."""
        return self._device.persist(self._look)

    def _look(self) -> int:
        own = self._own(self._device.refresh())
        keeper = self._device.keeper
        if keeper is not None and keeper.serial == self._taken_at_rest:
            return 0
        if not _is_whole(own):
            return self._device.size_bytes()
        return sum(one.count_bytes for one in own)

    def is_marked(self, offset_bytes: int, length_bytes: int) -> bool:
        """See `agent.tracker.Tracker`. Looks at a copy: a bitmap that records cannot be read."""
        if not self.look():
            return False
        node = self._device.refresh()
        own = self._own(node)
        if self._device.keeper is not None or not _is_whole(own):
            return True
        copy = f"{self._device.seat.prefix}copy"
        marks = DirtyBitmap(self._device.size_bytes(), self._block_size_bytes)
        try:
            self._copy(copy, [one.name for one in own])
            self._read(node, [copy], marks)
        finally:
            self._remove([copy])
        return has_mark(marks, offset_bytes, length_bytes)

    def interrupt(self) -> None:
        """Nothing takes long."""

    def detach(self) -> None:
        """QEMU goes on recording."""

    def stop(self) -> None:
        """See `agent.tracker.Tracker`. The bitmaps go when the device closes."""
        self._device.give_up()

    def _own(self, node: Node) -> list[Bitmap]:
        """Return our bitmaps, the oldest first."""
        own = [one for one in node.bitmaps if _number(one.name, self._prefix)]
        return sorted(own, key=lambda one: _number(one.name))

    def _take_at_rest(self, node: Node, own: list[Bitmap], into: DirtyBitmap) -> Take:
        keeper = self._device.keeper
        if keeper is None or keeper.serial == self._taken_at_rest:
            return Take(0)
        if not _is_whole(own):
            into.set_all()
            self._taken_at_rest = keeper.serial
            return Take(into.size_bytes, f"{self._device.path}: its QEMU ended without bitmaps")
        marked = self._read_into(node, [one.name for one in own], into)
        self._taken_at_rest = keeper.serial
        return Take(marked)

    def _add(self, number: int) -> None:
        arguments = self._new(number)

        async def ask(monitor: Monitor) -> None:
            await monitor.execute("block-dirty-bitmap-add", **arguments)

        self._device.converse(ask)

    def _new(self, number: int) -> dict[str, object]:
        return {
            "node": self._device.node.name,
            "name": f"{self._prefix}{number}",
            "granularity": self._block_size_bytes,
            "persistent": self._device.node.keeps_bitmaps,
        }

    def _rotate(self, last: str, number: int) -> None:
        """Begin a new bitmap and freeze the last: QEMU drains its requests first."""
        freeze = {"node": self._device.node.name, "name": last}
        actions = [
            {"type": "block-dirty-bitmap-add", "data": self._new(number)},
            {"type": "block-dirty-bitmap-disable", "data": freeze},
        ]

        async def ask(monitor: Monitor) -> None:
            await monitor.execute("transaction", actions=actions)

        self._device.converse(ask)

    def _copy(self, name: str, own: list[str]) -> None:
        add = self._new(0) | {"name": name, "disabled": True, "persistent": False}
        merge = {"node": self._device.node.name, "target": name, "bitmaps": own}
        actions = [
            {"type": "block-dirty-bitmap-add", "data": add},
            {"type": "block-dirty-bitmap-merge", "data": merge},
        ]

        async def ask(monitor: Monitor) -> None:
            await monitor.execute("transaction", actions=actions)

        self._device.converse(ask)

    def _read_into(self, node: Node, names: list[str], into: DirtyBitmap) -> int:
        """Mark what frozen bitmaps have; returns bytes. `into` may end before the disk does."""
        marks = DirtyBitmap(self._device.size_bytes(), into.block_size_bytes)
        self._read(node, names, marks)
        if into.size_bytes == marks.size_bytes:
            into.merge(marks)
            return marks.count_bytes()
        ranges = [one for one in marks.extents() if one[0] < into.size_bytes]
        for offset, length in ranges:
            into.set_range(offset, min(length, into.size_bytes - offset))
        return sum(min(length, into.size_bytes - offset) for offset, length in ranges)

    def _read(self, node: Node, names: list[str], marks: DirtyBitmap) -> None:
        """Read frozen bitmaps through an export that is there for that only."""
        seat = self._device.seat
        export = f"{seat.prefix}marks"

        async def show(monitor: Monitor) -> str:
            return await add_export(monitor, seat.access, node.name, export, some)

        async def hide(monitor: Monitor) -> None:
            await remove_export(monitor, export)

        for at in range(0, len(names), MAX_CONTEXTS):
            some = names[at : at + MAX_CONTEXTS]
            socket = self._device.converse(show)
            try:
                read_marks(socket, export, some, marks)
            finally:
                self._device.converse(hide)

    def _is_ours(self, bitmap: Bitmap) -> bool:
        return bitmap.name.startswith(self._device.seat.prefix)

    def _remove(self, bitmaps: Iterable[str]) -> None:
        names = list(bitmaps)
        if not names:
            return
        node = self._device.node.name

        async def ask(monitor: Monitor) -> None:
            for name in names:
                try:
                    await monitor.execute("block-dirty-bitmap-remove", node=node, name=name)
                except FailedPrecondition as error:
                    if error.values.get("kind") != "GenericError" or is_taken(error):
                        raise
                    # Not there any more.

        try:
            self._device.converse(ask)
        except WarmsyncError as error:
            if is_taken(error):
                raise _in_use(self._device.path, str(error)) from error
            raise


def _number(name: str, prefix: str = "") -> int:
    """Return the number that a bitmap of ours ends with; 0 if it is none of them."""
    stem, _, digits = name.rpartition("-b")
    if prefix and f"{stem}-b" != prefix:
        return 0
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def _is_whole(own: list[Bitmap]) -> bool:
    """Return whether each write since the chain began is in one of them."""
    return bool(own) and own[-1].recording and not any(one.inconsistent for one in own)


def _in_use(path: str, detail: str) -> FailedPrecondition:
    return FailedPrecondition(
        "QEMU_BITMAP_IN_USE",
        f"{path} has a dirty bitmap of this migration's name that another job uses ({detail}); "
        "end that job, or choose another id",
        path=path,
    )
