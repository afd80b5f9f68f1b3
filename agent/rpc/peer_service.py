"""PeerService: what the source's agent calls on the target's."""

# Method names and arguments are those of the protocol.
# ruff: noqa: ARG002, N802
from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
import grpc.aio
from warmsync.v1 import peer_service_pb2 as pb
from warmsync.v1 import peer_service_pb2_grpc

from agent.carrier.grpc import WINDOW_FRAMES
from agent.carrier.wire import decode
from agent.certificate import Signature
from agent.errors import DataLoss, FailedPrecondition, InvalidArgument, WarmsyncError
from agent.migration import Depth, Identity, Role, Volume
from agent.peer import SessionRequest
from agent.registry import Registry
from agent.rpc.convert import DEPTHS, resize_message
from agent.rpc.errors import to_its_end
from agent.shrinkage import measure
from agent.state import State
from agent.target import TargetSession
from agent.version import agent_version


class PeerServicer(peer_service_pb2_grpc.PeerServiceServicer):
    """Serves sources. Method names are those of the protocol."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def MeasureTargets(
        self, request: pb.MeasureTargetsRequest, context: Any
    ) -> pb.MeasureTargetsResponse:
        """Say how large devices are."""
        allowed = self._registry.config.allow_devices
        found = await asyncio.to_thread(measure, request.targets, allowed)
        sizes = [
            pb.TargetSize(size_bytes=one.size_bytes, sector_bytes=one.sector_bytes) for one in found
        ]
        return pb.MeasureTargetsResponse(sizes=sizes)

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Any
    ) -> pb.OpenSessionResponse:
        """Check and claim the target devices, all or none."""
        opening = self._registry.open_session(_session_request(request))
        # To its end, also when the source hangs up: it finds the session, or gives it up, later.
        await to_its_end(opening)
        return pb.OpenSessionResponse()

    async def ResumeSession(
        self, request: pb.ResumeSessionRequest, context: Any
    ) -> pb.ResumeSessionResponse:
        """Let a source go on."""
        session = self._registry.session_of(request.session_secret)
        resuming = session.resume(request.session_secret, request.epoch)
        generation = await to_its_end(resuming)  # as at OpenSession
        released = session.state in (State.CUT_OVER, State.COMPLETED)
        certificate = session.certificate.encode() if released else b""
        return pb.ResumeSessionResponse(
            generation=generation, released=released, certificate=certificate
        )

    async def Transfer(
        self, requests: AsyncIterator[pb.TransferRequest | memoryview], context: Any
    ) -> AsyncIterator[pb.TransferResponse]:
        """Receive frames until the session is released or given up."""
        first = await anext(requests, None)
        session = self._registry.session(getattr(first, "session_token", ""))
        stream = session.begin_stream()
        inlet = _Inlet(session, stream)
        feeder = asyncio.create_task(inlet.feed(requests))
        failure: WarmsyncError | None = None
        try:
            async for answer in inlet.answers():
                yield answer
            # Not only with the next message: a source that is paused sends none.
            inlet.raise_failure()
            await feeder
        except WarmsyncError as error:
            failure = error
            raise
        finally:
            feeder.cancel()
            await asyncio.wait([feeder])
            _ = feeder.cancelled() or feeder.exception()  # seen: nothing is left to be told
            session.end_stream(failure, stream)

    async def OpenTransfer(
        self, request: pb.OpenTransferRequest, context: Any
    ) -> pb.OpenTransferResponse:
        """Hand out tokens for data connections."""
        session, port = self._registry.session(request.session_token), self._registry.data_port
        if port is None:
            raise FailedPrecondition(
                "CARRIER_UNAVAILABLE",
                "the target takes no data connections (transfer.data_port is -1, or it listens on "
                "a unix socket); use --carrier grpc",
            )
        count = min(max(request.connections, 1), self._registry.config.transfer.connections)
        inlet = session.expect(count)
        tokens = port.expect(session.id, partial(session.receive, inlet), count)
        return pb.OpenTransferResponse(port=port.port, tls=port.tls, tokens=tokens)

    async def CheckSession(
        self, request: pb.CheckSessionRequest, context: Any
    ) -> pb.CheckSessionResponse:
        """Fail with what ended the session; say what a proof would cost."""
        session = self._registry.session(request.session_token)
        session.check()
        unread, rate = session.unread
        return pb.CheckSessionResponse(unread_bytes=unread, read_bytes_per_second=rate)

    async def DigestVolume(
        self, request: pb.DigestVolumeRequest, context: Any
    ) -> AsyncIterator[pb.DigestVolumeResponse]:
        """Stream the chunk digests of a volume."""
        session = self._registry.session(request.session_token)
        async for offset, digests in session.digests(request.volume):
            yield pb.DigestVolumeResponse(offset_bytes=offset, digests=digests)

    async def ProveSession(
        self, request: pb.ProveSessionRequest, context: Any
    ) -> pb.ProveSessionResponse:
        """Read back what was not, and say what is there."""
        proofs = await self._registry.session(request.session_token).prove(request.generation)
        return pb.ProveSessionResponse(
            volumes=[
                pb.VolumeProof(compared_bytes=one.compared_bytes, root=one.root) for one in proofs
            ],
            host=socket.gethostname(),
            agent_version=agent_version(),
        )

    async def ResizeSession(
        self, request: pb.ResizeSessionRequest, context: Any
    ) -> pb.ResizeSessionResponse:
        """Fit what is on the targets to their size."""
        resizes = await self._registry.session(request.session_token).resize(request.generation)
        return pb.ResizeSessionResponse(resizes=[resize_message(one) for one in resizes])

    async def ReleaseSession(
        self, request: pb.ReleaseSessionRequest, context: Any
    ) -> pb.ReleaseSessionResponse:
        """Hand the target over."""
        theirs = request.signature
        own = self._registry.session(request.session_token).release(
            request.generation,
            request.statement,
            Signature(Role.SOURCE, theirs.public_key, theirs.signature),
        )
        return pb.ReleaseSessionResponse(
            signature=pb.AgentSignature(public_key=own.public_key, signature=own.signature)
        )

    async def AbortSession(
        self, request: pb.AbortSessionRequest, context: Any
    ) -> pb.AbortSessionResponse:
        """Give the session up."""
        self._registry.abort_session(
            request.session_token, request.reason, cancelled=request.cancelled
        )
        return pb.AbortSessionResponse()

    async def BootSession(
        self, request: pb.BootSessionRequest, context: Any
    ) -> pb.BootSessionResponse:
        """Run this host's boot hook, or wait for it."""
        session = self._registry.session(request.session_token)
        return pb.BootSessionResponse(boot_seconds=await session.boot(request.attempt))

    async def ReclaimSession(
        self, request: pb.ReclaimSessionRequest, context: Any
    ) -> pb.ReclaimSessionResponse:
        """Take the devices back for a rollback."""
        session = self._registry.session(request.session_token, ahead=True)
        reclaiming = session.reclaim(self._registry.config.allow_devices)
        await to_its_end(reclaiming)  # as at OpenSession
        return pb.ReclaimSessionResponse()

    async def FinishSession(
        self, request: pb.FinishSessionRequest, context: Any
    ) -> pb.FinishSessionResponse:
        """Nothing will be reclaimed."""
        self._registry.session(request.session_token, ahead=True).finish()
        return pb.FinishSessionResponse()


