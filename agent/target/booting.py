"""The boot hook of one session at its target: once for each attempt, whoever asks how often.

Owns the attempt, and what is written down of it: its number before the hook starts, its end before
it is told. An agent that is started again waits for the hook that it finds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from agent.errors import FailedPrecondition, WarmsyncError
from agent.hook import HookRun
from agent.journal import NOT_KEPT
from agent.record import TargetRecord

_log = logging.getLogger(__name__)


class Booting:
    """`write_down` makes `record` durable, and shows the seconds."""

    def __init__(
        self,
        hook: HookRun,
        values: Mapping[str, str],
        write_down: Callable[[float | None], None],
        record: TargetRecord,
    ) -> None:
        self._hook = hook
        self._values = values
        self._write_down = write_down
        self._attempt = record.boot_attempt
        self._seconds = record.boot_seconds
        self.error = record.boot_error
        self._task: asyncio.Task[None] | None = None
        self.deciding = asyncio.Lock()
        """Held while it is decided whether a hook begins, or that none may: one at a time."""

    @property
    def record(self) -> tuple[int, float | None, WarmsyncError | None]:
        """What is written down: the attempt, its seconds, its error."""
        return self._attempt, self._seconds, self.error

    def check(self) -> None:
        """Raise FailedPrecondition unless the hook can run."""
        self._hook.hook.check()

    def check_idle(self) -> None:
        """Raise FailedPrecondition BOOT_UNDER_WAY while the hook runs, or is about to."""
        about_to = self._task is not None and not self._task.done()
        if about_to or self._hook.is_running:
            raise FailedPrecondition(
                "BOOT_UNDER_WAY",
                "the target's boot hook is still running; wait for its end, then power the VM "
                "down there and roll back",
            )

    def begin(self, attempt: int) -> None:
        """Begin an attempt if it is new; with `deciding` held. Raises as `check`."""
        if self._task is None or (attempt > self._attempt and self._task.done()):
            again = attempt <= self._attempt
            if not again:
                self._note(attempt)
            self._task = asyncio.create_task(self._work(again=again), name="boot hook")

    async def result(self) -> float:
        """Return the seconds of the attempt that was begun last, or raise its error."""
        if self._task is not None:
            await asyncio.shield(self._task)
        if self.error is not None:
            raise self.error
        return self._seconds or 0.0

    async def close(self) -> None:
        """The agent stops: the hook goes on, and is found again at the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _note(self, attempt: int) -> None:
        self._hook.hook.check()
        self._hook.forget()  # before an agent that comes back looks for this attempt's end
        before = self._attempt, self._seconds, self.error
        self._attempt, self._seconds, self.error = attempt, None, None
        try:
            self._write_down(None)
        except WarmsyncError:
            self._attempt, self._seconds, self.error = before
            raise

    async def _work(self, *, again: bool) -> None:
        if again and (self._seconds is not None or self.error is not None):
            return  # it has ended, and what came of it was written down
        try:
            if again:
                await self._hook.rejoin()
                self._seconds = 0.0
            else:
                self._seconds = await self._hook.run(self._values)
        except WarmsyncError as error:
            self.error = error
        try:
            self._write_down(self._seconds)
        except NOT_KEPT as full:  # the next start finds the hook's result
            _log.error('end of the boot hook not written down reason="%s"', full)
