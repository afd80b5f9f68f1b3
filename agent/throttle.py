"""A bandwidth limit that can be changed while it is being waited for.

Owns the pace of sending and nothing else: acknowledgements never pass through here.
"""

from __future__ import annotations

import asyncio

_BURST_SECONDS = 0.05
_STEP_SECONDS = 0.05


class Throttle:
    """A token bucket: `spend` waits until the bytes fit the limit. 0 is no limit."""

    def __init__(self, limit_bytes_per_second: int) -> None:
        self._limit = limit_bytes_per_second
        self._debt_bytes = 0.0
        self._paid_at = 0.0

    @property
    def limit_bytes_per_second(self) -> int:
        """The limit in force."""
        return self._limit

    def change(self, limit_bytes_per_second: int) -> None:
        """Set another limit; whoever waits notices within 50 ms."""
        self._limit = limit_bytes_per_second
        self._debt_bytes = min(self._debt_bytes, limit_bytes_per_second * _BURST_SECONDS)

    async def spend(self, size_bytes: int) -> None:
        """Account for `size_bytes` and wait until the debt is within one burst."""
        self._pay()
        self._debt_bytes += size_bytes
        while self._limit and self._debt_bytes > self._limit * _BURST_SECONDS:
            excess_seconds = self._debt_bytes / self._limit - _BURST_SECONDS
            await asyncio.sleep(min(max(excess_seconds, 0.001), _STEP_SECONDS))
            self._pay()

    def _pay(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._limit:
            self._debt_bytes = max(0.0, self._debt_bytes - (now - self._paid_at) * self._limit)
        else:
            self._debt_bytes = 0.0
        self._paid_at = now
