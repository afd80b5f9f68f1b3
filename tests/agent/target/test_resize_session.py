"""A resize between proof and release: who owns meanwhile, and what is believed afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest

from agent import resize
from agent.certificate.statement import canonical
from agent.config import ResizeConfig
from agent.errors import DataLoss, FailedPrecondition, Unavailable, WarmsyncError
from agent.imprint import read_root
from agent.layout.partitions import Scheme
from agent.layout.superblock import Kind
from agent.migration import Depth, Resize, Role
from agent.peer import Proof
from agent.record import dump, load_target
from agent.registry import Registry
from agent.resize import GrowReport
from agent.source import cutover as cutover_module
from agent.state import State
from agent.target import TargetSession, new_session
from agent.target.claim import claim
from agent.target.growth import Growth
from native.blockio import BlockDevice
from tests.agent.carriers.rig import SIZE, frame_of, image, request, until
from tests.agent.certificates import signer, statement_of
from tests.agent.ends import Source, source
from tests.agent.rpc_helpers import run
from tests.agent.source.test_cutover import refusal, releases, seeded
from tests.agent.target.sessions import is_claimed, receive, registry_of

GONE = Unavailable("PEER_UNREACHABLE", "no answer")
NOT_UNDONE = DataLoss("GROW_NOT_UNDONE", "no")
Steps = Callable[[Registry, TargetSession], Coroutine[Any, Any, None]]


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    with source(tmp_path, monkeypatch) as made:
        made.plan = replace(made.plan, resize=True)
        made.peer.resizes = (Resize("ext", 1, 2, 0.5),)
        yield made


def test_the_source_owns_and_is_fenced_during_the_resize(end: Source) -> None:
    async def main() -> None:
        cutover = await seeded(end)
        seen: list[tuple[bool, bool]] = []
        end.peer.before["resize"] = lambda: seen.append((end.is_fenced(), cutover.releasing))
        await cutover.run()
        assert seen == [(True, False)]
        assert end.peer.calls == ["prove 2", "resize 2", "release 2"]
        assert end.sender().progress.resizes == end.peer.resizes

    run(main)


def test_not_asked_for_it_is_not_done(end: Source) -> None:
    end.plan = replace(end.plan, resize=False)

    async def main() -> None:
        await (await seeded(end)).run()
        assert end.peer.calls == ["prove 2", "release 2"]

    run(main)


def test_the_resize_is_a_part_of_the_downtime(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = type("clock", (), {"monotonic": staticmethod(lambda: now[0])})
    monkeypatch.setattr(cutover_module, "time", clock)

    def later() -> None:
        now[0] += 60.0

    async def main() -> None:
        cutover = await seeded(end)
        end.peer.before["resize"] = later
        await cutover.run()
        progress = end.sender().progress
        assert progress.downtime_parts.resize == 60.0
        assert sum(astuple(progress.downtime_parts)) == progress.downtime_seconds

    run(main)


def test_an_unanswered_resize_is_asked_again(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutover_module, "_RETRY_SECONDS", 0)

    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["resize"] = [GONE, GONE]
        await cutover.run()
        assert end.peer.calls == ["prove 2", *["resize 2"] * 3, "release 2"]

    run(main)


@pytest.mark.parametrize("error", [NOT_UNDONE, GONE], ids=["not undone", "gone"])
def test_nothing_is_released_if_the_resize_is_not_known_to_have_ended_well(
    end: Source, monkeypatch: pytest.MonkeyPatch, error: WarmsyncError
) -> None:
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)

    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["resize"] = [error]
        assert await refusal(cutover) is error
        assert releases(end) == []
        assert not cutover.releasing

    run(main)


def test_a_write_during_the_resize_is_noticed(end: Source) -> None:
    async def main() -> None:
        cutover = await seeded(end)
        end.peer.before["resize"] = lambda: end.write(4096, b"still here")
        assert (await refusal(cutover)).reason == "NOT_QUIESCED"
        assert releases(end) == []

    run(main)


def test_a_target_that_could_not_be_brought_back_pauses_and_leaves_the_source_the_owner(
    end: Source,
) -> None:
    async def main() -> None:
        migration = end.migration()
        end.peer.errors["resize"] = [NOT_UNDONE]
        migration.start()
        await until(migration.bell, lambda: migration.state is State.CONVERGED)
        with pytest.raises(DataLoss) as caught:
            await migration.cut_over(force=False)
        assert caught.value.reason == "GROW_NOT_UNDONE"
        await until(migration.bell, lambda: migration.state is State.PAUSED)
        assert not end.is_fenced()
        assert migration.snapshot().refusal is caught.value
        assert releases(end) == []
        await migration.cancel()

    run(main)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = image(tmp_path, "target.img", seed=2)
    with path.open("ab") as file:
        file.truncate(2 * SIZE)
    return path


def trial(target: Path, steps: Steps, depth: Depth = Depth.FULL) -> None:
    """Let a session receive something; then the steps."""

    async def main() -> None:
        registry = registry_of(target.parent, target)
        try:
            session = await registry.open_session(request([target], verify=depth))
            session.begin_stream()
            await receive(session, image(target.parent, "source.img", seed=1))
            await steps(registry, session)
        finally:
            await registry.close()

    run(main)


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Grow by a write at the start of the device, as a file system's superblock is."""
    written: list[bytes] = []

    def grow(device: BlockDevice, data_bytes: int, *_: object) -> GrowReport:
        with Path(device.path).open("r+b") as file:
            file.write(b"grown")
        written.append(b"grown")
        return GrowReport(Kind.EXT, Scheme.NONE, data_bytes, 2 * SIZE, 5, 1.0, 0.5)

    monkeypatch.setattr(resize, "grow", grow)
    return written


