"""The source's part in the proof that both ends are equal, and what is signed of it.

Owns the comparison at the cutover and its prediction. What it compares is what each end has read
from its own devices: here the bytes as they were read for sending, there as they were read back.
"""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from typing import NoReturn

from agent.carrier import ACK_SECONDS, target_lost
from agent.certificate.statement import End, ProvenVolume, Statement, format_time
from agent.device import io_error
from agent.disk import SourceDisk
from agent.errors import DataLoss, FailedPrecondition, WarmsyncError
from agent.migration import Depth, Plan
from agent.peer import Peer, Proof, TargetProof
from agent.prover import Prover
from agent.sender import Sender, Workshop
from agent.tree import DigestTree
from agent.version import agent_version

AHEAD_SHARE = 0.1
"""Share of the budget that reading back at the cutover may take: more is read before, though that
disturbs the guest. While it is idle, all is."""


LOOK_SECONDS = 10.0
"""How often a target is asked how far it has read: most proofs end before the first time."""


class SourceProof:
    """What one migration's source knows of its own bytes."""

    def __init__(self, plan: Plan, sender: Sender, workshop: Workshop) -> None:
        self._plan = plan
        self._sender = sender
        trees = [disk.tree for disk in sender.disks if disk.tree is not None]
        devices = [disk.device for disk in sender.disks if disk.tree is not None]
        self._prover = Prover(trees, devices, workshop.threads, workshop.pool)

    async def seconds(self, peer: Peer, token: str) -> float:
        """Return what the proof would add to the downtime, were the guest stopped now."""
        if self._plan.verify is not Depth.FULL:
            return 0.0
        unread = await peer.unread(token)
        pending = sum(await self._sender.on_disks(SourceDisk.count_touched))
        own = sum(await self._sender.on_disks(SourceDisk.count_unproved))
        there = unread.unread_bytes + pending
        self._sender.note(unproved_bytes=max(own, there))
        return max(own / self._prover.rate_bytes_per_second, there / unread.bytes_per_second)

    def read_ahead(self, *, idle: bool, budget_seconds: float) -> None:
        """Read what is stale in the background, if it is worth it."""
        if self._plan.verify is not Depth.FULL:
            return
        seconds = self._prover.unread_bytes / self._prover.rate_bytes_per_second
        if seconds and (idle or seconds > AHEAD_SHARE * budget_seconds):
            self._prover.wake()

    async def prove(self, peer: Peer, token: str, asked_at_seconds: float) -> Statement:
        """Compare both ends as they are now, with the source quiesced. DataLoss COPIES_DIFFER."""
        if self._plan.verify is Depth.NONE:
            theirs = await self._ask(peer, token)
            own = tuple(Proof(0, b"") for _ in self._sender.disks)
        else:
            reading = asyncio.ensure_future(self._settle())
            try:
                theirs = await self._ask(peer, token)
                own = await reading
            finally:
                reading.cancel()
                await asyncio.wait([reading])
                _ = reading.cancelled() or reading.exception()  # seen
        try:
            self._compare(own, theirs)
        except (DataLoss, FailedPrecondition):
            # Without TLS nothing protects an answer: damage of it is not damage of a copy.
            theirs = await self._ask(peer, token)
            self._compare(own, theirs)
        return self._state(own, theirs, asked_at_seconds)

    async def _ask(self, peer: Peer, token: str) -> TargetProof:
        """Return what the target has read back. PEER_LOST if its disk does not go on."""
        proving = asyncio.ensure_future(peer.prove(token, self._sender.generation))
        watching = asyncio.ensure_future(_watch(peer, token))
        both = (proving, watching)
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not proving.done():
                watching.result()
            return await proving
        finally:
            for one in both:
                one.cancel()
            await asyncio.wait(both)
            for one in both:
                _ = one.cancelled() or one.exception()  # seen

    async def stop(self) -> None:
        """End what is being read in the background."""
        await self._prover.stop()

    async def _settle(self) -> tuple[Proof, ...]:
        try:
            await self._prover.settle()
        except OSError as error:
            raise io_error("source", error) from error
        final = self._plan.verify is Depth.FINAL
        question = DigestTree.prove_last if final else DigestTree.prove_all
        return tuple(Proof(*one) for one in await self._prover.ask(question))

    def _compare(self, own: tuple[Proof, ...], theirs: TargetProof) -> None:
        if len(theirs.volumes) != len(own):
            raise FailedPrecondition(
                "PROTOCOL_MISMATCH",
                f"the target has proved {len(theirs.volumes)} volumes, not {len(own)}; run the "
                "same version of warmsync on both hosts",
            )
        for disk, one, other in zip(self._sender.disks, own, theirs.volumes, strict=True):
            if one != other:
                raise DataLoss(
                    "COPIES_DIFFER",
                    f"{disk.volume.source} and {disk.volume.target} are not equal "
                    f"({one.compared_bytes} bytes compared); nothing was handed over: both are "
                    "compared chunk by chunk and what differs is sent again, then cut over again",
                    source=disk.volume.source,
                    target=disk.volume.target,
                )

    def _state(
        self, own: tuple[Proof, ...], theirs: TargetProof, asked_at_seconds: float
    ) -> Statement:
        full = self._plan.verify is Depth.FULL
        return Statement(
            migration=self._plan.id,
            generation=self._sender.generation,
            depth=self._plan.verify,
            volumes=tuple(
                ProvenVolume(
                    disk.volume.source,
                    disk.volume.target,
                    disk.volume.size_bytes,
                    one.compared_bytes,
                    one.root if full else None,
                    other.root if full else None,
                )
                for disk, one, other in zip(self._sender.disks, own, theirs.volumes, strict=True)
            ),
            source=End(socket.gethostname(), agent_version()),
            target=End(theirs.host, theirs.agent_version),
            cutover_asked_at=format_time(asked_at_seconds),
            proved_at=format_time(time.time()),
        )


async def _watch(peer: Peer, token: str) -> NoReturn:
    """Raise once the target has read nothing for as long as a round may take to become durable.

    Keepalive would not notice: a live agent answers that, whatever its disk does. The VM is off.
    """
    left, since = -1, time.monotonic()
    while time.monotonic() - since < ACK_SECONDS:
        await asyncio.sleep(LOOK_SECONDS)
        with suppress(WarmsyncError):  # no answer is no progress; what it means the proof will say
            unread = (await peer.unread(token)).unread_bytes
            if unread != left:
                left, since = unread, time.monotonic()
    raise target_lost(f"it read nothing of its disk for {ACK_SECONDS} s")
