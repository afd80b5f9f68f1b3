"""The layout of a disk: its partition table, and the file system that could grow at its end.

Owns what may be grown, and how small a target may be. Pure: reads through what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.errors import FailedPrecondition
from agent.partitions import Scheme, Table, find_table
from agent.superblock import SIZED, Content, Kind, Read, find_content


@dataclass(frozen=True, slots=True)
class Layout:
    """What is on a disk; `content` is the disk's own, or that of its last partition."""

    table: Table
    content: Content

    @property
    def least_bytes(self) -> int | None:
        """Return what a target must have at least to hold it; None where nobody can prove that.

        A GPT on a smaller disk needs its copy moved (`Table.patches`), or it is damaged there.
        """
        if self.table.scheme is not Scheme.NONE:
            return self.table.least_bytes
        return self.content.size_bytes if self.content.kind in SIZED else None

    def check_growable(self) -> None:
        """Raise FailedPrecondition GROW_UNSUPPORTED unless `content` can be grown."""
        last = self.table.last
        if last is not None and last.is_extended:
            raise _unsupported("its last partition is an extended one")
        if self.content.kind not in SIZED:
            where = f"partition {last.number}" if last else "it"
            raise _unsupported(f"{where} holds {_NAMES[self.content.kind]}")

    def check_fits(self, target: str, target_bytes: int) -> None:
        """Raise FailedPrecondition TARGET_TOO_SMALL unless all provably ends before that size."""
        least = self.least_bytes
        if least is not None and least <= target_bytes:
            return
        if least is None:
            why = f"the source holds {_NAMES[self.content.kind]}, whose end nobody can prove"
        else:
            why = f"what is on the source ends at {least}"
        raise FailedPrecondition(
            "TARGET_TOO_SMALL",
            f"target {target} has {target_bytes} bytes, and {why}; name one as large as the source",
            target=target,
            size_bytes=target_bytes,
            needed_bytes=least or 0,
        )


_NAMES = {
    Kind.EXT: "ext4",
    Kind.XFS: "XFS",
    Kind.BTRFS: "btrfs",
    Kind.SWAP: "swap",
    Kind.LVM: "an LVM volume",
    Kind.LUKS: "an encrypted volume",
    Kind.RAID: "a member of a RAID",
    Kind.UNKNOWN: "nothing that is known",
}


def find_layout(read: Read, disk_bytes: int, sector_bytes: int) -> Layout:
    """Return what is on a disk. FailedPrecondition TABLE_DAMAGED or FILE_SYSTEM_DAMAGED."""
    table = find_table(read, disk_bytes, sector_bytes)
    last = table.last
    if table.scheme is Scheme.NONE:
        return Layout(table, find_content(read, 0, disk_bytes))
    if last is None or last.is_extended:
        return Layout(table, Content(Kind.UNKNOWN, 0))
    if table.scheme is Scheme.MBR and find_content(read, 0, disk_bytes).kind is not Kind.UNKNOWN:
        # A table and a file system that both claim the disk: one of them is what was there before.
        return Layout(Table(Scheme.NONE, sector_bytes, (), b""), Content(Kind.UNKNOWN, 0))
    return Layout(table, find_content(read, last.start_bytes, last.end_bytes))


def _unsupported(why: str) -> FailedPrecondition:
    return FailedPrecondition(
        "GROW_UNSUPPORTED",
        f"the disk was not grown: {why}; grow it in the guest",
        why=why,
    )
