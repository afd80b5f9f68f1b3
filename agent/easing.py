"""Easing: how fast may the guest of a stalled migration still write?

Owns the guest's limit: when it begins, how it falls, when it is pointless. Pure: it is told of each
verdict, with the caller's monotonic clock, and never acts.

A limit works through the guest's writes, and what a round leaves to the next is what was written
during it: at half of what can be sent, each round is half as large as the one before. So the limit
begins at half of the lesser of what is dirtied and what is sent. As rewriting dirties a block
once only, less may be dirtied than is written, and that first limit is always felt.
"""

from __future__ import annotations

from agent.rounds import Verdict

STEP = 0.5
"""What a limit is of the one before, and the first of what was measured."""
SETTLE_SECONDS = 1.0
"""How long a limit is left to show what it does: the kernel counts in slices of 100 ms."""


class Easing:
    """The limit of one migration's guest. `least_bytes_per_second`: it never falls below."""

    def __init__(self, least_bytes_per_second: int) -> None:
        self._least = least_bytes_per_second
        self.restart()

    def restart(self) -> None:
        """Forget the limit: it was lifted, and the guest must be found too fast again."""
        self._limit = 0
        self._changed_at: float | None = None

    def decide(self, verdict: Verdict, budget_seconds: float, now_seconds: float) -> int:
        """Return the guest's limit in bytes a second from now on; 0 is none.

        It falls with each stalled verdict and never rises: what made the migration converge is
        what keeps it so. It ends where no limit helps: if the cutover takes longer than the budget
        with nothing left to send.
        """
        if not verdict.stalled or not self._has_settled(now_seconds):
            return self._limit
        limit = 0 if _is_hopeless(verdict, budget_seconds) else self._lower(verdict)
        if limit != self._limit:
            self._limit, self._changed_at = limit, now_seconds
        return limit

    def _has_settled(self, now_seconds: float) -> bool:
        return self._changed_at is None or now_seconds - self._changed_at >= SETTLE_SECONDS

    def _lower(self, verdict: Verdict) -> int:
        throughput = verdict.throughput_bytes_per_second or 0.0
        present = self._limit or verdict.dirty_rate_bytes_per_second or 0.0
        return max(int(STEP * min(present, throughput)), self._least)


def _is_hopeless(verdict: Verdict, budget_seconds: float) -> bool:
    return verdict.fixed_seconds is None or verdict.fixed_seconds >= budget_seconds
