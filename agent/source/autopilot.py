"""A cutover that the source's agent does by itself: quiesce hook, cutover, the target's boot hook.

Owns the order, and what is written down before each step, so that an agent that is started again
goes on where it was and runs no hook twice. What cannot go on by itself stops and waits for a
person; the owner of the disks is then whoever it was before. Never decides who owns.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

from agent.bell import Bell
from agent.errors import FailedPrecondition, Unavailable, WarmsyncError, is_from_transport
from agent.hook import HookRun
from agent.migration import Plan, Step
from agent.state import State

_log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
TRIES = 3
"""How often one of these is tried again while the VM is off."""
_SELDOM = frozenset({"BAD_CUTOVER_CERTIFICATE", "COPIES_DIFFER", "SIGNATURE_INVALID"})
"""What is mended by another attempt, unless it is a defect: copies that differ are compared, sent
and compared again; a request that came damaged comes anew."""
_READY = (State.SYNCING, State.CONVERGED)
FLYING = (Step.QUIESCING, Step.CUTTING_OVER, Step.BOOTING)
"""Steps in which the agents have their hands on the VM."""
_OFF = (Step.QUIESCING, Step.CUTTING_OVER)
"""Steps in which the VM is off, or about to be: true of one boot of its host only."""


class Vessel(Protocol):
    """The migration that is steered."""

    bell: Bell

    @property
    def state(self) -> State:
        """The present state."""

    async def hand_over(self, asked_seconds: float) -> None:
        """Cut over with the VM off; the downtime counts from when it was so (monotonic clock)."""

    async def boot(self, attempt: int) -> float:
        """Run the target's boot hook; returns seconds."""

    def note_hook(self, **seconds: float) -> None:
        """Show how long a hook took."""

    def refuse(self, error: WarmsyncError | None) -> None:
        """Show why it stopped, or that it goes on."""

    def write_down(self, counted: Mapping[str, float] | None = None) -> None:
        """Make what is known durable. `journal.NOT_KEPT`."""


