"""The life of one migration: its states, the events that move it, and what is refused.

Owns which move is legal, and the history of the moves made. Pure: the caller passes the time in,
does the work and tells the events. A refused event raises FailedPrecondition and changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from agent.errors import FailedPrecondition


class State(enum.StrEnum):
    """Where a migration is. The names are those of the gRPC interface."""

    PENDING = "PENDING"
    SEEDING = "SEEDING"
    SYNCING = "SYNCING"
    CONVERGED = "CONVERGED"
    CUTTING_OVER = "CUTTING_OVER"
    CUT_OVER = "CUT_OVER"
    PAUSED = "PAUSED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    ROLLED_BACK = "ROLLED_BACK"
    COMPLETED = "COMPLETED"

    @property
    def is_terminal(self) -> bool:
        """True where it has ended; what a person may still settle is who owns."""
        return self in TERMINAL

    @property
    def is_handed_over(self) -> bool:
        """True where the target owns the disks."""
        return self in (State.CUT_OVER, State.COMPLETED)


class Event(enum.StrEnum):
    """What can happen to a migration. The values are the words used in messages."""

    SEED = "seed"
    """Tracking is on; the first round begins."""
    SYNC = "sync"
    """The first round is durable on the target."""
    CONVERGE = "converge"
    """The predicted downtime is within the budget."""
    DIVERGE = "diverge"
    """It is not any more: the guest writes faster."""
    CUT_OVER = "cut over"
    """The controller asks for the cutover."""
    REFUSE = "refuse"
    """The source was still being written: the cutover is undone, syncing goes on."""
    RELEASE = "release"
    """The target is durable and released, the source fenced."""
    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    FAIL = "fail"
    ROLL_BACK = "roll back"
    FINISH = "finish"
    SETTLE_SOURCE = "settle for the source"
    """A person says that the source owns, where the agents cannot learn it from each other."""
    SETTLE_TARGET = "settle for the target"


TERMINAL = frozenset({State.FAILED, State.CANCELLED, State.ROLLED_BACK, State.COMPLETED})

_CARRYING = (State.SEEDING, State.SYNCING, State.CONVERGED)
_OPEN = (State.PENDING, *_CARRYING, State.PAUSED, State.CUTTING_OVER)
_DOUBTED = (State.CUTTING_OVER, State.CUT_OVER, State.FAILED)
"""States in which it may be that only a person can find out who owns."""

MOVES: Mapping[Event, Mapping[State, State]] = MappingProxyType(
    {
        Event.SEED: {State.PENDING: State.SEEDING},
        Event.SYNC: {State.SEEDING: State.SYNCING},
        Event.CONVERGE: {State.SYNCING: State.CONVERGED},
        Event.DIVERGE: {State.CONVERGED: State.SYNCING},
        Event.CUT_OVER: {
            State.SYNCING: State.CUTTING_OVER,
            State.CONVERGED: State.CUTTING_OVER,
        },
        Event.REFUSE: {State.CUTTING_OVER: State.SYNCING},
        Event.RELEASE: {State.CUTTING_OVER: State.CUT_OVER},
        Event.PAUSE: dict.fromkeys(_CARRYING, State.PAUSED),
        # Where a pause ends depends on where it began: see RESUMED.
        Event.RESUME: {State.PAUSED: State.SYNCING},
        Event.CANCEL: dict.fromkeys(_OPEN, State.CANCELLED),
        Event.FAIL: dict.fromkeys(_OPEN, State.FAILED),
        Event.ROLL_BACK: {State.CUT_OVER: State.ROLLED_BACK},
        Event.FINISH: {State.CUT_OVER: State.COMPLETED},
        Event.SETTLE_SOURCE: dict.fromkeys(_DOUBTED, State.ROLLED_BACK),
        Event.SETTLE_TARGET: dict.fromkeys(_DOUBTED, State.COMPLETED),
    }
)
"""The whole of the law: for each event, from which state to which."""

RESUMED: Mapping[State, State] = MappingProxyType(
    {
        State.SEEDING: State.SEEDING,
        State.SYNCING: State.SYNCING,
        # The guest wrote on during the pause: convergence must be shown again.
        State.CONVERGED: State.SYNCING,
    }
)
"""Where a paused migration goes on, by the state it was paused in."""

ASKED = (
    Event.CUT_OVER,
    Event.PAUSE,
    Event.RESUME,
    Event.CANCEL,
    Event.ROLL_BACK,
    Event.FINISH,
)
"""Events that a controller asks for; the others are the agent's own doing."""


