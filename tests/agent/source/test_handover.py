"""Cutovers of a whole migration: refused, cancelled, failing in each phase, not answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import source as source_module
from agent.disk import SourceDisk
from agent.errors import Cancelled, DataLoss, FailedPrecondition, Unavailable
from agent.errors import WarmsyncError as Error
from agent.migration import Owner, Step
from agent.source import SourceMigration
from agent.source import cutover as cutover_module
from agent.source import proof as proof_module
from agent.source.cutover import Cutover
from agent.state import Event, State
from native.blockio import BlockDevice
from tests.agent.ends import Source, until
from tests.agent.migrations import (
    LOST,
    STOPPED,
    assert_given_up,
    assert_state,
    complete,
    ended,
    fail_at,
    keep_journal,
    reach,
    throw,
    trial,
    written_state,
)


def test_a_cutover_waits_a_moment_for_what_was_converged_before(end: Source) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        migration._books.move(Event.DIVERGE)
        await migration.cut_over(force=False)
        assert_state(migration, State.CUT_OVER)

    trial(end, steps)


def test_a_cutover_of_what_does_not_converge_again_is_refused(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "RECONVERGE_SECONDS", 0.05)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        async with migration._course.at_rest:  # no round, no look
            if migration.state is State.CONVERGED:
                migration._books.move(Event.DIVERGE)
            with pytest.raises(FailedPrecondition) as caught:
                await migration.cut_over(force=False)
        assert caught.value.reason == "NOT_CONVERGED"

    trial(end, steps)


def test_a_clock_that_is_set_back_makes_no_downtime_negative(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cold migration's counts from its start, by the journal: the agent may have been away."""
    end.plan = replace(end.plan, cold=True)
    now = time.time

    async def steps(migration: SourceMigration) -> None:
        monkeypatch.setattr(time, "time", lambda: now() - 3600)
        await until(migration.bell, lambda: migration.snapshot().step is Step.DONE)
        took = migration.snapshot().progress.downtime_seconds
        assert took is not None
        assert took > 0

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
            end.peer.errors["release"] = [DataLoss("ROOTS_DIFFER", "no")]
        elif phase == "fence":
            monkeypatch.setattr("agent.disk.SourceDisk.fence", lambda disk: 1 / 0)
        else:
            error = DataLoss("SOURCE_IO_ERROR", "unreadable")
            monkeypatch.setattr(end.trackers[0], "look", lambda: throw(error))
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


