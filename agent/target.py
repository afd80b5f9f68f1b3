"""The target's end: one session receives the volumes of one migration.

Owns the claim on the target devices from the first check to the release, and what may be written
in which generation. Never reads the source, never decides when to cut over.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from agent.bell import Bell
from agent.booting import Booting
from agent.certificate import Certificate, Signature, signature_of, verify
from agent.certificate import dump as dump_certificate
from agent.device import boot_id, device_key, identities, io_error, open_device
from agent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
)
from agent.growth import Growth
from agent.hook import HookRun, no_hook, values_of
from agent.inlet import Inlet
from agent.journal import Journal
from agent.migration import Depth, Migration, Owner, Plan, Progress, Resize, Role, Volume
from agent.migration import Event as Entered
from agent.peer import Proof, SessionRequest, session_token
from agent.reader import read_digests
from agent.record import TargetRecord, dump
from agent.sender import Workshop
from agent.signer import Signer
from agent.state import Entry, Event, Machine, State
from agent.statement import Statement, parse_statement
from agent.witness import Witness
from agent.writer import Writer
from native.blockio import BlockDevice
from native.stream import Connection

_log = logging.getLogger(__name__)

_OPENING_SECONDS = 60.0
"""A session whose source does not begin to send within this time is given up."""
ORPHAN_SECONDS = 24 * 3600.0
"""One whose source does not come back within this time as well."""

_CLAIM_SECONDS = 10.0
_CLAIM_RETRY_SECONDS = 0.1

_PASSING = frozenset({"BAD_FRAME", "FRAMES_MISSING", "WRONG_GENERATION"})
"""Damage on the way: the round is not acknowledged, and comes again over new connections."""
_MENDABLE = frozenset({"TARGET_IO_ERROR", "DISK_FULL", "STATE_NOT_KEPT"})
"""The disk here: the source pauses, and goes on when it is resumed."""


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
        self.bell = Bell()
        self._growth = growth
        # Not what was acknowledged, unless it is released so; until the source has come back.
        self._resizing = record.resizing
        self._witness = witness
        self._signer = signer
        self._certificate = record.certificate
        self._proof: tuple[Proof, ...] | None = None
        self._grown: asyncio.Future[tuple[Resize, ...]] | None = None
        self._boot_id, self._keys = record.boot_id, record.devices
        self._allow_devices = allow_devices
        self._secret = record.secret
        self._epoch = record.epoch
        self._plan = record.plan
        self._journal = journal
        self._devices = devices
        self._threads = workshop.threads
        self._pool = workshop.pool
        self._machine = Machine.restore(record.history)
        self._generation = record.generation
        self._attach()
        self._progress = record.progress
        self._error = record.error
        paths = [volume.target for volume in record.plan.volumes]
        self._booting = Booting(
            boot or no_hook(), values_of(self.id, paths), self._write_boot, record
        )
        self._trouble: WarmsyncError | None = None
        self._inlet: Inlet | None = None
        # Streams of the grpc carrier are counted: what is left of an older one writes nothing.
        self._stream = 0
        self._streaming = False
        self._writing = 0
        self._resuming = asyncio.Lock()
        self._idle = asyncio.Event()
        self._idle.set()
        self._deadline: asyncio.TimerHandle | None = None
        if not self.state.is_terminal and self.state is not State.CUT_OVER:
            begun = self.state is not State.PENDING
            self._wait_for_source(ORPHAN_SECONDS if begun else _OPENING_SECONDS)

    @property
    def id(self) -> str:
        """The migration's id."""
        return self._plan.id

    @property
    def secret(self) -> str:
        """What its source knows it by."""
        return self._secret

    @property
    def token(self) -> str:
        """What a call of this session's source has to show; another after each `resume`."""
        return session_token(self._secret, self._epoch)

    def is_named_by(self, token: str) -> bool:
        """Return whether a token is this session's.

        FailedPrecondition SESSION_SUPERSEDED for one of an earlier connection of its source.
        """
        secret, _, epoch = token.rpartition("/")
        if not secrets.compare_digest(secret.encode(), self._secret.encode()):
            return False
        if epoch != str(self._epoch):
            raise self._superseded()
        return True

    def _superseded(self) -> FailedPrecondition:
        return FailedPrecondition(
            "SESSION_SUPERSEDED",
            f"a later run of the source's agent has taken migration {self.id} over; this one "
            "is to stop",
            id=self.id,
        )

    @property
    def state(self) -> State:
        """The present state."""
        return self._machine.state

    def snapshot(self) -> Migration:
        """Return what is known now."""
        released = (State.CUT_OVER, State.COMPLETED)
        progress = self._progress
        progress = replace(progress, unproved_bytes=self._witness.unread[0])
        if self._inlet is not None:
            received = progress.sent_bytes + self._inlet.received_bytes
            progress = replace(progress, sent_bytes=received)
        return Migration(
            plan=self._plan,
            role=Role.TARGET,
            state=self.state,
            scheme=None,
            scheme_reason="",
            progress=progress,
            history=tuple(Entered(e.state, e.at_seconds) for e in self._machine.history),
            error=self._error,
            refusal=self._trouble or self._booting.error,
            incomplete=self.state not in released,
            owner=Owner.TARGET if self.state in released else Owner.SOURCE,
        )

    def record(self) -> TargetRecord:
        """Return what is written down of it."""
        return TargetRecord(
            self._plan,
            self._secret,
            self._epoch,
            self._machine.history,
            self._generation,
            self._progress,
            self._error,
            self._boot_id,
            self._keys,
            self._certificate,
            self._resizing,
            *self._booting.record,
        )

    def write_down(self) -> None:
        """Make what is known of it durable. ResourceExhausted."""
        self._journal.save(Role.TARGET, self.id, dump(self.record()))

    async def resume(self, secret: str, epoch: int) -> int:
        """The source has come back: cut its earlier connections; return the durable generation.

        FailedPrecondition SESSION_SUPERSEDED for an `epoch` that is not new. Raises what ended the
        session, and what is wrong with the devices now.
        """
        if not secrets.compare_digest(secret.encode(), self._secret.encode()):
            raise session_not_found()
        if epoch <= self._epoch:
            raise self._superseded()
        if self._error is not None:
            raise self._error
        if self.state.is_terminal and self.state is not State.COMPLETED:
            raise FailedPrecondition("SOURCE_FAILED", f"migration {self.id} is {self.state} here")
        self._epoch = epoch
        self.write_down()
        if self.state in (State.CUT_OVER, State.COMPLETED):
            return self._generation
        async with self._resuming:
            if epoch != self._epoch:  # another came while this one waited
                raise self._superseded()
            await self._cut_streams()
            await self._claim_again()
        self._trouble = None
        self._wait_for_source(ORPHAN_SECONDS)
        _log.info("session resumed id=%s epoch=%s generation=%s", self.id, epoch, self._generation)
        return self._generation

    async def _cut_streams(self) -> None:
        self._stream += 1
        self._streaming = False
        if self._inlet is not None:
            inlet, self._inlet = self._inlet, None
            await inlet.ended()
            self._count_received(inlet)
        await self._idle.wait()

    async def _claim_again(self) -> None:
        """Open the devices anew: what was mended, or put in place again, is another device."""
        await self._witness.stop()
        for device in self._devices:
            device.close()
        self._devices = []
        try:
            self._devices = await asyncio.to_thread(
                claim, self._plan.volumes, self._allow_devices, self._undoing
            )
        except WarmsyncError as error:
            raise FailedPrecondition(
                "TARGET_NOT_CLAIMED",
                f"the target's devices cannot be claimed again: {error}; then resume",
                **error.values,
            ) from error
        self._attach()
        self._grown = None
        if self._resizing:
            # The source compares; told again if the answer does not reach it.
            _log.warning("resized and not released, so to be compared id=%s", self.id)
            self._generation = 0
            self._witness.forget()
            self._progress = replace(self._progress, resizes=())
            self._resizing = False
        # Before anything is read of them: entries of these are worth nothing for others.
        self.write_down()

    @property
    def _undoing(self) -> Growth | None:
        return self._growth if self._resizing else None

    def _attach(self) -> None:
        """Write to the devices that are open now. What is known of others says nothing of them."""
        keys = tuple(device_key(device) for device in self._devices)
        if keys and keys != self._keys:
            if self._keys:
                self._witness.forget()
            if self._keys and self._boot_id == boot_id():
                # Put in place of it on the same boot: it has none of what was acknowledged.
                _log.warning("another device than before id=%s", self.id)
                self._generation = 0
            self._keys = keys
        self._boot_id = boot_id()
        self._proof = None
        self._witness.attach(self._devices)
        sizes = [volume.size_bytes for volume in self._plan.volumes]
        self._writer = Writer(
            self._devices, sizes, self._threads, self._pool, self._witness.written
        )

    def begin_stream(self) -> int:
        """The source starts to send; returns the stream's number. FailedPrecondition."""
        self._check_open()
        if self._inlet is not None and not self._inlet.is_complete:
            self._inlet.stop()  # the source has given up on data connections
            self._inlet = None
        self._stop_waiting()
        self._stream += 1
        self._streaming = True
        if self.state is State.PENDING:
            self._move(Event.SEED)
        return self._stream

    def expect(self, connections: int) -> Inlet:
        """Make ready for data connections; `receive` takes each. FailedPrecondition."""
        self._check_open()
        if self._inlet is not None:
            self._inlet.stop()
        sizes = [volume.size_bytes for volume in self._plan.volumes]
        self._inlet = Inlet(
            self._devices, sizes, connections, self._generation + 1, self._witness.written
        )
        return self._inlet

    def receive(self, inlet: Inlet, connection: Connection, index: int) -> None:
        """Take a data connection; with the last one the stream begins."""
        if inlet is not self._inlet or inlet.is_complete:
            raise _not_open(self.id, self.state)
        self._check_open()
        inlet.add(connection, index)
        if inlet.is_complete:
            stream = self.begin_stream()
            inlet.run(
                lambda generation: self.flush(generation, stream),
                lambda error: self.end_stream(error, stream),
            )

    async def write(self, frame: memoryview, stream: int) -> int:
        """Write one frame of the open generation; returns its sequence number."""
        self._check_receiving(stream)
        self._writing += 1
        self._idle.clear()
        try:
            sequence = await self._writer.write(frame, self._generation + 1)
        except (ValueError, RuntimeError):  # the device, or the agent's threads, closed meanwhile
            self._check_receiving(stream)
            raise
        finally:
            self._writing -= 1
            if not self._writing:
                self._idle.set()
        progress = self._progress
        self._progress = replace(progress, sent_bytes=progress.sent_bytes + len(frame))
        return sequence

    async def flush(self, generation: int, stream: int) -> float:
        """Make a generation durable; returns seconds. Frames of it are refused from here on."""
        if generation != self._generation + 1:
            raise DataLoss(
                "WRONG_GENERATION",
                f"generation {generation} cannot follow {self._generation}; start a new migration",
                generation=generation,
            )
        self._check_receiving(stream)
        self._check_sizes()
        seconds = await self._writer.flush()
        self._check_receiving(stream)
        self._proof = None
        self._witness.note_durable()
        self._generation = generation
        self._progress = replace(self._progress, rounds=self._progress.rounds + 1)
        if self.state is State.SEEDING:
            self._machine.apply(Event.SYNC, time.time())
        # Before it is told: a target that forgets what it has acknowledged is worth nothing.
        # Here and not on a thread: an older state must not be written over a newer one.
        self.write_down()
        self.bell.ring()
        return seconds

    def end_stream(self, error: WarmsyncError | None, stream: int) -> None:
        """The stream is over: a cut, never an end. The source may come back; see `resume`."""
        if stream != self._stream or self.state not in (State.SEEDING, State.SYNCING):
            return
        lost = Unavailable(
            "SOURCE_LOST",
            "the stream from the source ended before the cutover; the source comes back by "
            "itself, or cancel the migration there",
        )
        self._stream += 1
        self._streaming = False
        self._trouble = error or lost
        passing = isinstance(self._trouble, Unavailable) or self._trouble.reason in _PASSING
        if not passing and self._trouble.reason not in _MENDABLE:
            self._fail(self._trouble)
            return
        self._wait_for_source(ORPHAN_SECONDS)
        _log.warning(
            'stream ended id=%s reason=%s message="%s"',
            self.id,
            self._trouble.reason,
            self._trouble,
        )
        self.bell.ring()

    @property
    def certificate(self) -> str:
        """What both have signed, once it is released; empty before."""
        return self._certificate

    async def prove(self, generation: int) -> tuple[Proof, ...]:
        """Return what was read back of each volume, all after this generation and no later one."""
        self._check_releasable(generation)
        if self._resizing:
            raise _not_proven(self.id)
        if self._proof is None:
            try:
                proof = await self._witness.prove()
            except OSError as error:
                raise io_error("target", error) from error
            except ValueError as error:  # the devices were closed meanwhile
                raise self._error or _not_open(self.id, self.state) from error
            self._check_releasable(generation)
            self._proof = proof
        return self._proof

    async def resize(self, generation: int) -> tuple[Resize, ...]:
        """Grow what is on the devices, as they were proved. May be repeated until the release.

        FailedPrecondition NOT_PROVEN, DataLoss GROW_NOT_UNDONE. Whatever comes of it, nothing is
        received any more before the source has come back; then it has to compare.
        """
        if self.state is State.CUT_OVER:
            return self._progress.resizes
        self._check_releasable(generation)
        if self._proof is None or self._writing or not self._witness.is_settled:
            raise _not_proven(self.id)
        if self._grown is None:
            self._grown = asyncio.ensure_future(self._grow())
            self._grown.add_done_callback(lambda done: done.cancelled() or done.exception())
        # It goes on if the caller hangs up.
        return await asyncio.shield(self._grown)

    async def _grow(self) -> tuple[Resize, ...]:
        async with self._resuming:
            epoch = self._epoch
            await self._cut_streams()
            self._wait_for_source(ORPHAN_SECONDS)
            self._resizing = True
            try:
                self.write_down()
            except ResourceExhausted:
                self._resizing = False
                raise
            await self._witness.stop()
            resizes = await asyncio.shield(self._growth.start(tuple(self._devices)))
            self._check_releasable(self._generation)
            if epoch != self._epoch:
                raise self._superseded()
            self._progress = replace(self._progress, resizes=resizes)
            self.write_down()
            self.bell.ring()
            return resizes

    def release(self, generation: int, statement: bytes, signature: Signature) -> Signature:
        """Hand over: the claim is dropped so that the VM can boot. May be repeated.

        `statement` is what the source has signed; returns this end's signature. FailedPrecondition
        NOT_PROVEN unless it says what was read back here, and nothing was written since.
        """
        if self.state is State.CUT_OVER:
            return signature_of(self._certificate.encode(), Role.TARGET)
        self._check_releasable(generation)
        if self._inlet is not None:
            # Its threads wait for the source: nothing is being written, so this takes no time.
            self._inlet.join()
        said = parse_statement(statement)
        self._check_statement(said)
        own = self._signer.sign(said, Role.TARGET)
        certificate = Certificate(said, (signature, own))
        verify(certificate, {})
        self._certificate = dump_certificate(certificate).decode()
        try:
            self._move(Event.CUT_OVER, Event.RELEASE)
        except ResourceExhausted:
            self._certificate = ""
            raise
        self._close()
        return own

    def _check_releasable(self, generation: int) -> None:
        if self.state is not State.SYNCING or generation != self._generation:
            raise FailedPrecondition(
                "NOT_RELEASABLE",
                f"migration {self.id} is {self.state} at generation {self._generation} here, "
                f"not at {generation}; cancel it and start a new one",
                id=self.id,
                generation=self._generation,
            )

    def _check_statement(self, said: Statement) -> None:
        """What this end signs is what it knows: its own bytes, read back after the last write."""
        volumes = zip(self._plan.volumes, said.volumes, self._proof or (), strict=False)
        full = self._plan.verify is Depth.FULL
        if (
            self._proof is None
            or self._writing
            or not self._witness.is_settled
            or (said.migration, said.generation) != (self.id, self._generation)
            or said.depth is not self._plan.verify
            or len(said.volumes) != len(self._plan.volumes)
            or not all(
                (one.target_path, one.size_bytes) == (volume.target, volume.size_bytes)
                and one.compared_bytes == proof.compared_bytes
                and one.target_root == (proof.root if full else None)
                for volume, one, proof in volumes
            )
        ):
            raise _not_proven(self.id)

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
        self._move(Event.CANCEL)

    async def boot(self, attempt: int) -> float:
        """Run this host's boot hook, once for each attempt; returns seconds. See `agent.peer`."""
        if attempt == 0:
            self._booting.check()
            return 0.0
        if self.state is not State.CUT_OVER:
            raise FailedPrecondition(
                "NOT_BOOTABLE",
                f"migration {self.id} is {self.state} here; only what was handed over is booted",
                id=self.id,
                state=self.state,
            )
        return await self._booting.run(attempt)

    def _write_boot(self, seconds: float | None) -> None:
        self._progress = replace(self._progress, boot_seconds=seconds)
        self.write_down()
        self.bell.ring()

    def check_reclaimable(self, allowed: tuple[str, ...]) -> None:
        """Raise FailedPrecondition unless the devices can be claimed again. Blocking."""
        if self.state is State.ROLLED_BACK:
            return
        if self.state is not State.CUT_OVER:
            raise FailedPrecondition(
                "NOT_RECLAIMABLE",
                f"migration {self.id} is {self.state} here; only a cut-over one can be taken back",
                id=self.id,
            )
        self._booting.check_idle()
        for device in open_devices(self._plan.volumes, allowed):
            device.close()

    def reclaim(self) -> None:
        """Note that the source is the owner again. May be repeated."""
        if self.state is not State.ROLLED_BACK:
            self._move(Event.ROLL_BACK)

    def finish(self) -> None:
        """Nothing will be reclaimed any more. May be repeated."""
        if self.state is not State.COMPLETED:
            self._move(Event.FINISH)

    async def digests(self, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        """Iterate (offset, chunk digests) over a volume, read from the device itself."""
        if volume >= len(self._plan.volumes):
            raise InvalidArgument("NO_SUCH_VOLUME", f"there is no volume {volume}", volume=volume)
        # PENDING may be asked: the source knows of its connections a moment before we do.
        if self.state in (State.FAILED, State.CANCELLED, State.ROLLED_BACK):
            raise FailedPrecondition(
                "NOT_COMPARABLE", f"the target is {self.state}; nothing to compare", id=self.id
            )
        if self._devices and not self.state.is_terminal:
            # What is found equal counts as durable from then on.
            await self._writer.flush()
        async for item in self._digests(volume):
            yield item

    @property
    def is_over(self) -> bool:
        """Whether nothing will be received any more."""
        return self.state.is_terminal or self.state is State.CUT_OVER

    def abandon(self) -> None:
        """Give up a session whose source is away: its agent may have lost its state for good.

        FailedPrecondition NOT_THE_SOURCE while the source is connected, and after the release.
        """
        if self.is_over or self._streaming:
            raise FailedPrecondition(
                "NOT_THE_SOURCE",
                f"this agent is the target of migration {self.id}, and its source is connected, or "
                "it has ended; ask the agent of its source",
                id=self.id,
            )
        self.abort("cancelled at the target", cancelled=True)

    def give_up(self, error: WarmsyncError) -> None:
        """End it with an error."""
        self._fail(error)

    def check(self) -> None:
        """Raise what ended the session, if anything has."""
        if self._error is not None:
            raise self._error
        if self._trouble is not None:
            raise self._trouble
        if self._resizing and not self.is_over:
            raise _not_open(self.id, self.state)

    def close(self) -> None:
        """The agent stops: what is written down goes on with its next start."""
        self._stream += 1
        self._close(keep=True)

    @property
    def unread(self) -> tuple[int, float]:
        """The bytes that a proof would have to read back now, and how many a second can be."""
        return self._witness.unread

    async def ended(self) -> None:
        """Wait until nothing is being written or read back any more, after `close`."""
        await self._booting.close()
        await self._witness.stop()
        if self._inlet is not None:
            await self._inlet.ended()

    async def _digests(self, volume: int) -> AsyncGenerator[tuple[int, bytes], None]:
        spec = self._plan.volumes[volume]
        device = await asyncio.get_running_loop().run_in_executor(
            self._threads, BlockDevice, spec.target
        )
        is_own = bool(self._devices) and device_key(device) == self._keys[volume]
        steps = (
            self._witness.digests(volume, device)
            if is_own and self._plan.verify is not Depth.NONE
            else read_digests(device, spec.size_bytes, self._pool, self._threads)
        )
        try:
            if self._devices and not is_own:
                raise _replaced(spec)
            async for step in steps:
                yield step
        except OSError as error:
            raise io_error("target", error) from error
        finally:
            await steps.aclose()
            device.close()

    def _check_open(self) -> None:
        open_states = (State.PENDING, State.SEEDING, State.SYNCING)
        is_shut = self._streaming or self._resizing or not self._devices
        if self.state not in open_states or is_shut:
            raise self._error or _not_open(self.id, self.state)

    def _check_receiving(self, stream: int) -> None:
        """Raise why this stream may not write any more, if so.

        The session was given up, and its devices may be somebody else's now; or its source has come
        back on another stream.
        """
        is_shut = self._resizing or stream != self._stream
        if self.state not in (State.SEEDING, State.SYNCING) or is_shut:
            raise self._error or self._trouble or _not_open(self.id, self.state)

    def _count_received(self, inlet: Inlet) -> None:
        received = self._progress.sent_bytes + inlet.received_bytes
        self._progress = replace(self._progress, sent_bytes=received)

    def _wait_for_source(self, seconds: float) -> None:
        self._stop_waiting()
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(seconds, self._give_up_waiting, seconds)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _check_sizes(self) -> None:
        for device, volume in zip(self._devices, self._plan.volumes, strict=True):
            if device.size_bytes() < volume.size_bytes:
                raise _too_small(volume, device.size_bytes())

    def _give_up_waiting(self, seconds: float) -> None:
        self._fail(
            Unavailable("SOURCE_LOST", f"the source sent nothing for {seconds:.0f} s; start anew")
        )

    def _fail(self, error: WarmsyncError) -> None:
        if self.state.is_terminal:
            return
        self._error = error
        self._close()
        try:
            self._move(Event.FAIL)
        except ResourceExhausted as full:  # it ends all the same
            self._machine.apply(Event.FAIL, time.time())
            _log.error('not written down id=%s reason="%s"', self.id, full)
        _log.error('target failed id=%s reason=%s message="%s"', self.id, error.reason, error)

    def _close(self, *, keep: bool = False) -> None:
        """Give the devices back; `keep` what was read back, for the next start."""
        self._stop_waiting()
        if self._inlet is not None:
            self._inlet.stop()
        devices, self._devices = self._devices, []  # no stream may begin any more
        self._growth.close(devices)
        if not keep:
            self._witness.close()
            self._writer = Writer([], [], self._threads, self._pool)

    def _move(self, *events: Event) -> None:
        """Move, and write it down: only then may it be told. Not written down, it is undone."""
        for event in events:
            self._machine.apply(event, time.time(), force=True)
        try:
            self.write_down()
        except ResourceExhausted:
            for _ in events:
                self._machine.retract()
            raise
        _log.info("target id=%s state=%s", self.id, self.state)
        self.bell.ring()


def new_session(request: SessionRequest) -> TargetRecord:
    """Return the record of a session that begins."""
    return TargetRecord(
        plan=Plan(request.migration_id, "", request.volumes, verify=request.verify),
        secret=secrets.token_urlsafe(24),
        epoch=1,
        history=(Entry(State.PENDING, time.time()),),
        generation=0,
        progress=Progress(total_bytes=sum(v.size_bytes for v in request.volumes)),
    )


def _not_proven(name: str) -> FailedPrecondition:
    return FailedPrecondition(
        "NOT_PROVEN",
        f"what the source says of migration {name} is not what was read back here; cut over again",
        id=name,
    )


def session_not_found() -> NotFound:
    """Return the error for a token that no session has."""
    return NotFound("SESSION_NOT_FOUND", "this agent has no such session; start a new migration")


def _not_open(name: str, state: State) -> FailedPrecondition:
    return FailedPrecondition(
        "SESSION_NOT_OPEN",
        f"the session of migration {name} is {state}; start a new migration",
        id=name,
    )


def open_targets(
    request: SessionRequest, allowed: tuple[str, ...], own_boot_id: str
) -> list[BlockDevice]:
    """Check and claim the target devices of a session, all or none. The domain's errors.

    Blocking. A source with this host's boot id shares the devices with it.
    """
    if request.boot_id == own_boot_id:
        for volume in request.volumes:
            _check_distinct(volume, request)
    return open_devices(request.volumes, allowed)


def open_devices(volumes: tuple[Volume, ...], allowed: tuple[str, ...]) -> list[BlockDevice]:
    """Claim the target devices of a session, all or none. The domain's errors; blocking."""
    devices: list[BlockDevice] = []
    try:
        for volume in volumes:
            device = open_device(volume.target, allowed, writable=True, exclusive=True)
            devices.append(device)
            if device.size_bytes() < volume.size_bytes:
                raise _too_small(volume, device.size_bytes())
    except BaseException:
        for device in devices:
            device.close()
        raise
    return devices


def claim(
    volumes: tuple[Volume, ...], allowed: tuple[str, ...], undoing: Growth | None
) -> list[BlockDevice]:
    """Claim devices as `open_devices`, and first undo a resize that the end of an agent cut off."""
    deadline = time.monotonic() + (_CLAIM_SECONDS if undoing else 0.0)
    while True:
        try:
            devices = open_devices(volumes, allowed)
            break
        except FailedPrecondition as error:
            # The programs of an agent that was killed hold the claim for as long as they die.
            if error.reason != "DEVICE_IN_USE" or time.monotonic() >= deadline:
                raise
            time.sleep(_CLAIM_RETRY_SECONDS)
    try:
        if undoing is not None:
            undoing.undo(devices)
    except BaseException:
        for device in devices:
            device.close()
        raise
    return devices


def _replaced(volume: Volume) -> FailedPrecondition:
    return FailedPrecondition(
        "TARGET_NOT_CLAIMED",
        f"{volume.target} is another device than the one that is being written; put that back, or "
        "resume to take this one",
        target=volume.target,
    )


def _check_distinct(volume: Volume, request: SessionRequest) -> None:
    try:
        own = identities(volume.target)
    except OSError:
        return  # opening it says what is wrong with it
    for source, known in zip(request.volumes, request.source_identities, strict=True):
        if any(one.overlaps(other) for one in own for other in known):
            raise _same_device(volume, source)


def _same_device(volume: Volume, source: Volume) -> InvalidArgument:
    return InvalidArgument(
        "SAME_DEVICE",
        f"target {volume.target} shares its bytes with source {source.source}; "
        "name a device that no source lies on",
        source=source.source,
        target=volume.target,
    )


def _too_small(volume: Volume, size_bytes: int) -> FailedPrecondition:
    return FailedPrecondition(
        "TARGET_TOO_SMALL",
        f"target {volume.target} has {size_bytes} bytes, source {volume.source} has "
        f"{volume.size_bytes}; name one at least as large",
        target=volume.target,
        size_bytes=size_bytes,
        needed_bytes=volume.size_bytes,
    )
