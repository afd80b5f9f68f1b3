"""The handover of one migration: its attempts at a cutover, and who owns the disks after each.

Owns what follows from an attempt: the target owns and the source ends to send, or the source stays
the owner and its fence comes down. The order within an attempt is `agent.source.cutover`.
"""

from __future__ import annotations

import asyncio
import logging
import time

from agent.certificate import dump as dump_certificate
from agent.disk import SourceDisk
from agent.errors import DataLoss, FailedPrecondition, WarmsyncError
from agent.rounds import Convergence
from agent.saving import cold_copy_seconds
from agent.sender import Sender
from agent.source.books import Books
from agent.source.cutover import Cutover, unknown_owner
from agent.source.doubts import Doubts
from agent.source.guest import Guest
from agent.source.prepared import Prepared
from agent.source.proof import SourceProof
from agent.state import Event

_log = logging.getLogger(__name__)

_REFUSALS = frozenset({"NOT_QUIESCED", "COPIES_DIFFER", "SOURCE_UNREADABLE", "SOURCE_DOES_NOT_FIT"})
"""What makes a cutover come to nothing, and syncing go on."""


class Handover:
    """One migration's. `commands` is held by what must not run while the sending is ended."""

    def __init__(
        self,
        prepared: Prepared,
        books: Books,
        sender: Sender,
        *,
        convergence: Convergence,
        proof: SourceProof,
        doubts: Doubts,
        guest: Guest,
    ) -> None:
        self._peer = prepared.peer
        self._signer = prepared.signer
        self._books = books
        self._sender = sender
        self._convergence = convergence
        self._proof = proof
        self._doubts = doubts
        self._guest = guest
        self.commands = asyncio.Lock()

    def begin(self, asked_seconds: float, *, force: bool) -> Cutover:
        """Ask for an attempt; the downtime counts from `asked_seconds` (monotonic clock)."""
        books = self._books
        books.move(Event.CUT_OVER, force=force)
        books.refusal = None
        books.cutover = self._make_cutover(asked_seconds)
        return books.cutover

    def remember_release(self) -> None:
        """The target may own since an attempt that nobody waits for any more."""
        cutover = self._make_cutover(time.monotonic())
        cutover.fencing = cutover.releasing = True
        cutover.done.cancel()
        self._books.cutover = cutover

    def _make_cutover(self, asked_seconds: float) -> Cutover:
        asked_at = time.time()
        books, peer = self._books, self._peer
        return Cutover(
            self._sender,
            peer,
            lambda: books.token,
            prove=lambda: self._proof.prove(peer, books.token, asked_at),
            signer=self._signer,
            resize=books.plan.resize,
            asked_seconds=asked_seconds,
            write_down=books.write_down,
        )

    async def attempt(self) -> None:
        """Cut over, as was asked for. A refusal is told, and syncing goes on."""
        books, cutover = self._books, self._books.cutover
        if cutover is None:
            raise RuntimeError("no cutover was asked for")
        # First: writes that the kernel holds back must pass the tracker before the last take.
        await self._guest.release()
        try:
            await cutover.run()
        except (FailedPrecondition, DataLoss) as error:
            if error.reason not in _REFUSALS:
                raise
            books.refusal = error
            await self.stay_owner()
            books.answer(error)  # not before: whoever hears it boots the VM again
            if error.reason == "COPIES_DIFFER":
                _log.error('copies differ id=%s message="%s"', books.id, error)
                await self._doubts.forget_target("the proof at the cutover failed")
            return
        if cutover.certificate is not None:
            books.certificate = dump_certificate(cutover.certificate).decode()
        # At once: the target owns the disks, and nothing that fails here can change that.
        await self._own_no_more()

    async def hear_of_release(self, certificate: bytes) -> None:
        """The target says that it owns. OWNER_UNKNOWN if this end has never asked for it."""
        if not self._books.is_releasing:
            # By whom? Not by us: what was written since is not there. A person has to decide.
            await self._sender.on_disks(SourceDisk.fence)
            self.remember_release()
            raise unknown_owner(self._peer.address)
        self._books.certificate = certificate.decode(errors="replace")
        await self._own_no_more()

    async def stay_owner(self) -> None:
        """The target was not released: the source is the owner, whatever was begun.

        `journal.NOT_KEPT` leaves it CUTTING_OVER without a fence; FailedPrecondition STILL_FENCED.
        May be repeated.
        """
        cutover = self._books.cutover
        if cutover is not None:
            cutover.releasing = False
        self._sender.note(resizes=())
        try:
            await self._sender.on_disks(SourceDisk.unfence)
        except OSError as error:
            raise FailedPrecondition(
                "STILL_FENCED",
                f"the source of migration {self._books.id} owns, but cannot be made writable: "
                f"{error}; lift the fence by hand (blockdev --setrw; for a file chmod u+w) before "
                "its VM boots",
                id=self._books.id,
            ) from error
        if cutover is not None:
            cutover.fencing = False
        self._convergence.restart()
        self._books.move(Event.REFUSE)

    async def _own_no_more(self) -> None:
        self._books.refusal = None
        self._reckon()
        # Not written down, the journal has that the target may own: the next start asks.
        self._books.concede(Event.RELEASE)
        async with self.commands:
            await self._stop_sending()
        self._books.answer(None)

    def _reckon(self) -> None:
        """Say what was saved. A cold migration saves nothing: its downtime began with it."""
        books, progress = self._books, self._sender.progress
        took = progress.downtime_seconds
        if books.plan.cold and took is not None:
            since_start = time.time() - books.began_at_seconds
            self._sender.note(downtime_seconds=max(since_start, took))  # a clock may be set back
            return
        cold = cold_copy_seconds(books.opening, progress.total_bytes, progress.downtime_parts)
        if cold is not None and took is not None:
            self._sender.note(downtime_saved_seconds=cold - took)

    async def _stop_sending(self) -> None:
        try:
            await self._proof.stop()
            await self._sender.on_disks(lambda disk: disk.tracker.stop())
            await self._sender.close()
        except (WarmsyncError, OSError) as error:
            _log.warning('tracking not ended cleanly id=%s reason="%s"', self._books.id, error)
