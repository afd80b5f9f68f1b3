"""The guest's limit: rule by rule, and on simulated guests that no link could follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.easing import SETTLE_SECONDS, Easing
from agent.rounds import Convergence, Verdict
from tests.agent.simulation import MIB, Guest, Link, Look, World

GIB = 1 << 30
STALLED = Verdict(
    dirty_bytes=100 * MIB,
    dirty_rate_bytes_per_second=80.0 * MIB,
    throughput_bytes_per_second=100.0 * MIB,
    fixed_seconds=0.01,
    predicted_downtime_seconds=1.0,
    within_budget=False,
    converged=False,
    stalled=True,
    advice="quieten the guest",
)
CALM = replace(STALLED, stalled=False)
BUDGET = 0.5


def test_nothing_happens_before_it_stalls() -> None:
    easing = Easing(MIB)
    assert [easing.decide(CALM, BUDGET, float(now)) for now in range(100)] == [0] * 100


@pytest.mark.parametrize(("rate", "throughput"), [(80, 100), (100, 80)])
def test_it_begins_at_half_of_the_lesser_rate(rate: int, throughput: int) -> None:
    verdict = replace(
        STALLED,
        dirty_rate_bytes_per_second=float(rate * MIB),
        throughput_bytes_per_second=float(throughput * MIB),
    )
    assert Easing(MIB).decide(verdict, BUDGET, 0.0) == 40 * MIB


def test_it_falls_step_by_step_to_the_least() -> None:
    easing = Easing(9 * MIB)
    limits = [easing.decide(STALLED, BUDGET, now * SETTLE_SECONDS) for now in range(5)]
    assert limits == [40 * MIB, 20 * MIB, 10 * MIB, 9 * MIB, 9 * MIB]


def test_a_limit_gets_time_to_show_what_it_does() -> None:
    easing = Easing(MIB)
    limits = [easing.decide(STALLED, BUDGET, now * SETTLE_SECONDS / 4) for now in range(9)]
    assert limits == [40 * MIB] * 4 + [20 * MIB] * 4 + [10 * MIB]


def test_it_stays_when_it_has_converged() -> None:
    easing = Easing(MIB)
    easing.decide(STALLED, BUDGET, 0.0)
    converged = replace(CALM, converged=True, within_budget=True)
    assert [easing.decide(converged, BUDGET, float(now)) for now in range(1, 100)] == (
        [40 * MIB] * 99
    )


def test_after_a_pause_it_begins_anew() -> None:
    easing = Easing(MIB)
    easing.decide(STALLED, BUDGET, 0.0)
    easing.restart()
    assert easing.decide(CALM, BUDGET, 0.1) == 0
    assert easing.decide(STALLED, BUDGET, 0.2) == 40 * MIB


def test_a_guest_is_not_slowed_where_that_cannot_help() -> None:
    easing = Easing(MIB)
    hopeless = replace(STALLED, fixed_seconds=BUDGET, predicted_downtime_seconds=1.9 * BUDGET)
    assert easing.decide(hopeless, BUDGET, 0.0) == 0
    much_left = replace(hopeless, predicted_downtime_seconds=2 * BUDGET)
    assert easing.decide(much_left, BUDGET, 1.0) == 40 * MIB
    assert easing.decide(hopeless, BUDGET, 10.0) == 40 * MIB
    assert easing.decide(hopeless, 2 * BUDGET, 20.0) == 20 * MIB


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.floats(0, 1e12),
            st.floats(1, 1e12),
            st.floats(0, 1),
            st.floats(0, 3),
        )
    ),
    st.integers(1, 1 << 40),
)
def test_never_below_the_least_and_never_up(
    looks: list[tuple[bool, float, float, float, float]], least: int
) -> None:
    easing, now, before = Easing(least), 0.0, 0
    for stalled, rate, throughput, fixed, later in looks:
        now += later
        verdict = replace(
            STALLED,
            stalled=stalled,
            dirty_rate_bytes_per_second=rate,
            throughput_bytes_per_second=throughput,
            fixed_seconds=fixed,
        )
        limit = easing.decide(verdict, BUDGET, now)
        assert limit == 0 or limit >= least
        assert not before or limit <= before
        before = limit


class Eased(Convergence):
    """Sets the limit right after the look, before the round: as the source's end does."""

    def __init__(self, budget: float, least: int) -> None:
        super().__init__(budget)
        self.budget = budget
        self.easing = Easing(least)
        self.limit = 0

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
        verdict = super().look(
            dirty_bytes,
            now_seconds,
            since_seconds,
            take_seconds,
            marked_bytes=marked_bytes,
            proof_seconds=proof_seconds,
        )
        self.limit = self.easing.decide(verdict, self.budget, now_seconds)
        return verdict


