"""Carriers take frames from one agent to the other; every carrier has the same contract."""

from __future__ import annotations

from typing import Protocol


class Carrier(Protocol):
    """The source's end of a stream of frames.

    Each call raises the domain's errors; after one, the carrier is of no more use.
    """

    @property
    def name(self) -> str:
        """What it is called: grpc or tcp."""

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
