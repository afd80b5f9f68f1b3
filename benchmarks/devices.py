"""Block devices to measure on: loop devices over files in memory, always removed again."""

from __future__ import annotations

import os
import random
import shutil
import string
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from agent.tracker.choice import ebpf_obstacle
from benchmarks.measure import ImpossibleError
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer

SCRATCH = Path("/dev/shm")
"""Memory: what is measured is the software, not a disk."""

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_TEXT = b"The quick brown fox jumps over the lazy dog, round after round, 0123456789.\n"
_PIECES = 10
_SEED = 20
_VOCABULARY = 5000
_TEXT_PIECES = 8


def run(*command: str) -> str:
    """Run a command to its end and return its output; RuntimeError with its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr}")
    return done.stdout.strip()


def require_tools(*names: str) -> None:
    """Raise ImpossibleError unless all these commands are there."""
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        raise ImpossibleError(f"not installed: {', '.join(missing)}")


def require_devices(memory_bytes: int) -> None:
    """Raise ImpossibleError unless loop devices over this much memory can be made."""
    if os.geteuid() != 0:
        raise ImpossibleError("needs root for loop devices")
    require_tools("losetup", "blkdiscard", "blockdev")
    if not SCRATCH.is_dir():
        raise ImpossibleError(f"there is no {SCRATCH}")
    free = min(shutil.disk_usage(SCRATCH).free, _available_memory())
    if free < memory_bytes:
        raise ImpossibleError(
            f"needs {memory_bytes / GIB:.1f} GiB of memory, {free / GIB:.1f} are free"
        )


def require_ebpf() -> None:
    """Raise ImpossibleError unless the ebpf tracker can work here."""
    if obstacle := ebpf_obstacle():
        raise ImpossibleError(f"no ebpf tracker: {obstacle}")


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory in memory, removed with all that is in it."""
    path = Path(tempfile.mkdtemp(prefix="warmsync-bench-", dir=SCRATCH))
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def loop_device(
    size_bytes: int, fill: Callable[[Path, int], None] | None = None, fill_bytes: int | None = None
) -> Iterator[str]:
    """The path of a loop device with direct I/O; `fill` writes its first `fill_bytes` (all)."""
    with scratch_directory() as directory:
        backing = directory / "disk.img"
        backing.touch()
        os.truncate(backing, size_bytes)
        if fill is not None:
            fill(backing, size_bytes if fill_bytes is None else fill_bytes)
        path = run("losetup", "--find", "--show", "--direct-io=on", str(backing))
        try:
            yield path
        finally:
            # The read-only flag belongs to the device number: the next user would inherit it.
            run("blockdev", "--setrw", path)
            run("losetup", "--detach", path)


def discard(path: str) -> None:
    """Empty a device, so that no contender finds memory that another has paid for."""
    run("blkdiscard", path)


def flush(path: str) -> None:
    """Make durable what was written to a device."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_seconds(path: str, length_bytes: int | None = None) -> float:
    """Return how long dd takes to read a device (its first `length_bytes`) with direct I/O."""
    command = ["dd", f"if={path}", "of=/dev/null", "iflag=direct", "bs=1M", "status=none"]
    if length_bytes is not None:
        command.append(f"count={length_bytes // MIB}")
    started = time.monotonic()
    run(*command)
    return time.monotonic() - started


def check_equal(first: str, second: str) -> None:
    """Compare two devices byte by byte, past the page cache; RuntimeError if they differ."""
    with BlockDevice(first) as one, BlockDevice(second) as other:
        left, right = AlignedBuffer(4 * MIB), AlignedBuffer(4 * MIB)
        size = one.size_bytes()
        for offset in range(0, size, 4 * MIB):
            length = min(4 * MIB, size - offset)
            one.read(offset, memoryview(left)[:length])
            other.read(offset, memoryview(right)[:length])
            if memoryview(left)[:length] != memoryview(right)[:length]:
                raise RuntimeError(f"{first} and {second} differ from {offset} on")


def fill_random(path: Path, size_bytes: int) -> None:
    """Write random bytes, each MiB another."""
    _fill(path, [os.urandom(MIB) for _ in range(64)], size_bytes)


def fill_text(path: Path, size_bytes: int) -> None:
    """Write lines as of a log: words of a vocabulary, some far more often than others, numbers."""
    chance = random.Random(_SEED)
    words = [_word(chance) for _ in range(_VOCABULARY)]
    weights = list(accumulate(1 / rank for rank in range(1, _VOCABULARY + 1)))
    pieces = []
    for _ in range(_TEXT_PIECES):
        text = bytearray()
        while len(text) < MIB:
            line = " ".join(chance.choices(words, cum_weights=weights, k=12))
            text += f"{chance.randrange(10**9)} {line}\n".encode()
        pieces.append(bytes(text[:MIB]))
    _fill(path, pieces, size_bytes)


def _word(chance: random.Random) -> str:
    return "".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 10)))


def fill_mixed(path: Path, size_bytes: int) -> None:
    """Write 70% random, 20% zero (written, not holes) and 10% text, mixed MiB by MiB."""
    text = (_TEXT * (MIB // len(_TEXT) + 1))[:MIB]
    kinds = "RRZRRTRRZR"
    pieces = [
        {"R": os.urandom(MIB), "Z": bytes(MIB), "T": text}[kinds[i % _PIECES]] for i in range(60)
    ]
    _fill(path, pieces, size_bytes)


def _fill(path: Path, pieces: list[bytes], size_bytes: int) -> None:
    with path.open("r+b", buffering=0) as file:
        for index, start in enumerate(range(0, size_bytes, MIB)):
            file.write(pieces[index % len(pieces)][: size_bytes - start])


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
