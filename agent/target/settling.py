"""What a person settles at the target: who owns the disks, where the source is gone.

Owns when that is for a person to say. The target cannot tell a source that is gone from one that
has nothing to say: it takes the word, and a source that comes back hears what was settled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agent.errors import FailedPrecondition, WarmsyncError
from agent.migration import Owner
from agent.state import Event, State
from agent.target.claim import open_devices
from agent.target.ledger import Ledger

_log = logging.getLogger(__name__)


async def settle(
    ledger: Ledger, owner: Owner, allowed: tuple[str, ...], abandon: Callable[[], None]
) -> None:
    """End a session as the person says; `abandon` gives up one that was not released.

    FailedPrecondition OWNER_KNOWN, DEVICE_IN_USE while a VM runs on what shall be the source's.
    """
    before = ledger.state
    known = ledger.snapshot().owner
    if before is State.CUT_OVER and owner is Owner.TARGET:
        ledger.move(Event.FINISH)
    elif before is State.CUT_OVER:
        async with ledger.booting.deciding:
            ledger.booting.check_idle()
            await asyncio.to_thread(_check_unused, ledger, allowed)
            ledger.move(Event.ROLL_BACK)
    elif owner is not known:
        what = "it was never released" if not before.is_terminal else f"it is {before}"
        raise FailedPrecondition(
            "OWNER_KNOWN",
            f"there is nothing to settle of migration {ledger.id}: {what}, and the {known} owns",
            id=ledger.id,
        )
    elif not before.is_terminal:
        abandon()
    if ledger.state is not before:
        _log.warning("owner settled by a person id=%s owner=%s was=%s", ledger.id, owner, before)


def _check_unused(ledger: Ledger, allowed: tuple[str, ...]) -> None:
    """What is gone, or not this agent's any more, is written to by nobody here."""
    for volume in ledger.plan.volumes:
        try:
            for device in open_devices((volume,), allowed):
                device.close()
        except WarmsyncError as error:
            if error.reason == "DEVICE_IN_USE":
                raise
            _log.warning('settled without its device id=%s reason="%s"', ledger.id, error)
