"""The source's end: commands in every state, and how it ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from agent.journal import Journal
from agent.migration import Mode, Owner, Step
from agent.record import load_source
from agent.rounds import Convergence
from agent.source import SourceMigration
from agent.state import State
from tests.agent.ends import SIZE, Source, until
from tests.agent.migrations import (
    LOST,
    STOPPED,
    assert_given_up,
    assert_state,
    keep_journal,
    maybe,
    reach,
    trial,
)


def assert_step(migration: SourceMigration, step: Step) -> None:
    assert migration.snapshot().step is step


def test_from_the_first_byte_to_the_end(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.SYNCING)
        end.write(4096, b"changed")
        end.write(SIZE - 1, b"!", volume=1)
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        assert_state(migration, State.CUT_OVER)
        assert end.equal()
        assert end.is_fenced()
        assert all(tracker.stopped for tracker in end.trackers)
        progress = migration.snapshot().progress
        assert progress.downtime_seconds is not None
        assert progress.rounds >= 2
        assert progress.total_bytes == 2 * SIZE
        await migration.finish()
        assert_state(migration, State.COMPLETED)
        assert end.is_fenced()
        assert end.peer.calls[-2:] == ["finish", "close"]
        assert not end.is_open()

    trial(end, steps)


def test_roll_back_takes_the_target_before_it_lifts_the_fence(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        fenced: list[bool] = []
        end.peer.before["reclaim"] = lambda: fenced.append(end.is_fenced())
        end.peer.errors["reclaim"] = [FailedPrecondition("DEVICE_IN_USE", "a VM runs there")]
        with pytest.raises(FailedPrecondition, match="a VM runs there"):
            await migration.roll_back()
        assert_state(migration, State.CUT_OVER)
        assert end.is_fenced()
        await migration.roll_back()
        assert fenced == [True]
        assert_state(migration, State.ROLLED_BACK)
        assert not end.is_fenced()
        assert not end.is_open()

    trial(end, steps)


def test_what_the_agents_are_booting_is_not_rolled_back(end: Source) -> None:
    """Refused before the target is asked; the boot goes on, and then it can be."""
    end.plan = replace(end.plan, cold=True, mode=Mode.AUTO)
    end.peer.gates["boot"] = asyncio.Event()

    async def steps(migration: SourceMigration) -> None:
        await end.peer.until("boot 1")
        with pytest.raises(FailedPrecondition) as caught:
            await migration.roll_back()
        assert caught.value.reason == "CUTOVER_UNDER_WAY"
        assert "reclaim" not in end.peer.calls
        assert_step(migration, Step.BOOTING)
        assert end.is_fenced()
        end.peer.gates["boot"].set()
        await until(migration.bell, lambda: migration.snapshot().step is Step.DONE)
        await migration.roll_back()
        assert_state(migration, State.ROLLED_BACK)
        assert not end.is_fenced()

    trial(end, steps)


def test_what_is_being_rolled_back_is_not_booted_anew(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        end.peer.gates["reclaim"] = asyncio.Event()
        rollback = asyncio.create_task(migration.roll_back())
        await end.peer.until("reclaim")
        arming = asyncio.create_task(migration.set_mode(Mode.AUTO))
        await end.peer.until("boot 0")
        end.peer.gates["reclaim"].set()
        await rollback
        with pytest.raises(FailedPrecondition) as caught:
            await arming
        assert caught.value.reason == "ILLEGAL_TRANSITION"
        assert "boot 1" not in end.peer.calls
        assert_step(migration, Step.NONE)

    trial(end, steps)


def boots(end: Source) -> list[str]:
    """Return the attempts at a boot; 0 only asks for the hook."""
    return [call for call in end.peer.calls if call.startswith("boot ") and call != "boot 0"]


@pytest.mark.parametrize("when", ["it waits", "it cuts over", "it is done"])
def test_a_cold_one_is_booted_if_that_is_asked_for_later(
    end: Source, tmp_path: Path, when: str
) -> None:
    end.plan = replace(end.plan, cold=True)
    end.journal = Journal(tmp_path / "state")

    async def done(migration: SourceMigration) -> None:
        await until(migration.bell, lambda: migration.snapshot().step is Step.DONE)

    async def steps(migration: SourceMigration) -> None:
        gate = asyncio.Event()
        if when == "it waits":
            end.carrier.gates["send"] = gate
            await end.carrier.until("send")
            assert_step(migration, Step.WAITING)
        elif when == "it cuts over":
            end.peer.gates["release"] = gate
            await end.peer.until("release")
            assert_step(migration, Step.CUTTING_OVER)
        else:
            await done(migration)
            assert boots(end) == []
        await migration.set_mode(Mode.AUTO)
        [(_, _, values)] = end.journal.load()
        assert load_source(values).plan.mode is Mode.AUTO
        gate.set()
        await end.peer.until("boot 1")
        await done(migration)
        await migration.set_mode(Mode.AUTO)  # what was booted is not booted again
        await done(migration)
        assert boots(end) == ["boot 1"]
        assert_state(migration, State.CUT_OVER)
        assert end.equal()

    trial(end, steps)


def test_a_boot_that_is_not_written_down_is_not_asked_for(end: Source, tmp_path: Path) -> None:
    end.plan = replace(end.plan, cold=True)
    fill = keep_journal(end, tmp_path / "state")

    async def steps(migration: SourceMigration) -> None:
        gate = end.carrier.hold("send")
        await end.carrier.until("send")
        fill(True)
        with pytest.raises(ResourceExhausted):
            await migration.set_mode(Mode.AUTO)
        fill(False)
        assert migration.snapshot().plan.mode is Mode.MANUAL
        gate.set()
        await until(migration.bell, lambda: migration.snapshot().step is Step.DONE)
        fill(True)
        with pytest.raises(ResourceExhausted):
            await migration.set_mode(Mode.AUTO)
        fill(False)
        assert boots(end) == []
        await migration.set_mode(Mode.AUTO)
        await until(migration.bell, lambda: migration.snapshot().step is Step.DONE)
        assert boots(end) == ["boot 1"]
        assert end.equal()

    trial(end, steps)


def test_commands_that_make_no_sense_change_nothing(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        gate = end.carrier.hold("send")
        await end.carrier.until("send")
        for command in (migration.resume, migration.roll_back, migration.finish):
            with pytest.raises(FailedPrecondition) as caught:
                await maybe(command)
            assert caught.value.reason == "ILLEGAL_TRANSITION"
        with pytest.raises(FailedPrecondition) as caught:
            await migration.cut_over(force=False)
        assert caught.value.reason == "NOT_CONVERGED"
        assert_state(migration, State.SEEDING)
        gate.set()
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        for late in (migration.pause, migration.resume):
            with pytest.raises(FailedPrecondition):
                late()
        with pytest.raises(FailedPrecondition):
            await migration.cancel()
        with pytest.raises(FailedPrecondition):
            migration.update(1 << 20, None)
        assert_state(migration, State.CUT_OVER)

    trial(end, steps)


def test_update_while_running(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.SYNCING)
        migration.update(1 << 20, None)
        migration.update(None, 2.5)
        plan = migration.snapshot().plan
        assert (plan.limit_bytes_per_second, plan.max_downtime_seconds) == (1 << 20, 2.5)
        assert migration._sender.throttle.limit_bytes_per_second == 1 << 20
        for limit, budget in ((-1, None), (5, 0.0), (5, float("nan"))):
            with pytest.raises(InvalidArgument):
                migration.update(limit, budget)
        # Refused as a whole.
        assert migration.snapshot().plan == plan
        migration.update(0, None)
        assert migration.snapshot().plan.limit_bytes_per_second == 0

    trial(end, steps)


def test_a_pause_holds_the_round_and_resume_goes_on(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        migration.pause() if migration.state is State.SEEDING else None
        gate = end.carrier.hold("send")
        await end.carrier.until("send")
        migration.pause()
        gate.set()
        sent = len(end.carrier.events)
        for _ in range(50):
            await asyncio.sleep(0)
        assert_state(migration, State.PAUSED)
        assert len(end.carrier.events) <= sent + 1
        end.write(0, b"written during the pause")
        migration.resume()
        assert_state(migration, State.SEEDING)
        await reach(migration, State.CONVERGED)
        migration.pause()
        migration.resume()
        assert_state(migration, State.SYNCING)  # convergence must be shown again
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        assert end.equal()

    trial(end, steps)


def test_resume_and_pause_in_one_breath(end: Source) -> None:
    """The migration has not had its turn between the two: it is still paused."""

    async def steps(migration: SourceMigration) -> None:
        gate = end.carrier.hold("flush 1")
        await end.carrier.until("flush 1")
        migration.pause()
        gate.set()
        for _ in range(20):
            await asyncio.sleep(0)
        migration.resume()
        migration.pause()
        for _ in range(20):
            await asyncio.sleep(0)
        assert_state(migration, State.PAUSED)
        migration.resume()
        await reach(migration, State.CONVERGED)

    trial(end, steps)


def test_cancel_while_paused(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.SYNCING)
        migration.pause()
        await migration.cancel()
        assert_state(migration, State.CANCELLED)
        assert_given_up(end, cancelled=True)

    trial(end, steps)


@pytest.mark.parametrize("event", ["send", "flush 1"])
def test_cancel_in_a_round(end: Source, event: str) -> None:
    async def steps(migration: SourceMigration) -> None:
        end.carrier.hold(event)
        await end.carrier.until(event)
        await migration.cancel()
        assert_state(migration, State.CANCELLED)
        assert_given_up(end, cancelled=True)

    trial(end, steps)


def test_cancel_when_the_target_does_not_answer(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.SYNCING)
        end.peer.errors["abort"] = [LOST]
        await migration.cancel()
        assert_state(migration, State.CANCELLED)
        assert_given_up(end, cancelled=True)

    trial(end, steps)


@pytest.mark.parametrize("state", [State.SEEDING, State.CONVERGED, State.CUT_OVER])
def test_the_agent_stops(end: Source, state: State) -> None:
    async def steps(migration: SourceMigration) -> None:
        if state is State.SEEDING:
            end.carrier.hold("send")
            await end.carrier.until("send")
        else:
            await reach(migration, State.CONVERGED)
        if state is State.CUT_OVER:
            await migration.cut_over(force=False)
        await migration.close(STOPPED)
        assert not end.is_open()
        assert_state(migration, state)
        assert end.is_fenced() is (state is State.CUT_OVER)
        assert not any(call.startswith("abort") for call in end.peer.calls)
        if state is not State.CUT_OVER:
            assert not any(tracker.stopped for tracker in end.trackers)

    trial(end, steps)


def test_the_agent_stops_in_the_moment_a_rest_is_over(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest's own timeout has cancelled the task; that must not pass for the stop."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        closings: list[asyncio.Task[None]] = []
        begun = asyncio.Event()

        def wait_seconds(*_: float) -> float:
            if not closings:
                # In the turn in which the timeout cancels, so that the stop comes before what it
                # cancelled wakes up.
                asyncio.get_running_loop().call_soon(close)
            return 0.0

        def close() -> None:
            closings.append(asyncio.create_task(migration.close(STOPPED)))
            begun.set()

        monkeypatch.setattr(Convergence, "wait_seconds", wait_seconds)
        migration.update(None, 1.0)  # wakes it
        async with asyncio.timeout(10):
            await begun.wait()
            await closings[0]
        assert not end.is_open()

    trial(end, steps)


def test_an_agent_that_stops_takes_no_commands(end: Source) -> None:
    """The disks are let go, the connection is closed: neither says anything of the migration."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        await migration.close(STOPPED)
        for command in (
            migration.cancel(),
            migration.finish(),
            migration.roll_back(),
            migration.settle(Owner.SOURCE),
            anext(migration.verify()),
        ):
            with pytest.raises(Unavailable) as caught:
                await command
            assert caught.value is STOPPED
        assert_state(migration, State.CUT_OVER)
        assert end.is_fenced()

    trial(end, steps)
