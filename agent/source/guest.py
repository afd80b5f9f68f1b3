"""The guest of one migration: slowed while the migration is stalled, if that was asked for.

Owns the moments: a limit falls with each stalled verdict, stays until the cutover, a pause or the
end, and goes then, whatever else fails. How low is `agent.easing`, how it is done `agent.brake`.
Nothing here ends a migration: a guest that cannot be slowed is moved as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from agent.brake import Brake
from agent.easing import Easing
from agent.migration import Plan
from agent.rounds import Verdict

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class Note(Protocol):
    """Where progress is shown."""

    def __call__(self, *, guest_limit_bytes_per_second: int) -> None:
        """Show the limit."""


class Guest:
    """The guest's limit. Without a brake nothing is ever done."""

    def __init__(self, brake: Brake | None, plan: Plan, note: Note) -> None:
        self._id = plan.id
        self._brake = brake
        self._note = note
        wanted = plan.guest_throttle
        self._easing = Easing(wanted.least_bytes_per_second if wanted else 1)
        self._limit = 0
        self._gave_up = False
        # Changes follow each other in the order that they were asked for.
        self._lock = asyncio.Lock()
        self._letting_go: asyncio.Task[None] | None = None

    async def ease(self, verdict: Verdict, budget_seconds: float) -> None:
        """Slow the guest further if a verdict says so; put a limit back that a cutover lifted."""
        brake = self._brake
        if brake is None or self._gave_up:
            return
        async with self._lock:
            limit = self._easing.decide(verdict, budget_seconds, time.monotonic())
            if limit == self._limit:
                return
            try:
                await _on_thread(lambda: brake.limit(limit) if limit else brake.lift())
            except OSError as error:
                self._gave_up = True
                reason = error.strerror or error
                _log.warning('guest not throttled any more id=%s reason="%s"', self._id, reason)
                await self._lift(brake)
                return
            _log.info("guest throttled id=%s limit_bytes_per_second=%d", self._id, limit)
            self._show(limit)

    def let_go(self) -> None:
        """Lift the limit soon and begin anew: at a pause, which may last."""
        if self._brake is not None:
            self._easing.restart()
            self._letting_go = asyncio.create_task(self.release(), name=f"let go {self._id}")

    async def release(self) -> None:
        """Lift the limit. Safe to call at any time; never raises."""
        if self._brake is not None:
            async with self._lock:
                await self._lift(self._brake)

    async def _lift(self, brake: Brake) -> None:
        try:
            await _on_thread(brake.lift)
        except OSError as error:
            # Its journal stays, so the next try or the agent's next start lifts it.
            _log.error('guest still throttled id=%s reason="%s"', self._id, error)
            return
        if self._limit:
            _log.info("guest not throttled any more id=%s", self._id)
            self._show(0)

    def _show(self, limit: int) -> None:
        self._limit = limit
        self._note(guest_limit_bytes_per_second=limit)


async def _on_thread(work: Callable[[], _Result]) -> _Result:
    """Run blocking work to its end, also when cancelled: a limit must not outrun its lifting."""
    job = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise
