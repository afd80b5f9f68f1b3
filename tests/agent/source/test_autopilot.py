"""Leaving the cutover to a person: told only when it holds. What an agent that comes back finds."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.bell import Bell
from agent.errors import ResourceExhausted, WarmsyncError
from agent.hook import Hook, HookRun, no_hook
from agent.migration import Plan, Step, Volume
from agent.source.autopilot import Autopilot
from agent.state import State
from tests.agent.ends import until
from tests.agent.rpc_helpers import run


class Ship:
    """A migration that is not converged yet; remembers what was done with it."""

    def __init__(self) -> None:
        self.bell = Bell()
        self.state = State.SYNCING
        self.cutovers = 0
        self.off_for: list[float] = []
        """How long the VM had been off at each cutover."""
        self.full: ResourceExhausted | None = None

    async def hand_over(self, asked_seconds: float) -> None:
        self.cutovers += 1
        self.off_for.append(time.monotonic() - asked_seconds)
        self.state = State.CUT_OVER

    async def boot(self, attempt: int) -> float:
        raise AssertionError("it has no boot hook")

    def note_hook(self, **seconds: float) -> None:
        raise AssertionError("it has no hooks")

    def refuse(self, error: WarmsyncError | None) -> None:
        raise AssertionError(f"nothing stops it: {error}")

    def write_down(self, counted: Mapping[str, float] | None = None) -> None:
        if self.full is not None:
            raise self.full

    def converge(self) -> None:
        self.state = State.CONVERGED
        self.bell.ring()


PLAN = Plan("web1", "target:7070", (Volume("/src", "/dst"),))
HOUR = 3600.0


def fly(steps: Callable[[Ship, Autopilot], Coroutine[Any, Any, None]]) -> None:
    """Run steps with an autopilot that waits for its migration to converge."""

    async def main() -> None:
        ship = Ship()
        pilot = Autopilot(ship, lambda: PLAN, no_hook(), dict)
        await pilot.arm()
        await turn()
        try:
            await steps(ship, pilot)
        finally:
            await pilot.close()

    run(main)


async def turn() -> None:
    """Let all tasks run until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_armed_it_cuts_over() -> None:
    async def steps(ship: Ship, pilot: Autopilot) -> None:
        ship.converge()
        await turn()
        assert (pilot.step, ship.cutovers) == (Step.DONE, 1)

    fly(steps)


def test_disarmed_it_does_not() -> None:
    async def steps(ship: Ship, pilot: Autopilot) -> None:
        await pilot.disarm()
        ship.converge()
        await turn()
        assert (pilot.step, ship.cutovers) == (Step.NONE, 0)

    fly(steps)


def test_a_disarming_that_is_cancelled() -> None:
    """It shows what is so: either it waits, and will cut over, or it does neither."""

    async def steps(ship: Ship, pilot: Autopilot) -> None:
        disarming = asyncio.ensure_future(pilot.disarm())
        await asyncio.sleep(0)
        disarming.cancel()
        await asyncio.wait([disarming])
        shown = pilot.step
        ship.converge()
        await turn()
        assert ship.cutovers == (shown is Step.WAITING)

    fly(steps)


def test_a_disarming_that_is_not_written_down_is_none() -> None:
    async def steps(ship: Ship, pilot: Autopilot) -> None:
        ship.full = ResourceExhausted("STATE_NOT_KEPT", "no space left")
        with pytest.raises(ResourceExhausted):
            await pilot.disarm()
        assert pilot.step is Step.WAITING
        ship.full = None
        ship.converge()
        await turn()
        assert (pilot.step, ship.cutovers) == (Step.DONE, 1)

    fly(steps)


def fly_on(
    hook: HookRun, step: Step, off_at_seconds: float | None = None
) -> tuple[Ship, Autopilot]:
    """Go on with what the agent before this one wrote down, until it has cut over."""

    async def main() -> tuple[Ship, Autopilot]:
        ship = Ship()
        pilot = Autopilot(ship, lambda: PLAN, hook, dict, step=step, off_at_seconds=off_at_seconds)
        pilot.start()
        ship.converge()
        await until(ship.bell, lambda: pilot.step is Step.DONE)
        await pilot.close()
        return ship, pilot

    found: tuple[Ship, Autopilot] = run(main)
    return found


def test_the_vm_was_off_while_the_agent_was_away() -> None:
    ship, _ = fly_on(no_hook(), Step.CUTTING_OVER, time.time() - HOUR)
    assert HOUR <= ship.off_for[0] < 2 * HOUR


def test_a_clock_that_was_set_back_makes_no_time_negative() -> None:
    ship, _ = fly_on(no_hook(), Step.CUTTING_OVER, time.time() + HOUR)
    assert 0 <= ship.off_for[0] < HOUR


def test_the_vm_is_off_since_the_end_of_the_hook(tmp_path: Path) -> None:
    """Not since the agent came back and found that it had ended; and that is written down."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "result").write_text("0\n")
    ended = time.time() - HOUR
    os.utime(kept / "result", (ended, ended))
    ship, pilot = fly_on(HookRun(Hook("quiesce", "source", ("true",), 1.0), kept), Step.QUIESCING)
    assert HOUR <= ship.off_for[0] < 2 * HOUR
    assert pilot.off_at_seconds == pytest.approx(ended)
