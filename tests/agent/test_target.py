"""The target's end: what may be written when, and who owns the devices."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentConfig, ResizeConfig
from agent.device import identities
from agent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    WarmsyncError,
)
from agent.growth import Growth
from agent.journal import Journal
from agent.migration import Depth, Role
from agent.registry import Registry
from agent.sender import Workshop
from agent.state import State
from agent.statement import ProvenVolume, Statement, canonical
from agent.store import Store
from agent.target import TargetSession, new_session, open_targets
from agent.witness import Witness
from native.blockio import BlockDevice
from native.chunk import digests
from tests.agent.carriers.rig import SIZE, frame_of, image, request, until
from tests.agent.certificates import hand_over, release, signer, statement_of
from tests.agent.rpc_helpers import run
from tests.agent.virtual import run_virtual
from tests.content import read_all

STEP = 65536
Steps = Callable[[Registry, TargetSession], Coroutine[Any, Any, None]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return image(tmp_path, "source.img", seed=1)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return image(tmp_path, "target.img", seed=2)


def registry_of(directory: Path, *allowed: Path) -> Registry:
    config = AgentConfig(
        state_dir=str(directory),
        bpffs_dir=str(directory / "bpf"),
        allow_devices=tuple(map(str, allowed)),
    )

    def nobody(address: str) -> Any:
        raise AssertionError("a target calls nobody")

    return Registry(config, nobody, signer(Role.TARGET))


def trial(target: Path, steps: Steps) -> None:
    async def main() -> None:
        registry = registry_of(target.parent, target)
        try:
            session = await registry.open_session(request([target]))
            await steps(registry, session)
        finally:
            await registry.close()

    run(main)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(WarmsyncError) as caught:
        call()
    return caught.value.reason


def is_claimed(path: Path) -> bool:
    """Return whether somebody holds a claim on the device."""
    try:
        BlockDevice(str(path), writable=True, exclusive=True).close()
    except OSError:
        return True
    return False


def assert_state(session: TargetSession, state: State) -> None:
    assert session.state is state


async def receive(session: TargetSession, source: Path, generation: int = 1) -> None:
    frame = frame_of(source, 0, STEP, generation=generation)
    assert await session.write(memoryview(frame), 1) == 1
    await session.flush(generation, 1)


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


def test_a_stream_that_ends_is_a_cut_and_may_begin_again(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await receive(session, source)
        session.end_stream(None, 1)
        assert_state(session, State.SYNCING)
        assert session.snapshot().incomplete
        assert is_claimed(target)
        with pytest.raises(Unavailable):  # what is left of the old stream writes nothing
            await session.write(memoryview(frame_of(source, 0, STEP, generation=2)), 1)
        old = session.token
        assert await session.resume(session.secret, 2) == 1
        with pytest.raises(FailedPrecondition) as late:
            registry.session(old)
        assert late.value.reason == "SESSION_SUPERSEDED"
        assert registry.session(session.token) is session
        stream = session.begin_stream()
        await session.write(memoryview(frame_of(source, 0, STEP, generation=2)), stream)
        await session.flush(2, stream)
        await hand_over(session, 2)
        assert await session.resume(session.secret, 3) == 2
        assert_state(session, State.CUT_OVER)
        assert not is_claimed(target)

    trial(target, steps)


def test_the_newer_fences_the_older(target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await session.resume(session.secret, 5)
        for epoch in (1, 4, 5):
            with pytest.raises(FailedPrecondition) as refusal:
                await session.resume(session.secret, epoch)
            assert refusal.value.reason == "SESSION_SUPERSEDED"
        with pytest.raises(NotFound):
            await session.resume("guessed", 6)

    trial(target, steps)


def test_a_target_is_found_again(source: Path, target: Path) -> None:
    """By the next agent of this state directory, with its claim and its last generation."""

    async def main() -> None:
        first = registry_of(target.parent, target)
        session = await first.open_session(request([target]))
        stream = session.begin_stream()
        await receive(session, source)
        assert stream == 1
        await first.close()
        assert not is_claimed(target)
        second = registry_of(target.parent, target)
        try:
            again = second.session_of(session.secret)
            assert again.state is State.SYNCING
            assert is_claimed(target)
            assert await again.resume(session.secret, 2) == 1
            again.abort("enough", cancelled=True)
        finally:
            await second.close()
        third = registry_of(target.parent, target)
        try:
            assert third.session_of(session.secret).state is State.CANCELLED
            assert not is_claimed(target)
        finally:
            await third.close()

    run(main)


def test_reclaim(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        allowed = (str(target),)
        assert refused(lambda: session.check_reclaimable(allowed)) == "NOT_RECLAIMABLE"
        session.begin_stream()
        await receive(session, source)
        await hand_over(session, 1)
        with BlockDevice(str(target), writable=True, exclusive=True):  # a VM runs on it
            assert refused(lambda: session.check_reclaimable(allowed)) == "DEVICE_IN_USE"
        assert_state(session, State.CUT_OVER)
        session.check_reclaimable(allowed)
        session.reclaim()
        session.check_reclaimable(allowed)
        session.reclaim()
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


def proving(target: Path, steps: Steps, depth: Depth = Depth.FULL) -> None:
    """A trial of a session whose bytes are compared."""

    async def main() -> None:
        registry = registry_of(target.parent, target)
        try:
            session = await registry.open_session(request([target], verify=depth))
            session.begin_stream()
            await steps(registry, session)
        finally:
            await registry.close()

    run(main)


def say(session: TargetSession, said: Statement) -> bytes:
    """Ask for the release with this statement; returns the target's signature."""
    signature = signer(Role.SOURCE).sign(said, Role.SOURCE)
    return session.release(said.generation, canonical(said), signature).signature


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "targets").glob("*"))


