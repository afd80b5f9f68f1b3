"""What a source asks of a target: the protocol that the rpc floor implements over gRPC.

Owns the words of that conversation; sends nothing itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from agent.carrier import Carrier, CarrierRequest
from agent.certificate import Signature
from agent.errors import InvalidArgument
from agent.migration import Depth, Identity, Resize, Volume


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """What a source says of itself when it opens a session."""

    migration_id: str
    protocol_version: int
    boot_id: str
    volumes: tuple[Volume, ...]
    source_identities: tuple[tuple[Identity, ...], ...]
    verify: Depth = Depth.NONE
    file_systems: tuple[str, ...] = ()
    """What is to be grown in the cutover, for each volume; see `agent.resize.foresee`."""
    secret: str = ""
    """What names the session from now on: a source whose answer is lost can `resume` or `abort`."""
    epoch: int = 1

    def check(self) -> None:
        """Raise InvalidArgument unless a session may be named so."""
        if not 16 <= len(self.secret) <= 128 or self.epoch < 1:
            raise InvalidArgument(
                "BAD_SESSION",
                f"a session's secret of {len(self.secret)} characters and epoch {self.epoch} are "
                "not valid; use 16 to 128 random characters, and an epoch from 1",
                epoch=self.epoch,
            )


def session_token(secret: str, epoch: int) -> str:
    """Return what the calls of a session show. `epoch` counts the connections of its source."""
    return f"{secret}/{epoch}"


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a target says to a source that has come back: its durable generation; who owns."""

    generation: int
    released: bool
    certificate: bytes = b""
    """If it was released: what both have signed."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What one end has read of a volume: how much, and one digest of it."""

    compared_bytes: int
    root: bytes


@dataclass(frozen=True, slots=True)
class TargetProof:
    """What a target has read back of its volumes, and who it is."""

    volumes: tuple[Proof, ...]
    host: str
    agent_version: str


@dataclass(frozen=True, slots=True)
class DiskSize:
    """How large a disk is, and its logical sectors."""

    size_bytes: int
    sector_bytes: int


@dataclass(frozen=True, slots=True)
class Unread:
    """What a target has still to read back for a proof, and how fast it does."""

    unread_bytes: int
    bytes_per_second: float


class Peer(Protocol):
    """The target's agent, as its source sees it. Every call may raise the domain's errors."""

    @property
    def address(self) -> str:
        """Where it is reached."""

    async def measure(self, targets: Sequence[str]) -> list[DiskSize]:
        """Return how large devices of the target's host are; claims nothing."""

    async def open_session(self, request: SessionRequest) -> None:
        """Claim all target devices, or none."""

    async def resume(self, secret: str, epoch: int) -> Resumed:
        """Take a session up again after a connection, or an agent, was lost."""

    async def open_carrier(self, token: str, request: CarrierRequest) -> Carrier:
        """Return a carrier for the frames of a session: of the kind that is asked for, or fail."""

    def digests(self, token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        """Iterate (offset, digests of the chunks from there on) over a whole target volume."""

    async def unread(self, token: str) -> Unread:
        """Return what a proof would cost there now. Raises what ended the session."""

    async def prove(self, token: str, generation: int) -> TargetProof:
        """Return what the target has read back, after this generation and no later one."""

    async def resize(self, token: str, generation: int) -> tuple[Resize, ...]:
        """Grow what is on the targets, which were proved at this generation. May be repeated.

        What cannot be grown is as it was, and told; so is a table that was moved to the end of a
        smaller one. DataLoss GROW_NOT_UNDONE: one is not as it was; FailedPrecondition
        TABLE_NOT_MOVED: it is, and cannot be released.
        Not released afterwards, they count as lost: `resume` answers with generation 0.
        """

    async def release(
        self, token: str, generation: int, statement: bytes, signature: Signature
    ) -> Signature:
        """Hand the target over: durable, whole, no longer claimed. May be repeated.

        `statement` (canonical) is what the source has signed; returns the target's signature.
        """

    async def abort(self, token: str, reason: str, *, cancelled: bool) -> None:
        """Give the session up: the target is released and marked incomplete. May be repeated."""

    async def boot(self, token: str, attempt: int) -> float:
        """Run the target's own boot hook; returns seconds. One that was begun is waited for.

        Attempts count from 1; 0 only checks that there is a hook that can run.
        """

    async def reclaim(self, token: str) -> None:
        """Claim the released target again, for a rollback. May be repeated."""

    async def finish(self, token: str) -> None:
        """Say that nothing will be reclaimed. May be repeated."""

    async def close(self) -> None:
        """Close the connection."""
