"""The connection to a target's agent, where the network spoils what goes through it."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from agent.errors import Unavailable, WarmsyncError, is_from_transport
from agent.rpc import client, peer_client
from agent.rpc.client import open_channel
from agent.rpc.peer_client import PeerClient
from agent.target import TargetSession
from tests.agent.carriers.rig import rig
from tests.agent.rpc_helpers import run
from tests.gauntlet.proxy import Proxy

TRIES = 3
ACKNOWLEDGED = bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])
"""The frame after which our settings hold, the length of a frame among them (RFC 9113, 6.5.3)."""


def test_a_connection_that_was_spoilt_is_replaced(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever byte is damaged, once: the next calls come through."""
    monkeypatch.setattr(peer_client, "CALL_SECONDS", 3.0)
    random.seed(1)  # which the proxy draws from
    assert run(lambda: _spoil_many(tmp_path, target)) & {"PEER_UNKNOWN", "PEER_INTERNAL"}


async def _spoil_many(tmp_path: Path, target: Path) -> set[str]:
    reasons = set()
    async with rig("grpc", tmp_path, [target]) as made:
        port = int(made.peer.address.rpartition(":")[2])
        proxy = Proxy("127.0.0.2", "127.0.0.1", (port,))
        try:
            for _ in range(40):
                reasons.add(await _spoil(proxy, made.token, f"127.0.0.2:{port}"))
        finally:
            proxy.close()
    return reasons


async def _spoil(proxy: Proxy, token: str, address: str) -> str:
    """Spoil one byte of a call; returns why it failed, once others succeed again."""
    peer = PeerClient(lambda: open_channel(address), address)
    reason = ""
    try:
        await peer.unread(token)
        proxy.garble(1)
        try:
            await peer.unread(token)
        except WarmsyncError as error:
            reason = error.reason
        proxy.heal()
        if reason == "DEADLINE_EXCEEDED":  # half a message: the keepalive ends such a connection
            return reason
        for _ in range(TRIES):
            try:
                await peer.unread(token)
            except WarmsyncError as error:
                last = error
            else:
                return reason
        if last.reason == "DEADLINE_EXCEEDED":
            return reason
        raise last
    finally:
        await peer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, damage: bytes) -> None:
    seen = b""
    while data := await reader.read(1 << 16):
        seen += data
        at = seen.find(ACKNOWLEDGED) if damage else -1
        if at >= 0:
            # There and nowhere else: the answer may have come in the same piece.
            after = len(seen) - at - len(ACKNOWLEDGED)
            cut = len(data) - after
            data, damage = data[:cut] + damage + data[cut:], b""
        writer.write(data)
    writer.close()


def test_a_connection_that_swallows_all_is_ended(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged length: pings of the other end still come, answers do not. Seed 50089."""
    quick = {"grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"}
    options = [(name, 1000 if name in quick else value) for name, value in client.CLIENT_OPTIONS]
    assert quick <= {name for name, _ in options}
    monkeypatch.setattr(client, "CLIENT_OPTIONS", options)
    error, seconds = run(lambda: _swallow(tmp_path, target))
    assert error.reason == "PEER_UNREACHABLE"
    assert 1 < seconds < 15, error


async def _swallow(tmp_path: Path, target: Path) -> tuple[WarmsyncError, float]:
    async with rig("grpc", tmp_path, [target]) as made:
        port = int(made.peer.address.rpartition(":")[2])

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs, ours = await asyncio.open_connection("127.0.0.1", port)
            # The head of a frame of data (RFC 9113, 4.1) as long as it may be: it never ends.
            damage = ((4 << 20) - 256).to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, 1])
            both = asyncio.gather(_pump(reader, ours, b""), _pump(theirs, writer, damage))
            try:
                await both
            finally:
                for one in (ours, writer):
                    one.close()

        async with await asyncio.start_server(serve, "127.0.0.2", 0) as server:
            address = f"127.0.0.2:{server.sockets[0].getsockname()[1]}"
            peer = PeerClient(lambda: open_channel(address), address)
            started = time.monotonic()
            try:
                await peer.unread(made.token)
            except WarmsyncError as error:
                return error, time.monotonic() - started
            finally:
                await peer.close()
    raise AssertionError("it was answered")


def test_who_does_not_know_a_call_is_called_anew() -> None:
    """A damaged name of a call stays in the other end's table of headers, too."""
    made = 0

    async def main() -> None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()

        def connect() -> grpc.aio.Channel:
            nonlocal made
            made += 1
            return open_channel(f"127.0.0.1:{port}")

        peer = PeerClient(connect, f"127.0.0.1:{port}")
        for _ in range(2):
            with pytest.raises(WarmsyncError) as caught:
                await peer.unread("secret/1")
            assert caught.value.reason == "UNSUPPORTED_BY_PEER"
        await peer.close()
        await server.stop(0)

    run(main)
    assert made == 2


def test_an_answer_that_is_no_message() -> None:
    """gRPC makes nothing of it, and no error."""

    async def answer(request: bytes, context: object) -> bytes:
        return b"\xff\xff"

    async def main() -> None:
        server = grpc.aio.server()
        service, methods = "warmsync.v1.PeerService", ("CheckSession", "ResumeSession")
        handler: Any = grpc.unary_unary_rpc_method_handler(answer)
        handlers = dict.fromkeys(methods, handler)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address = f"127.0.0.1:{port}"
        peer = PeerClient(lambda: open_channel(address), address)
        for call in (peer.unread("secret/1"), peer.resume("secret", 2)):
            with pytest.raises(WarmsyncError) as caught:
                await call
            assert caught.value.reason == "BAD_MESSAGE"
            assert is_from_transport(caught.value)  # so it is tried again
        await peer.close()
        await server.stop(0)

    run(main)


@pytest.mark.parametrize("by_us", [False, True])
def test_a_call_whose_channel_is_closed_is_lost_and_not_cancelled(by_us: bool) -> None:
    """Else the task that made it would end without a word."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            peer = PeerClient(lambda: open_channel(address), address)
            call = asyncio.create_task(peer.unread("secret/1"))
            await asyncio.sleep(0.3)
            if by_us:
                call.cancel()
            else:
                await peer._channel.close()
            await asyncio.wait([call])
            assert call.cancelled() is by_us
            if not by_us:
                assert isinstance(error := call.exception(), WarmsyncError)
                assert error.reason == "PEER_LOST"
            await peer.close()

    run(main)


def test_digests_that_do_not_come_are_not_waited_for(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's disk hangs in the middle, its agent does not."""
    gate = asyncio.Event()

    async def stalled(self: TargetSession, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        yield 0, b"first"
        await gate.wait()

    monkeypatch.setattr(TargetSession, "digests", stalled)

    async def main() -> None:
        async with rig("grpc", tmp_path, [target]) as r:
            digests = r.peer.digests(r.token, 0)
            assert await anext(digests) == (0, b"first")
            monkeypatch.setattr(peer_client, "ACK_SECONDS", 0.5)
            with pytest.raises(Unavailable, match="it read nothing of its disk") as caught:
                await anext(digests)
            assert caught.value.reason == "PEER_LOST"
            gate.set()

    run(main)


def test_a_call_after_its_channel_was_closed_is_lost() -> None:
    """A rollback that comes while the agent stops, say."""

    async def main() -> None:
        peer = PeerClient(lambda: open_channel("127.0.0.1:1"), "127.0.0.1:1")
        await peer.close()
        with pytest.raises(Unavailable) as caught:
            await peer.reclaim("secret/1")
        assert caught.value.reason == "PEER_LOST"

    run(main)
