"""The rules of the design, how each is broken, and which schedules can show it. See `patches`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.gauntlet.breaches import patches
from tests.gauntlet.schedule import Schedule


def _any(_: Schedule) -> bool:
    return True


def _has(kind: str) -> Callable[[Schedule], bool]:
    return lambda plan: kind in plan.kinds


@dataclass(frozen=True, slots=True)
class Breach:
    """`rule` is its number in the design, `how` what is done instead.

    `suits` tells the schedules in which there is anything for the rule to hold; the others are
    counted, but not played.
    """

    rule: int
    how: str
    apply: Callable[[], None]
    suits: Callable[[Schedule], bool] = _any


BREACHES = {
    "1": Breach(1, "writes during round 0 are not tracked", patches.track_late),
    "2": Breach(2, "blocks are read, then their marks are cleared", patches.read_then_clear),
    "3": Breach(
        3, "what could not be read counts as sent", patches.forget_unread, _has("source EIO")
    ),
    "4": Breach(
        4, "generations are acknowledged without a flush", patches.acknowledge_before_flush
    ),
    "5": Breach(5, "what was sent counts as held when the target is lost", patches.trust_unflushed),
    "6a": Breach(
        6,
        "the page cache is not flushed before the takes",
        patches.leave_page_cache,
        # What is written to a QEMU is in no page cache of a device.
        lambda plan: plan.writer == "buffered" and plan.tracker != "qemu",
    ),
    "6b": Breach(
        6,
        "nobody looks for marks after the last round",
        patches.never_look_again,
        lambda plan: plan.is_hasty,
    ),
    "7": Breach(
        7,
        "the source is read through the page cache",
        patches.read_through_page_cache,
        # What is written to the whole disk is not in the page cache of a partition.
        lambda plan: plan.whole_disk and any(one.source == "partition" for one in plan.volumes),
    ),
    "8": Breach(8, "marks are believed after a reboot", patches.believe, _has("source reboot")),
    "9": Breach(
        9,
        "holes are not zeroed on the target",
        patches.skip_holes,
        lambda plan: any(one.source == "file" for one in plan.volumes),
    ),
    "10": Breach(
        10,
        "only the first volume has a last round",
        patches.forget_other_volumes,
        lambda plan: len(plan.volumes) > 1,
    ),
    "11": Breach(11, "targets are opened without an exclusive claim", patches.share_target),
    "12": Breach(12, "the fence stays down", patches.leave_fence_down),
    "13": Breach(
        13,
        "a stream that is cut counts as a round that has ended",
        patches.take_cut_for_end,
        # Those of the cutover and the ending find little under way.
        lambda plan: any(one.kind == "cut" for one in plan.faults),
    ),
}
"""By name: a rule that has two halves has two."""
