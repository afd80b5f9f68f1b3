"""The boot of a released session, and what may not happen beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.config import HooksConfig
from agent.hook import Hook, HookRun
from agent.registry import Registry
from agent.state import State
from agent.target import TargetSession, new_session
from agent.target.booting import Booting
from agent.target.claim import open_devices
from native.blockio import BlockDevice
from tests.agent.carriers.rig import request
from tests.agent.certificates import hand_over
from tests.agent.target.sessions import Steps, assert_state, receive, refusal, trial


def boots(target: Path) -> int:
    """Return how often the hook was begun."""
    calls = target.with_name("calls")
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def trial_with_hook(source: Path, target: Path, steps: Steps) -> None:
    """Run steps on a session that was handed over, on a host that has a boot hook."""
    hook = target.with_name("boot")
    hook.write_text(f"#!/bin/sh\necho booted >> {target.with_name('calls')}\n")
    hook.chmod(0o755)

    async def released(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await receive(session, source)
        await hand_over(session, 1)
        await steps(registry, session)

    trial(target, released, hooks=HooksConfig(boot=(str(hook),)))


class Killed(BaseException):
    """The agent is killed at this place."""


class Door:
    """Where the devices are looked at for a rollback; it opens when the test says so."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()


@contextmanager
def held_at_the_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    door = Door()

    def slow(*arguments: Any) -> Any:
        door.reached.set()
        assert door.open.wait(20)
        return open_devices(*arguments)

    monkeypatch.setattr("agent.target.open_devices", slow)
    try:
        yield door
    finally:
        door.open.set()


async def beside_a_rollback(session: TargetSession, target: Path, door: Door) -> list[Any]:
    """Ask for a boot while the devices are looked at for a rollback; return what came of both."""
    reclaiming = asyncio.ensure_future(session.reclaim((str(target),)))
    assert await asyncio.to_thread(door.reached.wait, 20)
    booting = asyncio.ensure_future(session.boot(1))
    await asyncio.sleep(0.5)  # a hook that ran would have ended by then
    door.open.set()
    return list(await asyncio.gather(reclaiming, booting, return_exceptions=True))


def test_what_is_being_taken_back_is_not_booted(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source lifts its fence next: a VM that runs here by then would be there twice."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        with held_at_the_devices(monkeypatch) as door:
            reclaimed, booted = await beside_a_rollback(session, target, door)
        assert (reclaimed, getattr(booted, "reason", booted)) == (None, "NOT_BOOTABLE")
        assert_state(session, State.ROLLED_BACK)
        assert boots(target) == 0

    trial_with_hook(source, target, steps)


def test_a_rollback_that_is_refused_keeps_no_boot_away(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        with (
            held_at_the_devices(monkeypatch) as door,
            BlockDevice(str(target), writable=True, exclusive=True),
        ):
            reclaimed, booted = await beside_a_rollback(session, target, door)
        assert (reclaimed.reason, booted > 0) == ("DEVICE_IN_USE", True)
        assert_state(session, State.CUT_OVER)
        assert boots(target) == 1

    trial_with_hook(source, target, steps)


def test_what_is_about_to_be_booted_is_not_taken_back(source: Path, target: Path) -> None:
    """Its hook does not run yet: the next turn of the loop starts it."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        booting = asyncio.ensure_future(session.boot(1))
        await asyncio.sleep(0)
        assert boots(target) == 0
        assert await refusal(session.reclaim((str(target),))) == "BOOT_UNDER_WAY"
        assert_state(session, State.CUT_OVER)
        assert await booting > 0
        assert boots(target) == 1

    trial_with_hook(source, target, steps)


def test_the_end_of_an_earlier_attempt_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """The agent is killed once the second attempt is written down, before its hook has begun."""
    run = HookRun(Hook("boot", "target", ("/bin/true",), 5.0), tmp_path / "kept")
    record = new_session(request([tmp_path / "target"]))

    async def first() -> float:
        booting = Booting(run, {}, lambda seconds: None, record)
        booting.begin(1)
        return await booting.result()

    def die(seconds: float | None) -> None:
        raise Killed

    async def second() -> None:
        with pytest.raises(Killed):
            Booting(run, {}, die, replace(record, boot_attempt=1, boot_seconds=0.1)).begin(2)
        back = Booting(run, {}, lambda seconds: None, replace(record, boot_attempt=2))
        back.begin(2)
        assert await refusal(back.result()) == "HOOK_INTERRUPTED"

    assert asyncio.run(first()) > 0
    asyncio.run(second())
