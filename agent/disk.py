"""One source volume: its device, its tracker, and what may differ from the target.

Owns the order that the correctness rules ask of a take (flush, take, then read), what a round sends
of what is pending, and the fence.
All calls block: run them on a thread. Never talks to the target.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from agent.counters import Requests, count_writes, number_of, read_requests
from agent.device import (
    Described,
    device_key,
    identities,
    io_error,
    is_claimed,
    map_data,
    open_device,
)
from agent.errors import FailedPrecondition, InvalidArgument, Unavailable, WarmsyncError
from agent.heat import Heat
from agent.migration import Depth, Identity, Scheme, Volume
from agent.nameplate import another_disk, nameplate
from agent.qemu.access import Seat
from agent.store import Store
from agent.tracker import Take, Tracker, has_mark
from agent.tracker.choice import fit_block, make_tracker
from agent.tree import DigestTree, KeptTree
from agent.unread import BadBlock, UnreadBlocks
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice, Unread
from native.chunk import CHUNK_BYTES, DIGEST_BYTES

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger(__name__)

_NOTE = "qemu"
"""The file that says which disk of a QEMU it is; see `agent.qemu.note`."""
_PENDING, _TAKEN = "pending", "taken"


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A source device that was found fit, before tracking starts."""

    volume: Volume
    device: BlockDevice
    identities: tuple[Identity, ...]


class Fenceable(Protocol):
    """What a fence is put up at."""

    def set_read_only(self, read_only: bool) -> None:
        """Raise or lift it. OSError."""

    def close(self) -> None:
        """Close it; the fence stays, but for the lock that keeps out a QEMU of root's."""


def open_source(
    volume: Volume,
    allowed: tuple[str, ...],
    seat: Seat | None = None,
    *,
    fenced: bool = False,
    known: str = "",
) -> OpenSource:
    """Open a source for reading, with a `seat` as a disk of a QEMU; `fenced`: that may be gone.

    The domain's errors, SOURCE_REPLACED if it has another nameplate than the one that is `known`;
    nothing is left open if it fails.
    """
    device = _open(volume.source, allowed, seat, fenced=fenced)
    try:
        _check_same(volume.source, device, known)
        size_bytes = device.size_bytes()
        if size_bytes == 0:
            raise InvalidArgument(
                "EMPTY_DEVICE", f"{volume.source} has no bytes; name another", path=volume.source
            )
        if device.is_block_device and device.is_read_only():
            _log.warning("source is read-only already path=%s", volume.source)
        if volume.cut_bytes and size_bytes != volume.size_bytes + volume.cut_bytes:
            raise _size_changed(volume, size_bytes)
        sized = replace(volume, size_bytes=size_bytes - volume.cut_bytes, block_size_bytes=0)
        return OpenSource(sized, device, _identify(volume.source, device))
    except BaseException:
        device.close()
        raise


def _open(source: str, allowed: tuple[str, ...], seat: Seat | None, *, fenced: bool) -> BlockDevice:
    if seat is None:
        return open_device(source, allowed)
    try:
        from agent.qemu.device import open_qemu
    except ImportError as error:
        raise _no_qemu(error) from error
    return open_qemu(source, allowed, seat, fenced=fenced)


def open_fence(
    source: str, allowed: tuple[str, ...], seat: Seat | None = None, *, known: str = ""
) -> Fenceable | None:
    """Open no more of a source than its fence needs; asks no QEMU. None for a disk without a file.

    The domain's errors, SOURCE_REPLACED as `open_source`.
    """
    if seat is None:
        device = open_device(source, allowed)
        try:
            _check_same(source, device, known)
        except BaseException:
            device.close()
            raise
        return device
    try:
        from agent.qemu.device import open_image
    except ImportError as error:
        raise _no_qemu(error) from error
    return open_image(source, allowed, seat)


def _plate(device: BlockDevice) -> str:
    """A disk of a QEMU is known by its note."""
    return "" if isinstance(device, Described) else nameplate(device)


def _check_same(source: str, device: BlockDevice, known: str) -> None:
    """Names may swap at a reboot: another disk is neither copied nor fenced."""
    found = _plate(device)
    if known and found != known:
        raise another_disk(source, known, found)


def _no_qemu(error: ImportError) -> FailedPrecondition:
    return FailedPrecondition(
        "TRACKER_UNAVAILABLE",
        f"this build has no qemu tracker ({error}); install libnbd-dev and build again, "
        "or use --tracker scan",
        tracker=Scheme.QEMU,
    )


def _identify(source: str, device: BlockDevice) -> tuple[Identity, ...]:
    """Return what a source is; a disk without a file is known by its QEMU's name for it."""
    return device.identities() if isinstance(device, Described) else identities(source)


