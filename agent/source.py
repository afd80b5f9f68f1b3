"""The source's end: drives one migration from the first take to the cutover.

Owns the state machine, the loop of rounds and the controller's commands. What a round does is
`agent.sender`, what the cutover does `agent.cutover`, whether it has converged `agent.rounds`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace

from agent.brake import Brake
from agent.cutover import Cutover, unknown_owner
from agent.disk import SourceDisk
from agent.errors import Cancelled, FailedPrecondition, WarmsyncError
from agent.guest import Guest
from agent.migration import (
    Comparison,
    Migration,
    Plan,
    Role,
    Scheme,
    check_budget,
    check_limit,
)
from agent.migration import Event as Entered
from agent.peer import Peer
from agent.rounds import Convergence, Verdict
from agent.sender import Sender, Workshop
from agent.state import Event, Machine, State
from agent.verify import compare_ends

_log = logging.getLogger(__name__)

_ABORT_SECONDS = 10.0
RECONVERGE_SECONDS = 10.0
"""How long a cutover waits for a migration that was converged before."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A migration that was found possible on both hosts: tracked here, claimed there."""

    plan: Plan
    scheme: Scheme
    scheme_reason: str
    disks: list[SourceDisk]
    peer: Peer
    token: str
    brake: Brake | None = None


