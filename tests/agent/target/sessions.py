"""A target of a test's own: its registry, a session, and what is written to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentConfig
from agent.errors import (
    WarmsyncError,
)
from agent.migration import Role
from agent.registry import Registry
from agent.state import State
from agent.target import TargetSession
from native.blockio import BlockDevice
from tests.agent.carriers.rig import frame_of, request
from tests.agent.certificates import signer
from tests.agent.rpc_helpers import run

STEP = 65536
Steps = Callable[[Registry, TargetSession], Coroutine[Any, Any, None]]


def registry_of(directory: Path, *allowed: Path, **settings: Any) -> Registry:
    config = AgentConfig(
        state_dir=str(directory),
        bpffs_dir=str(directory / "bpf"),
        allow_devices=tuple(map(str, allowed)),
        **settings,
    )

    def nobody(address: str) -> Any:
        raise AssertionError("a target calls nobody")

    return Registry(config, nobody, signer(Role.TARGET))


def trial(target: Path, steps: Steps, **settings: Any) -> None:
    async def main() -> None:
        registry = registry_of(target.parent, target, **settings)
        try:
            session = await registry.open_session(request([target]))
            await steps(registry, session)
        finally:
            await registry.close()

    run(main)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(WarmsyncError) as caught:
        call()
    return caught.value.reason


async def refusal(work: Awaitable[Any]) -> str:
    """Return the reason that something waited for is refused with."""
    with pytest.raises(WarmsyncError) as caught:
        await work
    return caught.value.reason


def is_claimed(path: Path) -> bool:
    """Return whether somebody holds a claim on the device."""
    try:
        BlockDevice(str(path), writable=True, exclusive=True).close()
    except OSError:
        return True
    return False


def assert_state(session: TargetSession, state: State) -> None:
    assert session.state is state


async def receive(session: TargetSession, source: Path, generation: int = 1) -> None:
    frame = frame_of(source, 0, STEP, generation=generation)
    assert await session.write(memoryview(frame), 1) == 1
    await session.flush(generation, 1)
