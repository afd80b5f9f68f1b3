"""The faults: each strikes the field, lasts as long as it is told, and passes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.e2e import disks
from tests.gauntlet.field import BreachError, Field
from tests.gauntlet.schedule import Fault
from tests.gauntlet.volumes import enlarge

_INTRUSIONS = 4
_JUMPS = (-3600, -10, 10, 3600, 86_400)
"""How far wall clocks go, in seconds."""


def strike(ground: Field, fault: Fault, name: str, struck: Counter[str]) -> None:
    """Let a fault happen, and pass; it is counted."""
    time.sleep(fault.delay_seconds)
    kind, _, who = fault.kind.partition(" ")
    if kind in ("kill", "stop"):
        _end_agents(ground, kind, who, fault.seconds / 4)
    elif kind in ("source", "target"):
        _DISKS[fault.kind](ground, fault.seconds)
    elif kind in _AGENTS:
        _AGENTS[kind](ground, who, fault.seconds)
    elif kind in ("pause", "limit", "cancel", "cutover"):
        _command(ground, kind, fault.seconds, name)
    else:
        _strike_network(ground, fault)
    struck[fault.kind] += 1


def _end_agents(ground: Field, kind: str, who: str, seconds: float) -> None:
    both = ("source", "target") if who == "both" else (who,)
    for one in both:
        ground.end(one, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
    time.sleep(seconds)
    for one in both:
        ground.start(one)


def _freeze(ground: Field, who: str, seconds: float) -> None:
    process = ground.agent(who).process
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def _jump(ground: Field, who: str, seconds: float) -> None:
    ground.hosts[who].set_clock(_JUMPS[int(seconds * 1000) % len(_JUMPS)])
    time.sleep(seconds / 4)


_AGENTS: dict[str, Callable[[Field, str, float], None]] = {"freeze": _freeze, "clock": _jump}


def _command(ground: Field, kind: str, seconds: float, name: str) -> None:
    if kind == "pause":
        ground.source.run("pause", name)
        time.sleep(seconds / 4)
        ground.source.run("resume", name)
    elif kind == "limit":
        ground.source.run("update", name, "--bandwidth-limit", "4M")
    elif kind == "cutover":  # the guest runs: it is to be refused
        ground.source.run("cutover", name, "--force")
    else:
        ground.source.run(kind, name)


def _strike_network(ground: Field, fault: Fault) -> None:
    proxy = ground.proxy
    match fault.kind:
        case "none":
            pass
        case "cut":
            proxy.cut()
        case "hold" | "hold requests" | "hold answers":
            hold = getattr(proxy, fault.kind.replace(" ", "_"))
            hold(held=True)
            time.sleep(fault.seconds)
            hold(held=False)
        case "delay":
            proxy.delay(0.05)
            time.sleep(fault.seconds)
            proxy.delay(0.0)
        case "garble" | "garble much":
            proxy.garble(1 if fault.kind == "garble" else 12)
        case "stranger":
            _call_as_stranger(ground)
        case "intruder":
            _intrude(ground)
        case _:
            raise ValueError(fault.kind)


def _call_as_stranger(ground: Field) -> None:
    """Somebody connects to both ports of the target and talks nonsense."""
    host, _, port = ground.target.address.rpartition(":")
    for number in (int(port), int(port) + 1):
        with suppress(OSError), socket.create_connection((host, number), timeout=1.0) as stranger:
            stranger.sendall(random.Random(ground.plan.seed).randbytes(4096))


def _intrude(ground: Field) -> None:
    """Somebody wants the targets for himself: what the agent holds he must not get."""
    for volume in ground.volumes:
        real, got = os.path.realpath(volume.target), 0
        for _ in range(_INTRUSIONS):
            held = real in ground.target.held()
            free = disks.is_free(volume.target)
            # Between two sessions it is let go of for a moment, and claimed anew.
            got += held and free and real in ground.target.held()
            time.sleep(0.1)
        if got == _INTRUSIONS:
            raise BreachError(f"{volume.target} can be claimed while it is written to")


def _break_source(ground: Field, seconds: float) -> None:
    disk = ground.volumes[0].fragile_source
    assert disk is not None, ground.plan
    with disk.failing("pread"):
        time.sleep(seconds / 4)


def _stall_source(ground: Field, seconds: float) -> None:
    disk = ground.volumes[0].fragile_source
    assert disk is not None, ground.plan
    with disk.stalled():
        time.sleep(seconds)


def _break_target(ground: Field, seconds: float) -> None:
    disk = ground.volumes[0].fragile_target
    assert disk is not None, ground.plan
    with disk.failing("pwrite", "zero"):
        time.sleep(seconds / 2)


def _stall_target(ground: Field, seconds: float) -> None:
    disk = ground.volumes[0].fragile_target
    assert disk is not None, ground.plan
    with disk.stalled():
        time.sleep(seconds)


def _lose_target(ground: Field, _: float) -> None:
    """The disk goes, with its cache, and comes again under the same name; the agent lives."""
    disk = ground.volumes[0].fragile_target
    assert disk is not None, ground.plan
    disk.lose()


def _fill_target(ground: Field, seconds: float) -> None:
    """It has been too small from the beginning; now it is mended."""
    time.sleep(seconds)
    small = ground.volumes[0].small
    assert small is not None, ground.plan
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


_DISKS: dict[str, Callable[[Field, float], None]] = {
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
