"""The target's end: what may be written when, and who owns the devices."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent import target as target_module
from agent.config import ResizeConfig
from agent.device import identities
from agent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from agent.journal import Journal
from agent.migration import Depth, Role
from agent.registry import Registry
from agent.sender import Workshop
from agent.state import State
from agent.store import Store
from agent.target import TargetSession, new_session
from agent.target.claim import open_targets
from agent.target.growth import Growth
from agent.target.witness import Witness
from native.blockio import BlockDevice
from native.chunk import digests
from tests.agent.carriers.rig import SIZE, frame_of, request, until
from tests.agent.certificates import hand_over, release, signer
from tests.agent.migrations import throw
from tests.agent.rpc_helpers import run
from tests.agent.target.sessions import (
    STEP,
    assert_state,
    is_claimed,
    receive,
    refusal,
    refused,
    registry_of,
    trial,
)
from tests.agent.virtual import run_virtual
from tests.content import read_all


def test_a_session_from_claim_to_release(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        assert_state(session, State.PENDING)
        assert is_claimed(target)
        session.begin_stream()
        await receive(session, source)
        assert session.snapshot().incomplete
        await hand_over(session, 1)
        assert (session.state, session.snapshot().incomplete) == (State.CUT_OVER, False)
        assert not is_claimed(target)
        release(session, 1)  # the answer may have been lost
        session.end_stream(None, 1)
        assert_state(session, State.CUT_OVER)
        session.finish()
        session.finish()
        assert_state(session, State.COMPLETED)

    trial(target, steps)


def test_a_release_that_meets_the_end_of_the_agent_is_none(source: Path, target: Path) -> None:
    """It could not be written down: the next agent would not know of it."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await receive(session, source)
        registry._journal.close()
        for _ in range(2):  # the source asks again
            with pytest.raises(Unavailable) as caught:
                await hand_over(session, 1)
            assert caught.value.reason == "AGENT_STOPPED"
        assert (session.state, session.certificate) == (State.SYNCING, "")
        assert is_claimed(target)

    trial(target, steps)


