"""A guest that writes the same blocks over and over: they travel last, and they do travel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from tests import content
from tests.devices import LoopDevice
from tests.e2e import disks
from tests.e2e.agents import Pair
from tests.e2e.disks import MIB
from tests.guest import boot, destroy, power_off

HOT = 4 * MIB
ROUNDS = 8


def test_hot_blocks_are_sent_last(
    pair: Pair, loop_device: Callable[..., LoopDevice], resources: ExitStack
) -> None:
    source, target = loop_device(64 * MIB).path, loop_device(64 * MIB).path
    content.fill(source, 1)
    disks.soil(target, 2)
    guest = boot(source, "--rw=write", "--bs=64k", f"--size={HOT}", "--time_based", "--runtime=600")
    resources.callback(destroy, guest)
    words = ("--tracker", "ebpf", "--max-downtime", "20s")
    name = pair.start(*words, volumes=[(source, target)])

    def after(rounds: int) -> tuple[int, int]:
        shown = pair.source.wait(name, until=lambda now: now["rounds"] >= rounds)
        return int(shown["rounds"]), int(shown["bytes_sent"])

    rounds, sent = after(ROUNDS)
    later, more = after(rounds + ROUNDS)
    # Sent in each round it would be all of it each time; here and there the guest may be late.
    assert more - sent < (later - rounds) * HOT / 2
    pair.source.wait(name, "CONVERGED")
    power_off(guest)
    shown = pair.source.ask("cutover", name)
    assert shown["bytes_sent"] > more
    disks.assert_equal(source, target)
