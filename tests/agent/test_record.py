"""What is written down of a migration: read again, or refused as a whole."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from agent.journal import NAME, Journal
from agent.record import SourceRecord, dump
from tests.fuzz.journal_fuzz import READERS, open_text, records

BEGUN = {"state": "PENDING", "at_seconds": 1.0}


@pytest.mark.parametrize("which", [0, 1], ids=["source", "target"])
def test_what_is_written_down_is_read_again(which: int) -> None:
    read = json.loads(json.dumps(records()[which]))
    again = dump(cast(Callable[..., SourceRecord], READERS[which])(read))
    assert json.loads(json.dumps(again)) == read


@pytest.mark.parametrize("which", [0, 1], ids=["source", "target"])
@pytest.mark.parametrize(
    "spoilt",
    [
        {"devices": [[7, 0, float("inf")]]},
        {"history": [{**BEGUN, "at_seconds": 10**400}]},
        {"history": []},
        {"history": [BEGUN, {**BEGUN, "state": "COMPLETED"}]},
        {"history": None},
        {"plan": []},
        {"error": {}},
    ],
    ids=["infinite", "huge", "no history", "no such move", "null", "list", "empty error"],
)
def test_a_spoilt_record_is_a_value_error(which: int, spoilt: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - it has no other form
        cast(Callable[..., SourceRecord], READERS[which])({**records()[which], **spoilt})


@pytest.mark.parametrize("text", [b"[" * 5000, b"1" * 5000, b"[]", b"5", b"\xff", b"", b"{"])
def test_a_journal_with_a_text_that_is_no_record_is_put_aside(text: bytes) -> None:
    assert not open_text(text, 0)


def test_a_journal_with_a_number_for_a_record_is_put_aside(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / NAME) as database:
        database.execute("CREATE TABLE migration (role, id, record)")
        database.execute("INSERT INTO migration VALUES ('source', 'web1', 5)")
    database.close()
    journal = Journal(tmp_path)
    assert journal.load() == []
    assert list(tmp_path.glob(f"{NAME}.damaged-*"))
    journal.close()