MAX_HISTORY = 200
"""Entries of a history: a migration that converges and diverges all day must not grow for ever."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the history: the state entered, and when (the caller's clock, seconds)."""

    state: State
    at_seconds: float


class Machine:
    """One migration's state and how it came about."""

    __slots__ = ("_history",)

    def __init__(self, at_seconds: float) -> None:
        self._history = [Entry(State.PENDING, at_seconds)]

    @classmethod
    def restore(cls, history: Sequence[Entry]) -> Self:
        """Take up a machine from its history. ValueError if that holds a move that is not legal."""
        if not history or history[0].state is not State.PENDING:
            raise ValueError("a migration's history begins with PENDING")
        machine = cls(history[0].at_seconds)
        for entry in history[1:]:
            if entry.state not in machine._reachable():
                raise ValueError(f"no move leads from {machine.state} to {entry.state}")
            machine._history.append(entry)
        return machine

    @property
    def state(self) -> State:
        """The present state."""
        return self._history[-1].state

    @property
    def history(self) -> tuple[Entry, ...]:
        """The states entered, oldest first; it begins with PENDING.

        Of more than MAX_HISTORY the oldest detours (out of a state and back) are left out.
        """
        return tuple(self._history)

    @property
    def paused_from(self) -> State | None:
        """The state that the present pause began in; None unless PAUSED."""
        return self._history[-2].state if self.state is State.PAUSED else None

    def possible(self) -> tuple[Event, ...]:
        """Return the events that are legal now (a cutover perhaps only with force)."""
        return tuple(event for event in Event if self.state in MOVES[event])

    def apply(self, event: Event, at_seconds: float, *, force: bool = False) -> State:
        """Move, and return the new state.

        `force` permits a cutover that is not CONVERGED yet; it has no meaning for other events.
        Raises FailedPrecondition and leaves everything as it was: NOT_CONVERGED for a cutover
        that is too early, ILLEGAL_TRANSITION for every other event that is not legal now.
        """
        self._check_converged(event, force)
        target = self._target(event)
        if target is None:
            raise self._illegal(event)
        self._history.append(Entry(target, at_seconds))
        if len(self._history) > MAX_HISTORY:
            self._shorten()
        return target

    def _shorten(self) -> None:
        """Drop the oldest detour; what is left is a history of legal moves. Not the last entry:
        it may be retracted.
        """
        left: dict[State, int] = {}
        for i, entry in enumerate(self._history[:-1]):
            if entry.state in left:
                del self._history[left[entry.state] + 1 : i + 1]
                return
            if entry.state in (State.SEEDING, State.SYNCING):
                left[entry.state] = i

    def retract(self) -> None:
        """Undo the last move: it could not be written down, so it did not happen."""
        if len(self._history) == 1:
            raise ValueError("a migration's history begins with PENDING")
        self._history.pop()

    def _target(self, event: Event) -> State | None:
        if event is Event.RESUME and self.paused_from is not None:
            return RESUMED[self.paused_from]
        return MOVES[event].get(self.state)

    def _reachable(self) -> set[State]:
        return {target for event in Event if (target := self._target(event)) is not None}

    def _check_converged(self, event: Event, force: bool) -> None:
        early = self.state in (State.PENDING, State.SEEDING, State.SYNCING)
        if event is not Event.CUT_OVER or force or not early:
            return
        mend = "wait until it is CONVERGED"
        if self.state is State.SYNCING:
            mend += ", or force it and accept a longer downtime"
        raise FailedPrecondition(
            "NOT_CONVERGED",
            f"cannot cut over a migration that is {self.state}: {mend}",
            state=self.state,
        )

    def _illegal(self, event: Event) -> FailedPrecondition:
        asked = [str(possible) for possible in self.possible() if possible in ASKED]
        if Event.SETTLE_SOURCE in self.possible() and not self.state.is_terminal:
            asked.append("settle")
        now = f"possible now: {', '.join(asked)}" if asked else "nothing is possible any more"
        return FailedPrecondition(
            "ILLEGAL_TRANSITION",
            f"cannot {event} a migration that is {self.state}; {now}",
            state=self.state,
            event=event,
            possible=", ".join(asked),
        )
