"""The `grpc` carrier: frames in a bidirectional stream of the control connection.

Owns the window of frames that are sent and not yet written. One port, at the price of Python
touching every frame; `tcp` is the fast one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
from warmsync.v1 import peer_service_pb2 as pb

from agent.carrier import ACK_SECONDS, PATIENCE_SECONDS, target_lost
from agent.carrier.wire import encode
from agent.errors import Unavailable, WarmsyncError

_BROKEN_WRITE = "Internal error from Core"
"""What grpc.aio calls a write into a stream that the other end has closed."""

_STATUS_SECONDS = 1.0

TRANSFER = "/warmsync.v1.PeerService/Transfer"
"""The method's full name."""

WINDOW_FRAMES = 32
"""Frames under way at most: bounds the memory of both ends to about 32 MiB a migration."""


class GrpcCarrier:
    """Frames over PeerService.Transfer. `decode` makes the domain's error of gRPC's."""

    name = "grpc"

    def __init__(
        self,
        channel: grpc.aio.Channel,
        token: str,
        decode: Callable[[grpc.aio.AioRpcError], WarmsyncError],
        detail: str = "",
    ) -> None:
        self.detail = detail
        transfer = channel.stream_stream(
            TRANSFER,
            request_serializer=encode,
            response_deserializer=pb.TransferResponse.FromString,
        )
        self._call = transfer()
        self._token = token
        self._decode = decode
        self._window = asyncio.Semaphore(WINDOW_FRAMES)
        self._frames = 0
        self._flushed: asyncio.Future[pb.RoundFlushed] | None = None
        self._failure: WarmsyncError | None = None
        self._answers: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._status: asyncio.Future[grpc.aio.AioRpcError] = loop.create_future()
        self._call.add_done_callback(self._note_status)

    async def open(self) -> None:
        """Name the session to the target."""
        self._answers = asyncio.create_task(self._read_answers())
        await self._write(pb.TransferRequest(session_token=self._token))

    def check(self) -> None:
        """See `agent.carrier.Carrier`."""
        if self._failure is not None:
            raise self._failure

    async def send(self, frame: bytes) -> None:
        """See `agent.carrier.Carrier`."""
        async with self._within(PATIENCE_SECONDS, f"it took nothing for {PATIENCE_SECONDS} s"):
            await self._window.acquire()
        self._frames += 1
        await self._write(frame)

    async def flush(self, generation: int) -> float:
        """See `agent.carrier.Carrier`."""
        self._flushed = asyncio.get_running_loop().create_future()
        # Cancelled or failed in the write below, nobody waits for it any more.
        self._flushed.add_done_callback(lambda done: done.cancelled() or done.exception())
        flush = pb.FlushRound(generation=generation, frame_count=self._frames)
        self._frames = 0
        await self._write(pb.TransferRequest(flush=flush))
        late = f"the round was not durable there within {ACK_SECONDS} s"
        async with self._within(ACK_SECONDS, late):
            answer = await self._flushed
        if answer.generation != generation:
            raise Unavailable(
                "PROTOCOL_ERROR",
                f"the target acknowledged generation {answer.generation}, not {generation}; "
                "run the same version of warmsync on both hosts",
            )
        return answer.flush_seconds

    async def close(self) -> None:
        """See `agent.carrier.Carrier`."""
        self._call.cancel()
        if self._answers is not None:
            await asyncio.wait([self._answers])

    async def _write(self, request: pb.TransferRequest | bytes) -> None:
        if self._failure is None:
            try:
                # gRPC cancels the whole call if a write is cancelled; the target would take the cut
                # for a failure before it hears that the migration was cancelled.
                write = asyncio.ensure_future(self._call.write(request))
                write.add_done_callback(lambda done: done.cancelled() or done.exception())
                took_nothing = f"it took nothing for {PATIENCE_SECONDS} s"
                async with self._within(PATIENCE_SECONDS, took_nothing):
                    await asyncio.shield(write)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                await self._learn_failure(error)
            except asyncio.CancelledError as error:
                if is_cancelled():
                    raise
                await self._learn_failure(error)  # the call was, not we
        self.check()

    @asynccontextmanager
    async def _within(self, seconds: float, detail: str) -> AsyncIterator[None]:
        """Give the target this time for what is awaited; then the stream is of no more use."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            self._fail(target_lost(detail))
            self._call.cancel()
            self.check()

    async def _learn_failure(self, error: BaseException) -> None:
        """The reader learns the real reason; wait for it rather than report a broken write."""
        if self._answers is not None:
            await asyncio.wait([self._answers], timeout=5)
        if self._failure is None:
            self._fail(target_lost(str(error)))

    async def _read_answers(self) -> None:
        try:
            async for answer in self._call:
                if answer is None:  # what gRPC makes of one that cannot be parsed
                    self._fail(target_lost("its answer came damaged"))
                    self._call.cancel()
                    return
                self._accept(answer)
            self._fail(target_lost("it closed the stream"))
        except grpc.aio.AioRpcError as error:
            self._fail(await self._explain(error))
        except asyncio.CancelledError:
            self._fail(target_lost("the stream was closed"))

    async def _explain(self, error: grpc.aio.AioRpcError) -> WarmsyncError:
        """Return the target's own reason; a write that failed meanwhile hides it from `error`."""
        if error.details() == _BROKEN_WRITE:
            try:
                async with asyncio.timeout(_STATUS_SECONDS):
                    error = await asyncio.shield(self._status)
            except TimeoutError:
                return target_lost("it did not say why")
        if error.code() is grpc.StatusCode.OK:  # it ended the stream while a write was under way
            return target_lost("it closed the stream")
        return self._decode(error)

    def _note_status(self, call: Any) -> None:
        """Keep the status that the target sent: gRPC overwrites it when a write fails (1.85)."""
        details = _result(call.details())
        if details != _BROKEN_WRITE and not self._status.done():
            code, metadata = _result(call.code()), _result(call.trailing_metadata())
            initial = grpc.aio.Metadata()
            self._status.set_result(grpc.aio.AioRpcError(code, initial, metadata, details))

    def _accept(self, answer: pb.TransferResponse) -> None:
        if answer.HasField("flushed"):
            if self._flushed is not None and not self._flushed.done():
                self._flushed.set_result(answer.flushed)
        else:
            self._window.release()

    def _fail(self, failure: WarmsyncError) -> None:
        self._failure = self._failure or failure
        if self._flushed is not None and not self._flushed.done():
            self._flushed.set_exception(self._failure)
            self._flushed.exception()  # a flush that could not be sent does not wait for it
        for _ in range(WINDOW_FRAMES):  # wake senders: they find the failure
            self._window.release()


def _result(call: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns that has nothing to wait for, as the call is done."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    call.close()
    raise RuntimeError("the call is not done")


def is_cancelled() -> bool:
    """Return whether a CancelledError is for the present task, and not of what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
