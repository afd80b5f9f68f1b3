"""The downtime that a warm migration saved: what a cold copy would have taken, less what it took.

Pure. A cold copy powers the VM down first and copies every byte. Its speed is that of round 0,
which did just that beside a running guest; what both ways have alike is left out: the power-down
and the boot, which are not part of the downtime that is measured either.
"""

from __future__ import annotations

from agent.estimate import Sample
from agent.migration import DowntimeParts

MEASURED_SHARE = 8
"""Round 0 tells something if it moved at least an eighth of the disks: an older copy at the target,
or the end of an agent, may have cut it short."""


def cold_copy_seconds(
    opening: Sample | None, total_bytes: int, parts: DowntimeParts
) -> float | None:
    """Return what a cold copy would have taken; None where round 0 tells nothing.

    The proof is taken to cost what it did here, where most was read back before: that is less than
    a cold copy would pay.
    """
    if opening is None or opening.dirty_bytes * MEASURED_SHARE < total_bytes:
        return None
    copy_seconds = (opening.send_seconds + opening.flush_seconds) / opening.dirty_bytes
    return copy_seconds * total_bytes + parts.check + parts.verify + parts.release
