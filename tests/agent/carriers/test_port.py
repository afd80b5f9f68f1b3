"""The data port: who is let in, and what is kept for those who are expected."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from agent.carrier.port import DataPort
from native.stream import Connection, ConnectionLost
from tests.agent.rpc_helpers import run

Came = list[tuple[str, int]]


def trial(steps: Callable[[DataPort], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        port = DataPort(tls=False)
        port.listen("127.0.0.1", 0)
        try:
            await steps(port)
        finally:
            await port.close()

    run(main)


def receiver(came: Came, owner: str) -> Callable[[Connection, int], None]:
    def receive(connection: Connection, index: int) -> None:
        came.append((owner, index))
        connection.close()

    return receive


async def knock(port: DataPort, token: bytes) -> None:
    def connect() -> None:
        raw = socket.create_connection(("127.0.0.1", port.port))
        Connection.open(raw.detach(), token, tls=False).close()

    await asyncio.to_thread(connect)


def test_the_newest_tokens_of_an_owner_supersede_the_older(
    caplog: pytest.LogCaptureFixture,
) -> None:
    came: Came = []

    async def steps(port: DataPort) -> None:
        other = port.expect("other", receiver(came, "other"), 1)
        handed = [port.expect("web1", receiver(came, "web1"), 2) for _ in range(50)]
        assert len(port._expected) == len(port._tokens) == 3
        for token in (*handed[0], *handed[-2]):
            with pytest.raises(ConnectionLost):
                await knock(port, token)
        assert came == []
        for token in (*reversed(handed[-1]), *other):
            await knock(port, token)
        while len(came) < 3:  # noqa: ASYNC110 - what is received has no bell
            await asyncio.sleep(0.01)
        assert sorted(came) == [("other", 0), ("web1", 0), ("web1", 1)]
        assert not port._expected

    trial(steps)
    assert caplog.text.count("it has no valid token") == 4
