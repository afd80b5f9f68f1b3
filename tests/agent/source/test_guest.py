"""When the guest's limit comes and goes; and that of a migration, in every way that it may end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from agent.brake import Brake
from agent.errors import DataLoss, FailedPrecondition, Unavailable
from agent.migration import GuestThrottle, Plan
from agent.rounds import Convergence, Verdict
from agent.source import SourceMigration
from agent.source.guest import Guest
from agent.state import State
from tests.agent.ends import Source, source, until
from tests.agent.rpc_helpers import run
from tests.agent.simulation import MIB
from tests.agent.test_easing import CALM, STALLED

PLAN = Plan("web1", "peer", (), guest_throttle=GuestThrottle("/cgroup", MIB))
BUDGET = 0.5


class FakeBrake:
    """Remembers what it was told. `gate` holds a limit up; `errors` are raised in turn."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.errors: dict[str, list[OSError]] = {"limit": [], "lift": []}
        self.on = 0

    def limit(self, bytes_per_second: int) -> None:
        self.entered.set()
        self.gate.wait()
        self._tell("limit", bytes_per_second)

    def lift(self) -> None:
        self._tell("lift", 0)

    def _tell(self, call: str, limit: int) -> None:
        if self.errors[call]:
            raise self.errors[call].pop(0)
        if limit or self.on:
            self.calls.append(limit)
        self.on = limit


@pytest.fixture
def brake() -> FakeBrake:
    return FakeBrake()


class Shown:
    def __init__(self) -> None:
        self.limits: list[int] = []

    def __call__(self, *, guest_limit_bytes_per_second: int) -> None:
        self.limits.append(guest_limit_bytes_per_second)


