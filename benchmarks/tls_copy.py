"""A full copy with TLS, both ends with certificates: against qemu-img and nbdcopy."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import moves, qemu
from benchmarks.agents import pair
from benchmarks.certificates import certificates
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

NAME = "tls"
TITLE = "full copy (70% random, 20% zero, 10% text) between two loop devices, with mutual TLS"


def measure(options: Options) -> Iterator[Figure]:
    """Yield ratios, speeds and processor times."""
    size = options.pick(2 * GIB, 16 * MIB)
    require_devices(2 * size + GIB // 2)
    require_ebpf()
    qemu.require_qemu()
    with (
        qemu.nodelay_library() as library,
        certificates("127.0.0.1", "localhost") as tls,
        loop_device(size, fill_mixed) as source,
        loop_device(size) as target,
        pair(source, target, tls) as ends,
    ):
        contenders = [moves.contender(*ends), *qemu.contenders(library, tls=tls)]
        runs = in_turns(contenders, source, target, options.repeat(5))
    yield from compare(contenders, runs, size, speed=at_least(1.3))
