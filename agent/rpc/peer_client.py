"""The target's agent, as a source calls it: `agent.peer.Peer` over gRPC."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import grpc.aio
from warmsync.v1 import peer_service_pb2 as pb
from warmsync.v1.peer_service_pb2_grpc import PeerServiceStub

from agent.address import parse_address
from agent.carrier import Carrier, CarrierRequest
from agent.carrier.grpc import GrpcCarrier
from agent.carrier.tcp import Offer, connect
from agent.certificate import Signature
from agent.errors import FailedPrecondition, Unavailable
from agent.migration import CarrierKind, Identity, Resize, Role, Volume
from agent.peer import Proof, Resumed, SessionRequest, TargetProof, Unread
from agent.rpc.convert import VERIFIES, to_resize
from agent.rpc.errors import calling, from_rpc_error

_log = logging.getLogger(__name__)

NO_DATA_CONNECTION = frozenset({"CARRIER_UNAVAILABLE", "DATA_PORT_UNREACHABLE"})
"""Reasons for which `auto` falls back to grpc."""

EXPLAIN_SECONDS = 5.0
PROVE_SECONDS = 3600.0
"""What was not read back while the guest ran is read then: a whole disk, if the cutover is forced
early."""
RESIZE_SECONDS = 6 * 3600.0
"""Each program has its own limit there, and a dead agent is noticed by keepalive."""
BOOT_SECONDS = 86400.0 + 60.0
"""A little more than the target's configuration can allow its hook: its own limit ends it."""
CALL_SECONDS = 30.0
"""Opening includes claiming devices; the release a last flush: still quick."""


class PeerClient:
    """A connection to one target agent."""

    def __init__(self, channel: grpc.aio.Channel, address: str, *, tls: bool = False) -> None:
        self._channel = channel
        self._tls = tls
        self._address = address
        self._stub = PeerServiceStub(channel)

    @property
    def address(self) -> str:
        """Where it is reached."""
        return self._address

    async def open_session(self, request: SessionRequest) -> str:
        """See `agent.peer.Peer`."""
        message = pb.OpenSessionRequest(
            migration_id=request.migration_id,
            protocol_version=request.protocol_version,
            boot_id=request.boot_id,
            verify=VERIFIES[request.verify],
            volumes=[
                _volume(volume, known)
                for volume, known in zip(request.volumes, request.source_identities, strict=True)
            ],
        )
        with calling(self._address):
            answer = await self._stub.OpenSession(message, timeout=CALL_SECONDS)
        return str(answer.session_secret)

    async def resume(self, secret: str, epoch: int) -> Resumed:
        """See `agent.peer.Peer`."""
        request = pb.ResumeSessionRequest(session_secret=secret, epoch=epoch)
        with calling(self._address):
            answer = await self._stub.ResumeSession(request, timeout=CALL_SECONDS)
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
        carrier = GrpcCarrier(
            self._channel, token, lambda error: from_rpc_error(error, self._address), detail
        )
        await carrier.open()
        return carrier

    async def _ask_for_connections(self, token: str, connections: int) -> Offer:
        request = pb.OpenTransferRequest(session_token=token, connections=connections)
        with calling(self._address):
            answer = await self._stub.OpenTransfer(request, timeout=CALL_SECONDS)
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
        with calling(self._address):
            await self._stub.CheckSession(
                pb.CheckSessionRequest(session_token=token), timeout=EXPLAIN_SECONDS
            )

    async def digests(self, token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        """See `agent.peer.Peer`."""
        request = pb.DigestVolumeRequest(session_token=token, volume=volume)
        with calling(self._address):
            async for answer in self._stub.DigestVolume(request):
                yield answer.offset_bytes, answer.digests

    async def unread(self, token: str) -> Unread:
        """See `agent.peer.Peer`."""
        request = pb.CheckSessionRequest(session_token=token)
        with calling(self._address):
            answer = await self._stub.CheckSession(request, timeout=CALL_SECONDS)
        return Unread(answer.unread_bytes, max(answer.read_bytes_per_second, 1.0))

    async def prove(self, token: str, generation: int) -> TargetProof:
        """See `agent.peer.Peer`."""
        request = pb.ProveSessionRequest(session_token=token, generation=generation)
        with calling(self._address):
            answer = await self._stub.ProveSession(request, timeout=PROVE_SECONDS)
        volumes = tuple(Proof(one.compared_bytes, one.root) for one in answer.volumes)
        return TargetProof(volumes, answer.host, answer.agent_version)

    async def resize(self, token: str, generation: int) -> tuple[Resize, ...]:
        """See `agent.peer.Peer`."""
        request = pb.ResizeSessionRequest(session_token=token, generation=generation)
        with calling(self._address):
            answer = await self._stub.ResizeSession(request, timeout=RESIZE_SECONDS)
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
        with calling(self._address):
            answer = await self._stub.ReleaseSession(request, timeout=CALL_SECONDS)
        theirs = answer.signature
        return Signature(Role.TARGET, theirs.public_key, theirs.signature)

    async def abort(self, token: str, reason: str, *, cancelled: bool) -> None:
        """See `agent.peer.Peer`."""
        request = pb.AbortSessionRequest(session_token=token, reason=reason, cancelled=cancelled)
        with calling(self._address):
            await self._stub.AbortSession(request, timeout=CALL_SECONDS)

    async def boot(self, token: str, attempt: int) -> float:
        """See `agent.peer.Peer`."""
        request = pb.BootSessionRequest(session_token=token, attempt=attempt)
        with calling(self._address):
            answer = await self._stub.BootSession(request, timeout=BOOT_SECONDS)
        return float(answer.boot_seconds)

    async def reclaim(self, token: str) -> None:
        """See `agent.peer.Peer`."""
        with calling(self._address):
            request = pb.ReclaimSessionRequest(session_token=token)
            await self._stub.ReclaimSession(request, timeout=CALL_SECONDS)

    async def finish(self, token: str) -> None:
        """See `agent.peer.Peer`."""
        with calling(self._address):
            request = pb.FinishSessionRequest(session_token=token)
            await self._stub.FinishSession(request, timeout=CALL_SECONDS)

    async def close(self) -> None:
        """See `agent.peer.Peer`."""
        await self._channel.close()


def _volume(volume: Volume, identities: tuple[Identity, ...]) -> pb.SessionVolume:
    return pb.SessionVolume(
        source=volume.source,
        target=volume.target,
        size_bytes=volume.size_bytes,
        block_size_bytes=volume.block_size_bytes,
        source_identities=[
            pb.DeviceIdentity(
                device=one.device, start_bytes=one.start_bytes, length_bytes=one.length_bytes
            )
            for one in identities
        ],
    )