def trial(
    brake: FakeBrake | None, steps: Callable[[Guest, Shown], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        shown = Shown()
        await steps(Guest(cast(Brake, brake), PLAN, shown), shown)

    run(main)


def test_on_at_a_stall_and_off_at_the_end(brake: FakeBrake) -> None:
    async def steps(guest: Guest, shown: Shown) -> None:
        await guest.ease(CALM, BUDGET)
        assert brake.calls == []
        await guest.ease(STALLED, BUDGET)
        await guest.ease(CALM, BUDGET)
        assert (brake.calls, shown.limits) == ([40 * MIB], [40 * MIB])
        await guest.release()
        await guest.release()
        assert (brake.calls, shown.limits) == ([40 * MIB, 0], [40 * MIB, 0])

    trial(brake, steps)


def test_without_a_brake_nothing_happens() -> None:
    async def steps(guest: Guest, shown: Shown) -> None:
        await guest.ease(STALLED, BUDGET)
        guest.let_go()
        await guest.release()
        assert shown.limits == []

    trial(None, steps)


def test_a_refused_cutover_puts_the_limit_back_and_a_pause_does_not(brake: FakeBrake) -> None:
    async def steps(guest: Guest, shown: Shown) -> None:
        await guest.ease(STALLED, BUDGET)
        await guest.release()
        await guest.ease(CALM, BUDGET)
        assert brake.calls == [40 * MIB, 0, 40 * MIB]
        guest.let_go()
        await guest.ease(CALM, BUDGET)  # in the order asked for
        await guest.release()
        await guest.ease(CALM, BUDGET)
        assert brake.calls == [40 * MIB, 0, 40 * MIB, 0]
        assert shown.limits == brake.calls

    trial(brake, steps)


def test_a_limit_never_outruns_its_lifting(brake: FakeBrake) -> None:
    """Cancelled in the middle of setting it: set it is, then lifted."""

    async def steps(guest: Guest, shown: Shown) -> None:
        brake.gate.clear()
        easing = asyncio.create_task(guest.ease(STALLED, BUDGET))
        await asyncio.to_thread(brake.entered.wait)
        easing.cancel()
        release = asyncio.create_task(guest.release())
        await asyncio.sleep(0.05)
        early = easing.done() or release.done()
        brake.gate.set()  # before anything may fail: a thread waits for it
        await release
        assert not early
        assert easing.cancelled()
        assert brake.calls == [40 * MIB, 0]

    trial(brake, steps)


def test_a_guest_that_cannot_be_slowed_is_moved_as_it_is(
    brake: FakeBrake, caplog: pytest.LogCaptureFixture
) -> None:
    async def steps(guest: Guest, shown: Shown) -> None:
        brake.errors["limit"] = [OSError(2, "No such file or directory")]
        await guest.ease(STALLED, BUDGET)
        await guest.ease(STALLED, BUDGET)
        assert (brake.calls, shown.limits) == ([], [])
        assert caplog.text.count("not throttled any more id=web1") == 1

    trial(brake, steps)


def test_a_lifting_that_fails_is_said_and_tried_again(
    brake: FakeBrake, caplog: pytest.LogCaptureFixture
) -> None:
    async def steps(guest: Guest, shown: Shown) -> None:
        await guest.ease(STALLED, BUDGET)
        brake.errors["lift"] = [PermissionError(13, "Permission denied")]
        await guest.release()
        assert "guest still throttled id=web1" in caplog.text
        assert shown.limits == [40 * MIB]
        await guest.release()
        assert shown.limits == [40 * MIB, 0]

    trial(brake, steps)


# In a migration.


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    with source(tmp_path, monkeypatch) as made:
        made.plan = replace(made.plan, guest_throttle=PLAN.guest_throttle)
        yield made


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """The verdict that every look gives: the last of the list."""
    verdicts = [STALLED]
    monkeypatch.setattr(Convergence, "look", lambda *_, **__: verdicts[-1])
    return verdicts


CONVERGED = replace(CALM, converged=True, within_budget=True)


def migrate(
    end: Source, brake: FakeBrake, steps: Callable[[SourceMigration], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        migration = end.migration(cast(Brake, brake))
        migration.start()
        await until(migration.bell, lambda: brake.on > 0 and limit_of(migration) == brake.on)
        assert migration.state is State.SYNCING
        await steps(migration)
        if not migration.state.is_terminal:
            await migration.close(Unavailable("AGENT_STOPPED", "the agent stops"))
        assert brake.on == 0
        assert limit_of(migration) == 0

    run(main)


def limit_of(migration: SourceMigration) -> int:
    return migration.snapshot().progress.guest_limit_bytes_per_second


@pytest.mark.usefixtures("stalled")
def test_a_pause_lifts_it_and_a_stall_afterwards_sets_it_again(
    end: Source, brake: FakeBrake
) -> None:
    async def steps(migration: SourceMigration) -> None:
        migration.pause()
        await until(migration.bell, lambda: limit_of(migration) == 0)
        assert brake.on == 0
        migration.resume()
        await until(migration.bell, lambda: limit_of(migration) == 40 * MIB)

    migrate(end, brake, steps)


@pytest.mark.usefixtures("stalled")
def test_a_pause_during_a_take_is_not_followed_by_a_limit(end: Source, brake: FakeBrake) -> None:
    async def steps(migration: SourceMigration) -> None:
        for _ in range(20):
            migration.pause()
            assert migration._guest._letting_go is not None
            await migration._guest._letting_go
            await asyncio.sleep(0.01)
            assert brake.on == 0
            migration.resume()
            await asyncio.sleep(0.005)

    migrate(end, brake, steps)


def test_it_stays_while_converged_and_goes_before_the_last_take(
    end: Source, brake: FakeBrake, stalled: list[Verdict]
) -> None:
    async def steps(migration: SourceMigration) -> None:
        stalled.append(CONVERGED)
        await until(migration.bell, lambda: migration.state is State.CONVERGED)
        await asyncio.sleep(0.2)
        assert brake.on == 40 * MIB
        on: list[int] = []
        take = end.trackers[0].take
        end.trackers[0].take = lambda into: on.append(brake.on) or take(into)  # type: ignore
        await migration.cut_over(force=False)
        assert on[-1] == 0
        assert brake.on == 0
        await migration.finish()

    migrate(end, brake, steps)


def test_a_refused_cutover_slows_the_guest_again(
    end: Source, brake: FakeBrake, stalled: list[Verdict]
) -> None:
    async def steps(migration: SourceMigration) -> None:
        stalled.append(CALM)
        look = end.trackers[0].look
        end.trackers[0].look = lambda: 4096  # type: ignore[method-assign]
        with pytest.raises(FailedPrecondition, match="still in use"):
            await migration.cut_over(force=True)
        end.trackers[0].look = look  # type: ignore[method-assign]
        await until(migration.bell, lambda: limit_of(migration) > 0)
        assert brake.calls == [40 * MIB, 0, 40 * MIB]
        await migration.cut_over(force=True)
        await migration.roll_back()

    migrate(end, brake, steps)


@pytest.mark.usefixtures("stalled")
def test_cancelled(end: Source, brake: FakeBrake) -> None:
    async def steps(migration: SourceMigration) -> None:
        lifted: list[bool] = []
        end.peer.before["abort"] = lambda: lifted.append(brake.on == 0)
        await migration.cancel()
        assert lifted == [True]  # the target may be long in answering

    migrate(end, brake, steps)


@pytest.mark.usefixtures("stalled")
def test_failed(end: Source, brake: FakeBrake) -> None:
    async def steps(migration: SourceMigration) -> None:
        end.carrier.failure = DataLoss("ODD", "something that nothing mends")
        await until(migration.bell, lambda: migration.state is State.FAILED)
        assert migration._task is not None
        await migration._task

    migrate(end, brake, steps)


@pytest.mark.usefixtures("stalled")
def test_the_agent_stops(end: Source, brake: FakeBrake) -> None:
    async def steps(migration: SourceMigration) -> None:
        await migration.close(Unavailable("AGENT_STOPPED", "the agent stops"))

    migrate(end, brake, steps)
