"""A migration of this agent's past: it is shown, and nothing can be asked of it any more."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace

from agent.bell import Bell
from agent.disk import SourceDisk
from agent.errors import FailedPrecondition, WarmsyncError
from agent.migration import Comparison, Migration, Mode, Owner, Role
from agent.migration import Event as Entered
from agent.record import SourceRecord
from agent.state import Entry, Event, Machine, State


class Ended:
    """The source's end of a migration that has ended, or that cannot go on."""

    disks: tuple[SourceDisk, ...] = ()

    def __init__(self, record: SourceRecord) -> None:
        self.record = record
        self.bell = Bell()
        self._machine = Machine.restore(record.history)

    @property
    def id(self) -> str:
        """The migration's id."""
        return self.record.plan.id

    @property
    def state(self) -> State:
        """The last state."""
        return self._machine.state

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
            error=record.error,
            refusal=record.stopped,
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
        """Nothing goes on."""

    async def close(self, error: WarmsyncError) -> None:
        """Nothing is held."""

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
        # Legal by the table, but its devices are not here.
        raise self.record.error or FailedPrecondition(
            "ILLEGAL_TRANSITION", f"migration {self.id} cannot go on", state=self.state
        )


def give_up(record: SourceRecord, error: Exception) -> SourceRecord:
    """Return the record of a migration whose sources cannot be taken up again.

    Once the target may own the disks it stays what it is: that is for a person to find out.
    """
    reason = (
        error
        if isinstance(error, WarmsyncError)
        else FailedPrecondition("DEVICE_UNUSABLE", f"the source cannot be taken up again: {error}")
    )
    if record.releasing or record.history[-1].state is State.CUT_OVER:
        return replace(record, error=reason)
    failed = (*record.history, Entry(State.FAILED, time.time()))
    return replace(record, error=reason, history=failed)
