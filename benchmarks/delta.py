"""The last changes: 1% of a device that is in sync, in scattered blocks, until both are equal.

What is timed. Ours: the migration is converged and paused, the blocks are written (tracking goes
on), then the clock starts, the migration is resumed and the cutover asked for, and it stops when
the cutover has answered: taken, sent, durable, checked, source fenced, target released. rsync: its
client from start to end, `--fsync` included; it does not know what has changed and finds out, from
digests (delta) or by sending all. The C loop: from the first read to the end of the flush, no more
than reading and writing these blocks on one host.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import urandom

from benchmarks import cloop, rsync
from benchmarks.agents import Agent, pair
from benchmarks.devices import (
    GIB,
    MIB,
    check_equal,
    fill_mixed,
    loop_device,
    require_devices,
    require_ebpf,
)
from benchmarks.measure import Figure, Options, Spread, at_least, at_most
from benchmarks.moves import migration
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer

NAME = "delta"
TITLE = "1% of a device in sync changed in scattered 4 KiB blocks, until both are equal again"
_BLOCK_BYTES = 4096
_PER_CENT = 100
_WAIT_SECONDS = 120.0

Runs = dict[str, list[float]]


def measure(options: Options) -> Iterator[Figure]:
    """Yield times and ratios. Each contender gets a new change of the same blocks."""
    size = options.pick(2 * GIB, 16 * MIB)
    require_devices(2 * size + GIB // 2)
    require_ebpf()
    rsync.require_rsync()
    runs: Runs = {}
    with (
        cloop.delta_loop() as program,
        loop_device(size, fill_mixed) as source,
        loop_device(size) as target,
        pair(source, target) as ends,
    ):
        for turn in range(options.repeat(3)):
            offsets = _choose(size, turn)
            runs.setdefault("warmsync", []).append(_migrate(ends, source, target, offsets))
            peers = {
                "C loop": partial(cloop.delta_seconds, program, source, target, offsets),
                "rsync-delta": partial(_synchronise, source, target, delta=True),
                "rsync": partial(_synchronise, source, target, delta=False),
            }
            for name, carry in peers.items():
                runs.setdefault(name, []).append(_carry(carry, source, target, offsets))
    yield from _figures(runs)


def _choose(size_bytes: int, seed: int) -> list[int]:
    """Return where to write: sorted, so that the loop reads and writes forwards."""
    blocks = size_bytes // _BLOCK_BYTES
    chosen = random.Random(seed).sample(range(blocks), -(-blocks // _PER_CENT))
    return [block * _BLOCK_BYTES for block in sorted(chosen)]


def _change(path: str, offsets: Sequence[int]) -> None:
    """Write random blocks, past the page cache, in no order."""
    buffer = AlignedBuffer(_BLOCK_BYTES)
    shuffled = random.Random(0).sample(offsets, len(offsets))
    with BlockDevice(path, writable=True) as device:
        for offset in shuffled:
            memoryview(buffer)[:] = urandom(_BLOCK_BYTES)
            device.write(offset, buffer)


def _migrate(ends: tuple[Agent, Agent], source: str, target: str, offsets: list[int]) -> float:
    with migration(*ends, source, target) as move:
        move.converged_seconds(_WAIT_SECONDS)
        move.pause()
        _change(source, offsets)
        before = move.look().progress.sent_bytes
        started = time.monotonic()
        move.resume()
        done = move.cut_over()
        seconds = time.monotonic() - started
        if (sent := done.progress.sent_bytes - before) < len(offsets) * _BLOCK_BYTES:
            raise RuntimeError(f"only {sent} bytes sent for {len(offsets)} blocks")
        check_equal(source, target)
    return seconds


def _synchronise(source: str, target: str, *, delta: bool) -> float:
    return rsync.contender(delta=delta).copy(source, target).seconds


def _carry(carry: Callable[[], float], source: str, target: str, offsets: list[int]) -> float:
    _change(source, offsets)
    seconds = carry()
    check_equal(source, target)
    return seconds


def _figures(runs: Runs) -> Iterator[Figure]:
    ours = runs["warmsync"]
    best = [min(pair) for pair in zip(runs["rsync"], runs["rsync-delta"], strict=True)]
    speeds = Spread.of(theirs / own for theirs, own in zip(best, ours, strict=True))
    yield Figure("speed against the best rsync", "ratio", speeds, at_least(20))
    times = Spread.of(own / loop for own, loop in zip(ours, runs["C loop"], strict=True))
    yield Figure("time to the C loop's", "ratio", times, at_most(2))
    for name, seconds in runs.items():
        yield Figure(f"{name}: time", "ms", Spread.of(1e3 * one for one in seconds))
