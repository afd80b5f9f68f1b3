"""Failures on the way: what is tried again, what pauses, what ends the migration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
from agent.source import patience as patience_module
from agent.state import State
from tests.agent.ends import SIZE, Source, until
from tests.agent.migrations import (
    LOST,
    assert_given_up,
    assert_state,
    complete,
    ended,
    fail_at,
    keep_journal,
    reach,
    show_digests,
    throw,
    trial,
)


def refuse_carrier(end: Source) -> None:
    end.peer.errors["open_carrier"] = [LOST]


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


@pytest.mark.parametrize(
    "error",
    [
        NotFound("PEER_NOT_FOUND", "the target answered NOT_FOUND ()"),
        FailedPrecondition("UNSUPPORTED_BY_PEER", "the target does not know this call"),
    ],
    ids=lambda error: error.reason,
)
def test_a_status_that_was_spoilt_is_tried_again(end: Source, error: WarmsyncError) -> None:
    """Found by the gauntlet (seed 30014)."""
    end.peer.errors["open_carrier"] = [LOST]
    end.peer.errors["resume"] = [error]

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        assert "resume 3" in end.peer.calls
        assert "open_session" not in " ".join(end.peer.calls[2:])
        await migration.cut_over(force=False)
        assert end.equal()
        await migration.finish()

    trial(end, steps)


def test_a_target_that_stays_away_is_given_up(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience_module, "RETRY_FOR_SECONDS", 0.5)
    monkeypatch.setattr(patience_module, "FIRST_RETRY_SECONDS", 0.01)
    end.peer.errors["open_carrier"] = [LOST]
    end.peer.errors["resume"] = [LOST] * 1000

    async def steps(migration: SourceMigration) -> None:
        await ended(migration)
        assert migration.snapshot().error is LOST
        assert_given_up(end)

    trial(end, steps)


def test_what_was_lost_long_ago_does_not_count(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that held ends it, though no round became durable: a comparison takes long."""
    monkeypatch.setattr(patience_module, "RETRY_FOR_SECONDS", 2.0)
    monkeypatch.setattr(patience_module, "FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(patience_module, "WELL_SECONDS", 2.2)
    end.peer.errors["open_carrier"] = [LOST]

    def hold_and_lose() -> None:
        time.sleep(2.5)
        raise LOST

    end.carrier.before["send"] = hold_and_lose

    async def steps(migration: SourceMigration) -> None:
        await complete(end, migration)

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
    end.carrier.before["send"] = lambda: throw(full)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.PAUSED)
        assert migration.snapshot().refusal is full
        assert "resume 2" not in end.peer.calls
        migration.resume()
        await complete(end, migration)

    trial(end, steps)


def test_a_target_disk_that_fails_in_the_first_comparison_pauses(end: Source) -> None:
    """With --reuse-target it is read before anything is sent. Found by the gauntlet (seed 2004)."""
    end.plan = replace(end.plan, reuse_target=True)
    broken = DataLoss("TARGET_IO_ERROR", "the disk under target fails", side="target")
    end.peer.errors["digests"] = [broken]

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.PAUSED)
        assert migration.snapshot().refusal is broken
        show_digests(end)
        migration.resume()
        await complete(end, migration)

    trial(end, steps)


def test_a_forgetful_target_whose_disk_is_gone_pauses(end: Source) -> None:
    """Found by the gauntlet (seed 2041)."""
    gone = NotFound("DEVICE_NOT_FOUND", "target does not exist; check the name", path="target")

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.errors["resume"] = [NotFound("SESSION_NOT_FOUND", "no such session")] * 2
        end.peer.errors["open_session"] = [gone]
        show_digests(end)
        end.carrier.failure = LOST
        await reach(migration, State.PAUSED)
        refusal = migration.snapshot().refusal
        assert refusal is not None
        assert (refusal.reason, "does not exist" in str(refusal)) == ("TARGET_NOT_CLAIMED", True)
        migration.resume()
        await complete(end, migration)

    trial(end, steps)


def test_a_target_that_forgot_rounds_gets_everything_again(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        for target in end.targets:
            target.write_bytes(b"x" * SIZE)
        end.carrier.durable = 0
        end.carrier.failure = LOST
        await until(migration.bell, lambda: migration.snapshot().progress.suspect_volumes > 0)
        await complete(end, migration)

    trial(end, steps)


def test_a_target_without_its_state_gets_everything_again(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        for target in end.targets:
            target.write_bytes(b"x" * SIZE)
        end.peer.errors["resume"] = [NotFound("SESSION_NOT_FOUND", "no such session")]
        end.carrier.failure = LOST
        await end.peer.until("open_session")
        await complete(end, migration)

    trial(end, steps)


def test_a_session_whose_answer_was_lost_is_found(end: Source) -> None:
    """Opened anew by a target without its state; the source has not heard of it."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        for target in end.targets:
            target.write_bytes(b"x" * SIZE)
        end.carrier.durable = 0  # of the session that is there now
        end.peer.errors["resume"] = [NotFound("SESSION_NOT_FOUND", "no such session")]
        end.peer.errors["open_session"] = [Unavailable("PEER_LOST", "no answer")]
        end.carrier.failure = LOST
        await end.peer.until("open_session")
        await complete(end, migration)
        calls = [call for call in end.peer.calls if call.startswith(("resume", "open_session"))]
        assert calls == ["resume 2", "open_session", "resume 3"]
        asked = end.peer.requests[-1]
        assert (asked.secret, asked.epoch) == ("secret", 2)

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


def test_a_full_state_directory_holds_a_migration_where_it_is(end: Source, tmp_path: Path) -> None:
    """It is this host's: no pause would mend it, and each connection is written down too."""
    fill = keep_journal(end, tmp_path / "state")

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.SYNCING)
        fill(True)
        end.write(0, b"written meanwhile")
        for _ in range(3):
            await until(migration.bell, lambda: "cannot be written" in trouble_of(migration))
            migration._sender.note(trouble="")
        assert_state(migration, State.SYNCING)
        assert migration.owner is Owner.SOURCE
        fill(False)
        await until(migration.bell, lambda: trouble_of(migration) == "")
        await complete(end, migration)

    trial(end, steps)


def trouble_of(migration: SourceMigration) -> str:
    return migration.snapshot().progress.trouble


def test_a_full_state_directory_is_waited_for_without_a_limit(
    end: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience_module, "RETRY_FOR_SECONDS", 0.05)
    monkeypatch.setattr(patience_module, "FIRST_RETRY_SECONDS", 0.01)
    fill = keep_journal(end, tmp_path / "state")

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        fill(True)
        end.carrier.failure = LOST
        await asyncio.sleep(0.5)
        assert_state(migration, State.CONVERGED)
        fill(False)
        await complete(end, migration)

    trial(end, steps)


def test_a_pause_that_cannot_be_written_down_waits(end: Source, tmp_path: Path) -> None:
    fill = keep_journal(end, tmp_path / "state")
    full = ResourceExhausted("DISK_FULL", "the disk under target is full", side="target")

    def fill_both() -> None:
        fill(True)
        raise full

    end.carrier.before["send"] = fill_both

    async def steps(migration: SourceMigration) -> None:
        await until(migration.bell, lambda: "cannot be written" in trouble_of(migration))
        assert_state(migration, State.SEEDING)
        assert migration.snapshot().refusal is None
        end.carrier.before["send"] = lambda: throw(full)
        fill(False)
        await reach(migration, State.PAUSED)
        assert migration.snapshot().refusal is full
        migration.resume()
        await complete(end, migration)

    trial(end, steps)
