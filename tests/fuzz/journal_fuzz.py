"""The readers of the journal: records of any form, in a database that is whole or is damaged.

The first byte of an input says what the rest is: 0 and 1 a source's and a target's record, 2 and 3
the same as text in a journal, 4 what the file of a journal is overwritten with.
"""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from agent.errors import WarmsyncError
from agent.journal import NAME, Journal
from agent.migration import Plan, Progress, Role, Scheme, Volume
from agent.record import SourceRecord, TargetRecord, dump, load_source, load_target
from agent.state import Entry, Machine, State

HEAD_BYTES = 1
READERS = (load_source, load_target)
ROLES = (Role.SOURCE, Role.TARGET)
SAVED = 4
_PATCH = struct.Struct("<HB")


def records() -> list[dict[str, object]]:
    """Return a source's and a target's record, as values."""
    plan = Plan("web1", "peer:1", (Volume("/dev/a", "/dev/b", 1 << 20, 4096),))
    history = (Entry(State.PENDING, 1.0), Entry(State.SEEDING, 2.0))
    error = WarmsyncError("INTERNAL", "gone", path="/dev/a")
    source = SourceRecord(
        plan=plan,
        scheme=Scheme.EBPF,
        scheme_reason="",
        secret="secret",
        epoch=3,
        boot_id="boot",
        devices=((7, 0, 9),),
        history=history,
        generation=2,
        progress=Progress(),
        error=error,
        off_at_seconds=3.0,
    )
    target = TargetRecord(plan, "secret", 3, history, 2, Progress(), error)
    return [dump(source), dump(target)]


def survive(data: bytes) -> bool:
    """Read an input as its first byte says; return whether it was taken for whole."""
    if not data:
        return False
    how, rest = data[0] % 5, data[1:]
    if how < 2:
        return read_record(rest, how)
    return open_text(rest, how - 2) if how < 4 else open_damaged(rest)


def read_record(data: bytes, which: int) -> bool:
    """A record is read, or a ValueError, and never another exception."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return False
    return isinstance(values, dict) and _understood(values, which)


def _understood(values: dict[str, object], which: int) -> bool:
    try:
        record = cast(Callable[..., SourceRecord | TargetRecord], READERS[which])(values)
    except ValueError:
        return False
    assert dump(record)["generation"] == record.generation
    assert Machine.restore(record.history).history == record.history
    return True


def open_text(data: bytes, which: int) -> bool:
    """A journal opens whatever the text of a record in it, and holds objects only."""
    directory = _sound()
    with sqlite3.connect(directory / NAME) as database:
        database.execute("UPDATE migration SET record = CAST(? AS TEXT)", (data,))
    database.close()
    found = _open(directory)
    return bool(found) and _understood(found[0], which)


def open_damaged(data: bytes) -> bool:
    """A journal with damage opens, is put aside, or is an error; never are records just gone."""
    directory = _sound()
    path = directory / NAME
    path.write_bytes(patched(path.read_bytes(), data))
    return len(_open(directory)) == SAVED


def patched(whole: bytes, patches: bytes) -> bytes:
    """Return bytes overwritten by patches: where (two bytes), length (one), what."""
    spoilt = bytearray(whole)
    while len(patches) > _PATCH.size:
        at, length = _PATCH.unpack_from(patches)
        at %= len(whole)
        piece = patches[_PATCH.size : _PATCH.size + length]
        spoilt[at : at + len(piece)] = piece
        patches = patches[_PATCH.size + length :]
    return bytes(spoilt)


def _open(directory: Path) -> list[dict[str, object]]:
    """Return the records of a journal; none if it was refused or put aside, which is said."""
    try:
        journal = Journal(directory)
    except WarmsyncError:
        return []
    try:
        found = [values for _, _, values in journal.load()]
        assert all(isinstance(values, dict) for values in found)
        aside = list(directory.glob(f"{NAME}.damaged-*"))
        assert len(found) == (0 if aside else SAVED), "records are gone, and nobody said so"
        journal.save(Role.TARGET, "new", {"a": 1})
    finally:
        journal.close()
    return found


def _sound() -> Path:
    """Return a directory with a journal that is whole. TMPDIR best names memory: it is synced."""
    directory = Path(_directory().name)
    for path in directory.iterdir():
        path.unlink()
    (directory / NAME).write_bytes(_whole())
    return directory


@cache
def _directory() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="warmsync-fuzz-")


@cache
def _whole() -> bytes:
    with TemporaryDirectory() as name:
        journal = Journal(Path(name))
        for number, values in enumerate(records() * (SAVED // 2)):
            journal.save(ROLES[number % 2], f"m{number}", values)
        journal.close()
        return (Path(name) / NAME).read_bytes()
