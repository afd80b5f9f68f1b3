"""Work that meets the end of its session's devices: its source tries again, or is told why."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.errors import FailedPrecondition
from agent.migration import Depth, Volume
from agent.reader import DIGEST_STEP_BYTES
from agent.registry import Registry
from agent.target import TargetSession
from agent.target.holding import Holding
from tests.agent.carriers.rig import frame_of, request
from tests.agent.migrations import throw
from tests.agent.rpc_helpers import run
from tests.agent.target.sessions import STEP, receive, refusal, registry_of, trial
from tests.content import read_all


@asynccontextmanager
async def busy(registry: Registry) -> AsyncIterator[None]:
    """All threads of the agent are at work: what is asked of a disk has to wait."""
    gate, threads = threading.Event(), registry.workshop.threads
    waiting = [threads.submit(gate.wait, 20) for _ in range(registry.config.transfer.threads)]
    try:
        yield
    finally:
        gate.set()
        await asyncio.gather(*map(asyncio.wrap_future, waiting))


async def all_digests(session: TargetSession) -> list[tuple[int, bytes]]:
    return [item async for item in session.digests(0)]


Ask = Callable[[TargetSession], Awaitable[Any]]


@pytest.mark.parametrize(
    "ask", [lambda session: session.flush(2, 1), all_digests], ids=["flush", "digests"]
)
def test_what_is_queued_when_the_agent_stops(source: Path, target: Path, ask: Ask) -> None:
    """An internal error would end the migration, by a mere upgrade of this agent."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await receive(session, source)
        frame = frame_of(source, STEP, STEP, generation=2)
        await session.write(memoryview(frame), 1)
        async with busy(registry):
            asked = asyncio.ensure_future(ask(session))
            await asyncio.sleep(0)
            session.close()
        assert await refusal(asked) == "SESSION_NOT_OPEN"
        assert session.snapshot().error is None
        assert read_all(target)[: 2 * STEP] == read_all(source)[: 2 * STEP]

    trial(target, steps)


def test_a_file_whose_server_has_gone_is_an_error_of_the_disk(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is the first that is asked for. The source pauses then."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await session.write(memoryview(frame_of(source, 0, STEP)), 1)
        gone = OSError(errno.ENOTCONN, "not connected", str(target))
        with monkeypatch.context() as broken:
            broken.setattr(Holding, "check_sizes", lambda holding: throw(gone))
            assert await refusal(session.flush(1, 1)) == "TARGET_IO_ERROR"
        await session.flush(1, 1)
        assert read_all(target)[:STEP] == read_all(source)[:STEP]

    trial(target, steps)


def test_a_disk_that_has_gone_before_it_is_compared(target: Path) -> None:
    away = target.with_suffix(".away")

    async def steps(registry: Registry, session: TargetSession) -> None:
        os.rename(target, away)
        assert await refusal(all_digests(session)) == "TARGET_IO_ERROR"
        os.rename(away, target)
        assert await all_digests(session)

    trial(target, steps)


def test_a_comparison_that_meets_the_end_of_its_session(target: Path) -> None:
    """Given up by its operator meanwhile."""

    async def main() -> None:
        registry = registry_of(target.parent, target)
        try:
            session = await registry.open_session(request([target], verify=Depth.FULL))
            async with busy(registry):
                asked = asyncio.ensure_future(all_digests(session))
                await asyncio.sleep(0.1)
                session.abandon()
            with pytest.raises(FailedPrecondition) as caught:
                await asked
            assert caught.value.reason == "SESSION_NOT_OPEN"
        finally:
            await registry.close()

    run(main)


@pytest.mark.parametrize("verify", [Depth.FULL, Depth.NONE])
def test_a_comparison_that_is_half_done_at_the_end_of_its_session(
    target: Path, verify: Depth
) -> None:
    async def main() -> None:
        size = 4 * DIGEST_STEP_BYTES
        with target.open("r+b") as file:
            file.truncate(size)
        registry = registry_of(target.parent, target)
        volumes = (Volume("/src/0", str(target), size, 4096),)
        try:
            session = await registry.open_session(request([target], verify=verify, volumes=volumes))
            steps = session.digests(0)
            await anext(steps)
            session.abandon()
            # Its own descriptor reads on; what was read is entered nowhere any more.
            assert [offset async for offset, _ in steps] == [n * size // 4 for n in (1, 2, 3)]
        finally:
            await registry.close()

    run(main)
