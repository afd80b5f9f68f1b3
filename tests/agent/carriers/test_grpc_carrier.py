"""What is special about the `grpc` carrier: the messages of its stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from warmsync.v1 import peer_service_pb2 as pb
from warmsync.v1.peer_service_pb2_grpc import PeerServiceStub

from agent.carrier.grpc import GrpcCarrier
from agent.errors import DataLoss, InvalidArgument, NotFound, Unavailable, WarmsyncError
from agent.rpc.client import open_channel
from agent.rpc.errors import from_rpc_error
from agent.rpc.server import Service, start_server
from agent.state import State
from tests.agent.carriers.rig import Rig, frame_of, is_cut, rig
from tests.agent.rpc_helpers import run
from tests.content import read_all

STEP = 65536


@asynccontextmanager
async def raw(rig: Rig) -> AsyncIterator[Any]:
    """A stream of protobuf messages, as another implementation would send them."""
    async with open_channel(rig.peer.address) as channel:
        call = PeerServiceStub(channel).Transfer()
        yield call
        call.cancel()


async def refusal(call: Any, *messages: pb.TransferRequest) -> WarmsyncError:
    try:
        for message in messages:
            await call.write(message)
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the stream ended well")


def hello(rig: Rig) -> pb.TransferRequest:
    return pb.TransferRequest(session_token=rig.token)


def flush(generation: int, frame_count: int) -> pb.TransferRequest:
    message = pb.FlushRound(generation=generation, frame_count=frame_count)
    return pb.TransferRequest(flush=message)


def test_frames_written_by_protobuf_are_understood(
    tmp_path: Path, source: Path, target: Path
) -> None:
    async def main() -> None:
        async with rig("grpc", tmp_path, [target]) as r, raw(r) as call:
            frame = frame_of(source, 0, STEP, number=7)
            for message in (hello(r), pb.TransferRequest(frame=frame), flush(1, 1)):
                await call.write(message)
            assert (await call.read()).written_sequence == 7
            assert (await call.read()).flushed.generation == 1
        assert read_all(target)[:STEP] == read_all(source)[:STEP]

    run(main)


@pytest.mark.parametrize("count", [0, 2])
def test_missing_frames_are_noticed(tmp_path: Path, source: Path, target: Path, count: int) -> None:
    async def main() -> None:
        async with rig("grpc", tmp_path, [target]) as r, raw(r) as call:
            frame = pb.TransferRequest(frame=frame_of(source, 0, STEP))
            error = await refusal(call, hello(r), frame, flush(1, count))
            assert isinstance(error, DataLoss)
            assert error.reason == "FRAMES_MISSING"
            await until_failed(r)
            assert r.session.snapshot().progress.rounds == 0

    run(main)


def test_a_frame_lost_by_the_carrier_is_noticed(
    tmp_path: Path, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's own count goes with the flush."""
    write = GrpcCarrier._write

    async def lossy(self: GrpcCarrier, request: Any) -> None:
        if request != b"lost":
            await write(self, request)

    monkeypatch.setattr(GrpcCarrier, "_write", lossy)

    async def main() -> None:
        async with rig("grpc", tmp_path, [target]) as r:
            carrier = await r.open_carrier()
            await carrier.send(b"lost")
            with pytest.raises(DataLoss, match="1 frames were sent, 0 arrived"):
                await carrier.flush(1)
            await carrier.close()

    run(main)


def test_a_message_that_is_nothing(tmp_path: Path, target: Path) -> None:
    async def main() -> None:
        async with rig("grpc", tmp_path, [target]) as r, raw(r) as call:
            error = await refusal(call, hello(r), pb.TransferRequest())
            assert isinstance(error, InvalidArgument)
            assert error.reason == "PROTOCOL_ERROR"

    run(main)


def test_the_token_comes_first(tmp_path: Path, source: Path, target: Path) -> None:
    async def main() -> None:
        async with rig("grpc", tmp_path, [target]) as r:
            for first in (pb.TransferRequest(frame=frame_of(source, 0, STEP)), flush(1, 0)):
                async with raw(r) as call:
                    assert isinstance(await refusal(call, first), NotFound)
            async with raw(r) as call:
                await call.done_writing()
                assert isinstance(await refusal(call), NotFound)
            assert r.session.state is State.PENDING

    run(main)


def test_a_stream_that_ends_is_a_failure(tmp_path: Path, target: Path) -> None:
    """Rule 13: the source half-closes without a release."""

    async def main() -> None:
        async with rig("grpc", tmp_path, [target]) as r, raw(r) as call:
            await call.write(hello(r))
            await call.write(flush(1, 0))
            await call.done_writing()
            await until_failed(r)
            error = r.session.snapshot().refusal
            assert error is not None
            assert error.reason == "SOURCE_LOST"

    run(main)


def test_a_source_that_overruns_the_window_is_held_back(
    tmp_path: Path, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agent.carrier.grpc import WINDOW_FRAMES
    from agent.target import TargetSession

    writing = 0
    gate = asyncio.Event()

    async def held(self: TargetSession, frame: Any, stream: int) -> int:
        nonlocal writing
        writing += 1
        self.bell.ring()
        await gate.wait()
        return 0

    monkeypatch.setattr(TargetSession, "write", held)

    async def main() -> None:
        async with rig("grpc", tmp_path, [target]) as r, raw(r) as call:
            await call.write(hello(r))
            frame = pb.TransferRequest(frame=frame_of(source, 0, 4096))

            async def overrun() -> None:
                for _ in range(3 * WINDOW_FRAMES):
                    await call.write(frame)

            sending = asyncio.create_task(overrun())
            while writing < WINDOW_FRAMES:
                await r.session.bell.wait(r.session.bell.count)
            for _ in range(200):
                await asyncio.sleep(0)
            assert writing == WINDOW_FRAMES
            gate.set()
            await sending

    run(main)


class WrongGeneration:
    """A target that acknowledges what was not asked."""

    async def Transfer(self, requests: Any, context: Any) -> AsyncIterator[pb.TransferResponse]:  # noqa: N802
        async for request in requests:
            if request.HasField("flush"):
                generation = request.flush.generation + 1
                if generation > 2:
                    return
                yield pb.TransferResponse(flushed=pb.RoundFlushed(generation=generation))


def test_an_answer_for_another_generation_is_refused() -> None:
    from warmsync.v1 import peer_service_pb2_grpc

    class Servicer(WrongGeneration, peer_service_pb2_grpc.PeerServiceServicer):
        pass

    def add(server: Any) -> None:
        peer_service_pb2_grpc.add_PeerServiceServicer_to_server(Servicer(), server)

    async def talk(address: str) -> None:
        async with open_channel(address) as channel:
            carrier = GrpcCarrier(channel, "token", from_rpc_error)
            await carrier.open()
            with pytest.raises(Unavailable, match="acknowledged generation 2, not 1") as caught:
                await carrier.flush(1)
            assert caught.value.reason == "PROTOCOL_ERROR"
            # The stream has ended on the other side: an end is a loss here.
            with pytest.raises(Unavailable) as lost:
                await carrier.flush(2)
            assert lost.value.reason == "PEER_LOST"
            await carrier.close()

    async def main() -> None:
        server = await start_server("127.0.0.1:0", [Service("warmsync.v1.PeerService", add)])
        try:
            await talk(str(server.address))
        finally:
            await server.stop(0)

    run(main)


async def until_failed(rig: Rig) -> None:
    while not is_cut(rig.session):
        await rig.session.bell.wait(rig.session.bell.count)
