"""Extents against a set of bytes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from agent.extent import align, complement, cut, pack, pairs, total_bytes

SIZE = 200


@st.composite
def ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Ascending, disjoint, not empty; some of them touch."""
    bounds = sorted(draw(st.sets(st.integers(0, SIZE), max_size=20)))
    found = [(a, b - a) for a, b in itertools.pairwise(bounds)]
    keep = draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found)))
    return [one for one, kept in zip(found, keep, strict=True) if kept]


def covered(found: list[tuple[int, int]]) -> set[int]:
    return {at for offset, length in found for at in range(offset, offset + length)}


@given(ranges())
def test_there_and_back(found: list[tuple[int, int]]) -> None:
    packed = pack(found)
    assert packed.typecode == "Q"
    assert list(pairs(packed)) == found
    assert total_bytes(packed) == len(covered(found))


@given(ranges())
def test_complement(found: list[tuple[int, int]]) -> None:
    rest = list(complement(found, SIZE))
    assert covered(rest) == set(range(SIZE)) - covered(found)
    assert all(length > 0 for _, length in rest)
    # Maximal: no two of them touch.
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(rest))


@given(ranges(), st.integers(1, 50))
def test_cut(found: list[tuple[int, int]], most: int) -> None:
    pieces = list(cut(found, most))
    assert sum(length for _, length in pieces) == len(covered(found))
    assert covered(pieces) == covered(found)
    assert all(0 < length <= most for _, length in pieces)
    assert pieces == sorted(pieces)


@given(ranges(), st.integers(1, 64))
def test_align(found: list[tuple[int, int]], unit: int) -> None:
    grown = list(align(found, unit, SIZE))
    touched = {at // unit for at in covered(found)}
    assert covered(grown) == {at for at in range(SIZE) if at // unit in touched}
    assert all(offset % unit == 0 for offset, _ in grown)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(grown))


def test_nothing() -> None:
    assert list(complement([], 0)) == []
    assert list(complement([], 5)) == [(0, 5)]
    assert list(align([], 4, 10)) == list(cut([], 1)) == []
