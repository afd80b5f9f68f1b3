"""What a target reads back, and signs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.certificate.statement import ProvenVolume, Statement, canonical
from agent.errors import FailedPrecondition
from agent.migration import Depth, Role
from agent.registry import Registry
from agent.state import State
from agent.target import TargetSession
from agent.target import claim as claim_module
from agent.target import holding as holding_module
from native.chunk import digests
from tests.agent.carriers.rig import SIZE, frame_of, image, request
from tests.agent.certificates import signer, statement_of
from tests.agent.rpc_helpers import run
from tests.agent.target.sessions import (
    STEP,
    Steps,
    assert_state,
    receive,
    refused,
    registry_of,
)
from tests.content import read_all


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


def test_another_target_in_its_place_has_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no nameplate tells that it is another; the source is told of generation 0."""
    for module in (claim_module, holding_module):
        monkeypatch.setattr(module, "nameplate", lambda device: "")

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
