"""A target that holds an older copy gets only what differs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests import content
from tests.content import Disk
from tests.devices import LoopDevice
from tests.e2e import disks
from tests.e2e.agents import Pair
from tests.e2e.disks import MIB

SIZE = 64 * MIB
EASY = ("--max-downtime", "20s")


@pytest.mark.parametrize("tracker", ["ebpf", "scan"])
@pytest.mark.parametrize("changed", [0, 3])
def test_an_older_copy_is_used_again(
    pair: Pair, loop_device: Callable[..., LoopDevice], tracker: str, changed: int
) -> None:
    volume = loop_device(SIZE).path, loop_device(SIZE + MIB).path
    content.fill(volume[0], 1)
    words = ("--tracker", tracker, *EASY)
    first = pair.start(*words, volumes=[volume])
    pair.source.wait(first, "CONVERGED")
    pair.source.ask("cutover", first)
    pair.source.ask("rollback", first)
    with Disk(volume[0], writable=True) as disk:
        for index in range(changed):
            disk.write(index * 17 * MIB, b"changed meanwhile".ljust(4096, b"."))
    again = pair.start(*words, "--reuse-target", volumes=[volume])
    pair.source.wait(again, "CONVERGED")
    shown = pair.source.ask("cutover", again)
    assert shown["reuse_target"] is True
    assert shown["reconciled_bytes"] == SIZE - changed * 65536
    assert shown["bytes_sent"] <= 2 * MIB
    disks.assert_equal(*volume)
    pair.source.ask("rollback", again)


def test_a_copy_that_has_nothing_in_common(
    pair: Pair, loop_device: Callable[..., LoopDevice]
) -> None:
    volume = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(volume[0], 1)
    disks.soil(volume[1], 2)
    name = pair.start(*EASY, "--reuse-target", volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    shown = pair.source.ask("cutover", name)
    assert shown["reconciled_bytes"] == 0
    disks.assert_equal(*volume)
    pair.source.ask("rollback", name)
