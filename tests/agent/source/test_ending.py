"""What is written down of an end while it is under way, for an agent that is killed in it."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent.disk import SourceDisk
from agent.errors import FailedPrecondition, WarmsyncError
from agent.journal import Journal
from agent.migration import Owner, Role
from agent.record import SourceRecord, load_source
from agent.source import SourceMigration
from agent.state import State
from tests.agent.ends import Source, until
from tests.agent.migrations import LOST, STOPPED, assert_given_up, reach, trial


@pytest.fixture
def kept(end: Source, tmp_path: Path) -> Journal:
    """The journal of the source's agent."""
    end.journal = Journal(tmp_path / "state")
    return end.journal


def written(journal: Journal) -> SourceRecord:
    ((role, _, values),) = journal.load()
    assert role is Role.SOURCE
    return load_source(values)


async def cancel_while_fenced(end: Source, migration: SourceMigration) -> None:
    caller = await cut_over_until_fenced(end, migration)
    await migration.cancel()
    await asyncio.wait([caller])
    assert caller.exception() is not None


def test_the_fence_and_the_target_are_owed_until_they_are_settled(
    end: Source, kept: Journal
) -> None:
    during: list[SourceRecord] = []

    async def steps(migration: SourceMigration) -> None:
        end.peer.before["abort"] = lambda: during.append(written(kept))
        await cancel_while_fenced(end, migration)
        (then,), after = during, written(kept)
        assert then.history[-1].state is after.history[-1].state is State.CANCELLED
        assert (then.releasing, then.owed) == (True, True)
        assert (after.releasing, after.owed) == (False, False)
        assert not end.is_fenced()

    trial(end, steps)


def test_a_target_that_did_not_hear_of_the_end_is_owed_it(end: Source, kept: Journal) -> None:
    async def steps(migration: SourceMigration) -> None:
        end.peer.errors["abort"] = [LOST]
        await cancel_while_fenced(end, migration)
        assert (written(kept).releasing, written(kept).owed) == (False, True)

    trial(end, steps)


