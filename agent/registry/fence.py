"""The fence of a migration that an agent before this one has handed over, or perhaps has.

Owns that it goes up volume by volume, whatever is wrong with another, before anything else is asked
of anybody. Asks no QEMU, drives nothing; what could not be fenced is for its caller to try again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress

from agent.disk import Fenceable, fence_failed
from agent.errors import FailedPrecondition, WarmsyncError
from agent.migration import Volume
from agent.record import SourceRecord
from agent.state import TERMINAL, State
from native.blockio import BlockDevice

_log = logging.getLogger(__name__)

Opener = Callable[[SourceRecord, int], Fenceable | None]


def is_due(record: SourceRecord) -> bool:
    """Return whether the old VM must not write: the target owns the disks, or may own them."""
    state = record.history[-1].state
    if state is State.FAILED:
        # Agents of before, which knew no nameplates, had a person lift the fence and tell nobody.
        unknown = record.error is not None and record.error.reason == "OWNER_UNKNOWN"
        return unknown and bool(record.nameplates)
    return state is State.CUT_OVER or (record.releasing and state not in TERMINAL)


def is_wanted(record: SourceRecord) -> bool:
    """Return whether a next start, or a person, still has a fence to put up or to lift."""
    state = record.history[-1].state
    return is_due(record) or (record.releasing and not state.is_handed_over)


class Fence:
    """One migration's. Images of QEMUs stay open: the lock on one goes when it is closed."""

    def __init__(self, record: SourceRecord, opener: Opener, *, needed: bool = True) -> None:
        self._record = record
        self._opener = opener
        self._held: list[Fenceable] = []
        due = needed and is_due(record)
        self._down = list(range(len(record.plan.volumes))) if due else []
        self.trouble: WarmsyncError | None = None
        """Why a volume is not fenced."""

    def put_up(self) -> None:
        """Fence what is not fenced yet; see `trouble`. Blocking."""
        failed: list[tuple[Volume, Exception]] = []
        for index in tuple(self._down):
            try:
                self._put_up(index)
                # Not `remove`: the agent may have stopped meanwhile, and closed it.
                self._down = [one for one in self._down if one != index]
            except (WarmsyncError, OSError) as error:
                failed.append((self._record.plan.volumes[index], error))
        known = self.trouble
        self.trouble = _not_fenced(*failed[0]) if failed else None
        if self.trouble is not None:
            if str(known) != str(self.trouble):
                _log.error('id=%s reason="%s"', self._record.plan.id, self.trouble)
        elif known is not None:
            _log.info("fenced after all id=%s", self._record.plan.id)

    def _put_up(self, index: int) -> None:
        device = self._opener(self._record, index)
        if device is None:
            return
        try:
            device.set_read_only(True)
        except OSError as error:
            device.close()
            raise fence_failed(self._record.plan.volumes[index].source, error) from error
        if isinstance(device, BlockDevice):
            device.close()
        else:
            self._held.append(device)

    def close(self) -> None:
        """Let go of the devices; the fence stays up."""
        self._down = []
        while self._held:
            with suppress(OSError):
                self._held.pop().close()


def lift(record: SourceRecord, opener: Opener, fenced: frozenset[str] = frozenset()) -> None:
    """Make sources writable again that nobody has open; but not what is `fenced` for another.

    Each even if another fails; raises the first error. Blocking.
    """
    failure: Exception | None = None
    for index, volume in enumerate(record.plan.volumes):
        try:
            if os.path.realpath(volume.source) not in fenced:
                _lift(opener(record, index))
        except (WarmsyncError, OSError) as error:
            failure = failure or error
    if failure is not None:
        raise failure


def _lift(device: Fenceable | None) -> None:
    if device is not None:
        try:
            device.set_read_only(False)
        finally:
            device.close()


def _not_fenced(volume: Volume, error: Exception) -> FailedPrecondition:
    return FailedPrecondition(
        "NOT_FENCED",
        f"the source {volume.source} is not fenced, and its old VM must not be started ({error}); "
        "tried again until it is",
        path=volume.source,
    )
