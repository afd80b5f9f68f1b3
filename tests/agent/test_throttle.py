"""The bandwidth limit, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from agent.throttle import Throttle
from tests.agent.virtual import VirtualLoop, run_virtual

MIB = 1 << 20


def seconds(limit: int, sizes: list[int], idle: float = 0.0) -> float:
    """Return how long sending `sizes` takes, after so long a rest."""

    async def main(loop: VirtualLoop) -> float:
        throttle = Throttle(limit)
        await throttle.spend(1)
        await asyncio.sleep(idle)
        began = loop.time()
        for size in sizes:
            await throttle.spend(size)
        return loop.time() - began

    return float(run_virtual(main))


def test_no_limit_is_no_wait() -> None:
    assert seconds(0, [MIB] * 1000) == 0


@pytest.mark.parametrize("limit", [MIB, 10 * MIB, 1000 * MIB])
@pytest.mark.parametrize("size", [4096, MIB])
def test_the_limit_is_kept(limit: int, size: int) -> None:
    """Over the long run, within a burst of 50 ms."""
    sizes = [size] * max(limit * 3 // size, 4)
    took, fair = seconds(limit, sizes), sum(sizes) / limit
    assert fair - 0.06 <= took <= fair + 0.06


def test_rest_saves_nothing_up() -> None:
    """A source that was idle for a minute may not send a minute's worth at once."""
    assert seconds(MIB, [MIB] * 4, idle=60) >= 4 - 0.06


def test_a_change_is_noticed_by_who_waits() -> None:
    async def main(loop: VirtualLoop) -> None:
        throttle = Throttle(1024)
        waiting = asyncio.create_task(throttle.spend(100 * MIB))  # a day, at this rate
        await asyncio.sleep(1)
        throttle.change(0)
        changed = loop.time()
        await waiting
        assert loop.time() - changed <= 0.051
        assert throttle.limit_bytes_per_second == 0

    run_virtual(main)


def test_an_old_debt_does_not_outlive_its_limit() -> None:
    """What was owed at one rate is not waited for at another."""

    async def main(loop: VirtualLoop) -> None:
        throttle = Throttle(MIB)
        waiting = asyncio.create_task(throttle.spend(100 * MIB))
        await asyncio.sleep(0)
        throttle.change(2 * MIB)
        changed = loop.time()
        await waiting
        assert loop.time() - changed <= 0.051
        throttle.change(MIB)
        began = loop.time()
        for _ in range(3):
            await throttle.spend(MIB)
        assert loop.time() - began >= 3 - 0.06

    run_virtual(main)


def test_two_share_one_limit() -> None:
    async def main(loop: VirtualLoop) -> float:
        throttle = Throttle(MIB)
        began = loop.time()

        async def sender() -> None:
            for _ in range(4):
                await throttle.spend(MIB // 2)

        await asyncio.gather(sender(), sender())
        return loop.time() - began

    assert run_virtual(main) >= 4 - 0.06
