"""The judge: holds what is against what was promised. See the issue's "After each"."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from tests import content, guest
from tests.e2e import disks
from tests.e2e.agents import Shown
from tests.gauntlet.field import GONE, BreachError, Field
from tests.gauntlet.schedule import WRITERS
from tests.gauntlet.volumes import Volume

RELEASED = ("CUT_OVER", "COMPLETED")

_LOOKS = 4


def judge(ground: Field, name: str, shown: Shown) -> str:
    """Return how a migration ended. BreachError if a promise was broken."""
    there = str(ground.ask(ground.target, "show", name).shown.get("state", GONE))
    if shown["state"] in RELEASED:
        _judge_success(ground, shown, there)
        return "cut over"
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
    shown = ground.shown(name)
    there = ground.ask(ground.target, "show", name).shown.get("state", GONE)
    if (shown["state"], there) != (wanted, wanted):
        raise BreachError(f"not {wanted} at both ends: target {there}, source {shown}")
    if back:
        _judge_sources(ground)
    elif not all(disks.is_fenced(one.source) for one in ground.volumes):
        raise BreachError("the fences are down after the end")
    if pinned := ground.source.pinned():
        raise BreachError(f"ended, and {pinned} goes on tracking")


def _judge_success(ground: Field, shown: Shown, there: str) -> None:
    if there not in RELEASED:
        raise BreachError(f"two owners, or none: source {shown['state']}, target {there}")
    for volume in ground.volumes:
        if not disks.is_fenced(volume.source):
            raise BreachError(f"two owners: {volume.source} is not fenced")
        if not disks.is_free(volume.target):
            raise BreachError(f"{volume.target} is still claimed")
        if volume.fragile_target is not None:
            volume.fragile_target.lose()  # what was released is durable
        size_bytes = disks.size_of(volume.source)
        at = content.first_difference(volume.source, volume.target)
        if at is not None and at != size_bytes:  # the target may be larger
            raise BreachError(f"bytes lost: {volume} differ at {at} of {size_bytes}")
        _verify(ground, volume.target)


def _judge_gone(ground: Field, there: str) -> None:
    """The source's agent has lost its state: whoever is the owner now is the only one."""
    if "source forgets" not in ground.plan.kinds:
        raise BreachError("the source has forgotten the migration")
    if pinned := ground.source.pinned():
        raise BreachError(f"forgotten, and {pinned} goes on tracking")
    if there not in RELEASED:
        _judge_sources(ground)
    elif not all(disks.is_fenced(one.source) for one in ground.volumes):
        raise BreachError("two owners: the target is released, the source is not fenced")


def _judge_sources(ground: Field) -> None:
    """Nobody else has them: they are writable, and what the guest wrote is there."""
    for volume in ground.volumes:
        if disks.is_fenced(volume.source):
            raise BreachError(f"nobody may write: {volume.source} is fenced")
        disks.assert_writable(volume.source)
        _verify(ground, volume.source)


def _verify(ground: Field, path: str) -> None:
    """Let fio look at every block that it wrote, if it left checksums in them."""
    if ground.plan.writer == "verify":
        try:
            guest.finish(guest.fio(path, "--rw=read", *WRITERS["verify"][1:4]))
        except AssertionError as error:
            raise BreachError(f"fio finds its blocks spoilt: {path}: {error}") from error
