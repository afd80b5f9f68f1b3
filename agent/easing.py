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
        what keeps it so. It does not begin, nor fall, where that cannot help.
        """
        helps = not _is_hopeless(verdict, budget_seconds)
        if verdict.stalled and helps and self._has_settled(now_seconds):
            limit = self._lower(verdict)
            if limit != self._limit:
                self._limit, self._changed_at = limit, now_seconds
        return self._limit

    def _has_settled(self, now_seconds: float) -> bool:
        return self._changed_at is None or now_seconds - self._changed_at >= SETTLE_SECONDS

    def _lower(self, verdict: Verdict) -> int:
        throughput = verdict.throughput_bytes_per_second or 0.0
        present = self._limit or verdict.dirty_rate_bytes_per_second or 0.0
        return max(int(STEP * min(present, throughput)), self._least)


def _is_hopeless(verdict: Verdict, budget_seconds: float) -> bool:
    """Return whether the cutover takes too long with nothing left to send.

    Believed only where little is left: a line through long rounds alone has its start anywhere
    (simulated: 11 s for a link of 1 ms, after three rounds of 20 to 35 s).
    """
    fixed, predicted = verdict.fixed_seconds, verdict.predicted_downtime_seconds
    if fixed is None or predicted is None:
        return True
    return fixed >= budget_seconds and predicted - fixed < fixed
