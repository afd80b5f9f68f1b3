"""Superblocks: which file system begins at a place, how large it says it is, how it was left.

Owns the formats of ext2/3/4, XFS and btrfs as far as a size needs them, and the marks of what is
not grown. Never writes, never mounts. What it is given may be anything: bytes of a guest.

Formats: Documentation/filesystems/ext4/super.rst of the kernel; XFS Algorithms and Data Structures,
chapter 13; btrfs on-disk format (btrfs.readthedocs.io, dev/On-disk-format).
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from agent.errors import FailedPrecondition

Read = Callable[[int, int], bytes]
"""read(offset_bytes, length_bytes) -> that many bytes of the disk. Only within its size."""

LOOKED_AT_BYTES = 69632
"""Up to here a content is told from its beginning: the superblock of btrfs lies at 64 KiB."""

_MD_MAGIC = struct.pack("<I", 0xA92B4EFC)
# As libblkid knows them (libblkid/src/superblocks): firmware RAIDs of Intel and of DDF, Windows'
# dynamic disks in the last sectors; DRBD in the last 4 KiB.
_TAIL_MARKS = (b"Intel Raid ISM Cfg Sig. ", b"\xde\x11\xde\x11", b"PRIVHEAD")
_LAST_SECTORS = (-512, -1024, -4096, -8192)
_DRBD_MAGICS = {struct.pack(">I", 0x83740260 + last) for last in range(0x10)}
_SWAP_PAGES = (4096, 8192, 16384, 65536)


class Kind(StrEnum):
    """What a disk or partition holds."""

    EXT = "ext"
    """ext2, ext3 or ext4."""
    XFS = "xfs"
    BTRFS = "btrfs"
    SWAP = "swap"
    LVM = "lvm"
    LUKS = "luks"
    RAID = "raid"
    UNKNOWN = "unknown"


SIZED = frozenset({Kind.EXT, Kind.XFS, Kind.BTRFS})
"""Those that say where they end."""

NAMES = {
    Kind.EXT: "ext4",
    Kind.XFS: "XFS",
    Kind.BTRFS: "btrfs",
    Kind.SWAP: "swap",
    Kind.LVM: "an LVM volume",
    Kind.LUKS: "an encrypted volume",
    Kind.RAID: "a member of a RAID",
    Kind.UNKNOWN: "nothing that is known",
}
"""What a person calls them."""


@dataclass(frozen=True, slots=True)
class Content:
    """What begins at `start_bytes`; `size_bytes` is 0 where that is not known."""

    kind: Kind
    start_bytes: int
    size_bytes: int = 0
    uuid: str = ""
    needs_replay: bool = False
    """It was not unmounted: what is in its journal comes first."""

    @property
    def end_bytes(self) -> int:
        """Return where it ends on the disk."""
        return self.start_bytes + self.size_bytes


def find_content(read: Read, start_bytes: int, end_bytes: int) -> Content:
    """Return what lies in [start, end) of a disk; UNKNOWN also if two kinds claim the place.

    FailedPrecondition FILE_SYSTEM_DAMAGED for a superblock that contradicts itself or its place.
    """
    head = _head(read, start_bytes, end_bytes)
    kinds = find_kinds(read, start_bytes, end_bytes)
    if len(kinds) != 1:
        return Content(Kind.UNKNOWN, start_bytes)
    parse = _PARSERS.get(kinds[0])
    if parse is None:
        return Content(kinds[0], start_bytes)
    found = parse(head, start_bytes)
    if found.kind in SIZED and found.end_bytes > end_bytes:
        raise damaged(found.kind, start_bytes, f"it says that it ends at {found.end_bytes}")
    return found


def find_kinds(read: Read, start_bytes: int, end_bytes: int) -> list[Kind]:
    """Return every kind that claims [start, end) of a disk by a mark of its own."""
    head = _head(read, start_bytes, end_bytes)
    kinds = [kind for kind, is_marked in _MARKS.items() if is_marked(head)]
    tail_bytes = min(131072, end_bytes - start_bytes)
    if _ends_as_member(read(end_bytes - tail_bytes, tail_bytes)):
        kinds.append(Kind.RAID)
    return kinds


def _head(read: Read, start_bytes: int, end_bytes: int) -> bytes:
    length = min(LOOKED_AT_BYTES, end_bytes - start_bytes)
    return read(start_bytes, length).ljust(LOOKED_AT_BYTES, b"\0")


def damaged(kind: str, start_bytes: int, what: str) -> FailedPrecondition:
    """Return the error for a file system that is not to be touched."""
    return FailedPrecondition(
        "FILE_SYSTEM_DAMAGED",
        f"the {kind} file system at byte {start_bytes} is damaged ({what}) and was not touched; "
        "check and repair it in the guest, then resize it there",
        kind=kind,
        start_bytes=start_bytes,
        what=what,
    )


def _is_ext(head: bytes) -> bool:
    return head[1080:1082] == b"\x53\xef"


def _is_swap(head: bytes) -> bool:
    names = (b"SWAPSPACE2", b"SWAP-SPACE")
    return any(head[page - 10 : page] in names for page in _SWAP_PAGES)


def _is_lvm(head: bytes) -> bool:
    return any(head[at : at + 8] == b"LABELONE" for at in (0, 512, 1024, 1536))


def _is_raid(head: bytes) -> bool:
    return _MD_MAGIC in (head[:4], head[4096:4100])


def _ends_as_member(tail: bytes) -> bool:
    """Return whether the last 128 KiB of a disk or partition are those of a RAID's member.

    Such a one looks like its content from the front. Of md these are versions 0.90 and 1.0.
    """
    if len(tail) < 131072:
        return False
    # 0.90 starts the last whole 64 KiB of the member, 1.0 the last whole 4 KiB before 8 KiB.
    if any(tail[at : at + 4] == _MD_MAGIC for at in range(0, len(tail), 4096)):
        return True
    starts = {tail[at : at + len(mark)] for mark in _TAIL_MARKS for at in _LAST_SECTORS}
    drbd = {tail[at + 60 : at + 64] for at in (-4096, -8192)}
    return not starts.isdisjoint(_TAIL_MARKS) or not drbd.isdisjoint(_DRBD_MAGICS)


_MARKS: dict[Kind, Callable[[bytes], bool]] = {
    Kind.EXT: _is_ext,
    Kind.XFS: lambda head: head[:4] == b"XFSB",
    Kind.BTRFS: lambda head: head[65600:65608] == b"_BHRfS_M",
    Kind.SWAP: _is_swap,
    Kind.LVM: _is_lvm,
    Kind.LUKS: lambda head: head[:6] == b"LUKS\xba\xbe",
    Kind.RAID: _is_raid,
}


def _parse_ext(head: bytes, start: int) -> Content:
    block = head[1024:2048]
    (low,) = struct.unpack_from("<I", block, 4)
    (shift,) = struct.unpack_from("<I", block, 24)
    (state,) = struct.unpack_from("<H", block, 58)
    incompatible, read_only = struct.unpack_from("<II", block, 96)
    (orphan,) = struct.unpack_from("<I", block, 232)
    (high,) = struct.unpack_from("<I", block, 0x150)
    (checksum,) = struct.unpack_from("<I", block, 0x3FC)
    if incompatible & 0x8:  # the journal of another file system
        return Content(Kind.UNKNOWN, start)
    if read_only & 0x400 and checksum != _crc32c(block[:0x3FC]) ^ 0xFFFFFFFF:
        raise damaged(Kind.EXT, start, "checksum of the superblock")
    blocks = low | (high << 32 if incompatible & 0x80 else 0)
    if shift > 6 or blocks == 0:
        raise damaged(Kind.EXT, start, "number or size of its blocks")
    unclean = bool(incompatible & 0x4 or orphan or not state & 1)
    name = str(uuid.UUID(bytes=block[104:120]))
    return Content(Kind.EXT, start, blocks << (10 + shift), name, unclean)


def _parse_xfs(head: bytes, start: int) -> Content:
    block_bytes, blocks = struct.unpack_from(">IQ", head, 4)
    version, sector_bytes = struct.unpack_from(">HH", head, 100)
    if (
        not _is_power(block_bytes, 512, 65536)
        or not _is_power(sector_bytes, 512, 32768)
        or not blocks
    ):
        raise damaged(Kind.XFS, start, "number or size of its blocks")
    if version & 0xF == 5:
        sector = bytearray(head[:sector_bytes])
        (checksum,) = struct.unpack_from("<I", sector, 224)
        sector[224:228] = bytes(4)
        if checksum != _crc32c(bytes(sector)):
            raise damaged(Kind.XFS, start, "checksum of the superblock")
        (realtime,) = struct.unpack_from(">Q", head, 288)
        if realtime:  # of zoned ones: files lie behind what its blocks count
            return Content(Kind.UNKNOWN, start)
    name = str(uuid.UUID(bytes=head[32:48]))
    # Whether its log is empty the superblock does not say: xfs_repair does.
    return Content(Kind.XFS, start, block_bytes * blocks, name)


def _parse_btrfs(head: bytes, start: int) -> Content:
    block = head[65536:69632]
    (place,) = struct.unpack_from("<Q", block, 0x30)
    (devices,) = struct.unpack_from("<Q", block, 0x88)
    (checksum_type,) = struct.unpack_from("<H", block, 0xC4)
    (size,) = struct.unpack_from("<Q", block, 0xD1)
    if checksum_type == 0 and block[:4] != struct.pack("<I", _crc32c(block[0x20:])):
        raise damaged(Kind.BTRFS, start, "checksum of the superblock")
    if place != 65536 or size == 0:
        raise damaged(Kind.BTRFS, start, "place or size in the superblock")
    if devices != 1:  # the others are elsewhere
        return Content(Kind.UNKNOWN, start)
    return Content(Kind.BTRFS, start, size, str(uuid.UUID(bytes=block[0x20:0x30])))


_PARSERS: dict[Kind, Callable[[bytes, int], Content]] = {
    Kind.EXT: _parse_ext,
    Kind.XFS: _parse_xfs,
    Kind.BTRFS: _parse_btrfs,
}


def _is_power(value: int, least: int, most: int) -> bool:
    return least <= value <= most and value & (value - 1) == 0


def _make_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # noqa: PLW2901 - the register
        table.append(byte)
    return tuple(table)


_TABLE = _make_table()


def _crc32c(data: bytes) -> int:
    """Castagnoli's CRC, as all three use it (RFC 3720, B.4)."""
    register = 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ _TABLE[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF
