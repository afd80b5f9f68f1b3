"""The source's end: drives one migration from the first take to the cutover.

Owns the state machine, the loop of rounds and the controller's commands. What a round does is
`agent.sender`, what the cutover does `agent.cutover`, whether it has converged `agent.rounds`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from agent.autopilot import FLYING, Autopilot
from agent.brake import Brake
from agent.certificate import dump as dump_certificate
from agent.cutover import Cutover, unknown_owner
from agent.disk import SourceDisk
from agent.errors import (
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
)
from agent.estimate import Sample
from agent.guest import Guest
from agent.hook import HookRun, no_hook, values_of
from agent.journal import Journal
from agent.migration import (
    Comparison,
    Migration,
    Mode,
    Owner,
    Plan,
    Role,
    Scheme,
    Step,
    check_budget,
    check_limit,
)
from agent.migration import Event as Entered
from agent.peer import Peer, SessionRequest, session_token
from agent.proof import SourceProof
from agent.reconcile import reconcile
from agent.record import SourceRecord, dump
from agent.rounds import Convergence, Verdict, sample_of
from agent.saving import cold_copy_seconds
from agent.sender import Sender, Workshop
from agent.signer import Signer
from agent.state import Event, Machine, State
from agent.unread import SOURCE_TRIES
from agent.verify import compare_ends

_log = logging.getLogger(__name__)

_ABORT_SECONDS = 10.0
RECONVERGE_SECONDS = 10.0
"""How long a cutover waits for a migration that was converged before."""


FIRST_RETRY_SECONDS = 0.2
MAX_RETRY_SECONDS = 10.0
RETRY_FOR_SECONDS = 3600.0
"""How long a lost target is tried again without a round that became durable."""

UNREAD_RETRY_SECONDS = 0.5
"""How long a block that could not be read rests after its first try; twice as long after two."""

_PASSING = frozenset(
    {
        "BAD_FRAME",
        "BAD_MESSAGE",
        "CALL_CANCELLED",
        "FRAMES_MISSING",
        "MIGRATION_EXISTS",  # the session that was not found: its secret came damaged
        "NOT_PROVEN",  # the target's agent was started anew after the proof
        "PEER_INTERNAL",
        "PEER_UNKNOWN",
        "PROTOCOL_ERROR",
        "SESSION_NOT_FOUND",
        "SESSION_NOT_OPEN",
        "WRONG_GENERATION",
    }
)
"""What another connection may mend, beside all that is Unavailable: damage on the way."""
_REFUSALS = frozenset({"NOT_QUIESCED", "COPIES_DIFFER", "SOURCE_UNREADABLE"})
"""What makes a cutover come to nothing, and syncing go on."""
_MENDABLE = frozenset(
    {"TARGET_IO_ERROR", "DISK_FULL", "STATE_NOT_KEPT", "TARGET_NOT_CLAIMED", "GROW_NOT_UNDONE"}
)
"""What a person has to mend at the target: the migration pauses."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A migration that was found possible on both hosts: tracked here, claimed there.

    `restored` is what the agent before this one wrote down; `suspect` why its marks are not
    believed, if they are not.
    """

    plan: Plan
    scheme: Scheme
    scheme_reason: str
    disks: list[SourceDisk]
    peer: Peer
    secret: str
    request: SessionRequest
    signer: Signer
    brake: Brake | None = None
    restored: SourceRecord | None = None
    suspect: str = ""
    quiesce: HookRun = field(default_factory=no_hook)


class SourceMigration:
    """One migration, seen from its source."""

    def __init__(self, prepared: Prepared, workshop: Workshop, journal: Journal) -> None:
        plan = prepared.plan
        self._journal = journal
        self._secret = prepared.secret
        self._epoch = 1
        self._opening: Sample | None = None
        self._tried = 0
        # Whether to compare with the target before anything is sent.
        self._doubts = plan.reuse_target or bool(prepared.suspect)
        self._lost_at: float | None = None
        self._lost_generation = 0
        self._source_errors = 0
        self._prepared = prepared
        self._plan = replace(plan, volumes=tuple(disk.volume for disk in prepared.disks))
        self._workshop = workshop
        self._machine = Machine(time.time())
        self._sender = Sender(prepared.disks, workshop, plan.limit_bytes_per_second)
        self._convergence = Convergence(
            plan.max_downtime_seconds, limit_bytes_per_second=plan.limit_bytes_per_second or None
        )
        self._proof = SourceProof(self._plan, self._sender, workshop)
        self._certificate = ""
        self._guest = Guest(prepared.brake, plan, self._sender.note)
        self.bell = self._sender.bell
        self._autopilot = self._make_autopilot(prepared.restored)
        self._wake = asyncio.Event()
        self._at_rest = asyncio.Lock()
        self._commands = asyncio.Lock()
        self._cutover: Cutover | None = None
        self._error: WarmsyncError | None = None
        self._refusal: WarmsyncError | None = None
        self._task: asyncio.Task[None] | None = None
        if prepared.restored is not None:
            self._restore(prepared.restored)

    def _make_autopilot(self, record: SourceRecord | None) -> Autopilot:
        by_itself = self._plan.cold or self._plan.mode is Mode.AUTO
        return Autopilot(
            self,
            lambda: self._plan,
            self._prepared.quiesce,
            lambda: values_of(
                self.id, [volume.source for volume in self._plan.volumes], peer=self._plan.peer
            ),
            step=record.step if record else Step.WAITING if by_itself else Step.NONE,
            attempt=record.attempt if record else 0,
            stopped=record.stopped if record else None,
        )

    def _restore(self, record: SourceRecord) -> None:
        """Go on where the agent before this one was."""
        self._machine = Machine.restore(record.history)
        self._epoch, self._tried = record.epoch, 1
        self._error, self._certificate = record.error, record.certificate
        self._refusal = record.stopped
        self._sender.agree(record.generation)
        progress = record.progress
        pending = sum(disk.pending.count_bytes() for disk in self._prepared.disks)
        if not self.state.is_terminal and self.state is not State.CUT_OVER:
            progress = replace(
                progress,
                resumes=progress.resumes + 1,
                resumed_saved_bytes=max(progress.total_bytes - pending, 0),
                suspect_volumes=progress.suspect_volumes + bool(self._prepared.suspect),
                dirty_bytes=pending,
            )
        self._sender.progress = progress
        if record.opening is not None:
            self._learn(record.opening)
        if self.state is State.PAUSED:
            self._sender.pause()
        if record.releasing:
            self._cutover = self._make_cutover(time.monotonic())
            self._cutover.fencing = self._cutover.releasing = True
            self._cutover.done.cancel()  # nobody waits for it any more
            self._refusal = unknown_owner(self._prepared.peer.address)

    @property
    def _token(self) -> str:
        return session_token(self._secret, self._epoch)

    def record(self) -> SourceRecord:
        """Return what is written down of it."""
        cutover = self._cutover
        return SourceRecord(
            plan=self._plan,
            scheme=self._prepared.scheme,
            scheme_reason=self._prepared.scheme_reason,
            secret=self._secret,
            epoch=self._epoch,
            boot_id=self._prepared.request.boot_id,
            devices=tuple(disk.known_key for disk in self._prepared.disks),
            history=self._machine.history,
            generation=self._sender.generation,
            progress=self._sender.progress,
            releasing=cutover is not None and cutover.fencing,
            opening=self._opening,
            error=self._error,
            certificate=self._certificate,
            step=self._autopilot.step,
            attempt=self._autopilot.attempt,
            stopped=self._autopilot.stopped,
        )

    @property
    def certificate(self) -> str:
        """What both ends have signed at the cutover; empty before."""
        return self._certificate

    def write_down(self, counted: Mapping[str, float] | None = None) -> None:
        """Make what is known of it durable, `counted` in the totals with it. ResourceExhausted."""
        self._journal.save(Role.SOURCE, self.id, dump(self.record()), counted)

    @property
    def disks(self) -> list[SourceDisk]:
        """Its volumes."""
        return self._sender.disks

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
            owner=self.owner,
            step=self._autopilot.step,
        )

    @property
    def owner(self) -> Owner:
        """Who may write to the disks."""
        if self.state.is_handed_over:
            return Owner.TARGET
        cutover = self._cutover
        if cutover is None or self.state is State.ROLLED_BACK:
            return Owner.SOURCE
        fenced = cutover.fencing and self.state is State.CUTTING_OVER
        return Owner.NOBODY if fenced or cutover.releasing else Owner.SOURCE

    def start(self) -> None:
        """Begin with round 0, or go on."""
        self._task = asyncio.create_task(self._run(), name=f"migration {self.id}")
        self._autopilot.start()

    def check_mode(self, mode: Mode) -> None:
        """Raise FailedPrecondition if a cutover cannot be of this mode (any more)."""
        if self.state.is_terminal:
            raise FailedPrecondition(
                "ILLEGAL_TRANSITION",
                f"migration {self.id} is {self.state}; only a running one can be changed",
                state=self.state,
            )
        if mode is Mode.MANUAL:
            self._autopilot.check_landed()
        elif self.state is not State.CUT_OVER and not self._plan.cold:
            self._prepared.quiesce.hook.check()

    async def set_mode(self, mode: Mode) -> None:
        """Leave the cutover to the agents, once more after a stop, or to the controller."""
        self.check_mode(mode)
        before = self._plan
        if mode is Mode.AUTO:
            await self._prepared.peer.boot(self._token, 0)
        self._plan = replace(self._plan, mode=mode)
        try:
            await (self._autopilot.arm() if mode is Mode.AUTO else self._autopilot.disarm())
        except ResourceExhausted:
            self._plan = before
            raise
        self._stir()

    async def hand_over(self, asked_seconds: float) -> None:
        """See `agent.autopilot.Vessel`."""
        await self._begin_cutover(asked_seconds, force=True)

    async def boot(self, attempt: int) -> float:
        """See `agent.autopilot.Vessel`."""
        return await self._prepared.peer.boot(self._token, attempt)

    def note_hook(self, **seconds: float) -> None:
        """See `agent.autopilot.Vessel`."""
        self._sender.note(**seconds)

    def refuse(self, error: WarmsyncError | None) -> None:
        """See `agent.autopilot.Vessel`."""
        self._refusal = error
        self.bell.ring()

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
        self.write_down()
        self._stir()

    def pause(self) -> None:
        """Stop reading and sending; tracking goes on."""
        if self._autopilot.step in FLYING:
            self._autopilot.check_landed()
        self._move(Event.PAUSE)
        self._refusal = None  # a pause with a reason is one of our own
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
        if self._autopilot.step in FLYING:
            self._autopilot.check_landed()
        if not force:
            await self._reconverge()
        self._require(Event.CUT_OVER, force=force)
        await self._autopilot.disarm()
        await self._begin_cutover(asked, force=force)

    async def _begin_cutover(self, asked: float, *, force: bool) -> None:
        self._move(Event.CUT_OVER, force=force)
        self._refusal = None
        self._cutover = self._make_cutover(asked)
        self._stir()
        # It goes on if the caller hangs up.
        await asyncio.shield(self._cutover.done)

    def _make_cutover(self, asked_seconds: float) -> Cutover:
        asked_at = time.time()
        peer = self._prepared.peer
        return Cutover(
            self._sender,
            peer,
            lambda: self._token,
            prove=lambda: self._proof.prove(peer, self._token, asked_at),
            signer=self._prepared.signer,
            resize=self._plan.resize,
            asked_seconds=asked_seconds,
            write_down=self.write_down,
        )

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
            await self._prepared.peer.reclaim(self._token)
            await self._sender.on_disks(SourceDisk.unfence)
            await self._autopilot.end()
            self._move(Event.ROLL_BACK)
            await self._close()

    async def finish(self) -> None:
        """The VM runs on the target: nothing can be rolled back. The source stays fenced."""
        async with self._commands:
            self._require(Event.FINISH)
            self._autopilot.check_landed()
            await self._prepared.peer.finish(self._token)
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
                self._sender, self._workshop, prepared.peer, self._token, settled=settled
            )
            async for comparison in comparisons:
                yield comparison
                if not settled and self._wants_cutover:
                    raise Cancelled(
                        "VERIFY_INTERRUPTED", "the comparison gave way to a cutover; run it again"
                    )

    async def close(self, error: WarmsyncError) -> None:
        """The agent stops: tracking goes on, and so does the migration with its next start."""
        if self.state.is_terminal:
            return
        await self._autopilot.close()
        await self._stop_task()
        await self._guest.release()
        if self._wants_cutover and self._cutover is not None:
            self._cutover.done.set_exception(error)
        try:
            self.write_down()
        except ResourceExhausted as full:
            _log.error('not written down id=%s reason="%s"', self.id, full)
        await self._sender.close()
        await self._proof.stop()
        await self._sender.on_disks(SourceDisk.detach)
        await self._prepared.peer.close()
        self.bell.ring()

    async def _run(self) -> None:
        try:
            while self.state is not State.CUT_OVER:
                try:
                    await self._connect()
                    await self._carry()
                except WarmsyncError as error:
                    await self._withstand(error)
        except WarmsyncError as error:
            await self._fail(error)
        except Exception as error:
            _log.exception("migration failed id=%s", self.id)
            name = type(error).__name__
            await self._fail(
                WarmsyncError("INTERNAL", f"internal error ({name}: {error}); see the agent's log")
            )

    async def _connect(self) -> None:
        """Reach the target: for the first time, or again."""
        self._tried += 1
        if self._tried > 1:
            await self._resume()
        if self.state is not State.CUT_OVER:
            request = self._sender.carrier_request(self._plan)
            self._sender.use(await self._prepared.peer.open_carrier(self._token, request))
            self._sender.note(trouble="")

    async def _resume(self) -> None:
        """Agree with the target on what is durable, and on who owns the disks."""
        self._epoch += 1
        self.write_down()
        try:
            resumed = await self._prepared.peer.resume(self._secret, self._epoch)
        except NotFound:
            await self._reopen()
            return
        except FailedPrecondition as error:
            if error.reason == "SOURCE_FAILED" and self.state is State.CUTTING_OVER:
                await self._stay_owner()  # it has ended there, and was not released
            raise
        except Unavailable as error:
            if error.reason == "SOURCE_LOST":  # it has given us up: no other try will help
                raise FailedPrecondition("SOURCE_LOST", str(error)) from error
            raise
        if resumed.released:
            await self._hear_of_release(resumed.certificate)
            return
        if resumed.generation < self._sender.generation:
            await self._forget_target("the target has lost rounds that it had acknowledged")
        self._sender.agree(resumed.generation)
        if self.state is State.CUTTING_OVER and not self._wants_cutover:
            await self._stay_owner()

    async def _hear_of_release(self, certificate: bytes) -> None:
        if not self._is_releasing:
            # By whom? Not by us: what was written since is not there. A person has to decide.
            await self._sender.on_disks(SourceDisk.fence)
            self._cutover = self._make_cutover(time.monotonic())
            self._cutover.fencing = self._cutover.releasing = True
            self._cutover.done.cancel()
            raise unknown_owner(self._prepared.peer.address)
        self._certificate = certificate.decode(errors="replace")
        await self._own_no_more()

    async def _reopen(self) -> None:
        """The target knows nothing of us: claim its devices again, and believe nothing."""
        if self._is_releasing:
            raise unknown_owner(self._prepared.peer.address)
        try:
            self._secret = await self._prepared.peer.open_session(self._prepared.request)
        except (FailedPrecondition, InvalidArgument, NotFound) as error:
            raise FailedPrecondition(
                "TARGET_NOT_CLAIMED",
                f"the target's agent has lost its state and cannot claim the devices again: {error}"
                "; then resume",
                **error.values,
            ) from error
        self._epoch = 1
        self._sender.agree(0)
        await self._forget_target("the target's agent has lost its state")
        self.write_down()

    async def _forget_target(self, reason: str) -> None:
        _log.warning('the target is compared id=%s reason="%s"', self.id, reason)
        self._doubts = True
        await self._sender.on_disks(SourceDisk.forget_target)
        count = self._sender.progress.suspect_volumes + len(self._sender.disks)
        self._sender.note(suspect_volumes=count)

    async def _stay_owner(self) -> None:
        """The target was not released: the source is the owner, whatever was begun."""
        if self._cutover is not None:
            self._cutover.releasing = self._cutover.fencing = False
        self._sender.note(resizes=())
        await self._sender.on_disks(SourceDisk.unfence)
        self._convergence.restart()
        self._move(Event.REFUSE)

    async def _own_no_more(self) -> None:
        self._refusal = None
        self._reckon()
        try:
            self._move(Event.RELEASE)
        except ResourceExhausted as full:
            # It is so all the same; the journal has that the target may own: the next start asks.
            self._machine.apply(Event.RELEASE, time.time())
            _log.error('not written down id=%s reason="%s"', self.id, full)
            self.bell.ring()
        async with self._commands:
            await self._stop_sending()
        if self._wants_cutover and self._cutover is not None:
            self._cutover.done.set_result(None)

    def _reckon(self) -> None:
        """Say what was saved. A cold migration saves nothing: its downtime began with it."""
        progress = self._sender.progress
        took = progress.downtime_seconds
        if self._plan.cold and took is not None:
            took = time.time() - self._machine.history[0].at_seconds
            self._sender.note(downtime_seconds=took)
            return
        cold = cold_copy_seconds(self._opening, progress.total_bytes, progress.downtime_parts)
        if cold is not None and took is not None:
            self._sender.note(downtime_saved_seconds=cold - took)

    async def _compare(self) -> None:
        """Compare with the target; what is found equal is not sent. With `_at_rest`."""
        sender, prepared = self._sender, self._prepared
        # What is read in the background now must not be entered after what is found here.
        await self._proof.stop()
        before = sender.progress.reconciled_bytes
        sender.note(round_bytes=sender.progress.total_bytes, round_done_bytes=0)
        steps = reconcile(sender, self._workshop, prepared.peer, self._token)
        equal = 0
        async for compared, equal in steps:
            sender.note(round_done_bytes=compared, reconciled_bytes=before + equal)
        _log.info("compared with the target id=%s equal_bytes=%s", self.id, equal)
        self._doubts = False

    async def _carry(self) -> None:
        await self._sender.wait_until_running()
        if self._doubts:
            async with self._at_rest:
                await self._compare()
        await self._seed()
        while self.state is not State.CUT_OVER:
            await self._rest()
            async with self._at_rest:
                if self._doubts:
                    await self._compare()
                await (self._try_cutover() if self._wants_cutover else self._sync())

    async def _withstand(self, error: WarmsyncError) -> None:
        """Go on in spite of an error, if that can be; else raise it."""
        await self._sender.close()
        if self._cutover is not None and self.state is State.CUTTING_OVER:
            if self._wants_cutover:
                self._cutover.done.set_exception(error)
            if self._is_releasing:
                self._refusal = unknown_owner(self._prepared.peer.address)
            else:
                await self._stay_owner()
        now = time.monotonic()
        if error.reason in _MENDABLE and error.values.get("side", "target") == "target":
            await self._await_mend(error)
            return
        if self._lost_generation != self._sender.generation:  # it has come further since
            self._lost_at, self._lost_generation = None, self._sender.generation
            self._source_errors = 0
        self._lost_at = self._lost_at or now
        passing = isinstance(error, Unavailable) or error.reason in _PASSING
        if error.reason == "SOURCE_IO_ERROR" and "tries" not in error.values:
            self._source_errors += 1  # all its blocks are still pending
            passing = self._source_errors < SOURCE_TRIES
            if not passing:
                error.values["tries"] = str(self._source_errors)
        owner_unknown = self.state is State.CUTTING_OVER and error.reason == "OWNER_UNKNOWN"
        lasting = now - self._lost_at > RETRY_FOR_SECONDS and not self._is_releasing
        if lasting or not (passing or owner_unknown):
            raise error
        await self._back_off(error, now - self._lost_at)

    async def _await_mend(self, error: WarmsyncError) -> None:
        """Pause and say why: once resumed, the migration connects again."""
        self._refusal = error
        self._lost_at = None
        if self.state is State.PENDING:  # the comparison with an older copy comes first
            self._move(Event.SEED)
        if self.state is not State.PAUSED:
            self._move(Event.PAUSE)
            self._sender.pause()
        _log.error('paused id=%s reason=%s message="%s"', self.id, error.reason, error)
        await self._sender.wait_until_running()

    async def _back_off(self, error: WarmsyncError, lost_seconds: float) -> None:
        wait = min(max(lost_seconds, FIRST_RETRY_SECONDS), MAX_RETRY_SECONDS)
        _log.warning(
            'tried again in %.1f s id=%s reason=%s message="%s"',
            wait,
            self.id,
            error.reason,
            error,
        )
        self._sender.note(trouble=f"{error}; tried again every {wait:.1f} s")
        await asyncio.sleep(wait)

    async def _seed(self) -> None:
        if self.state is State.PENDING:
            self._move(Event.SEED)
        await self._sender.wait_until_running()
        if self.state is not State.SEEDING:
            return
        async with self._at_rest:
            taken = await self._sender.take(flush=False)
            self._learn(sample_of(await self._sender.send_seed(taken)))
        await self._sender.wait_until_running()
        self._move(Event.SYNC)

    def _learn(self, opening: Sample) -> None:
        self._opening = opening
        self._convergence.open(opening)

    async def _rest(self) -> None:
        """Wait for the next round, or until somebody asks for something."""
        await self._sender.wait_until_running()
        self._sender.check()
        self._wake.clear()
        if self._wants_cutover:
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
            await self._compare()
            return
        verdict = self._convergence.look(
            taken.dirty_bytes,
            taken.at_seconds,
            taken.since_seconds,
            taken.seconds,
            marked_bytes=taken.marked_bytes,
            proof_seconds=await self._proof.seconds(self._prepared.peer, self._token),
        )
        if self._sender.unread_tries:  # a cutover would be refused
            verdict = replace(verdict, converged=False)
        self._judge(verdict)
        budget = self._plan.max_downtime_seconds
        self._proof.read_ahead(idle=not taken.marked_bytes, budget_seconds=budget)
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
        except (FailedPrecondition, DataLoss) as error:
            if error.reason not in _REFUSALS:
                raise
            self._refusal = error
            self._cutover.done.set_exception(error)
            await self._stay_owner()
            if error.reason == "COPIES_DIFFER":
                _log.error('copies differ id=%s message="%s"', self.id, error)
                await self._forget_target("the proof at the cutover failed")
            return
        if self._cutover.certificate is not None:
            self._certificate = dump_certificate(self._cutover.certificate).decode()
        # At once: the target owns the disks, and nothing that fails here can change that.
        await self._own_no_more()

    async def _stop_sending(self) -> None:
        try:
            await self._proof.stop()
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
        try:
            self._move(Event.FAIL)
        except ResourceExhausted as full:  # it ends all the same
            self._machine.apply(Event.FAIL, time.time())
            _log.error('not written down id=%s reason="%s"', self.id, full)
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
                await prepared.peer.abort(self._token, reason, cancelled=cancelled)
        except (WarmsyncError, TimeoutError) as error:
            _log.warning('target not told of the end id=%s reason="%s"', self.id, error)

    async def _close(self) -> None:
        await self._autopilot.end()
        await self._guest.release()
        await self._sender.close()
        await self._proof.stop()
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
        grown = [one for one in self._sender.progress.resizes if one.after_bytes > one.before_bytes]
        if self.state is State.CUT_OVER and grown:
            raise FailedPrecondition(
                "TARGET_RESIZED",
                f"the target of migration {self.id} was grown after it was proved equal, so it is "
                "not equal any more; see its certificate",
                id=self.id,
            )

    def _require(self, event: Event, *, force: bool = False) -> None:
        """Raise as the state machine would, without moving."""
        Machine.restore(self._machine.history).apply(event, time.time(), force=force)

    def _move(self, event: Event, *, force: bool = False) -> None:
        """Move, and write it down: only then may it be told. Not written down, it is undone."""
        state = self._machine.apply(event, time.time(), force=force)
        try:
            # A cutover is written down with the fence: given up before, it never was.
            if event is not Event.CUT_OVER:
                self.write_down(self._count(event))
        except ResourceExhausted:
            self._machine.retract()
            raise
        _log.info("migration id=%s state=%s", self.id, state)
        self.bell.ring()

    def _count(self, event: Event) -> dict[str, float]:
        """Return what a move adds to the host's totals."""
        progress = self._sender.progress
        sent = {"sent_bytes": float(progress.sent_bytes)}
        if event is Event.RELEASE:
            return sent | {
                "migrations_cut_over": 1.0,
                "moved_bytes": float(progress.total_bytes),
                "downtime_seconds": progress.downtime_seconds or 0.0,
                "downtime_saved_seconds": progress.downtime_saved_seconds or 0.0,
            }
        if event is Event.FAIL:
            return sent | {"migrations_failed": 1.0}
        return sent if event is Event.CANCEL else {}

    def _stir(self) -> None:
        self._wake.set()
        self.bell.ring()
