"""A full copy in the clear: against a plain C loop, qemu-img, nbdcopy and rsync."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import cloop, moves, qemu, rsync
from benchmarks.agents import pair
from benchmarks.contender import compare, in_turns
from benchmarks.devices import (
    GIB,
    MIB,
    fill_mixed,
    loop_device,
    require_devices,
    require_ebpf,
)
from benchmarks.measure import Figure, Options, at_least

NAME = "copy"
TITLE = "full copy (70% random, 20% zero, 10% text) between two loop devices, in the clear"


def measure(options: Options) -> Iterator[Figure]:
    """Yield ratios, speeds and processor times."""
    size = options.pick(2 * GIB, 16 * MIB)
    require_devices(2 * size + GIB // 2)
    require_ebpf()
    qemu.require_qemu()
    rsync.require_rsync()
    with (
        qemu.nodelay_library() as library,
        cloop.copy_loop() as loop,
        loop_device(size, fill_mixed) as source,
        loop_device(size) as target,
        pair(source, target) as ends,
    ):
        nbd = qemu.contenders(library, (1, 4))
        contenders = [moves.contender(*ends), loop, *nbd, rsync.contender()]
        runs = in_turns(contenders, source, target, options.repeat(5))
    yield from compare(contenders, runs, size, speed=at_least(1.25), yardstick=at_least(0.95))
