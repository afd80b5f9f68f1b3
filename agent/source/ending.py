"""The end of one migration at its source: failed, cancelled, rolled back, finished, or suspended.

Owns what is given back, and in which order: the target is let go before the source is as it was
found, and each even if another fails. Decides neither whether it ends nor who owns the disks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent.disk import SourceDisk
from agent.errors import Cancelled, FailedPrecondition, WarmsyncError
from agent.journal import NOT_KEPT
from agent.migration import Owner
from agent.peer import Peer
from agent.sender import Sender
from agent.source.autopilot import Autopilot
from agent.source.books import Books
from agent.source.comparisons import Comparisons
from agent.source.cutover import unknown_owner
from agent.source.guest import Guest
from agent.source.handover import Handover
from agent.source.proof import SourceProof
from agent.state import Event

_log = logging.getLogger(__name__)

_ABORT_SECONDS = 10.0


class Ending:
    """One migration's. Nothing of it may run any more when it fails, is cancelled or suspended."""

    def __init__(
        self,
        books: Books,
        sender: Sender,
        *,
        proof: SourceProof,
        guest: Guest,
        autopilot: Autopilot,
        handover: Handover,
        comparisons: Comparisons,
        peer: Peer,
    ) -> None:
        self._books = books
        self._sender = sender
        self._proof = proof
        self._guest = guest
        self._autopilot = autopilot
        self._commands = handover.commands
        self._comparisons = comparisons
        self._peer = peer
        self.over = asyncio.Event()
        """Set once an end holds nothing any more, or has failed to give it back."""
        self._giving_back = asyncio.Lock()
        self._stopped: WarmsyncError | None = None

    async def fail(self, error: WarmsyncError) -> None:
        """End it with an error; with OWNER_UNKNOWN once the target may own. May be repeated."""
        books = self._books
        if books.state.is_terminal:
            return
        if books.is_releasing:
            error = unknown_owner(self._peer.address)
        books.error = error
        _log.error('migration failed id=%s reason=%s message="%s"', books.id, error.reason, error)
        books.concede(Event.FAIL)
        await self._give_up(f"{error.reason}: {error}", cancelled=False)
        books.answer(error)

    async def cancel(self) -> None:
        """Give up what was cancelled."""
        await self._give_up("cancelled by the controller", cancelled=True)

    async def roll_back(self) -> None:
        """Take the target back, then lift the fence: the source is the owner again."""
        async with self._commands:
            self._books.require(Event.ROLL_BACK)
            self._autopilot.check_landed()
            await self._peer.reclaim(self._books.token)
            async with self._staying():
                await self._unfence()
                self._books.move(Event.ROLL_BACK)
                await self._close()

    async def finish(self) -> None:
        """The VM runs on the target: nothing can be rolled back. The source stays fenced."""
        async with self._commands:
            self._books.require(Event.FINISH)
            self._autopilot.check_landed()
            await self._peer.finish(self._books.token)
            async with self._staying():
                self._books.move(Event.FINISH)
                await self._close()

    async def settle(self, owner: Owner) -> None:
        """Give back what a person has settled. FailedPrecondition STILL_FENCED; may be repeated."""
        books, failed = self._books, None
        books.error = None
        await self._autopilot.end()  # before a VM may be booted here
        if owner is Owner.SOURCE:
            try:
                await self._unfence()
            except OSError as error:
                books.error = failed = still_fenced(books.id, error)
                books.is_stuck = True
        await self._close()
        if failed is not None:
            raise failed
        try:
            books.write_down()
        except NOT_KEPT as full:  # the next start finds the fence to be lifted once more
            _log.error('not written down id=%s reason="%s"', books.id, full)

    async def suspend(self, error: WarmsyncError) -> None:
        """The agent stops: tracking goes on. `error` is for who waits for a cutover."""
        async with self._giving_back:
            if self.over.is_set():
                return
            self._stopped = error
            await self._guest.release()
            self._books.answer(error)
            self._write_down()
            await self._comparisons.end(error)
            await self._sender.close()
            await self._proof.stop()
            await self._sender.on_disks(SourceDisk.detach)
            await self._peer.close()
            self._sender.bell.ring()

    @asynccontextmanager
    async def _staying(self) -> AsyncIterator[None]:
        """What is done here is done before the agent stops, or not at all: then it can be asked
        of the next one.
        """
        async with self._giving_back:
            if self._stopped is not None:
                raise self._stopped
            yield

    async def _give_up(self, reason: str, *, cancelled: bool) -> None:
        """Release the target and leave the source as it was found; each even if another fails."""
        books = self._books
        try:
            await self._guest.release()
            if not books.is_releasing:
                is_down = False
                try:
                    await self._unfence()
                    is_down = True
                except OSError as error:
                    books.refusal, books.is_stuck = still_fenced(books.id, error), True
                    _log.error('source still fenced id=%s reason="%s"', books.id, error)
                self._sender.bell.ring()  # what has ended so is told from now on
                is_told = await tell_target(
                    self._peer, books.id, books.token, reason, cancelled=cancelled
                )
                books.given_back = is_down and is_told
                self._write_down()  # else the agent's next start does both once more
            if cancelled:
                said = f"migration {books.id} was cancelled"
                books.answer(Cancelled("CANCELLED", said, id=books.id))
        finally:
            await self._close()

    async def _unfence(self) -> None:
        await self._sender.on_disks(SourceDisk.unfence)
        if self._books.cutover is not None:
            self._books.cutover.fencing = self._books.cutover.releasing = False

    def _write_down(self) -> None:
        try:
            self._books.write_down()
        except NOT_KEPT as full:
            _log.error('not written down id=%s reason="%s"', self._books.id, full)

    async def _close(self) -> None:
        try:
            await self._autopilot.end()
            await self._guest.release()
            await self._comparisons.end(
                Cancelled(
                    "VERIFY_INTERRUPTED",
                    f"the comparison met the end of migration {self._books.id}, which is "
                    f"{self._books.state}; compare before it ends",
                    id=self._books.id,
                )
            )
            await self._sender.close()
            await self._proof.stop()
            await self._sender.on_disks(SourceDisk.close)
            await self._peer.close()
        finally:
            self.over.set()
            self._sender.bell.ring()


def still_fenced(name: str, error: Exception) -> FailedPrecondition:
    """Return the error of a source that owns, and cannot be made writable."""
    return FailedPrecondition(
        "STILL_FENCED",
        f"the source of migration {name} owns, but cannot be made writable: {error}; mend that and "
        "settle it once more, or lift the fence by hand (blockdev --setrw; for a file chmod u+w)",
        id=name,
    )


async def tell_target(peer: Peer, name: str, token: str, reason: str, *, cancelled: bool) -> bool:
    """Let the target go. Returns whether it knows of the end, or knows nothing of the migration."""
    try:
        async with asyncio.timeout(_ABORT_SECONDS):
            await peer.abort(token, reason, cancelled=cancelled)
    except (WarmsyncError, TimeoutError) as error:
        _log.warning('target not told of the end id=%s reason="%s"', name, error)
        return isinstance(error, WarmsyncError) and error.reason == "SESSION_NOT_FOUND"
    return True