def otherwise(said: Statement) -> list[Statement]:
    """Statements that differ from what was read back in one thing each."""
    (volume,) = said.volumes
    other = bytes(16)

    def with_volume(**changes: Any) -> Statement:
        made: ProvenVolume = replace(volume, **changes)
        return replace(said, volumes=(made,))

    return [
        with_volume(target_root=other, source_root=other),
        with_volume(target_path="/dev/other"),
        with_volume(size_bytes=SIZE + 1, compared_bytes=SIZE + 1),
        replace(said, migration="other"),
        replace(said, volumes=(volume, volume)),
        replace(
            said,
            depth=Depth.NONE,
            volumes=(replace(volume, compared_bytes=0, source_root=None, target_root=None),),
        ),
    ]


def test_a_target_signs_only_what_it_has_read_back(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await receive(session, source)
        proofs = await session.prove(1)
        said = statement_of(session, 1, proofs)
        for wrong in otherwise(said):
            assert refused(lambda wrong=wrong: say(session, wrong)) == "NOT_PROVEN"  # type: ignore[misc]
        assert_state(session, State.SYNCING)
        assert session.certificate == ""
        first = say(session, said)
        assert say(session, said) == first
        assert session.record().certificate == session.certificate != ""
        assert kept(target.parent) == []

    proving(target, steps)


def test_what_was_written_since_is_not_proven(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await receive(session, source)
        said = statement_of(session, 1, await session.prove(1))
        frame = frame_of(source, STEP, STEP, generation=2, number=2)
        await session.write(memoryview(frame), 1)
        assert refused(lambda: say(session, said)) == "NOT_PROVEN"
        await session.flush(2, 1)
        assert refused(lambda: say(session, said)) == "NOT_RELEASABLE"
        unproved = replace(said, generation=2)
        assert refused(lambda: say(session, unproved)) == "NOT_PROVEN"
        say(session, statement_of(session, 2, await session.prove(2)))
        assert_state(session, State.CUT_OVER)

    proving(target, steps)


async def restarted(
    target: Path, meanwhile: Callable[[], None]
) -> tuple[Registry, TargetSession, Statement, int]:
    """A session that had proved all; its agent ends, something happens, and it is resumed."""
    first = registry_of(target.parent, target)
    session = await first.open_session(request([target], verify=Depth.FULL))
    session.begin_stream()
    await receive(session, image(target.parent, "source.img", seed=1))
    said = statement_of(session, 1, await session.prove(1))
    await first.close()
    meanwhile()
    second = registry_of(target.parent, target)
    again = second.session_of(session.secret)
    return second, again, said, await again.resume(session.secret, 2)


def test_a_restarted_target_has_to_prove_again(target: Path) -> None:
    async def main() -> None:
        registry, session, said, generation = await restarted(target, lambda: None)
        try:
            assert generation == 1
            assert session.unread[0] == 0  # it knows what was read back before
            assert refused(lambda: say(session, said)) == "NOT_PROVEN"
            assert statement_of(session, 1, await session.prove(1)) == said
            say(session, said)
        finally:
            await registry.close()

    run(main)


def test_another_target_in_its_place_has_nothing(target: Path) -> None:
    """The source is told of generation 0, and compares."""

    def put_another() -> None:
        other = image(target.parent, "other.img", seed=3)
        os.replace(other, target)

    async def main() -> None:
        registry, session, _, generation = await restarted(target, put_another)
        try:
            assert generation == 0
            assert session.unread[0] == SIZE
            found = [item async for item in session.digests(0)]
            assert found == [(0, digests(read_all(target)))]
            os.replace(image(target.parent, "third.img", seed=4), target)
            with pytest.raises(FailedPrecondition, match="another device"):
                _ = [item async for item in session.digests(0)]
        finally:
            await registry.close()

    run(main)


def test_a_session_whose_source_is_away_can_be_given_up(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        stream = session.begin_stream()
        assert refused(session.abandon) == "NOT_THE_SOURCE"
        await receive(session, source)
        session.end_stream(None, stream)
        session.abandon()
        assert_state(session, State.CANCELLED)
        assert not is_claimed(target)
        assert refused(session.abandon) == "NOT_THE_SOURCE"

    trial(target, steps)