@dataclass
class Throttled:
    """A guest behind a limit, and the loop of rounds that sets it."""

    guest: Guest
    link: Link
    least: int
    budget: float = BUDGET
    size: float = GIB

    def play(self, seconds: float) -> Iterator[tuple[Look, int]]:
        """Iterate all looks, each with the limit that followed from it."""
        eased = Eased(self.budget, self.least)
        demand = self.guest.hot_rate + self.guest.cold_rate
        guest = replace(
            self.guest, speed=lambda _: min(1.0, eased.limit / demand) if eased.limit else 1.0
        )
        world = World(guest, self.link, self.size, eased)
        world.open()
        for look in world.looks(seconds):
            yield look, eased.limit


FAST = Link(500 * MIB)
HELPED = {
    "more than the link": Throttled(Guest(400 * GIB, 600 * MIB), FAST, MIB),
    "a larger disk": Throttled(Guest(400 * GIB, 600 * MIB), FAST, MIB, size=10 * GIB),
    "cold writes beyond the link": Throttled(Guest(0, 0, 600 * MIB), FAST, MIB),
    "hot set does not fit": Throttled(Guest(512 * MIB, 900 * MIB), FAST, MIB),
    "scattered is too slow": Throttled(
        Guest(10 * GIB, 20 * MIB), Link(16 * MIB, sequential=800 * MIB), MIB
    ),
    "tight": Throttled(Guest(GIB, 400 * MIB), FAST, MIB, budget=0.1),
    "ten times the link": Throttled(Guest(2 * GIB, 1000 * MIB), Link(100 * MIB), MIB),
}


@pytest.mark.parametrize("name", HELPED)
def test_a_guest_that_was_too_fast_converges_and_stays_so(name: str) -> None:
    throttled = HELPED[name]
    found = list(throttled.play(400.0))
    assert found[0][1] == 0
    converged = [look.verdict.converged for look, _ in found]
    assert True in converged
    first = converged.index(True)
    limits = [limit for _, limit in found]
    assert limits[first] > 0
    # From then on nothing changes: neither the limit nor the verdict.
    assert set(limits[first:]) == {limits[first]}
    assert all(converged[first:])
    assert max(look.worst for look, _ in found[first:]) <= throttled.budget


def test_a_least_rate_that_is_too_high_does_not_help_and_is_kept() -> None:
    throttled = Throttled(Guest(400 * GIB, 600 * MIB), FAST, 550 * MIB)
    found = list(throttled.play(100.0))
    assert not any(look.verdict.converged for look, _ in found)
    assert found[-1][1] == 550 * MIB


def test_a_guest_that_converges_by_itself_is_never_slowed() -> None:
    found = Throttled(Guest(64 * MIB, 30 * MIB), FAST, MIB).play(60.0)
    assert {limit for _, limit in found} == {0}


@pytest.mark.parametrize("excess", [1.1, 2.0, 8.0])
@pytest.mark.parametrize("budget", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("cold", [False, True])
def test_whatever_the_guest_writes(excess: float, budget: float, cold: bool) -> None:
    """Slowed to next to nothing at most, a guest is always caught up with."""
    rate = excess * 100 * MIB
    guest = Guest(0, 0, rate) if cold else Guest(2 * GIB, rate)
    throttled = Throttled(guest, Link(100 * MIB, jitter=0.3), 64 * 1024, budget, 64 * MIB)
    assert any(look.verdict.converged for look, _ in throttled.play(2000.0))
