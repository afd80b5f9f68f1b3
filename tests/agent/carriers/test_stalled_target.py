"""A target's disk that answers nothing: named within a limit, and left alone until it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from agent.carrier import Carrier
from agent.errors import (
    DataLoss,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
)
from agent.migration import Depth
from agent.peer import session_token
from agent.source import proof as proof_module
from agent.state import State
from agent.target import intake as intake_module
from agent.target.intake import ORPHAN_SECONDS
from tests.agent.carriers.conftest import MakeRig
from tests.agent.carriers.rig import SECRET, SIZE, Rig, frame_of, rig, until
from tests.agent.rpc_helpers import run
from tests.agent.target.sessions import is_claimed
from tests.content import read_all
from tests.devices import LoopDevice
from tests.e2e.agents import eventually
from tests.gauntlet.fragile import FragileDisk, fragile_disk

STEP = 65536


async def stall(rig: Rig, carrier: Carrier, source: Path, hung: Path) -> asyncio.Task[None]:
    """Send what the disk does not write, until it is asked to; returns the task that sends."""

    async def send() -> None:
        with suppress(WarmsyncError):  # it is cut
            await carrier.send(frame_of(source, 0, STEP))
            await carrier.flush(1)

    sending = asyncio.create_task(send())
    await until(rig.session.bell, lambda: rig.session._intake.streaming)
    await asyncio.to_thread(eventually, lambda: in_flight(hung), bool)
    return sending


async def send_round(rig: Rig, source: Path) -> None:
    carrier = await rig.open_carrier()
    try:
        await carrier.send(frame_of(source, 0, STEP))
        await carrier.flush(1)
    finally:
        await carrier.close()


def in_flight(disk: Path) -> int:
    """Return how many requests a device has been given and has not answered."""
    counts = Path("/sys/block") / disk.resolve().name / "inflight"
    return sum(map(int, counts.read_text().split()))


async def refuse(rig: Rig, epoch: int) -> WarmsyncError:
    with pytest.raises(DataLoss) as caught:
        await rig.peer.resume(SECRET, epoch)
    return caught.value


def test_a_disk_that_does_not_answer_is_named(
    make_rig: MakeRig,
    source: Path,
    loop_device: Callable[..., LoopDevice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two, the one that hangs. What it writes late is not taken for anything."""
    monkeypatch.setattr(intake_module, "DRAIN_SECONDS", 0.5)

    async def main(disk: FragileDisk) -> None:
        hung, target = Path(disk.path), Path(loop_device(SIZE).path)
        async with make_rig(hung, target) as rig:
            carrier = await rig.open_carrier()
            with disk.stalled():
                sending = await stall(rig, carrier, source, hung)
                for epoch in (2, 3):  # it is waited for each time, and never claimed meanwhile
                    error = await refuse(rig, epoch)
                    assert error.reason == "TARGET_IO_ERROR"
                    assert (error.values["path"], error.values["side"]) == (str(hung), "target")
                    assert str(target) not in str(error)
                    assert error.values["owner"] == "source"  # nobody need ask who owns
                rig.token = session_token(SECRET, 3)
                assert rig.session.snapshot().refusal is not None
                for begin in (rig.session.begin_stream, lambda: rig.session.expect(1)):
                    with pytest.raises(FailedPrecondition):
                        begin()
            monkeypatch.setattr(intake_module, "DRAIN_SECONDS", 20.0)
            await carrier.close()
            await sending
            assert (await rig.peer.resume(SECRET, 4)).generation == 0
            rig.token = session_token(SECRET, 4)
            assert rig.session.snapshot().refusal is None
            await send_round(rig, source)
            assert read_all(hung)[:STEP] == read_all(source)[:STEP]

    with fragile_disk(SIZE, volatile=False) as disk:
        run(lambda: main(disk))


def test_a_session_given_up_over_a_hung_disk_keeps_it_until_it_answers(
    make_rig: MakeRig, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written late must not be written into what somebody else has put there."""
    monkeypatch.setattr(intake_module, "DRAIN_SECONDS", 0.5)

    async def main(disk: FragileDisk) -> None:
        hung = Path(disk.path)
        async with make_rig(hung) as rig:
            carrier = await rig.open_carrier()
            with disk.stalled():
                sending = await stall(rig, carrier, source, hung)
                session = rig.session
                await refuse(rig, 2)
                rig.token = session_token(SECRET, 2)
                await rig.peer.abort(rig.token, "enough", cancelled=True)
                assert session.state.is_terminal
                assert await asyncio.to_thread(is_claimed, hung)
            await carrier.close()
            await sending
            await session.ended()
            assert not await asyncio.to_thread(is_claimed, hung)

    with fragile_disk(SIZE, volatile=False) as disk:
        run(lambda: main(disk))


def test_a_stream_that_cannot_be_written_down_is_cut_over_a_hung_disk(
    make_rig: MakeRig, source: Path
) -> None:
    """What has come already is in its threads, and the event loop may not wait for these."""

    async def main(disk: FragileDisk) -> None:
        hung = Path(disk.path)
        async with make_rig(hung) as rig:
            database = rig.registry._journal._database
            assert database is not None
            database.execute("PRAGMA query_only = 1")
            with disk.stalled():
                with pytest.raises(ResourceExhausted) as caught:
                    async with asyncio.timeout(10):
                        await send_round(rig, source)
                assert caught.value.reason == "STATE_NOT_KEPT"
                session = rig.session
                assert (session.state, session._intake.streaming) == (State.PENDING, False)
                assert session._intake._deadline is not None
                waiting = session._intake._deadline.when() - asyncio.get_running_loop().time()
                assert not session._intake._deadline.cancelled()  # it waits for its source,
                assert waiting > ORPHAN_SECONDS / 2  # which pauses for a person
                database.execute("PRAGMA query_only = 0")
            await rig.peer.resume(SECRET, 2)
            rig.token = session_token(SECRET, 2)
            await send_round(rig, source)
            assert read_all(hung)[:STEP] == read_all(source)[:STEP]

    with fragile_disk(SIZE, volatile=False) as disk:
        run(lambda: main(disk))


@pytest.mark.parametrize("depth", [Depth.FINAL, Depth.FULL])
def test_a_proof_whose_disk_does_not_go_on_is_given_up(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, depth: Depth
) -> None:
    """The agent answers meanwhile, and shows that nothing is read; the VM is off."""
    monkeypatch.setattr(proof_module, "ACK_SECONDS", 0.5)
    monkeypatch.setattr(proof_module, "LOOK_SECONDS", 0.05)

    async def main(disk: FragileDisk) -> None:
        hung = Path(disk.path)
        async with rig("grpc", tmp_path, [hung], verify=depth) as r:
            carrier = await r.open_carrier()
            await carrier.send(frame_of(source, 0, STEP))
            await carrier.flush(1)
            with disk.stalled():
                r.session._holding.witness.forget()
                assert (await r.peer.unread(r.token)).unread_bytes == SIZE
                proving = asyncio.create_task(r.peer.prove(r.token, 1))
                with pytest.raises(Unavailable) as caught:
                    await proof_module._watch(r.peer, r.token)
                assert (caught.value.reason, proving.done()) == ("PEER_LOST", False)
            await proving
            assert (await r.peer.unread(r.token)).unread_bytes == 0
            await carrier.close()
            assert read_all(hung)[:STEP] == read_all(source)[:STEP]

    with fragile_disk(SIZE, volatile=False) as disk:
        run(lambda: main(disk))
