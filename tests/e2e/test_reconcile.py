"""A target that holds an older copy gets only what differs."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests import content, guest
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


def test_a_blinded_tracker_is_found_out_and_the_volume_compared(
    pair: Pair, loop_device: Callable[..., LoopDevice]
) -> None:
    """Its programs are detached behind the agent's back; what they miss is on the target all the
    same, and writes after that are tracked again."""
    volume = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(volume[0], 1)
    name = pair.start("--tracker", "ebpf", *EASY, volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    links = [pin for pin in pair.source.pinned() if "/link_" in pin]
    assert links
    for pin in links:
        (pair.source.pins / pin).unlink()
    # Longer than the kernel needs to let go of the programs.
    words = ("--runtime=2", "--time_based", "--rw=randwrite", "--bs=4k", "--rate=4m")
    guest.finish(guest.fio(volume[0], *words))
    shown = pair.source.wait(name, until=lambda now: now["suspect_volumes"] > 0)
    assert shown["state"] in ("SYNCING", "CONVERGED")
    reason = re.search(
        rf'volume suspect path={volume[0]} reason="the tracker missed writes on {volume[0]}: '
        r"(\d+) bytes written on the disk, (\d+) of them seen",
        pair.source.log.read_text(),
    )
    assert reason
    assert int(reason[1]) > int(reason[2])
    # Attached anew: a guest that goes on is followed.
    assert [pin for pin in pair.source.pinned() if "/link_" in pin]
    guest.finish(guest.fio(volume[0], *words[1:], "--runtime=1"))
    pair.source.wait(name, "CONVERGED")
    shown = pair.source.ask("cutover", name)
    assert shown["suspect_volumes"] >= 1
    assert shown["reconciled_bytes"] > 0
    disks.assert_equal(*volume)
    pair.source.ask("rollback", name)
