"""Runs blocking calls on threads, ahead of who consumes their results, in order.

Owns the bound on what is under way and the promise that nothing runs any more once it is closed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

_Result = TypeVar("_Result")


async def run_ahead(
    calls: Iterator[Callable[[], _Result]], threads: Executor, depth: int
) -> AsyncGenerator[_Result, None]:
    """Iterate the results of `calls` in their order, with at most `depth` of them under way.

    A call's OSError is raised when its turn comes. Close it (aclose) to wait for what runs.
    """
    ahead: deque[Future[_Result]] = deque()
    try:
        while True:
            while len(ahead) < depth and (call := next(calls, None)) is not None:
                ahead.append(threads.submit(call))
            if not ahead:
                return
            # Shielded: cancelling the wait must not make us forget a thread that still runs.
            result = await asyncio.shield(asyncio.wrap_future(ahead[0]))
            ahead.popleft()
            yield result
    finally:
        await _drain(ahead)


async def _drain(ahead: deque[Future[_Result]]) -> None:
    """Wait for calls that run; those that have not begun never will."""
    running = [asyncio.wrap_future(call) for call in ahead if not call.cancel()]
    cancelled: asyncio.CancelledError | None = None
    while waiting := [call for call in running if not call.done()]:
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:  # once more: the threads run on all the same
            cancelled = error
    errors = [call.exception() for call in running]  # of each: else asyncio logs the others
    if cancelled is not None:
        raise cancelled
    for failure in errors:
        if failure is not None and not isinstance(failure, OSError):
            raise failure
