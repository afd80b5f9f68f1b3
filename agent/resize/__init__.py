"""Resize: what is on a larger device grown to its end, all of it or nothing.

Owns the order: look, check, grow and check again on an overlay, and only what came out well goes
onto the device, with an undo for that last step. The device is the caller's and stays claimed by it
all the time; the programs see a loop device over the overlay. Blocking.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from agent.errors import DataLoss, FailedPrecondition
from agent.layout import Layout, find_layout
from agent.layout.partitions import ALIGNMENT_BYTES, Scheme, Table, find_table
from agent.layout.superblock import SIZED, Content, Kind, Read
from agent.resize import filesystem, means, overlay, window
from agent.resize.loop import attached
from agent.resize.overlay import Overlay
from agent.resize.tool import ToolError, Tools
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer

_log = logging.getLogger(__name__)

_TAIL_BYTES = 131072


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a program may take, and how long the kernel to let go of what was made; what may
    be grown here.
    """

    program_seconds: float = 600.0
    end_seconds: float = 30.0
    kinds: frozenset[Kind] = SIZED


@dataclass(frozen=True, slots=True)
class GrowReport:
    """What was grown. `after_bytes` equals `before_bytes` where there was no room to grow into."""

    kind: Kind
    scheme: Scheme
    before_bytes: int
    after_bytes: int
    changed_bytes: int
    """What was written to the device."""
    seconds: float
    apply_seconds: float
    """Of `seconds`, the part in which the device was written."""