def test_a_fence_that_does_not_come_down_is_owed(
    end: Source, kept: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    async def steps(migration: SourceMigration) -> None:
        monkeypatch.setattr("agent.disk.SourceDisk.unfence", lambda disk: fail())
        await cancel_while_fenced(end, migration)
        assert (written(kept).releasing, written(kept).owed) == (True, True)
        shown = migration.snapshot()
        assert (shown.state, shown.owner) == (State.CANCELLED, Owner.SOURCE)
        assert shown.refusal is not None
        assert shown.refusal.reason == "STILL_FENCED"

    trial(end, steps)


def test_a_fence_that_a_refused_cutover_could_not_lift_is_owed(
    end: Source, kept: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails for that, and the agent's next start lifts it."""

    def fail(disk: SourceDisk) -> None:
        raise OSError(5, "Input/output error")

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        monkeypatch.setattr(SourceDisk, "unfence", fail)
        end.peer.errors["prove"] = [LOST]
        with pytest.raises(WarmsyncError):
            await migration.cut_over(force=False)
        await reach(migration, State.FAILED)
        while end.is_open():  # noqa: ASYNC110 - a device rings no bell
            await asyncio.sleep(0.01)
        assert end.is_fenced()
        assert (written(kept).releasing, written(kept).owed) == (True, True)

    trial(end, steps)


@pytest.fixture
def slow_unfence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fence that takes a moment to come down."""
    unfence = SourceDisk.unfence

    def slowly(disk: SourceDisk) -> None:
        time.sleep(0.2)
        unfence(disk)

    monkeypatch.setattr(SourceDisk, "unfence", slowly)


async def watch_fenced(end: Source, migration: SourceMigration) -> list[tuple[State, Owner]]:
    """Return what is told while the fence is up, by one who watches until the end."""
    told = []
    while not State((shown := migration.snapshot()).state).is_terminal:
        seen = migration.bell.count
        if end.is_fenced():
            told.append((State(shown.state), shown.owner))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01):  # a file rings no bell
                await migration.bell.wait(seen)
    assert not end.is_fenced()
    return told


async def cut_over_until_fenced(end: Source, migration: SourceMigration) -> asyncio.Task[None]:
    await reach(migration, State.CONVERGED)
    end.peer.gates["prove"] = asyncio.Event()
    caller = asyncio.create_task(migration.cut_over(force=False))
    while not end.is_fenced():  # noqa: ASYNC110 - a file rings no bell
        await asyncio.sleep(0.01)
    return caller


@pytest.mark.usefixtures("slow_unfence")
@pytest.mark.parametrize("failing", [False, True], ids=["cancelled", "failed"])
def test_an_end_is_told_once_the_fence_is_down(end: Source, kept: Journal, failing: bool) -> None:
    """Whoever watches for it boots the VM then; the target may be told later."""

    async def steps(migration: SourceMigration) -> None:
        state = State.FAILED if failing else State.CANCELLED
        caller = await cut_over_until_fenced(end, migration)
        told_target = end.peer.gates["abort"] = asyncio.Event()
        watching = asyncio.ensure_future(watch_fenced(end, migration))
        bell, over = migration.bell, lambda: migration.snapshot().state == state
        hearing = asyncio.ensure_future(until(bell, over))
        if failing:
            end.peer.errors["prove"] = [RuntimeError("a bug")]
            end.peer.gates.pop("prove").set()
        else:
            cancelling = asyncio.ensure_future(migration.cancel())
        assert set(await watching) == {(State.CUTTING_OVER, Owner.NOBODY)}
        await hearing
        assert migration.is_giving_up
        assert (migration.snapshot().state, migration.owner) == (state, Owner.SOURCE)
        assert written(kept).history[-1].state is state
        told_target.set()
        await asyncio.wait([caller])
        assert caller.exception() is not None
        if not failing:
            await cancelling
        await until(migration.bell, lambda: not migration.is_giving_up)

    trial(end, steps)


@pytest.mark.usefixtures("slow_unfence")
def test_nobody_owns_before_the_fence_of_a_refused_cutover_is_down(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        caller = await cut_over_until_fenced(end, migration)
        watching = asyncio.ensure_future(watch_fenced(end, migration))
        end.peer.errors["prove"] = [LOST]
        end.peer.gates.pop("prove").set()
        await asyncio.wait([caller])
        assert caller.exception() is LOST
        await migration.cancel()
        assert set(await watching) == {(State.CUTTING_OVER, Owner.NOBODY)}

    trial(end, steps)


@pytest.mark.usefixtures("slow_unfence")
def test_what_is_settled_for_the_source_is_told_once_the_fence_is_down(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        end.peer.errors["unread"] = [LOST]
        watching = asyncio.ensure_future(watch_fenced(end, migration))
        await migration.settle(Owner.SOURCE)
        told = await watching
        assert Owner.SOURCE not in {owner for _, owner in told}
        assert migration.owner is Owner.SOURCE

    trial(end, steps)


def test_an_agent_that_stops_waits_for_what_has_failed(end: Source, kept: Journal) -> None:
    """The threads and the connection are still needed; the fence and the target are owed."""

    async def steps(migration: SourceMigration) -> None:
        gate = end.peer.gates["abort"] = asyncio.Event()
        end.peer.errors["open_carrier"] = [FailedPrecondition("ODD", "what nobody expects")]
        await end.peer.until("abort")
        assert migration.is_giving_up
        closing = asyncio.ensure_future(migration.close(STOPPED))
        await asyncio.sleep(0.1)
        assert not closing.done()
        gate.set()
        await closing
        assert_given_up(end)
        assert not written(kept).owed

    trial(end, steps)


@pytest.mark.parametrize("end_it", [SourceMigration.finish, SourceMigration.roll_back])
def test_it_has_not_ended_before_its_devices_are_closed(
    end: Source, monkeypatch: pytest.MonkeyPatch, end_it: Any
) -> None:
    closed, held = SourceDisk.close, threading.Event()

    def close(disk: SourceDisk) -> None:
        held.wait(20)
        closed(disk)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        monkeypatch.setattr(SourceDisk, "close", close)
        ending = asyncio.ensure_future(end_it(migration))
        await until(migration.bell, lambda: migration.state.is_terminal)
        closing = asyncio.ensure_future(migration.close(STOPPED))
        await asyncio.sleep(0.1)
        assert (migration.is_giving_up, closing.done()) == (True, False)
        held.set()
        await asyncio.gather(ending, closing)
        assert not migration.is_giving_up
        assert not end.is_open()

    trial(end, steps)


@pytest.mark.parametrize(
    ("end_it", "call"),
    [(SourceMigration.finish, "finish"), (SourceMigration.roll_back, "reclaim")],
    ids=["finish", "rollback"],
)
def test_an_agent_that_stops_while_the_target_is_asked_leaves_it_to_the_next(
    end: Source, kept: Journal, end_it: Any, call: str
) -> None:
    """Its devices are closed by the time that the target answers."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        gate = end.peer.gates[call] = asyncio.Event()
        ending = asyncio.ensure_future(end_it(migration))
        await end.peer.until(call)
        await migration.close(STOPPED)
        gate.set()
        with pytest.raises(WarmsyncError) as caught:
            await ending
        assert caught.value is STOPPED
        assert (written(kept).history[-1].state, end.is_fenced()) == (State.CUT_OVER, True)

    trial(end, steps)


@pytest.mark.usefixtures("slow_unfence")
def test_an_agent_that_stops_waits_for_a_rollback_that_was_granted(
    end: Source, kept: Journal
) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        await migration.cut_over(force=False)
        rolling = asyncio.ensure_future(migration.roll_back())
        await end.peer.until("reclaim")
        await asyncio.sleep(0.05)
        await migration.close(STOPPED)
        await rolling
        assert (written(kept).history[-1].state, end.is_fenced()) == (State.ROLLED_BACK, False)
        assert not end.is_open()

    trial(end, steps)
