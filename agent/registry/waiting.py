"""A migration that an earlier agent wrote down and that this one has yet to take up.

Owns that its fence comes first, that it is tried again until it can be taken up, and that it is
shown as it was written down meanwhile. It can be cancelled; all else has to wait, and is told for
what.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import replace

from agent.disk import SourceDisk
from agent.errors import FailedPrecondition, Unavailable, WarmsyncError
from agent.journal import NOT_KEPT
from agent.migration import Migration
from agent.record import SourceRecord
from agent.registry.ended import TRY_SECONDS, Ended, give_up
from agent.registry.fence import Fence, is_due
from agent.registry.preparation import Reopened
from agent.state import Event, Machine, State

_log = logging.getLogger(__name__)

RETRY_SECONDS = 3.0


def may_wait(record: SourceRecord, error: Exception) -> bool:
    """Return whether another try may help; the target may own, or it is only a matter of time."""
    return is_due(record) or isinstance(error, Unavailable)


class Waiting(Ended):
    """The source's end. `reopen` blocks, on one of `threads`, and `adopt` gets what it returned.

    `conclude` writes down how it has ended, and tells the target; `give_back`, on a thread too,
    removes what is left of it then.
    """

    def __init__(
        self,
        record: SourceRecord,
        fence: Fence,
        threads: Executor,
        *,
        reopen: Callable[[SourceRecord], Reopened],
        give_back: Callable[[SourceRecord], None],
        adopt: Callable[[Waiting, Reopened], None],
        conclude: Callable[[Waiting, SourceRecord], None],
        reason: Exception | None = None,
    ) -> None:
        super().__init__(record, fence)
        self._threads = threads
        self._reopen = reopen
        self._clear = give_back
        self._adopt = adopt
        self._conclude = conclude
        self._reason = reason
        self._trying: asyncio.Future[Reopened] | None = None
        self._giving: asyncio.Task[None] | None = None
        """Gives back what it has once it was cancelled; ends no sooner than the last try."""
        self.was_tried = asyncio.Event()
        """Set after the first try."""

    def snapshot(self) -> Migration:
        """Return what was known last, and what it waits for."""
        known = super().snapshot()
        if self.state.is_terminal or self._reason is None:
            return known
        return replace(known, progress=replace(known.progress, trouble=str(self.obstacle())))

    def obstacle(self) -> WarmsyncError:
        """Return why nothing but a cancel can be asked of it."""
        if self.state.is_terminal:
            return super().obstacle()
        return Unavailable(
            "NOT_TAKEN_UP",
            f"migration {self.id} was found again, but its source cannot be taken up yet "
            f"({self._reason or 'being opened'}); tried again every {RETRY_SECONDS:g} s",
            id=self.id,
        )

    @property
    def is_giving_up(self) -> bool:
        """Whether it was cancelled, and what a try may have opened is not given back yet."""
        return self._giving is not None and not self._giving.done()

    @property
    def is_held(self) -> bool:
        """See `Ended`."""
        return super().is_held or self.is_giving_up

    def update(
        self, limit_bytes_per_second: int | None, max_downtime_seconds: float | None
    ) -> None:
        """Refuse."""
        if not self.state.is_terminal:
            raise self.obstacle()
        super().update(limit_bytes_per_second, max_downtime_seconds)

    def start(self) -> None:
        """Begin to try."""
        self._task = asyncio.create_task(self._run(), name=f"take up {self.id}")

    async def cancel(self) -> None:
        """End it, and remove what is left of it in its QEMU: later, if that does not answer now."""
        record, machine = self.record, Machine.restore(self.record.history)
        if record.releasing and machine.state is State.CUTTING_OVER:
            raise FailedPrecondition(
                "TOO_LATE",
                f"migration {self.id} is being handed over; roll it back afterwards",
                id=self.id,
            )
        machine.apply(Event.CANCEL, time.time())
        self._conclude(self, replace(record, history=machine.history, owed=True))
        await super()._stop()
        trying, self._trying = self._try(), None
        self._giving = asyncio.create_task(self._give_back(trying), name=f"give back {self.id}")
        await asyncio.wait([self._giving], timeout=TRY_SECONDS)

    async def close(self, error: WarmsyncError) -> None:
        """The agent stops: the next one tries again, or removes what is left."""
        await self._stop()
        if self._giving is not None:
            self._giving.cancel()
        await super().close(error)

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """See `Ended`. Raises if a try goes on that could put the fence up behind one's back."""
        try:
            async with super().at_rest():
                if self._trying is not None:
                    raise self.obstacle()
                yield
        finally:
            # While a fence is still to be lifted, only the note tells where it is.
            if self.state.is_terminal and not (self.record.releasing or self.is_giving_up):
                await self._leave()

    async def _stop(self) -> None:
        await super()._stop()
        if self._trying is not None:
            await asyncio.wait([self._trying], timeout=TRY_SECONDS)
            for disk in _disks_of(self._trying):
                await asyncio.to_thread(disk.detach)
            if self._trying.done():
                self._trying = None
        if self._giving is not None:
            await asyncio.wait([self._giving], timeout=TRY_SECONDS)

    async def _run(self) -> None:
        while not self.state.is_terminal:
            try:
                reopened = await asyncio.shield(self._try())
                self._trying = None
                self._adopt(self, reopened)
                return
            except (WarmsyncError, OSError) as error:
                self._note(error)
            except Exception as error:
                _log.exception("migration not taken up id=%s", self.id)
                message = f"internal error ({error}); see the agent's log"
                self._note(WarmsyncError("INTERNAL", message))
            finally:
                self.was_tried.set()
            if not self.state.is_terminal:
                await asyncio.sleep(RETRY_SECONDS)
        await self._leave()

    async def _leave(self) -> None:
        """Remove what is left of it. It has ended, whatever is wrong with that."""
        loop = asyncio.get_running_loop()
        try:
            await asyncio.shield(loop.run_in_executor(self._threads, self._clear, self.record))
        except (WarmsyncError, OSError) as error:
            _log.warning('left in a QEMU id=%s reason="%s"', self.id, error)

    def _try(self) -> asyncio.Future[Reopened]:
        """Begin a try, which cannot be taken back, if none is under way."""
        if self._trying is None:
            loop = asyncio.get_running_loop()
            self._trying = loop.run_in_executor(self._threads, self._open)
        return self._trying

    def _open(self) -> Reopened:
        self.fence.put_up()
        if self.fence.trouble is not None:
            raise self.fence.trouble
        return self._reopen(self.record)

    def _note(self, error: WarmsyncError | OSError) -> None:
        self._trying = None
        if not may_wait(self.record, error):
            try:
                self._conclude(self, give_up(self.record, error))
                return
            except NOT_KEPT as full:
                error = full
        if str(error) != str(self._reason):
            _log.warning('not taken up yet, tried again id=%s reason="%s"', self.id, error)
            self._reason = error
            self.bell.ring()

    async def _give_back(self, trying: asyncio.Future[Reopened]) -> None:
        await asyncio.wait([trying])  # what it opens later would stay open
        disks = _disks_of(trying)
        for disk in disks:
            try:
                await asyncio.to_thread(disk.close)
            except (WarmsyncError, OSError) as error:
                _log.warning('not closed id=%s reason="%s"', self.id, error)
        if not disks:
            await self._leave()


def _disks_of(trying: asyncio.Future[Reopened]) -> list[SourceDisk]:
    """Return what a try has opened; none if it failed, or goes on."""
    if not trying.done() or trying.cancelled() or trying.exception() is not None:
        return []
    return trying.result().disks