def reads(device: BlockDevice) -> Read:
    """Return how to read any range of a device, past all caches. OSError."""
    size = device.size_bytes()

    def read(offset: int, length: int) -> bytes:
        start = offset - offset % overlay.BLOCK_BYTES
        end = min(-(-(offset + length) // overlay.BLOCK_BYTES) * overlay.BLOCK_BYTES, size)
        buffer = AlignedBuffer(end - start)
        device.read(start, buffer)
        return bytes(memoryview(buffer)[offset - start : offset - start + length])

    return read


def foresee(device: BlockDevice) -> str:
    """Return which file system a resize of a copy of this device would grow (a `Kind`).

    Empty where there is none, or nobody can tell now: a guest may be writing.
    """
    try:
        size, sector_bytes = device.size_bytes(), device.logical_block_size_bytes
        found = find_layout(reads(device), size, sector_bytes)
        found.check_growable()
    except (FailedPrecondition, OSError):
        return ""
    return found.content.kind


def grow(
    device: BlockDevice, data_bytes: int, place: Path, limits: Limits = Limits()
) -> GrowReport:
    """Grow what is on the first `data_bytes` of a device to the device's end.

    `place` names files in the state directory, of this volume only; they are removed unless the
    device could be neither grown nor brought back. FailedPrecondition GROW_UNSUPPORTED,
    GROW_NOT_ALLOWED,
    TABLE_DAMAGED, FILE_SYSTEM_DAMAGED, GROW_FAILED: the device is as it was. DataLoss
    GROW_NOT_UNDONE: it is not.
    """
    begun = time.monotonic()
    with _on_overlay(device, data_bytes, place) as changes:
        attempt = _prepare(changes, min(data_bytes, changes.size_bytes), place, limits)
        before = after = attempt.layout.content
        if attempt.end_bytes - before.end_bytes >= ALIGNMENT_BYTES:
            after = attempt.run()
        applied = time.monotonic()
        is_grown = after.size_bytes > before.size_bytes
        if is_grown:
            _apply(changes, device.path)
        now = time.monotonic()
        return GrowReport(
            kind=before.kind,
            scheme=attempt.table.scheme,
            before_bytes=before.size_bytes,
            after_bytes=after.size_bytes,
            changed_bytes=changes.changed_bytes() if is_grown else 0,
            seconds=now - begun,
            apply_seconds=now - applied,
        )


def move_table(device: BlockDevice, data_bytes: int, source_bytes: int, place: Path) -> bool:
    """Fit the partition table to a device that holds only the first `data_bytes` of its source.

    A GPT keeps a copy at the end of the disk, which was cut off. Behind `data_bytes` is nothing
    of the source: the device may have grown since. Returns whether it had to be.
    FailedPrecondition
    TABLE_NOT_MOVED: the device is as it was; DataLoss GROW_NOT_UNDONE: it is not.
    """
    try:
        with _on_overlay(device, device.size_bytes(), place) as changes:
            return _move_table(changes, data_bytes, source_bytes, device.path)
    except (FailedPrecondition, ValueError) as error:
        raise FailedPrecondition(
            "TABLE_NOT_MOVED",
            f"the partition table on {device.path} could not be fitted to its size, and nothing "
            f"was released: {error}; mend that, then resume the migration",
            path=device.path,
        ) from error


def _move_table(changes: Overlay, data_bytes: int, source_bytes: int, path: str) -> bool:
    size = changes.size_bytes
    former = max(source_bytes, size)
    table = find_table(changes.read, data_bytes, changes.sector_bytes, former)
    if table.scheme is not Scheme.GPT:
        return False
    for offset, data in table.patches(size):
        changes.write(offset, data)
    moved = find_table(changes.read, size, changes.sector_bytes)
    if (moved.scheme, moved.partitions) != (table.scheme, table.partitions):
        raise ValueError("read again, it is another table")
    _apply(changes, path)
    return True


def undo_left_behind(device: BlockDevice, place: Path) -> bool:
    """Bring a device back that an agent was killed on while it wrote a grown file system to it.

    To be called at the restart, before anything else reads or writes the device. Returns whether
    there was something to undo. DataLoss GROW_NOT_UNDONE.
    """
    try:
        found = overlay.undo_left_behind(device, place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_undone(device.path, error) from error
    _remove_points(place)
    if found:
        _log.warning("undid a resize that did not end device=%s", device.path)
    return found


@contextmanager
def _on_overlay(device: BlockDevice, data_bytes: int, place: Path) -> Iterator[Overlay]:
    changes = None
    try:
        undo_left_behind(device, place)
        changes = Overlay(device, data_bytes, place)
        yield changes
    except (ToolError, OSError) as error:
        raise _failed(device.path, error) from error
    finally:
        if changes is not None:
            changes.close()
        _remove_points(place)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """To grow the content of `layout` from `former_end_bytes` to `end_bytes`, on an overlay."""

    changes: Overlay
    layout: Layout
    table: Table
    data_bytes: int
    former_end_bytes: int
    end_bytes: int
    place: Path
    limits: Limits

    def run(self) -> Content:
        """Check, grow, check again; return what is there then. The domain's errors, ToolError."""
        point = self.place.with_suffix(".window")
        # What went wrong with the data comes first: a disk that cannot be read looks damaged.
        with window.opened(self.changes, point, self.limits.end_seconds) as (view, file):
            self._grow(Tools(self.limits.program_seconds, view.fail), file)
        return self._read_back()

    def _grow(self, tools: Tools, file: int) -> None:
        content, point = self.layout.content, self.place.with_suffix(".mount")
        with self._device(file, self.former_end_bytes) as path:
            filesystem.check(tools, path, content, point)
        self._move_end()
        with self._device(file, self.end_bytes) as path:
            filesystem.grow(tools, path, content, point)
        # Attached anew: what was written is in the overlay then.
        with self._device(file, self.end_bytes) as path:
            try:
                filesystem.check(tools, path, replace(content, needs_replay=False), point)
            except FailedPrecondition as error:
                raise ToolError(f"not clean once it was grown: {error.values['what']}") from error

    def _device(self, file: int, end_bytes: int) -> AbstractContextManager[str]:
        start, sector = self.layout.content.start_bytes, self.changes.sector_bytes
        return attached(file, sector, start, end_bytes - start, self.limits.end_seconds)

    def _move_end(self) -> None:
        if self.table.scheme is not Scheme.NONE:
            for offset, data in self.table.patches(self.changes.size_bytes):
                self.changes.write(offset, data)
        self._wipe(self.end_bytes, self.former_end_bytes)
        if self.table.scheme is not Scheme.GPT:  # which has its copy there
            self._wipe(self.changes.size_bytes, self.data_bytes)

    def _wipe(self, end_bytes: int, least_bytes: int) -> None:
        """What lay there before may not pass for the end of a RAID's member."""
        start = max(end_bytes - _TAIL_BYTES, least_bytes)
        self.changes.zero(start, end_bytes - start)

    def _read_back(self) -> Content:
        changes = self.changes
        found = find_layout(changes.read, changes.size_bytes, changes.sector_bytes)
        same = found.content.kind is self.layout.content.kind
        if not same or found.table.partitions != self.table.partitions:
            raise ToolError("the disk does not read as it was written")
        return found.content


def _prepare(changes: Overlay, data_bytes: int, place: Path, limits: Limits) -> _Attempt:
    layout = find_layout(changes.read, data_bytes, changes.sector_bytes)
    layout.check_growable()
    means.check_allowed(layout.content.kind, limits.kinds)
    _check_host(layout.content)
    table = layout.table.grown(changes.size_bytes)
    former, last = layout.table.last, table.last
    return _Attempt(
        changes=changes,
        layout=layout,
        table=table,
        data_bytes=data_bytes,
        former_end_bytes=former.end_bytes if former else data_bytes,
        end_bytes=last.end_bytes if last else changes.size_bytes,
        place=place,
        limits=limits,
    )


def _apply(changes: Overlay, path: str) -> None:
    try:
        changes.apply()
    except OSError as error:
        try:
            changes.undo()
        except OSError as failure:
            changes.keep()
            raise _not_undone(path, failure) from error
        raise


def _check_host(content: Content) -> None:
    lacks = means.lacks(content.kind)
    if lacks:
        raise ToolError(lacks)
    if filesystem.is_mounted(content):
        raise ToolError(f"a file system of the same id is mounted on this host ({content.uuid})")


def _remove_points(place: Path) -> None:
    place.with_suffix(".window").unlink(missing_ok=True)
    point = place.with_suffix(".mount")
    if point.is_dir():
        os.rmdir(point)


def _failed(path: str, error: Exception) -> FailedPrecondition:
    return FailedPrecondition(
        "GROW_FAILED",
        f"{path} was not grown and is as it was: {error}; grow it in the guest, or see "
        "`warmsync doctor`",
        path=path,
    )


def _not_undone(path: str, error: Exception) -> DataLoss:
    return DataLoss(
        "GROW_NOT_UNDONE",
        f"{path} was being grown and could not be brought back: {error}; do not boot from it, "
        "mend the disk, then resume the migration",
        path=path,
    )
