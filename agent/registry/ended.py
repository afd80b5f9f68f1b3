"""A migration of this agent's past: it is shown, and nothing can be asked of it any more.

Owns what its end still owes after a start: a fence that was not up, a target that was not told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from agent.bell import Bell
from agent.disk import SourceDisk
from agent.errors import FailedPrecondition, Unavailable, WarmsyncError
from agent.journal import NOT_KEPT, Journal
from agent.migration import Comparison, Migration, Mode, Owner, Role
from agent.migration import Event as Entered
from agent.peer import Peer, session_token
from agent.record import SourceRecord, dump
from agent.registry.fence import Fence, is_due
from agent.source.ending import tell_target
from agent.state import Entry, Event, Machine, State

_log = logging.getLogger(__name__)

RETRY_SECONDS = 3.0
"""How often a source that could not be fenced is tried again."""
TRY_SECONDS = 15.0
"""How long a try under way is waited for by whoever wants an end: a QEMU has 10 s to answer."""


class Ended:
    """The source's end of a migration that has ended. `trouble` is shown: what it still lacks."""

    disks: tuple[SourceDisk, ...] = ()

    def __init__(
        self, record: SourceRecord, fence: Fence, trouble: WarmsyncError | None = None
    ) -> None:
        self.record = record
        self.fence = fence
        self.bell = Bell()
        self.trouble = trouble
        self.settling = asyncio.Lock()
        """Held by the one person who settles it."""
        self._task: asyncio.Task[None] | None = None
        self._fencing: asyncio.Future[None] | None = None
        self.telling: asyncio.Task[None] | None = None
        """Tells its target of the end."""

    @property
    def id(self) -> str:
        """The migration's id."""
        return self.record.plan.id

    @property
    def state(self) -> State:
        """The last state."""
        return self.record.history[-1].state

    def become(self, record: SourceRecord) -> None:
        """Take over what was written down of it since."""
        self.record = record
        self.bell.ring()

    def snapshot(self) -> Migration:
        """Return what was known last."""
        record = self.record
        return Migration(
            plan=record.plan,
            role=Role.SOURCE,
            state=self.state,
            scheme=record.scheme,
            scheme_reason=record.scheme_reason,
            progress=record.progress,
            history=tuple(Entered(e.state, e.at_seconds) for e in record.history),
            error=record.error or self.trouble,
            refusal=self.fence.trouble or self.trouble or record.stopped,
            owner=self.owner,
            step=record.step,
        )

    @property
    def owner(self) -> Owner:
        """Who may write to the disks."""
        if self.state.is_handed_over:
            return Owner.TARGET
        error = self.record.error
        unsure = self.state is State.CUTTING_OVER and self.record.releasing
        unsure |= error is not None and error.reason == "OWNER_UNKNOWN"
        return Owner.NOBODY if unsure else Owner.SOURCE

    @property
    def certificate(self) -> str:
        """What both ends have signed at the cutover; empty if there was none."""
        return self.record.certificate

    def start(self) -> None:
        """Nothing goes on, but that the fence goes up if it is not."""
        if self.fence.trouble is not None:
            self._task = asyncio.create_task(self._put_up_fence(), name=f"fence {self.id}")

    async def _put_up_fence(self) -> None:
        loop = asyncio.get_running_loop()
        while self.fence.trouble is not None:
            if self._fencing is None:
                await asyncio.sleep(RETRY_SECONDS)
                self._fencing = loop.run_in_executor(None, self.fence.put_up)
            await asyncio.shield(self._fencing)  # a thread cannot be taken back
            self._fencing = None
            self.bell.ring()

    @property
    def is_held(self) -> bool:
        """Whether its fence, its target or its record is still in somebody's hands."""
        under_way = (self._fencing, self.telling)
        return self.settling.locked() or any(one and not one.done() for one in under_way)

    async def close(self, error: WarmsyncError) -> None:  # noqa: ARG002 - as in SourceMigration
        """The agent stops; the fence stays as it is."""
        await self._stop()
        self.fence.close()

    def forget(self) -> None:
        """It is to be remembered no more: the fence is not kept up any longer."""
        if self._task is not None:
            self._task.cancel()
        self.fence.close()

    @asynccontextmanager
    async def at_rest(self) -> AsyncIterator[None]:
        """Nothing goes on within the block, where it may become another; after it what has to.

        Unavailable SOURCE_STALLED if a thread could put the fence up behind one's back.
        """
        await self._stop()
        try:
            if self._fencing is not None:
                raise self._stalled()
            yield
        finally:
            if is_due(self.record) or not self.state.is_terminal:
                self.start()
            else:
                self.fence.close()

    async def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._fencing is not None:
            await asyncio.wait([self._fencing], timeout=TRY_SECONDS)
            if self._fencing.done():
                self._fencing = None

    def _stalled(self) -> Unavailable:
        paths = ", ".join(volume.source for volume in self.record.plan.volumes)
        return Unavailable(
            "SOURCE_STALLED",
            f"migration {self.id} cannot be settled until source {paths} has answered a try to "
            "fence it; check the disk and the kernel log, then settle again",
            id=self.id,
            path=paths,
        )

    def update(
        self,
        limit_bytes_per_second: int | None,  # noqa: ARG002 - as in SourceMigration
        max_downtime_seconds: float | None,  # noqa: ARG002
    ) -> None:
        """Refuse."""
        raise FailedPrecondition(
            "ILLEGAL_TRANSITION",
            f"migration {self.id} is {self.state}; only a running one can be changed",
            state=self.state,
        )

    def check_mode(self, mode: Mode) -> None:  # noqa: ARG002
        """Refuse."""
        self.update(None, None)

    async def set_mode(self, mode: Mode) -> None:  # noqa: ARG002
        """Refuse."""
        self.update(None, None)

    def pause(self) -> None:
        """Refuse."""
        self._refuse(Event.PAUSE)

    def resume(self) -> None:
        """Refuse."""
        self._refuse(Event.RESUME)

    async def cancel(self) -> None:
        """Refuse."""
        self._refuse(Event.CANCEL)

    async def cut_over(self, *, force: bool) -> None:
        """Refuse."""
        self._refuse(Event.CUT_OVER, force=force)

    async def roll_back(self) -> None:
        """Refuse."""
        self._refuse(Event.ROLL_BACK)

    async def finish(self) -> None:
        """Refuse."""
        self._refuse(Event.FINISH)

    async def verify(self) -> AsyncIterator[Comparison]:
        """Refuse."""
        self._refuse(Event.CUT_OVER, force=True)
        nothing: tuple[Comparison, ...] = ()
        for item in nothing:
            yield item

    def _refuse(self, event: Event, *, force: bool = False) -> None:
        Machine.restore(self.record.history).apply(event, time.time(), force=force)
        raise self.obstacle()  # legal by the table, but its devices are not here

    def obstacle(self) -> WarmsyncError:
        """Return why nothing can be asked of it."""
        return self.record.error or FailedPrecondition(
            "ILLEGAL_TRANSITION", f"migration {self.id} cannot go on", state=self.state
        )