async def refused(steps: Awaitable[object]) -> str:
    with pytest.raises(WarmsyncError) as caught:
        await steps
    return caught.value.reason


def test_only_what_was_proved_is_resized(target: Path, grown: list[bytes]) -> None:
    async def steps(_: Registry, session: TargetSession) -> None:
        assert await refused(session.resize(1)) == "NOT_PROVEN"
        await session.prove(1)
        assert await refused(session.resize(2)) == "NOT_RELEASABLE"
        assert grown == []

    trial(target, steps)


def release(session: TargetSession, proofs: tuple[Proof, ...]) -> None:
    said = statement_of(session, 1, proofs)
    session.release(1, canonical(said), signer(Role.SOURCE).sign(said, Role.SOURCE))


def test_a_resized_target_is_released_as_it_was_proved(target: Path, grown: list[bytes]) -> None:
    async def steps(_: Registry, session: TargetSession) -> None:
        proofs = await session.prove(1)
        first = await session.resize(1)
        assert await session.resize(1) == first  # the answer may have been lost
        assert len(grown) == 1
        assert (first[0].file_system, first[0].after_bytes) == ("ext", 2 * SIZE)
        release(session, proofs)
        assert session.state is State.CUT_OVER
        assert not is_claimed(target)
        assert await session.resize(1) == first
        assert session.snapshot().progress.resizes == first

    trial(target, steps)