def test_a_proof_that_does_not_go_on_keeps_no_vm_off(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's disk hangs: the source owns again, and the next one works."""
    monkeypatch.setattr(proof_module, "ACK_SECONDS", 0.3)
    monkeypatch.setattr(proof_module, "LOOK_SECONDS", 0.01)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.gates["prove"] = asyncio.Event()
        with pytest.raises(Unavailable) as caught:
            await migration.cut_over(force=False)
        assert caught.value.reason == "PEER_LOST"
        assert not end.is_fenced()
        end.peer.gates.clear()
        end.write(0, b"the VM runs again")
        await complete(end, migration)

    trial(end, steps)


def test_an_internal_error_in_the_release_gives_nothing_back(end: Source) -> None:
    """The target may own: the fence stays, and nobody tells it to give up."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.errors["release"] = [ZeroDivisionError("odd")]
        with pytest.raises(FailedPrecondition) as caught:
            await migration.cut_over(force=False)
        assert caught.value.reason == "OWNER_UNKNOWN"
        await ended(migration)
        assert_state(migration, State.FAILED)
        assert migration.owner is Owner.NOBODY
        assert end.is_fenced()
        assert not any(call.startswith("abort") for call in end.peer.calls)

    trial(end, steps)


@pytest.mark.parametrize(
    "reason", ["NOT_PROVEN", "NOT_RELEASABLE", "BAD_CUTOVER_CERTIFICATE", "SIGNATURE_INVALID"]
)
def test_a_release_that_is_refused_for_now_lifts_the_fence(end: Source, reason: str) -> None:
    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.errors["release"] = [FailedPrecondition(reason, "restarted, or damaged")]
        with pytest.raises(FailedPrecondition):
            await migration.cut_over(force=False)
        await reach(migration, State.CONVERGED)
        assert migration.owner is Owner.SOURCE
        assert not end.is_fenced()
        await migration.cut_over(force=False)
        assert end.equal()
        await migration.finish()

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
        monkeypatch.setattr(end.trackers[0], "stop", lambda: throw(OSError(16, "pin is busy")))
        await migration.cut_over(force=False)
        assert_state(migration, State.CUT_OVER)
        monkeypatch.undo()
        await migration.finish()

    trial(end, steps)


def damage(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    error = DataLoss("COPIES_DIFFER", "what was read back differs")
    monkeypatch.setattr("agent.source.proof.SourceProof._compare", lambda *_: throw(error))


def refuse_release(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    end.peer.errors["release"] = [FailedPrecondition("NOT_PROVEN", "proved before the restart")]


@pytest.mark.parametrize("arm", [damage, refuse_release])
def test_a_cutover_that_came_to_nothing_is_told_when_the_source_owns(
    end: Source,
    arm: Callable[[Source, pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever hears it boots the VM again: no fence may be in its way, nor come back."""
    keep_journal(end, tmp_path / "state")
    arm(end, monkeypatch)
    unfence = SourceDisk.unfence

    def slowly(disk: SourceDisk) -> None:
        time.sleep(0.2)
        unfence(disk)

    monkeypatch.setattr(SourceDisk, "unfence", slowly)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        with pytest.raises(Error):
            await migration.cut_over(force=False)
        assert migration.state is not State.CUTTING_OVER
        assert not end.is_fenced()
        assert written_state(end) == ("SYNCING", False)
        await migration.cancel()

    trial(end, steps)


def test_a_refusal_that_cannot_be_written_down_is_not_told(
    end: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal says that the fence is to be up: at the agent's next start it would be."""
    fill = keep_journal(end, tmp_path / "state")

    def refuse() -> None:
        fill(True)
        raise FailedPrecondition("NOT_PROVEN", "proved before the restart")

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.before["release"] = refuse
        caller = asyncio.create_task(migration.cut_over(force=False))
        trouble = "the journal in the state directory cannot be written"
        await until(migration.bell, lambda: trouble in migration.snapshot().progress.trouble)
        assert not caller.done()
        assert_state(migration, State.CUTTING_OVER)
        assert written_state(end) == ("CUTTING_OVER", True)
        fill(False)
        await caller  # room was made: it is tried once more
        assert_state(migration, State.CUT_OVER)
        assert end.equal()
        await migration.finish()

    trial(end, steps)


class Stuck:
    """A device that stays read-only once it is."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def set_read_only(self, read_only: bool) -> None:
        if not read_only:
            raise OSError(1, "Operation not permitted")
        self._device.set_read_only(True)


def test_a_fence_that_cannot_be_lifted_is_told(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_release(end, monkeypatch)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        for disk in end.disks:
            monkeypatch.setattr(disk, "device", Stuck(disk.device))
        with pytest.raises(FailedPrecondition) as caught:
            await migration.cut_over(force=False)
        assert caught.value.reason == "STILL_FENCED"
        await ended(migration)
        assert_state(migration, State.FAILED)
        assert migration.snapshot().error is caught.value

    trial(end, steps)


def test_a_cancel_is_not_overtaken_by_the_release(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the turn in which the last step before the release has just ended."""
    prove = Cutover._prove_equal
    proved = asyncio.Event()
    go_on: list[asyncio.Future[None]] = []

    async def prove_slowly(cutover: Cutover) -> object:
        found = await prove(cutover)
        go_on.append(asyncio.get_running_loop().create_future())
        proved.set()
        await go_on[0]
        return found

    monkeypatch.setattr(Cutover, "_prove_equal", prove_slowly)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        asked = asyncio.ensure_future(migration.cut_over(force=False))
        await proved.wait()
        go_on[0].set_result(None)
        await migration.cancel()
        await asyncio.wait([asked])
        assert isinstance(asked.exception(), Cancelled)
        assert not any(call.startswith("release") for call in end.peer.calls)
        assert_given_up(end, cancelled=True)

    trial(end, steps)
