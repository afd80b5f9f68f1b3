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
from concurrent.futures import Executor
from dataclasses import replace

from agent.bell import Bell
from agent.device import identities, io_error, open_device
from agent.errors import DataLoss, FailedPrecondition, InvalidArgument, Unavailable, WarmsyncError
from agent.inlet import Inlet
from agent.migration import Event as Entered
from agent.migration import Migration, Plan, Progress, Role, Volume
from agent.peer import SessionRequest
from agent.reader import read_digests
from agent.state import Event, Machine, State
from agent.writer import Writer
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.stream import Connection

_log = logging.getLogger(__name__)

_OPENING_SECONDS = 60.0
"""A session whose source does not begin to send within this time is given up."""


class TargetSession:
    """Receives frames, makes rounds durable, and hands the devices over or gives them up."""

    def __init__(
        self,
        request: SessionRequest,
        devices: list[BlockDevice],
        threads: Executor,
        pool: BufferPool,
    ) -> None:
        self.token = secrets.token_urlsafe(24)
        self.bell = Bell()
        self._plan = Plan(request.migration_id, "", request.volumes)
        self._devices = devices
        self._threads = threads
        self._pool = pool
        self._writer = self._make_writer()
        self._machine = Machine(time.time())
        self._generation = 0
        self._progress = Progress(total_bytes=sum(v.size_bytes for v in request.volumes))
        self._error: WarmsyncError | None = None
        self._streaming = False
        self._inlet: Inlet | None = None
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(_OPENING_SECONDS, self._give_up_waiting)

    @property
    def id(self) -> str:
        """The migration's id."""
        return self._plan.id

    @property
    def state(self) -> State:
        """The present state."""
        return self._machine.state

    def snapshot(self) -> Migration:
        """Return what is known now."""
        released = (State.CUT_OVER, State.COMPLETED)
        progress = self._progress
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
            incomplete=self.state not in released,
        )

    def begin_stream(self) -> None:
        """The source starts to send. FailedPrecondition if it has done so before."""
        if self.state is not State.PENDING:
            raise _not_open(self.id, self.state)
        if self._inlet is not None and not self._inlet.is_complete:
            self._inlet.stop()  # the source has given up on data connections
            self._inlet = None
        self._deadline.cancel()
        self._streaming = True
        self._move(Event.SEED)

    def expect(self, connections: int) -> Inlet:
        """Make ready for data connections; `receive` takes each. FailedPrecondition."""
        if self.state is not State.PENDING:
            raise _not_open(self.id, self.state)
        if self._inlet is not None:
            self._inlet.stop()
        sizes = [volume.size_bytes for volume in self._plan.volumes]
        self._inlet = Inlet(self._devices, sizes, connections)
        return self._inlet

    def receive(self, inlet: Inlet, connection: Connection, index: int) -> None:
        """Take a data connection; with the last one the stream begins."""
        if inlet is not self._inlet or self.state is not State.PENDING:
            raise _not_open(self.id, self.state)
        inlet.add(connection, index)
        if inlet.is_complete:
            self.begin_stream()
            inlet.run(self.flush, self.end_stream)

    async def write(self, frame: memoryview) -> int:
        """Write one frame of the open generation; returns its sequence number."""
        self._check_receiving()
        try:
            sequence = await self._writer.write(frame, self._generation + 1)
        except (ValueError, RuntimeError):  # the device, or the agent's threads, closed meanwhile
            self._check_receiving()
            raise
        progress = self._progress
        self._progress = replace(progress, sent_bytes=progress.sent_bytes + len(frame))
        return sequence

    async def flush(self, generation: int) -> float:
        """Make a generation durable; returns seconds. Frames of it are refused from here on."""
        if generation != self._generation + 1:
            raise DataLoss(
                "WRONG_GENERATION",
                f"generation {generation} cannot follow {self._generation}; start a new migration",
                generation=generation,
            )
        self._check_receiving()
        self._check_sizes()
        seconds = await self._writer.flush()
        self._generation = generation
        self._progress = replace(self._progress, rounds=self._progress.rounds + 1)
        if self.state is State.SEEDING:
            self._move(Event.SYNC)
        self.bell.ring()
        return seconds

    def end_stream(self, error: WarmsyncError | None) -> None:
        """The stream is over. Unless the session is, that is a failure: a cut, never an end."""
        self._streaming = False
        if self.state in (State.SEEDING, State.SYNCING):
            lost = Unavailable(
                "SOURCE_LOST",
                "the stream from the source ended before the cutover; start a new migration",
            )
            self._fail(error or lost)

    def release(self, generation: int) -> None:
        """Hand over: the claim is dropped so that the VM can boot. May be repeated."""
        if self.state is State.CUT_OVER:
            return
        if self.state is not State.SYNCING or generation != self._generation:
            raise FailedPrecondition(
                "NOT_RELEASABLE",
                f"migration {self.id} is {self.state} at generation {self._generation} here, "
                f"not at {generation}; cancel it and start a new one",
                id=self.id,
                generation=self._generation,
            )
        if self._inlet is not None:
            # Its threads wait for the source: nothing is being written, so this takes no time.
            self._inlet.join()
        self._close()
        self._move(Event.CUT_OVER)
        self._move(Event.RELEASE)

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
        for device in _open_targets(self._plan.volumes, allowed):
            device.close()

    def reclaim(self) -> None:
        """Note that the source is the owner again. May be repeated."""
        if self.state is not State.ROLLED_BACK:
            self._move(Event.ROLL_BACK)

    def finish(self) -> None:
        """Nothing will be reclaimed any more. May be repeated."""
        if self.state is not State.COMPLETED:
            self._machine.apply(Event.FINISH, time.time())
            self.bell.ring()

    async def digests(self, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        """Iterate (offset, chunk digests) over a volume, read from the device itself."""
        if volume >= len(self._plan.volumes):
            raise InvalidArgument("NO_SUCH_VOLUME", f"there is no volume {volume}", volume=volume)
        if self.state not in (State.SYNCING, State.CUT_OVER, State.COMPLETED):
            raise FailedPrecondition(
                "NOT_COMPARABLE", f"the target is {self.state}; nothing to compare", id=self.id
            )
        async for item in self._digests(volume):
            yield item

    def check(self) -> None:
        """Raise what ended the session, if anything has."""
        if self._error is not None:
            raise self._error

    def close(self, error: WarmsyncError) -> None:
        """The agent stops: a session that is not handed over is given up."""
        if not self.state.is_terminal and self.state is not State.CUT_OVER:
            self._fail(error)

    async def ended(self) -> None:
        """Wait until nothing is being written any more, after `close`."""
        if self._inlet is not None:
            await self._inlet.ended()

    async def _digests(self, volume: int) -> AsyncGenerator[tuple[int, bytes], None]:
        spec = self._plan.volumes[volume]
        device = await asyncio.get_running_loop().run_in_executor(
            self._threads, BlockDevice, spec.target
        )
        steps = read_digests(device, spec.size_bytes, self._pool, self._threads)
        try:
            async for step in steps:
                yield step
        except OSError as error:
            raise io_error("target", error) from error
        finally:
            await steps.aclose()
            device.close()

    def _make_writer(self) -> Writer:
        sizes = [volume.size_bytes for volume in self._plan.volumes]
        return Writer(self._devices, sizes, self._threads, self._pool)

    def _check_receiving(self) -> None:
        """Raise why the session was given up, if it was: its devices may be somebody else's now."""
        if self.state not in (State.SEEDING, State.SYNCING):
            raise self._error or _not_open(self.id, self.state)

    def _check_sizes(self) -> None:
        for device, volume in zip(self._devices, self._plan.volumes, strict=True):
            if device.size_bytes() < volume.size_bytes:
                raise _too_small(volume, device.size_bytes())

    def _give_up_waiting(self) -> None:
        self._fail(
            Unavailable(
                "SOURCE_LOST",
                f"the source sent nothing within {_OPENING_SECONDS:.0f} s; start anew",
            )
        )

    def _fail(self, error: WarmsyncError) -> None:
        if self.state.is_terminal:
            return
        self._error = error
        self._close()
        self._move(Event.FAIL)
        _log.error('target failed id=%s reason=%s message="%s"', self.id, error.reason, error)

    def _close(self) -> None:
        self._deadline.cancel()
        if self._inlet is not None:
            self._inlet.stop()
        for device in self._devices:
            device.close()

    def _move(self, event: Event) -> None:
        state = self._machine.apply(event, time.time(), force=True)
        _log.info("target id=%s state=%s", self.id, state)
        self.bell.ring()


def _not_open(name: str, state: State) -> FailedPrecondition:
    return FailedPrecondition(
        "SESSION_NOT_OPEN",
        f"the session of migration {name} is {state}; start a new migration",
        id=name,
    )


def open_targets(
    request: SessionRequest, allowed: tuple[str, ...], boot_id: str
) -> list[BlockDevice]:
    """Check and claim the target devices of a session, all or none. The domain's errors.

    Blocking. `boot_id` is this host's: if the source's is the same, both share the devices.
    """
    if request.boot_id == boot_id:
        for volume in request.volumes:
            _check_distinct(volume, request)
    return _open_targets(request.volumes, allowed)


def _open_targets(volumes: tuple[Volume, ...], allowed: tuple[str, ...]) -> list[BlockDevice]:
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
