"""The target's end: one session receives the volumes of one migration.

Owns how a session begins, comes back and ends. What it is made of is in this package: `ledger`,
`holding`, `intake`, `delivery`. Never reads the source, never decides when to cut over.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from agent.certificate import Signature
from agent.errors import FailedPrecondition, InvalidArgument, NotFound, WarmsyncError
from agent.hook import HookRun, no_hook
from agent.journal import Journal
from agent.migration import Migration, Owner, Plan, Progress, Resize
from agent.peer import Proof, SessionRequest
from agent.record import TargetRecord
from agent.sender import Workshop
from agent.signer import Signer
from agent.state import Entry, Event, State
from agent.target.claim import open_devices
from agent.target.delivery import Delivery
from agent.target.growth import Growth
from agent.target.holding import Holding
from agent.target.inlet import Inlet
from agent.target.intake import OPENING_SECONDS, ORPHAN_SECONDS, Intake
from agent.target.ledger import Ledger
from agent.target.settling import settle
from agent.target.witness import Witness
from native.blockio import BlockDevice
from native.stream import Connection

_log = logging.getLogger(__name__)


class TargetSession:
    """Receives frames, makes rounds durable, and hands the devices over or gives them up."""

    def __init__(
        self,
        record: TargetRecord,
        devices: list[BlockDevice],
        workshop: Workshop,
        journal: Journal,
        allow_devices: tuple[str, ...],
        *,
        witness: Witness,
        signer: Signer,
        growth: Growth,
        boot: HookRun | None = None,
    ) -> None:
        self._ledger = Ledger(record, journal, boot or no_hook())
        self.bell = self._ledger.bell
        self._holding = Holding(
            self._ledger, devices, workshop, allow_devices, witness=witness, growth=growth
        )
        self._intake = Intake(self._ledger, self._holding, self._fail)
        self._delivery = Delivery(self._ledger, self._holding, self._intake, signer)
        if not self.is_over:
            begun = self.state is not State.PENDING
            self._intake.wait_for_source(ORPHAN_SECONDS if begun else OPENING_SECONDS)

    @property
    def id(self) -> str:
        """The migration's id."""
        return self._ledger.id

    @property
    def token(self) -> str:
        """What a call of this session's source has to show; another after each `resume`."""
        return self._ledger.token

    def is_named_by(self, token: str, *, ahead: bool = False) -> bool:
        """Return whether a token is this session's. See `agent.target.ledger`."""
        return self._ledger.is_named_by(token, ahead=ahead)

    @property
    def secret(self) -> str:
        """What its source knows it by."""
        return self._ledger.secret

    @property
    def state(self) -> State:
        """The present state."""
        return self._ledger.state

    @property
    def is_over(self) -> bool:
        """Whether nothing will be received any more."""
        return self.state.is_terminal or self.state is State.CUT_OVER

    @property
    def certificate(self) -> str:
        """What both have signed, once it is released; empty before."""
        return self._ledger.certificate

    @property
    def unread(self) -> tuple[int, float]:
        """The bytes that a proof would have to read back now, and how many a second can be."""
        return self._holding.witness.unread

    def snapshot(self) -> Migration:
        """Return what is known now."""
        known = self._ledger.snapshot()
        progress = replace(
            known.progress,
            unproved_bytes=self.unread[0],
            sent_bytes=known.progress.sent_bytes + self._intake.received_bytes,
        )
        return replace(known, progress=progress, refusal=self._intake.trouble or known.refusal)

    def record(self) -> TargetRecord:
        """Return what is written down of it."""
        return self._ledger.record()

    def write_down(self) -> None:
        """Make what is known of it durable. `journal.NOT_KEPT`."""
        self._ledger.write_down()

    async def resume(self, secret: str, epoch: int) -> int:
        """The source has come back: cut its earlier connections; return the durable generation.

        FailedPrecondition SESSION_SUPERSEDED for an `epoch` that is not new. Raises what ended the
        session, and what is wrong with the devices now: such errors say that it was not released,
        by their value `owner`.
        """
        ledger = self._ledger
        if not ledger.is_known_by(secret):
            raise session_not_found()
        if epoch <= ledger.epoch:
            raise ledger.superseded()
        if self.state.is_terminal and self.state is not State.COMPLETED:
            raise self._end_without_release()
        ledger.epoch = epoch
        ledger.write_down()
        if self.state in (State.CUT_OVER, State.COMPLETED):
            return ledger.generation
        async with self._holding.changing:
            if epoch != ledger.epoch:  # another came while this one waited
                raise ledger.superseded()
            await self._intake.cut_streams()
            await self._holding.claim_again()
        self._intake.trouble = None
        generation = ledger.generation
        _log.info("session resumed id=%s epoch=%s generation=%s", self.id, ledger.epoch, generation)
        return generation

    def _end_without_release(self) -> WarmsyncError:
        message = f"migration {self.id} is {self.state} here"
        error = self._ledger.error or FailedPrecondition("SOURCE_FAILED", message)
        error.values["owner"] = Owner.SOURCE
        return error

    def begin_stream(self) -> int:
        """See `agent.target.intake`."""
        return self._intake.begin_stream()

    def expect(self, connections: int) -> Inlet:
        """See `agent.target.intake`."""
        return self._intake.expect(connections)

    def receive(self, inlet: Inlet, connection: Connection, index: int) -> None:
        """See `agent.target.intake`."""
        self._intake.receive(inlet, connection, index)

    async def write(self, frame: memoryview, stream: int) -> int:
        """See `agent.target.intake`."""
        return await self._intake.write(frame, stream)

    async def flush(self, generation: int, stream: int) -> float:
        """See `agent.target.intake`."""
        return await self._intake.flush(generation, stream)

    def end_stream(self, error: WarmsyncError | None, stream: int) -> None:
        """See `agent.target.intake`."""
        self._intake.end_stream(error, stream)

    async def prove(self, generation: int) -> tuple[Proof, ...]:
        """See `agent.target.delivery`."""
        return await self._delivery.prove(generation)

    async def resize(self, generation: int) -> tuple[Resize, ...]:
        """See `agent.target.delivery`."""
        return await self._delivery.resize(generation)

    def release(self, generation: int, statement: bytes, signature: Signature) -> Signature:
        """See `agent.target.delivery`."""
        return self._delivery.release(generation, statement, signature)

    def abort(self, reason: str, *, cancelled: bool) -> None:
        """Give up: released and marked incomplete. May be repeated; not after the release."""
        if self.state.is_terminal:
            return
        if self.state is State.CUT_OVER:
            raise FailedPrecondition(
                "ALREADY_RELEASED",
                f"the target of migration {self.id} is released already; roll back instead",
                id=self.id,
            )
        if not cancelled:
            self._fail(FailedPrecondition("SOURCE_FAILED", f"the source gave up: {reason}"))
            return
        self._close()
        self._ledger.move(Event.CANCEL)

    async def boot(self, attempt: int) -> float:
        """Run this host's boot hook, once for each attempt; returns seconds. See `agent.peer`."""
        if attempt == 0:
            self._ledger.booting.check()
            return 0.0
        booting = self._ledger.booting
        async with booting.deciding:
            if self.state is not State.CUT_OVER:
                raise FailedPrecondition(
                    "NOT_BOOTABLE",
                    f"migration {self.id} is {self.state} here; only what was handed over is "
                    "booted",
                    id=self.id,
                    state=self.state,
                )
            booting.begin(attempt)
        return await booting.result()

    async def reclaim(self, allowed: tuple[str, ...]) -> None:
        """The source is the owner again, if the devices can be claimed. May be repeated.

        FailedPrecondition NOT_RECLAIMABLE, BOOT_UNDER_WAY, and what is wrong with the devices.
        """
        booting = self._ledger.booting
        # No boot begins meanwhile: the VM would run here, on disks that the source has back.
        async with booting.deciding:
            if self.state is State.ROLLED_BACK:
                return
            if self.state is not State.CUT_OVER:
                raise FailedPrecondition(
                    "NOT_RECLAIMABLE",
                    f"migration {self.id} is {self.state} here; only a cut-over one can be taken "
                    "back",
                    id=self.id,
                )
            booting.check_idle()
            await asyncio.to_thread(self._check_claimable, allowed)
            self._ledger.move(Event.ROLL_BACK)

    def _check_claimable(self, allowed: tuple[str, ...]) -> None:
        """Raise FailedPrecondition unless the devices can be claimed again. Blocking."""
        for device in open_devices(self._ledger.plan.volumes, allowed):
            device.close()

    def finish(self) -> None:
        """Nothing will be reclaimed any more. May be repeated."""
        if self.state is not State.COMPLETED:
            self._ledger.move(Event.FINISH)

    async def digests(self, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        """Iterate (offset, chunk digests) over a volume, read from the device itself."""
        if volume >= len(self._ledger.plan.volumes):
            raise InvalidArgument("NO_SUCH_VOLUME", f"there is no volume {volume}", volume=volume)
        # PENDING may be asked: the source knows of its connections a moment before we do.
        if self.state in (State.FAILED, State.CANCELLED, State.ROLLED_BACK):
            raise FailedPrecondition(
                "NOT_COMPARABLE", f"the target is {self.state}; nothing to compare", id=self.id
            )
        try:
            if self._holding.devices and not self.state.is_terminal:
                # What is found equal counts as durable from then on.
                await self._holding.writer.flush()
            async for item in self._holding.digests(volume):
                yield item
        except ValueError as error:  # the devices were closed meanwhile
            raise self._ledger.shut() from error

    def abandon(self) -> None:
        """Give up a session whose source is away: its agent may have lost its state for good.

        FailedPrecondition NOT_THE_SOURCE while the source is connected, and after the release.
        """
        if self.is_over or self._intake.streaming:
            raise FailedPrecondition(
                "NOT_THE_SOURCE",
                f"this agent is the target of migration {self.id}, and its source is connected, or "
                "it was released; ask the agent of its source, or if that is gone settle who owns "
                "(warmsync settle)",
                id=self.id,
            )
        self.abort("cancelled at the target", cancelled=True)

    async def settle(self, owner: Owner, allowed: tuple[str, ...]) -> None:
        """A person says who owns. See `agent.target.settling`."""
        await settle(self._ledger, owner, allowed, self.abandon)

    def give_up(self, error: WarmsyncError) -> None:
        """End it with an error."""
        self._fail(error)

    def check(self) -> None:
        """Raise what ended the session, if anything has."""
        if self._ledger.error is not None:
            raise self._ledger.error
        if self._intake.trouble is not None:
            raise self._intake.trouble
        if self._ledger.resizing and not self.is_over:
            raise self._ledger.not_open()

    def close(self) -> None:
        """The agent stops: what is written down goes on with its next start."""
        self._intake.disown()
        self._close(keep=True)

    async def ended(self) -> None:
        """Wait until nothing is being written or read back any more, after `close`."""
        await self._ledger.booting.close()
        await self._holding.witness.stop()
        await self._intake.ended()

    def _fail(self, error: WarmsyncError) -> None:
        if self.state.is_terminal:
            return
        self._ledger.error = error
        self._close()
        self._ledger.fail()
        _log.error('target failed id=%s reason=%s message="%s"', self.id, error.reason, error)

    def _close(self, *, keep: bool = False) -> None:
        """Give the devices back; `keep` what was read back, for the next start."""
        self._intake.close()
        self._holding.give_back(keep=keep)


def new_session(request: SessionRequest) -> TargetRecord:
    """Return the record of a session that begins."""
    return TargetRecord(
        plan=Plan(request.migration_id, "", request.volumes, verify=request.verify),
        secret=request.secret,
        epoch=request.epoch,
        history=(Entry(State.PENDING, time.time()),),
        generation=0,
        progress=Progress(total_bytes=sum(v.size_bytes for v in request.volumes)),
    )


def session_not_found() -> NotFound:
    """Return the error for a token that no session has."""
    return NotFound("SESSION_NOT_FOUND", "this agent has no such session; start a new migration")
