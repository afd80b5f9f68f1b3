"""One round: a bit is cleared before its block is read, and counts only once it is durable."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.disk import SourceDisk
from agent.errors import DataLoss, Unavailable
from native.frame import inspect
from tests.agent.ends import BLOCK, SIZE, Source, source
from tests.agent.rpc_helpers import run

LOST = Unavailable("PEER_LOST", "the network went away")


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    with source(tmp_path, monkeypatch, volumes=2) as made:
        yield made


def fails() -> None:
    raise LOST


def pending(end: Source) -> list[int]:
    return [disk.pending.count_bytes() for disk in end.disks]


async def seed(end: Source) -> None:
    sender = end.sender()
    await sender.send_seed(await sender.take(flush=False))


def test_everything_is_pending_until_the_first_flush(end: Source) -> None:
    """Rules 1 and 4."""

    async def main() -> None:
        sender = end.sender()
        seen: list[list[int]] = []
        end.carrier.before["flush 1"] = lambda: seen.append(pending(end))
        taken = await sender.take(flush=False)
        assert taken.dirty_bytes == 2 * SIZE
        report = await sender.send_seed(taken)
        assert seen == [[SIZE, SIZE]]
        assert pending(end) == [0, 0]
        assert end.equal()
        assert (report.generation, report.dirty_bytes) == (1, 2 * SIZE)
        assert report.sent_bytes == sum(map(len, end.carrier.frames))
        assert sender.progress.rounds == 1

    run(main)


def test_frames_carry_their_volume_and_generation(end: Source) -> None:
    async def main() -> None:
        await seed(end)
        end.carrier.frames.clear()
        end.write(BLOCK, b"x", volume=1)
        sender = end.sender()
        await sender.send_dirty(await sender.take(flush=True))
        (frame,) = end.carrier.frames
        header = inspect(frame)
        assert (header.volume, header.generation) == (1, 2)
        assert end.equal()

    run(main)


@pytest.mark.parametrize("event", ["send", "flush 2"])
def test_what_was_not_made_durable_stays_pending(end: Source, event: str) -> None:
    """Rule 3: a read or send that fails puts its blocks back."""

    async def main() -> None:
        await seed(end)
        end.write(0, b"x" * 3 * BLOCK)
        end.carrier.before[event] = fails
        sender = end.sender()
        with pytest.raises(Unavailable):
            await sender.send_dirty(await sender.take(flush=True))
        assert pending(end) == [3 * BLOCK, 0]
        assert sender.progress.rounds == 1
        # The next take adds to it.
        end.write(5 * BLOCK, b"y")
        assert (await sender.take(flush=True)).dirty_bytes == 4 * BLOCK

    run(main)


def test_what_could_not_be_read_stays_pending(end: Source) -> None:
    async def main() -> None:
        await seed(end)
        end.write(0, b"x" * BLOCK)
        sender = end.sender()
        taken = await sender.take(flush=True)
        with end.images[0].open("r+b") as file:
            file.truncate(0)
        with pytest.raises(DataLoss) as caught:
            await sender.send_dirty(taken)
        assert caught.value.reason == "SOURCE_IO_ERROR"
        assert pending(end) == [BLOCK, 0]

    run(main)


def test_one_volume_that_fails_does_not_lose_the_marks_of_the_other(end: Source) -> None:
    async def main() -> None:
        await seed(end)
        end.write(0, b"x")
        end.write(0, b"x", volume=1)
        end.trackers[0].take_error = OSError(5, "Input/output error")
        sender = end.sender()
        with pytest.raises(DataLoss):
            await sender.take(flush=True)
        assert pending(end) == [0, BLOCK]
        end.trackers[0].take_error = None
        assert (await sender.take(flush=True)).dirty_bytes == 2 * BLOCK

    run(main)


def test_a_write_during_the_round_is_in_the_next(end: Source) -> None:
    """Rule 2: had the bit been cleared after the read, the write would be lost."""

    async def main() -> None:
        await seed(end)
        sender = end.sender()
        end.write(0, b"first")
        taken = await sender.take(flush=True)
        end.carrier.before["send"] = lambda: end.write(0, b"later")
        await sender.send_dirty(taken)
        assert (await sender.take(flush=True)).dirty_bytes == BLOCK
        await sender.send_dirty(taken)
        assert end.equal()

    run(main)


def test_a_pause_stops_before_the_next_frame(end: Source) -> None:
    async def main() -> None:
        sender = end.sender()
        sender.pause()
        taken = await sender.take(flush=False)
        sending = asyncio.create_task(sender.send_seed(taken))
        for _ in range(50):
            await asyncio.sleep(0)
        assert end.carrier.events == []
        sender.resume()
        await sending
        assert end.equal()

    run(main)


def test_an_empty_round_sends_only_its_flush(end: Source) -> None:
    async def main() -> None:
        await seed(end)
        end.carrier.events.clear()
        sender = end.sender()
        report = await sender.send_dirty(await sender.take(flush=True))
        assert end.carrier.events == ["flush 2"]
        assert (report.sent_bytes, report.dirty_bytes) == (0, 0)

    run(main)


def test_work_on_disks_ends_before_its_cancellation(end: Source) -> None:
    """What follows (unfence, stop, close) must not overtake what runs on a thread."""
    started, gate = threading.Event(), threading.Event()
    finished: list[SourceDisk] = []

    def work(disk: SourceDisk) -> None:
        started.set()
        assert gate.wait(20)
        finished.append(disk)

    async def main() -> None:
        working = asyncio.create_task(end.sender().on_disks(work))
        assert await asyncio.to_thread(started.wait, 20)
        working.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not working.done()
        gate.set()
        await asyncio.wait([working])
        assert working.cancelled()
        assert len(finished) == 2

    run(main)


def test_work_on_all_disks_is_done_although_one_fails(end: Source) -> None:
    done: list[str] = []

    def work(disk: SourceDisk) -> None:
        if disk is end.disks[0]:
            raise LOST
        done.append(disk.volume.source)

    async def main() -> None:
        with pytest.raises(Unavailable):
            await end.sender().on_disks(work)
        assert done == [str(end.images[1])]

    run(main)


def test_nothing_is_sent_without_a_carrier(end: Source) -> None:
    from agent.sender import Sender

    async def main() -> None:
        sender = Sender(end.disks, end.workshop, 0)
        assert sender.carrier_name == ""
        with pytest.raises(RuntimeError, match="carrier"):
            await sender.send_seed(await sender.take(flush=False))

    run(main)
