"""The target's agent, as a source calls it: `agent.peer.Peer` over gRPC."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import grpc.aio
from warmsync.v1 import peer_service_pb2 as pb
from warmsync.v1.peer_service_pb2_grpc import PeerServiceStub

from agent.address import parse_address
from agent.carrier import ACK_SECONDS, Carrier, CarrierRequest, target_lost
from agent.carrier.grpc import GrpcCarrier, is_cancelled
from agent.carrier.tcp import Offer, connect
from agent.certificate import Signature
from agent.errors import DataLoss, FailedPrecondition, Unavailable, WarmsyncError, is_from_transport
from agent.migration import CarrierKind, Identity, Resize, Role, Volume
from agent.peer import DiskSize, Proof, Resumed, SessionRequest, TargetProof, Unread
from agent.rpc.convert import VERIFIES, to_resize
from agent.rpc.errors import from_rpc_error

_Answer = TypeVar("_Answer")
_log = logging.getLogger(__name__)

NO_DATA_CONNECTION = frozenset({"CARRIER_UNAVAILABLE", "DATA_PORT_UNREACHABLE"})
"""Reasons for which `auto` falls back to grpc."""

EXPLAIN_SECONDS = 5.0
RESIZE_SECONDS = 6 * 3600.0
"""Each program has its own limit there, and a dead agent is noticed by keepalive."""
BOOT_SECONDS = 86400.0 + 60.0
"""A little more than the target's configuration can allow its hook: its own limit ends it."""
CALL_SECONDS = 30.0
"""Opening includes claiming devices; the release a last flush: still quick."""


