"""Takes while the guest writes lose nothing: what a migration relies on.

The copying tests alone would not show what happens to a write that is in flight at a take: memory
answers too fast. The first test holds a write up; the last one lets no completion be seen at all.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from native.bitmap import DirtyBitmap
from tests import devices
from tests.devices import LoopDevice
from tests.guest import finish, fio
from tests.native.tracking import (
    BLOCK,
    MIB,
    Tracked,
    blocks_of,
    content,
    differing,
    flush,
    read_direct,
    touched,
    write_direct,
)

SIZE = 32 * MIB
WORKLOADS = {
    "small": ["--rw=randwrite", "--bs=4k"],
    "mixed": ["--rw=randrw", "--rwmixread=20", "--bssplit=4k/50:32k/30:1m/20", "--numjobs=2"],
    "hot": ["--rw=randwrite", "--bs=4k", "--size=256k", "--numjobs=2"],
    "trims": ["--rw=randtrimwrite", "--bs=16k"],
}
Track = Callable[..., Tracked]


@pytest.fixture(params=["loop", "zram"])
def path(request: pytest.FixtureRequest) -> str:
    if request.param == "zram":
        return str(request.getfixturevalue("zram_device")(SIZE))
    device: LoopDevice = request.getfixturevalue("loop_device")(SIZE)
    return device.path


def copy_marked(path: str, taken: DirtyBitmap, shadow: bytearray) -> None:
    for offset, length in taken.extents(max_length_bytes=MIB):
        shadow[offset : offset + length] = read_direct(path, offset, length)


def follow(tracked: Tracked, guest: subprocess.Popen[str], shadow: bytearray) -> DirtyBitmap:
    """Take and copy while the guest runs, and once more after; return all that was ever marked."""
    union = DirtyBitmap(tracked.size, tracked.block)
    while running := guest.poll() is None or not union.count():
        taken = tracked.take()
        union.merge(taken)
        copy_marked(tracked.path, taken, shadow)
    assert not running
    finish(guest)
    flush(tracked.path)
    taken = tracked.take()
    union.merge(taken)
    copy_marked(tracked.path, taken, shadow)
    return union


def forget_missed(tracked: Tracked) -> set[int]:
    """Forget notes of writes that have all landed; return their blocks, which the last take left.

    The kernel may skip a program (see dirty.bpf.c), also that of a completion.
    """
    inflight = Path("/sys/block") / Path(tracked.path).name / "inflight"
    found: set[int] = set()
    if set(inflight.read_text().split()) == {"0"}:
        for note in tracked.kernel.in_flight():
            found |= touched(note.sector * 512, note.sector_count * 512)
            tracked.kernel.forget(note)
    return found


def await_write_in_flight(path: str) -> None:
    inflight = Path("/sys/block") / Path(path).name / "inflight"
    deadline = time.monotonic() + devices.START_SECONDS
    while inflight.read_text().split()[1] == "0":
        assert time.monotonic() < deadline, "the write was never submitted"


def test_a_write_in_flight_stays_marked_until_it_has_landed(
    loop_device: Callable[[int], LoopDevice],
    mounted: Callable[[str], Path],
    track: Track,
    resources: ExitStack,
) -> None:
    """Its mark alone, once taken, would be lost: the block is read with the old data in it."""
    root = mounted(loop_device(SIZE).path)
    (root / "disk").write_bytes(bytes(MIB))
    path = resources.enter_context(devices.attached(root / "disk"))
    tracked = track(path)
    with ThreadPoolExecutor() as guest:
        # A frozen file system holds up what is written to the device over it.
        devices.run("fsfreeze", "--freeze", root)
        try:
            write = guest.submit(write_direct, path, 5 * BLOCK, BLOCK)
            await_write_in_flight(path)
            assert blocks_of(tracked.take()) == set()
            assert blocks_of(tracked.take()) == {5}
            assert blocks_of(tracked.take()) == {5}
        finally:
            devices.run("fsfreeze", "--unfreeze", root)
        write.result()
    assert blocks_of(tracked.take()) == {5}
    assert blocks_of(tracked.take()) == set()


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_copy_that_follows_the_marks_ends_equal(path: str, track: Track, workload: str) -> None:
    tracked = track(path)
    before = content(path)
    shadow = bytearray(before)
    guest = fio(path, "--runtime=1", "--time_based", *WORKLOADS[workload])
    union = follow(tracked, guest, shadow)
    after = content(path)
    assert differing(bytes(shadow), after) == set()
    # Nothing else was marked since: the guest has stopped.
    missed = forget_missed(tracked)
    assert blocks_of(tracked.take()) <= missed
    changed = differing(before, after)
    assert changed
    assert all(union.is_marked(number * tracked.block) for number in changed)
    assert tracked.kernel.counters().lost == 0


def test_a_write_whose_issue_is_missed_marks_on_completion(
    loop_device: Callable[[int], LoopDevice], track: Track
) -> None:
    path = loop_device(SIZE).path
    tracked = track(path)
    (Path(str(tracked.kernel.pin_dir)) / "link_0").unlink()
    write_direct(path, 7 * BLOCK, 2 * BLOCK)
    assert tracked.kernel.in_flight() == []
    assert blocks_of(tracked.take()) == {7, 8}


@pytest.mark.parametrize("workload", WORKLOADS)
def test_writes_whose_completion_is_missed_stay_marked(
    loop_device: Callable[[int], LoopDevice], track: Track, workload: str
) -> None:
    """The kernel may skip a program (see dirty.bpf.c): here it never runs on a completion."""
    path = loop_device(SIZE).path
    tracked = track(path)
    (Path(str(tracked.kernel.pin_dir)) / "link_1").unlink()
    shadow = bytearray(content(path))
    guest = fio(path, "--runtime=1", "--time_based", *WORKLOADS[workload])
    follow(tracked, guest, shadow)
    # The last writes are marked by the take before, as in flight.
    copy_marked(path, tracked.take(), shadow)
    assert differing(bytes(shadow), content(path)) == set()
    # The notes of the last writes are still there: no completion took them away.
    notes = tracked.kernel.in_flight()
    assert notes
    for note in notes:
        tracked.kernel.forget(note)
    assert tracked.kernel.in_flight() == []
