"""The agent's gRPC server.

Owns the listening address, what is served besides the product's own services (health, reflection,
channelz), and the server's half of the channel options. Knows no service by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import grpc.aio
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from agent.address import Address, parse_address, require_secure
from agent.config import TlsConfig
from agent.errors import FailedPrecondition
from agent.rpc import listening
from agent.rpc.client import KEEPALIVE_TIME_MS, NO_TLS, SHARED_OPTIONS, Options
from agent.rpc.errors import ErrorInterceptor
from agent.rpc.tls import server_credentials

SERVER_OPTIONS: Options = [
    *SHARED_OPTIONS,
    # Without this two agents could listen on one port and share its calls between them.
    ("grpc.so_reuseport", 0),
    # Clients ping every KEEPALIVE_TIME_MS; the default calls that abuse and hangs up.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
]
BUILT_IN = (
    health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
    channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
    reflection.SERVICE_NAME,
)


@dataclass(frozen=True, slots=True)
class Service:
    """A service's full name and what adds it to a server."""

    name: str
    register: Callable[[grpc.aio.Server], None]


class AgentServer:
    """A server that listens; made by `start_server`."""

    def __init__(
        self, server: grpc.aio.Server, monitor: health.aio.HealthServicer, address: Address
    ) -> None:
        self._server = server
        self._monitor = monitor
        self._address = address

    @property
    def address(self) -> Address:
        """Where it listens, with the port that the kernel chose if 0 was asked for."""
        return self._address

    async def stop(self, grace_seconds: float) -> None:
        """Say NOT_SERVING, take no more calls and wait for the present ones, at most so long."""
        await self._monitor.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)


async def start_server(
    listen: str,
    services: Sequence[Service],
    tls: TlsConfig = NO_TLS,
    max_calls: int | None = None,
) -> AgentServer:
    """Serve at `HOST:PORT` or `unix:PATH` (mode 0600) until stopped.

    `max_calls` may be under way at once; gRPC refuses more with RESOURCE_EXHAUSTED.

    Raises InvalidArgument: BAD_ADDRESS, INSECURE_ADDRESS, BAD_CERTIFICATE; FailedPrecondition
    ADDRESS_IN_USE; NotAllowed LISTEN_NOT_PERMITTED.
    """
    address = parse_address(listen)
    require_secure(address, tls=tls.is_on)
    credentials = server_credentials(tls) if tls.is_on else None
    server = grpc.aio.server(
        interceptors=[ErrorInterceptor()], options=SERVER_OPTIONS, maximum_concurrent_rpcs=max_calls
    )
    monitor = await _add_services(server, services)
    port = _bind(server, address, credentials)
    await server.start()
    return AgentServer(server, monitor, address if address.path else replace(address, port=port))


async def _add_services(
    server: grpc.aio.Server, services: Sequence[Service]
) -> health.aio.HealthServicer:
    monitor = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(monitor, server)
    channelz.add_channelz_servicer(server)
    for service in services:
        service.register(server)
    names = [service.name for service in services]
    reflection.enable_server_reflection([*names, *BUILT_IN], server)
    for name in ["", *names]:
        await monitor.set(name, health_pb2.HealthCheckResponse.SERVING)
    return monitor


def _bind(
    server: grpc.aio.Server, address: Address, credentials: grpc.ServerCredentials | None
) -> int:
    listening.probe(address)
    try:
        with _private(address):
            if credentials is None:
                return server.add_insecure_port(str(address))
            return server.add_secure_port(str(address), credentials)
    except RuntimeError as error:  # taken since the probe; gRPC does not say more
        raise FailedPrecondition(
            "ADDRESS_IN_USE", f"cannot listen on {address}: choose another address", address=address
        ) from error


@contextmanager
def _private(address: Address) -> Iterator[None]:
    """Let the socket be made with mode 0600: a chmod afterwards would leave it open for a moment.

    The mask is the process's; this runs before the agent does anything else.
    """
    if not address.path:
        yield
        return
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