class SourceMigration:
    """One migration, seen from its source."""

    def __init__(self, prepared: Prepared, workshop: Workshop) -> None:
        plan = prepared.plan
        self._prepared = prepared
        self._plan = replace(plan, volumes=tuple(disk.volume for disk in prepared.disks))
        self._workshop = workshop
        self._machine = Machine(time.time())
        self._sender = Sender(prepared.disks, workshop, plan.limit_bytes_per_second)
        self._convergence = Convergence(
            plan.max_downtime_seconds, limit_bytes_per_second=plan.limit_bytes_per_second or None
        )
        self._guest = Guest(prepared.brake, plan, self._sender.note)
        self.bell = self._sender.bell
        self._wake = asyncio.Event()
        self._at_rest = asyncio.Lock()
        self._commands = asyncio.Lock()
        self._cutover: Cutover | None = None
        self._error: WarmsyncError | None = None
        self._refusal: WarmsyncError | None = None
        self._task: asyncio.Task[None] | None = None

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
        return Migration(
            plan=self._plan,
            role=Role.SOURCE,
            state=self.state,
            scheme=self._prepared.scheme,
            scheme_reason=self._prepared.scheme_reason,
            carrier=self._sender.carrier_name,
            carrier_detail=self._sender.carrier_detail,
            progress=self._sender.progress,
            history=tuple(Entered(e.state, e.at_seconds) for e in self._machine.history),
            error=self._error,
            refusal=self._refusal,
        )

    def start(self) -> None:
        """Begin with round 0."""
        self._task = asyncio.create_task(self._run(), name=f"migration {self.id}")

    def update(
        self, limit_bytes_per_second: int | None, max_downtime_seconds: float | None
    ) -> None:
        """Change the bandwidth limit or the budget (None: leave it) while running."""
        if self.state.is_terminal or self.state is State.CUT_OVER:
            raise FailedPrecondition(
                "ILLEGAL_TRANSITION",
                f"migration {self.id} is {self.state}; only a running one can be changed",
                state=self.state,
            )
        check_limit(limit_bytes_per_second or 0)
        if max_downtime_seconds is not None:
            check_budget(max_downtime_seconds)
            self._plan = replace(self._plan, max_downtime_seconds=max_downtime_seconds)
            self._convergence.change_budget(max_downtime_seconds)
        if limit_bytes_per_second is not None:
            self._plan = replace(self._plan, limit_bytes_per_second=limit_bytes_per_second)
            self._sender.limit(limit_bytes_per_second)
            self._convergence.change_limit(limit_bytes_per_second or None)
        self._stir()

    def pause(self) -> None:
        """Stop reading and sending; tracking goes on."""
        self._move(Event.PAUSE)
        self._sender.pause()
        self._guest.let_go()
        self._stir()

    def resume(self) -> None:
        """Go on where the pause began."""
        self._move(Event.RESUME)
        self._convergence.restart()
        self._sender.resume()
        self._stir()

    async def cancel(self) -> None:
        """Stop; the source stays as it is, the target is released and marked incomplete."""
        if self._is_releasing and self.state is State.CUTTING_OVER:
            raise FailedPrecondition(
                "TOO_LATE",
                f"migration {self.id} is being handed over; roll it back afterwards",
                id=self.id,
            )
        self._move(Event.CANCEL)
        await self._stop_task()
        await self._give_up("cancelled by the controller", cancelled=True)

    async def cut_over(self, *, force: bool) -> None:
        """Return once the target is durable and released. NOT_QUIESCED, and what can go wrong."""
        asked = time.monotonic()
        if not force:
            await self._reconverge()
        self._move(Event.CUT_OVER, force=force)
        self._refusal = None
        self._cutover = Cutover(self._sender, self._prepared.peer, self._prepared.token, asked)
        self._stir()
        # It goes on if the caller hangs up.
        await asyncio.shield(self._cutover.done)

    async def _reconverge(self) -> None:
        """Give what was converged before a moment to be so again.

        Between the message *converged* and the power-down the guest may write faster for a while;
        once it is off, two looks are enough. One that runs on is refused all the same.
        """
        if not any(entry.state is State.CONVERGED for entry in self._machine.history):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(RECONVERGE_SECONDS):
                while self.state is State.SYNCING:
                    await self.bell.wait(self.bell.count)

    async def roll_back(self) -> None:
        """Take the target back, then lift the fence: the source is the owner again."""
        async with self._commands:
            self._require(Event.ROLL_BACK)
            await self._prepared.peer.reclaim(self._prepared.token)
            await self._sender.on_disks(SourceDisk.unfence)
            self._move(Event.ROLL_BACK)
            await self._close()

    async def finish(self) -> None:
        """The VM runs on the target: nothing can be rolled back. The source stays fenced."""
        async with self._commands:
            self._require(Event.FINISH)
            await self._prepared.peer.finish(self._prepared.token)
            self._move(Event.FINISH)
            await self._close()

    async def verify(self) -> AsyncIterator[Comparison]:
        """Compare both ends between two rounds; iterates the progress, the last item is done."""
        self._check_comparable()
        async with self._at_rest:
            self._check_comparable()
            prepared = self._prepared
            settled = self.state is State.CUT_OVER
            comparisons = compare_ends(
                self._sender, self._workshop, prepared.peer, prepared.token, settled=settled
            )
            async for comparison in comparisons:
                yield comparison
                if not settled and self._wants_cutover:
                    raise Cancelled(
                        "VERIFY_INTERRUPTED", "the comparison gave way to a cutover; run it again"
                    )

    async def close(self, error: WarmsyncError) -> None:
        """The agent stops: what is not cut over fails, the source untouched; a fence stays up."""
        if self.state is State.CUT_OVER:
            await self._close()
        elif not self.state.is_terminal:
            await self._stop_task()
            await self._fail(error)

    async def _run(self) -> None:
        try:
            prepared = self._prepared
            request = self._sender.carrier_request(self._plan)
            self._sender.use(await prepared.peer.open_carrier(prepared.token, request))
            await self._seed()
            while self.state is not State.CUT_OVER:
                await self._rest()
                async with self._at_rest:
                    await (self._try_cutover() if self._wants_cutover else self._sync())
        except WarmsyncError as error:
            await self._fail(error)
        except Exception as error:
            _log.exception("migration failed id=%s", self.id)
            name = type(error).__name__
            await self._fail(
                WarmsyncError("INTERNAL", f"internal error ({name}: {error}); see the agent's log")
            )

    async def _seed(self) -> None:
        self._move(Event.SEED)
        async with self._at_rest:
            taken = await self._sender.take(flush=False)
            self._convergence.record(await self._sender.send_seed(taken))
        await self._sender.wait_until_running()
        self._move(Event.SYNC)

    async def _rest(self) -> None:
        """Wait for the next round, or until somebody asks for something."""
        await self._sender.wait_until_running()
        self._wake.clear()
        if self._wants_cutover:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._convergence.wait_seconds(time.monotonic())):
                await self._wake.wait()
        await self._sender.wait_until_running()

    async def _sync(self) -> None:
        # With the flush, so that what the host's page cache holds counts in the prediction.
        taken = await self._sender.take(flush=True)
        verdict = self._convergence.look(
            taken.dirty_bytes,
            taken.at_seconds,
            taken.since_seconds,
            taken.seconds,
            marked_bytes=taken.marked_bytes,
        )
        self._judge(verdict)
        if self.state in (State.SYNCING, State.CONVERGED):  # not once paused meanwhile
            await self._guest.ease(verdict, self._plan.max_downtime_seconds)
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
        if self.state is State.SYNCING and verdict.converged:
            self._move(Event.CONVERGE)
        elif self.state is State.CONVERGED and not verdict.converged:
            self._move(Event.DIVERGE)

    async def _try_cutover(self) -> None:
        if self._cutover is None:
            raise RuntimeError("no cutover was asked for")
        # First: writes that the kernel holds back must pass the tracker before the last take.
        await self._guest.release()
        try:
            await self._cutover.run()
        except FailedPrecondition as error:
            if error.reason != "NOT_QUIESCED":
                raise
            self._refusal = error
            self._convergence.restart()
            self._move(Event.REFUSE)
            self._cutover.done.set_exception(error)
            return
        # At once: the target owns the disks, and nothing that fails here can change that.
        self._move(Event.RELEASE)
        async with self._commands:
            await self._stop_sending()
        self._cutover.done.set_result(None)

    async def _stop_sending(self) -> None:
        try:
            await self._sender.on_disks(lambda disk: disk.tracker.stop())
            await self._sender.close()
        except (WarmsyncError, OSError) as error:
            _log.warning('tracking not ended cleanly id=%s reason="%s"', self.id, error)

    async def _fail(self, error: WarmsyncError) -> None:
        if self.state.is_terminal:
            return
        if self._is_releasing:
            error = unknown_owner(self._prepared.peer.address)
        self._error = error
        _log.error('migration failed id=%s reason=%s message="%s"', self.id, error.reason, error)
        self._move(Event.FAIL)
        await self._give_up(f"{error.reason}: {error}", cancelled=False)
        if self._wants_cutover and self._cutover is not None:
            self._cutover.done.set_exception(error)

    async def _give_up(self, reason: str, *, cancelled: bool) -> None:
        """Release the target and leave the source as it was found; each even if another fails."""
        await self._guest.release()
        if not self._is_releasing:
            try:
                await self._sender.on_disks(SourceDisk.unfence)
            except OSError as error:
                _log.error('source still fenced id=%s reason="%s"', self.id, error)
            await self._abort(reason, cancelled=cancelled)
        if self._wants_cutover and self._cutover is not None and cancelled:
            self._cutover.done.set_exception(
                Cancelled("CANCELLED", f"migration {self.id} was cancelled", id=self.id)
            )
        await self._close()

    async def _abort(self, reason: str, *, cancelled: bool) -> None:
        prepared = self._prepared
        try:
            async with asyncio.timeout(_ABORT_SECONDS):
                await prepared.peer.abort(prepared.token, reason, cancelled=cancelled)
        except (WarmsyncError, TimeoutError) as error:
            _log.warning('target not told of the end id=%s reason="%s"', self.id, error)

    async def _close(self) -> None:
        await self._guest.release()
        await self._sender.close()
        await self._sender.on_disks(SourceDisk.close)
        await self._prepared.peer.close()
        self.bell.ring()

    async def _stop_task(self) -> None:
        for disk in self._sender.disks:
            disk.tracker.interrupt()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    @property
    def _is_releasing(self) -> bool:
        """From the first request of the release until it is refused: the target may own."""
        return self._cutover is not None and self._cutover.releasing

    @property
    def _wants_cutover(self) -> bool:
        return self._cutover is not None and not self._cutover.done.done()

    def _check_comparable(self) -> None:
        if self.state not in (State.SYNCING, State.CONVERGED, State.CUT_OVER):
            raise FailedPrecondition(
                "NOT_COMPARABLE",
                f"migration {self.id} is {self.state}; it can be verified while it is "
                "SYNCING, CONVERGED or CUT_OVER",
                state=self.state,
            )

    def _require(self, event: Event) -> None:
        """Raise as the state machine would, without moving."""
        Machine.restore(self._machine.history).apply(event, time.time())

    def _move(self, event: Event, *, force: bool = False) -> None:
        state = self._machine.apply(event, time.time(), force=force)
        _log.info("migration id=%s state=%s", self.id, state)
        self.bell.ring()

    def _stir(self) -> None:
        self._wake.set()
        self.bell.ring()
