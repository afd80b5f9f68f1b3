"""Both ends compared: what differs, what is pending, and what the source cannot read."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from agent import reader as reader_module
from agent.disk import SourceDisk
from agent.errors import DataLoss, WarmsyncError
from agent.migration import Comparison, Mismatch, UnreadRange
from agent.source import SourceMigration
from agent.source import verify as verify_module
from agent.source.verify import compare_ends
from agent.state import State
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES, digests
from native.scan import digest
from tests.agent.ends import SIZE, Source, source
from tests.agent.migrations import STOPPED, complete, reach, trial
from tests.agent.rpc_helpers import run

STEP = 4 * CHUNK_BYTES
CHUNKS = -(-SIZE // CHUNK_BYTES)
LAST = CHUNKS - 1  # 4 KiB long


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """Two volumes that are equal, digests of which come in small steps."""
    monkeypatch.setattr(reader_module, "DIGEST_STEP_BYTES", STEP)
    with source(tmp_path, monkeypatch, volumes=2) as made:
        for image, target in zip(made.images, made.targets, strict=True):
            target.write_bytes(image.read_bytes())

        async def theirs(token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
            held = made.targets[volume].read_bytes()
            for offset in range(0, SIZE, STEP):
                yield offset, digests(held[offset : offset + STEP])

        monkeypatch.setattr(made.peer, "digests", theirs)
        yield made


def scratch(monkeypatch: pytest.MonkeyPatch, end: Source, volume: int, *chunks: int) -> None:
    """Let reads of some chunks fail."""

    def read(device: BlockDevice, offset: int, length: int, scratch: AlignedBuffer) -> bytes:
        if device.path == str(end.images[volume]):
            for chunk in chunks:
                if offset <= chunk * CHUNK_BYTES < offset + length:
                    raise OSError(errno.EIO, "a scratch", device.path)
        return digest(device, offset, length, scratch)

    monkeypatch.setattr(reader_module, "digest", read)


def damage(end: Source, volume: int, chunk: int) -> None:
    with end.targets[volume].open("r+b") as file:
        file.seek(chunk * CHUNK_BYTES)
        file.write(b"other")


def compare(end: Source) -> list[Comparison]:
    found: list[Comparison] = []

    async def main() -> None:
        ends = compare_ends(end.sender(), end.workshop, end.peer, "token", settled=True)
        found.extend([each async for each in ends])

    run(main)
    return found


def test_equal_ends(end: Source) -> None:
    *before, last = compare(end)
    assert last == Comparison(2 * SIZE, 2 * SIZE, 0, 0, 0, (), (), done=True)
    assert not any(each.done for each in before)


def test_what_cannot_be_read_is_left_out(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch(monkeypatch, end, 1, 2, 9, LAST)
    damage(end, 1, 2)  # nobody can know of this one
    damage(end, 1, 3)
    damage(end, 0, 9)
    last = compare(end)[-1]
    first, second = map(str, end.images)
    assert last.done
    assert last.unread == tuple(
        UnreadRange(second, chunk * CHUNK_BYTES, length)
        for chunk, length in ((2, CHUNK_BYTES), (9, CHUNK_BYTES), (LAST, 4096))
    )
    assert last.unread_bytes == 2 * CHUNK_BYTES + 4096
    assert last.compared_bytes == 2 * SIZE - last.unread_bytes
    assert last.mismatches == (
        Mismatch(first, 9 * CHUNK_BYTES, CHUNK_BYTES),
        Mismatch(second, 3 * CHUNK_BYTES, CHUNK_BYTES),
    )
    assert last.mismatched_bytes == 2 * CHUNK_BYTES


def test_only_the_first_are_named(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "MAX_MISMATCHES", 2)
    scratch(monkeypatch, end, 0, 1, 2, 3)
    last = compare(end)[-1]
    assert [one.offset_bytes for one in last.unread] == [CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert last.unread_bytes == 3 * CHUNK_BYTES


def test_too_much_that_cannot_be_read_is_an_error(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_MAX_UNREAD_CHUNKS", 2)
    scratch(monkeypatch, end, 0, 1, 2, 3)
    with pytest.raises(DataLoss) as caught:
        compare(end)
    assert caught.value.reason == "SOURCE_IO_ERROR"


def alter(end: Source, alter: Callable[[int, bytes], bytes]) -> None:
    """Let the target say what is not so, of each step of its first volume."""
    honest = end.peer.digests

    async def theirs(token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        async for offset, found in honest(token, volume):
            yield offset, alter(offset, found) if volume == 0 else found

    end.peer.digests = theirs  # type: ignore[method-assign]


async def interruption(reading: AsyncIterator[Comparison]) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught:
        async for _ in reading:
            pass
    return caught.value


def test_a_controller_that_does_not_read_holds_nothing_up(end: Source) -> None:
    """The comparison goes on without it, then the rounds; told is what is newest."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        async with aclosing(migration.verify()) as reading:
            assert not (await anext(reading)).done
            while migration._course.at_rest.locked():  # noqa: ASYNC110 - a lock rings no bell
                await asyncio.sleep(0.01)
            end.write(4096, b"changed since")
            await complete(end, migration)
            last = await anext(reading)
            assert (last.done, last.compared_bytes) == (True, 2 * SIZE)
            with pytest.raises(StopAsyncIteration):
                await anext(reading)

    trial(end, steps)


def test_it_gives_way_to_a_cutover_though_nobody_reads(end: Source) -> None:
    """Also where the target does not go on: the VM is off."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        honest, stuck = end.peer.digests, asyncio.Event()

        async def theirs(token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
            async for step in honest(token, volume):
                yield step
                stuck.set()
                await asyncio.Event().wait()

        end.peer.digests = theirs  # type: ignore[method-assign]
        async with aclosing(migration.verify()) as reading:
            await anext(reading)
            await stuck.wait()
            await complete(end, migration)
            assert (await interruption(reading)).reason == "VERIFY_INTERRUPTED"

    trial(end, steps)


def test_it_gives_way_while_it_waits_for_marks(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "_MARK_SECONDS", 1000.0)
    waiting = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    def is_pending(disk: SourceDisk, offset: int, length: int) -> bool:
        loops[0].call_soon_threadsafe(waiting.set)
        return False

    async def steps(migration: SourceMigration) -> None:
        loops.append(asyncio.get_running_loop())
        await reach(migration, State.CONVERGED)
        alter(end, lambda _, found: bytes(len(found)))
        monkeypatch.setattr(SourceDisk, "is_pending", is_pending)
        reading = asyncio.ensure_future(interruption(migration.verify()))
        await waiting.wait()
        await complete(end, migration)
        assert (await reading).reason == "VERIFY_INTERRUPTED"

    trial(end, steps)


@pytest.mark.parametrize("stops", [False, True], ids=["cancelled", "agent stops"])
def test_it_ends_before_the_devices_are_closed(end: Source, stops: bool) -> None:
    """Else it would read from what is not its own any more."""

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        async with aclosing(migration.verify()) as reading:
            begun = asyncio.ensure_future(anext(reading))
            while not migration._course.at_rest.locked():  # noqa: ASYNC110
                await asyncio.sleep(0)
            await (migration.close(STOPPED) if stops else migration.cancel())
            assert not end.is_open()
            await asyncio.wait([begun])
            said = begun.exception() or await interruption(reading)
            assert isinstance(said, WarmsyncError)
            assert said.reason == ("AGENT_STOPPED" if stops else "VERIFY_INTERRUPTED")
        assert end.equal()

    trial(end, steps)
