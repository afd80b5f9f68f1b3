"""A full copy over the grpc carrier, against qemu-img to qemu-nbd on the same devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import qemu
from benchmarks.agents import Agent, migration, pair
from benchmarks.devices import (
    GIB,
    MIB,
    check_equal,
    discard,
    fill_mixed,
    loop_device,
    require_devices,
)
from benchmarks.measure import Figure, Options, Spread, at_least
from benchmarks.qemu import Copied

NAME = "copy"
TITLE = "full copy (70% random, 20% zero, 10% text) between two loop devices"


def measure(options: Options) -> Iterator[Figure]:
    """Yield times, ratios and processor times."""
    size = options.pick(2 * GIB, 64 * MIB)
    require_devices(2 * size + GIB // 2)
    qemu.require_qemu()
    ours: list[Copied] = []
    plain: list[Copied] = []
    nodelay: list[Copied] = []
    with (
        qemu.nodelay_library() as library,
        loop_device(size, fill_mixed) as source,
        loop_device(size) as target,
        pair(source, target) as (sender, receiver),
    ):
        for _ in range(options.repeat(5)):
            discard(target)
            ours.append(_migrate(sender, receiver, source, target))
            discard(target)
            plain.append(qemu.copy(source, target))
            discard(target)
            nodelay.append(_copy_without_delay(source, target, library))
        check_equal(source, target)
    yield from _figures(size, ours, plain, nodelay)


def _migrate(sender: Agent, receiver: Agent, source: str, target: str) -> Copied:
    sent, received = sender.cpu_seconds(), receiver.cpu_seconds()
    with migration(sender, receiver, source, target) as move:
        seconds = move.seed_seconds()
        used = sender.cpu_seconds() - sent, receiver.cpu_seconds() - received
    return Copied(seconds, *used)


def _figures(
    size: int, ours: list[Copied], plain: list[Copied], nodelay: list[Copied]
) -> Iterator[Figure]:
    for name, contender, goal in (("qemu", plain, at_least(0.4)), ("qemu+nodelay", nodelay, None)):
        ratios = [theirs.seconds / own.seconds for own, theirs in zip(ours, contender, strict=True)]
        yield Figure(f"speed against {name}", "ratio", Spread.of(ratios), goal)
    for name, runs in (("warmsync", ours), ("qemu", plain), ("qemu+nodelay", nodelay)):
        yield from _costs(name, size, runs)


def _costs(name: str, size: int, runs: list[Copied]) -> Iterator[Figure]:
    yield Figure(f"{name}: speed", "GB/s", Spread.of(size / one.seconds / 1e9 for one in runs))
    sender = Spread.of(one.sender_cpu_seconds / size * GIB for one in runs)
    yield Figure(f"{name}: cpu, source", "s/GiB", sender)
    receiver = Spread.of(one.receiver_cpu_seconds / size * GIB for one in runs)
    yield Figure(f"{name}: cpu, target", "s/GiB", receiver)


def _copy_without_delay(source: str, target: str, library: Path) -> Copied:
    return qemu.copy(source, target, nodelay=library)
