"""What is written down of an end while it is under way, for an agent that is killed in it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from agent.disk import SourceDisk
from agent.errors import FailedPrecondition, WarmsyncError
from agent.journal import Journal
from agent.migration import Role
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
    await reach(migration, State.CONVERGED)
    end.peer.gates["prove"] = asyncio.Event()
    caller = asyncio.create_task(migration.cut_over(force=False))
    while not end.is_fenced():  # noqa: ASYNC110 - a file rings no bell
        await asyncio.sleep(0.01)
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
        said = migration.snapshot().refusal
        assert said is not None
        assert said.reason == "STILL_FENCED"

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
