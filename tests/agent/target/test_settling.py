"""What a person settles at a target whose source is gone: the VM's disk, and this host's slot."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.certificate.statement import canonical
from agent.errors import FailedPrecondition, ResourceExhausted, WarmsyncError
from agent.journal import Journal
from agent.migration import Owner, Role
from agent.registry import Registry
from agent.state import Event, State
from agent.target import TargetSession
from native.blockio import BlockDevice
from tests.agent.carriers.rig import request
from tests.agent.certificates import signer, statement_of
from tests.agent.rpc_helpers import run
from tests.agent.target.sessions import (
    STEP,
    assert_state,
    is_claimed,
    receive,
    refused,
    registry_of,
    trial,
)
from tests.content import read_all

ENDS = {Owner.SOURCE: State.ROLLED_BACK, Owner.TARGET: State.COMPLETED}


async def release(session: TargetSession, source: Path) -> None:
    """Bring a session to where its target owns, as after a release."""
    session.begin_stream()
    await receive(session, source)
    session._ledger.move(Event.CUT_OVER, Event.RELEASE)
    session._intake.close()
    session._holding.give_back()


async def refusal(registry: Registry, session: TargetSession, owner: Owner) -> str:
    with pytest.raises(WarmsyncError) as caught:
        await registry.settle(session.id, owner)
    return caught.value.reason


@pytest.mark.parametrize("owner", ENDS)
def test_a_released_target_whose_source_is_gone(source: Path, target: Path, owner: Owner) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await release(session, source)
        assert refused(session.abandon) == "NOT_THE_SOURCE"
        assert refused(lambda: registry.forget(session.id)) == "NOT_ENDED"
        assert (await registry.settle(session.id, owner)) is session
        assert_state(session, ENDS[owner])
        assert session.snapshot().owner is owner
        await registry.settle(session.id, owner)  # may be repeated
        other = Owner.TARGET if owner is Owner.SOURCE else Owner.SOURCE
        assert await refusal(registry, session, other) == "OWNER_KNOWN"
        assert_state(session, ENDS[owner])
        # Its device is free for another migration, and so is its id once it is forgotten.
        registry.forget(session.id)
        again = await registry.open_session(request([target]))
        again.abort("enough", cancelled=True)

    trial(target, steps)


@pytest.mark.parametrize("owner", ENDS)
def test_a_source_that_comes_back_hears_of_it(source: Path, target: Path, owner: Owner) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await release(session, source)
        await registry.settle(session.id, owner)
        if owner is Owner.TARGET:
            assert await session.resume(session.secret, 2) == 1  # released, as it was
            session.finish()
            with pytest.raises(WarmsyncError) as caught:
                await session.reclaim((str(target),))
            assert caught.value.reason == "NOT_RECLAIMABLE"
            return
        with pytest.raises(WarmsyncError) as caught:
            await session.resume(session.secret, 2)
        assert caught.value.reason == "SOURCE_FAILED"
        await session.reclaim((str(target),))
        assert_state(session, State.ROLLED_BACK)

    trial(target, steps)


@pytest.mark.parametrize("owner", ENDS)
def test_a_release_that_is_asked_again_after_it_was_settled(
    source: Path, target: Path, owner: Owner
) -> None:
    """Its answer was lost, and a person has seen that it was carried out."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await receive(session, source)
        said = statement_of(session, 1, await session.prove(1))
        asked = (1, canonical(said), signer(Role.SOURCE).sign(said, Role.SOURCE))
        own = session.release(*asked)
        await registry.settle(session.id, owner)
        if owner is Owner.TARGET:
            assert session.release(*asked) == own
        else:
            assert refused(lambda: session.release(*asked)) == "NOT_RELEASABLE"
        assert_state(session, ENDS[owner])
        assert read_all(target)[:STEP] == read_all(source)[:STEP]

    trial(target, steps)


def test_not_while_the_vm_runs_on_what_shall_be_the_sources(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await release(session, source)
        with BlockDevice(str(target), writable=True, exclusive=True):
            assert await refusal(registry, session, Owner.SOURCE) == "DEVICE_IN_USE"
        assert_state(session, State.CUT_OVER)
        await registry.settle(session.id, Owner.SOURCE)
        assert_state(session, State.ROLLED_BACK)

    trial(target, steps)


def test_not_while_the_boot_hook_runs(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await release(session, source)

        def busy() -> None:
            raise FailedPrecondition("BOOT_UNDER_WAY", "it runs")

        session._ledger.booting.check_idle = busy  # type: ignore[method-assign]
        assert await refusal(registry, session, Owner.SOURCE) == "BOOT_UNDER_WAY"
        assert_state(session, State.CUT_OVER)
        await registry.settle(session.id, Owner.TARGET)  # it runs where it is to run

    trial(target, steps)


def test_a_disk_that_is_gone_is_used_by_nobody(source: Path, target: Path) -> None:
    lose = target.unlink

    async def steps(registry: Registry, session: TargetSession) -> None:
        await release(session, source)
        lose()
        await registry.settle(session.id, Owner.SOURCE)
        assert_state(session, State.ROLLED_BACK)

    trial(target, steps)


def test_what_was_not_released_is_the_sources(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        stream = session.begin_stream()
        await receive(session, source)
        assert await refusal(registry, session, Owner.TARGET) == "OWNER_KNOWN"
        assert await refusal(registry, session, Owner.SOURCE) == "NOT_THE_SOURCE"  # connected
        session.end_stream(None, stream)
        assert await refusal(registry, session, Owner.TARGET) == "OWNER_KNOWN"
        await registry.settle(session.id, Owner.SOURCE)
        assert_state(session, State.CANCELLED)
        assert not is_claimed(target)
        await registry.settle(session.id, Owner.SOURCE)
        assert await refusal(registry, session, Owner.TARGET) == "OWNER_KNOWN"

    trial(target, steps)


@pytest.mark.parametrize("owner", ENDS)
def test_what_was_settled_outlives_the_agent(source: Path, target: Path, owner: Owner) -> None:
    async def main() -> None:
        first = registry_of(target.parent, target)
        session = await first.open_session(request([target]))
        await release(session, source)
        await first.settle(session.id, owner)
        await first.close()
        second = registry_of(target.parent, target)
        try:
            again = second.get(session.id)
            assert again.state is ENDS[owner]
            assert again.snapshot().owner is owner
            second.forget(session.id)
        finally:
            await second.close()

    run(main)


def test_what_cannot_be_written_down_is_not_settled(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await release(session, source)

        def full(*_: object) -> None:
            raise ResourceExhausted("STATE_NOT_KEPT", "full")

        for owner in ENDS:
            with monkeypatch.context() as broken:
                broken.setattr(Journal, "save", full)
                assert await refusal(registry, session, owner) == "STATE_NOT_KEPT"
        await registry.settle(session.id, Owner.TARGET)
        assert_state(session, State.COMPLETED)

    trial(target, steps)
