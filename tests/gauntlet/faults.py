"""The faults: each strikes the field, lasts as long as it is told, and passes."""

from __future__ import annotations

import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from tests.gauntlet.disk_faults import DISKS
from tests.gauntlet.field import Field
from tests.gauntlet.judge import judge_claims
from tests.gauntlet.schedule import Fault

_JUMPS = (-3600, -10, 10, 3600, 86_400)
"""How far wall clocks go, in seconds."""

_LAST_WORDS_SECONDS = 0.1


def strike(ground: Field, fault: Fault, name: str, struck: Counter[str]) -> None:
    """Let a fault happen, and pass; it is counted."""
    time.sleep(fault.delay_seconds)
    kind, _, who = fault.kind.partition(" ")
    if kind in ("kill", "stop"):
        _end_agents(ground, kind, who, fault.seconds / 4)
    elif kind in ("source", "target"):
        DISKS[fault.kind](ground, fault.seconds)
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
        case "outage":  # what is asked just before arrives, and is never answered
            proxy.hold_answers(held=True)
            time.sleep(_LAST_WORDS_SECONDS)
            proxy.refuse(refusing=True)
            proxy.hold_answers(held=False)
            time.sleep(fault.seconds)
            proxy.refuse(refusing=False)
        case "delay":
            proxy.delay(0.05)
            time.sleep(fault.seconds)
            proxy.delay(0.0)
        case "garble" | "garble much":
            proxy.garble(1 if fault.kind == "garble" else 12)
        case "stranger":
            _call_as_stranger(ground)
        case "intruder":
            judge_claims(ground, patient=True)
        case _:
            raise ValueError(fault.kind)


def _call_as_stranger(ground: Field) -> None:
    """Somebody connects to both ports of the target and talks nonsense."""
    host, _, port = ground.target.address.rpartition(":")
    for number in (int(port), int(port) + 1):
        with suppress(OSError), socket.create_connection((host, number), timeout=1.0) as stranger:
            stranger.sendall(random.Random(ground.plan.seed).randbytes(4096))
