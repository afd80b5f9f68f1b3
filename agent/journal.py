"""What the agent must know after its own death, in SQLite: a record a migration and end, totals.

Owns the database in the state directory. A record that was saved is on the disk when `save`
returns; only then may anybody be told. What the records mean is for `agent.record` to say.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent.errors import (
    NotAllowed,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
    agent_stopped,
)
from agent.migration import Role

_log = logging.getLogger(__name__)

VERSION = 1
NAME = "journal.db"
_WAL_PAGES = 64

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS migration ("
    "role TEXT NOT NULL, id TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (role, id)) STRICT",
    "CREATE TABLE IF NOT EXISTS total (name TEXT PRIMARY KEY, value REAL NOT NULL) STRICT",
)


_TOUCH = f"PRAGMA user_version = {VERSION}"
"""A commit that changes nothing, and is written: one of a record as it is would not be."""

NOT_KEPT = (ResourceExhausted, Unavailable)
"""What `Journal.save` raises: its disk is full or fails, or the agent stops. It may not be told.

Unavailable STATE_NOT_KEPT leaves it in doubt: the agent's next start may find it all the same.
"""

_BEFORE_COMMIT = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_READONLY,
    }
)
"""What SQLite says before the whole of a commit is in its log. What comes later, as from the log's
fsync, is taken back in its memory only: a process that is killed then has committed (tried, 3.40).
"""


class Journal:
    """Records by role and id. Thread-safe; `directory` None keeps nothing."""

    def __init__(self, directory: Path | None) -> None:
        self._closed = False
        self._is_doubtful = False
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None
        if directory is not None:
            path = directory / NAME
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._database = _open(path)
            except (OSError, sqlite3.OperationalError) as error:
                message = f"the journal {path} cannot be opened ({error}); see --state-dir"
                raise NotAllowed("STATE_DIR_UNUSABLE", message, path=path) from error
            except sqlite3.DatabaseError as error:
                self._database = _open_anew(path, error)

    def save(
        self,
        role: Role,
        name: str,
        record: dict[str, Any],
        counted: Mapping[str, float] | None = None,
    ) -> None:
        """Make a record durable in place of the one before. ResourceExhausted STATE_NOT_KEPT (that
        one stays) or Unavailable STATE_NOT_KEPT (it may not), and `side` of whose agent it is.

        `counted` is added to the totals at one with it: what the record says is counted once.
        """
        with self._writing(role) as database:
            database.execute(
                "INSERT INTO migration VALUES (?, ?, ?) "
                "ON CONFLICT (role, id) DO UPDATE SET record = excluded.record",
                (role, name, json.dumps(record)),
            )
            for total, value in (counted or {}).items():
                database.execute(
                    "INSERT INTO total VALUES (?, ?) "
                    "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                    (total, value),
                )

    def totals(self) -> dict[str, float]:
        """Return all that was counted so far."""
        if self._database is None:
            return {}
        with self._lock:
            return dict(self._database.execute("SELECT name, value FROM total").fetchall())

    def remove(self, role: Role, name: str) -> None:
        """Forget a record, if there is one."""
        with self._writing(role) as database:
            database.execute("DELETE FROM migration WHERE role = ? AND id = ?", (role, name))

    def load(self) -> list[tuple[Role, str, dict[str, Any]]]:
        """Return all records as they were saved last."""
        if self._database is None:
            return []
        with self._lock:
            return _read(self._database)

    def close(self) -> None:
        """Close the database. Safe to call twice."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database, self._closed = None, True

    @contextmanager
    def _writing(self, role: Role) -> Iterator[sqlite3.Connection]:
        if self._database is None and not self._closed:
            yield _Nowhere  # type: ignore[misc]
            return
        with self._lock:
            if self._database is None:  # what is told now must not be forgotten with the agent
                raise agent_stopped()
            try:
                self._take_back(self._database)
                with self._database:
                    yield self._database
            except sqlite3.Error as error:
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_READONLY)  # no code: ours
                self._is_doubtful |= code not in _BEFORE_COMMIT
                with suppress(sqlite3.Error):
                    self._take_back(self._database)
                raise self._not_kept(error, role) from error

    def _take_back(self, database: sqlite3.Connection) -> None:
        """Write over a commit that was not kept, so that the next start does not find it."""
        if self._is_doubtful:
            database.execute(_TOUCH)
            self._is_doubtful = False

    def _not_kept(self, error: sqlite3.Error, role: Role) -> WarmsyncError:
        message = f"the journal in the state directory cannot be written ({error})"
        mend = "free space there and see whether its disk is well"
        if not self._is_doubtful:
            return ResourceExhausted("STATE_NOT_KEPT", f"{message}; {mend}", side=role)
        return Unavailable(
            "STATE_NOT_KEPT",
            f"{message}, and the agent's next start may find there what was to be written; {mend}",
            side=role,
        )


class _Nowhere:
    """Where nothing is kept."""

    @staticmethod
    def execute(statement: str, values: tuple[object, ...]) -> None:
        """Keep nothing."""


def _read(database: sqlite3.Connection) -> list[tuple[Role, str, dict[str, Any]]]:
    """Return all records. ValueError, TypeError or RecursionError for one that is none."""
    rows = database.execute("SELECT role, id, record FROM migration ORDER BY id")
    found = [(Role(role), str(name), json.loads(record)) for role, name, record in rows]
    if not all(isinstance(values, dict) for _, _, values in found):
        raise ValueError("a record is no object")
    return found


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, check_same_thread=False)
    database.text_factory = bytes.decode  # a ValueError where the default is an OperationalError
    try:
        database.execute("PRAGMA journal_mode = WAL")
        # The default lets the log grow to 4 MiB; a state directory may be as small as that.
        database.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
        database.execute("PRAGMA synchronous = FULL")  # a commit survives the loss of power
        (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(str(found))
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"it is of version {version}, this agent's is {VERSION}")
        for table in _SCHEMA:
            database.execute(table)
        database.execute(_TOUCH)
        # Read now: what is damaged shall be known before anything is built on it.
        _read(database)
    except (ValueError, TypeError, RecursionError) as error:  # of `_read`
        database.close()
        raise sqlite3.DatabaseError(str(error)) from error
    except BaseException:
        database.close()
        raise
    return database


def _open_anew(path: Path, error: Exception) -> sqlite3.Connection:
    """Put a damaged journal aside and begin another: the agent must serve all the same."""
    aside = path.with_name(f"{NAME}.damaged-{time.time_ns()}")
    path.rename(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(NAME + suffix).unlink(missing_ok=True)
    _log.error(
        'journal damaged, begun anew; its migrations are not known any more kept=%s reason="%s"',
        aside,
        error,
    )
    return _open(path)