class Autopilot:
    """One migration's. `step`, `attempt`, `stopped`, `off_at_seconds` and `step_boot_id` are
    written down with it; `boot_id` is that of this host now.
    """

    def __init__(
        self,
        vessel: Vessel,
        plan: Callable[[], Plan],
        hook: HookRun,
        values: Callable[[], Mapping[str, str]],
        *,
        step: Step = Step.NONE,
        attempt: int = 0,
        stopped: WarmsyncError | None = None,
        off_at_seconds: float | None = None,
        boot_id: str = "",
        step_boot_id: str = "",
    ) -> None:
        self._vessel = vessel
        self._plan = plan
        self._hook = hook
        self._values = values
        self.step = step
        self.attempt = attempt
        """Of the boot hook; counted before each."""
        self.stopped = stopped
        self.off_at_seconds = off_at_seconds
        """When the VM was off (wall clock), for the cutover that is under way."""
        self._boot_id = boot_id
        self.step_boot_id = step_boot_id or boot_id
        """Of the boot on which the step was entered."""
        self._found = step
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Go on with what was written down."""
        if self.step in (Step.WAITING, *FLYING):
            self._task = asyncio.create_task(self._run(), name=f"autopilot {self._plan().id}")

    async def close(self) -> None:
        """The agent stops: a hook goes on, and is found again at the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def end(self) -> None:
        """The migration has ended: nothing of it shall run."""
        await self.close()
        await self._hook.stop()
        self._hook.forget()

    async def arm(self) -> None:
        """Begin, or go on after a stop, as from the step before it; boot what was cut over only.

        What is under way goes on by the plan as it is now, which is written down. `NOT_KEPT`.
        """
        await self._until_landed()
        cut_over = self._vessel.state is State.CUT_OVER
        is_unbooted = self.step is Step.DONE and cut_over and not self.attempt
        if self.step not in (Step.NONE, Step.STOPPED) and not is_unbooted:
            self._vessel.write_down()
            return
        self._found, attempt = Step.NONE, self.attempt
        self.attempt += cut_over
        try:
            self._enter(Step.BOOTING if cut_over else Step.WAITING)
        except WarmsyncError:
            self.attempt = attempt
            raise
        self.start()

    async def disarm(self) -> None:
        """Leave it to a person. FailedPrecondition CUTOVER_UNDER_WAY."""
        self.check_landed()
        if self.step not in (Step.NONE, Step.DONE):
            # In this order: not written down, it flies on; and nobody may cancel us in between.
            self._enter(Step.NONE)
            await self.close()

    def check_landed(self) -> None:
        """Raise FailedPrecondition while the agents have their hands on the VM."""
        if self.step in FLYING:
            raise FailedPrecondition(
                "CUTOVER_UNDER_WAY",
                f"migration {self._plan().id} is being cut over by the agents ({self.step}); wait "
                "for its end (warmsync show), or cancel it before it is cut over",
                step=self.step,
            )

    async def _until_landed(self) -> None:
        """A task that has stopped writes that down last."""
        if self._task is not None and self.step in (Step.STOPPED, Step.DONE):
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        try:
            await self._fly()
        except WarmsyncError as error:
            self._stop(error)
        except Exception as error:
            _log.exception("autopilot failed id=%s", self._plan().id)
            message = f"internal error ({type(error).__name__}: {error}); see the agent's log"
            self._stop(WarmsyncError("INTERNAL", message))

    async def _fly(self) -> None:
        plan = self._plan()
        await self._check_boot(plan)
        if self.step is Step.WAITING:
            await self._until(_READY if plan.cold else (State.CONVERGED,))
            if self._vessel.state not in _READY:
                return
            self.off_at_seconds = None if plan.quiesces else time.time()
            self._hook.forget()  # before an agent that comes back looks for this run's end
            self._enter(Step.QUIESCING if plan.quiesces else Step.CUTTING_OVER)
        if self.step is Step.QUIESCING:
            await self._quiesce()
            self.off_at_seconds = self._hook.ended_at_seconds
            self._enter(Step.CUTTING_OVER)
        if self.step is Step.CUTTING_OVER:
            await self._cut_over()
            if self._vessel.state is not State.CUT_OVER:
                return
            if not self._plan().boots:  # it may have been asked for since
                self._enter(Step.DONE)
                return
            self.attempt += 1
            self._enter(Step.BOOTING)
        if self.step is Step.BOOTING:
            await self._boot()

    async def _check_boot(self, plan: Plan) -> None:
        """Raise FailedPrecondition HOOK_INTERRUPTED, or HOST_REBOOTED where there was no hook, if
        the VM was off on an earlier boot of this host: it may have been started with it.

        Not once the target owns: if it was asked to take over, its answer is waited for.
        """
        is_off = self.step in _OFF or (self.step is Step.WAITING and plan.cold)
        if not is_off or self.step_boot_id == self._boot_id:
            return
        await self._until(tuple(state for state in State if state is not State.CUTTING_OVER))
        if self._vessel.state is State.CUT_OVER or self._vessel.state.is_terminal:
            return
        if plan.quiesces:
            raise self._hook.interrupted(
                "was begun before its host was rebooted, and nobody knows whether the VM is on "
                "again"
            )
        raise FailedPrecondition(
            "HOST_REBOOTED",
            f"the host of migration {plan.id}'s source was rebooted since its VM was off, and "
            "nobody knows whether it is on again; the source owns the disks: make sure that the VM "
            f"is off there, then warmsync cutover {plan.id} --force",
            id=plan.id,
        )

    async def _quiesce(self) -> None:
        """The step is written down before the hook starts: then it is never begun twice."""
        if self._found is Step.QUIESCING:
            await self._hook.rejoin()
        else:
            seconds = await self._hook.run(self._values())
            self._vessel.note_hook(quiesce_seconds=seconds)

    async def _cut_over(self) -> None:
        """The VM is off: what passes is tried again until it is done, or a person is needed."""
        tries, off_seconds = TRIES, time.monotonic() - self._off_for_seconds()
        while True:
            await self._until((*_READY, State.CUT_OVER))
            if self._vessel.state not in _READY:
                return
            try:
                await self._vessel.hand_over(off_seconds)
            except WarmsyncError as error:
                tries -= error.reason in _SELDOM
                if error.reason in ("NOT_QUIESCED", "SOURCE_DOES_NOT_FIT") or not tries:
                    raise
                _log.warning(
                    'cutover tried again id=%s reason=%s message="%s"',
                    self._plan().id,
                    error.reason,
                    error,
                )
                await asyncio.sleep(0)  # what failed it has yet to leave its state

    def _off_for_seconds(self) -> float:
        """How long the VM has been off: the agent may have been away. The clock may be set back."""
        return max(time.time() - (self.off_at_seconds or time.time()), 0.0)

    async def _boot(self) -> None:
        while self._vessel.state is State.CUT_OVER:
            try:
                seconds = await self._vessel.boot(self.attempt)
            except WarmsyncError as error:
                if not (isinstance(error, Unavailable) or is_from_transport(error)):
                    raise
                _log.warning('boot hook asked for again reason="%s"', error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._vessel.note_hook(boot_seconds=seconds)
            self._enter(Step.DONE)
            return

    async def _until(self, states: tuple[State, ...]) -> None:
        """Wait for one of these states, for the cutover by hand, or for an end."""
        over = (*states, State.CUT_OVER)
        bell = self._vessel.bell
        while (state := self._vessel.state) not in over and not state.is_terminal:
            seen = bell.count
            if self._vessel.state is state:
                await bell.wait(seen)

    def _enter(self, step: Step) -> None:
        before, self.step = self.step, step
        self.step_boot_id = self._boot_id
        try:
            self._vessel.write_down()
        except WarmsyncError:
            self.step = before
            raise
        _log.info("autopilot id=%s step=%s", self._plan().id, step or "off")
        if step is not Step.STOPPED and self.stopped is not None:
            self.stopped = None
            self._vessel.refuse(None)
        self._vessel.bell.ring()

    def _stop(self, error: WarmsyncError) -> None:
        if self._vessel.state.is_terminal:
            return  # its own error says more
        _log.error(
            'autopilot stopped id=%s reason=%s message="%s"', self._plan().id, error.reason, error
        )
        self.stopped, self.step = error, Step.STOPPED
        self._vessel.refuse(error)
        with suppress(WarmsyncError):  # told all the same; the next start finds the step before
            self._vessel.write_down()
