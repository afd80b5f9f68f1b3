"""What one session receives: its streams, one after another, and the rounds that they bring.

Owns which stream may write, and how long a source that is away is waited for. A stream that ends is
a cut, never an end. A round is acknowledged once it is durable (rule 4), and in its turn only.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from agent.counters import busy
from agent.device import io_error
from agent.errors import DataLoss, Unavailable, WarmsyncError
from agent.journal import NOT_KEPT
from agent.migration import Owner
from agent.state import Event, State
from agent.target.holding import Holding
from agent.target.inlet import Inlet
from agent.target.ledger import Ledger
from native.stream import Connection

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

OPENING_SECONDS = 60.0
"""A session whose source does not begin to send within this time is given up."""
ORPHAN_SECONDS = 24 * 3600.0
"""One whose source does not come back within this time as well."""
DRAIN_SECONDS = 20.0
"""What a disk may take to end what it has begun. The source waits 30 s for the answer."""

_PASSING = frozenset({"BAD_FRAME", "FRAMES_MISSING", "WRONG_GENERATION"})
"""Damage on the way: the round is not acknowledged, and comes again over new connections."""
_MENDABLE = frozenset({"TARGET_IO_ERROR", "DISK_FULL", "STATE_NOT_KEPT"})
"""The disk here: the source pauses, and goes on when it is resumed."""


class Intake:
    """One session's. `fail` ends it."""

    def __init__(
        self, ledger: Ledger, holding: Holding, fail: Callable[[WarmsyncError], None]
    ) -> None:
        self._ledger = ledger
        self._holding = holding
        self._fail = fail
        self.trouble: WarmsyncError | None = None
        """Why the last stream ended, until the source has come back."""
        self._inlet: Inlet | None = None
        # Streams of the grpc carrier are counted: what is left of an older one writes nothing.
        self.stream = 0
        self.streaming = False
        self._draining = False
        self._writing = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a frame of the grpc carrier is being written, or a flush under way."""
        return self._writing > 0

    @property
    def received_bytes(self) -> int:
        """Bytes of frames that are not in the progress yet."""
        return 0 if self._inlet is None else self._inlet.received_bytes

    def begin_stream(self) -> int:
        """The source starts to send; returns the stream's number. FailedPrecondition."""
        self._check_open()
        if self._inlet is not None and not self._inlet.is_complete:
            self._inlet.stop()  # the source has given up on data connections
            self._inlet = None
        if self._ledger.state is State.PENDING:
            try:
                self._ledger.move(Event.SEED)  # first: what is not written down has not begun
            except NOT_KEPT:
                self.wait_for_source()  # which pauses for a person who mends it
                raise
        self._stop_waiting()
        self.stream += 1
        self.streaming = True
        return self.stream

    def expect(self, connections: int) -> Inlet:
        """Make ready for data connections; `receive` takes each. FailedPrecondition."""
        self._check_open()
        self.stop()
        holding = self._holding
        self._inlet = Inlet(
            holding.devices,
            holding.sizes,
            connections,
            self._ledger.generation + 1,
            holding.witness.written,
        )
        return self._inlet

    def receive(self, inlet: Inlet, connection: Connection, index: int) -> None:
        """Take a data connection; with the last one the stream begins."""
        if inlet is not self._inlet or inlet.is_complete:
            raise self._ledger.not_open()
        self._check_open()
        inlet.add(connection, index)
        if inlet.is_complete:
            stream = self.stream + 1
            # First: from here on its own thread waits for its disks, whatever comes of the rest.
            inlet.run(
                lambda generation: self.flush(generation, stream),
                lambda error: self.end_stream(error, stream),
            )
            try:
                self.begin_stream()
            except WarmsyncError as error:
                self.trouble = error  # its source asks why it is cut
                inlet.stop()
                raise

    async def write(self, frame: memoryview, stream: int) -> int:
        """Write one frame of the open generation; returns its sequence number."""
        self._check_receiving(stream)
        try:
            sequence = await self._count_in(
                self._holding.writer.write(frame, self._ledger.generation + 1)
            )
        except (ValueError, RuntimeError):  # the device, or the agent's threads, closed meanwhile
            self._check_receiving(stream)
            raise
        self._count(len(frame))
        return sequence

    async def flush(self, generation: int, stream: int) -> float:
        """Make a generation durable; returns seconds. Frames of it are refused from here on."""
        if generation != self._ledger.generation + 1:
            raise DataLoss(
                "WRONG_GENERATION",
                f"generation {generation} cannot follow {self._ledger.generation}; "
                "start a new migration",
                generation=generation,
            )
        self._check_receiving(stream)
        try:
            self._holding.check_sizes()
            seconds = await self._count_in(self._holding.writer.flush())
        except OSError as error:
            raise io_error("target", error) from error
        except (ValueError, RuntimeError):  # as in `write`
            self._check_receiving(stream)
            raise
        self._check_receiving(stream)
        self._holding.note_durable()
        self._ledger.acknowledge(generation)
        return seconds

    def end_stream(self, error: WarmsyncError | None, stream: int) -> None:
        """The stream is over: a cut, never an end. The source may come back."""
        if stream != self.stream or self._ledger.state not in (State.SEEDING, State.SYNCING):
            return
        lost = Unavailable(
            "SOURCE_LOST",
            "the stream from the source ended before the cutover; the source comes back by "
            "itself, or cancel the migration there",
        )
        self.disown()
        self.streaming = False
        self.trouble = error or lost
        passing = isinstance(self.trouble, Unavailable) or self.trouble.reason in _PASSING
        if not passing and self.trouble.reason not in _MENDABLE:
            self._fail(self.trouble)
            return
        self.wait_for_source()
        _log.warning(
            'stream ended id=%s reason=%s message="%s"',
            self._ledger.id,
            self.trouble.reason,
            self.trouble,
        )
        self._ledger.bell.ring()

    async def cut_streams(self) -> None:
        """End what is received and read back, and wait until nothing of it is under way any more.

        DataLoss TARGET_IO_ERROR for a disk that does not answer: what it has begun may still be
        written one day. Until a later call has seen the end of it, no stream may begin, and
        nothing is acknowledged or claimed anew.
        """
        self.disown()
        self.wait_for_source()
        self.streaming = False
        self._draining = True
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._drain()
        except TimeoutError:
            self.trouble = self._stalled()
            raise self.trouble from None
        self._draining = False

    async def _drain(self) -> None:
        if self._inlet is not None:
            await self._inlet.ended()
            self._count(self._inlet.received_bytes)
            self._inlet = None
        await self._idle.wait()
        await self._holding.witness.stop()

    def _stalled(self) -> WarmsyncError:
        paths = ", ".join(busy(self._holding.devices))
        silence = f"no answer for {DRAIN_SECONDS:.0f} s"
        error = io_error("target", OSError(errno.ETIMEDOUT, silence, paths))
        error.values["owner"] = Owner.SOURCE  # what is received into was not released
        return error

    async def _count_in(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Await what a device does. It goes on, and counts, where who asked for it has gone."""
        self._writing += 1
        self._idle.clear()
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._count_out)
        return await asyncio.shield(task)

    def _count_out(self, task: asyncio.Task[Any]) -> None:
        _ = task.cancelled() or task.exception()  # seen, if nobody waits any more
        self._writing -= 1
        if not self._writing:
            self._idle.set()

    def disown(self) -> None:
        """Whatever an open stream has yet to say changes nothing."""
        self.stream += 1

    def stop(self) -> None:
        """Cut the data connections: the source notices at once."""
        if self._inlet is not None:
            self._inlet.stop()

    def join(self) -> None:
        """Wait for the threads of the data connections."""
        if self._inlet is not None:
            # They wait for the source: nothing is being written, so this takes no time.
            self._inlet.join()

    async def ended(self) -> None:
        """Wait until nothing that came is being written any more, after `close`."""
        if self._inlet is not None:
            await self._inlet.ended()
        await self._idle.wait()

    def close(self) -> None:
        """Wait for nobody, and cut the data connections."""
        self._stop_waiting()
        self.stop()

    def wait_for_source(self, seconds: float = ORPHAN_SECONDS) -> None:
        """Give the session up if its source does not begin to send within this time."""
        self._stop_waiting()
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(seconds, self._give_up_waiting, seconds)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _give_up_waiting(self, seconds: float) -> None:
        self._fail(
            Unavailable("SOURCE_LOST", f"the source sent nothing for {seconds:.0f} s; start anew")
        )

    def _count(self, received_bytes: int) -> None:
        self._ledger.note(sent_bytes=self._ledger.progress.sent_bytes + received_bytes)

    def _check_open(self) -> None:
        open_states = (State.PENDING, State.SEEDING, State.SYNCING)
        is_shut = self.streaming or self._draining or self._ledger.resizing
        if self._ledger.state not in open_states or is_shut or not self._holding.devices:
            raise self._ledger.shut()

    def _check_receiving(self, stream: int) -> None:
        """Raise why this stream may not write any more, if so.

        The session was given up, and its devices may be somebody else's now; or its source has come
        back on another stream.
        """
        is_shut = self._ledger.resizing or stream != self.stream
        if self._ledger.state not in (State.SEEDING, State.SYNCING) or is_shut:
            raise self._ledger.error or self.trouble or self._ledger.not_open()
