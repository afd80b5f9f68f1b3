"""Faults of disks, and of the hosts that they are in; see `tests.gauntlet.faults`."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests import guest
from tests.e2e import disks
from tests.e2e.disks import MIB
from tests.gauntlet.field import Field
from tests.gauntlet.fragile import FragileDisk
from tests.gauntlet.machine import Machine
from tests.gauntlet.volumes import enlarge, fill_up


def _source(ground: Field) -> FragileDisk:
    disk = ground.volumes[0].fragile_source
    assert disk is not None, ground.plan
    return disk


def _target(ground: Field) -> FragileDisk:
    disk = ground.volumes[0].fragile_target
    assert disk is not None, ground.plan
    return disk


def _break_source(ground: Field, seconds: float) -> None:
    with _source(ground).failing("pread"):
        time.sleep(seconds / 4)


def _stall_source(ground: Field, seconds: float) -> None:
    with _source(ground).stalled():
        time.sleep(seconds)


def _break_target(ground: Field, seconds: float) -> None:
    with _target(ground).failing("pwrite", "zero"):
        time.sleep(seconds / 2)


def _stall_target(ground: Field, seconds: float) -> None:
    with _target(ground).stalled():
        time.sleep(seconds)


def _lose_target(ground: Field, _: float) -> None:
    """The disk goes, with its cache, and comes again under the same name; the agent lives."""
    _target(ground).lose()


def _replace_target(ground: Field, seconds: float) -> None:
    """It goes, and another one is there under its name: blank, or somebody else's.

    Every other time the source's agent is dead meanwhile, and knows only what it has written down.
    """
    tenths = int(seconds * 10)
    is_blank, is_alone = tenths % 2 == 0, tenths % 4 < 2
    if is_alone:
        ground.end("source", signal.SIGKILL)
    _target(ground).replace(
        bytes(MIB) if is_blank else random.Random(ground.plan.seed).randbytes(MIB)
    )
    if is_alone:
        ground.start("source")


def _small(ground: Field) -> Path:
    small = ground.volumes[0].small
    assert small is not None, ground.plan
    return small


def _mend_target(ground: Field, seconds: float) -> None:
    """It has been too small from the beginning; now it is mended."""
    time.sleep(seconds)
    enlarge(_small(ground))


def _fill_target(ground: Field, seconds: float) -> None:
    """Somebody else takes all the room there is, a while."""
    fill_up(_small(ground))
    time.sleep(seconds)
    enlarge(_small(ground))


def _cut_power_of_target(ground: Field, seconds: float) -> None:
    """Agent and disks end at one moment; nothing that was not flushed is there afterwards."""
    ground.target.process.send_signal(signal.SIGSTOP)
    losing = [one.fragile_target for one in ground.volumes if one.fragile_target is not None]
    # The agent may be waiting for a disk: only when they are dead can it die.
    for disk in losing:
        disk.kill()
    ground.end("target", signal.SIGKILL)
    for disk in losing:
        disk.lose()
    ground.hosts["target"].reboot()
    time.sleep(seconds / 4)
    ground.start("target")


def _forget(ground: Field, who: str) -> None:
    ground.end(who, signal.SIGKILL)
    shutil.rmtree(ground.state_dir(who))
    ground.start(who)


def _reboot_source(ground: Field, seconds: float) -> None:
    """The kernel forgets tracking and fences.

    The guest, which is elsewhere here, writes on, but for machines: they end with their host.
    """
    agent = ground.source
    ground.end("source", signal.SIGKILL)
    running = any(writer.poll() is None for writer in ground.writers)
    if ground.machines:
        ground.crash()
    for pin in agent.pins.rglob("*"):
        if not pin.is_dir():
            pin.unlink()
    with ExitStack() as undo:
        for volume in ground.volumes:
            if Path(volume.source).is_block_device():  # files keep their permissions
                undo.callback(disks.unfence, volume.source)
    ground.hosts["source"].reboot()
    time.sleep(seconds / 4)
    if ground.machines and running:
        ground.boot()
    ground.start("source")


@contextmanager
def _down(ground: Field) -> Iterator[list[Machine]]:
    """Give the machines that are up; what ran before the block runs again after it."""
    running = any(writer.poll() is None for writer in ground.writers)
    machines = [one for one in ground.machines if one.is_up]
    yield machines
    if running:
        ground.boot()
    for one in machines:  # in the cutover the guest is off
        try:
            one.start()
        except AssertionError:  # a QEMU is kept out of what was handed over meanwhile
            if not any(disks.is_fenced(volume.source) for volume in ground.volumes):
                raise


def _kill_qemu(ground: Field, seconds: float) -> None:
    """QEMU is killed under a guest and an agent that live, and started again."""
    with _down(ground):
        ground.crash()
        time.sleep(seconds / 4)


def _restart_qemu(ground: Field, seconds: float) -> None:
    """The guest is powered off and on again: QEMU ends well and another one comes."""
    with _down(ground) as machines:
        for writer in ground.writers:
            if writer.poll() is None:
                guest.power_off(writer)
        for machine in machines:
            machine.exit()
        time.sleep(seconds / 4)


DISKS: dict[str, Callable[[Field, float], None]] = {
    "source EIO": _break_source,
    "source stalls": _stall_source,
    "source reboot": _reboot_source,
    "source QEMU dies": _kill_qemu,
    "source QEMU restarts": _restart_qemu,
    "source forgets": lambda ground, _: _forget(ground, "source"),
    "target EIO": _break_target,
    "target stalls": _stall_target,
    "target full": _mend_target,
    "target filled": _fill_target,
    "target disk lost": _lose_target,
    "target disk replaced": _replace_target,
    "target power cut": _cut_power_of_target,
    "target forgets": lambda ground, _: _forget(ground, "target"),
}
"""By name: each strikes, and lasts so many seconds."""
