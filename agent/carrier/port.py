"""The target's end of the `tcp` carrier: the port where data connections arrive.

Owns the listening socket, the tokens, and the bounds on what a stranger costs: so many greetings at
a time, each within a few seconds. Who shows no token gets nothing, and one line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from agent.address import Address
from agent.carrier.tcp import kernel_tls
from agent.errors import FailedPrecondition
from native.stream import TOKEN_ID_BYTES, Connection, ConnectionLost, Tokens

_log = logging.getLogger(__name__)

GREETING_SECONDS = 5.0
TOKEN_SECONDS = 30.0
MAX_GREETINGS = 16
"""Connections that have not shown a token yet; more are hung up on."""

Receive: TypeAlias = Callable[[Connection, int], None]


@dataclass(frozen=True, slots=True)
class _Expected:
    owner: str
    receive: Receive
    index: int
    until_seconds: float


class DataPort:
    """Lets data connections in; calls `receive(connection, index)` for each that was expected."""

    def __init__(self, *, tls: bool) -> None:
        self.tls = tls
        self._ktls = kernel_tls()
        self._tokens = Tokens()
        self._expected: dict[bytes, _Expected] = {}
        self._greetings: dict[asyncio.Task[None], socket.socket] = {}
        self._threads = ThreadPoolExecutor(MAX_GREETINGS, thread_name_prefix="greeting")
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens; 0 before it does."""
        return 0 if self._listener is None else int(self._listener.getsockname()[1])

    def listen(self, host: str, port: int) -> None:
        """Start to listen. FailedPrecondition DATA_PORT_UNUSABLE."""
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            both = host == "::" and socket.has_dualstack_ipv6()  # as gRPC listens there
            self._listener = socket.create_server((host, port), family=family, dualstack_ipv6=both)
        except OSError as error:
            raise FailedPrecondition(
                "DATA_PORT_UNUSABLE",
                f"cannot listen for data connections on {host} port {port} ({error.strerror}); "
                "choose another transfer.data_port, or -1 for none",
                port=port,
            ) from error
        self._listener.setblocking(False)
        self._task = asyncio.create_task(self._accept(), name="data port")

    def expect(self, owner: str, receive: Receive, connections: int) -> tuple[bytes, ...]:
        """Return a token for each of so many connections; good for 30 s and one greeting.

        Those that the same owner got before are good for nothing any more.
        """
        now = time.monotonic()
        for name, one in list(self._expected.items()):
            if one.owner == owner:
                self._tokens.revoke(name)
            if one.owner == owner or one.until_seconds < now:
                del self._expected[name]
        tokens = tuple(self._tokens.issue(TOKEN_SECONDS) for _ in range(connections))
        for index, token in enumerate(tokens):
            until = now + TOKEN_SECONDS + GREETING_SECONDS
            self._expected[token[:TOKEN_ID_BYTES]] = _Expected(owner, receive, index, until)
        return tokens

    async def close(self) -> None:
        """Stop listening and hang up on who has not greeted yet. Safe to call twice."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for raw in self._greetings.values():
            raw.shutdown(socket.SHUT_RDWR)
        if self._greetings:
            await asyncio.wait(list(self._greetings))
        await asyncio.to_thread(self._threads.shutdown)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while self._listener is not None:
            try:
                raw, where = await loop.sock_accept(self._listener)
            except OSError as error:  # out of descriptors, or gone before it was accepted
                _log.warning('data connection not accepted reason="%s"', error.strerror)
                await asyncio.sleep(0.1)
                continue
            peer = str(Address(host=where[0], port=where[1]))
            if len(self._greetings) >= MAX_GREETINGS:
                raw.close()
                _log.warning("data connection refused peer=%s reason=%s", peer, "too many at once")
                continue
            task = asyncio.create_task(self._greet(raw, peer))
            self._greetings[task] = raw
            task.add_done_callback(self._greeted)

    def _greeted(self, task: asyncio.Task[None]) -> None:
        self._greetings.pop(task).close()

    async def _greet(self, raw: socket.socket, peer: str) -> None:
        loop = asyncio.get_running_loop()
        copy = raw.dup()
        copy.setblocking(False)
        try:
            connection = await loop.run_in_executor(self._threads, self._let_in, copy.detach())
        except ConnectionLost as error:
            _log.warning('data connection refused peer=%s reason="%s"', peer, error.strerror)
            return
        expected = self._expected.pop(connection.token_id, None)
        if expected is None:
            connection.close()
            _log.warning("data connection refused peer=%s reason=%s", peer, "no longer expected")
            return
        try:
            expected.receive(connection, expected.index)
        except Exception as error:  # its session has ended meanwhile
            connection.close()
            _log.warning('data connection not used peer=%s reason="%s"', peer, error)

    def _let_in(self, descriptor: int) -> Connection:
        return Connection.accept(
            descriptor,
            self._tokens,
            tls=self.tls,
            ktls=self._ktls,
            timeout_seconds=GREETING_SECONDS,
        )
