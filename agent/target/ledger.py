"""The books of one session at its target: its state, what is durable here, what is written down.

Owns every move of the state machine, and the generation that was acknowledged: both are written
down before they are told. Touches no device.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import replace

from agent.bell import Bell
from agent.errors import FailedPrecondition, Unavailable, WarmsyncError
from agent.hook import HookRun, values_of
from agent.journal import NOT_KEPT, Journal
from agent.migration import Event as Entered
from agent.migration import Migration, Owner, Role
from agent.peer import session_token
from agent.record import TargetRecord, dump
from agent.state import Event, Machine, State
from agent.target.booting import Booting

_log = logging.getLogger(__name__)


class Ledger:
    """What is known of one session, for the doors and for the agent's next start."""

    def __init__(self, record: TargetRecord, journal: Journal, boot: HookRun) -> None:
        self.bell = Bell()
        self.plan = record.plan
        self.secret = record.secret
        self.epoch = record.epoch
        self.generation = record.generation
        """The last that is durable here."""
        self.progress = record.progress
        self.error = record.error
        self.boot_id, self.keys = record.boot_id, record.devices
        self.nameplates = record.nameplates
        """What the generation is of: on one boot, and on every."""
        self.certificate = record.certificate
        self.resizing = record.resizing
        """Not what was acknowledged, unless it is released so; until the source has come back."""
        self._journal = journal
        self._machine = Machine.restore(record.history)
        paths = [volume.target for volume in record.plan.volumes]
        self.booting = Booting(boot, values_of(self.id, paths), self._write_boot, record)

    @property
    def id(self) -> str:
        """The migration's id."""
        return self.plan.id

    @property
    def state(self) -> State:
        """The present state."""
        return self._machine.state

    @property
    def token(self) -> str:
        """What a call of the session's source has to show; another after each `resume`."""
        return session_token(self.secret, self.epoch)

    def is_named_by(self, token: str, *, ahead: bool = False) -> bool:
        """Return whether a token is this session's.

        FailedPrecondition SESSION_SUPERSEDED for an earlier epoch, Unavailable SOURCE_NOT_BACK for
        a later one, unless it may be `ahead`.
        """
        secret, _, epoch = token.rpartition("/")
        if not self.is_known_by(secret):
            return False
        if epoch.isdecimal() and int(epoch) > self.epoch:
            if ahead:
                return True
            raise Unavailable(
                "SOURCE_NOT_BACK",
                f"the source of migration {self.id} has started again and has yet to connect with "
                "its target; try again",
                id=self.id,
            )
        if epoch != str(self.epoch):
            raise self.superseded()
        return True

    def is_known_by(self, secret: str) -> bool:
        """Return whether a secret is this session's."""
        return secrets.compare_digest(secret.encode(), self.secret.encode())

    def note(self, **changes: object) -> None:
        """Change the progress."""
        self.progress = replace(self.progress, **changes)  # type: ignore[arg-type]

    def acknowledge(self, generation: int) -> None:
        """A generation is durable here. `journal.NOT_KEPT`: then it may not be told."""
        self.generation = generation
        self.note(rounds=self.progress.rounds + 1)
        if self.state is State.SEEDING:
            self._machine.apply(Event.SYNC, time.time())
        # Before it is told: a target that forgets what it has acknowledged is worth nothing.
        # Here and not on a thread: an older state must not be written over a newer one.
        self.write_down()
        self.bell.ring()

    def move(self, *events: Event) -> None:
        """Move, and write it down: only then may it be told. Not written down, it is undone."""
        for event in events:
            self._machine.apply(event, time.time(), force=True)
        try:
            self.write_down()
        except NOT_KEPT:
            for _ in events:
                self._machine.retract()
            raise
        _log.info("target id=%s state=%s", self.id, self.state)
        self.bell.ring()

    def fail(self) -> None:
        """Move to the end, also if it cannot be written down."""
        try:
            self.move(Event.FAIL)
        except NOT_KEPT as full:  # it ends all the same
            self._machine.apply(Event.FAIL, time.time())
            _log.error('not written down id=%s reason="%s"', self.id, full)
            self.bell.ring()

    def write_down(self) -> None:
        """Make what is known of it durable. `journal.NOT_KEPT`."""
        self._journal.save(Role.TARGET, self.id, dump(self.record()))

    def record(self) -> TargetRecord:
        """Return what is written down of it."""
        return TargetRecord(
            self.plan,
            self.secret,
            self.epoch,
            self._machine.history,
            self.generation,
            self.progress,
            self.error,
            self.boot_id,
            self.keys,
            self.certificate,
            self.resizing,
            *self.booting.record,
            nameplates=self.nameplates,
        )

    def snapshot(self) -> Migration:
        """Return what is known now."""
        released = (State.CUT_OVER, State.COMPLETED)
        return Migration(
            plan=self.plan,
            role=Role.TARGET,
            state=self.state,
            scheme=None,
            scheme_reason="",
            progress=self.progress,
            history=tuple(Entered(e.state, e.at_seconds) for e in self._machine.history),
            error=self.error,
            refusal=self.booting.error,
            incomplete=self.state not in released,
            owner=Owner.TARGET if self.state in released else Owner.SOURCE,
        )

    def superseded(self) -> FailedPrecondition:
        """Return the error for an earlier connection of the source."""
        return FailedPrecondition(
            "SESSION_SUPERSEDED",
            f"a later run of the source's agent has taken migration {self.id} over; this one "
            "is to stop",
            id=self.id,
        )

    def not_open(self) -> FailedPrecondition:
        """Return the error for what cannot be asked of the session as it is."""
        return FailedPrecondition(
            "SESSION_NOT_OPEN",
            f"the session of migration {self.id} is {self.state}; start a new migration",
            id=self.id,
        )

    def shut(self) -> WarmsyncError:
        """Return what ended the session, or that it is not open."""
        return self.error or self.not_open()

    def _write_boot(self, seconds: float | None) -> None:
        self.note(boot_seconds=seconds)
        self.write_down()
        self.bell.ring()
