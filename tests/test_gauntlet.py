"""A short gauntlet: some schedules of each kind. `make gauntlet` plays on."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.devices import require, scratch_directory
from tests.gauntlet.field import play
from tests.gauntlet.schedule import CUTOVER_FAULTS, FAULTS, schedule
from tests.native.tracking import bpffs

SEEDS = range(1, 9)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_schedule_is_survived(seed: int) -> None:
    require("root", "loop", "bpf", "nbdkit")
    plan = schedule(seed)
    print(plan)
    with bpffs() as pins, scratch_directory() as directory:
        assert play(plan, directory, pins) in ("cut over", "cancelled", "failed")


def test_every_fault_happens() -> None:
    plans = [schedule(seed) for seed in range(200)]
    met = Counter(fault.kind for plan in plans for fault in plan.faults)
    assert set(met) == set(FAULTS)
    assert {plan.cutover_fault for plan in plans} == set(CUTOVER_FAULTS)
    assert {plan.carrier for plan in plans} == {"tcp", "grpc"}
    assert {plan.tls for plan in plans} == {True, False}
    assert schedule(7) == schedule(7)
