"""Talks QMP: one short conversation at a time with each socket.

Owns connecting, the wait for an answer, and what errors are called. A QMP socket serves one client
at a time, so it is never held between two conversations: hooks and operators want it too.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import struct
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError
from qemu.qmp.qmp_client import GreetingError, NegotiationError

from agent.errors import FailedPrecondition, Unavailable, WarmsyncError

_Result = TypeVar("_Result")
_locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
"""Of each socket: two volumes of one VM must not wait for each other in its backlog."""

_GREETINGS = 5
"""How often one that is not understood is asked for again: between the end of one client and its
welcome for the next a QEMU still sends events, which the next takes for its greeting."""
_GREETING_PAUSE_SECONDS = 0.05

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # its errors are told as ours


class Monitor:
    """A conversation that is open."""

    def __init__(self, client: QMPClient, socket_path: str) -> None:
        self._client = client
        self.socket_path = socket_path

    async def execute(self, command: str, **arguments: object) -> Any:
        """Return the answer. FailedPrecondition QMP_REFUSED; `_` in names stands for `-`."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return await self._client.execute(command, named or None)
        except ExecuteError as error:
            told = error.error.error
            raise FailedPrecondition(
                "QMP_REFUSED",
                f"QEMU at {self.socket_path} refused {command}: {told.desc}; "
                "see its log and the arguments it was started with",
                socket=self.socket_path,
                command=command,
                kind=told.class_,
                detail=told.desc,
            ) from error


def converse(
    socket_path: str, work: Callable[[Monitor], Awaitable[_Result]], patience_seconds: float
) -> _Result:
    """Connect, do the work, hang up.

    FailedPrecondition QEMU_GONE where nobody listens or the process ends meanwhile, Unavailable
    QMP_UNREACHABLE where what listens does not answer in time or is no QMP, QMP_REFUSED.
    """
    with _locks[socket_path]:
        return _run(_converse(socket_path, work, patience_seconds))


async def _converse(
    socket_path: str, work: Callable[[Monitor], Awaitable[_Result]], patience_seconds: float
) -> _Result:
    client = QMPClient("warmsync")
    try:
        async with asyncio.timeout(patience_seconds):
            await _connect(client, socket_path, patience_seconds)
            return await work(Monitor(client, socket_path))
    except TimeoutError as error:
        raise _unreachable(socket_path, f"no answer in {patience_seconds:g} s") from error
    except (ExecInterruptedError, EOFError, ConnectionError) as error:
        raise gone(socket_path) from error
    except ConnectError as error:
        if isinstance(error.exc, ConnectionError | EOFError):
            raise gone(socket_path) from error
        raise _unreachable(socket_path, str(error)) from error
    except QMPError as error:
        raise _unreachable(socket_path, str(error)) from error
    finally:
        # What a connection ends with was told already, or matters to nobody any more.
        with suppress(QMPError, EOFError, OSError):
            await client.disconnect()


async def _connect(client: QMPClient, socket_path: str, patience_seconds: float) -> None:
    for tries_left in reversed(range(_GREETINGS)):
        try:
            await client.connect(dial(socket_path, patience_seconds))
            return
        except ConnectError as error:
            if not (isinstance(error.exc, GreetingError | NegotiationError) and tries_left):
                raise
            await asyncio.sleep(_GREETING_PAUSE_SECONDS)


def dial(socket_path: str, patience_seconds: float) -> socket.socket:
    """Return a blocking socket that is connected to a QMP socket, whose queue may be full at first.

    Raises as `converse`. asyncio's own connect takes a full queue (EAGAIN, unix(7)) for a connect
    under way, and reads from a socket that was never connected.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _limit_sends(client, patience_seconds)  # the wait of a connect, too (socket(7))
        client.connect(socket_path)
        _limit_sends(client, 0)  # no limit any more
    except OSError as error:
        client.close()
        if isinstance(error, BlockingIOError):
            raise _unreachable(socket_path, f"no answer in {patience_seconds:g} s") from error
        if isinstance(error, ConnectionError | FileNotFoundError):
            raise gone(socket_path) from error
        raise _unreachable(socket_path, str(error)) from error
    return client


def _limit_sends(client: socket.socket, seconds: float) -> None:
    fraction, whole = math.modf(seconds)
    limit = struct.pack("@ll", int(whole), int(fraction * 1_000_000))  # struct timeval
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _run(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run in an event loop of its own: those who call block, at the agent's start in its loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, thread_name_prefix="qmp") as thread:
        return thread.submit(asyncio.run, work).result()


def find_silent(sockets: list[str], patience_seconds: float) -> list[str]:
    """Return the sockets at which no QEMU answers."""

    async def greet(monitor: Monitor) -> None:
        await monitor.execute("query-version")

    silent = []
    for path in sockets:
        try:
            converse(path, greet, patience_seconds)
        except WarmsyncError:
            silent.append(path)
    return silent


def is_refused(error: WarmsyncError, detail: str) -> bool:
    """Return whether QEMU refused a command with this in its text."""
    return error.reason == "QMP_REFUSED" and detail in error.values["detail"]


def gone(socket_path: str) -> FailedPrecondition:
    """Return the error of a QEMU that is not there any more."""
    return FailedPrecondition(
        "QEMU_GONE",
        f"no QEMU answers at {socket_path}, so nobody knows what was written to its disks; "
        "start it again, or move the disk with --tracker scan",
        socket=socket_path,
    )


def _unreachable(socket_path: str, detail: str) -> Unavailable:
    return Unavailable(
        "QMP_UNREACHABLE",
        f"QMP at {socket_path} cannot be used ({detail}); it serves one client at a time: give "
        "the agent a socket of its own (-qmp unix:PATH,server=on,wait=off)",
        socket=socket_path,
    )
