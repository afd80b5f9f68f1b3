"""The note of one volume: which disk it is, in which QEMU, and who uses it there.

Owns the file. The agent after this one reads it: only it tells where to ask first, what format an
image has whose QEMU has ended, and who had the disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from agent.errors import ResourceExhausted
from agent.qemu.node import Node


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of a disk; see `agent.qemu.node.Node` and `agent.qemu.users`.

    `plate`: what its image is on every boot, whatever its path is then; see `agent.nameplate`.
    """

    socket: str
    name: str
    driver: str
    path: str
    users: tuple[str, ...] = ()
    is_plain: bool = True
    plate: str = ""

    def node(self) -> Node:
        """Return the disk as far as it is known without its QEMU."""
        return Node(
            self.socket,
            self.name,
            self.driver,
            self.path,
            0,
            read_only=False,
            is_plain=self.is_plain,
        )


def note_of(node: Node, users: tuple[str, ...], plate: str) -> Note:
    """Return what is to be noted of a disk."""
    return Note(node.socket, node.name, node.driver, node.path, users, node.is_plain, plate)


def write_note(path: Path, note: Note) -> None:
    """Put it in place of the one before. ResourceExhausted STATE_NOT_KEPT; that one stays then."""
    told = {name: getattr(note, name) for name in Note.__slots__}
    new = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new.write_text(json.dumps(told))
        new.replace(path)
    except OSError as error:
        raise _not_kept(path, "written", error) from error


def remove_note(path: Path) -> None:
    """Remove it, if it is there. ResourceExhausted STATE_NOT_KEPT."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise _not_kept(path, "removed", error) from error


def read_note(path: Path) -> Note | None:
    """Return what was noted; None if nothing was, or it cannot be read."""
    try:
        told = json.loads(path.read_text())
        return Note(
            told["socket"],
            told["name"],
            told["driver"],
            told["path"],
            tuple(told.get("users", ())),
            told.get("is_plain", True),
            told.get("plate", ""),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _not_kept(path: Path, done: str, error: OSError) -> ResourceExhausted:
    return ResourceExhausted(
        "STATE_NOT_KEPT",
        f"the note of a disk in the state directory cannot be {done} ({error.strerror}); free "
        "space there and see whether its disk is well",
        side="source",
        path=path,
    )
