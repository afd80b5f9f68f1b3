"""Heat against a plain twin: a set of blocks for each period."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from agent.heat import PERIOD_SECONDS, PERIODS, Heat
from native.bitmap import DirtyBitmap
from tests.native.bitmap_twin import ENDLESS, Geometry, block_sets, geometries, marked

PLAIN = Geometry(100 * 4096, 4096)


@dataclass
class Twin:
    """Periods as sets, the newest last; the one that is going on apart."""

    periods: list[set[int]] = field(default_factory=list)
    now: set[int] = field(default_factory=set)
    began: float | None = None
    most: int = ENDLESS

    def note(self, blocks: set[int], at: float) -> None:
        self.now |= blocks
        self.began = at if self.began is None else self.began
        if at - self.began >= PERIOD_SECONDS:
            self.periods.append(self.now)
            self.now, self.began, self.most = set(), at, ENDLESS

    def forget(self) -> None:
        self.periods, self.now, self.most = [], set(), ENDLESS

    def hold(self, count: int) -> set[int]:
        """What is hot; what was too much stays out up to the period's end."""
        self.most = min(self.most, count)
        last = self.periods[-PERIODS:]
        hot = set.intersection(*last) if len(last) == PERIODS else set()
        return set(sorted(hot)[: self.most])


def left(heat: Heat, marks: DirtyBitmap, max_bytes: int) -> set[int]:
    heat.subtract_hot(marks, max_bytes)
    return marked(marks)


@given(st.data())
def test_hot_is_what_the_twin_says(data: st.DataObject) -> None:
    geometry = data.draw(geometries(300))
    heat, twin = Heat(geometry.size_bytes, geometry.block_bytes), Twin()
    steps = st.sampled_from([0.0, 0.01, PERIOD_SECONDS / 2, PERIOD_SECONDS, 3.0])
    favourites, at = data.draw(block_sets(geometry)), 0.0
    for step in data.draw(st.lists(steps, max_size=14)):
        at += step
        blocks = favourites | data.draw(block_sets(geometry))
        if data.draw(st.integers(0, 9)) == 0:
            heat.forget()
            twin.forget()
        else:
            heat.note(geometry.bitmap(blocks), at)
            twin.note(blocks, at)
        sent = data.draw(block_sets(geometry)) | favourites
        most = data.draw(st.integers(0, geometry.block_count))
        max_bytes = most * geometry.block_bytes + data.draw(st.integers(0, 511))
        assert left(heat, geometry.bitmap(sent), max_bytes) == sent - twin.hold(most)


def after(*takes: tuple[float, set[int]]) -> set[int]:
    """What is hot after takes of so many blocks at such times."""
    heat = Heat(PLAIN.size_bytes, PLAIN.block_bytes)
    for at, blocks in takes:
        heat.note(PLAIN.bitmap(blocks), at)
    every = set(range(PLAIN.block_count))
    return every - left(heat, PLAIN.bitmap(every), PLAIN.size_bytes)


def test_written_in_every_period_is_hot() -> None:
    assert after(*((at / 2, {7, at}) for at in range(PERIODS))) == set()
    assert after(*((at / 2, {7, at}) for at in range(PERIODS + 1))) == {7}


def test_one_period_without_a_write_and_it_goes_out() -> None:
    hot = [(at / 2, {7, 8}) for at in range(PERIODS + 1)]
    assert after(*hot, (9.0, {8})) == {8}


def test_takes_in_quick_succession_are_one_period() -> None:
    """A short round finds few of the blocks that are hot: it does not make the others cold."""
    hot = [(at / 2, {7, 8}) for at in range(PERIODS + 1)]
    quick = [(hot[-1][0] + PERIOD_SECONDS * part / 8, {8}) for part in range(1, 8)]
    assert after(*hot, *quick) == {7, 8}
    assert after(*((at / 1e3, {7}) for at in range(50))) == set()
