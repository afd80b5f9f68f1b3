"""Plans that are wrong whatever the hosts look like."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import InvalidArgument
from agent.migration import GuestThrottle, Identity, Plan, Volume, check_id, check_plan

PLAN = Plan("web1", "peer:1", (Volume("/dev/a", "/dev/b"),))


def test_a_good_plan() -> None:
    check_plan(PLAN)
    check_plan(replace(PLAN, block_size_bytes=16 << 20, limit_bytes_per_second=1))
    check_plan(replace(PLAN, guest_throttle=GuestThrottle("/sys/fs/cgroup/vm", 1)))
    check_plan(replace(PLAN, volumes=(*PLAN.volumes, Volume("/dev/c", "/dev/a"))))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": ""}, "INVALID_ID"),
        ({"id": "a/b"}, "INVALID_ID"),
        ({"id": ".hidden"}, "INVALID_ID"),
        ({"id": "x" * 64}, "INVALID_ID"),
        ({"id": "web1\n"}, "INVALID_ID"),
        ({"volumes": ()}, "NO_VOLUMES"),
        ({"volumes": (Volume("a", "/b"),)}, "INVALID_PATH"),
        ({"volumes": (Volume("/a", ""),)}, "INVALID_PATH"),
        ({"volumes": (Volume("/a", "/b"), Volume("/a", "/c"))}, "DUPLICATE_DEVICE"),
        ({"volumes": (Volume("/a", "/c"), Volume("/b", "/c"))}, "DUPLICATE_DEVICE"),
        ({"block_size_bytes": 0}, "INVALID_BLOCK_SIZE"),
        ({"block_size_bytes": 2048}, "INVALID_BLOCK_SIZE"),
        ({"block_size_bytes": 5000}, "INVALID_BLOCK_SIZE"),
        ({"block_size_bytes": -4096}, "INVALID_BLOCK_SIZE"),
        ({"block_size_bytes": 32 << 20}, "INVALID_BLOCK_SIZE"),
        ({"max_downtime_seconds": 0.0}, "INVALID_BUDGET"),
        ({"max_downtime_seconds": -1.0}, "INVALID_BUDGET"),
        ({"max_downtime_seconds": float("inf")}, "INVALID_BUDGET"),
        ({"max_downtime_seconds": float("nan")}, "INVALID_BUDGET"),
        ({"limit_bytes_per_second": -1}, "INVALID_LIMIT"),
        ({"guest_throttle": GuestThrottle("vm", 1)}, "INVALID_PATH"),
        ({"guest_throttle": GuestThrottle("", 1)}, "INVALID_PATH"),
        ({"guest_throttle": GuestThrottle("/vm", 0)}, "INVALID_GUEST_THROTTLE"),
        ({"guest_throttle": GuestThrottle("/vm", -1)}, "INVALID_GUEST_THROTTLE"),
    ],
    ids=str,
)
def test_a_bad_plan(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_plan(replace(PLAN, **changes))  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_ids() -> None:
    for name in ("a", "0", "vm-1.disk_2", "x" * 63):
        check_id(name)


spans = st.tuples(st.integers(0, 30), st.integers(0, 10))


@given(spans, spans)
def test_identities_overlap_where_they_share_a_byte(
    one: tuple[int, int], other: tuple[int, int]
) -> None:
    a, b = Identity("block:8:0", *one), Identity("block:8:0", *other)
    shared = set(range(one[0], sum(one))) & set(range(other[0], sum(other)))
    if one[1] and other[1]:
        assert a.overlaps(b) == b.overlaps(a) == bool(shared)
    assert not a.overlaps(Identity("block:8:16", *one))
