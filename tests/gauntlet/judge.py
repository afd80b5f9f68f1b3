"""The judge: holds what is against what was promised. See the issue's "After each"."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from tests import content, guest
from tests.e2e import disks
from tests.e2e.agents import Shown
from tests.gauntlet.field import DIFFER, GONE, BreachError, Field
from tests.gauntlet.schedule import WRITERS
from tests.gauntlet.volumes import Volume, content_of

RELEASED = ("CUT_OVER", "COMPLETED")

_LOOKS = 4

_SIGNS = {
    DIFFER: "only the proof has noticed that bytes were lost",
    " trace=": "an error that nobody expects",
    "Traceback": "an error that nobody expects",
}


def judge(ground: Field, name: str, shown: Shown) -> str:
    """Return how a migration ended. BreachError if a promise was broken."""
    there = ground.there(name)
    if shown["state"] in RELEASED:
        _judge_success(ground, shown, there)
        return "cut over"
    if ground.is_undecided(shown):
        _judge_fences(ground, "it is not known who owns")
        return "undecided"
    if shown["state"] == GONE:
        _judge_gone(ground, there)
        return "forgotten"
    if shown["state"] not in ("FAILED", "CANCELLED"):
        raise BreachError(f"neither done nor failed: {shown}")
    if shown["state"] == "FAILED" and not shown["error"]:
        raise BreachError(f"failed without a word: {shown}")
    if there in RELEASED:
        raise BreachError(f"given up, and the target is released all the same: {shown}")
    _judge_sources(ground)
    if shown["state"] == "FAILED":
        return f"failed: {shown['error']['reason']}"
    if "cancel" not in ground.plan.kinds:
        raise BreachError(f"cancelled by nobody: {shown}")
    return "cancelled"


def judge_logs(ground: Field) -> None:
    """Whole agents find at a cutover that the copies are equal, and are never surprised."""
    for agent in (ground.source, ground.target):
        for line in agent.log.read_text().splitlines():
            if any(sign in line for sign in agent.expects):
                continue
            for sign, what in _SIGNS.items():
                if sign in line:
                    raise BreachError(f"{what} ({agent.name}): {line[:2000]}")


def judge_claims(ground: Field, *, patient: bool = False) -> None:
    """Nobody else can have a target that the agent holds; `patient`: also try it for a while."""
    for volume in ground.volumes:
        looks = _try_to_claim(ground, volume)
        if all(list(looks) if patient else looks):
            raise BreachError(f"{volume.target} can be claimed while it is written to")


def _try_to_claim(ground: Field, volume: Volume) -> Iterator[bool]:
    """Try a few times whether a target can be claimed although the agent has it open.

    Once is not enough: between two sessions it is let go of for a moment, and claimed anew.
    """
    real = os.path.realpath(volume.target)
    for _ in range(_LOOKS):
        held = real in ground.target.held()
        free = disks.is_free(volume.target)
        yield held and free and real in ground.target.held()
        time.sleep(0.1)


def judge_ending(ground: Field, name: str) -> None:
    """Hold both ends against each other after a rollback or a finish."""
    back = ground.plan.ending == "rollback"
    wanted = "ROLLED_BACK" if back else "COMPLETED"
    shown, there = ground.shown(name), ground.there(name)
    if shown["state"] == GONE:
        _judge_gone(ground, there)
        return
    if there == GONE and "target forgets" in ground.plan.kinds:
        there = shown["state"]
        if there == "CUT_OVER":  # it cannot be asked any more: a person decides
            _judge_fences(ground, "the target has forgotten it")
            return
    if (shown["state"], there) != (wanted, wanted):
        raise BreachError(f"not {wanted} at both ends: target {there}, source {shown}")
    if back:
        _judge_sources(ground)
    elif "source reboot" not in ground.plan.ending_fault.kind:  # what has ended is not taken up
        _judge_fences(ground, "the end")
    if pinned := ground.source.pinned():
        raise BreachError(f"ended, and {pinned} goes on tracking")
    for machine in ground.machines:
        if machine.is_up and (traces := machine.traces()):
            raise BreachError(f"ended, and {traces} are left in QEMU")


def _judge_success(ground: Field, shown: Shown, there: str) -> None:
    if there not in (*RELEASED, *([GONE] if "target forgets" in ground.plan.kinds else [])):
        raise BreachError(f"two owners, or none: source {shown['state']}, target {there}")
    _judge_fences(ground, "the target is released")
    for volume in ground.volumes:
        if not disks.is_free(volume.target):
            raise BreachError(f"{volume.target} is still claimed")
        if volume.fragile_target is not None:
            volume.fragile_target.lose()  # what was released is durable
        with volume.content(ground.directory) as source:
            start, end = content_of(source, ground.plan)  # the target may be larger
            at = content.first_difference(source, volume.target, start, end)
        if at is not None:
            raise BreachError(f"bytes lost: {volume} differ at {at} of {end}")
        _verify(ground, volume.target)


def _judge_gone(ground: Field, there: str) -> None:
    """The source's agent has lost its state: whoever is the owner now is the only one."""
    if "source forgets" not in ground.plan.kinds:
        raise BreachError("the source has forgotten the migration")
    if pinned := ground.source.pinned():
        raise BreachError(f"forgotten, and {pinned} goes on tracking")
    if there in RELEASED:
        _judge_fences(ground, "the target is released")
        return
    if "source forgets" in (ground.plan.cutover.kind, ground.plan.ending_fault.kind):
        for volume in ground.volumes:  # nobody knows of the fence any more but a person
            _lift(volume.source)
    _judge_sources(ground)


def _judge_fences(ground: Field, why: str) -> None:
    for volume in ground.volumes:
        if not disks.is_fenced(volume.source):
            raise BreachError(f"two owners: {volume.source} is not fenced, and {why}")


def _lift(path: str) -> None:
    if Path(path).is_block_device():
        disks.unfence(path)
    else:
        os.chmod(path, 0o644)


def _judge_sources(ground: Field) -> None:
    """Nobody else has them: they are writable, and what the guest wrote is there."""
    for volume in ground.volumes:
        if disks.is_fenced(volume.source):
            raise BreachError(f"nobody may write: {volume.source} is fenced")
        if volume.machine is not None:
            volume.machine.start()  # if it had ended
        disks.assert_writable(volume.guest)
        _verify(ground, volume.guest)


def _verify(ground: Field, path: str) -> None:
    """Let fio look at every block that it wrote, if it left checksums in them."""
    if ground.plan.writer == "verify":
        try:
            guest.finish(guest.fio(path, "--rw=read", *WRITERS["verify"][1:4]))
        except AssertionError as error:
            raise BreachError(f"fio finds its blocks spoilt: {path}: {error}") from error
