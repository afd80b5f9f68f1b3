"""What the ebpf tracker costs the guest: fio's random writes with and without it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.tracker.ebpf import EbpfTracker
from benchmarks.devices import (
    GIB,
    MIB,
    fill_random,
    loop_device,
    require_devices,
    require_ebpf,
    require_tools,
    run,
)
from benchmarks.measure import Figure, Options, Spread, at_least, between_neighbours, steps
from native.blockio import BlockDevice

NAME = "tracking"
TITLE = "tracking cost: fio, 4 KiB random writes, queue depth 16, on a loop device"
_BPFFS = Path("/sys/fs/bpf")


def measure(options: Options) -> Iterator[Figure]:
    """Yield the ratio of write rates and its noise floor. Plain and tracked runs alternate."""
    size = options.pick(GIB, 32 * MIB)
    require_devices(size + GIB // 4)
    require_tools("fio")
    require_ebpf()
    seconds = options.pick(4, 1)
    with loop_device(size, fill_random) as device:
        plain, tracked = [_write(device, seconds)], []
        for _ in range(options.repeat(8)):
            with _tracking(device):
                tracked.append(_write(device, seconds))
            plain.append(_write(device, seconds))
    ratios = Spread.of(between_neighbours(plain, tracked))
    yield Figure("writes with the tracker to without", "ratio", ratios, at_least(0.97))
    floor = Spread.of(steps(plain))
    yield Figure("the same without it, twice (noise)", "ratio", floor)
    yield Figure("writes without the tracker", "1000/s", Spread.of(rate / 1e3 for rate in plain))


@contextmanager
def _tracking(path: str) -> Iterator[None]:
    """Track a device: the map begins empty, so that marks are set and not only found."""
    pins = _BPFFS / f"warmsync-bench-{os.getpid()}"
    with BlockDevice(path) as device:
        tracker = EbpfTracker(device, 4096, pins)
        tracker.start()
        try:
            yield
            if not tracker.look():
                raise RuntimeError(f"the tracker saw none of the writes to {path}")
        finally:
            tracker.stop()


def _write(device: str, seconds: int) -> float:
    """Return the writes a second of one run."""
    command = ["fio", "--name=guest", f"--filename={device}", "--rw=randwrite", "--bs=4k"]
    command += ["--iodepth=16", "--ioengine=libaio", "--direct=1", "--randrepeat=0"]
    command += ["--norandommap", "--time_based", f"--runtime={seconds}", "--ramp_time=1"]
    report = json.loads(run(*command, "--output-format=json"))
    return float(report["jobs"][0]["write"]["iops"])