class PeerClient:
    """A connection to one target agent; `connect` makes another where it is spoilt."""

    def __init__(
        self, connect: Callable[[], grpc.aio.Channel], address: str, *, tls: bool = False
    ) -> None:
        self._connect = connect
        self._channel = connect()
        self._spoilt: grpc.aio.Channel | None = None
        """The one before: closing it would cancel whoever still waits there."""
        self._is_spoilt = False
        self._tls = tls
        self._address = address

    @property
    def address(self) -> str:
        """Where it is reached."""
        return self._address

    async def measure(self, targets: Sequence[str]) -> list[DiskSize]:
        """See `agent.peer.Peer`."""
        request = pb.MeasureTargetsRequest(targets=targets)
        async with self._calling() as stub:
            answer = _whole(await stub.MeasureTargets(request, timeout=CALL_SECONDS))
        return [DiskSize(one.size_bytes, one.sector_bytes) for one in answer.sizes]

    async def open_session(self, request: SessionRequest) -> None:
        """See `agent.peer.Peer`."""
        message = pb.OpenSessionRequest(
            session_secret=request.secret,
            epoch=request.epoch,
            migration_id=request.migration_id,
            protocol_version=request.protocol_version,
            boot_id=request.boot_id,
            verify=VERIFIES[request.verify],
            volumes=[
                _volume(volume, known, file_system)
                for volume, known, file_system in zip(
                    request.volumes,
                    request.source_identities,
                    request.file_systems or ("",) * len(request.volumes),
                    strict=True,
                )
            ],
        )
        async with self._calling() as stub:
            await stub.OpenSession(message, timeout=CALL_SECONDS)

    async def resume(self, secret: str, epoch: int) -> Resumed:
        """See `agent.peer.Peer`."""
        request = pb.ResumeSessionRequest(session_secret=secret, epoch=epoch)
        async with self._calling() as stub:
            answer = _whole(await stub.ResumeSession(request, timeout=CALL_SECONDS))
        return Resumed(answer.generation, answer.released, answer.certificate)

    async def open_carrier(self, token: str, request: CarrierRequest) -> Carrier:
        """See `agent.peer.Peer`."""
        if request.kind is CarrierKind.GRPC:
            return await self._open_grpc(token, "as asked for")
        try:
            offer = await self._ask_for_connections(token, request.connections)
            return await connect(offer, request, lambda: self._check_session(token))
        except (FailedPrecondition, Unavailable) as error:
            if request.kind is CarrierKind.TCP or error.reason not in NO_DATA_CONNECTION:
                raise
            _log.warning('carrier tcp cannot be used, grpc instead reason="%s"', error)
            return await self._open_grpc(token, f"{error.reason}: {error}")

    async def _open_grpc(self, token: str, detail: str) -> Carrier:
        await self._renew_if_spoilt()
        carrier = GrpcCarrier(self._channel, token, partial(self._learn, self._channel), detail)
        await carrier.open()
        return carrier

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[PeerServiceStub]:
        """Give what calls go through; what they raise are the domain's errors."""
        await self._renew_if_spoilt()
        channel = self._channel
        try:
            yield PeerServiceStub(channel)
        except grpc.RpcError as error:
            raise self._learn(channel, error) from error
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            # Its channel was closed, see `_renew_if_spoilt`: nobody asks us to end.
            raise self._given_up() from None
        except grpc.aio.UsageError as error:  # it was closed before
            raise self._given_up() from error

    def _given_up(self) -> Unavailable:
        return Unavailable(
            "PEER_LOST", f"the connection with {self._address} was given up; try again"
        )

    def _learn(self, channel: grpc.aio.Channel, error: grpc.RpcError) -> WarmsyncError:
        """Translate an error. A status of gRPC's own may stand for a connection that is spoilt.

        A header that was damaged on the way stays in HTTP/2's table of headers (RFC 7541, 2.3.2),
        and with it all calls of the connection fail from then on.
        """
        found = from_rpc_error(error, self._address, tls=self._tls)
        said = is_from_transport(found) and not isinstance(found, Unavailable)
        if said and channel is self._channel:
            self._is_spoilt = True
        return found

    async def _renew_if_spoilt(self) -> None:
        if self._is_spoilt:
            self._is_spoilt, before = False, self._spoilt
            self._spoilt, self._channel = self._channel, self._connect()
            if before is not None:
                await before.close()

    async def _ask_for_connections(self, token: str, connections: int) -> Offer:
        request = pb.OpenTransferRequest(session_token=token, connections=connections)
        async with self._calling() as stub:
            answer = _whole(await stub.OpenTransfer(request, timeout=CALL_SECONDS))
        if answer.tls != self._tls:
            raise FailedPrecondition(
                "TLS_MISMATCH",
                f"the target at {self._address} offers data connections "
                f"{'with' if answer.tls else 'without'} TLS, unlike its port for calls; "
                "check what listens there",
            )
        host = parse_address(self._address).host
        return Offer(host, answer.port, answer.tls, tuple(answer.tokens))

    async def _check_session(self, token: str) -> None:
        async with self._calling() as stub:
            await stub.CheckSession(
                pb.CheckSessionRequest(session_token=token), timeout=EXPLAIN_SECONDS
            )

    async def digests(self, token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        """See `agent.peer.Peer`."""
        request = pb.DigestVolumeRequest(session_token=token, volume=volume)
        async with self._calling() as stub:
            call = stub.DigestVolume(request)
            try:
                while (answer := await _next(call)) is not grpc.aio.EOF:
                    yield answer.offset_bytes, answer.digests
            finally:
                call.cancel()

    async def unread(self, token: str) -> Unread:
        """See `agent.peer.Peer`."""
        request = pb.CheckSessionRequest(session_token=token)
        async with self._calling() as stub:
            answer = _whole(await stub.CheckSession(request, timeout=CALL_SECONDS))
        return Unread(answer.unread_bytes, max(answer.read_bytes_per_second, 1.0))

    async def prove(self, token: str, generation: int) -> TargetProof:
        """See `agent.peer.Peer`."""
        request = pb.ProveSessionRequest(session_token=token, generation=generation)
        async with self._calling() as stub:
            # It may read a whole disk: whoever asks watches how it goes on, see `unread`.
            answer = _whole(await stub.ProveSession(request))
        volumes = tuple(Proof(one.compared_bytes, one.root) for one in answer.volumes)
        return TargetProof(volumes, answer.host, answer.agent_version)

    async def resize(self, token: str, generation: int) -> tuple[Resize, ...]:
        """See `agent.peer.Peer`."""
        request = pb.ResizeSessionRequest(session_token=token, generation=generation)
        async with self._calling() as stub:
            answer = _whole(await stub.ResizeSession(request, timeout=RESIZE_SECONDS))
        return tuple(to_resize(one) for one in answer.resizes)

    async def release(
        self, token: str, generation: int, statement: bytes, signature: Signature
    ) -> Signature:
        """See `agent.peer.Peer`."""
        request = pb.ReleaseSessionRequest(
            session_token=token,
            generation=generation,
            statement=statement,
            signature=pb.AgentSignature(
                public_key=signature.public_key, signature=signature.signature
            ),
        )
        async with self._calling() as stub:
            answer = _whole(await stub.ReleaseSession(request, timeout=CALL_SECONDS))
        theirs = answer.signature
        return Signature(Role.TARGET, theirs.public_key, theirs.signature)

    async def abort(self, token: str, reason: str, *, cancelled: bool) -> None:
        """See `agent.peer.Peer`."""
        request = pb.AbortSessionRequest(session_token=token, reason=reason, cancelled=cancelled)
        async with self._calling() as stub:
            await stub.AbortSession(request, timeout=CALL_SECONDS)

    async def boot(self, token: str, attempt: int) -> float:
        """See `agent.peer.Peer`."""
        request = pb.BootSessionRequest(session_token=token, attempt=attempt)
        async with self._calling() as stub:
            answer = _whole(await stub.BootSession(request, timeout=BOOT_SECONDS))
        return float(answer.boot_seconds)

    async def reclaim(self, token: str) -> None:
        """See `agent.peer.Peer`."""
        async with self._calling() as stub:
            request = pb.ReclaimSessionRequest(session_token=token)
            await stub.ReclaimSession(request, timeout=CALL_SECONDS)

    async def finish(self, token: str) -> None:
        """See `agent.peer.Peer`."""
        async with self._calling() as stub:
            request = pb.FinishSessionRequest(session_token=token)
            await stub.FinishSession(request, timeout=CALL_SECONDS)

    async def close(self) -> None:
        """See `agent.peer.Peer`."""
        for channel in (self._channel, self._spoilt):
            if channel is not None:
                await channel.close()


async def _next(call: Any) -> Any:
    """Return the next message of a stream. PEER_LOST for a target that does not go on: the first
    comes after a flush, so it has as long as that of a round.
    """
    try:
        async with asyncio.timeout(ACK_SECONDS):
            return _whole(await call.read())
    except TimeoutError:
        raise target_lost(f"it read nothing of its disk for {ACK_SECONDS} s") from None


def _whole(answer: _Answer | None) -> _Answer:
    """Return an answer; DataLoss BAD_MESSAGE for the nothing that gRPC makes of a damaged one."""
    if answer is None:
        raise DataLoss(
            "BAD_MESSAGE",
            "an answer was damaged on the way, and is asked for again; check the network",
        )
    return answer


def _volume(volume: Volume, identities: tuple[Identity, ...], file_system: str) -> pb.SessionVolume:
    return pb.SessionVolume(
        source=volume.source,
        target=volume.target,
        size_bytes=volume.size_bytes,
        block_size_bytes=volume.block_size_bytes,
        file_system=file_system,
        cut_bytes=volume.cut_bytes,
        source_identities=[
            pb.DeviceIdentity(
                device=one.device, start_bytes=one.start_bytes, length_bytes=one.length_bytes
            )
            for one in identities
        ],
    )
