"""What a migration puts up with: which errors it waits out, for how long, and which end it.

Owns the decision after each error on the way. Reaches nobody: the next try is `agent.source.link`.
"""

from __future__ import annotations

import asyncio
import logging
import time

from agent.errors import Unavailable, WarmsyncError, is_from_transport
from agent.journal import NOT_KEPT
from agent.sender import Sender
from agent.source.books import Books
from agent.source.cutover import unknown_owner
from agent.source.handover import Handover
from agent.state import Event, State
from agent.unread import SOURCE_TRIES

_log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.2
MAX_RETRY_SECONDS = 10.0
RETRY_FOR_SECONDS = 3600.0
"""How long a lost target is tried again without a round that became durable, or a connection that
held for WELL_SECONDS."""

WELL_SECONDS = 600.0
"""A connection that held for so long ends what was lost before: longer than any carrier waits for
an answer, so that one on which nothing gets through is none of these."""

_PASSING = frozenset(
    {
        "BAD_CUTOVER_CERTIFICATE",
        "BAD_FRAME",
        "FRAMES_MISSING",
        "MIGRATION_EXISTS",  # the session that was not found: its secret came damaged
        "NOT_PROVEN",  # the target's agent was started anew after the proof
        "NOT_RELEASABLE",  # or has lost what was proved: it says so once asked
        "PROTOCOL_ERROR",
        "SESSION_NOT_FOUND",
        "SESSION_NOT_OPEN",
        "SIGNATURE_INVALID",
        "WRONG_GENERATION",
    }
)
"""What another connection may mend, beside what is Unavailable or the transport's: damage."""
_MENDABLE = frozenset(
    {
        "DISK_FULL",
        "GROW_NOT_UNDONE",
        "STATE_NOT_KEPT",
        "TABLE_NOT_MOVED",
        "TARGET_IO_ERROR",
        "TARGET_NOT_CLAIMED",
    }
)
"""What a person has to mend at the target: the migration pauses."""


class Patience:
    """One migration's."""

    def __init__(self, books: Books, sender: Sender, handover: Handover, address: str) -> None:
        self._books = books
        self._sender = sender
        self._handover = handover
        self._address = address
        self._lost_at: float | None = None
        self._lost_generation = 0
        self._source_errors = 0
        self._connected_at: float | None = None

    def note_connected(self) -> None:
        """The target was reached, and both have agreed."""
        self._connected_at = time.monotonic()

    async def withstand(self, error: WarmsyncError) -> None:
        """Return when to go on in spite of an error, if that can be; else raise it."""
        await self._sender.close()
        try:
            await self._settle_attempt(error)
            if self._is_for_a_person(error):
                await self._await_mend(error)
                return
        except NOT_KEPT as full:  # what cannot be written down is not entered
            _log.error(
                'not settled id=%s reason=%s message="%s"', self._books.id, error.reason, error
            )
            error = full
        now = time.monotonic()
        if self._lost_generation != self._sender.generation:  # it has come further since
            self._lost_at, self._lost_generation = None, self._sender.generation
            self._source_errors = 0
        # Or was well for a while without a round: a comparison, a pause, a guest that is idle.
        elif self._connected_at is not None and now - self._connected_at > WELL_SECONDS:
            self._lost_at = None
        self._connected_at = None
        self._lost_at = self._lost_at or now
        passing = self._is_passing(error)
        is_unsettled = self._books.state is State.CUTTING_OVER
        owner_unknown = is_unsettled and error.reason == "OWNER_UNKNOWN"
        lasting = now - self._lost_at > RETRY_FOR_SECONDS
        if self._books.is_releasing or error.reason == "STATE_NOT_KEPT":
            lasting = False  # only the target knows who owns; or only a person can make room
        if lasting or not (passing or owner_unknown):
            raise error
        await self._back_off(error, now - self._lost_at)

    async def _settle_attempt(self, error: WarmsyncError) -> None:
        """An attempt at a cutover ends with the error: the source owns, or nobody knows."""
        if self._books.state is not State.CUTTING_OVER:
            return
        if self._books.is_releasing:
            self._books.refusal = unknown_owner(self._address)
        else:
            await self._handover.stay_owner()
        self._books.answer(error)  # not before: whoever hears it boots the VM again

    def _is_for_a_person(self, error: WarmsyncError) -> bool:
        """Return whether to pause. Not while nobody knows who owns: then the target is asked on."""
        at_target = error.values.get("side", "target") == "target"
        return error.reason in _MENDABLE and at_target and not self._books.is_releasing

    def _is_passing(self, error: WarmsyncError) -> bool:
        if error.reason == "SOURCE_IO_ERROR" and "tries" not in error.values:
            self._source_errors += 1  # all its blocks are still pending
            if self._source_errors < SOURCE_TRIES:
                return True
            error.values["tries"] = str(self._source_errors)
            return False
        if error.reason == "STATE_NOT_KEPT":  # here: nothing goes on until there is room
            return True
        if error.reason in _MENDABLE:
            return self._books.is_releasing
        passing = isinstance(error, Unavailable) or error.reason in _PASSING
        return passing or is_from_transport(error)

    async def _await_mend(self, error: WarmsyncError) -> None:
        """Pause and say why: once resumed, the migration connects again."""
        books = self._books
        if books.state is State.PENDING:  # the comparison with an older copy comes first
            books.move(Event.SEED)
        if books.state is not State.PAUSED:
            books.move(Event.PAUSE)
            self._sender.pause()
        books.refusal, self._lost_at = error, None
        _log.error('paused id=%s reason=%s message="%s"', books.id, error.reason, error)
        await self._sender.wait_until_running()

    async def _back_off(self, error: WarmsyncError, lost_seconds: float) -> None:
        wait = min(max(lost_seconds, FIRST_RETRY_SECONDS), MAX_RETRY_SECONDS)
        _log.warning(
            'tried again in %.1f s id=%s reason=%s message="%s"',
            wait,
            self._books.id,
            error.reason,
            error,
        )
        self._sender.note(trouble=f"{error}; tried again every {wait:.1f} s")
        await asyncio.sleep(wait)
