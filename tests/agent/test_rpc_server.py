from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from warmsync.v1 import host_service_pb2, host_service_pb2_grpc

from agent.address import parse_address
from agent.config import TlsConfig
from agent.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    WarmsyncError,
)
from agent.rpc import listening
from agent.rpc.client import NO_TLS, open_channel
from agent.rpc.errors import calling
from agent.rpc.server import AgentServer, Service, start_server
from agent.rpc.tls import check_files
from tests.agent.rpc_helpers import run

NAME = "warmsync.v1.HostService"


class Host(host_service_pb2_grpc.HostServiceServicer):
    async def GetHost(self, request: Any, context: Any) -> host_service_pb2.GetHostResponse:  # noqa: N802
        return host_service_pb2.GetHostResponse(hostname="here")

    async def ListDevices(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise NotFound("NO_DEVICES", "nothing here: plug one in", count=0)


def register(server: Any) -> None:
    host_service_pb2_grpc.add_HostServiceServicer_to_server(Host(), server)


@asynccontextmanager
async def agent(listen: str = "127.0.0.1:0", tls: TlsConfig = NO_TLS) -> AsyncIterator[AgentServer]:
    server = await start_server(listen, [Service(NAME, register)], tls)
    try:
        yield server
    finally:
        await server.stop(0)


async def hostname(address: str, tls: TlsConfig = NO_TLS) -> str:
    request = host_service_pb2.GetHostRequest()
    async with open_channel(address, tls) as channel:
        with calling(address, tls=tls.is_on):
            answer = await host_service_pb2_grpc.HostServiceStub(channel).GetHost(request)
    return str(answer.hostname)


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    return trustme.CA()


def issue(authority: trustme.CA, directory: Path, name: str, *hosts: str) -> TlsConfig:
    cert = authority.issue_cert(*hosts)
    files = {kind: directory / f"{name}.{kind}" for kind in ("cert", "key", "ca")}
    files["cert"].write_bytes(b"".join(pem.bytes() for pem in cert.cert_chain_pems))
    files["key"].write_bytes(cert.private_key_pem.bytes())
    files["ca"].write_bytes(authority.cert_pem.bytes())
    return TlsConfig(**{kind: str(path) for kind, path in files.items()})


def test_calls_and_errors_arrive() -> None:
    async def main() -> None:
        async with agent() as server:
            address = str(server.address)
            assert not address.endswith(":0")
            assert await hostname(address) == "here"
            async with open_channel(address) as channel:
                stub = host_service_pb2_grpc.HostServiceStub(channel)
                with pytest.raises(NotFound) as caught, calling(address):
                    await stub.ListDevices(host_service_pb2.ListDevicesRequest())
            assert caught.value.reason == "NO_DEVICES"
            assert caught.value.values == {"count": "0"}

    run(main)


def test_health_is_served_until_the_stop() -> None:
    async def main() -> None:
        server = await start_server("127.0.0.1:0", [Service(NAME, register)])
        async with open_channel(str(server.address)) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            for name in ("", NAME):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            stopping = asyncio.create_task(server.stop(5))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
            await stopping

    run(main)


def test_reflection_and_channelz() -> None:
    async def main() -> None:
        async with agent() as server, open_channel(str(server.address)) as opened:
            channel: Any = opened
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(iter([request]))
            names = [s.name for s in (await call.read()).list_services_response.service]
            assert NAME in names
            assert "grpc.health.v1.Health" in names
            symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME)
            answer = await stub.ServerReflectionInfo(iter([symbol])).read()
            assert answer.file_descriptor_response.file_descriptor_proto
            servers = await channelz_pb2_grpc.ChannelzStub(channel).GetServers(
                channelz_pb2.GetServersRequest()
            )
            assert servers.server

    run(main)


def test_mutual_tls(tmp_path: Path, authority: trustme.CA) -> None:
    files = issue(authority, tmp_path, "server", "localhost", "127.0.0.1")
    other = issue(authority, tmp_path, "client", "elsewhere.example")

    async def main() -> None:
        async with agent(tls=files) as server:
            port = server.address.port
            assert await hostname(f"127.0.0.1:{port}", other) == "here"
            assert await hostname(f"localhost:{port}", other) == "here"

    run(main)


def test_tls_refusals(tmp_path: Path, authority: trustme.CA) -> None:
    files = issue(authority, tmp_path, "server", "127.0.0.1")
    named = issue(authority, tmp_path, "named", "elsewhere.example")
    foreign = issue(trustme.CA(), tmp_path, "foreign", "127.0.0.1")
    half = TlsConfig(cert=foreign.cert, key=foreign.key, ca=files.ca)

    async def refused(address: str, tls: TlsConfig) -> WarmsyncError:
        with pytest.raises(Unavailable) as caught:
            await hostname(address, tls)
        return caught.value

    async def main() -> list[WarmsyncError]:
        async with agent(tls=files) as server, agent(tls=named) as wrong, agent() as plain:
            address = str(server.address)
            return [
                await refused(address, foreign),  # distrusts the server
                await refused(address, half),  # trusts it, but is not trusted
                await refused(str(plain.address), files),  # TLS client, plain server
                await refused(str(wrong.address), files),  # another name in the certificate
            ]

    for error in run(main):
        assert error.reason == "TLS_HANDSHAKE_FAILED"
        assert "either both ends use TLS or neither" in str(error)


