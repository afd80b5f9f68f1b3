"""Level-triggered: nobody who looked before the ring misses it."""

from __future__ import annotations

import asyncio

from agent.bell import Bell
from tests.agent.rpc_helpers import run


def test_an_old_count_returns_at_once() -> None:
    async def main() -> None:
        bell = Bell()
        seen = bell.count
        bell.ring()
        bell.ring()
        assert await bell.wait(seen) == 2
        assert await bell.wait(1) == 2

    run(main)


def test_all_who_wait_are_woken_by_one_ring() -> None:
    async def main() -> None:
        bell = Bell()
        waiting = [asyncio.create_task(bell.wait(0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        bell.ring()
        assert await asyncio.gather(*waiting) == [1, 1, 1]

    run(main)


def test_one_who_gives_up_does_not_disturb_the_others() -> None:
    async def main() -> None:
        bell = Bell()
        one, other = (asyncio.create_task(bell.wait(0)) for _ in range(2))
        await asyncio.sleep(0)
        one.cancel()
        bell.ring()
        assert await other == 1

    run(main)
