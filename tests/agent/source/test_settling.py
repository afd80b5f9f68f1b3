"""What a person settles at a source that is driven: when it counts, and what follows."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent.disk import SourceDisk
from agent.errors import (
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
)
from agent.journal import Journal
from agent.migration import Owner
from agent.source import SourceMigration
from agent.source import cutover as cutover_module
from agent.source import settling as settling_module
from agent.source.autopilot import Autopilot
from agent.state import State
from tests.agent.ends import Source
from tests.agent.migrations import LOST, STOPPED, assert_state, reach, throw, trial

ENDS = {Owner.SOURCE: State.ROLLED_BACK, Owner.TARGET: State.COMPLETED}
FORGOTTEN = NotFound("SESSION_NOT_FOUND", "this agent has no such session")


class Diary(Journal):
    """Remembers the states that were written down, and with which fence."""

    def __init__(self, end: Source) -> None:
        super().__init__(None)
        self._end = end
        self.entries: list[tuple[str, bool, bool]] = []
        self.is_full = False

    def save(self, role: Any, name: str, record: Any, counted: Any = None) -> None:
        if self.is_full:
            raise ResourceExhausted("STATE_NOT_KEPT", "full", path="journal")
        state, releasing = record["history"][-1]["state"], record["releasing"]
        self.entries.append((state, releasing, self._end.is_fenced()))
        super().save(role, name, record, counted)


async def doubt(end: Source, migration: SourceMigration) -> None:
    """Bring a migration to where nobody here knows who owns, and nobody answers."""
    await reach(migration, State.CONVERGED)
    end.peer.errors["release"] = [LOST]
    end.peer.errors["resume"] = [LOST] * 1000
    with pytest.raises(FailedPrecondition) as caught:
        await migration.cut_over(force=False)
    assert caught.value.reason == "OWNER_UNKNOWN"
    assert "warmsync settle" in str(caught.value)
    assert end.is_fenced()


async def cut_over(end: Source, migration: SourceMigration) -> None:
    await reach(migration, State.CONVERGED)
    await migration.cut_over(force=False)


async def refusal(migration: SourceMigration, owner: Owner) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught:
        await migration.settle(owner)
    return caught.value


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)


@pytest.mark.parametrize("owner", ENDS)
@pytest.mark.parametrize("before", [doubt, cut_over])
@pytest.mark.parametrize("error", [LOST, FORGOTTEN], ids=["silent", "forgotten"])
def test_a_person_says_who_owns(
    end: Source, owner: Owner, before: Any, error: WarmsyncError
) -> None:
    async def steps(migration: SourceMigration) -> None:
        await before(end, migration)
        end.peer.errors["unread"] = [error]
        await migration.settle(owner)
        assert_state(migration, ENDS[owner])
        assert migration.owner is owner
        assert end.is_fenced() is (owner is Owner.TARGET)
        assert not end.is_open()
        shown = migration.snapshot()
        assert (shown.error, shown.refusal) == (None, None)
        assert all(tracker.stopped for tracker in end.trackers)
        assert end.peer.calls[-1] == "close"  # and is asked for nothing any more
        assert not any(call.startswith("abort") for call in end.peer.calls)

    trial(end, steps)


def test_it_is_written_down_before_the_fence_comes_down(end: Source) -> None:
    diary = end.journal = Diary(end)

    async def steps(migration: SourceMigration) -> None:
        await doubt(end, migration)
        end.peer.errors["unread"] = [LOST]
        await migration.settle(Owner.SOURCE)
        # Killed between the two, the next start knows that the fence is to be lifted.
        assert diary.entries[-2:] == [("ROLLED_BACK", True, True), ("ROLLED_BACK", False, False)]

    trial(end, steps)


@pytest.mark.parametrize("owner", ENDS)
def test_what_cannot_be_written_down_changes_nothing(end: Source, owner: Owner) -> None:
    diary = end.journal = Diary(end)

    async def steps(migration: SourceMigration) -> None:
        await doubt(end, migration)
        end.peer.errors["unread"] = [LOST, LOST]
        diary.is_full = True
        assert (await refusal(migration, owner)).reason == "STATE_NOT_KEPT"
        diary.is_full = False
        assert_state(migration, State.CUTTING_OVER)
        assert migration.owner is Owner.NOBODY
        assert end.is_fenced()
        assert migration.snapshot().refusal is not None
        await migration.settle(owner)
        assert_state(migration, ENDS[owner])

    trial(end, steps)


@pytest.mark.parametrize(
    "error",
    [
        None,
        FailedPrecondition("SOURCE_FAILED", "it has ended there"),
        Unavailable("SOURCE_NOT_BACK", "of an earlier epoch"),
    ],
    ids=["answers", "ended", "earlier"],
)
def test_a_target_that_answers_is_not_contradicted(
    end: Source, error: WarmsyncError | None
) -> None:
    async def steps(migration: SourceMigration) -> None:
        for begin, hint in ((doubt, "learns from it"), (cut_over, "roll back or finish")):
            await begin(end, migration)
            end.peer.errors["unread"] = [] if error is None else [error]
            for owner in ENDS:
                before = migration.state
                said = await refusal(migration, owner)
                assert said.reason == "OWNER_KNOWN"
                assert hint in str(said)
                assert_state(migration, before)
                assert end.is_fenced()
                end.peer.errors["unread"] = [] if error is None else [error]
            end.peer.errors.clear()
            if begin is doubt:  # the link goes on, and learns it
                await reach(migration, State.CONVERGED)
                assert not end.is_fenced()
        await migration.finish()

    trial(end, steps)


def test_a_target_that_hangs_is_not_waited_for_long(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling_module, "ASK_SECONDS", 0.05)

    async def steps(migration: SourceMigration) -> None:
        await cut_over(end, migration)
        end.peer.gates["unread"] = asyncio.Event()
        await migration.settle(Owner.TARGET)
        assert_state(migration, State.COMPLETED)

    trial(end, steps)


@pytest.mark.parametrize("released", [True, False])
def test_what_the_target_tells_meanwhile_counts(end: Source, released: bool) -> None:
    """Its answer comes to the link while it is asked whether it answers."""

    async def steps(migration: SourceMigration) -> None:
        await doubt(end, migration)
        gate = end.peer.gates["unread"] = asyncio.Event()
        end.peer.errors["unread"] = [LOST]
        settling = asyncio.create_task(refusal(migration, Owner.SOURCE))
        await end.peer.until("unread")
        end.peer.released = released
        end.peer.errors["resume"].clear()
        await reach(migration, State.CUT_OVER if released else State.CONVERGED)
        gate.set()
        assert (await settling).reason == "OWNER_KNOWN"
        assert end.is_fenced() is released
        await (migration.finish() if released else migration.cancel())

    trial(end, steps)


def test_not_while_the_release_is_asked_for(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        gate = end.peer.gates["release"] = asyncio.Event()
        caller = asyncio.create_task(migration.cut_over(force=False))
        await end.peer.until("release")
        for owner in ENDS:
            assert (await refusal(migration, owner)).reason == "CUTOVER_UNDER_WAY"
        gate.set()
        await caller
        assert_state(migration, State.CUT_OVER)
        await migration.finish()

    trial(end, steps)


def test_not_before_the_release_is_asked_for(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        for owner in ENDS:
            assert (await refusal(migration, owner)).reason == "ILLEGAL_TRANSITION"
        event = f"flush {migration._sender.generation + 1}"
        gate = end.carrier.hold(event)
        caller = asyncio.create_task(migration.cut_over(force=False))
        await end.carrier.until(event)
        said = await refusal(migration, Owner.SOURCE)
        assert said.reason == "OWNER_KNOWN"
        assert "the source owns" in str(said)
        gate.set()
        await caller
        await migration.finish()

    trial(end, steps)


def test_too_late_to_cancel_names_the_way_out(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await doubt(end, migration)
        with pytest.raises(FailedPrecondition, match="warmsync settle") as caught:
            await migration.cancel()
        assert caught.value.reason == "TOO_LATE"
        end.peer.errors["unread"] = [LOST]
        await migration.settle(Owner.SOURCE)

    trial(end, steps)


def test_a_fence_that_stays_up_is_told(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps(migration: SourceMigration) -> None:
        await cut_over(end, migration)
        end.peer.errors["unread"] = [LOST]
        error = PermissionError(1, "not permitted")
        monkeypatch.setattr(SourceDisk, "unfence", lambda disk: throw(error))
        assert (await refusal(migration, Owner.SOURCE)).reason == "STILL_FENCED"
        assert_state(migration, State.ROLLED_BACK)
        assert migration.record().releasing  # still to be lifted
        shown = migration.snapshot().error
        assert shown is not None
        assert shown.reason == "STILL_FENCED"
        assert not end.is_open()

    trial(end, steps)


def test_the_agents_have_their_hands_off_before_the_fence_comes_down(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A boot hook that is still asked for would boot beside the VM here."""
    fenced: list[bool] = []
    close = Autopilot.end

    async def ending(pilot: Autopilot) -> None:
        fenced.append(end.is_fenced())
        await close(pilot)

    monkeypatch.setattr(Autopilot, "end", ending)

    async def steps(migration: SourceMigration) -> None:
        await cut_over(end, migration)
        end.peer.errors["unread"] = [LOST]
        await migration.settle(Owner.SOURCE)
        assert fenced[0] is True
        assert not end.is_fenced()

    trial(end, steps)


