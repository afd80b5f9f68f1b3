"""Resident memory: of both agents while they move 1 TiB, over rounds, and of the scan's table."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.extent import pack
from agent.tracker.scan import ScanTracker
from benchmarks.agents import Agent, pair
from benchmarks.devices import (
    GIB,
    MIB,
    TIB,
    fill_random,
    loop_device,
    require_devices,
    require_ebpf,
    scratch_directory,
)
from benchmarks.measure import Figure, Options, Spread, at_most
from benchmarks.moves import Move, migration
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES
from native.frame import MAX_PAYLOAD_BYTES, gather

NAME = "memory"
TITLE = "resident memory: a 1 TiB sparse loop device with the ebpf tracker; the scan's table"
_SETTLED_ROUNDS = 10
_WRITE_SECONDS = 0.001
_PAGE_BYTES = 4096


def measure(options: Options) -> Iterator[Figure]:
    """Yield peaks of both agents, growth over rounds, and the scan tracker's bytes a chunk."""
    size, data = options.pick(TIB, GIB), options.pick(GIB, 16 * MIB)
    require_devices(2 * data + GIB)
    require_ebpf()
    with (
        loop_device(size, fill_random, data) as source,
        loop_device(size) as target,
        pair(source, target) as ends,
        migration(*ends, source, target) as move,
    ):
        move.seed_seconds()
        with _writing(source, data):
            yield from _growth(ends, move, options.pick(60, 3))
    yield _table(options.pick(64 * 1024, 2048))


def _growth(ends: tuple[Agent, Agent], move: Move, rounds: int) -> Iterator[Figure]:
    """Compare resident memory after a few rounds and after many more."""
    first = _await_rounds(move, _SETTLED_ROUNDS)
    early = [end.resident_bytes() for end in ends]
    last = _await_rounds(move, first + rounds)
    late = [end.resident_bytes() for end in ends]
    for name, end in zip(("source", "target"), ends, strict=True):
        yield Figure(f"{name}: peak", "MiB", _one(end.peak_bytes() / MIB), at_most(200))
    for name, before, after in zip(("source", "target"), early, late, strict=True):
        note = f"rounds {first} to {last}"
        yield Figure(f"{name}: growth", "MiB", _one((after - before) / MIB), at_most(2), note)


def _await_rounds(move: Move, rounds: int) -> int:
    return int(move.wait(lambda one: one.progress.rounds >= rounds, 300).progress.rounds)


@contextmanager
def _writing(path: str, span_bytes: int) -> Iterator[None]:
    """A guest that writes 4 KiB blocks at random, about 1000 a second, while in the block."""
    stop, failures = threading.Event(), []

    def write() -> None:
        places, block = random.Random(1), AlignedBuffer(_PAGE_BYTES)
        try:
            with BlockDevice(path, writable=True) as device:
                while not stop.wait(_WRITE_SECONDS):
                    memoryview(block)[:8] = places.randbytes(8)
                    device.write(places.randrange(span_bytes // _PAGE_BYTES) * _PAGE_BYTES, block)
        except OSError as error:
            failures.append(error)

    guest = threading.Thread(target=write, name="guest")
    guest.start()
    try:
        yield
    finally:
        stop.set()
        guest.join()
    if failures:
        raise failures[0]


def _table(chunks: int) -> Figure:
    """What the scan tracker's table takes, once all chunks were read for sending.

    Each chunk holds 4 KiB of data only, so that a table of many pages needs little memory beside.
    """
    with scratch_directory() as directory:
        image = directory / "disk.img"
        with image.open("wb") as file:
            for index in range(chunks):
                file.seek(index * CHUNK_BYTES)
                file.write(random.Random(index).randbytes(_PAGE_BYTES))
            file.truncate(chunks * CHUNK_BYTES)
        with BlockDevice(str(image)) as device:
            grown = _fill_table(device)
    per_chunk = _one(grown / chunks)
    note = f"{chunks} chunks"
    return Figure("scan: table, a chunk with data", "bytes", per_chunk, at_most(16.5), note)


def _fill_table(device: BlockDevice) -> int:
    """Read everything as for sending; return how many bytes this process grew."""
    scratch, size = AlignedBuffer(MAX_PAYLOAD_BYTES), device.size_bytes()
    tracker = ScanTracker(device)
    tracker.start()
    try:
        _gather(device, scratch, tracker, 0)  # what the first call needs once is not the table's
        before = _anonymous_bytes()
        for offset in range(0, size, MAX_PAYLOAD_BYTES):
            _gather(device, scratch, tracker, offset)
        return _anonymous_bytes() - before
    finally:
        tracker.stop()


def _gather(device: BlockDevice, scratch: AlignedBuffer, tracker: ScanTracker, offset: int) -> None:
    length = min(MAX_PAYLOAD_BYTES, device.size_bytes() - offset)
    extents = pack([(offset, length)])
    gather(device, extents, scratch, volume=0, generation=1, sequence=1, digests=tracker.digests)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("this kernel does not tell RssAnon")


def _one(value: float) -> Spread:
    return Spread.of([value])
