"""Carriers take frames from one agent to the other; every carrier has the same contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from agent.errors import Unavailable
from agent.migration import CarrierKind
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice, Unread

if TYPE_CHECKING:
    from typing_extensions import Buffer

PATIENCE_SECONDS = 60
"""A target that takes nothing for so long is lost."""
ACK_SECONDS = 300
"""So is one that does not make a round durable within this time. Keepalive would not notice: a
live agent answers that, whatever its disk does."""


@dataclass(frozen=True, slots=True)
class CarrierRequest:
    """What a source wants of a carrier; `digests` are the tables that its reads must fill, `stale`
    their marks (see native.frame.gather).
    """

    devices: Sequence[BlockDevice]
    digests: Sequence[Buffer | None]
    stale: Sequence[DirtyBitmap | None] | None = None
    kind: CarrierKind = CarrierKind.AUTO
    connections: int = 4
    compress: bool = False


class Carrier(Protocol):
    """The source's end of a stream of frames.

    Each call raises the domain's errors; after one, the carrier is of no more use.
    """

    @property
    def name(self) -> str:
        """What it is called: grpc or tcp."""

    @property
    def detail(self) -> str:
        """How it travels, or why it was chosen; one line for the operator."""

    def check(self) -> None:
        """Raise if the stream is known to be lost: an idle migration would not notice otherwise."""

    async def send(self, frame: bytes) -> None:
        """Hand over one frame; waits while too much is under way (back-pressure)."""

    async def flush(self, generation: int) -> float:
        """Return once all frames of the round are durable: the seconds the target's flush took.

        Raises if fewer frames arrived than were sent.
        """

    async def close(self) -> None:
        """End the stream. Safe to call twice."""


@runtime_checkable
class BulkCarrier(Carrier, Protocol):
    """A carrier that reads and sends by itself what is marked, on native threads."""

    async def send_marked(
        self,
        jobs: Sequence[tuple[int, DirtyBitmap]],
        generation: int,
        tick: Callable[[int, int], None],
    ) -> list[Unread]:
        """Read and send the marks of (volume, marks), which must not change meanwhile.

        Returns what was left out, as it could not be read; DataLoss if that is too much.
        `tick(done_bytes, wire_bytes)` tells now and then, and at the end, what has been added.
        """

    def limit(self, bytes_per_second: int) -> None:
        """Send at most so much (0: no limit), from now on."""

    def pause(self, paused: bool) -> None:
        """Stop reading and sending, or go on."""

    def yield_to_guest(self, yielding: bool) -> None:
        """Work behind the guest's back, or as fast as can be (as at first)."""


def target_lost(detail: str) -> Unavailable:
    """Return the error for a stream that ended, or stood still for too long."""
    return Unavailable(
        "PEER_LOST",
        f"the connection to the target was lost ({detail}); check its agent and the network",
    )