@pytest.mark.parametrize(("owner", "cut_overs"), [(Owner.SOURCE, 0), (Owner.TARGET, 1)])
def test_it_counts_in_the_totals(end: Source, tmp_path: Path, owner: Owner, cut_overs: int) -> None:
    end.journal = Journal(tmp_path / "state")

    async def steps(migration: SourceMigration) -> None:
        await doubt(end, migration)
        end.peer.errors["unread"] = [LOST]
        await migration.settle(owner)
        totals = end.journal.totals()
        assert totals["sent_bytes"] == migration.snapshot().progress.sent_bytes
        assert totals.get("migrations_cut_over", 0) == cut_overs
        end.journal.close()

    trial(end, steps)


def test_a_target_is_not_silent_because_the_agent_stops(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await cut_over(end, migration)
        gate = end.peer.gates["unread"] = asyncio.Event()
        end.peer.errors["unread"] = [LOST]  # its connection was closed
        settling = asyncio.ensure_future(migration.settle(Owner.SOURCE))
        await end.peer.until("unread")
        await migration.close(STOPPED)
        gate.set()
        with pytest.raises(Unavailable) as caught:
            await settling
        assert caught.value is STOPPED
        assert (migration.state, end.is_fenced()) == (State.CUT_OVER, True)

    trial(end, steps)
