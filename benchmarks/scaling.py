"""How the downtime goes with the disk and the network: predicted from what was measured.

Pure arithmetic; docs/scaling.md is its manual. What it returns was never measured. Where it is not
known it leans to the slow side for a warm migration, and to the quick side for a cold copy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

LINK_SHARE = 0.94
"""Of a link's bits, what TCP carries: 1448 of each 1538 bytes that a full Ethernet frame takes."""
SCATTERED_SLOWDOWN = 4
"""Rounds after the first are taken for so much slower, as by the agents (docs/convergence.md)."""


@dataclass(frozen=True, slots=True)
class Warm:
    """What one run measured of a warm migration. Bytes and seconds.

    `fixed_seconds`: of the hand-over, what moves no data. `last_bytes`: sent in it.
    `unread_bytes`: what both ends had to read for the proof, at `read_bytes_per_second`.
    `copy_bytes_per_second`: of the full copy; `write_bytes_per_second`: the guest's.
    """

    fixed_seconds: float
    last_bytes: float
    unread_bytes: float
    read_bytes_per_second: float
    copy_bytes_per_second: float
    write_bytes_per_second: float
    table_seconds: float = 0.0
    """For the tables that grow with the disk: takes of its bitmap, the root over its digests."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A copy of all bytes with the guest off, at its own best speed, and what comes with it."""

    fixed_seconds: float
    copy_bytes_per_second: float


def link_bytes_per_second(gigabits: float) -> float:
    """Return what a link of so many Gbit/s carries of our bytes."""
    return gigabits * 1e9 / 8 * LINK_SHARE


def warm_seconds(warm: Warm, link: float = math.inf) -> float:
    """Return how long the hand-over takes over a link (bytes a second); inf: it never converges.

    The size of the disk is in `table_seconds` only.
    """
    here = warm.copy_bytes_per_second / SCATTERED_SLOWDOWN
    there = min(link, here)
    last = last_bytes(warm, there)
    data = last / there + warm.unread_bytes / warm.read_bytes_per_second
    return warm.fixed_seconds + warm.table_seconds + data


def last_bytes(warm: Warm, rate: float) -> float:
    """Return what the last round has to send at a rate.

    A round lasts as long as the one before was large, and the guest writes meanwhile: what is left
    in the end goes with 1 / (1 - written / sent). inf if it writes as fast as is sent.
    """
    here = warm.copy_bytes_per_second / SCATTERED_SLOWDOWN
    room, room_here = (1 - warm.write_bytes_per_second / one for one in (rate, here))
    if room <= 0:
        return math.inf
    return warm.last_bytes * room_here / room


def follow_seconds(warm: Warm, size_bytes: float, link: float) -> float:
    """Return how long a disk full of data takes to copy beside the guest, with what it writes."""
    rate = min(link, warm.copy_bytes_per_second)
    room = 1 - warm.write_bytes_per_second / rate
    return size_bytes / rate / room if room > 0 else math.inf


def whole_seconds(whole: Whole, size_bytes: float, link: float = math.inf) -> float:
    """Return how long a cold copy of a disk full of data takes over a link (bytes a second)."""
    return whole.fixed_seconds + size_bytes / min(link, whole.copy_bytes_per_second)


def filled(whole: Whole) -> Whole:
    """Return the copy of hosts that are quicker than any link."""
    return replace(whole, copy_bytes_per_second=math.inf)


def fit(warm: Warm, switch_seconds: float) -> Warm:
    """Return the same with what a whole hand-over took here beyond its data as `fixed_seconds`."""
    data = warm_seconds(replace(warm, fixed_seconds=0.0, table_seconds=0.0))
    return replace(warm, fixed_seconds=max(switch_seconds - data, 0.0))
