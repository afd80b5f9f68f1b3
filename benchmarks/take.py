"""How long it takes to take the marks of a 1 TiB volume: a part of every downtime."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from benchmarks.devices import GIB, TIB
from benchmarks.measure import Figure, Options, Spread
from native.bitmap import DirtyBitmap

NAME = "take"
TITLE = "take of a 1 TiB volume's bitmap (32 MiB)"
_BLOCK_BYTES = 4096
_SEED = 20


def measure(options: Options) -> Iterator[Figure]:
    """Yield times and rates of bitmaps that are empty, hold scattered marks, or are full."""
    size = options.pick(TIB, GIB)
    kinds: dict[str, Callable[[DirtyBitmap], None]] = {
        "empty": lambda _: None,
        "1% scattered": _scatter,
        "full": DirtyBitmap.set_all,
    }
    for name, fill in kinds.items():
        seconds = _take(size, fill, options.repeat(15))
        yield Figure(f"{name}: time", "ms", Spread.of(1e3 * one for one in seconds))
        rates = Spread.of(size / _BLOCK_BYTES / 8 / one / 1e9 for one in seconds)
        yield Figure(f"{name}: rate", "GB/s", rates)


def _take(size: int, fill: Callable[[DirtyBitmap], None], count: int) -> list[float]:
    """Return the times of `count` takes of the same marks. Memory is warm, as after a round."""
    template, marks, into = (DirtyBitmap(size, _BLOCK_BYTES) for _ in range(3))
    fill(template)
    into.set_all()
    seconds = []
    for _ in range(count):
        marks.set_all()
        marks.clear()
        marks.merge(template)
        into.clear()
        started = time.perf_counter()
        taken = marks.take(into)
        seconds.append(time.perf_counter() - started)
        if taken != template.count() or into.count() != taken:
            raise RuntimeError(f"{taken} blocks taken of {template.count()}")
    return seconds


def _scatter(bitmap: DirtyBitmap) -> None:
    """Mark 1% of the blocks, each by itself: the most words for as many marks."""
    places = random.Random(_SEED)
    for _ in range(bitmap.block_count // 100):
        bitmap.set_range(places.randrange(bitmap.block_count) * _BLOCK_BYTES, _BLOCK_BYTES)
