"""Hot blocks are held back from rounds, and never forgotten: real volumes, senders and cutovers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import heat as heat_module
from agent import source as source_module
from agent.disk import SourceDisk, open_source
from agent.errors import DataLoss, FailedPrecondition, Unavailable
from agent.migration import Comparison, Scheme, Volume
from agent.reader import read_digests
from agent.rounds import Convergence, RoundReport, Verdict
from agent.source import verify as verify_module
from agent.source.verify import compare_ends
from agent.state import State
from agent.tracker import Take
from agent.tracker.memory import MemoryTracker
from native.bitmap import DirtyBitmap
from native.frame import inspect
from tests.agent.ends import BLOCK, SIZE, Source, source, until
from tests.agent.rpc_helpers import run
from tests.native.bitmap_twin import marked

HOLD = 1 << 40
HOT, COLD = 3 * BLOCK, 100 * BLOCK
CHUNK = 64 * 1024


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """Two volumes; each take is a period of its own."""
    monkeypatch.setattr(heat_module, "PERIOD_SECONDS", 0.0)
    with source(tmp_path, monkeypatch, volumes=2) as made:
        yield made


async def sync(end: Source, hold_bytes: int = HOLD) -> RoundReport:
    sender = end.sender()
    return await sender.send_dirty(await sender.take(flush=True), hold_bytes)


async def heated(end: Source) -> None:
    """Seed, and write the block at HOT in every round until it is held back."""
    sender = end.sender()
    await sender.send_seed(await sender.take(flush=False))
    for n in range(heat_module.PERIODS):
        end.write(HOT, b"hot %d" % n)
        await sync(end)
    assert pending(end) == [{HOT // BLOCK}, set()]


def pending(end: Source) -> list[set[int]]:
    return [marked(disk.pending) for disk in end.disks]


def test_what_is_hot_is_held_back_and_stays_pending(end: Source) -> None:
    async def main() -> None:
        await heated(end)
        sender = end.sender()
        end.write(HOT, b"hot still")
        end.write(COLD, b"cold")
        taken = await sender.take(flush=True)
        assert (taken.dirty_bytes, taken.marked_bytes) == (2 * BLOCK, 2 * BLOCK)
        end.carrier.frames.clear()
        report = await sender.send_dirty(taken, HOLD)
        assert report.dirty_bytes == BLOCK
        (frame,) = end.carrier.frames
        assert inspect(frame).payload_bytes == BLOCK
        assert pending(end) == [{HOT // BLOCK}, set()]
        assert not end.equal()
        progress = sender.progress
        assert (progress.dirty_bytes, progress.round_bytes) == (BLOCK, BLOCK)
        assert progress.round_done_bytes == BLOCK

    run(main)


def test_the_progress_of_a_round_counts_what_it_holds(end: Source) -> None:
    async def main() -> None:
        await heated(end)
        sender, left = end.sender(), list[int]()
        end.write(HOT, b"hot still")
        end.write(COLD, b"cold")
        last = f"flush {sender.generation + 1}"
        end.carrier.before[last] = lambda: left.append(sender.progress.dirty_bytes)
        await sync(end)
        assert left == [BLOCK]

    run(main)


def test_what_is_not_written_again_goes_out(end: Source) -> None:
    async def main() -> None:
        await heated(end)
        taken = await end.sender().take(flush=True)
        assert (taken.dirty_bytes, taken.marked_bytes) == (BLOCK, 0)
        await end.sender().send_dirty(taken, HOLD)
        assert pending(end) == [set(), set()]
        assert end.equal()

    run(main)


@pytest.mark.parametrize("hold_bytes", [0, 1, 2 * BLOCK - 1])
def test_no_more_is_held_than_may_be(end: Source, hold_bytes: int) -> None:
    """It counts for all volumes together: each may hold its part."""

    async def main() -> None:
        await heated(end)
        end.write(HOT, b"hot still")
        await sync(end, hold_bytes)
        assert pending(end) == [set(), set()]
        assert end.equal()

    run(main)


def test_a_failed_round_forgets_nothing(end: Source) -> None:
    async def main() -> None:
        await heated(end)
        end.write(HOT, b"hot still")
        end.write(COLD, b"cold")

        def fails() -> None:
            raise Unavailable("PEER_LOST", "the network went away")

        end.carrier.before["send"] = fails
        with pytest.raises(Unavailable):
            await sync(end)
        assert pending(end) == [{HOT // BLOCK, COLD // BLOCK}, set()]

    run(main)


def test_the_cutover_holds_nothing_back(end: Source) -> None:
    async def main() -> None:
        await heated(end)
        end.write(HOT, b"last words")
        await end.cutover().run()
        assert pending(end) == [set(), set()]
        assert end.equal()

    run(main)


def test_a_cutover_that_held_something_back_releases_nothing(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = SourceDisk.choose
    monkeypatch.setattr(SourceDisk, "choose", lambda disk, _: choose(disk, HOLD))

    async def main() -> None:
        await heated(end)
        end.write(HOT, b"last words")
        with pytest.raises(RuntimeError, match="unsent"):
            await end.cutover().run()
        assert end.peer.calls == []

    run(main)


def test_what_was_held_is_sent_after_a_refused_cutover(end: Source) -> None:
    async def main() -> None:
        await heated(end)
        end.carrier.before[f"flush {end.sender().generation + 1}"] = lambda: end.write(HOT, b"on")
        with pytest.raises(FailedPrecondition):
            await end.cutover().run()
        await sync(end, 0)
        assert end.equal()

    run(main)


def test_a_migration_holds_back_what_is_hot(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    flush, on = end.carrier.flush, True
    looked: list[int | None] = []

    async def and_write(generation: int) -> float:
        if on:
            end.write(HOT, b"%d" % generation)
        return await flush(generation)

    class Watched(Convergence):
        def look(
            self, *found: Any, marked_bytes: int | None = None, proof_seconds: float = 0.0
        ) -> Verdict:
            looked.append(marked_bytes)
            return super().look(*found, marked_bytes=marked_bytes, proof_seconds=proof_seconds)

    monkeypatch.setattr(end.carrier, "flush", and_write)
    monkeypatch.setattr(source_module, "Convergence", Watched)

    async def main() -> None:
        nonlocal on
        migration = end.migration()
        migration.start()

        def holds() -> bool:
            progress = migration.snapshot().progress
            return progress.rounds > 1 and (progress.round_bytes, progress.dirty_bytes) == (
                0,
                BLOCK,
            )

        await until(migration.bell, holds)
        assert not end.equal()
        await until(migration.bell, lambda: migration.state is State.CONVERGED)
        on = False
        await migration.cut_over(force=True)
        assert end.equal()
        assert set(looked) <= {0, BLOCK}
        assert BLOCK in looked
        await migration.finish()

    run(main)


def test_nothing_is_hot_after_a_suspect_take(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is marked by guess: that says nothing of what is written again and again."""

    def lost(tracker: MemoryTracker, into: DirtyBitmap) -> Take:
        into.set_all()
        return Take(into.size_bytes, "lost writes")

    async def main() -> None:
        await heated(end)
        with monkeypatch.context() as patched:
            patched.setattr(type(end.trackers[0]), "take", lost)
            for _ in range(heat_module.PERIODS + 1):
                await sync(end)
                assert pending(end) == [set(), set()]

    run(main)