class SourceDisk:
    """A volume being tracked; `pending` marks what may differ from the target."""

    def __init__(
        self,
        source: OpenSource,
        scheme: Scheme,
        block_size_bytes: int,
        pin_dir: Path,
        store: Store | None = None,
        *,
        verify: Depth = Depth.NONE,
    ) -> None:
        size_bytes = source.volume.size_bytes
        block = fit_block(scheme, size_bytes, block_size_bytes)
        self.volume = replace(source.volume, block_size_bytes=block)
        self.source = source
        self.device = source.device
        self._store = store or Store(None)
        self.tracker: Tracker = make_tracker(
            scheme, source.device, block, pin_dir, self._store, size_bytes=size_bytes
        )
        self.pending = DirtyBitmap(size_bytes, block)
        self._chosen: DirtyBitmap | None = None
        # Digests tell of what was not sent, whether or not it was written again: all that is held
        # back once would look hot for ever.
        self._heat = Heat(size_bytes, block) if self.tracker.looks_cheaply else None
        # Kept: mapping new ones would take longer than all that is done with them.
        self._marks = DirtyBitmap(size_bytes, block)
        self._part = DirtyBitmap(size_bytes, block)
        self._taken_seconds = 0.0
        self._verify = verify
        self.tree: DigestTree | None = None
        """Made with the start, if anything is to be compared at the cutover."""
        self.unread = UnreadBlocks(self.volume.source, size_bytes, block)
        self.known_key = self.key()
        self.nameplate = _plate(self.device)
        self._number = number_of(self.device)
        self.flushing_since: float | None = None
        """When the flush began that is under way (monotonic); None if none is."""
        self._fenced = False

    def start(self) -> None:
        """Start tracking. From here on every write is noticed, and everything is to be sent."""
        geometry = self.volume.size_bytes, self.volume.block_size_bytes
        # Before the tracker: no room for them must leave nothing behind. And in this order: an
        # agent that is killed in between leaves what cannot be taken up, or all of it pending.
        self._store.drop(_TAKEN)
        self.pending = self._store.make_bitmap(_PENDING, *geometry)
        self.pending.set_all()
        self._marks = self._store.make_bitmap(_TAKEN, *geometry)
        try:
            self.tracker.start()
        except OSError as error:
            raise io_error("source", error) from error
        self.tree = self._make_tree()
        if self.tree is not None:
            self.tree.start()

    def _make_tree(self) -> DigestTree | None:
        table, size_bytes = self.tracker.digests, self.volume.size_bytes
        if self._verify is Depth.NONE:
            return None
        if self._verify is Depth.FULL and table is not None:
            return KeptTree(size_bytes, self._store, table)
        return DigestTree(size_bytes, self._store)

    @property
    def digests(self) -> Buffer | None:
        """The table that every read for sending fills, if there is one."""
        if self.tracker.digests is not None:
            return self.tracker.digests
        return self.tree.table if self.tree is not None and self._verify is Depth.FULL else None

    @property
    def stale(self) -> DirtyBitmap | None:
        """Where that table is not right until it is filled; None if all of it always is."""
        if self.tracker.digests is not None or self.digests is None or self.tree is None:
            return None
        return self.tree.stale

    def resume(self, *, believed: bool) -> str:
        """Go on where the agent before this one has ended.

        `believed`: on the same boot, with the same device. Returns why all is to be sent again, if
        it is; empty where only what was pending is. Unavailable: ask again, nothing was changed.
        """
        if not believed:
            self.start()
            return f"{self.volume.source} is not what it was: the host or the device was restarted"
        geometry = self.volume.size_bytes, self.volume.block_size_bytes
        try:
            self.pending = self._store.open_bitmap(_PENDING, *geometry)
            self._marks = self._store.open_bitmap(_TAKEN, *geometry)
            self.tracker.resume()
            self.tree = self._make_tree()
            if self.tree is not None:
                self.tree.resume()
        except Unavailable:
            raise
        except (OSError, WarmsyncError) as error:
            self.start()
            return str(error)
        # Taken, and perhaps not yet merged when the end came.
        self.pending.merge(self._marks)
        return ""

    def key(self) -> tuple[int, int, int]:
        """Return what the source is on this boot; see `agent.device.device_key`."""
        return device_key(self.device)

    def believe(self, offset_bytes: int, length_bytes: int, digests: bytes) -> None:
        """The target holds the same in this range of whole chunks, as was just read."""
        self._chosen = None
        table = self.tracker.digests
        if table is not None:
            at = offset_bytes // CHUNK_BYTES * DIGEST_BYTES
            memoryview(table)[at : at + len(digests)] = digests
        if self.tree is not None:
            self.tree.enter(offset_bytes, digests)
        self.pending.clear_range(offset_bytes, length_bytes)

    def forget_target(self) -> None:
        """Nothing is known any more of what the target holds: all is to be sent."""
        self._chosen = None
        self.pending.set_all()
        if self.tree is not None:
            self.tree.doubt_all()

    def count_unproved(self) -> int:
        """Return the bytes that would have to be read for a proof, were the guest stopped now."""
        return 0 if self.tree is None else self.tree.count_unread(self.pending)

    def count_touched(self) -> int:
        """Return the bytes of all chunks that are pending, if only in part."""
        chunks = DirtyBitmap(self.volume.size_bytes, CHUNK_BYTES)
        chunks.touch(self.pending)
        return chunks.count_bytes()

    def map_data(self) -> DirtyBitmap:
        """Return what may hold data; all else reads as zeros. Asked after tracking has started."""
        try:
            return map_data(self.device, self.volume.size_bytes, self.volume.block_size_bytes)
        except OSError as error:
            raise io_error("source", error) from error

    def take(self, *, flush: bool, at_seconds: float) -> Take:
        """Move the tracker's marks into `pending`; `flush`: after what is buffered passed it.

        `at_seconds` is the caller's monotonic clock.
        """
        self.check_size()
        # What was chosen before may be marked once more now.
        self._chosen = None
        try:
            if flush:
                self._flush()
            return self._take(at_seconds)
        except OSError as error:
            raise io_error("source", error) from error

    def _take(self, at_seconds: float) -> Take:
        if self._heat is None:
            return self.tracker.take(self.pending)
        self._marks.clear()
        try:
            take = self.tracker.take(self._marks)
        finally:
            self.pending.merge(self._marks)  # a take that failed has taken some
        if take.suspect:
            self._heat.forget()
            self._marks.clear()
        self._taken_seconds = at_seconds
        return take

    def choose_within(self, start_bytes: int, end_bytes: int) -> DirtyBitmap:
        """Return what is pending in a part of the volume; it counts as chosen, all else stays."""
        size = self.volume.size_bytes
        self._part.clear()
        self._part.merge(self.pending)
        self._part.clear_range(0, min(start_bytes, size))
        if end_bytes < size:
            self._part.clear_range(end_bytes, size - end_bytes)
        self._chosen = self._part
        self._doubt(self._part)
        return self._part

    def _doubt(self, chosen: DirtyBitmap) -> None:
        """Before it is read: what is known of these chunks is old."""
        if self.tree is not None and self._verify is Depth.FINAL:
            self.tree.doubt_only(chosen)
        elif self.tree is not None:
            self.tree.doubt(chosen)

    def choose(self, hold_bytes: int = 0) -> DirtyBitmap:
        """Return what this round sends: what is pending, but up to `hold_bytes` that are hot.

        What is held back stays pending. The last round must hold nothing back, and is spared the
        work.
        """
        self._chosen = self.pending
        if self._heat is not None and hold_bytes:
            self._heat.note(self._marks, self._taken_seconds)
            if self._heat.is_any:
                self._part.clear()
                self._part.merge(self.pending)
                self._heat.subtract_hot(self._part, hold_bytes)
                self._chosen = self._part
        self._doubt(self._chosen)
        return self._chosen

    def count_chosen(self) -> int:
        """Return the bytes that are chosen."""
        return 0 if self._chosen is None else self._chosen.count_bytes()

    def settle(self, unread: Sequence[Unread] = ()) -> int:
        """What was chosen and read is durable on the target: not pending any more, all else is.

        Returns the bytes that were chosen and stay pending, as they could not be read.
        """
        chosen = self._chosen
        if chosen is None:
            raise RuntimeError("nothing was chosen since the last take")
        self.unread.note(chosen, unread)
        if self.tree is not None:  # first: while it is pending it will be doubted once more
            self.tree.note_sent(chosen)  # more than was read: only has its entries looked at
            self.tree.doubt_overtaken()
        kept = 0
        if unread:
            # Never cleared and marked again: an agent that is killed in between would lose them.
            before = chosen.count_bytes()
            chosen = self._without(chosen, unread)
            kept = before - chosen.count_bytes()
        if chosen is self.pending:
            self.pending.clear()
        else:
            self.pending.subtract(chosen)
        self._chosen = None
        return kept

    def _without(self, chosen: DirtyBitmap, unread: Sequence[Unread]) -> DirtyBitmap:
        if chosen is not self._part:
            self._part.clear()
            self._part.merge(chosen)
        for offset, length in self.unread.blocks_of(unread):
            self._part.clear_range(offset, length)
        return self._part

    def bad_blocks(self) -> list[BadBlock]:
        """Return what the last rounds could not read and is still to be sent."""
        return self.unread.find(self.pending)

    def is_pending(self, offset_bytes: int, length_bytes: int) -> bool:
        """Return whether a byte of the range (within one chunk) may differ from the target."""
        return has_mark(self.pending, offset_bytes, length_bytes) or self.tracker.is_marked(
            offset_bytes, length_bytes
        )

    def flush(self) -> None:
        """Write back what the host's page cache holds for the device, past the tracker."""
        try:
            self._flush()
        except OSError as error:
            raise io_error("source", error) from error

    def _flush(self) -> None:
        self.flushing_since = time.monotonic()
        try:
            self.device.flush()
        finally:
            self.flushing_since = None

    def look(self) -> int:
        """Return the bytes marked since the last take. NOT_QUIESCED if a QEMU runs its guest."""
        if isinstance(self.device, Described):
            self.check_unclaimed()
        try:
            return self.tracker.look()
        except OSError as error:
            raise io_error("source", error) from error

    def count_writes(self) -> int:
        """Return the block layer's count of writes so far; 0 where it has none (files)."""
        return count_writes(self.device)

    def requests(self) -> Requests | None:
        """Return what the kernel counts of the disk under the source; None where it does not."""
        return read_requests(self._number)

    def follow(self) -> None:
        """Read from whoever shows the source now: its QEMU may have ended, or another begun.

        A take or a look does so too.
        """
        if isinstance(self.device, Described):
            self.device.follow()

    def check_size(self) -> None:
        """Raise FailedPrecondition if the device is not as large as it was."""
        size_bytes = self.device.size_bytes()
        if size_bytes != self.volume.size_bytes + self.volume.cut_bytes:
            raise _size_changed(self.volume, size_bytes)

    def check_unclaimed(self) -> None:
        """Raise FailedPrecondition if the device is mounted or held: the guest still has it."""
        if isinstance(self.device, Described):
            detail = self.device.obstacle()
            if detail:
                raise not_quiesced(self.volume.source, detail)
        elif is_claimed(self.volume.source):
            raise not_quiesced(self.volume.source, "it is mounted or held by another device")

    def fence(self) -> None:
        """Make the source read-only: the old VM cannot write again. Safe to call twice."""
        if not self._fenced:
            try:
                self.device.set_read_only(True)
            except OSError as error:
                raise fence_failed(self.volume.source, error) from error
            self._fenced = True

    def unfence(self) -> None:
        """Lift the fence, if it is up."""
        if self._fenced:
            self.device.set_read_only(False)
            self._fenced = False

    def detach(self) -> None:
        """Let go of everything; the kernel goes on tracking, and `resume` finds what is pending."""
        try:
            self.tracker.detach()
        finally:
            self.device.close()

    def close(self) -> None:
        """Stop tracking and close the device; a fence stays up. Safe to call twice."""
        try:
            self.tracker.stop()
            try:
                # Only the note tells where the fence is, if that is still to go up or down.
                self._store.remove(keep=_NOTE if self._fenced else "")
            except OSError as error:  # the next start removes them
                _log.warning('files left path=%s reason="%s"', self.volume.source, error)
        finally:
            self.device.close()
            self._forget_files()

    def _forget_files(self) -> None:
        """Mapped files keep descriptors, and migrations that have ended are remembered."""
        geometry = self.volume.size_bytes, self.volume.block_size_bytes
        self._chosen = None
        self.pending, self._marks = DirtyBitmap(*geometry), DirtyBitmap(*geometry)
        if self.tree is not None:
            self.tree.close()


def not_quiesced(path: str, detail: str) -> FailedPrecondition:
    """Return the refusal of a cutover whose source is still in use."""
    return FailedPrecondition(
        "NOT_QUIESCED",
        f"the source {path} is still in use: {detail}; power the VM down, then cut over again "
        "(syncing goes on)",
        path=path,
    )


def _size_changed(volume: Volume, size_bytes: int) -> FailedPrecondition:
    expected = volume.size_bytes + volume.cut_bytes
    return FailedPrecondition(
        "SOURCE_SIZE_CHANGED",
        f"{volume.source} had {expected} bytes, now {size_bytes}; start a new migration",
        path=volume.source,
        size_bytes=size_bytes,
        expected_bytes=expected,
    )


def fence_failed(path: str, error: OSError) -> FailedPrecondition:
    """Return the error of a fence that does not go up."""
    return FailedPrecondition(
        "FENCE_FAILED",
        f"the source {path} cannot be made read-only: {error.strerror}; "
        "run the agent as root, or as the owner of the file",
        path=path,
    )
