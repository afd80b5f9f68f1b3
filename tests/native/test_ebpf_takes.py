"""Takes while the guest writes lose nothing: what a migration relies on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from native.bitmap import DirtyBitmap
from tests.devices import LoopDevice
from tests.native.tracking import (
    MIB,
    Tracked,
    content,
    differing,
    finish,
    fio,
    flush,
    read_direct,
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


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_copy_that_follows_the_marks_ends_equal(path: str, track: Track, workload: str) -> None:
    """Marks at completion: one set earlier could be taken, and the old data copied."""
    tracked = track(path)
    before = content(path)
    shadow = bytearray(before)
    guest = fio(path, "--runtime=1", "--time_based", *WORKLOADS[workload])
    union = follow(tracked, guest, shadow)
    after = content(path)
    assert differing(bytes(shadow), after) == set()
    # Nothing else was marked since: the guest has stopped.
    assert tracked.take().count() == 0
    changed = differing(before, after)
    assert changed
    assert all(union.is_marked(number * tracked.block) for number in changed)
    assert tracked.kernel.counters().lost == 0
