"""Partition tables: GPT and MBR read, checked, and rewritten for a disk of another size.

Owns both formats. Pure: a rewrite is a list of patches that somebody else writes. Never guesses: a
table that contradicts itself is an error, whatever could be made of it.

Formats: UEFI Specification 2.10, chapter 5.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

from agent.errors import FailedPrecondition
from agent.layout.superblock import Read

ALIGNMENT_BYTES = 1 << 20
"""Partitions end on such a boundary, as partitioning tools of today lay them out."""

Patch = tuple[int, bytes]
"""Offset on the disk, and what is to stand there."""

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_SIGNATURE = b"EFI PART"
_MOST_ENTRIES_BYTES = 1 << 20
_PROTECTIVE = 0xEE
_EXTENDED = frozenset({0x05, 0x0F, 0x85})
_MOST_MBR_SECTORS = 0xFFFFFFFF


class Scheme(StrEnum):
    """How a disk is divided."""

    NONE = "none"
    MBR = "mbr"
    GPT = "gpt"


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition; `number` is that of its entry, from 1."""

    number: int
    start_bytes: int
    end_bytes: int
    is_extended: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table that is whole; `head` and `entries` are its bytes as they stand on the disk."""

    scheme: Scheme
    sector_bytes: int
    partitions: tuple[Partition, ...]
    boot: bytes
    head: bytes = b""
    entries: bytes = b""

    @property
    def last(self) -> Partition | None:
        """Return the partition that ends last, whatever its number."""
        return max(self.partitions, key=lambda one: one.end_bytes, default=None)

    @property
    def has_more(self) -> bool:
        """Return whether kernels may find partitions there that `partitions` does not tell of.

        Linux does not hold a logical partition to its extended one, and uses entries of type 0.
        """
        if self.scheme is not Scheme.MBR:
            return False
        sized = [struct.unpack_from("<I", self.boot, 458 + 16 * i)[0] for i in range(4)]
        untyped = any(size and not self.boot[450 + 16 * i] for i, size in enumerate(sized))
        return untyped or any(one.is_extended for one in self.partitions)

    @property
    def least_bytes(self) -> int:
        """Return what a disk must have at least for this table: GPT keeps a copy at its end."""
        end = max((one.end_bytes for one in self.partitions), default=0)
        if self.scheme is Scheme.GPT:
            first_usable: int = _HEADER.unpack_from(self.head)[7]
            return (
                max(end, first_usable * self.sector_bytes) + self._copy_sectors * self.sector_bytes
            )
        return max(end, self.sector_bytes)

    @property
    def _copy_sectors(self) -> int:
        return -(-len(self.entries) // self.sector_bytes) + 1

    def grown(self, disk_bytes: int) -> Table:
        """Return the table with its last partition grown to the end of a disk of that size."""
        last = self.last
        if last is None:
            return self
        room = disk_bytes
        if self.scheme is Scheme.GPT:
            room -= self._copy_sectors * self.sector_bytes
        else:
            room = min(room, _MOST_MBR_SECTORS * self.sector_bytes)
        end = room - room % max(ALIGNMENT_BYTES, self.sector_bytes)
        if end <= last.end_bytes:
            return self
        parts = tuple(replace(p, end_bytes=end) if p is last else p for p in self.partitions)
        return replace(self, partitions=parts)

    def patches(self, disk_bytes: int) -> list[Patch]:
        """Return what has to be written for this table to be that of a disk of that size.

        ValueError if it does not fit there; see `least_bytes`.
        """
        if disk_bytes < self.least_bytes:
            raise ValueError(f"a table of {self.least_bytes} bytes for a disk of {disk_bytes}")
        if self.scheme is Scheme.GPT:
            return list(self._gpt_patches(disk_bytes // self.sector_bytes))
        boot = bytearray(self.boot)
        for one in self.partitions:
            _set_size(boot, one, self.sector_bytes)
        return [(0, bytes(boot))]

    def _gpt_patches(self, sectors: int) -> Iterator[Patch]:
        size = self.sector_bytes
        entries = self._entries()
        last_lba, copy_lba = sectors - 1, sectors - self._copy_sectors
        fields = list(_HEADER.unpack_from(self.head))
        former_lba, entries_lba = fields[6], fields[10]
        fields[6], fields[8] = last_lba, copy_lba - 1
        if former_lba < copy_lba:
            # Nobody shall find two copies: the former place may be within a partition by now.
            yield former_lba * size, bytes(size)
        boot = bytearray(self.boot)
        struct.pack_into("<I", boot, 446 + 12, min(last_lba, _MOST_MBR_SECTORS))
        yield 0, bytes(boot)
        padded = entries.ljust((self._copy_sectors - 1) * size, b"\0")
        yield copy_lba * size, padded
        copied = [*fields]
        copied[5], copied[6], copied[10] = last_lba, 1, copy_lba
        yield last_lba * size, self._header(copied, entries)
        yield entries_lba * size, padded
        yield size, self._header(fields, entries)

    def _header(self, fields: list[int | bytes], entries: bytes) -> bytes:
        fields = [*fields]
        fields[3], fields[13] = 0, zlib.crc32(entries)
        length = int(fields[2])
        rest = self.head[_HEADER.size : length]
        fields[3] = zlib.crc32(_HEADER.pack(*fields) + rest)
        return (_HEADER.pack(*fields) + rest).ljust(self.sector_bytes, b"\0")

    def _entries(self) -> bytes:
        entries = bytearray(self.entries)
        length = _HEADER.unpack_from(self.head)[12]
        for one in self.partitions:
            at = (one.number - 1) * length + 40
            struct.pack_into("<Q", entries, at, one.end_bytes // self.sector_bytes - 1)
        return bytes(entries)


def find_table(read: Read, disk_bytes: int, sector_bytes: int, former_bytes: int = 0) -> Table:
    """Return the table of a disk, of scheme NONE if there is none.

    FailedPrecondition TABLE_DAMAGED. A GPT's copy may lie before the end: the disk has grown. Of a
    disk that was larger, `former_bytes`, the copy may be lost.
    """
    none = Table(Scheme.NONE, sector_bytes, (), b"")
    if disk_bytes < 3 * sector_bytes:
        return none
    boot = read(0, sector_bytes)
    kinds = [boot[450 + 16 * i] for i in range(4)]
    if boot[510:512] != b"\x55\xaa":
        if read(sector_bytes, 8) == _SIGNATURE:
            raise _damaged("a GPT without its protective MBR")
        return none
    if _PROTECTIVE in kinds:
        if kinds[0] != _PROTECTIVE or any(kinds[1:]):
            raise _damaged("a hybrid of GPT and MBR")
        return _find_gpt(read, disk_bytes, boot, former_bytes)
    partitions = _mbr_partitions(boot, disk_bytes, sector_bytes)
    return Table(Scheme.MBR, sector_bytes, partitions, boot) if partitions else none


def _mbr_partitions(boot: bytes, disk_bytes: int, size: int) -> tuple[Partition, ...]:
    """Return the entries of a boot sector; none if it is that of a file system (FAT, say)."""
    found = []
    for number in range(1, 5):
        entry = boot[430 + 16 * number : 446 + 16 * number]
        flag, kind = entry[0], entry[4]
        start, count = struct.unpack_from("<II", entry, 8)
        if not any(entry):
            continue
        if flag not in (0, 0x80):
            return ()
        if kind == 0 or count == 0:
            continue
        one = Partition(number, start * size, (start + count) * size, kind in _EXTENDED)
        if start == 0 or one.end_bytes > disk_bytes:
            raise _damaged(f"partition {number} lies outside the disk")
        found.append(one)
    _check_apart(found)
    return tuple(found)


def _find_gpt(read: Read, disk_bytes: int, boot: bytes, former_bytes: int) -> Table:
    size = len(boot)
    most_sectors = max(disk_bytes, former_bytes) // size
    head, entries = _read_copy(read, disk_bytes, size, 1, most_sectors)
    fields = _HEADER.unpack_from(head)
    if not disk_bytes // size <= fields[6] < most_sectors:
        _check_copy(_read_copy(read, disk_bytes, size, fields[6], most_sectors), fields, entries)
    partitions = tuple(_gpt_partitions(fields, entries, size))
    _check_apart(list(partitions))
    return Table(Scheme.GPT, size, partitions, boot, head, entries)


def _check_copy(copy: tuple[bytes, bytes], fields: tuple[int, ...], entries: bytes) -> None:
    theirs = _HEADER.unpack_from(copy[0])
    # All but the checksum and the three places is the same in both.
    alike = [i for i in range(len(fields)) if i not in (3, 5, 6, 10)]
    if copy[1] != entries or any(fields[i] != theirs[i] for i in alike):
        raise _damaged("the two copies of the GPT differ")


def _read_copy(
    read: Read, disk_bytes: int, size: int, place: int, most_sectors: int
) -> tuple[bytes, bytes]:
    if not 1 <= place < disk_bytes // size:
        raise _damaged(f"the GPT's copy lies outside the disk, at sector {place}")
    head = read(place * size, size)
    fields = _HEADER.unpack_from(head)
    length = fields[2]
    if fields[0] != _SIGNATURE or not _HEADER.size <= length <= size:
        raise _damaged(f"no GPT header at sector {place}")
    blank = head[:16] + bytes(4) + head[20:length]
    if zlib.crc32(blank) != fields[3]:
        raise _damaged(f"checksum of the GPT header at sector {place}")
    if fields[5] != place or fields[7] > fields[8] or fields[8] >= most_sectors:
        raise _damaged(f"the GPT header at sector {place} contradicts itself")
    return head, _read_entries(read, disk_bytes, size, fields)


def _read_entries(read: Read, disk_bytes: int, size: int, fields: tuple[int, ...]) -> bytes:
    place, count, length, checksum = fields[10:14]
    total = count * length
    fits = place >= 2 and place * size + total <= disk_bytes
    if length < 128 or length % 8 or not 0 < total <= _MOST_ENTRIES_BYTES or not fits:
        raise _damaged("number, size or place of the GPT's entries")
    rounded = -(-total // size) * size
    if place <= fields[8] and place + rounded // size > fields[7]:
        raise _damaged("the GPT's entries lie where partitions may be")
    entries = read(place * size, min(rounded, disk_bytes - place * size))[:total]
    if zlib.crc32(entries) != checksum:
        raise _damaged("checksum of the GPT's entries")
    return entries


def _gpt_partitions(fields: tuple[int, ...], entries: bytes, size: int) -> Iterator[Partition]:
    first_usable, last_usable, length = fields[7], fields[8], fields[12]
    for number in range(1, fields[11] + 1):
        entry = entries[(number - 1) * length : number * length]
        if uuid.UUID(bytes_le=entry[:16]).int == 0:
            continue
        first, last = struct.unpack_from("<QQ", entry, 32)
        if not first_usable <= first <= last <= last_usable:
            raise _damaged(f"partition {number} lies outside the usable sectors")
        yield Partition(number, first * size, (last + 1) * size)


def _check_apart(partitions: list[Partition]) -> None:
    ordered = sorted(partitions, key=lambda one: one.start_bytes)
    for one, other in pairwise(ordered):
        if one.end_bytes > other.start_bytes:
            raise _damaged(f"partitions {one.number} and {other.number} overlap")


def _set_size(boot: bytearray, one: Partition, size: int) -> None:
    at = 430 + 16 * one.number
    count = (one.end_bytes - one.start_bytes) // size
    if count != struct.unpack_from("<I", boot, at + 12)[0]:
        struct.pack_into("<I", boot, at + 12, count)
        boot[at + 5 : at + 8] = b"\xfe\xff\xff"  # beyond what cylinders can say


def _damaged(what: str) -> FailedPrecondition:
    return FailedPrecondition(
        "TABLE_DAMAGED",
        f"the partition table is damaged ({what}) and was not touched; repair it in the guest "
        "(sgdisk --verify, sfdisk --verify), then resize there",
        what=what,
    )
