"""The comparisons that controllers have asked for: they go on whether or not anybody reads of them.

Owns that only the newest progress is kept, and that all give way at once to what is more urgent.
What is compared is `agent.source.verify`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from agent.errors import WarmsyncError
from agent.migration import Comparison


class Comparisons:
    """One migration's."""

    def __init__(self) -> None:
        self._under_way: set[_Comparing] = set()

    async def follow(
        self, steps: AsyncGenerator[Comparison, None]
    ) -> AsyncGenerator[Comparison, None]:
        """Iterate the newest of `steps`; what nobody was there to read is left out."""
        one = _Comparing(steps)
        self._under_way.add(one)
        try:
            while (newest := await one.next()) is not None:
                yield newest
        finally:
            await one.stop()
            self._under_way.discard(one)

    def give_way(self, error: WarmsyncError) -> None:
        """End all that are under way; `error` is for who reads of them."""
        for one in self._under_way:
            one.interrupt(error)

    async def end(self, error: WarmsyncError) -> None:
        """The same, and wait until nothing is read any more."""
        self.give_way(error)
        for one in tuple(self._under_way):
            await one.stop()


class _Comparing:
    """One of them."""

    def __init__(self, steps: AsyncGenerator[Comparison, None]) -> None:
        self._newest: Comparison | None = None
        self._fresh = asyncio.Event()
        self._interruption: WarmsyncError | None = None
        self._is_stopped = False
        self._task = asyncio.create_task(self._run(steps), name="compare")
        self._task.add_done_callback(self._note_end)

    async def next(self) -> Comparison | None:
        """Return the newest progress once there is some that was not returned; None at the end.

        Raises what ended it.
        """
        while self._newest is None and not self._task.done():
            self._fresh.clear()
            await self._fresh.wait()
        newest, self._newest = self._newest, None
        if newest is None:
            if self._interruption is not None:
                raise self._interruption
            self._task.result()
        return newest

    def interrupt(self, error: WarmsyncError) -> None:
        """End it, unless it has ended."""
        if self._cancel():
            self._interruption = error

    async def stop(self) -> None:
        """End it, and wait until it reads nothing any more."""
        self._cancel()
        await asyncio.wait([self._task])

    def _cancel(self) -> bool:
        """Once: a second time it would break off the wait for the reads under way."""
        if self._is_stopped or self._task.done():
            return False
        self._is_stopped = True
        self._task.cancel()
        return True

    async def _run(self, steps: AsyncGenerator[Comparison, None]) -> None:
        async with aclosing(steps):
            async for self._newest in steps:
                self._fresh.set()

    def _note_end(self, task: asyncio.Task[None]) -> None:
        _ = task.cancelled() or task.exception()  # seen, if nobody reads any more
        self._fresh.set()
