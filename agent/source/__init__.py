"""The source's end: drives one migration from the first take to the cutover.

Owns the task that does it and the controller's commands. What it is made of is in this package:
`books`, `link`, `course`, `handover`, `patience`, `ending`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace

from agent.disk import SourceDisk
from agent.errors import Cancelled, FailedPrecondition, Unavailable, WarmsyncError
from agent.hook import values_of
from agent.journal import NOT_KEPT, Journal
from agent.migration import (
    Comparison,
    Migration,
    Mode,
    Owner,
    Plan,
    Step,
    check_budget,
    check_limit,
)
from agent.record import SourceRecord
from agent.rounds import Convergence
from agent.sender import Sender, Workshop
from agent.source.autopilot import FLYING, Autopilot
from agent.source.books import Books
from agent.source.comparisons import Comparisons
from agent.source.course import Course
from agent.source.cutover import unknown_owner
from agent.source.doubts import Doubts
from agent.source.ending import Ending
from agent.source.guest import Guest
from agent.source.handover import Handover
from agent.source.link import Link
from agent.source.patience import Patience
from agent.source.prepared import Prepared
from agent.source.proof import SourceProof
from agent.source.settling import Settling
from agent.source.stall import StallWatch
from agent.source.verify import compare_ends
from agent.state import Event, State

_log = logging.getLogger(__name__)

CANCEL_SECONDS = 20.0
"""How long a cancellation is waited for; that a silent target is told of it takes half of that."""
RECONVERGE_SECONDS = 10.0
"""How long a cutover waits for a migration that was converged before."""


class SourceMigration:
    """One migration, seen from its source."""

    def __init__(self, prepared: Prepared, workshop: Workshop, journal: Journal) -> None:
        given, record = prepared.plan, prepared.restored
        plan = replace(given, volumes=tuple(disk.volume for disk in prepared.disks))
        self._prepared = prepared
        self._workshop = workshop
        self._sender = sender = Sender(prepared.disks, workshop, plan.limit_bytes_per_second)
        self.bell = sender.bell
        self._convergence = convergence = Convergence(
            plan.max_downtime_seconds, limit_bytes_per_second=plan.limit_bytes_per_second or None
        )
        proof = SourceProof(plan, sender, workshop)
        self._guest = guest = Guest(prepared.brake, plan, sender.note)
        self._autopilot = pilot = self._make_autopilot(plan, record)
        self._books = books = Books(prepared, plan, journal, sender, pilot)
        peer, raised = prepared.peer, plan.reuse_target or bool(prepared.suspect)
        doubts = Doubts(books, sender, workshop, peer, proof, raised=raised)
        self._handover = handover = Handover(
            prepared,
            books,
            sender,
            convergence=convergence,
            proof=proof,
            doubts=doubts,
            guest=guest,
        )
        self._link = Link(prepared, books, sender, doubts, handover)
        self._course = Course(
            books,
            sender,
            convergence=convergence,
            doubts=doubts,
            proof=proof,
            guest=guest,
            handover=handover,
            peer=peer,
        )
        self._comparisons = Comparisons()
        self._patience = Patience(books, sender, handover, peer.address)
        self._ending = Ending(
            books,
            sender,
            proof=proof,
            guest=guest,
            autopilot=pilot,
            handover=handover,
            comparisons=self._comparisons,
            peer=peer,
        )
        self._settling = Settling(books, handover, self._ending, peer)
        self._stalls = StallWatch(sender)
        self._task: asyncio.Task[None] | None = None
        self._is_stopped = False
        self._stopping: WarmsyncError | None = None
        """Why nothing may be begun any more that needs the disks: the agent stops."""
        self._cancelling: asyncio.Task[None] | None = None
        if record is not None:
            self._restore(record)

    def _make_autopilot(self, plan: Plan, record: SourceRecord | None) -> Autopilot:
        by_itself = plan.cold or plan.mode is Mode.AUTO
        return Autopilot(
            self,
            lambda: self._books.plan,
            self._prepared.quiesce,
            lambda: values_of(self.id, [volume.source for volume in plan.volumes], peer=plan.peer),
            step=record.step if record else Step.WAITING if by_itself else Step.NONE,
            attempt=record.attempt if record else 0,
            stopped=record.stopped if record else None,
            off_at_seconds=record.off_at_seconds if record else None,
            boot_id=self._prepared.request.boot_id,
            step_boot_id=record.step_boot_id or record.boot_id if record else "",
        )

    def _restore(self, record: SourceRecord) -> None:
        """Go on where the agent before this one was."""
        self._books.restore(record)
        if record.opening is not None:
            self._course.learn(record.opening)
        if self.state is State.PAUSED:
            self._sender.pause()
        if record.releasing:
            self._handover.remember_release()
            if self.state is State.CUTTING_OVER:
                self._books.refusal = unknown_owner(self._prepared.peer.address)

    def record(self) -> SourceRecord:
        """Return what is written down of it."""
        return self._books.record()

    @property
    def certificate(self) -> str:
        """What both ends have signed at the cutover; empty before."""
        return self._books.certificate

    def write_down(self, counted: Mapping[str, float] | None = None) -> None:
        """Make what is known of it durable, `counted` in the totals with it. `journal.NOT_KEPT`."""
        self._books.write_down(counted)

    @property
    def disks(self) -> list[SourceDisk]:
        """Its volumes."""
        return self._sender.disks

    @property
    def id(self) -> str:
        """The migration's id."""
        return self._books.id

    @property
    def state(self) -> State:
        """The present state."""
        return self._books.state

    def snapshot(self) -> Migration:
        """Return what is known now."""
        return self._books.snapshot()

    @property
    def owner(self) -> Owner:
        """Who may write to the disks."""
        return self._books.owner

    def start(self) -> None:
        """Begin with round 0, or go on."""
        self._task = asyncio.create_task(self._run(), name=f"migration {self.id}")
        self._autopilot.start()

    def check_mode(self, mode: Mode) -> None:
        """Raise FailedPrecondition if a cutover cannot be of this mode (any more)."""
        self._books.check_changeable()
        if mode is Mode.MANUAL:
            self._autopilot.check_landed()
        elif self.state is not State.CUT_OVER and not self._books.plan.cold:
            self._prepared.quiesce.hook.check()

    async def set_mode(self, mode: Mode) -> None:
        """Leave the cutover to the agents, once more after a stop, or to the controller."""
        self.check_mode(mode)
        if mode is Mode.AUTO:
            await self._prepared.peer.boot(self._books.token, 0)
        async with self._handover.commands:  # nothing is armed beside a rollback
            self.check_mode(mode)
            books, before = self._books, self._books.plan
            books.plan = replace(books.plan, mode=mode)
            try:
                await (self._autopilot.arm() if mode is Mode.AUTO else self._autopilot.disarm())
            except NOT_KEPT:
                books.plan = before
                raise
        self._course.stir()

    async def hand_over(self, asked_seconds: float) -> None:
        """See `agent.source.autopilot.Vessel`."""
        await self._begin_cutover(asked_seconds, force=True)

    async def boot(self, attempt: int) -> float:
        """See `agent.source.autopilot.Vessel`."""
        return await self._prepared.peer.boot(self._books.token, attempt)

    def note_hook(self, **seconds: float) -> None:
        """See `agent.source.autopilot.Vessel`."""
        self._sender.note(**seconds)

    def refuse(self, error: WarmsyncError | None) -> None:
        """See `agent.source.autopilot.Vessel`."""
        self._books.refusal = error
        self.bell.ring()

    def update(
        self, limit_bytes_per_second: int | None, max_downtime_seconds: float | None
    ) -> None:
        """Change the bandwidth limit or the budget (None: leave it) while running."""
        books = self._books
        books.check_changeable(State.CUT_OVER)
        check_limit(limit_bytes_per_second or 0)
        if max_downtime_seconds is not None:
            check_budget(max_downtime_seconds)
            books.plan = replace(books.plan, max_downtime_seconds=max_downtime_seconds)
            self._convergence.change_budget(max_downtime_seconds)
        if limit_bytes_per_second is not None:
            books.plan = replace(books.plan, limit_bytes_per_second=limit_bytes_per_second)
            self._sender.limit(limit_bytes_per_second)
            self._convergence.change_limit(limit_bytes_per_second or None)
        books.write_down()
        self._course.stir()

    def pause(self) -> None:
        """Stop reading and sending; tracking goes on."""
        if self._autopilot.step in FLYING:
            self._autopilot.check_landed()
        self._books.move(Event.PAUSE)
        self._books.refusal = None  # a pause with a reason is one of our own
        self._sender.pause()
        self._guest.let_go()
        self._course.stir()

    def resume(self) -> None:
        """Go on where the pause began."""
        self._books.move(Event.RESUME)
        self._convergence.restart()
        self._sender.resume()
        self._course.stir()

    @property
    def is_giving_up(self) -> bool:
        """Whether it has ended, and still holds what it had: nobody else may have that yet."""
        return self.state.is_terminal and not self._ending.over.is_set()

    async def given_back(self) -> None:
        """Return once it holds nothing any more. Unavailable SOURCE_STALLED if that takes long."""
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                await self._ending.over.wait()
        except TimeoutError:
            raise self._stalled() from None

    async def cancel(self) -> None:
        """Stop; the source stays as it is, the target is released and marked incomplete.

        Unavailable SOURCE_STALLED if that takes long; it goes on, and may be asked for again.
        """
        cancelling = self._cancelling
        if cancelling is None or cancelling.done():
            cancelling = self._begin_cancel()
        await asyncio.wait([cancelling], timeout=CANCEL_SECONDS)
        if not cancelling.done():
            raise self._stalled()
        cancelling.result()

    def _check_staying(self) -> None:
        if self._stopping is not None:
            raise self._stopping

    def _begin_cancel(self) -> asyncio.Task[None]:
        self._check_staying()
        if self._books.is_releasing and self.state is State.CUTTING_OVER:
            mend = (
                "roll it back afterwards"
                if self._books.wants_cutover
                else "the target does not answer: wait for it, or settle who owns (warmsync settle)"
            )
            raise FailedPrecondition(
                "TOO_LATE", f"migration {self.id} is being handed over; {mend}", id=self.id
            )
        self._books.move(Event.CANCEL)
        self._cancel_task()  # at once: a turn later it may have asked for the release
        self._cancelling = asyncio.create_task(self._give_up(), name=f"cancel {self.id}")
        return self._cancelling

    async def _give_up(self) -> None:
        await self._stop_task()
        await self._ending.cancel()

    def _stalled(self) -> Unavailable:
        """Return the error of an end that takes long to give back what it had."""
        every = [(disk.volume.source, disk.requests()) for disk in self.disks]
        busy = [path for path, asked in every if asked is not None and asked.in_flight]
        paths = ", ".join(busy or [path for path, _ in every])
        return Unavailable(
            "SOURCE_STALLED",
            f"migration {self.id} is {self.state}, but holds what it had until its target was told "
            f"and source {paths} has answered what was asked of it before; wait a moment, then "
            "check the disk and the kernel log",
            id=self.id,
            path=paths,
        )

    async def cut_over(self, *, force: bool) -> None:
        """Return once the target is durable and released. NOT_QUIESCED, and what can go wrong."""
        asked = time.monotonic()
        if self._autopilot.step in FLYING:
            self._autopilot.check_landed()
        if not force:
            await self._reconverge()
        self._books.require(Event.CUT_OVER, force=force)
        await self._autopilot.disarm()
        await self._begin_cutover(asked, force=force)

    async def _begin_cutover(self, asked: float, *, force: bool) -> None:
        self._check_staying()
        cutover = self._handover.begin(asked, force=force)
        self._comparisons.give_way(
            Cancelled("VERIFY_INTERRUPTED", "the comparison gave way to a cutover; run it again")
        )
        self._course.stir()
        # It goes on if the caller hangs up.
        await asyncio.shield(cutover.done)

    async def _reconverge(self) -> None:
        """Give what was converged before a moment to be so again.

        Between the message *converged* and the power-down the guest may write faster for a while;
        once it is off, two looks are enough. One that runs on is refused all the same.
        """
        if not self._books.has_been(State.CONVERGED):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(RECONVERGE_SECONDS):
                while self.state is State.SYNCING:
                    await self.bell.wait(self.bell.count)

    async def roll_back(self) -> None:
        """Take the target back, then lift the fence: the source is the owner again."""
        self._check_staying()
        await self._ending.roll_back()

    async def finish(self) -> None:
        """The VM runs on the target: nothing can be rolled back. The source stays fenced."""
        self._check_staying()
        await self._ending.finish()

    async def settle(self, owner: Owner) -> None:
        """End it as a person says who owns. See `agent.source.settling`."""
        await self._settling.settle(owner, self._stop_task, self._check_staying)

    async def verify(self) -> AsyncGenerator[Comparison, None]:
        """Compare both ends between two rounds; iterates the progress, the last item is done."""
        self._check_comparable()
        async with aclosing(self._comparisons.follow(self._compare())) as newest:
            async for comparison in newest:
                yield comparison

    async def _compare(self) -> AsyncGenerator[Comparison, None]:
        async with self._course.at_rest:
            self._check_comparable()
            peer, token = self._prepared.peer, self._books.token
            settled = self.state is State.CUT_OVER
            comparisons = compare_ends(self._sender, self._workshop, peer, token, settled=settled)
            async for comparison in comparisons:
                yield comparison

    async def close(self, error: WarmsyncError) -> None:
        """The agent stops: tracking goes on, and so does the migration with its next start."""
        self._stopping = error
        if not self.state.is_terminal:
            await self._autopilot.close()
            if not self.state.is_terminal:
                await self._stop_task()
        if self.state.is_terminal:  # with the threads and the connection that it still needs
            await self._ending.over.wait()
        else:
            await self._ending.suspend(error)

    async def _run(self) -> None:
        self._stalls.start()
        try:
            while self.state is not State.CUT_OVER:
                try:
                    await self._link.connect()
                    self._patience.note_connected()
                    await self._course.run()
                except WarmsyncError as error:
                    await self._patience.withstand(error)
        except WarmsyncError as error:
            await self._ending.fail(error)
        except Exception as error:
            _log.exception("migration failed id=%s", self.id)
            name = type(error).__name__
            await self._ending.fail(
                WarmsyncError("INTERNAL", f"internal error ({name}: {error}); see the agent's log")
            )
        finally:
            self._stalls.stop()

    async def _stop_task(self) -> None:
        for disk in self._sender.disks:
            disk.tracker.interrupt()
        self._cancel_task()
        if self._task is not None:
            await asyncio.wait([self._task])

    def _cancel_task(self) -> None:
        """Once: a second time it would break off what the first one lets come to its end."""
        if self._task is not None and not self._is_stopped:
            self._is_stopped = True  # `cancelling()` is also true while a timeout of its own falls
            self._task.cancel()

    def _check_comparable(self) -> None:
        self._check_staying()
        if self.state not in (State.SYNCING, State.CONVERGED, State.CUT_OVER):
            raise FailedPrecondition(
                "NOT_COMPARABLE",
                f"migration {self.id} is {self.state}; it can be verified while it is "
                "SYNCING, CONVERGED or CUT_OVER",
                state=self.state,
            )
        changed = any(one.is_changed for one in self._sender.progress.resizes)
        if self.state is State.CUT_OVER and changed:
            raise FailedPrecondition(
                "TARGET_RESIZED",
                f"the target of migration {self.id} was resized after it was proved equal, so it "
                "is not equal any more; see its certificate",
                id=self.id,
            )
