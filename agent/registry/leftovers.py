"""What an earlier agent has left behind on its host, of migrations that do not go on.

Owns its removal, once at a start: pinned trackers, bitmaps in QEMUs and in images, files. What goes
on is named by volume, as `<migration>-<index>`. Touches nothing of these.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from agent.qemu.access import Access, Seat
from agent.registry.places import Places
from agent.tracker.choice import remove_stale

_log = logging.getLogger(__name__)

_NOTE = ".qemu"


def remove_leftovers(
    places: Places,
    qemus: Access,
    tracked: Collection[str],
    received: Collection[str],
    *,
    fenced: Collection[str],
) -> None:
    """Remove all but what belongs to volumes that are tracked here, or received here.

    `fenced`: which have ended, but for their fence, which needs to know what disk it is.
    """
    for name in remove_stale(places.pins, tracked):
        _log.warning("removed a tracker that an earlier agent left behind name=%s", name)
    _tidy_qemus(places, qemus, tracked, fenced)
    for directory, wanted in (
        (places.volumes, tracked),
        (places.digests, received),
        (places.resizes, received),
    ):
        for path in directory.glob("*"):
            if path.stem not in wanted and path.suffix != _NOTE:
                try:
                    path.unlink()
                except OSError as error:
                    _log.warning('left behind path=%s reason="%s"', path, error)


def _tidy_qemus(
    places: Places, qemus: Access, tracked: Collection[str], fenced: Collection[str]
) -> None:
    """Remove what an earlier agent has left in QEMUs, and in images whose QEMU has ended."""
    notes = [path for path in places.volumes.glob(f"*{_NOTE}") if path.stem not in tracked]
    if not (qemus.sockets or notes):
        return
    try:
        from agent.qemu.tidy import tidy
    except ImportError as error:
        _log.error('QEMUs not tidied up: this build has no qemu tracker reason="%s"', error)
        return
    ended = [Seat(qemus, path.stem, path) for path in notes]
    for name in tidy(qemus, tracked, ended, fenced):
        _log.warning("removed what an earlier agent left in a QEMU name=%s", name)
