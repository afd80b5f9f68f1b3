"""batch and extents against runs found block by block."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native.bitmap import DirtyBitmap
from tests.native.bitmap_twin import ENDLESS, block_sets, geometries, runs


@given(st.data())
def test_batches_are_what_the_twin_finds(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    blocks = data.draw(block_sets(geometry))
    bitmap, unit = geometry.bitmap(blocks), geometry.block_bytes
    gap = data.draw(st.integers(0, 70 * unit))
    max_bytes = data.draw(st.integers(unit, 200 * unit))
    max_extents = data.draw(st.integers(1, 20))
    start = data.draw(st.integers(0, geometry.block_count - 1))
    covered: set[int] = set()
    going: int | None = start
    while going is not None:
        pairs, next_bytes = bitmap.batch(
            going * unit, gap_bytes=gap, max_bytes=max_bytes, max_extents=max_extents
        )
        expected, going = runs(
            blocks,
            going,
            gap // unit,
            max_total=max_bytes // unit,
            max_extents=max_extents,
        )
        flat = [value for run in expected for value in geometry.to_bytes(*run)]
        assert (pairs.typecode, pairs.tolist()) == ("Q", flat)
        assert next_bytes == (geometry.size_bytes if going is None else going * unit)
        found = {block for run in expected for block in range(*run)}
        assert sum(pairs[1::2]) <= max_bytes
        assert not covered & found
        covered |= found
    marks = {block for block in blocks if block >= start}
    assert marks <= covered if gap >= unit else marks == covered


@given(st.data())
def test_extents_are_what_the_twin_finds(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    blocks = data.draw(block_sets(geometry))
    unit = geometry.block_bytes
    gap = data.draw(st.integers(0, 70 * unit))
    longest = data.draw(st.one_of(st.just(0), st.integers(unit, 200 * unit)))
    found = geometry.bitmap(blocks).extents(gap_bytes=gap, max_length_bytes=longest)
    expected, _ = runs(
        blocks,
        0,
        gap // unit,
        max_length=longest // unit or ENDLESS,
        max_total=ENDLESS,
        max_extents=ENDLESS,
    )
    assert list(found) == [geometry.to_bytes(*run) for run in expected]


def test_a_gap_is_bridged_up_to_the_limit_and_no_further() -> None:
    bitmap = DirtyBitmap(10 * 4096)
    bitmap.set_range(4096, 1)
    bitmap.set_range(4 * 4096, 1)
    assert list(bitmap.extents(gap_bytes=2 * 4096 - 1)) == [(4096, 4096), (4 * 4096, 4096)]
    assert list(bitmap.extents(gap_bytes=2 * 4096)) == [(4096, 4 * 4096)]


def test_more_extents_than_one_call_collects_are_all_found() -> None:
    bitmap = DirtyBitmap(5000 * 4096)
    for block in range(0, 5000, 2):
        bitmap.set_range(block * 4096, 1)
    assert list(bitmap.extents()) == [(block * 4096, 4096) for block in range(0, 5000, 2)]
    pairs, _ = bitmap.batch(0, max_bytes=1 << 30, max_extents=1 << 40)
    assert pairs.tolist()[::2] == [block * 4096 for block in range(0, 5000, 2)]


def test_nothing_marked_is_an_empty_batch_at_the_end() -> None:
    bitmap = DirtyBitmap(5000)
    assert bitmap.batch(0)[0].tolist() == []
    assert bitmap.batch(0)[1] == 5000
    assert bitmap.batch(5000)[1] == 5000
    assert list(bitmap.extents()) == []


@pytest.mark.parametrize(
    ("start", "options"),
    [
        (1, {}),
        (-4096, {}),
        (4096 * 3, {}),
        (0, {"max_bytes": 4095}),
        (0, {"max_extents": 0}),
        (0, {"gap_bytes": -1}),
    ],
)
def test_a_batch_that_could_not_go_on_is_refused(start: int, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"_\w+ is -?\d+"):
        DirtyBitmap(8192).batch(start, **options)


@pytest.mark.parametrize("options", [{"max_length_bytes": 4095}, {"gap_bytes": -1}])
def test_extents_that_could_not_go_on_are_refused_at_once(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        DirtyBitmap(8192).extents(**options)
