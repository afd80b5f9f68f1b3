"""The cutover: the last changes, the proof that nothing writes, the fence, the release.

Owns the order of the design's rules 6 and 12: flush the source's page cache, take, send, durable,
look again, fence, look once more, release. At each step exactly one side may be written to.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace

from agent.certificate import Certificate, verify
from agent.certificate.statement import Statement, canonical
from agent.disk import SourceDisk, not_quiesced
from agent.errors import FailedPrecondition, Unavailable, WarmsyncError
from agent.migration import DowntimeParts, Role
from agent.peer import Peer
from agent.sender import Sender
from agent.shrinkage import check_fits
from agent.signer import Signer

_log = logging.getLogger(__name__)

RELEASE_SECONDS = 30.0
"""How long the release is asked for again when the target does not answer."""

_RETRY_SECONDS = 0.5

_REFUSALS = frozenset({"NOT_PROVEN", "NOT_RELEASABLE"})
"""What a target says that was not released."""
_FIRST_REFUSALS = frozenset(
    {
        "BAD_CUTOVER_CERTIFICATE",
        "ROOTS_DIFFER",
        "SESSION_NOT_FOUND",
        "SESSION_SUPERSEDED",
        "SIGNATURE_INVALID",
        "STATE_NOT_KEPT",
    }
)
"""What says so of one request only: an earlier one may have been heard, or be yet to come."""


class Cutover:
    """One attempt. `fencing` is true from when the fence may be up, `releasing` from when the
    target may own the disk; `write_down` is called before the first comes true.
    """

    def __init__(
        self,
        sender: Sender,
        peer: Peer,
        token: Callable[[], str],
        *,
        prove: Callable[[], Awaitable[Statement]],
        signer: Signer,
        resize: bool = False,
        asked_seconds: float | None = None,
        write_down: Callable[[], None] = lambda: None,
    ) -> None:
        self._sender = sender
        self._peer = peer
        self._token = token
        self._prove = prove
        self._signer = signer
        self._resize = resize
        self.certificate: Certificate | None = None
        """What both have signed, once it is done."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Nobody may be waiting for the answer any more; the migration's state has it too.
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        # The downtime counts from when it was asked for (monotonic clock).
        self._started = self._lap = asked_seconds or time.monotonic()
        self._parts = DowntimeParts()
        self._write_down = write_down
        self.fencing = False
        self.releasing = False

    async def run(self) -> None:
        """Do it. Undone, and syncing goes on, with NOT_QUIESCED, SOURCE_UNREADABLE and
        SOURCE_DOES_NOT_FIT (FailedPrecondition).
        """
        sender = self._sender
        self._note("finish_round")
        sender.hurry()
        await sender.on_disks(SourceDisk.check_unclaimed)
        await sender.on_disks(SourceDisk.flush)
        self._note("source_flush")
        taken = await sender.take(flush=False)
        self._note("take")
        report = await sender.send_dirty(taken)
        sender.check_read()
        if report.dirty_bytes != taken.dirty_bytes:
            raise RuntimeError("the final round left something unsent")
        self._note("send", minus_seconds=report.flush_seconds)
        self._parts = replace(self._parts, target_flush=report.flush_seconds)
        statement = await self._prove_equal()
        self._note("verify")
        if self._resize:
            await self._grow()
            self._note("resize")
        await self._release(statement)
        self._note("release")
        sender.note(downtime_seconds=time.monotonic() - self._started, downtime_parts=self._parts)

    async def _prove_equal(self) -> Statement:
        """Both ends read what they have not read yet, while it is proved that nothing writes.

        A write that the reading misses is one that is noticed by the looks.
        """
        proving = asyncio.ensure_future(self._prove())
        try:
            await self._prove_quiesced()
            self._note("check")
            return await proving
        finally:
            proving.cancel()
            await asyncio.wait([proving])
            _ = proving.cancelled() or proving.exception()  # seen

    async def _prove_quiesced(self) -> None:
        """Look; fence; look again, for what was in flight when the fence went up."""
        sender = self._sender
        # A pass over the device is only paid for once, unless the fence would hurt a running VM:
        # the write permission of a file does not matter to who has it open.
        if any(disk.tracker.looks_cheaply or disk.device.is_block_device for disk in sender.disks):
            await self._look()
        self.fencing = True
        self._write_down()
        try:
            await sender.on_disks(SourceDisk.fence)
            await sender.on_disks(SourceDisk.flush)
            await self._look()
            await sender.on_disks(check_fits)
        except BaseException:
            await sender.on_disks(SourceDisk.unfence)
            self.fencing = False
            raise

    async def _look(self) -> None:
        marked = await self._sender.on_disks(SourceDisk.look)
        for disk, size_bytes in zip(self._sender.disks, marked, strict=True):
            if size_bytes:
                raise not_quiesced(
                    disk.volume.source, f"{size_bytes} bytes were written during the cutover"
                )

    async def _grow(self) -> None:
        """Let the target grow what it has proved; the source is still the owner, and fenced."""
        lost_at = None
        while True:
            try:
                resizes = await self._peer.resize(self._token(), self._sender.generation)
                break
            except Unavailable as error:
                # It goes on there meanwhile, for as long as it takes.
                lost_at = lost_at or time.monotonic()
                if time.monotonic() > lost_at + RELEASE_SECONDS:
                    raise
                _log.warning('resize not answered yet, asking again reason="%s"', error)
            await asyncio.sleep(_RETRY_SECONDS)
        self._sender.note(resizes=resizes)
        self._write_down()  # whoever takes this up must not take what was changed for a difference
        # It may have taken minutes, and the permission of a file stops nobody who has it open.
        if all(disk.tracker.looks_cheaply for disk in self._sender.disks):
            await self._look()

    async def _release(self, statement: Statement) -> None:
        """Ask until there is an answer: from the first try on only the target knows who owns."""
        signature, signed = self._signer.sign(statement, Role.SOURCE), canonical(statement)
        self.releasing = True
        deadline = time.monotonic() + RELEASE_SECONDS
        is_first = True
        while True:
            try:
                theirs = await self._peer.release(
                    self._token(), self._sender.generation, signed, signature
                )
                self._keep(Certificate(statement, (signature, theirs)))
                return
            except WarmsyncError as error:
                if _is_refusal(error, is_first=is_first):
                    self.releasing = False  # the target answered: it has not been released
                    raise
                if time.monotonic() > deadline:
                    raise unknown_owner(self._peer.address) from error
                _log.warning('release not answered yet, asking again reason="%s"', error)
            is_first = False
            await asyncio.sleep(_RETRY_SECONDS)

    def _keep(self, certificate: Certificate) -> None:
        """The target owns, whatever it has signed; a certificate that does not hold is none."""
        try:
            verify(certificate, {})
            self.certificate = certificate
        except WarmsyncError as error:
            _log.error('no certificate reason="%s"', error)

    def _note(self, part: str, *, minus_seconds: float = 0.0) -> None:
        now = time.monotonic()
        spent = asdict(self._parts)[part] + now - self._lap - minus_seconds
        self._parts = replace(self._parts, **{part: spent})
        self._lap = now


def unknown_owner(address: str) -> FailedPrecondition:
    """Return the error of a handover whose answer never came: nobody here knows who owns."""
    return FailedPrecondition(
        "OWNER_UNKNOWN",
        f"the target at {address} did not answer the release, so it may own the disks; the source "
        "stays fenced. Boot nowhere until it answers; if it stays away, find out who owns and say "
        "so: warmsync settle, with --owner source (lifts the fence) or --owner target",
        peer=address,
    )


def _is_refusal(error: WarmsyncError, *, is_first: bool) -> bool:
    """Return whether the target says that it was not released; all else may come after it was."""
    if isinstance(error, Unavailable):  # whatever its reason: it may be so, or become so
        return False
    return error.reason in _REFUSALS or (is_first and error.reason in _FIRST_REFUSALS)
