"""The layout of a disk: its partition table, and the file system that could grow at its end.

Owns what may be grown. Pure: reads through what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.errors import FailedPrecondition
from agent.layout.partitions import Scheme, Table, find_table
from agent.layout.superblock import NAMES, SIZED, Content, Kind, Read, find_content


@dataclass(frozen=True, slots=True)
class Layout:
    """What is on a disk; `content` is the disk's own, or that of its last partition."""

    table: Table
    content: Content

    def check_growable(self) -> None:
        """Raise FailedPrecondition GROW_UNSUPPORTED unless `content` can be grown."""
        if self.table.has_more:  # behind what is taken for the last, perhaps
            raise _unsupported("its MBR has logical partitions or entries without a type")
        if self.content.kind not in SIZED:
            last = self.table.last
            where = f"partition {last.number}" if last else "it"
            raise _unsupported(f"{where} holds {NAMES[self.content.kind]}")


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
