"""How far what is on a disk reaches, which is how small a target may be.

Owns what counts as a proof of that. Never guesses: what is not known to end is in the way. Pure:
reads through what it is given.

A partition's end is the end of whatever is in it, as a kernel lets nobody past it. Logical
partitions are not followed, and so are in the way. A file system without a partition ends where
its superblock says, if nothing in its journal says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.errors import FailedPrecondition
from agent.layout.partitions import Scheme, Table, find_table
from agent.layout.superblock import NAMES, SIZED, Content, Kind, Read, find_content, find_kinds
from agent.layout.xfs_log import is_log_clean


@dataclass(frozen=True, slots=True)
class Reach:
    """Where the last thing on a disk ends, and which it is; None where nobody can prove that."""

    what: str
    end_bytes: int | None
    scheme: Scheme = Scheme.NONE


def find_reach(read: Read, disk_bytes: int, sector_bytes: int, *, settled: bool) -> Reach:
    """Return how far what is on a disk reaches.

    `settled`: nothing writes to it any more, so a journal that is not empty is in the way as well.
    """
    try:
        return _find(read, disk_bytes, sector_bytes, settled=settled)
    except FailedPrecondition as error:  # of a table, or a superblock
        return Reach(f"something damaged: {error.values['what']}", None)


def _find(read: Read, disk_bytes: int, sector_bytes: int, *, settled: bool) -> Reach:
    table = find_table(read, disk_bytes, sector_bytes)
    claims = [NAMES[kind] for kind in find_kinds(read, 0, disk_bytes)]
    if table.scheme is not Scheme.NONE:
        claims.insert(0, "a partition table")
    if _has_foreign_label(read(0, min(4096, disk_bytes))):
        claims.insert(0, "a disk label of another system")
    if len(claims) > 1:  # one of them is what was there before, but which?
        return Reach(f"{' and '.join(claims)} that both claim the disk", None)
    if table.scheme is not Scheme.NONE:
        return _reach_of_table(read, table)
    return _reach_of(read, find_content(read, 0, disk_bytes), settled=settled)


def _has_foreign_label(head: bytes) -> bool:
    """Return whether there is a Sun, SGI or BSD label, which a file system leaves room for."""
    sun, sgi = head[508:510] == b"\xda\xbe", head[:4] == b"\x0b\xe5\xa9\x41"
    return sun or sgi or any(head[at : at + 4] == b"\x57\x45\x56\x82" for at in (0, 64, 512))


def _reach_of(read: Read, content: Content, *, settled: bool) -> Reach:
    name = NAMES[content.kind]
    if content.kind not in SIZED:
        return Reach(f"{name}, whose end nobody can prove", None)
    if settled and _has_journal_left(read, content):
        return Reach(
            f"{name} that was not unmounted, so its journal may make it larger (shut the VM down "
            "from within)",
            None,
        )
    return Reach(name, content.end_bytes)


def _has_journal_left(read: Read, content: Content) -> bool:
    # A resize of btrfs is complete with the superblock that tells of it; its log holds files only.
    if content.kind is Kind.XFS:
        return not is_log_clean(read, content.start_bytes)
    return content.needs_replay


def _reach_of_table(read: Read, table: Table) -> Reach:
    if table.has_more:
        return Reach("an MBR with logical partitions or entries without a type", None)
    last = table.last
    if last is None:
        return Reach("a partition table without partitions", None)
    found = [find_kinds(read, one.start_bytes, one.end_bytes) for one in table.partitions]
    for one in table.partitions:
        find_content(read, one.start_bytes, one.end_bytes)  # a file system that claims more raises
    if table.scheme is Scheme.MBR and not any(found):
        # Its numbers count sectors, and only what begins at one of them shows of which size.
        return Reach("an MBR with nothing known in it, whose end nobody can prove", None)
    what = f"partition {last.number}"
    if table.scheme is Scheme.GPT:
        what += " and the GPT's copy behind it"
    return Reach(what, table.least_bytes, table.scheme)
