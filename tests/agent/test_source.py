"""The source's end: commands in every state, and failure in every phase."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import cutover as cutover_module
from agent import source as source_module
from agent.errors import (
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from agent.errors import WarmsyncError as Error
from agent.source import SourceMigration
from agent.state import Event, State
from native.chunk import digests
from tests.agent.ends import SIZE, Source, source, until
from tests.agent.rpc_helpers import run

LOST = Unavailable("PEER_LOST", "the network went away")
STOPPED = Unavailable("AGENT_STOPPED", "the agent stops")


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    with source(tmp_path, monkeypatch, volumes=2) as made:
        yield made


async def reach(migration: SourceMigration, state: State) -> None:
    await until(migration.bell, lambda: migration.state is state)


async def ended(migration: SourceMigration) -> None:
    """Wait for the last ring: everything is closed by then."""
    await until(migration.bell, lambda: migration.state.is_terminal)
    task = migration._task
    assert task is not None
    await asyncio.wait([task])


async def maybe(command: Callable[[], Any]) -> None:
    """Call a command, which may be a coroutine."""
    if asyncio.iscoroutine(answer := command()):
        await answer


def assert_state(migration: SourceMigration, state: State) -> None:
    assert migration.state is state


def assert_given_up(end: Source, *, cancelled: bool = False) -> None:
    """The source is as it was found, and the target knows."""
    assert not end.is_fenced()
    assert all(tracker.stopped for tracker in end.trackers)
    assert not end.is_open()
    assert end.carrier.closed or end.carrier.events == []
    assert end.peer.calls[-1] == "close"
    assert end.peer.calls[-2].startswith("abort cancelled" if cancelled else "abort failed")


def trial(end: Source, steps: Callable[[SourceMigration], Coroutine[Any, Any, None]]) -> None:
    """Run `steps(migration)` on a migration that has started."""

    async def main() -> None:
        migration = end.migration()
        migration.start()
        await steps(migration)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert {repr(task) for task in left if task is not migration._task} == set()
        if not migration.state.is_terminal:
            await migration.close(STOPPED)

    run(main)


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


def test_a_cutover_waits_a_moment_for_what_was_converged_before(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        migration._move(Event.DIVERGE)
        await migration.cut_over(force=False)
        assert_state(migration, State.CUT_OVER)

    trial(end, steps)


def test_a_cutover_of_what_does_not_converge_again_is_refused(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "RECONVERGE_SECONDS", 0.05)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        async with migration._at_rest:  # no round, no look
            if migration.state is State.CONVERGED:
                migration._move(Event.DIVERGE)
            with pytest.raises(FailedPrecondition) as caught:
                await migration.cut_over(force=False)
        assert caught.value.reason == "NOT_CONVERGED"

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


def test_a_refused_cutover_goes_on_syncing(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        final = migration._sender.generation + 1
        end.carrier.before[f"flush {final}"] = lambda: end.write(0, b"still on")
        with pytest.raises(FailedPrecondition) as caught:
            await migration.cut_over(force=False)
        assert caught.value.reason == "NOT_QUIESCED"
        assert migration.snapshot().refusal is caught.value
        assert not end.is_fenced()
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        assert migration.snapshot().refusal is None
        assert end.equal()

    trial(end, steps)


def test_a_caller_that_hangs_up_does_not_stop_the_cutover(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        gate = end.carrier.hold(f"flush {migration._sender.generation + 1}")
        caller = asyncio.create_task(migration.cut_over(force=False))
        await reach(migration, State.CUTTING_OVER)
        with pytest.raises(FailedPrecondition):
            await migration.cut_over(force=True)  # one at a time
        caller.cancel()
        await asyncio.wait([caller])
        gate.set()
        await reach(migration, State.CUT_OVER)

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


def test_cancel_in_the_cutover(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        event = f"flush {migration._sender.generation + 1}"
        end.carrier.hold(event)
        caller = asyncio.create_task(migration.cut_over(force=False))
        await end.carrier.until(event)
        await migration.cancel()
        with pytest.raises(Cancelled, match="was cancelled"):
            await caller
        assert_given_up(end, cancelled=True)

    trial(end, steps)


def test_cancel_is_too_late_once_the_release_is_asked_for(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.gates["release"] = asyncio.Event()
        caller = asyncio.create_task(migration.cut_over(force=False))
        await end.peer.until("release")
        with pytest.raises(FailedPrecondition) as caught:
            await migration.cancel()
        assert caught.value.reason == "TOO_LATE"
        assert_state(migration, State.CUTTING_OVER)
        end.peer.gates["release"].set()
        await caller
        assert_state(migration, State.CUT_OVER)

    trial(end, steps)


def test_cancel_when_the_target_does_not_answer(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.SYNCING)
        end.peer.errors["abort"] = [LOST]
        await migration.cancel()
        assert_state(migration, State.CANCELLED)
        assert_given_up(end, cancelled=True)

    trial(end, steps)


def refuse_carrier(end: Source) -> None:
    end.peer.errors["open_carrier"] = [LOST]


def fail_at(event: str) -> Callable[[Source], None]:
    def arm(end: Source) -> None:
        def fails() -> None:
            raise LOST

        end.carrier.before[event] = fails

    return arm


def fail_take(end: Source) -> None:
    end.trackers[1].take_error = OSError(5, "Input/output error", str(end.images[1]))


def fail_oddly(end: Source) -> None:
    end.trackers[0].take_error = ZeroDivisionError("a bug")


def shrink(end: Source) -> None:
    with end.images[0].open("r+b") as file:
        file.truncate(4096)


@pytest.mark.parametrize(
    ("arm", "reason"),
    [
        (fail_take, "SOURCE_IO_ERROR"),
        (fail_oddly, "INTERNAL"),
        (shrink, "SOURCE_SIZE_CHANGED"),
    ],
    ids=["take", "bug", "size"],
)
def test_a_failure_in_the_first_round(
    end: Source, arm: Callable[[Source], None], reason: str
) -> None:
    arm(end)

    async def steps(migration: SourceMigration) -> None:
        await ended(migration)
        assert_state(migration, State.FAILED)
        error = migration.snapshot().error
        assert error is not None
        assert error.reason == reason
        assert_given_up(end)
        with pytest.raises(FailedPrecondition):
            await migration.cancel()

    trial(end, steps)


@pytest.mark.parametrize(
    "arm", [refuse_carrier, fail_at("send"), fail_at("flush 1")], ids=["carrier", "send", "flush"]
)
def test_a_target_that_is_lost_is_tried_again(end: Source, arm: Callable[[Source], None]) -> None:
    arm(end)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        assert "resume 2" in end.peer.calls
        assert migration.snapshot().progress.trouble == ""
        await migration.cut_over(force=False)
        assert end.equal()
        await migration.finish()

    trial(end, steps)


def test_a_target_that_stays_away_is_given_up(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "RETRY_FOR_SECONDS", 0.5)
    monkeypatch.setattr(source_module, "FIRST_RETRY_SECONDS", 0.01)
    end.peer.errors["open_carrier"] = [LOST]
    end.peer.errors["resume"] = [LOST] * 1000

    async def steps(migration: SourceMigration) -> None:
        await ended(migration)
        assert migration.snapshot().error is LOST
        assert_given_up(end)

    trial(end, steps)


def test_a_target_that_has_given_up_is_not_tried_again(end: Source) -> None:
    end.peer.errors["open_carrier"] = [LOST]
    end.peer.errors["resume"] = [Unavailable("SOURCE_LOST", "the source sent nothing for a day")]

    async def steps(migration: SourceMigration) -> None:
        await ended(migration)
        error = migration.snapshot().error
        assert error is not None
        assert error.reason == "SOURCE_LOST"
        assert_given_up(end)

    trial(end, steps)


def test_a_full_target_disk_pauses_until_it_is_mended(end: Source) -> None:
    full = ResourceExhausted("DISK_FULL", "the disk under target is full", side="target")
    end.carrier.before["send"] = lambda: _raise(full)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.PAUSED)
        assert migration.snapshot().refusal is full
        assert "resume 2" not in end.peer.calls
        migration.resume()
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        assert end.equal()
        await migration.finish()

    trial(end, steps)


def test_a_target_disk_that_fails_in_the_first_comparison_pauses(end: Source) -> None:
    """With --reuse-target it is read before anything is sent. Found by the gauntlet (seed 2004)."""
    end.plan = replace(end.plan, reuse_target=True)
    broken = DataLoss("TARGET_IO_ERROR", "the disk under target fails", side="target")
    end.peer.errors["digests"] = [broken]

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.PAUSED)
        assert migration.snapshot().refusal is broken
        end.peer.digests = _all_of(end)  # type: ignore[assignment,method-assign]
        migration.resume()
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        assert end.equal()
        await migration.finish()

    trial(end, steps)


def _all_of(end: Source) -> Callable[[str, int], AsyncIterator[tuple[int, bytes]]]:
    async def theirs(token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        yield 0, digests(end.targets[volume].read_bytes())

    return theirs


def test_a_forgetful_target_whose_disk_is_gone_pauses(end: Source) -> None:
    """Found by the gauntlet (seed 2041)."""
    gone = NotFound("DEVICE_NOT_FOUND", "target does not exist; check the name", path="target")

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.errors["resume"] = [NotFound("SESSION_NOT_FOUND", "no such session")] * 2
        end.peer.errors["open_session"] = [gone]
        end.peer.digests = _all_of(end)  # type: ignore[assignment,method-assign]
        end.carrier.failure = LOST
        await reach(migration, State.PAUSED)
        refusal = migration.snapshot().refusal
        assert refusal is not None
        assert (refusal.reason, "does not exist" in str(refusal)) == ("TARGET_NOT_CLAIMED", True)
        migration.resume()
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        assert end.equal()
        await migration.finish()

    trial(end, steps)


def test_a_target_that_forgot_rounds_gets_everything_again(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        for target in end.targets:
            target.write_bytes(b"x" * SIZE)
        end.carrier.durable = 0
        end.carrier.failure = LOST
        await until(migration.bell, lambda: migration.snapshot().progress.suspect_volumes > 0)
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        assert end.equal()
        await migration.finish()

    trial(end, steps)


def test_a_target_without_its_state_gets_everything_again(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        for target in end.targets:
            target.write_bytes(b"x" * SIZE)
        end.peer.errors["resume"] = [NotFound("SESSION_NOT_FOUND", "no such session")]
        end.carrier.failure = LOST
        await end.peer.until("open_session")
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        assert end.equal()
        await migration.finish()

    trial(end, steps)


@pytest.mark.parametrize("released", [True, False])
def test_an_owner_that_was_unknown_is_found_out(
    end: Source, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.errors["release"] = [LOST]
        end.peer.gates["resume"] = asyncio.Event()
        with pytest.raises(FailedPrecondition) as caught:
            await migration.cut_over(force=False)
        assert caught.value.reason == "OWNER_UNKNOWN"
        await end.peer.until("resume")
        assert_state(migration, State.CUTTING_OVER)
        assert end.is_fenced()
        with pytest.raises(FailedPrecondition):
            await migration.cancel()
        end.peer.released = released
        end.peer.gates["resume"].set()
        await reach(migration, State.CUT_OVER if released else State.CONVERGED)
        assert end.is_fenced() is released
        assert not any(call.startswith("abort") for call in end.peer.calls)
        await (migration.finish() if released else migration.cancel())

    trial(end, steps)


@pytest.mark.parametrize(
    ("arm", "reason"),
    [(fail_take, "SOURCE_IO_ERROR"), (fail_oddly, "INTERNAL"), (shrink, "SOURCE_SIZE_CHANGED")],
    ids=["take", "bug", "size"],
)
def test_a_failure_in_a_later_round(
    end: Source, arm: Callable[[Source], None], reason: str
) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.SYNCING)
        arm(end)
        await ended(migration)
        error = migration.snapshot().error
        assert error is not None
        assert error.reason == reason
        assert_given_up(end)

    trial(end, steps)


def test_an_idle_migration_notices_that_the_target_is_lost(end: Source) -> None:
    """With nothing to send, nothing else would tell: the VM would be powered down for nothing."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.carrier.failure = LOST
        await end.peer.until("resume")
        await until(migration.bell, lambda: migration.snapshot().progress.trouble == "")

    trial(end, steps)


