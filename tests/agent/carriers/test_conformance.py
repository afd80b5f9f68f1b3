"""What every carrier owes: everything arrives, once and whole, or both ends learn why not."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.carrier import Carrier
from agent.carrier import grpc as grpc_module
from agent.carrier import tcp as tcp_module
from agent.carrier.grpc import WINDOW_FRAMES
from agent.errors import DataLoss, FailedPrecondition, NotFound, Unavailable, WarmsyncError
from agent.state import State
from agent.target import TargetSession
from agent.writer import Writer
from tests import devices
from tests.agent.carriers.conftest import MakeRig
from tests.agent.carriers.rig import (
    SIZE,
    Rig,
    descriptors,
    frame_of,
    frames_of,
    image,
    is_cut,
    tasks,
    threads,
    until,
)
from tests.agent.certificates import hand_over
from tests.agent.rpc_helpers import run
from tests.content import read_all

STEP = 65536
Steps = Callable[[Rig], Any]


async def refusal_of(rig: Rig, *frames: bytes, token: str | None = None) -> WarmsyncError:
    """Return why no carrier can be had: some learn it when they open, others with a frame."""
    try:
        carrier = await rig.open_carrier(token)
    except WarmsyncError as error:
        return error
    learned = await failure_of(carrier, *frames)
    await carrier.close()
    return learned


async def failure_of(carrier: Carrier, *frames: bytes, generation: int = 1) -> WarmsyncError:
    """Send, flush, and return what comes of it: the sender may learn it at either step."""
    try:
        for frame in frames:
            await carrier.send(frame)
        await carrier.flush(generation)
    except WarmsyncError as error:
        return error
    raise AssertionError("all was taken and acknowledged")


def trial(make_rig: MakeRig, steps: Steps, *targets: Path) -> None:
    """Run `steps(rig)` on an agent of its own."""

    async def main() -> None:
        async with make_rig(*targets) as rig:
            await steps(rig)

    run(main)


def test_frames_arrive(make_rig: MakeRig, source: Path, target: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        for frame in frames_of(source, 1 << 20):
            await carrier.send(frame)
        assert await carrier.flush(1) >= 0
        assert read_all(target) == read_all(source)
        assert rig.session.state is State.SYNCING
        assert rig.session.snapshot().progress.rounds == 1
        await carrier.close()

    trial(make_rig, steps)


def test_the_order_does_not_matter(make_rig: MakeRig, source: Path, target: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        frames = frames_of(source, STEP)
        random.Random(3).shuffle(frames)
        for frame in frames:
            await carrier.send(frame)
        await carrier.flush(1)
        assert read_all(target) == read_all(source)
        await carrier.close()

    trial(make_rig, steps)


def test_rounds_follow_each_other(make_rig: MakeRig, source: Path, target: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        for generation in (1, 2, 3):
            at = generation * STEP
            await carrier.send(frame_of(source, at, STEP, generation=generation))
            await carrier.flush(generation)
            assert read_all(target)[at : at + STEP] == read_all(source)[at : at + STEP]
        await carrier.flush(4)  # an empty one
        assert rig.session.snapshot().progress.rounds == 4
        await carrier.close()

    trial(make_rig, steps)


def test_volumes_share_a_stream(make_rig: MakeRig, source: Path, tmp_path: Path) -> None:
    targets = [image(tmp_path, name) for name in ("a.img", "b.img")]

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        await carrier.send(frame_of(source, STEP, STEP, volume=1))
        await carrier.send(frame_of(source, 0, STEP, volume=0))
        await carrier.flush(1)
        content = read_all(source)
        assert read_all(targets[0]) == content[:STEP] + bytes(SIZE - STEP)
        assert read_all(targets[1]) == bytes(STEP) + content[STEP : 2 * STEP] + bytes(
            SIZE - 2 * STEP
        )
        await carrier.close()

    trial(make_rig, steps, *targets)


def test_a_slow_target_holds_the_source_back(
    make_grpc_rig: MakeRig, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    writing: list[int] = []
    write = TargetSession.write

    async def held(self: TargetSession, frame: Any, stream: int) -> int:
        writing.append(len(writing))
        self.bell.ring()
        await gate.wait()
        return await write(self, frame, stream)

    monkeypatch.setattr(TargetSession, "write", held)

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        sent = 0

        async def source_end() -> None:
            nonlocal sent
            for _ in range(2):
                for frame in frames_of(source, STEP):
                    await carrier.send(frame)
                    sent += 1

        sending = asyncio.create_task(source_end())
        await until(rig.session.bell, lambda: len(writing) == WINDOW_FRAMES)
        for _ in range(100):  # let whoever can go on do so
            await asyncio.sleep(0)
        assert sent <= WINDOW_FRAMES
        assert len(writing) == WINDOW_FRAMES
        gate.set()
        await sending
        await carrier.flush(1)
        assert read_all(target) == read_all(source)
        await carrier.close()

    trial(make_grpc_rig, steps)


def test_a_flush_is_answered_when_all_is_written_and_durable(
    make_grpc_rig: MakeRig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 4: flush the target, then acknowledge."""
    events: list[str] = []
    gate, flush_gate = threading.Event(), threading.Event()
    write, flush = Writer._write, Writer.flush

    def slow_write(self: Writer, frame: Any, generation: int) -> int:
        assert gate.wait(20)
        sequence = write(self, frame, generation)
        events.append("written")
        return sequence

    async def noted_flush(self: Writer) -> float:
        events.append("flush begins")
        assert await asyncio.to_thread(flush_gate.wait, 20)
        seconds = await flush(self)
        events.append("flush ends")
        return seconds

    monkeypatch.setattr(Writer, "_write", slow_write)
    monkeypatch.setattr(Writer, "flush", noted_flush)

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        for frame in frames_of(source, STEP)[:8]:
            await carrier.send(frame)
        flushing = asyncio.create_task(carrier.flush(1))
        done, _ = await asyncio.wait([flushing], timeout=0.05)
        assert (done, events) == (set(), [])
        gate.set()
        done, _ = await asyncio.wait([flushing], timeout=0.05)
        assert done == set()
        flush_gate.set()
        await flushing
        assert events == ["written"] * 8 + ["flush begins", "flush ends"]
        await carrier.close()

    trial(make_grpc_rig, steps)