@pytest.mark.parametrize("depth", list(Depth))
def test_resized_and_not_released_it_has_nothing(
    target: Path, grown: list[bytes], depth: Depth
) -> None:
    """Until the source has come back nothing is received or proved; then it has to compare."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        before = await session.prove(1)
        await session.resize(1)
        assert load_target(dump(session.record())).resizing
        frame = frame_of(target, 0, 65536, generation=2)
        for stream in (1, 2, 3):
            assert await refused(session.write(memoryview(frame), stream)) == "SESSION_NOT_OPEN"
            assert await refused(session.flush(2, stream)) == "SESSION_NOT_OPEN"
        assert await refused(session.prove(1)) == "NOT_PROVEN"
        for call in (session.begin_stream, lambda: session.expect(1), session.check):
            with pytest.raises(FailedPrecondition) as caught:
                call()
            assert caught.value.reason == "SESSION_NOT_OPEN"
        for epoch in (2, 3):  # the first answer may have been lost
            assert await session.resume(session.secret, epoch) == 0
        assert not load_target(dump(session.record())).resizing
        assert session.snapshot().progress.resizes == ()
        with pytest.raises(FailedPrecondition):
            release(session, before)
        session.begin_stream()
        await receive_again(session, target)
        if depth is Depth.FULL:
            [proof] = await session.prove(1)
            assert proof.root == await asyncio.to_thread(root_of, target)
            assert proof != before[0]

    trial(target, steps, depth)


async def receive_again(session: TargetSession, source: Path) -> None:
    """Another chunk: that of the resize is not written again."""
    stream = session._intake.stream
    await session.write(memoryview(frame_of(source, 65536, 65536, generation=1)), stream)
    await session.flush(1, stream)


def root_of(path: Path) -> bytes:
    return read_root(str(path), SIZE, lambda *_: None)


class Slow:
    """A resize that takes until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.devices: list[BlockDevice] = []
        self.failures: list[Exception] = []
        monkeypatch.setattr(resize, "grow", self._grow)

    def _grow(self, device: BlockDevice, data_bytes: int, *_: object) -> GrowReport:
        self.devices.append(device)
        self.begun.set()
        assert self.go.wait(20)
        try:
            device.size_bytes()
        except ValueError as error:  # closed
            self.failures.append(error)
        return GrowReport(Kind.EXT, Scheme.NONE, data_bytes, 2 * SIZE, 5, 1.0, 0.5)


def test_given_up_during_the_resize_the_device_is_let_go_once_it_has_ended(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)

    async def steps(_: Registry, session: TargetSession) -> None:
        await session.prove(1)
        asked = asyncio.ensure_future(session.resize(1))
        assert await asyncio.to_thread(slow.begun.wait, 20)
        session.abort("no reason", cancelled=True)
        assert is_claimed(target)
        slow.go.set()
        assert await refused(asked) == "NOT_RELEASABLE"
        assert slow.failures == []
        assert not is_claimed(target)

    trial(target, steps)


def test_a_source_that_comes_back_waits_for_the_resize(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)

    async def steps(_: Registry, session: TargetSession) -> None:
        await session.prove(1)
        asked = asyncio.ensure_future(session.resize(1))
        assert await asyncio.to_thread(slow.begun.wait, 20)
        back = asyncio.ensure_future(session.resume(session.secret, 2))
        await asyncio.sleep(0.05)
        assert not back.done()
        slow.go.set()
        assert await back == 0
        assert await refused(asked) == "SESSION_SUPERSEDED"
        assert slow.failures == []

    trial(target, steps)


def test_what_a_dying_program_holds_is_waited_for(target: Path) -> None:
    plan = new_session(request([target])).plan
    growth = Growth(target.parent / "resize", plan, ResizeConfig())
    held = BlockDevice(str(target), writable=True, exclusive=True)
    with pytest.raises(FailedPrecondition):  # held by somebody else
        claim(plan.volumes, (str(target),), None)
    release_later = threading.Timer(0.3, held.close)
    release_later.start()
    for device in claim(plan.volumes, (str(target),), growth):
        device.close()
    release_later.join()


def test_what_came_of_it_is_written_down(target: Path) -> None:
    """Noise is no file system: it is not grown, told, and may be released."""

    async def steps(_: Registry, session: TargetSession) -> None:
        proofs = await session.prove(1)
        [told] = await session.resize(1)
        assert told.error is not None
        assert told.error.reason == "GROW_UNSUPPORTED"
        [kept] = load_target(dump(session.record())).progress.resizes
        assert kept.error is not None
        assert (kept.error.reason, kept.error.values) == (told.error.reason, told.error.values)
        release(session, proofs)

    trial(target, steps)
