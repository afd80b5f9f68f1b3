"""The course of one migration while it is connected: round 0, round after round, the cutover.

Owns what comes next: a comparison, a round, a rest, or the attempt that was asked for. What a round
does is `agent.sender`, whether it has converged `agent.rounds`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace

from agent.estimate import Sample
from agent.peer import Peer
from agent.rounds import Convergence, Verdict, sample_of
from agent.sender import Sender
from agent.source.books import Books
from agent.source.doubts import Doubts
from agent.source.guest import Guest
from agent.source.handover import Handover
from agent.source.proof import SourceProof
from agent.state import Event, State

UNREAD_RETRY_SECONDS = 0.5
"""How long a block that could not be read rests after its first try; twice as long after two."""


class Course:
    """One migration's. `at_rest` is held while anything is taken, sent or compared."""

    def __init__(
        self,
        books: Books,
        sender: Sender,
        *,
        convergence: Convergence,
        doubts: Doubts,
        proof: SourceProof,
        guest: Guest,
        handover: Handover,
        peer: Peer,
    ) -> None:
        self._books = books
        self._sender = sender
        self._convergence = convergence
        self._doubts = doubts
        self._proof = proof
        self._guest = guest
        self._handover = handover
        self._peer = peer
        self._wake = asyncio.Event()
        self.at_rest = asyncio.Lock()

    def stir(self) -> None:
        """Somebody has asked for something: rest no longer."""
        self._wake.set()
        self._sender.bell.ring()

    def learn(self, opening: Sample) -> None:
        """Predict from what round 0 has told."""
        self._books.opening = opening
        self._convergence.open(opening)

    async def run(self) -> None:
        """Go on until the target owns. Raises what breaks the connection, or the migration."""
        if self._books.state is not State.CUT_OVER:  # it may have been heard on connecting
            await self._begin()
        while self._books.state is not State.CUT_OVER:
            await self._rest()
            async with self.at_rest:
                if self._doubts.raised:
                    await self._doubts.compare()
                wanted = self._books.wants_cutover
                await (self._handover.attempt() if wanted else self._sync())

    async def _begin(self) -> None:
        await self._sender.wait_until_running()
        if self._doubts.raised:
            async with self.at_rest:
                await self._doubts.compare()
        await self._seed()

    async def _seed(self) -> None:
        if self._books.state is State.PENDING:
            self._books.move(Event.SEED)
        await self._sender.wait_until_running()
        if self._books.state is not State.SEEDING:
            return
        async with self.at_rest:
            taken = await self._sender.take(flush=False)
            self.learn(sample_of(await self._sender.send_seed(taken)))
        await self._sender.wait_until_running()
        self._books.move(Event.SYNC)

    async def _rest(self) -> None:
        """Wait for the next round, or until somebody asks for something."""
        await self._sender.wait_until_running()
        self._sender.check()
        self._wake.clear()
        if self._books.wants_cutover:
            return
        wait = self._convergence.wait_seconds(time.monotonic())
        wait = max(wait, UNREAD_RETRY_SECONDS * self._sender.unread_tries)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._wake.wait()
        await self._sender.wait_until_running()

    async def _sync(self) -> None:
        # With the flush, so that what the host's page cache holds counts in the prediction.
        taken = await self._sender.take(flush=True)
        if taken.suspect:
            await self._doubts.compare()
            return
        verdict = self._convergence.look(
            taken.dirty_bytes,
            taken.at_seconds,
            taken.since_seconds,
            taken.seconds,
            marked_bytes=taken.marked_bytes,
            proof_seconds=await self._proof.seconds(self._peer, self._books.token),
        )
        if self._sender.unread_tries:  # a cutover would be refused
            verdict = replace(verdict, converged=False)
        self._judge(verdict)
        budget = self._books.plan.max_downtime_seconds
        self._proof.read_ahead(idle=not taken.marked_bytes, budget_seconds=budget)
        if self._books.state in (State.SYNCING, State.CONVERGED):  # not once paused meanwhile
            await self._guest.ease(verdict, self._books.plan.max_downtime_seconds)
        if taken.dirty_bytes:
            hold_bytes = self._convergence.hold_bytes()
            self._convergence.record(await self._sender.send_dirty(taken, hold_bytes))

    def _judge(self, verdict: Verdict) -> None:
        self._sender.note(
            throughput_bytes_per_second=verdict.throughput_bytes_per_second or 0.0,
            dirty_rate_bytes_per_second=verdict.dirty_rate_bytes_per_second or 0.0,
            predicted_downtime_seconds=verdict.predicted_downtime_seconds,
            stalled=verdict.stalled,
            advice=verdict.advice,
        )
        if self._books.state is State.SYNCING and verdict.converged:
            self._books.move(Event.CONVERGE)
        elif self._books.state is State.CONVERGED and not verdict.converged:
            self._books.move(Event.DIVERGE)
