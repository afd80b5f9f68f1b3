"""Leaving the cutover to a person: told only when it holds. What an agent that comes back finds."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from agent.bell import Bell
from agent.errors import ResourceExhausted, WarmsyncError
from agent.hook import Hook, HookRun, no_hook
from agent.migration import Mode, Plan, Step, Volume
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


class Rebooted(Ship):
    """The agent is back after a reboot of its host. Remembers why it stopped."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state
        self.refusal: WarmsyncError | None = None

    def refuse(self, error: WarmsyncError | None) -> None:
        self.refusal = error


COLD = replace(PLAN, cold=True)
AUTO = replace(PLAN, mode=Mode.AUTO)
OFF = [(AUTO, Step.QUIESCING), (AUTO, Step.CUTTING_OVER), (COLD, Step.WAITING)]
REASONS = {AUTO: "HOOK_INTERRUPTED", COLD: "HOST_REBOOTED"}


def since_reboot(ship: Ship, plan: Plan, hook: HookRun, step: Step) -> Autopilot:
    return Autopilot(ship, lambda: plan, hook, dict, step=step, boot_id="now", step_boot_id="then")


def come_back(
    ship: Rebooted, plan: Plan, step: Step, kept: Path, then: State | None = None
) -> Autopilot:
    """Go on after a reboot, whose hook had ended well before it; at last the state is `then`."""
    kept.mkdir()
    (kept / "result").write_text("0\n")
    hook = HookRun(Hook("quiesce", "source", ("true",), 1.0), kept)

    async def main() -> Autopilot:
        pilot = since_reboot(ship, plan, hook, step)
        pilot.start()
        await turn()
        if then is not None:
            assert (pilot.step, pilot.step_boot_id, ship.refusal) == (step, "then", None)
            ship.state = then
            ship.bell.ring()
            await turn()
        await pilot.close()
        return pilot

    found: Autopilot = run(main)
    return found


@pytest.mark.parametrize(("plan", "step"), OFF)
@pytest.mark.parametrize("state", [State.SEEDING, State.CONVERGED, State.PAUSED])
def test_a_vm_that_was_off_before_a_reboot_may_be_on(
    tmp_path: Path, plan: Plan, step: Step, state: State
) -> None:
    ship = Rebooted(state)
    pilot = come_back(ship, plan, step, tmp_path / "kept")
    assert (pilot.step, ship.cutovers) == (Step.STOPPED, 0)
    assert ship.refusal is pilot.stopped
    assert pilot.stopped is not None
    assert pilot.stopped.reason == REASONS[plan]


def test_one_that_was_never_taken_for_off_is_powered_down(tmp_path: Path) -> None:
    ship = Rebooted(State.SYNCING)
    assert come_back(ship, AUTO, Step.WAITING, tmp_path / "kept").step is Step.WAITING
    assert ship.refusal is None


@pytest.mark.parametrize("then", [State.SYNCING, State.CUT_OVER, State.FAILED])
def test_a_target_that_may_own_says_so_before_anything_is_stopped(
    tmp_path: Path, then: State
) -> None:
    """The release was asked for before the reboot: only the target knows who owns."""
    ship = Rebooted(State.CUTTING_OVER)
    pilot = come_back(ship, COLD, Step.CUTTING_OVER, tmp_path / "kept", then)
    steps = {State.SYNCING: Step.STOPPED, State.CUT_OVER: Step.DONE}
    assert pilot.step is steps.get(then, Step.CUTTING_OVER)
    assert (ship.refusal is not None) is (then is State.SYNCING)
    assert ship.cutovers == 0


def test_asked_for_again_after_a_reboot_it_goes_on(tmp_path: Path) -> None:
    """A person has seen that the VM is off."""

    async def main() -> None:
        ship = Rebooted(State.SYNCING)
        pilot = since_reboot(ship, COLD, no_hook(), Step.WAITING)
        pilot.start()
        await turn()
        assert pilot.step is Step.STOPPED
        await pilot.arm()
        await turn()
        assert (pilot.step, pilot.step_boot_id, ship.cutovers) == (Step.DONE, "now", 1)
        await pilot.close()

    run(main)


class Killed(BaseException):
    """The agent is killed at this place."""


class Dying(Ship):
    """Its agent is killed when a step is written down."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.pilot: Autopilot
        self._step = step

    def write_down(self, counted: Mapping[str, float] | None = None) -> None:
        if self.pilot.step is self._step:
            raise Killed


def test_the_end_of_an_earlier_hook_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    """That one ended well, and the cutover was refused; killed before this one has begun."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "result").write_text("0\n")
    hook = HookRun(Hook("quiesce", "source", ("true",), 1.0), kept)

    async def main() -> None:
        ship = Dying(Step.QUIESCING)
        ship.pilot = Autopilot(ship, lambda: AUTO, hook, dict)
        await ship.pilot.arm()
        ship.converge()
        await turn()
        assert ship.pilot.step is Step.QUIESCING
        with pytest.raises(Killed):
            await cast(asyncio.Task[None], ship.pilot._task)
        back = Rebooted(State.CONVERGED)
        pilot = Autopilot(back, lambda: AUTO, hook, dict, step=Step.QUIESCING)
        pilot.start()
        await turn()
        assert (pilot.step, back.cutovers) == (Step.STOPPED, 0)
        assert pilot.stopped is not None
        assert pilot.stopped.reason == "HOOK_INTERRUPTED"
        await pilot.close()

    run(main)
