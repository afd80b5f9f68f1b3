"""Rounds under guests that write single blocks: what holding hot blocks back saves, and costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from agent import disk as disk_module
from agent.disk import SourceDisk, open_source
from agent.heat import PERIOD_SECONDS
from agent.migration import Scheme, Volume
from agent.rounds import HOLD
from agent.tracker.memory import MemoryTracker
from tests.agent.block_simulation import (
    BlockWorld,
    Cycle,
    Writer,
    all_of,
    every,
    hot_and_cold,
    random_writes,
    sequential_writes,
    while_,
)
from tests.agent.simulation import BLOCK, MIB, Link

SIZE = 1024 * MIB
BLOCKS = SIZE // BLOCK
LINK = Link(600 * MIB)
SECONDS = 6.0
BUDGETS = [0.5, 0.1]

GUESTS = {
    "idle": while_(lambda _: False, every(1, 0, 1)),
    "5 MiB/s": hot_and_cold(5 * MIB, SIZE),
    "20 MiB/s": hot_and_cold(20 * MIB, SIZE),
    "80 MiB/s": hot_and_cold(80 * MIB, SIZE),
    "sequential": sequential_writes(60 * MIB, 0, BLOCKS),
    "bursts": while_(lambda tick: tick % 300 < 50, hot_and_cold(80 * MIB, SIZE)),
    "journal": all_of(
        sequential_writes(10 * MIB, 1000, 5096),
        every(1, 0, 64),
        random_writes(5 * MIB, 0, BLOCKS),
    ),
    "pages": all_of(every(10, 0, 2000), random_writes(5 * MIB, 0, BLOCKS)),
}
STEADILY_HOT = ("journal", "pages")


@contextmanager
def volume(directory: Path) -> Iterator[SourceDisk]:
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    opened = open_source(Volume(str(image), str(image)), (str(image),))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            disk_module,
            "make_tracker",
            lambda scheme, device, block, pins, store, *, size_bytes: MemoryTracker(
                size_bytes, block
            ),
        )
        disk = SourceDisk(opened, Scheme.EBPF, BLOCK, directory)
    try:
        disk.start()
        yield disk
    finally:
        disk.close()


@dataclass(frozen=True)
class Played:
    budget: float
    sent_bytes: int
    cycles: list[Cycle]

    @property
    def settled(self) -> list[Cycle]:
        """The second half: what was hot from the start is known to be."""
        return self.cycles[len(self.cycles) // 2 :]

    @property
    def downtime_seconds(self) -> float:
        return median(cycle.downtime_seconds for cycle in self.settled)

    @property
    def sent_a_second(self) -> float:
        seconds = self.settled[-1].at - self.settled[0].at
        return sum(cycle.sent_bytes for cycle in self.settled[:-1]) / seconds


def play(directory: Path, guest: Writer, budget: float, *, holds: bool) -> Played:
    with volume(directory) as disk:
        world = BlockWorld(disk, guest, LINK, budget, holds)
        world.open()
        cycles = list(world.cycles(SECONDS))
        return Played(budget, world.sent_bytes, cycles)


@pytest.fixture(scope="module", params=[(name, budget) for name in GUESTS for budget in BUDGETS])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Played, Played]:
    """A guest's name; played without and with holding back."""
    name, budget = request.param
    directory = tmp_path_factory.mktemp("disk")
    without = play(directory, GUESTS[name], budget, holds=False)
    return name, without, play(directory, GUESTS[name], budget, holds=True)


def test_holding_never_sends_more(both: tuple[str, Played, Played]) -> None:
    name, without, held = both
    assert held.sent_bytes <= without.sent_bytes * 1.01
    if name in STEADILY_HOT:
        assert held.sent_a_second < 0.95 * without.sent_a_second


def test_it_costs_less_than_its_share_of_the_budget(both: tuple[str, Played, Played]) -> None:
    _, without, held = both
    assert held.downtime_seconds <= without.downtime_seconds + HOLD * held.budget


def test_it_converges_all_the_same(both: tuple[str, Played, Played]) -> None:
    for played in both[1:]:
        flags = [cycle.verdict.converged for cycle in played.cycles]
        assert flags.index(True) <= 3
        assert all(flags[flags.index(True) :])


def test_the_prediction_counts_what_is_held(both: tuple[str, Played, Played]) -> None:
    name, _, held = both
    for cycle, after in pairwise(held.settled):
        predicted = after.verdict.predicted_downtime_seconds
        assert predicted is not None
        if name not in ("idle", "bursts"):
            assert predicted >= 0.8 * cycle.downtime_seconds


def test_what_cools_down_goes_out(tmp_path: Path) -> None:
    until = 500
    guest = while_(lambda tick: tick < until, every(1, 0, 500))
    cycles = play(tmp_path, guest, 0.5, holds=True).cycles
    assert any(cycle.held_bytes == 500 * BLOCK for cycle in cycles)
    late = [cycle for cycle in cycles if cycle.at > until / 100 + 3 * PERIOD_SECONDS]
    assert late
    assert all(cycle.held_bytes == 0 for cycle in late)