def register(servicer: PeerServicer, server: grpc.aio.Server) -> None:
    """Add the service to a server: as generated, but frames are not copied by protobuf."""
    generated = _Collector()
    peer_service_pb2_grpc.add_PeerServiceServicer_to_server(servicer, generated)
    generated.handlers["Transfer"] = grpc.stream_stream_rpc_method_handler(
        servicer.Transfer,
        request_deserializer=decode,
        response_serializer=pb.TransferResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(generated.service, generated.handlers)
    server.add_generic_rpc_handlers((handler,))


class _Collector:
    """Stands in for a server while the generated code registers its handlers."""

    def __init__(self) -> None:
        self.service = ""
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Ignore: the same handlers, wrapped."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Keep what would be registered."""
        self.service, self.handlers = service, dict(handlers)


class _Inlet:
    """Takes the messages of one stream: frames are written side by side, a flush waits for all."""

    def __init__(self, session: TargetSession, stream: int) -> None:
        self._session = session
        self._stream = stream
        self._answers: asyncio.Queue[pb.TransferResponse | None] = asyncio.Queue()
        # The source keeps to the window; one that does not is held back here.
        self._window = asyncio.Semaphore(WINDOW_FRAMES)
        self._writes: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._frames = 0

    async def answers(self) -> AsyncIterator[pb.TransferResponse]:
        """Iterate what is to be told to the source; ends with the stream or a failure."""
        while (answer := await self._answers.get()) is not None:
            yield answer

    async def feed(self, requests: AsyncIterator[pb.TransferRequest | memoryview]) -> None:
        """Take all messages; raises what failed."""
        try:
            async for request in requests:
                if isinstance(request, memoryview):
                    await self._accept(request)
                elif request.HasField("flush"):
                    await self._flush(request.flush)
                else:
                    raise InvalidArgument(
                        "PROTOCOL_ERROR", "a message of the stream is neither frame nor flush"
                    )
                self.raise_failure()
        finally:
            with suppress(asyncio.CancelledError):
                await self._drain()
            self._answers.put_nowait(None)
        self.raise_failure()

    async def _accept(self, frame: memoryview) -> None:
        await self._window.acquire()
        self._frames += 1
        write = asyncio.create_task(self._write(frame))
        self._writes.add(write)
        write.add_done_callback(self._finish)

    async def _write(self, frame: memoryview) -> None:
        sequence = await self._session.write(frame, self._stream)
        self._answers.put_nowait(pb.TransferResponse(written_sequence=sequence))

    def _finish(self, write: asyncio.Task[None]) -> None:
        self._writes.discard(write)
        self._window.release()
        error = None if write.cancelled() else write.exception()
        if error is not None and self._failure is None:
            self._failure = error
            self._answers.put_nowait(None)  # tell the source now, not with its next message

    async def _flush(self, flush: pb.FlushRound) -> None:
        await self._drain()
        self.raise_failure()
        if flush.frame_count != self._frames:
            raise DataLoss(
                "FRAMES_MISSING",
                f"{flush.frame_count} frames were sent, {self._frames} arrived; check the network "
                "and start a new migration",
            )
        self._frames = 0
        seconds = await self._session.flush(flush.generation, self._stream)
        flushed = pb.RoundFlushed(generation=flush.generation, flush_seconds=seconds)
        self._answers.put_nowait(pb.TransferResponse(flushed=flushed))

    async def _drain(self) -> None:
        if self._writes:
            await asyncio.wait(self._writes)

    def raise_failure(self) -> None:
        """Raise what a write failed with, if one did."""
        if self._failure is not None:
            raise self._failure


def _session_request(request: pb.OpenSessionRequest) -> SessionRequest:
    volumes = tuple(
        Volume(one.source, one.target, one.size_bytes, one.block_size_bytes, one.cut_bytes)
        for one in request.volumes
    )
    known = tuple(
        tuple(
            Identity(one.device, one.start_bytes, one.length_bytes)
            for one in volume.source_identities
        )
        for volume in request.volumes
    )
    return SessionRequest(
        request.migration_id,
        request.protocol_version,
        request.boot_id,
        volumes,
        known,
        DEPTHS.get(request.verify, Depth.FULL),
        tuple(one.file_system for one in request.volumes),
        request.session_secret,
        request.epoch,
    )
