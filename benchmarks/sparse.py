"""Round 0 of a 1 TiB volume with 1 GiB of data: holes are found, not read."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.agents import pair
from benchmarks.devices import (
    GIB,
    MIB,
    TIB,
    discard,
    fill_random,
    loop_device,
    read_seconds,
    require_devices,
    require_ebpf,
)
from benchmarks.measure import Figure, Options, Spread, at_least
from benchmarks.moves import migration

NAME = "sparse"
TITLE = "round 0 of a sparse 1 TiB loop device with 1 GiB of data"


def measure(options: Options) -> Iterator[Figure]:
    """Yield the time, and how often it would fit into reading the whole device with dd."""
    size, data = options.pick(TIB, GIB), options.pick(GIB, 16 * MIB)
    require_devices(2 * data + GIB // 2)
    require_ebpf()
    times, ratios = [], []
    with (
        loop_device(size, fill_random, data) as source,
        loop_device(size) as target,
        pair(source, target) as (sender, receiver),
    ):
        for _ in range(options.repeat(3)):
            discard(target)
            reading = read_seconds(source, data) * size / data
            with migration(sender, receiver, source, target) as move:
                times.append(move.seed_seconds())
            ratios.append(reading / times[-1])
    yield Figure("time", "s", Spread.of(times))
    note = "dd measured over the data"
    yield Figure("time of dd over all to this", "ratio", Spread.of(ratios), at_least(1), note)
