"""Wakes those who watch a migration when something about it changed."""

from __future__ import annotations

import asyncio


class Bell:
    """Level-triggered: whoever waits with an old count returns at once; rings may be merged."""

    def __init__(self) -> None:
        self._count = 0
        self._event = asyncio.Event()

    @property
    def count(self) -> int:
        """How often it was rung."""
        return self._count

    def ring(self) -> None:
        """Wake everybody."""
        self._count += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, seen: int) -> int:
        """Return the count as soon as it is not `seen`."""
        if self._count == seen:
            await self._event.wait()
        return self._count
