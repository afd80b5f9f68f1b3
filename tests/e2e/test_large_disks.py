"""1 TiB disks with little data: holes are found and not read; memory stays small and flat."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests import devices
from tests.content import Disk
from tests.e2e.agents import Agent, Pair
from tests.e2e.conftest import running_pair
from tests.e2e.disks import MIB
from tests.guest import boot, destroy, power_off

TIB = 1 << 40
DATA = 64 * MIB
ROUNDS = 30
FOREVER = ("--time_based", "--runtime=600")
EASY = ("--max-downtime", "60s")


def sparse(resources: ExitStack, kind: str) -> tuple[str, Path]:
    """A 1 TiB disk with DATA bytes here and there; (its path, the file that holds it)."""
    if kind == "file":
        backing = resources.enter_context(devices.image_file(TIB))
        path = str(backing)
    else:
        disk = resources.enter_context(devices.loop_device(TIB))
        path, backing = disk.path, disk.backing
    return path, backing


def scatter(path: str) -> list[tuple[int, bytes]]:
    """Write DATA bytes across the disk, the first and the last ones too."""
    written = []
    with Disk(path, writable=True) as disk:
        count = DATA // MIB
        for index in range(count):
            offset = (TIB - MIB) // (count - 1) * index // MIB * MIB
            written.append((offset, os.urandom(MIB)))
            disk.write(*written[-1])
        last = TIB - MIB
        written.append((last, os.urandom(MIB)))
        disk.write(*written[-1])
        os.fsync(disk.fd)
    return written


def assert_holds(path: str, written: list[tuple[int, bytes]]) -> None:
    with Disk(path) as disk:
        for offset, data in written:
            assert disk.read(offset, len(data)) == data, offset


@pytest.mark.parametrize(
    ("kind", "tracker"), [("file", "scan"), ("loop", "ebpf"), ("loop", "scan")]
)
def test_only_the_data_is_read_and_sent(
    pair: Pair, resources: ExitStack, kind: str, tracker: str
) -> None:
    (source, _), (target, image) = sparse(resources, kind), sparse(resources, kind)
    written = scatter(source)
    name = pair.start("--tracker", tracker, *EASY, volumes=[(source, target)])
    pair.source.wait(name, "CONVERGED")
    shown = pair.source.ask("cutover", name)
    assert shown["bytes_total"] == TIB
    # The rest is tables of holes.
    assert len(written) * MIB < shown["bytes_sent"] < 2 * DATA
    assert_holds(target, written)
    assert image.stat().st_blocks * 512 < 2 * DATA  # the target is as sparse


def resident_mib(agent: Agent) -> float:
    return float(psutil.Process(agent.process.pid).memory_info().rss) / MIB


def test_memory_is_small_and_does_not_grow(tmp_path: Path, resources: ExitStack) -> None:
    (source, _), (target, _) = sparse(resources, "loop"), sparse(resources, "loop")
    written = scatter(source)
    with running_pair(tmp_path) as pair:
        guest = boot(source, "--rw=randwrite", "--bs=4096", "--rate=4m", "--size=64m", *FOREVER)
        resources.callback(destroy, guest)
        # No round is that quick, so they follow each other without a rest.
        words = ("--tracker", "ebpf", "--max-downtime", "1ms")
        name = pair.start(*words, volumes=[(source, target)])
        early = _after_rounds(pair, name, 5)
        late = _after_rounds(pair, name, 5 + ROUNDS)
        power_off(guest)
        pair.source.ask("cutover", name, "--force")
        end = [resident_mib(agent) for agent in (pair.source, pair.target)]
        pair.tidy()
    assert max(*early, *late, *end) < 200
    assert max(b - a for a, b in zip(early, late, strict=True)) < 16
    assert_holds(target, written[-2:])


def _after_rounds(pair: Pair, name: str, rounds: int) -> list[float]:
    pair.source.wait(name, until=lambda shown: shown["rounds"] >= rounds)
    return [resident_mib(agent) for agent in (pair.source, pair.target)]
