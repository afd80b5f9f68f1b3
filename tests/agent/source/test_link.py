"""What both ends agree on after a loss: what the target has, and who owns the disks."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from agent.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
)
from agent.migration import Owner
from agent.source import SourceMigration
from agent.source import cutover as cutover_module
from agent.state import Entry, State
from tests.agent.ends import SIZE, Source
from tests.agent.migrations import (
    LOST,
    STOPPED,
    assert_state,
    complete,
    ended,
    reach,
    show_digests,
    trial,
)
from tests.agent.rpc_helpers import run

HALF = 8 * 65536


def copy_half(end: Source) -> None:
    """The first half is on the targets already."""
    for image, target in zip(end.images, end.targets, strict=True):
        target.write_bytes(image.read_bytes()[:HALF] + bytes(SIZE - HALF))


def blank(end: Source) -> None:
    """Other disks are in the place of the targets: nothing is durable on them."""
    for target in end.targets:
        target.write_bytes(bytes(SIZE))
    end.carrier.durable = 0


async def go_on(end: Source, *states: State) -> SourceMigration:
    """Return the migration as an agent finds it that was started again in the last of `states`."""
    entries = tuple(Entry(state, 1.0) for state in (State.PENDING, State.SEEDING, *states))
    migration = end.migration(restored=replace(end.migration().record(), history=entries))
    migration.start()
    return migration


def test_another_disk_in_the_middle_of_a_comparison_has_nothing(end: Source) -> None:
    """Nothing was acknowledged to either end yet: what was found equal is on no disk any more."""
    end.plan = replace(end.plan, reuse_target=True)
    copy_half(end)
    broken = DataLoss("TARGET_IO_ERROR", "the disk under target fails", side="target")
    show_digests(end, broken)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.PAUSED)
        assert end.disks[0].pending.count_bytes() == SIZE - HALF
        blank(end)
        show_digests(end)
        migration.resume()
        await complete(end, migration)

    trial(end, steps)


def test_another_disk_has_nothing_of_what_an_agent_before_was_told(end: Source) -> None:
    """In round 0 the generation is not written down, but pending is: it knows of the windows."""
    blank(end)
    for disk in end.disks:
        disk.pending.clear_range(0, HALF)
    show_digests(end)

    async def main() -> None:
        await complete(end, await go_on(end))

    run(main)


def test_a_target_that_has_lost_nothing_is_not_compared(end: Source) -> None:
    end.peer.errors["open_carrier"] = [LOST]

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.carrier.failure = LOST
        await end.peer.until("resume 3")
        await complete(end, migration)
        assert migration.snapshot().progress.suspect_volumes == 0
        assert "digests" not in end.peer.calls

    trial(end, steps)


@pytest.mark.parametrize("has_forgotten", [True, False])
def test_a_cutover_that_an_agent_before_had_not_begun_comes_to_nothing(
    end: Source, has_forgotten: bool
) -> None:
    """It was stopped before the fence; its target may have lost its state since."""
    if has_forgotten:
        end.peer.errors["resume"] = [NotFound("SESSION_NOT_FOUND", "no such session")]

    async def main() -> None:
        migration = await go_on(end, State.SYNCING, State.CUTTING_OVER)
        await reach(migration, State.CONVERGED)
        assert migration.owner is Owner.SOURCE
        await complete(end, migration)

    run(main)


async def lose_the_release(end: Source, migration: SourceMigration, *errors: WarmsyncError) -> None:
    """Let nobody know who owns; these are the target's answers then."""
    await reach(migration, State.CONVERGED)
    end.peer.errors["release"] = [LOST]
    end.peer.errors["resume"] = [*errors]
    end.peer.gates["resume"] = asyncio.Event()
    with pytest.raises(FailedPrecondition) as caught:
        await migration.cut_over(force=False)
    assert caught.value.reason == "OWNER_UNKNOWN"
    await end.peer.until("resume")
    assert end.is_fenced()
    end.peer.gates.pop("resume").set()


def test_a_target_that_claims_again_was_not_released(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent is back before its disks: a person has time to look after them."""
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)
    gone = FailedPrecondition("TARGET_NOT_CLAIMED", "not there yet; then resume", owner="source")

    async def steps(migration: SourceMigration) -> None:
        await lose_the_release(end, migration, gone)
        await reach(migration, State.PAUSED)
        assert migration.snapshot().refusal is gone
        assert migration.owner is Owner.SOURCE
        assert not end.is_fenced()
        assert not migration.record().releasing
        migration.resume()
        await complete(end, migration)

    trial(end, steps)


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("SOURCE_LOST", "the source sent nothing for a day", owner="source"),
        FailedPrecondition("SOURCE_FAILED", "it is FAILED here", owner="source"),
        ResourceExhausted("STATE_DIR_FULL", "no room for what was read back", owner="source"),
    ],
    ids=lambda error: error.reason,
)
def test_a_target_that_has_given_up_was_not_released(
    end: Source, error: WarmsyncError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)

    async def steps(migration: SourceMigration) -> None:
        await lose_the_release(end, migration, error)
        await ended(migration)
        assert_state(migration, State.FAILED)
        told = migration.snapshot().error
        assert told is not None
        assert told.reason == error.reason
        assert migration.owner is Owner.SOURCE
        assert not end.is_fenced()

    trial(end, steps)


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhausted("STATE_NOT_KEPT", "the journal is full", side="target"),
        FailedPrecondition("TARGET_NOT_CLAIMED", "it does not say who owns"),
    ],
    ids=lambda error: error.reason,
)
@pytest.mark.parametrize("released", [True, False])
def test_what_does_not_say_who_owns_is_waited_out(
    end: Source, error: WarmsyncError, released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)

    async def steps(migration: SourceMigration) -> None:
        end.peer.released = released
        await lose_the_release(end, migration, error)
        await end.peer.until("resume 3")
        await reach(migration, State.CUT_OVER if released else State.CONVERGED)
        assert end.is_fenced() is released
        await (migration.finish() if released else migration.cancel())

    trial(end, steps)


def test_what_is_not_known_stays_fenced(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)
    full = ResourceExhausted("STATE_NOT_KEPT", "the journal is full", side="target")

    async def steps(migration: SourceMigration) -> None:
        await lose_the_release(end, migration, *[full] * 1000)
        await end.peer.until("resume 3")
        assert_state(migration, State.CUTTING_OVER)
        assert migration.owner is Owner.NOBODY
        assert end.is_fenced()
        refusal = migration.snapshot().refusal
        assert refusal is not None
        assert refusal.reason == "OWNER_UNKNOWN"
        await migration.close(STOPPED)

    trial(end, steps)
