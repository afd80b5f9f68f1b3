"""The `tcp` carrier: frames over connections of their own, moved by native threads.

Owns the source's end: making the connections, calling the engine (native.stream) off the event
loop, and telling why a connection was lost. Python is entered per round and per tick, never per
frame.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from agent.carrier import ACK_SECONDS, PATIENCE_SECONDS, CarrierRequest, target_lost
from agent.device import io_error
from agent.errors import Unavailable, WarmsyncError
from native.bitmap import DirtyBitmap
from native.blockio import Unread
from native.stream import Connection, ConnectionLost, Sender

CONNECT_SECONDS = 5.0
TICK_SECONDS = 0.1
FRAME_BYTES = 1 << 20
QUIET_FRAME_BYTES = 256 << 10
"""While the guest writes: its requests wait behind ours in the device's queue, so ours are short.
They cost a fifth of the speed."""
QUIET_NICE = 10
"""While the guest writes, its threads go first (nice(7): a tenth of the weight)."""
GAP_BYTES = 4 << 10
"""Clean gaps up to this are sent too. Many scattered blocks are read at once here, so bridging
saves little time, and it sends what has not changed: with 16 KiB a fifth more under random writes.
"""

_STOP_SECONDS = 2.0
"""What a frame that has begun may take to end before its connection is cut."""

_Result = TypeVar("_Result")
Explain = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Offer:
    """Where the target takes data connections, and a token for each."""

    host: str
    port: int
    tls: bool
    tokens: tuple[bytes, ...]


class TcpCarrier:
    """Frames over data connections. `explain` raises what ended the session, if that is known."""

    name = "tcp"

    def __init__(self, sender: Sender, detail: str, explain: Explain) -> None:
        self.detail = detail
        self._sender = sender
        self._explain = explain
        # Of its own: a round may take hours, and must keep no other migration waiting.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="carrier")
        self._closed = False
        self._counted = (0, 0)
        self._failure: WarmsyncError | None = None
        self.yield_to_guest(False)

    def check(self) -> None:
        """See `agent.carrier.Carrier`."""
        if self._failure is not None:
            raise self._failure
        try:
            self._sender.check()
        except ConnectionLost as error:
            raise target_lost(str(error.strerror)) from error

    async def send(self, frame: bytes) -> None:
        """See `agent.carrier.Carrier`."""
        await self._call(partial(self._sender.send_frame, frame))

    async def send_marked(
        self,
        jobs: Sequence[tuple[int, DirtyBitmap]],
        generation: int,
        tick: Callable[[int, int], None],
    ) -> list[Unread]:
        """See `agent.carrier.BulkCarrier`."""
        ticking = asyncio.create_task(self._tick(tick))
        try:
            return await self._call(partial(self._sender.send, jobs, generation))
        finally:
            ticking.cancel()
            # Not awaited itself: its cancellation could not be told from ours, which must not be
            # lost. A migration that is stopped just here would go on for ever.
            await asyncio.wait([ticking])
            if not ticking.cancelled():
                ticking.result()  # what went wrong in it is said
            self._count(tick)

    async def flush(self, generation: int) -> float:
        """See `agent.carrier.Carrier`."""
        return await self._call(partial(self._sender.end, generation))

    def limit(self, bytes_per_second: int) -> None:
        """See `agent.carrier.BulkCarrier`."""
        if not self._closed:
            self._sender.limit(bytes_per_second)

    def pause(self, paused: bool) -> None:
        """See `agent.carrier.BulkCarrier`."""
        if not self._closed:
            self._sender.pause(paused)

    def yield_to_guest(self, yielding: bool) -> None:
        """See `agent.carrier.BulkCarrier`."""
        if not self._closed:
            self._sender.tune(
                frame_bytes=QUIET_FRAME_BYTES if yielding else FRAME_BYTES,
                gap_bytes=GAP_BYTES,
                nice=QUIET_NICE if yielding else 0,
            )

    async def close(self) -> None:
        """See `agent.carrier.Carrier`."""
        if self._closed:
            return
        self._closed = True
        self._failure = self._failure or target_lost("the stream was closed")
        self._sender.stop()
        self._sender.cut()
        await asyncio.to_thread(self._thread.shutdown)
        self._sender.close()

    async def _call(self, call: Callable[[], _Result]) -> _Result:
        if self._failure is not None:
            raise self._failure
        work = asyncio.get_running_loop().run_in_executor(self._thread, call)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await self._end(work)
            raise
        except ConnectionLost as error:
            self._failure = await self._reason(error)
        except OSError as error:
            self._failure = io_error("source", error)
        raise self._failure

    async def _end(self, work: asyncio.Future[_Result]) -> None:
        """End a call that nobody waits for any more, if it can be between two frames.

        Cut within one, the target would take it for a failure before it hears of the cancellation.
        """
        self._sender.stop()
        done, _ = await asyncio.wait([work], timeout=_STOP_SECONDS)
        if not done:
            self._sender.cut()
            await asyncio.wait([work])
        _ = work.exception()  # seen

    async def _reason(self, error: ConnectionLost) -> WarmsyncError:
        """Return the target's own reason for the loss; it is only known there."""
        try:
            await self._explain()
        except WarmsyncError as reason:
            return reason
        return target_lost(str(error.strerror))

    async def _tick(self, tick: Callable[[int, int], None]) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._count(tick)

    def _count(self, tick: Callable[[int, int], None]) -> None:
        done, wire, _ = self._sender.counters()
        added = done - self._counted[0], wire - self._counted[1]
        self._counted = done, wire
        tick(*added)


async def connect(offer: Offer, request: CarrierRequest, explain: Explain) -> TcpCarrier:
    """Make all connections of an offer. Unavailable DATA_PORT_UNREACHABLE."""
    ktls = kernel_tls()
    opening = [asyncio.to_thread(_open, offer, token, ktls) for token in offer.tokens]
    opened = await asyncio.gather(*opening, return_exceptions=True)
    connections = [one for one in opened if isinstance(one, Connection)]
    for result in opened:
        if isinstance(result, BaseException):
            for connection in connections:
                connection.close()
            raise _unreachable(offer, result) from result
    detail = f"{len(connections)} connections, {connections[0].description}"
    sender = Sender(
        connections,
        request.devices,
        request.digests,
        stale=request.stale,
        compress=request.compress,
        patience_seconds=PATIENCE_SECONDS,
        ack_seconds=ACK_SECONDS,
    )
    return TcpCarrier(sender, detail, explain)


def kernel_tls() -> bool:
    """Return whether the kernel can encrypt (tls.rst of the kernel's documentation)."""
    available = Path("/proc/sys/net/ipv4/tcp_available_ulp")
    return available.exists() and "tls" in available.read_text().split()


def _open(offer: Offer, token: bytes, ktls: bool) -> Connection:
    raw = socket.create_connection((offer.host, offer.port), CONNECT_SECONDS)
    return Connection.open(
        raw.detach(), token, tls=offer.tls, ktls=ktls, timeout_seconds=CONNECT_SECONDS
    )


def _unreachable(offer: Offer, error: BaseException) -> Unavailable:
    detail = getattr(error, "strerror", None) or error
    return Unavailable(
        "DATA_PORT_UNREACHABLE",
        f"no data connection to {offer.host} port {offer.port} ({detail}); open that port "
        "(data_port in its configuration), or use --carrier grpc",
        host=offer.host,
        port=offer.port,
    )