def test_a_take_that_fails_halfway_keeps_what_it_took(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, take = end.trackers[0], end.trackers[0].take

    def fails(into: DirtyBitmap) -> Take:
        take(into)
        raise OSError(5, "Input/output error")

    async def main() -> None:
        await heated(end)
        end.write(COLD, b"cold")
        with monkeypatch.context() as patched:
            patched.setattr(tracker, "take", fails)
            with pytest.raises(DataLoss):
                await end.sender().take(flush=True)
        assert pending(end) == [{HOT // BLOCK, COLD // BLOCK}, set()]

    run(main)


def test_only_what_was_chosen_can_be_settled(end: Source) -> None:
    """A take in between may have marked anew what was chosen: then nothing is known to be equal."""
    disk = end.disks[0]
    disk.choose()
    disk.take(flush=False, at_seconds=0.0)
    with pytest.raises(RuntimeError, match="chosen"):
        disk.settle()
    assert disk.pending.count_bytes() == SIZE


def test_a_scan_holds_nothing_back(tmp_path: Path) -> None:
    """It marks what was not sent, written again or not: once held would be held for ever."""
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * SIZE)
    opened = open_source(Volume(str(image), str(image)), (str(image),))
    disk = SourceDisk(opened, Scheme.SCAN, BLOCK, tmp_path)
    try:
        disk.start()
        for take in range(heat_module.PERIODS + 2):
            disk.take(flush=False, at_seconds=10.0 * take)
            assert disk.choose(HOLD).count_bytes() == SIZE
    finally:
        disk.close()


def test_what_is_held_back_is_pending_and_no_mismatch(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "_MARK_SECONDS", 0.1)
    shop = end.workshop

    def digests(token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        return read_digests(end.carrier.devices[volume], SIZE, shop.pool, shop.threads)

    monkeypatch.setattr(end.peer, "digests", digests)

    async def compare() -> Comparison:
        found = compare_ends(end.sender(), shop, end.peer, "token", settled=False)
        return [each async for each in found][-1]

    async def main() -> None:
        await heated(end)
        end.write(HOT, b"hot still")
        await sync(end)
        found = await compare()
        assert (found.pending_bytes, found.mismatched_bytes) == (CHUNK, 0)
        with end.images[1].open("r+b") as file:
            file.write(b"unseen")
        assert (await compare()).mismatched_bytes == CHUNK

    run(main)