def test_a_flush_that_fails_is_not_answered(
    make_rig: MakeRig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(self: Writer) -> float:
        raise DataLoss("TARGET_IO_ERROR", "the disk went away")

    monkeypatch.setattr(Writer, "flush", fails)

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        error = await failure_of(carrier, frame_of(source, 0, STEP))
        assert error.reason == "TARGET_IO_ERROR"
        assert is_cut(rig.session)
        assert rig.session.snapshot().progress.rounds == 0
        await carrier.close()

    trial(make_rig, steps)


def test_a_damaged_frame_is_refused(make_rig: MakeRig, source: Path, target: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        frame = bytearray(frame_of(source, 0, STEP))
        frame[5000] ^= 1
        error = await failure_of(carrier, bytes(frame))
        assert isinstance(error, DataLoss)
        assert error.reason == "BAD_FRAME"
        assert read_all(target) == bytes(SIZE)
        assert is_cut(rig.session)
        assert rig.session.snapshot().incomplete
        await carrier.close()

    trial(make_rig, steps)


@pytest.mark.parametrize("changes", [{"volume": 1}, {"generation": 2}, {"generation": 0}], ids=str)
def test_a_frame_of_elsewhere_is_refused(
    make_rig: MakeRig, source: Path, target: Path, changes: dict[str, int]
) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        error = await failure_of(carrier, frame_of(source, 0, STEP, **changes))
        assert error.reason == "BAD_FRAME"
        assert read_all(target) == bytes(SIZE)
        await carrier.close()

    trial(make_rig, steps)


def test_a_truncated_frame_is_refused(make_rig: MakeRig, source: Path, target: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        error = await failure_of(carrier, frame_of(source, 0, STEP)[:-1])
        assert error.reason == "BAD_FRAME"
        assert read_all(target) == bytes(SIZE)
        await carrier.close()

    trial(make_rig, steps)


@pytest.mark.parametrize("generation", [0, 2])
def test_a_generation_out_of_turn_is_refused(
    make_rig: MakeRig, source: Path, generation: int
) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        error = await failure_of(carrier, frame_of(source, 0, STEP), generation=generation)
        assert isinstance(error, DataLoss)
        assert error.reason == "WRONG_GENERATION"
        assert is_cut(rig.session)
        await carrier.close()

    trial(make_rig, steps)


def test_a_late_frame_of_a_flushed_generation_is_refused(make_rig: MakeRig, source: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        await carrier.flush(1)
        error = await failure_of(carrier, frame_of(source, 0, STEP), generation=2)
        assert error.reason == "BAD_FRAME"
        await carrier.close()

    trial(make_rig, steps)


def test_a_target_that_shrank_is_noticed(make_rig: MakeRig, source: Path, target: Path) -> None:
    """Rule 11: sizes are checked in every session, and in every round."""

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        with target.open("r+b") as file:
            file.truncate(SIZE - 4096)
        error = await failure_of(carrier)
        assert error.reason == "TARGET_TOO_SMALL"
        await carrier.close()

    trial(make_rig, steps)


def test_a_write_error_is_told_at_once(make_rig: MakeRig, source: Path, tmp_path: Path) -> None:
    """Also to a source that has nothing to send at the moment, as it is paused."""

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        with faulty.failing("pwrite"):
            await carrier.send(frame_of(source, 0, STEP))
            await until(rig.session.bell, lambda: is_cut(rig.session))
            error = await failure_of(carrier, frame_of(source, STEP, STEP))
        assert isinstance(error, DataLoss)
        assert (error.reason, error.values["errno"]) == ("TARGET_IO_ERROR", "EIO")
        assert rig.session.snapshot().refusal is not None
        await carrier.close()

    with devices.faulty_device(SIZE) as faulty:
        trial(make_rig, steps, Path(faulty.path))


def test_the_reason_reaches_a_source_in_full_flight(
    make_grpc_rig: MakeRig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's own words, not those of a broken pipe: writes race with them."""
    written = 0

    async def breaks(self: TargetSession, frame: Any, stream: int) -> int:
        nonlocal written
        written += 1
        if written % 40 == 0:
            raise DataLoss("TARGET_IO_ERROR", "the disk went away")
        return written

    monkeypatch.setattr(TargetSession, "write", breaks)

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        error = await failure_of(carrier, *frames_of(source, STEP) * 10)
        assert (type(error), error.reason) == (DataLoss, "TARGET_IO_ERROR")
        await carrier.close()

    for _ in range(10):
        trial(make_grpc_rig, steps)


def test_a_flush_error_is_told(make_rig: MakeRig, source: Path) -> None:
    """A disk that takes the data and then loses it: only the flush can tell."""

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        await carrier.send(frame_of(source, 0, STEP))
        await carrier.flush(1)
        with faulty.failing("pwrite"):
            error = await failure_of(carrier, frame_of(source, 0, STEP, generation=2), generation=2)
        assert error.reason == "TARGET_IO_ERROR"
        assert rig.session.snapshot().progress.rounds == 1
        await carrier.close()

    with devices.faulty_device(SIZE) as faulty:
        trial(make_rig, steps, Path(faulty.path))


def test_a_target_whose_disk_hangs_is_lost(
    make_rig: MakeRig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent lives, and answers the carrier's pings."""
    limit_to(monkeypatch, ack_seconds=1)
    gate = threading.Event()
    monkeypatch.setattr(Writer, "flush", lambda self: asyncio.to_thread(gate.wait, 20))

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        error = await failure_of(carrier, frame_of(source, 0, STEP))
        gate.set()
        assert (type(error), error.reason) == (Unavailable, "PEER_LOST")
        assert "not durable there within 1 s" in str(error)
        with pytest.raises(Unavailable):
            carrier.check()
        await carrier.close()

    trial(make_rig, steps)


def limit_to(monkeypatch: pytest.MonkeyPatch, *, ack_seconds: int = 20, patience: int = 20) -> None:
    for module in (grpc_module, tcp_module):
        monkeypatch.setattr(module, "ACK_SECONDS", ack_seconds)
        monkeypatch.setattr(module, "PATIENCE_SECONDS", patience)


def test_a_target_that_takes_nothing_is_lost(
    make_grpc_rig: MakeRig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the window and what the connection takes; `tcp`: tests/native/test_stream.py."""
    limit_to(monkeypatch, patience=1)
    gate = asyncio.Event()

    async def stalled(self: TargetSession, frame: Any, stream: int) -> int:
        await gate.wait()
        return 1

    monkeypatch.setattr(TargetSession, "write", stalled)

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        error = await failure_of(carrier, *frames_of(source, STEP))
        gate.set()
        assert (type(error), error.reason) == (Unavailable, "PEER_LOST")
        assert "took nothing for 1 s" in str(error)
        await carrier.close()

    trial(make_grpc_rig, steps)


def test_a_peer_that_vanishes(make_rig: MakeRig, source: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        await carrier.send(frame_of(source, 0, STEP))
        await rig.vanish()
        error = await failure_of(carrier, *frames_of(source, STEP))
        assert isinstance(error, Unavailable)
        # It stays so: nothing is sent into the void.
        with pytest.raises(Unavailable):
            await carrier.send(frame_of(source, 0, STEP))
        with pytest.raises(Unavailable):
            await carrier.flush(1)
        await carrier.close()

    trial(make_rig, steps)


async def keep_checking(carrier: Carrier) -> None:
    while True:
        carrier.check()
        await asyncio.sleep(0.01)


def test_a_peer_that_vanishes_is_noticed_by_an_idle_source(make_rig: MakeRig, source: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        await carrier.send(frame_of(source, 0, STEP))
        await carrier.flush(1)
        carrier.check()
        await rig.vanish()
        with pytest.raises(Unavailable):
            await keep_checking(carrier)
        await carrier.close()

    trial(make_rig, steps)


def test_a_peer_that_vanishes_while_the_source_waits(
    make_grpc_rig: MakeRig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a flush nor a full window waits for ever."""

    stuck = asyncio.Event()

    async def hangs(self: TargetSession, frame: Any, stream: int) -> int:
        await stuck.wait()
        return 0

    monkeypatch.setattr(TargetSession, "write", hangs)

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        sending = asyncio.create_task(failure_of(carrier, *frames_of(source, STEP)))
        for _ in range(20):
            await asyncio.sleep(0)
        stopping = asyncio.create_task(rig.vanish())
        assert isinstance(await sending, Unavailable)
        stuck.set()
        await stopping
        await carrier.close()

    trial(make_grpc_rig, steps)


def test_a_source_that_vanishes_fails_the_session(make_rig: MakeRig, source: Path) -> None:
    """Rule 13: a cut is never an end."""

    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        await carrier.send(frame_of(source, 0, STEP))
        await carrier.flush(1)
        await carrier.close()
        session = rig.session
        await until(session.bell, lambda: is_cut(session))
        error = session.snapshot().refusal
        assert error is not None
        assert error.reason == "SOURCE_LOST"
        assert session.snapshot().incomplete

    trial(make_rig, steps)


def test_a_wrong_token_opens_nothing(make_rig: MakeRig, source: Path, target: Path) -> None:
    async def steps(rig: Rig) -> None:
        for token in ("nonsense", ""):
            error = await refusal_of(rig, frame_of(source, 0, STEP), token=token)
            assert isinstance(error, NotFound)
            assert error.reason == "SESSION_NOT_FOUND"
        assert rig.session.state is State.PENDING
        assert read_all(target) == bytes(SIZE)

    trial(make_rig, steps)


def test_a_session_has_one_stream(make_rig: MakeRig, source: Path, target: Path) -> None:
    async def steps(rig: Rig) -> None:
        first = await rig.open_carrier()
        await first.flush(1)
        error = await refusal_of(rig, frame_of(source, 0, STEP))
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "SESSION_NOT_OPEN"
        # The first has not noticed.
        await first.send(frame_of(source, 0, STEP, generation=2))
        await first.flush(2)
        assert read_all(target)[:STEP] == read_all(source)[:STEP]
        await first.close()

    trial(make_rig, steps)


def test_close_may_be_repeated(make_rig: MakeRig, source: Path) -> None:
    async def steps(rig: Rig) -> None:
        carrier = await rig.open_carrier()
        await carrier.close()
        await carrier.close()
        with pytest.raises(Unavailable):
            await carrier.send(frame_of(source, 0, STEP))

    trial(make_rig, steps)


def test_a_cancelled_source_leaves_nothing_behind(
    make_grpc_rig: MakeRig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TargetSession.write

    async def held(self: TargetSession, frame: Any, stream: int) -> int:
        self.bell.ring()
        await asyncio.sleep(0)
        return await write(self, frame, stream)

    monkeypatch.setattr(TargetSession, "write", held)

    async def interrupted() -> None:
        async with make_grpc_rig() as rig:
            carrier = await rig.open_carrier()
            seen = rig.session.bell.count
            frames = frames_of(source, STEP) * 4
            sending = asyncio.create_task(failure_of(carrier, *frames))
            await rig.session.bell.wait(seen)
            sending.cancel()
            await asyncio.wait([sending])
            assert sending.cancelled()
            await carrier.close()
            await until(rig.session.bell, lambda: is_cut(rig.session))

    def held_now() -> Counter[str]:
        gc.collect()
        # asyncio's own threads come as they are needed, and stay.
        ours = [name for name in threads() if not name.startswith("asyncio_")]
        return Counter([*tasks(), *ours, *descriptors()])

    async def main() -> None:
        await interrupted()  # what is made once, such as gRPC's poller, is there now
        before = held_now()
        for _ in range(3):
            await interrupted()
        for _ in range(1000):  # gRPC closes its sockets on a thread of its own
            if not (left := held_now() - before):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"left behind: {left}")

    run(main)


def test_data_connections_that_never_came_hold_no_device(
    make_grpc_rig: MakeRig, source: Path, target: Path
) -> None:
    """The source falls back to grpc: the released target must be free for the VM."""

    async def steps(rig: Rig) -> None:
        inlet = rig.session.expect(2)  # kept, as the data port keeps what it expects
        carrier = await rig.open_carrier(source=source)
        await carrier.send(frame_of(source, 0, STEP))
        await carrier.flush(1)
        assert str(target) in descriptors()
        await hand_over(rig.session, 1)
        assert str(target) not in descriptors()
        assert not inlet.is_complete
        await carrier.close()

    trial(make_grpc_rig, steps)