def test_a_plain_client_of_a_server_with_tls(tmp_path: Path, authority: trustme.CA) -> None:
    """It cannot be told from a proxy before an agent that is away: the message names both."""

    async def main() -> WarmsyncError:
        async with agent(tls=issue(authority, tmp_path, "server", "127.0.0.1")) as server:
            with pytest.raises(Unavailable) as caught:
                await hostname(str(server.address), NO_TLS)
            return caught.value

    error = run(main)
    assert error.reason == "PEER_UNREACHABLE"
    assert "if it uses TLS, this end needs certificates too" in str(error)


def test_a_client_without_a_certificate_is_refused(tmp_path: Path, authority: trustme.CA) -> None:
    files = issue(authority, tmp_path, "server", "127.0.0.1")

    def speak(port: int, *, certified: bool) -> bytes:
        context = ssl.create_default_context(cafile=files.ca)
        context.set_alpn_protocols(["h2"])
        if certified:
            context.load_cert_chain(files.cert, files.key)
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as client,
        ):
            try:
                return client.recv(1)
            except (ssl.SSLError, ConnectionError):
                return b""

    async def main() -> None:
        async with agent(tls=files) as server:
            port = server.address.port
            assert await asyncio.to_thread(speak, port, certified=True) != b""
            assert await asyncio.to_thread(speak, port, certified=False) == b""

    run(main)


@pytest.mark.parametrize(
    ("damage", "file", "text"),
    [
        (lambda d: (d / "s.cert").unlink(), "s.cert", "cannot be read"),
        (lambda d: (d / "s.cert").write_text("hello"), "s.cert", "holds no certificate"),
        (lambda d: (d / "s.ca").write_text(""), "s.ca", "holds no certificate"),
        (lambda d: (d / "s.key").write_text("hello"), "s.key", "holds no private key"),
        (lambda d: shutil.copy(d / "s.ca", d / "s.cert"), "s.key", "is not the key of"),
        (lambda d: ((d / "s.ca").unlink(), (d / "s.ca").mkdir()), "s.ca", "cannot be read"),
    ],
)
def test_bad_certificate_files(
    tmp_path: Path, authority: trustme.CA, damage: Any, file: str, text: str
) -> None:
    files = issue(authority, tmp_path, "s", "localhost")
    check_files(files)
    damage(tmp_path)
    with pytest.raises(InvalidArgument, match=text) as caught:
        check_files(files)
    assert caught.value.reason == "BAD_CERTIFICATE"
    assert caught.value.values == {"file": str(tmp_path / file)}


@pytest.mark.parametrize("address", ["10.0.0.1:7070", "0.0.0.0:0", "[::]:0", "localhost.example:1"])
def test_nothing_leaves_the_host_in_the_clear(address: str) -> None:
    with pytest.raises(InvalidArgument, match="--tls-cert") as caught:
        open_channel(address)
    assert caught.value.reason == "INSECURE_ADDRESS"
    with pytest.raises(InvalidArgument) as caught:
        run(lambda: start_server(address, []))
    assert caught.value.reason == "INSECURE_ADDRESS"


@pytest.mark.parametrize(
    "text",
    [
        *["", "host", ":1", "host:", "host:-1", "host:65536", "::1:80", "[]:1", "a b:1", "host:¹"],
        *["unix:", "unix:relative", "unix:/" + "x" * 107],
    ],
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_address(text)
    assert caught.value.reason == "BAD_ADDRESS"


@pytest.mark.parametrize("text", ["127.1.2.3:1", "[::1]:65535", "localhost:0", "unix:/run/x.sock"])
def test_local_addresses(text: str) -> None:
    address = parse_address(text)
    assert str(address) == text
    assert address.is_local


def test_an_address_in_use(tmp_path: Path) -> None:
    async def main() -> None:
        async with agent() as first, agent(f"unix:{tmp_path}/s") as second:
            for address in (first.address, second.address, f"localhost:{first.address.port}"):
                with pytest.raises(FailedPrecondition, match="is in use") as caught:
                    await start_server(str(address), [])
                assert caught.value.reason == "ADDRESS_IN_USE"
            assert await hostname(str(first.address)) == "here"
            assert await hostname(str(second.address)) == "here"

    run(main)


def test_an_address_taken_at_the_last_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "probe", lambda _: None)

    async def main() -> None:
        async with agent() as first:
            with pytest.raises(FailedPrecondition) as caught:
                await start_server(str(first.address), [])
            assert caught.value.reason == "ADDRESS_IN_USE"

    run(main)


def test_an_address_of_another_host(tmp_path: Path, authority: trustme.CA) -> None:
    files = issue(authority, tmp_path, "server", "localhost")
    with pytest.raises(InvalidArgument, match="name an address of this host") as caught:
        run(lambda: start_server("192.0.2.1:0", [], files))  # TEST-NET-1 is nobody's
    assert caught.value.reason == "BAD_ADDRESS"


def test_unix_sockets_are_private_and_stale_ones_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.exists()  # the file outlives its server

    async def main() -> None:
        before = os.umask(0)
        try:
            async with agent(f"unix:{path}") as server:
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                assert await hostname(str(server.address)) == "here"
        finally:
            assert os.umask(before) == 0

    run(main)


def test_unix_sockets_spare_other_files(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(FailedPrecondition):
        run(lambda: start_server(f"unix:{path}", []))
    assert path.read_text() == "data"
    with pytest.raises(InvalidArgument, match="make the directory"):
        run(lambda: start_server(f"unix:{path.parent}/missing/s", []))
