"""Faults of disks, and of the hosts that they are in; see `tests.gauntlet.faults`."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tests.e2e import disks
from tests.gauntlet.field import Field
from tests.gauntlet.fragile import FragileDisk
from tests.gauntlet.volumes import enlarge


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


def _fill_target(ground: Field, seconds: float) -> None:
    """It has been too small from the beginning; now it is mended."""
    time.sleep(seconds)
    small = ground.volumes[0].small
    if small is not None:  # a power cut in the cutover has asked for another disk
        enlarge(small)


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
    """The kernel forgets tracking and fences; the guest, which is elsewhere here, writes on."""
    agent = ground.source
    ground.end("source", signal.SIGKILL)
    for pin in agent.pins.rglob("*"):
        if not pin.is_dir():
            pin.unlink()
    with ExitStack() as undo:
        for volume in ground.volumes:
            if Path(volume.source).is_block_device():  # files keep their permissions
                undo.callback(disks.unfence, volume.source)
    ground.hosts["source"].reboot()
    time.sleep(seconds / 4)
    ground.start("source")


DISKS: dict[str, Callable[[Field, float], None]] = {
    "source EIO": _break_source,
    "source stalls": _stall_source,
    "source reboot": _reboot_source,
    "source forgets": lambda ground, _: _forget(ground, "source"),
    "target EIO": _break_target,
    "target stalls": _stall_target,
    "target full": _fill_target,
    "target disk lost": _lose_target,
    "target power cut": _cut_power_of_target,
    "target forgets": lambda ground, _: _forget(ground, "target"),
}
"""By name: each strikes, and lasts so many seconds."""
