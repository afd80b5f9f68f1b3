"""Means: what this host can grow, by its configuration and by what is installed.

Owns those two questions, which are asked when a migration begins and once more when there is
something to grow. Changes nothing.
"""

from __future__ import annotations

from pathlib import Path

from agent.errors import FailedPrecondition
from agent.layout.superblock import Kind
from agent.resize.filesystem import PROGRAMS
from agent.resize.tool import find

FUSE = Path("/dev/fuse")
_COMMON = ("setpriv", "mount", "umount")
_NAMES = {Kind.EXT: "ext4", Kind.XFS: "xfs", Kind.BTRFS: "btrfs"}
"""As `resize.file_systems` of the configuration says it."""


def programs_missing() -> dict[Kind, list[str]]:
    """Return the programs that this host lacks, for each file system."""
    return {
        kind: [name for name in dict.fromkeys((*names, *_COMMON)) if find(name) is None]
        for kind, names in PROGRAMS.items()
    }


def lacks(kind: Kind) -> str:
    """Return why this host cannot grow such a file system; empty if it can."""
    missing = programs_missing()[kind]
    if missing:
        return f"{', '.join(missing)} not installed"
    return "" if FUSE.exists() else f"there is no {FUSE} (modprobe fuse)"


def check_allowed(kind: Kind, kinds: frozenset[Kind]) -> None:
    """Raise FailedPrecondition GROW_NOT_ALLOWED unless it is one of those that may be grown."""
    if kind not in kinds:
        raise FailedPrecondition(
            "GROW_NOT_ALLOWED",
            f"the disk was not grown: this host's configuration does not allow that for {kind}; "
            "grow it in the guest, or add it to resize.file_systems",
            file_system=kind,
        )


def check_ahead(target: str, kind: Kind, kinds: frozenset[Kind]) -> None:
    """Raise unless `kind` could be grown on a target that has not been written yet.

    FailedPrecondition GROW_NOT_ALLOWED, GROW_UNAVAILABLE.
    """
    if kind not in kinds:
        raise FailedPrecondition(
            "GROW_NOT_ALLOWED",
            f"target {target} would not be grown: the source holds {_NAMES[kind]}, which the "
            "configuration of the target's agent does not allow; add it to resize.file_systems "
            "there, or migrate without --resize and grow it in the guest",
            target=target,
            file_system=kind,
        )
    what = lacks(kind)
    if what:
        raise FailedPrecondition(
            "GROW_UNAVAILABLE",
            f"target {target} could not be grown: the source holds {_NAMES[kind]}, and on the "
            f"target's host {what}; mend that (`warmsync doctor` there), or migrate without "
            "--resize and grow it in the guest",
            target=target,
            file_system=kind,
            lacks=what,
        )
