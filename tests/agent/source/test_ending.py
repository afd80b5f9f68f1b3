"""What is written down of an end while it is under way, for an agent that is killed in it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agent.disk import SourceDisk
from agent.errors import WarmsyncError
from agent.journal import Journal
from agent.migration import Role
from agent.record import SourceRecord, load_source
from agent.source import SourceMigration
from agent.state import State
from tests.agent.ends import Source
from tests.agent.migrations import LOST, reach, trial


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
