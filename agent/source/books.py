"""The books of one migration at its source: its state, who owns its disks, what is written down.

Owns every move of the state machine: a move is written down before it may be told. Never reads,
sends or asks anybody, and decides no move.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from agent.errors import FailedPrecondition, WarmsyncError
from agent.estimate import Sample
from agent.journal import NOT_KEPT, Journal
from agent.migration import Event as Entered
from agent.migration import Migration, Owner, Plan, Role
from agent.peer import session_token
from agent.record import SourceRecord, dump
from agent.sender import Sender
from agent.source.autopilot import Autopilot
from agent.source.cutover import Cutover
from agent.source.prepared import Prepared
from agent.state import Event, Machine, State

_log = logging.getLogger(__name__)

_BACK = (State.FAILED, State.CANCELLED, State.ROLLED_BACK)
"""Ends after which the source's VM may run."""


class Books:
    """What is known of one migration, for the doors and for the agent's next start."""

    def __init__(
        self,
        prepared: Prepared,
        plan: Plan,
        journal: Journal,
        sender: Sender,
        autopilot: Autopilot,
    ) -> None:
        self._prepared = prepared
        self._journal = journal
        self._sender = sender
        self._autopilot = autopilot
        self._machine = Machine(time.time())
        self.plan = plan
        self.secret = prepared.secret
        self.epoch = 1
        self.opening: Sample | None = None
        """What round 0 has told."""
        self.cutover: Cutover | None = None
        """The last attempt."""
        self.error: WarmsyncError | None = None
        self.refusal: WarmsyncError | None = None
        self.certificate = ""
        """What both ends have signed at the cutover; empty before."""
        self.given_back = False
        """It has failed or was cancelled, the fence is down, and the target knows."""
        self.is_stuck = False
        """It has ended with the source as the owner, and the fence could not be lifted."""

    def restore(self, record: SourceRecord) -> None:
        """Take over what the agent before this one wrote down."""
        self._machine = Machine.restore(record.history)
        self.epoch = record.epoch
        self.error, self.certificate = record.error, record.certificate
        self.refusal = record.stopped
        self._sender.agree(record.generation)
        progress = record.progress
        pending = sum(disk.pending.count_bytes() for disk in self._sender.disks)
        if not self.state.is_terminal and self.state is not State.CUT_OVER:
            progress = replace(
                progress,
                resumes=progress.resumes + 1,
                resumed_saved_bytes=max(progress.total_bytes - pending, 0),
                suspect_volumes=progress.suspect_volumes + bool(self._prepared.suspect),
                dirty_bytes=pending,
            )
        self._sender.progress = progress

    @property
    def id(self) -> str:
        """The migration's id."""
        return self.plan.id

    @property
    def state(self) -> State:
        """The present state."""
        return self._machine.state

    @property
    def began_at_seconds(self) -> float:
        """When it was created (wall clock)."""
        return self._machine.history[0].at_seconds

    @property
    def token(self) -> str:
        """What a call to the target has to show; another after each time it was reached."""
        return session_token(self.secret, self.epoch)

    @property
    def is_releasing(self) -> bool:
        """From the first request of the release until it is refused: the target may own."""
        return self.cutover is not None and self.cutover.releasing

    @property
    def wants_cutover(self) -> bool:
        """Whether somebody waits for the answer of an attempt."""
        return self.cutover is not None and not self.cutover.done.done()

    def answer(self, error: WarmsyncError | None) -> None:
        """Tell who waits for the attempt, if anybody does, how it went (None: well)."""
        if self.cutover is None or self.cutover.done.done():
            return
        if error is None:
            self.cutover.done.set_result(None)
        else:
            self.cutover.done.set_exception(error)

    @property
    def owner(self) -> Owner:
        """Who may write to the disks."""
        if self.state.is_handed_over:
            return Owner.TARGET
        if self._is_untold:
            return Owner.NOBODY
        cutover = self.cutover
        if cutover is None or self.state is State.ROLLED_BACK:
            return Owner.SOURCE
        fenced = cutover.fencing and self.state is State.CUTTING_OVER
        return Owner.NOBODY if fenced or cutover.releasing else Owner.SOURCE

    @property
    def _is_untold(self) -> bool:
        """Whether it has ended with the source as the owner, and the fence has yet to come down.

        It is written down by then, but told later: whoever hears of it boots the VM again.
        """
        fenced = self.cutover is not None and self.cutover.fencing and not self.is_stuck
        unknown = self.state is State.FAILED and self.is_releasing
        return fenced and not unknown and self.state in _BACK

    def has_been(self, state: State) -> bool:
        """Return whether it was ever in this state."""
        return any(entry.state is state for entry in self._machine.history)

    def require(self, event: Event, *, force: bool = False) -> None:
        """Raise as the state machine would, without moving."""
        Machine.restore(self._machine.history).apply(event, time.time(), force=force)

    def check_changeable(self, *ended: State) -> None:
        """Raise FailedPrecondition once it has ended, or is in one of these states."""
        if self.state.is_terminal or self.state in ended:
            raise FailedPrecondition(
                "ILLEGAL_TRANSITION",
                f"migration {self.id} is {self.state}; only a running one can be changed",
                state=self.state,
            )

    def move(self, event: Event, *, force: bool = False) -> None:
        """Move, and write it down: only then may it be told. Not written down, it is undone."""
        state = self._machine.apply(event, time.time(), force=force)
        try:
            # A cutover is written down with the fence: given up before, it never was.
            if event is not Event.CUT_OVER:
                self.write_down(self._count(event))
        except NOT_KEPT:
            self._machine.retract()
            raise
        _log.info("migration id=%s state=%s", self.id, state)
        self._sender.bell.ring()

    def concede(self, event: Event) -> None:
        """Move, also if it cannot be written down: it is so all the same."""
        try:
            self.move(event)
        except NOT_KEPT as full:
            self._machine.apply(event, time.time())
            _log.error('not written down id=%s reason="%s"', self.id, full)
            self._sender.bell.ring()

    def write_down(self, counted: Mapping[str, float] | None = None) -> None:
        """Make what is known of it durable, `counted` in the totals with it. `journal.NOT_KEPT`."""
        self._journal.save(Role.SOURCE, self.id, dump(self.record()), counted)

    def record(self) -> SourceRecord:
        """Return what is written down of it."""
        cutover = self.cutover
        return SourceRecord(
            plan=self.plan,
            scheme=self._prepared.scheme,
            scheme_reason=self._prepared.scheme_reason,
            secret=self.secret,
            epoch=self.epoch,
            boot_id=self._prepared.request.boot_id,
            devices=tuple(disk.known_key for disk in self._sender.disks),
            history=self._machine.history,
            generation=self._sender.generation,
            progress=self._sender.progress,
            releasing=cutover is not None and cutover.fencing,
            opening=self.opening,
            error=self.error,
            certificate=self.certificate,
            step=self._autopilot.step,
            attempt=self._autopilot.attempt,
            stopped=self._autopilot.stopped,
            off_at_seconds=self._autopilot.off_at_seconds,
            step_boot_id=self._autopilot.step_boot_id,
            owed=self._is_owed,
            nameplates=tuple(disk.nameplate for disk in self._sender.disks),
        )

    @property
    def _is_owed(self) -> bool:
        given_up = self.state in (State.FAILED, State.CANCELLED)
        return given_up and not self.is_releasing and not self.given_back

    def snapshot(self) -> Migration:
        """Return what may be told now."""
        history = self._machine.history
        if self._is_untold:
            history = history[:-1]
        return Migration(
            plan=self.plan,
            role=Role.SOURCE,
            state=history[-1].state,
            scheme=self._prepared.scheme,
            scheme_reason=self._prepared.scheme_reason,
            carrier=self._sender.carrier_name,
            carrier_detail=self._sender.carrier_detail,
            progress=self._sender.progress,
            history=tuple(Entered(e.state, e.at_seconds) for e in history),
            error=None if self._is_untold else self.error,
            refusal=self.refusal,
            owner=self.owner,
            step=self._autopilot.step,
        )

    def _count(self, event: Event) -> dict[str, float]:
        """Return what a move adds to the host's totals."""
        progress = self._sender.progress
        sent = {"sent_bytes": float(progress.sent_bytes)}
        before = self._machine.history[-2].state
        if event is Event.RELEASE or (event, before) == (Event.SETTLE_TARGET, State.CUTTING_OVER):
            return sent | {
                "migrations_cut_over": 1.0,
                "moved_bytes": float(progress.total_bytes),
                "downtime_seconds": progress.downtime_seconds or 0.0,
                "downtime_saved_seconds": progress.downtime_saved_seconds or 0.0,
            }
        if event is Event.FAIL:
            return sent | {"migrations_failed": 1.0}
        settled = (event, before) == (Event.SETTLE_SOURCE, State.CUTTING_OVER)
        return sent if event is Event.CANCEL or settled else {}
