"""What a warm migration has saved, against a cold copy."""

from __future__ import annotations

import pytest

from agent.estimate import Sample
from agent.migration import DowntimeParts
from agent.saving import cold_copy_seconds

GIB = 1 << 30
PARTS = DowntimeParts(send=3.0, check=0.25, verify=0.5, release=0.25)


@pytest.mark.parametrize(
    ("opening", "total_bytes", "seconds"),
    [
        (Sample(GIB, GIB, 9.0, 1.0), GIB, 11.0),
        (Sample(GIB, GIB, 9.0, 1.0), 4 * GIB, 41.0),
        (Sample(GIB, GIB, 9.0, 1.0), 8 * GIB, 81.0),
        (Sample(GIB, GIB, 9.0, 1.0), 8 * GIB + 1, None),
        (Sample(1 << 20, 1 << 20, 0.1, 0.1), GIB, None),
        (None, GIB, None),
    ],
)
def test_a_cold_copy(opening: Sample | None, total_bytes: int, seconds: float | None) -> None:
    found = cold_copy_seconds(opening, total_bytes, PARTS)
    assert found == (None if seconds is None else pytest.approx(seconds))
