"""The in-kernel bitmap marks all that was written and, where that is simple, nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import devices
from tests.devices import FaultyDevice, LoopDevice
from tests.guest import finish, fio
from tests.native.tracking import (
    BLOCK,
    MIB,
    Tracked,
    content,
    differing,
    flush,
    read_direct,
    touched,
    write_direct,
)

SIZE = 64 * MIB
WRITES = ["--rw=randwrite", "--bssplit=4k/60:16k/20:64k/10:512k/10", "--numjobs=2"]
WRITES += ["--io_size=24m"]
Track = Callable[..., Tracked]
Loop = Callable[..., LoopDevice]


@pytest.fixture(params=["loop512", "loop4096", "partition", "zram"])
def path(request: pytest.FixtureRequest, resources: object) -> str:
    """A device of each kind: request-based, with both sector sizes, not at 0, and bio-based."""
    if request.param == "zram":
        return str(request.getfixturevalue("zram_device")(SIZE))
    loop: Loop = request.getfixturevalue("loop_device")
    if request.param == "partition":
        return loop(2 * SIZE, partitions=True).partitions[1]
    return loop(SIZE, sector_size=int(request.param.removeprefix("loop"))).path


def test_direct_writes_mark_exactly_their_blocks(path: str, track: Track) -> None:
    tracked = track(path)
    expected = set()
    last = tracked.size // BLOCK * BLOCK - BLOCK
    for offset, length in ((0, BLOCK), (7 * BLOCK, 3 * BLOCK), (5 * MIB, MIB), (last, BLOCK)):
        write_direct(path, offset, length)
        expected |= touched(offset, length)
    assert tracked.marked() == expected
    assert tracked.marked() == set()
    assert tracked.kernel.counters() == (1, 0)


def test_buffered_writes_mark_once_they_are_flushed(path: str, track: Track) -> None:
    tracked = track(path)
    with open(path, "r+b") as file:
        for offset in (3 * BLOCK + 17, 9 * MIB):
            file.seek(offset)
            file.write(b"warm" * 2000)
    expected = touched(3 * BLOCK + 17, 8000) | touched(9 * MIB, 8000)
    marked = tracked.marked()
    assert expected <= marked
    # The page cache writes whole pages, of which a block may hold several.
    assert len(marked) <= len(expected) + 2


def test_reads_mark_nothing_and_show_that_the_disk_is_seen(path: str, track: Track) -> None:
    tracked = track(path)
    assert tracked.kernel.counters().seen == 0
    read_direct(path, 0, BLOCK)
    assert tracked.kernel.counters() == (1, 0)
    assert tracked.take().count() == 0


def test_discards_and_zeroes_mark_exactly_their_blocks(path: str, track: Track) -> None:
    tracked = track(path)
    # In this order: asked to zero without unmapping, loop devices on tmpfs stop offering to zero.
    for number, command in enumerate(
        (
            ["blkdiscard"],
            ["fallocate", "--punch-hole"],
            ["blkdiscard", "--zeroout"],
            ["fallocate", "--zero-range"],
        )
    ):
        offset, length = (2 + 10 * number) * MIB, (3 + number) * MIB
        devices.run(*command, "--offset", str(offset), "--length", str(length), path)
        assert tracked.marked() == touched(offset, length), command
    assert tracked.kernel.counters().lost == 0


@pytest.mark.parametrize("block", [512, 4096, 65536])
def test_a_sector_marks_the_block_it_lies_in(block: int, loop_device: Loop, track: Track) -> None:
    path = loop_device(SIZE).path
    tracked = track(path, block)
    for sector in (0, 9, 4099, SIZE // 512 - 1):
        write_direct(path, sector * 512, 512)
        assert tracked.marked() == {sector * 512 // block}


def test_a_write_is_clipped_to_the_tracked_range(loop_device: Loop, track: Track) -> None:
    disk = loop_device(SIZE, partitions=True)
    first, second = (track(part) for part in disk.partitions)
    start = second.kernel.watch.start_sector * 512
    assert start % BLOCK, "the second partition is meant to begin at an odd sector"
    write_direct(disk.path, 0, 512)
    assert first.marked() == second.marked() == set()
    # Ends inside the first block of the partition, and begins before it.
    write_direct(disk.path, start - 512, 1024)
    assert second.marked() == {0}
    write_direct(disk.path, 0, SIZE)
    assert first.marked() == touched(0, first.size)
    assert second.marked() == touched(0, second.size)


def test_marks_of_neighbouring_disks_stay_apart(
    loop_device: Loop, zram_device: Callable[[int], str], track: Track
) -> None:
    paths = [loop_device(SIZE).path, loop_device(SIZE, 4096).path, zram_device(SIZE)]
    tracked = [track(path) for path in paths]
    for number, path in enumerate(paths):
        write_direct(path, (number + 1) * MIB, (number + 1) * BLOCK)
    for number, one in enumerate(tracked):
        assert one.marked() == touched((number + 1) * MIB, (number + 1) * BLOCK)


def test_a_discarded_tebibyte_is_marked_to_the_last_block(loop_device: Loop, track: Track) -> None:
    path = loop_device(1 << 40).path
    tracked = track(path)
    devices.run("blkdiscard", path)
    assert tracked.take().count() == (1 << 40) // BLOCK
    assert tracked.kernel.counters().lost == 0


def test_failed_writes_mark(faulty_device: Callable[[int], FaultyDevice], track: Track) -> None:
    device = faulty_device(SIZE)
    tracked = track(device.path)
    with device.failing("pwrite"), pytest.raises(OSError, match="Input/output error"):
        write_direct(device.path, 3 * MIB, 2 * BLOCK)
    # Not exactly: the file under the loop device may have been written in larger pieces.
    assert touched(3 * MIB, 2 * BLOCK) <= tracked.marked()


def test_every_block_that_a_file_system_changes_is_marked(
    path: str, track: Track, mounted: Callable[..., Path]
) -> None:
    before = content(path)
    tracked = track(path)
    root = mounted(path, "ext4", "-o", "discard")
    for number in range(40):
        (root / f"file{number}").write_bytes(os.urandom(20_000 * (number % 7) + 1))
    for number in range(0, 40, 3):
        (root / f"file{number}").unlink()
    guest = fio(str(root / "db"), "--size=8m", "--rw=randwrite", "--bs=4k", "--fsync=32")
    finish(guest)
    os.sync()
    flush(path)
    marked = tracked.marked()
    after = content(path)
    assert differing(before, after) <= marked
    assert tracked.kernel.counters().lost == 0


def zero_pieces(path: str) -> None:
    for number in range(8):
        offset = str(number * 6 * MIB)
        devices.run("blkdiscard", "--zeroout", "--offset", offset, "--length", str(MIB), path)


def trim_at_random(path: str) -> None:
    finish(fio(path, "--rw=randtrimwrite", "--bs=32k", "--io_size=8m"))


def write_through_cache(path: str) -> None:
    finish(fio(path, "--rw=randwrite", "--bs=4k", "--direct=0", "--fsync=16", "--io_size=4m"))


def test_every_block_that_a_storm_changes_is_marked(path: str, track: Track) -> None:
    write_direct(path, 0, SIZE // 2, 0x11)
    before = content(path)
    tracked = track(path)
    # One after the other: a discard is answered with EBUSY while another claims the device or the
    # page cache is being written. Direct writes go on meanwhile.
    for disturb in (zero_pieces, trim_at_random, write_through_cache):
        guest = fio(path, *WRITES)
        disturb(path)
        finish(guest)
    marked = tracked.marked()
    assert differing(before, content(path)) <= marked
    assert tracked.kernel.counters().lost == 0
