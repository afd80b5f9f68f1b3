"""A device with changes on top that are not on it yet: made whole, or not at all.

Owns the changes (a sparse file as large as the device, and a bitmap), their way onto the device,
and what undoes that way. Until `apply` the device is only read. Knows nothing of what they mean.

`apply` keeps what it overwrites in a file first and says so in a record, both durable;
`undo_left_behind` brings it back after the agent, or the host, died halfway. Of what lies beyond
`data_bytes` nothing is kept: nobody has data there.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer

BLOCK_BYTES = 4096
_STEP_BYTES = 1 << 20


class Shared(NamedTuple):
    """The descriptors by which a process that inherits them joins an overlay."""

    file: int
    changed: int
    zeroed: int


class Overlay:
    """Reads and writes of one device, the writes kept beside it. Calls are made one at a time."""

    def __init__(self, device: BlockDevice, data_bytes: int, place: Path) -> None:
        """Make the file of changes, `place` with a suffix. OSError."""
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = os.open(_changes(place), flags, 0o600)
        maps = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("changed", "zeroed")]
        self._place = place
        self._is_kept = False
        self._data_bytes = min(data_bytes, device.size_bytes())
        try:
            self._take(device, Shared(file, *maps))
            os.truncate(file, self.size_bytes)
            for descriptor in maps:
                os.truncate(descriptor, _map_bytes(self.size_bytes))
            self._map()
        except OSError:
            self.close()
            raise

    @classmethod
    def join(cls, device: BlockDevice, shared: Shared) -> Self:
        """Return the overlay of another process, to read and write only. OSError."""
        self = cls.__new__(cls)
        self._place, self._is_kept, self._data_bytes = Path(), True, 0
        self._take(device, shared)
        self._map()
        return self

    def _take(self, device: BlockDevice, shared: Shared) -> None:
        self.shared = shared
        self.sector_bytes = device.logical_block_size_bytes
        # A loop device may end within a sector, which nobody can write.
        self.size_bytes = device.size_bytes() // self.sector_bytes * self.sector_bytes
        self.device_descriptor = device.fileno()
        self._device = device
        self._file = shared.file
        self._buffer = AlignedBuffer(_STEP_BYTES)

    def _map(self) -> None:
        size = _map_bytes(self.size_bytes)
        words = [mmap.mmap(one, size) for one in (self.shared.changed, self.shared.zeroed)]
        self._changed = DirtyBitmap(self.size_bytes, BLOCK_BYTES, words=words[0])
        self._zeroed = DirtyBitmap(self.size_bytes, BLOCK_BYTES, words=words[1])

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Return that many bytes. OSError, also beyond the end."""
        _check(offset_bytes, length_bytes, self.size_bytes)
        steps = _steps(offset_bytes, length_bytes)
        return b"".join(self._read(offset, length) for offset, length in steps)

    def write(self, offset_bytes: int, data: bytes) -> None:
        """Keep a change. OSError: no room for it, or the device cannot be read."""
        _check(offset_bytes, len(data), self.size_bytes)
        for offset, length in _steps(offset_bytes, len(data)):
            at = offset - offset_bytes
            self._write(offset, data[at : at + length])

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Let a range read as zeros; whole blocks of it take no room."""
        _check(offset_bytes, length_bytes, self.size_bytes)
        end = offset_bytes + length_bytes
        first = min(-(-offset_bytes // BLOCK_BYTES) * BLOCK_BYTES, end)
        last = max(end if end == self.size_bytes else end - end % BLOCK_BYTES, first)
        self.write(offset_bytes, bytes(first - offset_bytes))
        self.write(last, bytes(end - last))
        if last > first:
            self._zeroed.set_range(first, last - first)
            self._changed.set_range(first, last - first)

    def changed_bytes(self) -> int:
        """Return how much `apply` would write."""
        return self._changed.count_bytes()

    def apply(self) -> None:
        """Write the changes to the device, durable.

        OSError of the device, or of the disk beside it; after one, `undo` has to be called.
        """
        os.fsync(self._file)
        runs = list(self._runs(self._changed))
        self._keep(runs)
        for offset, length in runs:
            for start, size in _steps(offset, length):
                self._apply(start, size)
        self._device.flush()
        self._compare(runs)

    def undo(self) -> None:
        """Bring back what was there before `apply`. OSError; safe to repeat."""
        _undo(self._device, self._place)

    def keep(self) -> None:
        """Let `close` leave the files: what they undo is still to be undone."""
        self._is_kept = True

    def close(self) -> None:
        """Forget the changes, and how to undo them."""
        for descriptor in self.shared:
            os.close(descriptor)
        if not self._is_kept:
            forget(self._place)

    def _read(self, offset: int, length: int) -> bytes:
        start, end = _around(offset, length, self.size_bytes)
        blocks = range(start, end, BLOCK_BYTES)
        changed = [block for block in blocks if self._changed.is_marked(block)]
        found = bytearray(end - start)
        if len(changed) < len(blocks):
            view = memoryview(self._buffer)[: end - start]
            self._device.read(start, view)
            found[:] = view
        for block in changed:
            size = min(BLOCK_BYTES, end - block)
            data = bytes(size) if self._zeroed.is_marked(block) else self._load(block, size)
            found[block - start : block - start + size] = data
        return bytes(found[offset - start : offset - start + length])

    def _load(self, offset: int, length: int) -> bytes:
        data = os.pread(self._file, length, offset)
        if len(data) != length:
            raise OSError(errno.EIO, "the file of changes is short", str(self._place))
        return data

    def _write(self, offset: int, data: bytes) -> None:
        start, end = _around(offset, len(data), self.size_bytes)
        if (start, end) != (offset, offset + len(data)):
            whole = bytearray(self._read(start, end - start))
            whole[offset - start : offset - start + len(data)] = data
            data = bytes(whole)
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], start + done)
        self._zeroed.clear_range(start, end - start)
        self._changed.set_range(start, end - start)

    def _apply(self, offset: int, length: int) -> None:
        data = self._read(offset, length)
        if not any(data):
            self._device.zero(offset, length)
            return
        view = memoryview(self._buffer)[:length]
        view[:] = data
        self._device.write(offset, view)

    def _keep(self, runs: list[tuple[int, int]]) -> None:
        """Make durable what `apply` overwrites, then that it is going to."""
        end = min(-(-self._data_bytes // BLOCK_BYTES) * BLOCK_BYTES, self.size_bytes)
        kept = [(at, min(length, end - at)) for at, length in runs if at < end]
        with _kept(self._place).open("wb") as file:
            for run in kept:
                for offset, length in _steps(*run):
                    view = memoryview(self._buffer)[:length]
                    self._device.read(offset, view)
                    os.pwrite(file.fileno(), view, offset)
            file.flush()
            os.fsync(file.fileno())
        new = _record(self._place).with_suffix(".new")
        with new.open("w") as file_:
            json.dump({"runs": kept}, file_)
            file_.flush()
            os.fsync(file_.fileno())
        new.rename(_record(self._place))
        _sync_directory(self._place)

    def _compare(self, runs: list[tuple[int, int]]) -> None:
        for run in runs:
            for offset, length in _steps(*run):
                wanted = self._read(offset, length)
                view = memoryview(self._buffer)[:length]
                self._device.read(offset, view)
                if bytes(view) != wanted:
                    raise OSError(errno.EIO, f"another content than was written at {offset}")

    def _runs(self, bitmap: DirtyBitmap) -> Iterator[tuple[int, int]]:
        for offset, length in bitmap.extents():
            yield offset, min(length, self.size_bytes - offset)


def undo_left_behind(device: BlockDevice, place: Path) -> bool:
    """Undo an `apply` that did not end, and remove its files; returns whether there was one.

    OSError or ValueError if it cannot be undone; then everything stays, and the device is no copy.
    """
    was_applied = _record(place).exists()
    _undo(device, place)
    forget(place)
    return was_applied


def forget(place: Path) -> None:
    """Remove the files of an overlay; first the record, without which nothing is undone."""
    if not place.parent.is_dir():
        return
    _record(place).unlink(missing_ok=True)
    _sync_directory(place)
    for path in (_kept(place), _changes(place), _record(place).with_suffix(".new")):
        path.unlink(missing_ok=True)


def _undo(device: BlockDevice, place: Path) -> None:
    if not _record(place).exists():
        return
    runs = json.loads(_record(place).read_text())["runs"]
    buffer = AlignedBuffer(_STEP_BYTES)
    with _kept(place).open("rb") as file:
        for run in runs:
            for offset, length in _steps(*run):
                view = memoryview(buffer)[:length]
                if os.preadv(file.fileno(), [view], offset) != length:
                    raise OSError(errno.EIO, "what was kept is short", str(_kept(place)))
                device.write(offset, view)
    device.flush()


def _around(offset: int, length: int, size_bytes: int) -> tuple[int, int]:
    end = -(-(offset + length) // BLOCK_BYTES) * BLOCK_BYTES
    return offset - offset % BLOCK_BYTES, min(end, size_bytes)


def _steps(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Iterate pieces that end on whole steps, so that each fits the buffer."""
    end = offset + length
    while offset < end:
        size = min(end, offset - offset % _STEP_BYTES + _STEP_BYTES) - offset
        yield offset, size
        offset += size


def _check(offset: int, length: int, size_bytes: int) -> None:
    if offset < 0 or length < 0 or offset + length > size_bytes:
        raise OSError(errno.EIO, f"{length} bytes at {offset} of {size_bytes}")


def _sync_directory(place: Path) -> None:
    directory = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _changes(place: Path) -> Path:
    return place.with_suffix(".changes")


def _kept(place: Path) -> Path:
    return place.with_suffix(".kept")


def _record(place: Path) -> Path:
    return place.with_suffix(".json")


def _map_bytes(size_bytes: int) -> int:
    blocks = -(-size_bytes // BLOCK_BYTES)
    return -(-blocks // 64) * 8
