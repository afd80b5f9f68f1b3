"""Whether what the target holds is believed, and the comparison that settles it.

Owns the doubt: once raised, nothing is sent before both ends were compared. Never decides who owns.
"""

from __future__ import annotations

import logging

from agent.disk import SourceDisk
from agent.peer import Peer
from agent.sender import Sender, Workshop
from agent.source.books import Books
from agent.source.proof import SourceProof
from agent.source.reconcile import reconcile

_log = logging.getLogger(__name__)


class Doubts:
    """One migration's. `raised`: compare with the target before anything is sent."""

    def __init__(
        self,
        books: Books,
        sender: Sender,
        workshop: Workshop,
        peer: Peer,
        proof: SourceProof,
        *,
        raised: bool,
    ) -> None:
        self._books = books
        self._sender = sender
        self._workshop = workshop
        self._peer = peer
        self._proof = proof
        self.raised = raised

    async def agree(self, generation: int) -> None:
        """Agree with a target that was lost on what is durable there: this generation, or nothing.

        Generation 0 is that of a target that has nothing: a session anew, another disk. What was
        found equal, or acknowledged to the agent before this one, may be of no generation we know.
        """
        forgot = generation < self._sender.generation
        if forgot or (generation == 0 and await self._sender.counts_on_target()):
            await self.forget_target("the target has lost rounds that it had acknowledged")
        self._sender.agree(generation)

    async def forget_target(self, reason: str) -> None:
        """Believe nothing of what the target holds."""
        _log.warning('the target is compared id=%s reason="%s"', self._books.id, reason)
        self.raised = True
        await self._sender.on_disks(SourceDisk.forget_target)
        count = self._sender.progress.suspect_volumes + len(self._sender.disks)
        self._sender.note(suspect_volumes=count)

    async def compare(self) -> None:
        """Compare with the target; what is found equal is not sent. Nothing is sent meanwhile."""
        sender = self._sender
        # What is read in the background now must not be entered after what is found here.
        await self._proof.stop()
        before = sender.progress.reconciled_bytes
        sender.note(round_bytes=sender.progress.total_bytes, round_done_bytes=0)
        steps = reconcile(sender, self._workshop, self._peer, self._books.token)
        equal = 0
        async for compared, equal in steps:
            sender.note(round_done_bytes=compared, reconciled_bytes=before + equal)
        _log.info("compared with the target id=%s equal_bytes=%s", self._books.id, equal)
        self.raised = False