def test_a_session_that_could_not_be_written_down_is_gone(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it gives up waiting for its source one day, and writes that over its successor."""
    monkeypatch.setattr(target_module, "OPENING_SECONDS", 0.1)
    save, full = Journal.save, [True]

    def saving(self: Journal, *values: Any, **more: Any) -> None:
        if full.pop() if full else False:
            raise ResourceExhausted("STATE_NOT_KEPT", "no room")
        save(self, *values, **more)

    monkeypatch.setattr(Journal, "save", saving)

    async def main() -> None:
        registry = registry_of(target.parent, target)
        try:
            with pytest.raises(ResourceExhausted):
                await registry.open_session(request([target]))
            assert not is_claimed(target)
            monkeypatch.setattr(target_module, "OPENING_SECONDS", 60.0)
            session = await registry.open_session(request([target]))
            session.begin_stream()
            await asyncio.sleep(0.3)
            [(_, _, record)] = registry._journal.load()
            assert record["history"][-1]["state"] == "SEEDING"
        finally:
            await registry.close()

    run(main)


def test_release_is_for_the_last_durable_generation(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        assert refused(lambda: release(session, 0)) == "NOT_RELEASABLE"
        session.begin_stream()
        assert refused(lambda: release(session, 0)) == "NOT_RELEASABLE"
        await receive(session, source)
        for generation in (0, 2):
            assert refused(partial(release, session, generation)) == "NOT_RELEASABLE"
        assert_state(session, State.SYNCING)
        assert is_claimed(target)

    trial(target, steps)


@pytest.mark.parametrize("cancelled", [True, False])
def test_abort_releases_and_says_incomplete(target: Path, cancelled: bool) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        for _ in range(2):  # may be repeated
            session.abort("no reason", cancelled=cancelled)
        assert session.state is (State.CANCELLED if cancelled else State.FAILED)
        assert session.snapshot().incomplete
        assert not is_claimed(target)
        assert refused(lambda: release(session, 0)) == "NOT_RELEASABLE"
        session.end_stream(None, 1)

    trial(target, steps)


def test_abort_after_the_release_is_refused(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await receive(session, source)
        await hand_over(session, 1)
        for cancelled in (True, False):
            reason = refused(partial(session.abort, "late", cancelled=cancelled))
            assert reason == "ALREADY_RELEASED"
        assert_state(session, State.CUT_OVER)

    trial(target, steps)


def test_nothing_is_written_after_the_release(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await receive(session, source)
        await hand_over(session, 1)
        before = read_all(target)
        with pytest.raises(FailedPrecondition) as refusal:
            await receive(session, source, generation=2)
        assert refusal.value.reason == "SESSION_NOT_OPEN"
        assert read_all(target) == before

    trial(target, steps)


def test_what_ended_a_session_is_told_to_who_still_sends(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        session.abort("enough", cancelled=False)
        with pytest.raises(FailedPrecondition) as told:
            await receive(session, source)
        assert told.value.reason == "SOURCE_FAILED"
        with pytest.raises(FailedPrecondition):
            await session.flush(1, 1)

    trial(target, steps)


def test_an_end_that_cannot_be_written_down_is_told(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        seen = session.bell.count
        full = ResourceExhausted("STATE_DIR_FULL", "no space left")
        monkeypatch.setattr(Journal, "save", lambda *args: throw(full))
        session.give_up(Unavailable("SOURCE_LOST", "gone"))
        await asyncio.wait_for(session.bell.wait(seen), 5)
        assert_state(session, State.FAILED)

    trial(target, steps)


def test_reclaim(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        allowed = (str(target),)
        assert await refusal(session.reclaim(allowed)) == "NOT_RECLAIMABLE"
        session.begin_stream()
        await receive(session, source)
        await hand_over(session, 1)
        with BlockDevice(str(target), writable=True, exclusive=True):  # a VM runs on it
            assert await refusal(session.reclaim(allowed)) == "DEVICE_IN_USE"
        assert_state(session, State.CUT_OVER)
        await session.reclaim(allowed)
        await session.reclaim(allowed)
        assert_state(session, State.ROLLED_BACK)
        assert refused(session.finish) == "ILLEGAL_TRANSITION"
        assert session.snapshot().incomplete

    trial(target, steps)


def test_generations_follow_each_other(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        with pytest.raises(DataLoss, match="cannot follow 0"):
            await session.flush(2, 1)
        await receive(session, source)
        with pytest.raises(DataLoss, match="nothing of it written"):
            await session.write(memoryview(frame_of(source, 0, STEP, generation=1)), 1)
        await receive(session, source, generation=2)

    trial(target, steps)


def test_one_stream(target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        assert refused(session.begin_stream) == "SESSION_NOT_OPEN"

    trial(target, steps)


def session_of(target: Path, device: BlockDevice) -> TargetSession:
    """Return a session without a registry."""
    workshop = Workshop(None, None, 1)  # type: ignore[arg-type]
    record = new_session(request([target]))
    witness = Witness(
        Depth.NONE, record.plan.volumes, [Store(None)], workshop.threads, workshop.pool
    )
    return TargetSession(
        record,
        [device],
        workshop,
        Journal(None),
        (str(target),),
        witness=witness,
        signer=signer(Role.TARGET),
        growth=Growth(target.parent / "resize", record.plan, ResizeConfig()),
    )


def test_a_source_that_never_begins(target: Path) -> None:
    """The claim on the devices does not outlive a source that died after opening."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        device = BlockDevice(str(target), writable=True, exclusive=True)
        session = session_of(target, device)
        await asyncio.sleep(59)
        assert_state(session, State.PENDING)
        await until(session.bell, lambda: session.state is State.FAILED)
        error = session.snapshot().error
        assert isinstance(error, Unavailable)
        assert error.reason == "SOURCE_LOST"
        assert not is_claimed(target)

    run_virtual(main)


def test_a_stream_that_has_begun_has_no_deadline(target: Path) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        device = BlockDevice(str(target), writable=True, exclusive=True)
        session = session_of(target, device)
        session.begin_stream()
        await asyncio.sleep(86400)
        assert_state(session, State.SEEDING)
        session.abort("enough", cancelled=True)

    run_virtual(main)


def test_digests(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        before = digests(read_all(target))
        assert [item async for item in session.digests(0)] == [(0, before)]
        session.begin_stream()
        await receive(session, source)
        with pytest.raises(InvalidArgument):
            _ = [item async for item in session.digests(1)]
        found = [item async for item in session.digests(0)]
        assert found == [(0, digests(read_all(target)))]
        session.abort("enough", cancelled=True)
        with pytest.raises(FailedPrecondition, match="nothing to compare"):
            _ = [item async for item in session.digests(0)]

    trial(target, steps)


def test_the_agent_stops(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        session.close()
        assert_state(session, State.SEEDING)  # goes on with the next start
        assert not is_claimed(target)

    trial(target, steps)


@pytest.mark.parametrize("boot", ["this host", "another"])
def test_a_target_that_is_its_own_source(target: Path, boot: str, tmp_path: Path) -> None:
    """Also under another name; device numbers of another host mean nothing."""
    alias = tmp_path / "alias.img"
    alias.hardlink_to(target)
    asked = request([target], boot_id=boot, source_identities=(identities(str(alias)),))
    if boot == "another":
        for opened in open_targets(asked, (str(target),), "this host"):
            opened.close()
        return
    with pytest.raises(InvalidArgument) as caught:
        open_targets(asked, (str(target),), "this host")
    assert caught.value.reason == "SAME_DEVICE"


def test_all_targets_or_none(target: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.img"
    small.write_bytes(bytes(SIZE - 1))
    asked = request([target, small])
    with pytest.raises(FailedPrecondition) as caught:
        open_targets(asked, (str(target), str(small)), "x")
    assert caught.value.reason == "TARGET_TOO_SMALL"
    assert caught.value.values["needed_bytes"] == str(SIZE)
    assert not is_claimed(target)
    larger = tmp_path / "larger.img"
    larger.write_bytes(bytes(SIZE + 4096))
    for opened in open_targets(request([larger]), (str(larger),), "x"):
        opened.close()


def test_one_target_twice_under_two_names(target: Path) -> None:
    other = target.with_name("other.img")
    other.hardlink_to(target)
    with pytest.raises(FailedPrecondition) as caught:
        open_targets(request([target, other]), (str(target), str(other)), "x")
    assert caught.value.reason == "DEVICE_IN_USE"
    assert not is_claimed(target)
