"""Convergence: on simulated guests and links whose true downtime is known, and rule by rule."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.errors import InvalidArgument
from agent.estimate import Estimate, Sample
from agent.rounds import (
    HOLD,
    MAX_WAIT_SECONDS,
    MIN_CYCLE_SECONDS,
    Convergence,
    RoundReport,
    Verdict,
)
from tests.agent.simulation import MIB, Guest, Link, Look, World

GIB = 1 << 30


@dataclass(frozen=True)
class Scenario:
    """A guest and a link, and what must come of them."""

    guest: Guest
    link: Link
    converges: bool
    stalls: bool = False
    budget: float = 0.5
    size: float = 10 * GIB
    seconds: float = 40.0
    limit: float | None = None

    def play(self) -> list[Look]:
        convergence = Convergence(self.budget, limit_bytes_per_second=self.limit)
        world = World(self.guest, self.link, self.size, convergence)
        world.open()
        return list(world.looks(self.seconds))


FAST = Link(500 * MIB)
WAN = Link(100 * MIB, latency=0.08)
SCATTERED = Link(16 * MIB, sequential=800 * MIB)

SCENARIOS = {
    "idle": Scenario(Guest(0, 0), FAST, converges=True),
    "idle, tiny disk": Scenario(Guest(0, 0), FAST, converges=True, size=MIB),
    "20 MiB/s, hot and cold": Scenario(Guest(64 * MIB, 10 * MIB, 10 * MIB), FAST, converges=True),
    "half the link": Scenario(Guest(10 * GIB, 250 * MIB), FAST, converges=True),
    "most of the link": Scenario(
        Guest(10 * GIB, 400 * MIB), FAST, converges=True, stalls=True, seconds=90
    ),
    "more than the link": Scenario(
        Guest(400 * GIB, 600 * MIB), FAST, converges=False, stalls=True, seconds=200
    ),
    "cold writes beyond the link": Scenario(
        Guest(0, 0, 600 * MIB), FAST, converges=False, stalls=True, seconds=200
    ),
    "hot set fits the budget": Scenario(Guest(32 * MIB, 900 * MIB), FAST, converges=True),
    "hot set nearly fits": Scenario(Guest(200 * MIB, 900 * MIB), FAST, converges=True),
    "hot set does not fit": Scenario(
        Guest(512 * MIB, 900 * MIB), FAST, converges=False, stalls=True
    ),
    "scattered is 50 times slower": Scenario(Guest(10 * GIB, 5 * MIB), SCATTERED, converges=True),
    "scattered is too slow": Scenario(
        Guest(10 * GIB, 20 * MIB), SCATTERED, converges=False, stalls=True, seconds=200
    ),
    "nearly idle, scattered": Scenario(Guest(GIB, 0.2 * MIB), SCATTERED, converges=True),
    "long way": Scenario(Guest(64 * MIB, 5 * MIB, MIB), WAN, converges=True),
    "long way, tight": Scenario(Guest(64 * MIB, 5 * MIB, MIB), WAN, converges=True, budget=0.2),
    "long way, too tight": Scenario(
        Guest(64 * MIB, 5 * MIB, MIB), WAN, converges=False, stalls=True, budget=0.1
    ),
    "scan": Scenario(
        Guest(64 * MIB, 5 * MIB, MIB), Link(300 * MIB, take=2.0), converges=True, budget=10
    ),
    "scan too slow": Scenario(
        Guest(64 * MIB, 5 * MIB, MIB),
        Link(300 * MIB, take=8.0),
        converges=False,
        stalls=True,
        budget=10,
        seconds=120,
    ),
    "jitter": Scenario(Guest(64 * MIB, 30 * MIB), Link(300 * MIB, jitter=2.0), converges=True),
    "slow flush": Scenario(
        Guest(64 * MIB, 30 * MIB),
        Link(300 * MIB, flush=0.1, flush_throughput=500 * MIB),
        converges=True,
    ),
    "flush beyond the budget": Scenario(
        Guest(64 * MIB, 30 * MIB), Link(300 * MIB, flush=0.3), converges=False, stalls=True
    ),
    "20 ms": Scenario(
        Guest(64 * MIB, 30 * MIB),
        Link(1000 * MIB, latency=0.0002, take=0.0002, flush=0.0005),
        converges=True,
        budget=0.02,
        seconds=10,
    ),
    "limited, with bridged gaps": Scenario(
        Guest(GIB, 20 * MIB), Link(60 * MIB, wire=1.5), converges=True, limit=90 * MIB
    ),
    "limited below the guest": Scenario(
        Guest(10 * GIB, 20 * MIB),
        Link(10 * MIB),
        converges=False,
        stalls=True,
        limit=10 * MIB,
        size=GIB,
        seconds=1500,
    ),
    "bursts": Scenario(
        Guest(4 * GIB, 10 * MIB, speed=lambda at: 1 if at % 10 < 9 else 40),
        FAST,
        converges=True,
    ),
}


@pytest.fixture(scope="module", params=SCENARIOS)
def played(request: pytest.FixtureRequest) -> tuple[Scenario, list[Look]]:
    scenario = SCENARIOS[request.param]
    return scenario, scenario.play()


def test_scenario_ends_as_it_must(played: tuple[Scenario, list[Look]]) -> None:
    scenario, looks = played
    assert any(look.verdict.converged for look in looks) is scenario.converges
    assert looks[-1].verdict.converged is scenario.converges
    assert any(look.verdict.stalled for look in looks) is scenario.stalls


def test_converged_is_never_a_lie(played: tuple[Scenario, list[Look]]) -> None:
    scenario, looks = played
    for look in looks:
        if look.verdict.converged:
            assert look.worst <= 1.5 * scenario.budget


def test_prediction_is_near_the_truth(played: tuple[Scenario, list[Look]]) -> None:
    scenario, looks = played
    for look in looks[3:]:
        predicted, true = look.verdict.predicted_downtime_seconds, look.downtimes[0]
        assert predicted is not None
        assert predicted >= 0.6 * true
        assert predicted <= 3 * true + 0.15 * scenario.budget


def test_pace(played: tuple[Scenario, list[Look]]) -> None:
    scenario, looks = played
    for look, after in itertools.pairwise(looks):
        assert 0 <= look.wait <= max(MAX_WAIT_SECONDS, scenario.link.take)
        assert after.at - look.at >= MIN_CYCLE_SECONDS - 1e-9


def test_steady_convergence_does_not_flap(played: tuple[Scenario, list[Look]]) -> None:
    scenario, looks = played
    flags = [look.verdict.converged for look in looks]
    if scenario.converges and scenario is not SCENARIOS["bursts"]:
        assert all(flags[flags.index(True) :])


def test_stalled_names_both_rates_and_a_mend(played: tuple[Scenario, list[Look]]) -> None:
    for look in played[1]:
        advice = look.verdict.advice
        assert bool(advice) is look.verdict.stalled
        if advice:
            assert advice.count("/s") >= 2
            assert "--max-downtime" in advice or "quieten the guest" in advice


def looks_around(
    guest: Guest, link: Link, change_at: float, seconds: float = 100.0
) -> tuple[list[Look], list[Look]]:
    """Play it; return the looks before the change and those from the first one after it."""
    looks = Scenario(guest, link, converges=True, seconds=seconds).play()
    return (
        [look for look in looks if look.at < change_at],
        [look for look in looks if look.at >= change_at],
    )


def after(moment: float, factor: float) -> Callable[[float], float]:
    return lambda at: factor if at >= moment else 1.0


def test_falls_back_when_the_guest_speeds_up() -> None:
    before, later = looks_around(Guest(40 * GIB, 20 * MIB, speed=after(50, 40)), FAST, 50)
    assert before[-1].verdict.converged
    fallen = next(i for i, look in enumerate(later) if not look.verdict.converged)
    # What was gathered in a wait stays small whatever the guest does: it falls back in time.
    assert all(look.worst <= 1.5 * 0.5 for look in later[:fallen])
    assert not any(look.verdict.converged for look in later[fallen:])
    assert later[-1].verdict.stalled


def test_sudden_speed_is_survived_while_it_fits() -> None:
    before, later = looks_around(Guest(4 * GIB, 20 * MIB, speed=after(50, 20)), FAST, 50)
    assert all(look.worst <= 1.5 * 0.5 for look in later if look.verdict.converged)
    assert before[-1].verdict.converged
    assert later[-1].verdict.converged


def test_falls_back_when_the_link_slows_down() -> None:
    link = Link(500 * MIB, speed=after(50, 0.02))
    before, later = looks_around(Guest(4 * GIB, 50 * MIB), link, 50)
    assert before[-1].verdict.converged
    assert sum(look.verdict.converged for look in later) <= 3
    assert not later[-1].verdict.converged
    throughput = later[-1].verdict.throughput_bytes_per_second
    assert throughput is not None
    assert throughput < 3 * 10 * MIB


def test_converges_again_when_the_guest_calms_down() -> None:
    _, later = looks_around(
        Guest(10 * GIB, 2000 * MIB, speed=after(60, 0.01)), FAST, 60, seconds=300
    )
    assert not later[0].verdict.converged
    assert later[-1].verdict.converged
    assert not later[-1].verdict.stalled


def test_thin_disk_does_not_pretend_to_be_fast() -> None:
    convergence = Convergence(0.5)
    world = World(Guest(10 * GIB, 20 * MIB), Link(100 * MIB), 1 << 40, convergence)
    world.open(sent_share=1 / 1024)
    first = next(world.looks(1.0)).verdict
    assert first.throughput_bytes_per_second is not None
    assert first.throughput_bytes_per_second < 100 * MIB


def measured(budget: float = 0.5, limit: float | None = None) -> Convergence:
    """A convergence that knows its link: 100 MiB/s, 1 ms."""
    convergence = Convergence(budget, limit_bytes_per_second=limit)
    for generation, size in enumerate([GIB, 100 * MIB, 10 * MIB, MIB]):
        convergence.record(report(size, 0.001 + size / (100 * MIB), generation))
    return convergence


def report(size: int, send: float, generation: int = 9, flush: float = 0.001) -> RoundReport:
    return RoundReport(generation, size, size, 0.0, send, flush, 0.0, 0.0)


def look(convergence: Convergence, size: float, now: float = 0.0, since: float = 10.0) -> Verdict:
    return convergence.look(int(size), now, since, 0.0)


@pytest.mark.parametrize("budget", [0, 0.0, -1, math.nan, math.inf])
def test_budget_that_can_never_be_met(budget: float) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        Convergence(budget)
    assert refusal.value.reason == "INVALID_BUDGET"
    convergence = measured()
    with pytest.raises(InvalidArgument):
        convergence.change_budget(budget)
    assert look(convergence, MIB).within_budget


def test_no_verdict_before_a_measurement() -> None:
    convergence = Convergence(0.5)
    for _ in range(5):
        verdict = look(convergence, 0)
        assert verdict.predicted_downtime_seconds is None
        assert verdict.throughput_bytes_per_second is None
        assert not any([verdict.within_budget, verdict.converged, verdict.stalled])
    convergence.record(report(GIB, 10.0))
    # The looks before do not count as shown.
    assert [look(convergence, 0).converged for _ in range(2)] == [False, True]


def test_converged_takes_two_looks_and_one_clears_it() -> None:
    convergence = measured()
    sizes = [MIB, MIB, MIB, 100 * MIB, MIB, 100 * MIB, MIB, MIB]
    flags = [look(convergence, size).converged for size in sizes]
    assert flags == [False, True, True, False, False, False, False, True]


def test_restart_must_show_it_again_and_keeps_the_measurements() -> None:
    convergence = measured()
    assert [look(convergence, MIB).converged for _ in range(2)] == [False, True]
    convergence.restart()
    assert [look(convergence, MIB).converged for _ in range(2)] == [False, True]


def test_stalled_after_three_rounds_that_do_not_halve() -> None:
    convergence = measured()
    sizes = [800, 500, 300, 160, 90, 40, 39, 38]
    flags = [look(convergence, size * MIB).stalled for size in sizes]
    assert flags == [False, False, False, True, True, False, False, False]
    # A round that halves starts the count again.
    convergence = measured()
    sizes = [800, 500, 300, 100, 99, 98, 97]
    flags = [look(convergence, size * MIB).stalled for size in sizes]
    assert flags == [False, False, False, False, False, False, True]


def test_a_proof_that_is_not_read_yet_delays_but_does_not_stall() -> None:
    """What both ends have to read back goes on by itself: no round that halves is wanted."""
    convergence = measured()
    for _ in range(6):
        verdict = convergence.look(MIB, 0.0, 10.0, 0.0, proof_seconds=5.0)
        assert verdict.predicted_downtime_seconds is not None
        assert verdict.predicted_downtime_seconds > 5.0
        assert not any([verdict.within_budget, verdict.converged, verdict.stalled])
    found = [convergence.look(MIB, 0.0, 10.0, 0.0).converged for _ in range(2)]
    assert found == [False, True]


def test_half_is_halved() -> None:
    convergence = measured()
    assert not any(look(convergence, (8192 >> n) * MIB).stalled for n in range(7))


def test_a_pause_is_no_stall() -> None:
    convergence = measured()
    for _ in range(3):
        look(convergence, 800 * MIB)
    convergence.restart()
    assert not look(convergence, 900 * MIB).stalled


def advice(convergence: Convergence, sizes: list[int], since: float) -> str:
    return [convergence.look(size * MIB, 0.0, since, 0.0).advice for size in sizes][-1]


def test_advice_where_waiting_or_a_budget_helps() -> None:
    text = advice(measured(), [800, 700, 600, 500], 10.0)
    assert "wait, as what is left still shrinks" in text
    assert "--max-downtime above 5." in text
    assert "limit" not in text


def test_advice_where_only_the_guest_can_help() -> None:
    text = advice(measured(), [500, 600, 700, 800], 1.0)
    assert "wait" not in text
    assert "--max-downtime" not in text
    assert re.search(r"guest dirties [67]..\.. MiB/s, 9[0-9]\.. MiB/s can be sent", text)
    assert "quieten the guest" in text


def test_advice_where_a_limit_is_in_the_way() -> None:
    text = advice(measured(limit=50 * MIB), [500, 600, 700, 800], 1.0)
    assert "50.0 MiB/s can be sent (limit 50.0 MiB/s)" in text
    assert "raise the bandwidth limit" in text


def test_advice_where_the_cutover_alone_takes_too_long() -> None:
    convergence = measured()
    texts = [convergence.look(MIB, 0.0, 10.0, 2.0).advice for _ in range(4)]
    assert "still takes 4.0 s of a budget of 500 ms" in texts[-1]
    assert "ebpf" in texts[-1]


def test_known_costs_count() -> None:
    costly = Convergence(0.5, fixed_seconds=0.6)
    costly.record(report(GIB, 10.0))
    verdict = look(costly, 0)
    assert verdict.fixed_seconds == pytest.approx(0.6)
    assert not verdict.within_budget


def test_a_limit_caps_what_was_measured() -> None:
    convergence = measured()
    assert look(convergence, 10 * MIB).predicted_downtime_seconds == pytest.approx(0.105, rel=0.1)
    convergence.change_limit(10 * MIB)
    verdict = look(convergence, 10 * MIB)
    assert verdict.throughput_bytes_per_second == pytest.approx(10 * MIB)
    assert verdict.predicted_downtime_seconds == pytest.approx(1.0, rel=0.1)
    convergence.change_limit(0)
    assert look(convergence, 10 * MIB).within_budget


def test_a_lifted_limit_is_soon_forgotten() -> None:
    convergence = Convergence(0.5, limit_bytes_per_second=10 * MIB)
    for generation, size in enumerate([GIB, 100 * MIB, 10 * MIB, 10 * MIB]):
        convergence.record(report(size, size / (10 * MIB), generation))
    convergence.change_limit(None)
    for _ in range(3):
        convergence.record(report(10 * MIB, 0.101))
    throughput = look(convergence, 10 * MIB).throughput_bytes_per_second
    assert throughput is not None
    assert throughput > 60 * MIB


def test_a_raised_budget_counts_at_once() -> None:
    convergence = measured()
    assert not look(convergence, 100 * MIB).within_budget
    convergence.change_budget(2.0)
    assert look(convergence, 100 * MIB).within_budget


def test_tiny_rounds_do_not_spoil_the_throughput() -> None:
    convergence = measured()
    for _ in range(500):
        convergence.record(report(4096, 0.003))
    throughput = look(convergence, 10 * MIB).throughput_bytes_per_second
    assert throughput == pytest.approx(100 * MIB, rel=0.2)
    # And the other way round: what takes 3 ms at least is not predicted to take less.
    fixed = look(convergence, 0).fixed_seconds
    assert fixed is not None
    assert fixed > 0.003


def test_only_tiny_rounds_do_not_make_a_burst_absurd() -> None:
    convergence = Convergence(0.5)
    for generation in range(20):
        convergence.record(report(4096, 0.02, generation))
    predicted = look(convergence, 100 * MIB).predicted_downtime_seconds
    assert predicted is not None
    assert 1.0 < predicted < 20.0


def test_one_odd_round_does_not_turn_the_throughput() -> None:
    convergence = measured()
    for _ in range(4):
        convergence.record(report(10 * MIB, 0.101))
    convergence.record(report(10 * MIB, 0.001))
    throughput = look(convergence, 10 * MIB).throughput_bytes_per_second
    assert throughput is not None
    assert throughput < 200 * MIB


def test_rounds_of_zeros_do_not_pretend_to_be_fast() -> None:
    convergence = measured()
    for _ in range(8):
        convergence.record(RoundReport(9, 100 * MIB, 4096, 0.0, 0.01, 0.001, 0.0, 0.0))
    throughput = look(convergence, 10 * MIB).throughput_bytes_per_second
    assert throughput == pytest.approx(100 * MIB, rel=0.1)


def test_a_limit_counts_what_is_on_the_wire() -> None:
    convergence = measured(limit=10 * MIB)
    for _ in range(4):
        convergence.record(RoundReport(9, 10 * MIB, 20 * MIB, 0.0, 0.1, 0.001, 0.0, 0.0))
    throughput = look(convergence, 10 * MIB).throughput_bytes_per_second
    assert throughput == pytest.approx(5 * MIB)


def test_a_hiccup_counts_for_a_while() -> None:
    convergence = measured()
    calm = look(convergence, MIB).predicted_downtime_seconds
    convergence.record(report(MIB, 0.4))
    shaken = look(convergence, MIB).predicted_downtime_seconds
    assert calm is not None
    assert shaken is not None
    assert calm < 0.05
    assert shaken > 0.4
    for _ in range(20):
        convergence.record(report(MIB, 0.011))
    assert look(convergence, MIB).predicted_downtime_seconds == pytest.approx(calm, abs=0.2)


def test_the_opening_flush_does_not_count_for_little() -> None:
    convergence = Convergence(0.5)
    convergence.record(report(GIB, 10.0, flush=30.0))
    assert look(convergence, 0).within_budget


def test_a_growing_round_is_judged_by_what_it_becomes() -> None:
    convergence = measured()
    # 40 MiB take 0.4 s to send, but in 0.1 s they were dirtied: four times as much comes next.
    assert look(convergence, 40 * MIB, since=1.0).within_budget
    assert not look(convergence, 40 * MIB, since=0.1).within_budget


def test_what_was_held_back_is_left_to_send_but_is_no_new_writing() -> None:
    convergence, other = measured(), measured()
    held = convergence.look(10 * MIB, 0.0, 1.0, 0.0, marked_bytes=MIB)
    assert held.dirty_rate_bytes_per_second == pytest.approx(MIB)
    assert held.predicted_downtime_seconds == look(other, 10 * MIB).predicted_downtime_seconds
    # Only what is written grows while it is sent: 8 MiB a second in 0.4 s.
    grown = measured().look(40 * MIB, 0.0, 0.1, 0.0, marked_bytes=MIB)
    assert grown.predicted_downtime_seconds == pytest.approx(0.43, rel=0.1)


@pytest.mark.parametrize("budget", [0.1, 0.5, 60.0])
def test_what_may_be_held_back_goes_out_in_its_share_of_the_budget(budget: float) -> None:
    assert Convergence(budget).hold_bytes() == 0
    assert measured(budget).hold_bytes() == pytest.approx(HOLD * budget * 100 * MIB, rel=0.1)
    limited = measured(budget, limit=10 * MIB).hold_bytes()
    assert limited == pytest.approx(HOLD * budget * 10 * MIB, rel=0.1)


def test_wait_is_none_before_the_first_look_and_while_much_is_left() -> None:
    convergence = measured()
    assert convergence.wait_seconds(5.0) == 0.0
    look(convergence, GIB, now=5.0)
    assert convergence.wait_seconds(15.0) == 0.0
    # Small but not within budget: no spinning.
    assert convergence.wait_seconds(5.0) == MIN_CYCLE_SECONDS


def test_wait_is_bounded_by_the_budget_not_by_the_guest() -> None:
    idle = measured(budget=0.5)
    look(idle, 0, now=1.0)
    # A guest that wakes up in this time writes no more than the link sends within the budget.
    assert 0.1 < idle.wait_seconds(1.0) < 0.25
    patient = measured(budget=60.0)
    look(patient, 0, now=1.0)
    assert patient.wait_seconds(1.0) == MAX_WAIT_SECONDS
    patient.look(0, 1.0, 10.0, 5.0)
    assert patient.wait_seconds(1.0) == 5.0


def test_a_clock_that_stands_still_does_no_harm() -> None:
    convergence = Convergence(0.5)
    convergence.record(report(MIB, 0.0, flush=0.0))
    convergence.record(report(MIB, 0.0, flush=0.0))
    verdict = look(convergence, MIB, since=0.0)
    assert verdict.predicted_downtime_seconds is not None
    assert verdict.dirty_rate_bytes_per_second is None


SIZES = st.integers(0, 1 << 50)
TIMES = st.floats(-1.0, 1e6)
REPORTS = st.builds(
    RoundReport, st.integers(0, 99), SIZES, SIZES, TIMES, TIMES, TIMES, TIMES, TIMES
)
LOOKS = st.tuples(SIZES, TIMES, TIMES, TIMES)
LIMITS = st.none() | st.integers(0, 1 << 40)


EMPTY = RoundReport(0, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0)


@settings(max_examples=200)
@example(1.0, None, [EMPTY, EMPTY, (1 << 40, 0.0, 1e-300, 24.0)])
@given(st.floats(1e-3, 1e4), LIMITS, st.lists(REPORTS | LOOKS | LIMITS, max_size=30))
def test_nothing_makes_it_stumble(
    budget: float, limit: int | None, events: list[RoundReport | tuple[int, float, float, float]]
) -> None:
    convergence = Convergence(budget, limit_bytes_per_second=limit)
    streak = 0
    for event in events:
        if isinstance(event, RoundReport):
            convergence.record(event)
        elif isinstance(event, tuple):
            verdict = convergence.look(*event)
            assert math.isfinite(verdict.dirty_rate_bytes_per_second or 0.0)
            predicted = verdict.predicted_downtime_seconds
            assert predicted is None or (math.isfinite(predicted) and predicted >= 0)
            assert verdict.within_budget is (predicted is not None and predicted <= budget)
            streak = streak + 1 if verdict.within_budget else 0
            assert verdict.converged is (streak >= 2)
            assert 0 <= convergence.wait_seconds(event[1]) < math.inf
        else:
            convergence.change_limit(event)


@given(st.lists(st.tuples(st.integers(1, 1 << 40), st.floats(1e-4, 1e4)), min_size=1, max_size=20))
def test_larger_never_takes_shorter_in_the_fit(rounds: list[tuple[int, float]]) -> None:
    estimate = Estimate()
    for size, seconds in rounds:
        estimate.record(Sample(size, size, seconds, 0.0))
    line = estimate.line()
    assert line.latency_seconds >= 0
    assert line.seconds_per_byte > 0
    # The last rounds are covered: what they took is not predicted to take less.
    for size, seconds in rounds[1:][-4:]:
        assert estimate.send_seconds(size) >= seconds * (1 - 1e-9)
