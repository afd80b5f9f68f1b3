"""A source's disk that answers nothing: told with its name, and cancelled all the same."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent import source as source_module
from agent.counters import Requests
from agent.disk import SourceDisk, open_source
from agent.errors import FailedPrecondition, Unavailable
from agent.migration import Scheme, Volume
from agent.sender import Sender
from agent.source import SourceMigration, stall
from agent.source.stall import Silence, StallWatch
from agent.state import State
from native.buffer import AlignedBuffer
from tests.agent.ends import Source, source, until
from tests.agent.migrations import assert_given_up, assert_state, reach, trial
from tests.agent.rpc_helpers import run
from tests.devices import scratch_directory
from tests.gauntlet.fragile import FragileDisk, fragile_disk

SIZE = 8 << 20
LOST = "the target is lost; tried again every 0.2 s"


def read(disk: SourceDisk) -> None:
    disk.device.read(0, AlignedBuffer(4096))


def flush(disk: SourceDisk) -> None:
    disk.flush()


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """As elsewhere, in memory: a busy host's disk may not answer for a while itself."""
    with scratch_directory() as directory, source(directory, monkeypatch, volumes=2) as made:
        yield made


@contextmanager
def soiled(hung: FragileDisk) -> Iterator[None]:
    """Put something into the page cache that a flush has to write."""
    descriptor = os.open(hung.path, os.O_WRONLY)
    os.write(descriptor, b"x" * 4096)
    try:
        yield
    finally:
        threading.Thread(target=os.close, args=(descriptor,)).start()  # the last one writes it back


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(stall, "STALL_SECONDS", 0.4)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("call", "counted"), [(read, True), (flush, True), (flush, False)])
def test_a_disk_that_does_not_answer_is_told(
    end: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[[SourceDisk], None],
    counted: bool,
) -> None:
    """For as long as it does not; the other is not named. Not every disk counts requests."""
    if not counted:
        monkeypatch.setattr(SourceDisk, "requests", lambda self: None)

    async def main(hung: FragileDisk) -> None:
        opened = open_source(Volume(hung.path, ""), (hung.path,))
        disk = SourceDisk(opened, Scheme.EBPF, 4096, tmp_path)
        sender = Sender([end.disks[0], disk], end.workshop, 0)
        watch = StallWatch(sender)
        watch.start()
        try:
            await asyncio.to_thread(call, disk)
            with hung.stalled(), soiled(hung):
                waiting = asyncio.ensure_future(asyncio.to_thread(call, disk))
                await until(sender.bell, lambda: sender.progress.trouble != "")
                told = sender.progress.trouble
            await waiting
            assert f"source {hung.path}: no answer for" in told
            assert end.disks[0].volume.source not in told
            await until(sender.bell, lambda: sender.progress.trouble == "")
        finally:
            watch.stop()
            disk.close()

    with fragile_disk(SIZE, volatile=False) as hung:
        run(lambda: main(hung))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([(5, 1), (5, 1), (5, 1)], 20.0),
        ([(5, 1), (6, 1), (6, 1)], 10.0),
        ([(5, 1), (6, 1), (7, 1)], 0.0),
        ([(5, 0), (5, 0), (5, 0)], 0.0),
        ([(5, 1), (5, 0), (5, 1)], 10.0),
        ([None, None, None], 0.0),
        ([(5, 1), None, (5, 1)], 0.0),
    ],
    ids=["hangs", "hangs since", "slow", "idle", "was idle", "not counted", "not counted once"],
)
def test_slow_is_not_silent(
    end: Source,
    monkeypatch: pytest.MonkeyPatch,
    counts: list[tuple[int, int] | None],
    expected: float,
) -> None:
    """Of each look, ten seconds apart: how many requests have ended, how many are under way."""
    silence = Silence(end.disks[0])
    for number, count in enumerate(counts):
        found = count and Requests(count[0], count[1], 0)
        monkeypatch.setattr(SourceDisk, "requests", lambda self, found=found: found)
        seconds = silence.seconds(100.0 + 10.0 * number)
    assert seconds == expected


@pytest.mark.usefixtures("quick")
def test_what_others_tell_stays(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The target was lost before the disk: that is not taken back by the disk's answer."""
    silence = [9.0]
    monkeypatch.setattr(Silence, "seconds", lambda self, now: silence[0])

    async def main() -> None:
        sender = end.sender()
        watch = StallWatch(sender)
        watch.start()
        await until(sender.bell, lambda: "no answer" in sender.progress.trouble)
        sender.note(trouble=LOST)
        await asyncio.sleep(0.2)
        assert sender.progress.trouble == LOST
        sender.note(trouble="")
        await until(sender.bell, lambda: "no answer" in sender.progress.trouble)
        sender.note(trouble=LOST)
        silence[0] = 0.0
        await asyncio.sleep(0.2)
        assert sender.progress.trouble == LOST
        watch.stop()

    run(main)


def test_cancelled_while_a_disk_hangs_it_answers(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is given back before the disk has answered: it still reads for this migration."""
    monkeypatch.setattr(source_module, "CANCEL_SECONDS", 0.3)
    hung, answers = threading.Event(), threading.Event()

    def hang() -> None:
        hung.set()
        answers.wait(20)

    monkeypatch.setattr(SourceDisk, "check_size", lambda self: hang())

    async def steps(migration: SourceMigration) -> None:
        await asyncio.to_thread(hung.wait, 20)
        for _ in range(2):
            with pytest.raises(Unavailable) as caught:
                await migration.cancel()
            assert caught.value.reason == "SOURCE_STALLED"
            assert end.disks[0].volume.source in caught.value.values["path"]
            assert_state(migration, State.CANCELLED)
            assert migration.is_giving_up
        assert end.is_open()
        monkeypatch.setattr(source_module, "CANCEL_SECONDS", 20.0)
        answers.set()
        await migration.cancel()
        assert not migration.is_giving_up
        assert_given_up(end, cancelled=True)
        with pytest.raises(FailedPrecondition):
            await migration.cancel()

    trial(end, steps)


def test_an_agent_that_stops_waits_for_what_was_cancelled(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "CANCEL_SECONDS", 0.3)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        gate = end.peer.gates["abort"] = asyncio.Event()
        with pytest.raises(Unavailable):
            await migration.cancel()
        closing = asyncio.ensure_future(migration.close(Unavailable("AGENT_STOPPED", "it stops")))
        await asyncio.sleep(0.1)
        assert not closing.done()
        gate.set()
        await closing
        assert_given_up(end, cancelled=True)

    trial(end, steps)