@pytest.mark.parametrize("phase", ["send", "flush", "release", "fence", "look"])
def test_a_failure_in_the_cutover(end: Source, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        migration.pause()
        migration.resume()
        end.write(0, b"something to send")
        final = migration._sender.generation + 1
        if phase in ("send", "flush"):
            fail_at("send" if phase == "send" else f"flush {final}")(end)
        elif phase == "release":
            end.peer.errors["release"] = [FailedPrecondition("NOT_RELEASABLE", "no")]
        elif phase == "fence":
            monkeypatch.setattr("agent.disk.SourceDisk.fence", lambda disk: 1 / 0)
        else:
            error = DataLoss("SOURCE_IO_ERROR", "unreadable")
            monkeypatch.setattr(end.trackers[0], "look", lambda: _raise(error))
        with pytest.raises(Error):
            await migration.cut_over(force=True)
        if phase in ("send", "flush", "look"):  # may pass: syncing goes on, the next one works
            monkeypatch.undo()
            await reach(migration, State.CONVERGED)
            assert not end.is_fenced()
            await migration.cut_over(force=False)
            assert end.equal()
            await migration.finish()
            return
        await ended(migration)
        assert_state(migration, State.FAILED)
        assert_given_up(end)

    trial(end, steps)


def test_an_agent_that_stops_in_the_release_writes_down_that_it_may_not_own(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.gates["release"] = asyncio.Event()
        caller = asyncio.create_task(migration.cut_over(force=False))
        await end.peer.until("release")
        await migration.close(STOPPED)
        with pytest.raises(Unavailable):
            await caller
        assert migration.record().releasing
        assert end.is_fenced()
        assert not any(call.startswith("abort") for call in end.peer.calls)

    trial(end, steps)


def test_a_tracker_that_does_not_end_cleanly_does_not_undo_the_release(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        monkeypatch.setattr(end.trackers[0], "stop", lambda: _raise(OSError(16, "pin is busy")))
        await migration.cut_over(force=False)
        assert_state(migration, State.CUT_OVER)
        monkeypatch.undo()
        await migration.finish()

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


def _raise(error: Exception) -> Any:
    raise error
