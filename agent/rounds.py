"""Convergence: is so little left that the rest fits in the downtime the customer was promised?

Owns the prediction of the downtime, the verdicts *converged* and *stalled*, and the pace of the
rounds. Pure: it is told of each round and each take, with the caller's monotonic clock, and never
acts. A wrong "converged" is a customer's machine that stays off for too long, so all is
reckoned for a guest that is powered off at the worst moment, and believed only when shown twice.

The downtime, reckoned from the moment the guest stops: finish the round in flight, take, send what
the guest wrote meanwhile, make it durable, take again to see that nothing writes any more.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from agent.estimate import Estimate, Sample
from agent.migration import check_budget
from agent.units import format_bytes, format_rate, format_seconds

LOOKS_TO_CONVERGE = 2
ROUNDS_TO_STALL = 3
TAKES_IN_CUTOVER = 2
"""The final take, and the second look that proves the source quiesced."""
ROUNDS_IN_CUTOVER = 2
"""The one in flight when the guest stops and the final one: each has its latency and its flush."""
RECENT_TAKES = 3
PACE = 0.25
"""Share of the budget, less what is fixed, that waiting between rounds may use up."""
HOLD = 0.1
"""Share of the budget that may be spent on what was held back from the rounds."""
MIN_CYCLE_SECONDS = 0.05
MAX_WAIT_SECONDS = 1.0
MIN_SINCE_SECONDS = 1e-3
"""Two takes closer than this tell nothing of a rate."""
RATE_MEMORY_SECONDS = 3.0
"""How long a dirty rate is remembered (an exponential average over time)."""


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What one finished round was. Times are the caller's monotonic clock.

    `dirty_bytes`: what it set out to send, without what it held back; `sent_bytes`: on the wire;
    `take_seconds`: the take, with a scan's pass; `send_seconds`: first read to last
    acknowledgement; `flush_seconds`: making it durable on the target, after that.
    """

    generation: int
    dirty_bytes: int
    sent_bytes: int
    take_seconds: float
    send_seconds: float
    flush_seconds: float
    started_seconds: float
    finished_seconds: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one look says. The rates and the prediction are None until they were measured.

    `fixed_seconds` is the part of the prediction that is there however little is left.
    `advice` is one line for the operator, empty unless stalled.
    """

    dirty_bytes: int
    dirty_rate_bytes_per_second: float | None
    throughput_bytes_per_second: float | None
    fixed_seconds: float | None
    predicted_downtime_seconds: float | None
    within_budget: bool
    converged: bool
    stalled: bool
    advice: str


class Convergence:
    """One migration's view of whether it can be cut over; all its volumes taken together.

    `limit_bytes_per_second`: bandwidth limit that the final round is subject to, if any.
    `fixed_seconds`: what the cutover costs beyond takes, sending and flushing, as far as known
    (the fence, calls between the agents).
    Raises InvalidArgument (INVALID_BUDGET) unless the budget is a finite number above 0.
    """

    def __init__(
        self,
        max_downtime_seconds: float,
        *,
        limit_bytes_per_second: float | None = None,
        fixed_seconds: float = 0.0,
    ) -> None:
        check_budget(max_downtime_seconds)
        self._budget = max_downtime_seconds
        self._limit = limit_bytes_per_second
        self._extra_seconds = fixed_seconds
        self._estimate = Estimate(limit_bytes_per_second)
        self._takes: deque[float] = deque(maxlen=RECENT_TAKES)
        self._rate: float | None = None
        self._last_rate = 0.0
        self._looked_at: float | None = None
        self.restart()

    def restart(self) -> None:
        """Forget the looks, not the measurements: after a pause or a refused cutover."""
        self._left: int | None = None
        self._streak = 0
        self._slow = 0
        self._shrinks = False

    def change_budget(self, max_downtime_seconds: float) -> None:
        """Set another budget; it counts from the next look on. Raises like the constructor."""
        check_budget(max_downtime_seconds)
        self._budget = max_downtime_seconds

    def change_limit(self, limit_bytes_per_second: float | None) -> None:
        """Set another bandwidth limit, or none; it counts from the next look on."""
        self._limit = limit_bytes_per_second
        self._estimate.change_limit(limit_bytes_per_second)

    def open(self, sample: Sample) -> None:
        """Learn from the opening: round 0, or what was written down of it."""
        self._estimate.record(sample)

    def record(self, report: RoundReport) -> None:
        """Learn from a finished round (made durable). The first one counts as the opening.

        Leave out rounds that were interrupted (paused, retried): their times are not the link's.
        """
        self._estimate.record(sample_of(report))

    def look(
        self,
        dirty_bytes: int,
        now_seconds: float,
        since_seconds: float,
        take_seconds: float,
        *,
        marked_bytes: int | None = None,
        proof_seconds: float = 0.0,
    ) -> Verdict:
        """Judge what a take found.

        `dirty_bytes` are dirty now; `marked_bytes` of them (None: all) were gathered in the
        `since_seconds` since the take before, the others held back by the rounds; `take_seconds`
        is what the take cost, with all that the final take will do as well (flush of the source's
        page cache, a scan's pass); `proof_seconds`: what both ends would still have to read for the
        proof that they are equal. That grows less by itself, so it delays *converged* but stalls
        nothing.
        """
        marked = dirty_bytes if marked_bytes is None else min(marked_bytes, dirty_bytes)
        self._looked_at = now_seconds
        self._takes.append(max(take_seconds, 0.0))
        self._note_rate(marked, since_seconds)
        if self._estimate.is_empty:
            self._left = dirty_bytes
            return Verdict(dirty_bytes, self._rate, None, None, None, False, False, False, "")
        fixed = self._fixed_seconds()
        pending = self._pending_bytes(dirty_bytes, marked, since_seconds)
        sent = fixed + self._variable_seconds(pending)
        predicted = sent + proof_seconds
        within = predicted <= self._budget
        self._count(dirty_bytes, within, sent <= self._budget)
        stalled = self._slow >= ROUNDS_TO_STALL
        return Verdict(
            dirty_bytes,
            self._rate,
            self._throughput(),
            fixed,
            predicted,
            within,
            self._streak >= LOOKS_TO_CONVERGE,
            stalled,
            self._advise(fixed, predicted) if stalled else "",
        )

    def hold_bytes(self) -> int:
        """Return how much a round may hold back: what goes out within HOLD of the budget."""
        if self._estimate.is_empty:
            return 0
        return int(HOLD * self._budget * self._throughput())

    def wait_seconds(self, now_seconds: float) -> float:
        """Return how long to wait before the next take; a cutover must cut the wait short.

        Takes are at least MIN_CYCLE_SECONDS apart, so that small rounds do not spin. Within
        budget they come as late as they may: when what gathers could use up its share (PACE).
        """
        if self._looked_at is None:
            return 0.0
        elapsed = max(now_seconds - self._looked_at, 0.0)
        cycle = max(self._affordable_seconds() if self._streak else 0.0, MIN_CYCLE_SECONDS)
        # A scan reads the whole device: it may rest as long as it worked.
        return min(max(cycle - elapsed, 0.0), max(MAX_WAIT_SECONDS, *self._takes))

    def _note_rate(self, dirty_bytes: int, since_seconds: float) -> None:
        if since_seconds < MIN_SINCE_SECONDS:
            return
        self._last_rate = rate = dirty_bytes / since_seconds
        memory = 0.0 if self._rate is None else math.exp(-since_seconds / RATE_MEMORY_SECONDS)
        self._rate = rate + ((self._rate or 0.0) - rate) * memory

    def _pending_bytes(self, dirty_bytes: int, marked_bytes: int, since_seconds: float) -> float:
        """Return the larger of what is dirty now and what will be when this round is done."""
        if since_seconds < MIN_SINCE_SECONDS:
            return dirty_bytes
        cycle = self._takes[-1] + self._variable_seconds(dirty_bytes)
        growth = max(0.0, cycle / since_seconds - 1.0)
        return dirty_bytes + marked_bytes * growth

    def _variable_seconds(self, size_bytes: float) -> float:
        estimate = self._estimate
        latency = estimate.line().latency_seconds
        return (
            estimate.send_seconds(size_bytes)
            - latency
            + ROUNDS_IN_CUTOVER * estimate.flush_seconds(size_bytes)
        )

    def _fixed_seconds(self) -> float:
        latency = self._estimate.line().latency_seconds
        takes = TAKES_IN_CUTOVER * max(self._takes)
        return self._extra_seconds + takes + ROUNDS_IN_CUTOVER * latency

    def _throughput(self) -> float:
        return 1 / self._estimate.line().seconds_per_byte

    def _affordable_seconds(self) -> float:
        """Return how long the guest may write before what gathers uses up its share.

        A guest may wake up at any moment: it is taken to write at least as fast as can be sent.
        """
        idle = self._fixed_seconds() + self._variable_seconds(0)
        spare = PACE * max(self._budget - idle, 0.0)
        rate = max(self._rate or 0.0, self._last_rate, self._throughput())
        return spare * self._throughput() / rate

    def _count(self, dirty_bytes: int, within: bool, can_be_sent: bool) -> None:
        slow = not can_be_sent and self._left is not None and dirty_bytes * 2 > self._left
        self._slow = self._slow + 1 if slow else 0
        self._shrinks = self._left is not None and dirty_bytes < self._left
        self._streak = self._streak + 1 if within else 0
        self._left = dirty_bytes

    def _advise(self, fixed_seconds: float, predicted_seconds: float) -> str:
        rate, throughput = self._rate or 0.0, self._throughput()
        rates = f"the guest dirties {format_rate(rate)}, {format_rate(throughput)} can be sent"
        if self._limit:
            rates += f" (limit {format_rate(self._limit)})"
        budget, predicted = format_seconds(self._budget), format_seconds(predicted_seconds)
        if fixed_seconds >= self._budget:
            return (
                f"{rates}; with nothing left the cutover still takes "
                f"{format_seconds(fixed_seconds)} of a budget of {budget}: raise --max-downtime "
                "above that, or use a tracker with faster takes (ebpf)"
            )
        mends = ["wait, as what is left still shrinks"] if self._shrinks else []
        mends += ["raise the bandwidth limit"] if self._limit else []
        mends += [f"raise --max-downtime above {predicted}"] if rate < throughput else []
        mends += ["quieten the guest", f"force the cutover and accept {predicted} of downtime"]
        return (
            f"{rates}; {format_bytes(self._left or 0)} are left and the budget is {budget}: "
            + ", or ".join(mends)
        )


def sample_of(report: RoundReport) -> Sample:
    """Return what an estimate learns from a round."""
    return Sample(
        max(report.dirty_bytes, 0),
        max(report.sent_bytes, 0),
        max(report.send_seconds, 0.0),
        max(report.flush_seconds, 0.0),
    )