def give_up(record: SourceRecord, error: Exception) -> SourceRecord:
    """Return the record of a migration whose sources cannot be taken up again."""
    reason = (
        error
        if isinstance(error, WarmsyncError)
        else FailedPrecondition("DEVICE_UNUSABLE", f"the source cannot be taken up again: {error}")
    )
    failed = (*record.history, Entry(State.FAILED, time.time()))
    return replace(record, error=reason, history=failed, owed=True)


def write_down(record: SourceRecord, journal: Journal, *, before: SourceRecord) -> None:
    """Write down how a migration has ended; what it adds to the totals is counted once.

    `journal.NOT_KEPT`.
    """
    counted: dict[str, float] = {}
    if record.history != before.history:
        counted["sent_bytes"] = record.progress.sent_bytes
        if record.history[-1].state is State.FAILED:
            counted["migrations_failed"] = 1.0
    journal.save(Role.SOURCE, record.plan.id, dump(record), counted)


async def tell_end(ended: Ended, journal: Journal, connect: Callable[[str], Peer]) -> None:
    """Let the target of a migration go that has ended here, if it may not know."""
    record = ended.record
    if not record.owed:
        return
    cancelled = ended.state is State.CANCELLED
    reason = "cancelled by the controller" if cancelled else str(record.error)
    peer = connect(record.plan.peer)
    try:
        token = session_token(record.secret, record.epoch)
        if await tell_target(peer, ended.id, token, reason, cancelled=cancelled):
            known = ended.record  # a person may have settled it meanwhile
            told = replace(known, owed=known.releasing)  # then its fence is still up
            write_down(told, journal, before=known)
            ended.become(told)
    except NOT_KEPT as error:  # it is told once more at the next start
        _log.error('not written down id=%s reason="%s"', ended.id, error)
    finally:
        await peer.close()
